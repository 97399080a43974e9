//! Where others leave interrupts for a vCPU's local APIC.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread::{self, Thread};
use std::time::Duration;

use devices::interrupt::local::Lint;
use devices::interrupt::{ApicId, Delivery, Destination, LocalApic, Message, Trigger};

use super::Kick;

/// What waits beside vectors; [`Inbox::other`].
const NMI: u32 = 1 << 0;
const INIT: u32 = 1 << 1;
const EXTERNAL: u32 = 1 << 2;
/// The level of the pin LINT0, and that it rose since somebody looked.
const LINT0: u32 = 1 << 3;
const LINT0_ROSE: u32 = 1 << 4;
/// A SIPI, whose vector is in bits 15:8.
const START_UP: u32 = 1 << 5;
const START_UP_VECTOR: u32 = 0xff << 8;

/// What the vCPU's thread is doing; [`Inbox::mode`].
const LOOKS: u8 = 0;
const IN_GUEST: u8 = 1;
const SLEEPS: u8 = 2;

/// A set of vectors that many threads put into and one takes out of.
#[derive(Default)]
struct Vectors([AtomicU64; 4]);

impl Vectors {
    fn insert(&self, vector: u8) {
        self.0[usize::from(vector / 64)].fetch_or(1 << (vector % 64), Ordering::SeqCst);
    }

    fn take(&self, mut each: impl FnMut(u8)) {
        for (at, word) in (0..4).zip(&self.0) {
            let mut bits = if word.load(Ordering::Relaxed) == 0 { 0 } else { word.swap(0, Ordering::SeqCst) };
            while bits != 0 {
                each(at * 64 + bits.trailing_zeros() as u8);
                bits &= bits - 1;
            }
        }
    }

    fn clear(&self) {
        self.take(|_| {});
    }
}

/// What has arrived for a local APIC and its vCPU's thread has not looked at yet.
///
/// Pending interrupts are bits, as in the APIC itself, so nobody can make it grow. Whatever is left here makes the vCPU's
/// thread look at it soon: a thread in guest code is kicked out of it, one that sleeps because its vCPU is halted wakes.
#[derive(Default)]
pub struct Inbox {
    edge: Vectors,
    level: Vectors,
    other: AtomicU32,
    /// Something of the above may be there.
    filled: AtomicBool,
    /// The vCPU is to leave its loop.
    kicked: AtomicBool,
    mode: AtomicU8,
    thread: Mutex<Option<(Thread, Kick)>>,
}

impl Inbox {
    /// Leaves a message that was routed to this APIC. From any thread.
    pub fn post(&self, message: &Message) {
        if !message.acts() {
            return;
        }
        match (message.delivery, message.trigger) {
            (Delivery::Fixed | Delivery::LowestPriority, Trigger::Edge) => self.edge.insert(message.vector),
            (Delivery::Fixed | Delivery::LowestPriority, Trigger::Level) => self.level.insert(message.vector),
            (Delivery::Smi, _) => return,
            (Delivery::Nmi, _) => self.change(|other| other | NMI),
            (Delivery::External, _) => self.change(|other| other | EXTERNAL),
            // It forgets a SIPI that came before; the first that comes after it counts.
            (Delivery::Init, _) => self.change(|other| other & !(START_UP | START_UP_VECTOR) | INIT),
            (Delivery::StartUp, _) => self.change(|other| match other & START_UP {
                0 => other | START_UP | u32::from(message.vector) << 8,
                _ => other,
            }),
        }
        self.fill();
    }

    /// The level of the pin LINT0. From any thread, one at a time.
    pub fn set_lint0(&self, high: bool) {
        let before = self.other.load(Ordering::SeqCst);
        if (before & LINT0 != 0) != high {
            self.change(|other| if high { other | LINT0 | LINT0_ROSE } else { other & !LINT0 });
            self.fill();
        }
    }

    /// Makes the vCPU's loop return to its caller, whatever it does.
    pub fn kick(&self) {
        self.kicked.store(true, Ordering::SeqCst);
        self.wake();
    }

    fn change(&self, new: impl Fn(u32) -> u32) {
        let _ = self.other.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |other| Some(new(other)));
    }

    fn fill(&self) {
        self.filled.store(true, Ordering::SeqCst);
        self.wake();
    }

    /// Only the first that finds the vCPU's thread in guest code or asleep has to do something about it.
    fn wake(&self) {
        let mode = self.mode.swap(LOOKS, Ordering::SeqCst);
        if mode == LOOKS {
            return;
        }
        if let Some((thread, kick)) = &*self.thread.lock().unwrap_or_else(PoisonError::into_inner) {
            if mode == SLEEPS { thread.unpark() } else { kick() }
        }
    }

    /// From now on it is the calling thread that runs the vCPU; `kick` makes it leave guest code.
    pub(super) fn attach(&self, kick: Kick) {
        *self.thread.lock().unwrap_or_else(PoisonError::into_inner) = Some((thread::current(), kick));
    }

    /// Hands everything to `apic`; `refused` hears of level-triggered vectors that it did not take. Only by the thread
    /// that owns the APIC.
    pub(super) fn empty_into(&self, apic: &mut LocalApic, mut refused: impl FnMut(u8)) {
        if !self.filled.load(Ordering::Relaxed) || !self.filled.swap(false, Ordering::SeqCst) {
            return;
        }
        let message = |delivery, vector, trigger| {
            let destination = Destination::Physical(ApicId(0xff));
            Message { destination, delivery, vector, trigger, asserted: true }
        };
        let mut other = 0;
        let _ = self.other.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |now| {
            other = now;
            Some(now & LINT0)
        });
        let start_up = ((other & START_UP_VECTOR) >> 8) as u8;
        let events = [
            (INIT, Delivery::Init, 0),
            (START_UP, Delivery::StartUp, start_up),
            (NMI, Delivery::Nmi, 0),
            (EXTERNAL, Delivery::External, 0),
        ];
        for (_, delivery, vector) in events.into_iter().filter(|(bit, ..)| other & bit != 0) {
            apic.accept(&message(delivery, vector, Trigger::Edge));
        }
        if other & LINT0_ROSE != 0 {
            apic.set_lint(Lint::Lint0, true);
        }
        apic.set_lint(Lint::Lint0, other & LINT0 != 0);
        // Level after edge: of a vector that came as both, the I/O APIC waits for the end.
        self.edge.take(|vector| {
            apic.accept(&message(Delivery::Fixed, vector, Trigger::Edge));
        });
        self.level.take(|vector| {
            if !apic.accept(&message(Delivery::Fixed, vector, Trigger::Level)) {
                refused(vector);
            }
        });
    }

    /// Forgets everything but the pin's level.
    pub(super) fn clear(&self) {
        self.edge.clear();
        self.level.clear();
        self.change(|other| other & LINT0);
    }

    /// The level of the pin LINT0.
    pub(super) fn lint0(&self) -> bool {
        self.other.load(Ordering::SeqCst) & LINT0 != 0
    }

    /// Whether somebody wants the vCPU to leave its loop, which is then forgotten.
    pub(super) fn take_kick(&self) -> bool {
        self.kicked.load(Ordering::Relaxed) && self.kicked.swap(false, Ordering::SeqCst)
    }

    /// Whether there is something to look at.
    pub(super) fn wants_a_look(&self) -> bool {
        self.filled.load(Ordering::SeqCst) || self.kicked.load(Ordering::SeqCst)
    }

    /// To be called before guest code is entered: `false` if there is something to look at first. From then on until
    /// [`left`](Self::left) this thread is kicked.
    pub(super) fn enters(&self) -> bool {
        self.mode.store(IN_GUEST, Ordering::SeqCst);
        let enters = !self.wants_a_look();
        if !enters {
            self.left();
        }
        enters
    }

    /// Guest code was left.
    pub(super) fn left(&self) {
        self.mode.store(LOOKS, Ordering::SeqCst);
    }

    /// Waits until there is something to look at, `timeout` at most. May return early.
    pub(super) fn sleep(&self, timeout: Option<Duration>) {
        self.mode.store(SLEEPS, Ordering::SeqCst);
        if !self.wants_a_look() {
            match timeout {
                Some(timeout) => thread::park_timeout(timeout),
                None => thread::park(),
            }
        }
        self.left();
    }
}

#[cfg(test)]
#[path = "inbox_test.rs"]
mod tests;
