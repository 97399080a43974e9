//! vCPUs move from one PC to another while the guest stands still for a moment.
//!
//! ```text
//! source          console node                         target
//!    ◀─── Save ───────┤  interrupts for it wait here
//!    ├─── State ─────▶│
//!    │                ├──── Restore ──────────────────▶│  it is here; its pages come as it touches them
//!    │                │◀─── Restored ──────────────────┤
//!    ◀─── Leave ──────┤  interrupts go there from now on
//! ```
//!
//! Until it is restored the source has all of it, so a move that fails changes nothing.

use std::sync::{Arc, Mutex};

use devices::interrupt::{ApicId, LocalApic, Message, Targets};

use super::far::Far;
use super::helper::Helper;
use super::{Error, Spanning, console};
use crate::config::CONSOLE;
use crate::cpu::{Elsewhere, Place, Switch};
use crate::interrupt::Board;
use crate::machine::controllers::Vcpus;
use crate::machine::parts::{Parts, lock};
use crate::machine::processor::Vcpu;
use crate::machine::vcpus;
use crate::memory::coherence::message::Member;

/// Why vCPUs cannot be moved as it was asked.
#[derive(Debug, thiserror::Error)]
pub(in crate::machine) enum Refused {
    #[error("the guest has no vCPU {0}; it has {1}, numbered from 0")]
    NoVcpu(u8, usize),
    #[error("vCPU 0 stays on the console node: the chipset's interrupts are wired to it")]
    First,
    #[error("no PC of this guest is called `{0}`; there are: {1}")]
    NoNode(String, String),
    #[error("{0} runs {1} of {1} vCPUs that it lends the guest; raise `room` of its `[[cpu.place]]`")]
    Full(String, u8),
}

/// Interrupts that wait for a vCPU which is on its way. Each is there once, so they cannot become many.
#[derive(Default)]
struct Waiting(Mutex<Vec<Message>>);

impl Elsewhere for Waiting {
    fn post(&self, _targets: Targets, message: Message) {
        let mut waiting = lock(&self.0);
        if !waiting.contains(&message) {
            waiting.push(message);
        }
    }
}

impl Spanning {
    /// The processor for vCPU `index`, if that is elsewhere when the guest starts; `ours` is this PC's, for later.
    pub(in crate::machine) fn vcpu(&self, index: u8, board: &Board, ours: Box<dyn Vcpu>) -> Box<dyn Vcpu> {
        let member = self.lock_places().get(usize::from(index)).copied();
        let Some(helper) = member.and_then(|member| self.helper(member)) else { return ours };
        let far = Far::new(&helper.share, index);
        if let Some(place) = far.place() {
            board.switch().put(LocalApic::new(ApicId(index), false).view(), place);
        }
        lock(&self.spare).insert(index, ours);
        Box::new(far)
    }

    /// The PC that is called `node`.
    pub(in crate::machine) fn member(&self, node: &str) -> Result<Member, Refused> {
        let named = self.helpers.iter().find(|helper| helper.name() == node).map(|helper| helper.member);
        let named = named.or_else(|| console().ok().filter(|_| node == CONSOLE));
        named.ok_or_else(|| {
            let names = self.helpers.iter().map(Helper::name);
            let names: Vec<_> = std::iter::once(CONSOLE).chain(names).collect();
            Refused::NoNode(node.to_owned(), names.join(", "))
        })
    }

    /// Whether vCPU `index` may go to `to`.
    pub(in crate::machine) fn may_go(&self, index: u8, to: Member) -> Result<(), Refused> {
        let places = self.lock_places();
        let Some(from) = places.get(usize::from(index)) else {
            return Err(Refused::NoVcpu(index, places.len()));
        };
        match self.helper(to) {
            _ if *from == to => Ok(()),
            _ if index == 0 => Err(Refused::First),
            Some(helper) if room(&places, to, helper.room) == 0 => {
                Err(Refused::Full(helper.name().to_owned(), helper.room))
            }
            _ => Ok(()),
        }
    }

    /// Where each vCPU of `from` goes when that shall have none: to other helpers as long as they have room, and then to
    /// the console node.
    pub(in crate::machine) fn without(&self, from: Member) -> Vec<(u8, Member)> {
        let mut places = self.lock_places().clone();
        let Some(console) = places.first().copied() else { return Vec::new() };
        let leaving: Vec<usize> = (0..places.len()).filter(|at| places[*at] == from).collect();
        let mut plan = Vec::new();
        for at in leaving {
            let others = self.helpers.iter().filter(|helper| helper.member != from);
            let free = others.map(|helper| (room(&places, helper.member, helper.room), helper.member));
            let (_, to) =
                free.filter(|(room, _)| *room > 0).max_by_key(|(room, _)| *room).unwrap_or((0, console));
            places[at] = to;
            plan.push((at as u8, to));
        }
        plan
    }

    /// Moves vCPU `index`, which does not run. If it cannot, it is where it was.
    fn carry(&self, vcpus: &Vcpus, index: u8, to: Member) -> Result<(), Error> {
        let (Some(board), Some(slot)) = (self.board.get(), vcpus.get(usize::from(index))) else {
            return Ok(());
        };
        let clock = vcpus.first().map_or(Ok(0), |first| lock(first).tsc_offset())?;
        let (switch, id) = (board.switch(), ApicId(index));
        let mut vcpu = lock(slot);
        let waiting = Arc::new(Waiting::default());
        switch.place(id, Place::Elsewhere(Arc::clone(&waiting) as _));
        let mut next = match self.helper(to) {
            Some(helper) => Some(Box::new(Far::new(&helper.share, index)) as Box<dyn Vcpu>),
            None => lock(&self.spare).remove(&index),
        };
        let moved = match &mut next {
            Some(next) => {
                vcpu.save().and_then(|state| next.restore(&state)).and_then(|()| next.set_tsc_offset(clock))
            }
            None => Err(Error::Cpu { index, why: "it has no processor on this PC".to_owned() }),
        };
        if let (Ok(()), Some(next)) = (&moved, &mut next) {
            std::mem::swap(&mut *vcpu, next);
            self.lock_places()[usize::from(index)] = to;
        }
        if let Some(mut other) = next {
            other.leave();
            if matches!(other.place(), Some(Place::Here(_))) {
                lock(&self.spare).insert(index, other);
            }
        }
        if let Some(place) = vcpu.place() {
            switch.place(id, place);
        }
        release(switch, id, &waiting);
        moved
    }
}

/// How many more of `places` may be `member`'s.
fn room(places: &[Member], member: Member, most: u8) -> usize {
    usize::from(most).saturating_sub(places.iter().filter(|at| **at == member).count())
}

/// Hands over what has waited.
fn release(switch: &Switch, id: ApicId, waiting: &Waiting) {
    for message in lock(&waiting.0).drain(..) {
        switch.deliver([id].into_iter().collect(), &message);
    }
}

impl Parts {
    /// Moves vCPUs, while the guest is paused.
    pub(in crate::machine) fn move_vcpus(&self, plan: &[(u8, Member)]) -> Result<(), Error> {
        let Some(spanning) = &self.spanning else { return Ok(()) };
        let moved = plan.iter().try_for_each(|(index, to)| {
            let from = spanning.lock_places().get(usize::from(*index)).copied();
            if from == Some(*to) { Ok(()) } else { spanning.carry(&self.vcpus, *index, *to) }
        });
        vcpus::set_kick(self);
        moved
    }
}
