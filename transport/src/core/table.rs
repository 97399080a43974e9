//! The asking side's requests. A request gets its id when it first goes out in a session, so that ids grow
//! in the order of sending and the peer has to remember only what it saw.

use std::collections::VecDeque;
use std::time::Instant;

use slab::Slab;

use crate::channel::Call;
use crate::metrics::Kind;
use crate::wire::Class;

/// A request that has no answer yet.
#[derive(Debug)]
pub(crate) struct Pending {
    /// What was asked; `None` once its deadline passed: then the entry only keeps its credit.
    pub(crate) call: Option<Call>,
    /// Its id in the session; 0 if it did not go out yet.
    pub(crate) id: u64,
    /// Grows with every call that is submitted.
    pub(crate) order: u64,
    /// Whether it holds credit: it went out on the connection that lasts.
    pub(crate) sent: bool,
    /// Whether it went out on any connection.
    pub(crate) went: bool,
    /// When it was submitted.
    pub(crate) since: Instant,
    /// Where it is counted.
    pub(crate) kind: Kind,
    /// Follows it through the logs of both sides.
    pub(crate) span: tracing::Span,
    pub(crate) class: Class,
    pub(crate) once: bool,
    pub(crate) setup: bool,
    /// Payload bytes both ways.
    pub(crate) cost: u64,
}

/// No slot.
const NONE: u32 = u32::MAX;

/// Requests by slot and by id, and the watermark of `once` requests.
pub(crate) struct Table {
    pending: Slab<Pending>,
    /// Slots of the ids from `first` on.
    slots: VecDeque<u32>,
    first: u64,
    /// Ids of `once` requests from the first without an answer on, and whether they have theirs.
    once: VecDeque<(u64, bool)>,
    submitted: u64,
}

impl Table {
    pub(crate) fn new() -> Self {
        Self { pending: Slab::new(), slots: VecDeque::new(), first: 1, once: VecDeque::new(), submitted: 0 }
    }

    /// Adds a call; returns its slot.
    pub(crate) fn insert(&mut self, call: Call, since: Instant, kind: Kind) -> usize {
        self.submitted += 1;
        self.pending.insert(Pending {
            id: 0,
            order: self.submitted,
            sent: false,
            went: false,
            since,
            kind,
            span: tracing::Span::none(),
            class: call.class,
            once: call.once,
            setup: call.setup,
            cost: (call.payload.len() + call.answer.len()) as u64,
            call: Some(call),
        })
    }

    /// Gives the request in `slot` the next id, if it has none.
    pub(crate) fn number(&mut self, slot: usize) {
        let next = self.next_id();
        let Some(pending) = self.pending.get_mut(slot).filter(|pending| pending.id == 0) else { return };
        pending.id = next;
        if pending.once {
            self.once.push_back((next, false));
        }
        self.slots.push_back(slot as u32);
    }

    fn next_id(&self) -> u64 {
        self.first + self.slots.len() as u64
    }

    /// The slot of the request `id`.
    pub(crate) fn find(&self, id: u64) -> Option<usize> {
        let at = usize::try_from(id.checked_sub(self.first)?).ok()?;
        self.slots.get(at).filter(|slot| **slot != NONE).map(|slot| *slot as usize)
    }

    pub(crate) fn get(&self, slot: usize) -> Option<&Pending> {
        self.pending.get(slot)
    }

    pub(crate) fn get_mut(&mut self, slot: usize) -> Option<&mut Pending> {
        self.pending.get_mut(slot)
    }

    /// Takes a request out: it has its answer, or nobody waits for one.
    pub(crate) fn remove(&mut self, slot: usize) -> Option<Pending> {
        let pending = self.pending.try_remove(slot)?;
        if pending.id != 0 {
            self.confirm(pending.id);
            let at = usize::try_from(pending.id.saturating_sub(self.first)).unwrap_or(usize::MAX);
            if let Some(slot) = self.slots.get_mut(at) {
                *slot = NONE;
            }
            while self.slots.front() == Some(&NONE) {
                self.slots.pop_front();
                self.first += 1;
            }
        }
        Some(pending)
    }

    /// The peer need not remember the `once` request `id` any more.
    pub(crate) fn confirm(&mut self, id: u64) {
        if let Ok(at) = self.once.binary_search_by_key(&id, |(id, _)| *id) {
            self.once[at].1 = true;
        }
        while self.once.front().is_some_and(|(_, done)| *done) {
            self.once.pop_front();
        }
    }

    /// Every `once` request with a lower id has its answer.
    pub(crate) fn acked(&self) -> u64 {
        self.once.front().map_or_else(|| self.next_id(), |(id, _)| *id)
    }

    /// How many `once` requests the peer may have to remember.
    pub(crate) fn unconfirmed(&self) -> usize {
        self.once.len()
    }

    /// A new session: what went out in the old one has no id in it.
    pub(crate) fn forget_ids(&mut self) {
        self.first = self.next_id();
        self.slots.clear();
        self.once.clear();
        self.pending.iter_mut().for_each(|(_, pending)| pending.id = 0);
    }

    /// Slots in the order of submission.
    pub(crate) fn in_order(&self) -> Vec<usize> {
        let mut slots: Vec<(u64, usize)> = self.pending.iter().map(|(slot, p)| (p.order, slot)).collect();
        slots.sort_unstable();
        slots.into_iter().map(|(_, slot)| slot).collect()
    }

    pub(crate) fn len(&self) -> usize {
        self.pending.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::Body;

    fn call(once: bool) -> Call {
        Call { once, ..Call::new(0, 0, Class::Normal, Body::new()) }
    }

    #[test]
    fn the_watermark_is_the_first_once_request_without_an_answer() {
        let mut table = Table::new();
        let slots: Vec<usize> = [true, false, true, true]
            .map(|once| table.insert(call(once), Instant::now(), Kind::default()))
            .into();
        assert_eq!(table.acked(), 1, "nothing went out yet");
        slots.iter().for_each(|slot| table.number(*slot));
        assert_eq!((table.acked(), table.unconfirmed()), (1, 3));
        table.remove(slots[2]);
        assert_eq!((table.acked(), table.unconfirmed()), (1, 3), "the first still waits");
        table.remove(slots[0]);
        assert_eq!((table.acked(), table.unconfirmed()), (4, 1));
        table.remove(slots[3]);
        assert_eq!((table.acked(), table.unconfirmed()), (5, 0));
        assert_eq!(table.find(2), Some(slots[1]));
        assert_eq!(
            (table.find(0), table.find(1), table.find(5), table.find(u64::MAX)),
            (None, None, None, None)
        );
        table.forget_ids();
        assert_eq!((table.find(2), table.acked(), table.len()), (None, 5, 1));
        table.number(slots[1]);
        assert_eq!(table.find(5), Some(slots[1]));
    }
}
