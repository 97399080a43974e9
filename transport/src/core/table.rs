//! The asking side's requests, by the dense ids that it gives them.

use std::collections::VecDeque;

use slab::Slab;

use crate::channel::Call;

/// A request that has no answer yet.
#[derive(Debug)]
pub(crate) struct Pending {
    /// What was asked; `None` once its deadline passed: then the entry only keeps its credit.
    pub(crate) call: Option<Call>,
    /// Whether it holds credit: it went out on the connection that lasts.
    pub(crate) sent: bool,
    pub(crate) class: crate::wire::Class,
    pub(crate) once: bool,
    pub(crate) setup: bool,
    /// Payload bytes both ways.
    pub(crate) cost: u64,
}

/// No slot.
const NONE: u32 = u32::MAX;

/// Requests in the order of their ids, and the watermark of `once` requests.
pub(crate) struct Table {
    first: u64,
    slots: VecDeque<u32>,
    pending: Slab<Pending>,
    /// Ids of `once` requests from the first without an answer on, and whether they have theirs.
    once: VecDeque<(u64, bool)>,
}

impl Table {
    pub(crate) fn new() -> Self {
        Self { first: 1, slots: VecDeque::new(), pending: Slab::new(), once: VecDeque::new() }
    }

    /// Adds a request and gives it the next id.
    pub(crate) fn insert(&mut self, pending: Pending) -> u64 {
        let id = self.first + self.slots.len() as u64;
        if pending.once {
            self.once.push_back((id, false));
        }
        self.slots.push_back(self.pending.insert(pending) as u32);
        id
    }

    fn slot(&self, id: u64) -> Option<usize> {
        let at = usize::try_from(id.checked_sub(self.first)?).ok()?;
        self.slots.get(at).filter(|s| **s != NONE).map(|s| *s as usize)
    }

    pub(crate) fn get(&self, id: u64) -> Option<&Pending> {
        self.pending.get(self.slot(id)?)
    }

    pub(crate) fn get_mut(&mut self, id: u64) -> Option<&mut Pending> {
        self.pending.get_mut(self.slot(id)?)
    }

    /// Takes a request out: it has its answer.
    pub(crate) fn remove(&mut self, id: u64) -> Option<Pending> {
        let slot = self.slot(id)?;
        self.finish_once(id);
        self.slots[(id - self.first) as usize] = NONE;
        while self.slots.front() == Some(&NONE) {
            self.slots.pop_front();
            self.first += 1;
        }
        self.pending.try_remove(slot)
    }

    /// The `once` request `id` needs no record at the peer any more.
    pub(crate) fn finish_once(&mut self, id: u64) {
        if let Ok(at) = self.once.binary_search_by_key(&id, |(id, _)| *id) {
            self.once[at].1 = true;
        }
        while self.once.front().is_some_and(|(_, done)| *done) {
            self.once.pop_front();
        }
    }

    /// Every `once` request with a lower id has its answer.
    pub(crate) fn acked(&self) -> u64 {
        self.once.front().map_or(self.first + self.slots.len() as u64, |(id, _)| *id)
    }

    /// Whether the `once` request `id` is among the first `window` that the peer may have to remember.
    pub(crate) fn in_window(&self, id: u64, window: u32) -> bool {
        let at = self.once.partition_point(|(other, _)| *other < id);
        at < window as usize
    }

    /// Ids in order.
    pub(crate) fn ids(&self) -> Vec<u64> {
        (0..).zip(&self.slots).filter(|(_, s)| **s != NONE).map(|(i, _)| self.first + i).collect()
    }

    pub(crate) fn len(&self) -> usize {
        self.pending.len()
    }
}
