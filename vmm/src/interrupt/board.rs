//! The chipset, behind its lock.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use devices::interrupt::io_apic::Messages;
use devices::interrupt::{ApicId, Chipset, Message, Nanos, View};
use devices::lifecycle::{DeviceState, Error, Lifecycle};
use serde::{Deserialize, Serialize};

use super::timer;
use crate::cpu::{Clock, Fabric, Switch};

/// The processor that the PIC's output is wired to.
const BOOTSTRAP: ApicId = ApicId(0);
const KIND: &str = "chipset";
const VERSION: u32 = 1;

/// I/O APIC, PIC and PIT of a guest. To its vCPUs' local APICs it is their [`Fabric`], to devices their interrupt
/// controller.
pub struct Board {
    pub(super) shared: Arc<Shared>,
}

/// What the board shares with its timer's thread.
pub(super) struct Shared {
    pub(super) switch: Arc<Switch>,
    clock: Arc<Clock>,
    held: Mutex<Held>,
    /// The thread has to look again.
    pub(super) changed: Condvar,
}

/// What the lock is for.
pub(super) struct Held {
    chipset: Chipset,
    /// The PIC's output, as the bootstrap processor knows it.
    intr: bool,
    /// Whether time may make interrupts: not while the machine is paused.
    pub(super) runs: bool,
    pub(super) ended: bool,
    /// Until when the timer's thread sleeps.
    pub(super) sleeps_until: Option<Nanos>,
}

/// The state of the board, as a value.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    chipset: Chipset,
    /// The guest's clock, by which all of its timers count.
    now: Nanos,
}

impl Board {
    /// The chipset in the state of power-up. It reaches local APICs by `switch`; its timer counts `clock`.
    ///
    /// # Errors
    /// The timer's thread cannot be started.
    pub fn new(switch: Arc<Switch>, clock: Arc<Clock>) -> io::Result<Self> {
        let held =
            Held { chipset: Chipset::default(), intr: false, runs: false, ended: false, sleeps_until: None };
        let shared = Arc::new(Shared { switch, clock, held: Mutex::new(held), changed: Condvar::new() });
        timer::start(Arc::clone(&shared))?;
        Ok(Self { shared })
    }

    /// The guest's local APICs.
    #[must_use]
    pub fn switch(&self) -> &Arc<Switch> {
        &self.shared.switch
    }

    /// The guest's clock.
    #[must_use]
    pub fn clock(&self) -> &Arc<Clock> {
        &self.shared.clock
    }
}

impl Shared {
    pub(super) fn lock(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn now(&self) -> Nanos {
        self.clock.now()
    }

    /// Has `act` do something to the chipset, and carries out what follows from it.
    pub(super) fn with<T>(&self, act: impl FnOnce(&mut Chipset, Nanos) -> (T, Messages)) -> T {
        let mut held = self.lock();
        let (result, messages) = act(&mut held.chipset, self.now());
        self.post(&mut held, messages);
        self.settle(&mut held);
        result
    }

    /// Lets the timer interrupt if it may and is due, brings the bootstrap processor's LINT0 in line, and sees to it
    /// that the timer's thread looks in time.
    pub(super) fn settle(&self, held: &mut Held) {
        if held.runs && held.chipset.deadline().is_some() {
            let messages = held.chipset.advance(self.now());
            self.post(held, messages);
        }
        let intr = held.chipset.intr();
        if intr != held.intr {
            held.intr = intr;
            self.switch.set_lint0(BOOTSTRAP, intr);
        }
        let earlier = match (held.deadline(), held.sleeps_until) {
            (Some(deadline), Some(sleeps_until)) => deadline < sleeps_until,
            (Some(_), None) => true,
            (None, _) => false,
        };
        if earlier {
            self.changed.notify_all();
        }
    }

    /// Under the lock, so that what the guest sees of the chipset and what its processors get is in one order.
    fn post(&self, held: &mut Held, messages: Messages) {
        for raised in messages {
            if !self.switch.post(&raised.message) {
                held.chipset.io_apic().refused(raised.pin);
            }
        }
    }
}

impl Held {
    /// When time makes an interrupt, if it may.
    pub(super) fn deadline(&self) -> Option<Nanos> {
        self.chipset.deadline().filter(|_| self.runs)
    }
}

impl Drop for Board {
    fn drop(&mut self) {
        self.shared.lock().ended = true;
        self.shared.changed.notify_all();
    }
}

impl Fabric for Board {
    fn send(&self, message: Message) {
        self.shared.switch.post(&message);
    }

    fn end_of_interrupt(&self, vector: u8) {
        self.shared.with(|chipset, _| ((), chipset.io_apic().end_of_interrupt(vector)));
    }

    fn view(&self, view: View) {
        if self.shared.switch.set_view(view) {
            self.shared.with(|chipset, _| ((), chipset.io_apic().retry()));
        }
    }

    fn refused(&self, vector: u8) {
        self.shared.with(|chipset, _| {
            chipset.io_apic().refused_vector(vector);
            ((), Messages::new())
        });
    }

    fn acknowledge(&self) -> Option<u8> {
        Some(self.shared.with(|chipset, _| (chipset.acknowledge(), Messages::new())))
    }
}

impl Lifecycle for Board {
    fn kind(&self) -> &'static str {
        KIND
    }

    fn start(&self) -> Result<(), Error> {
        let mut held = self.shared.lock();
        held.runs = true;
        self.shared.settle(&mut held);
        Ok(())
    }

    fn stop(&self) -> Result<(), Error> {
        self.shared.lock().runs = false;
        Ok(())
    }

    fn save(&self) -> Result<DeviceState, Error> {
        let chipset = self.shared.lock().chipset.clone();
        DeviceState::of(KIND, VERSION, &Saved { chipset, now: self.shared.now() })
    }

    fn restore(&self, state: &DeviceState) -> Result<(), Error> {
        let saved: Saved = state.value(KIND, VERSION)?;
        let mut held = self.shared.lock();
        self.shared.clock.set(saved.now);
        held.chipset = saved.chipset;
        self.shared.settle(&mut held);
        Ok(())
    }

    fn reset(&self) -> Result<(), Error> {
        let mut held = self.shared.lock();
        (held.runs, _) = (false, held.chipset.reset());
        self.shared.settle(&mut held);
        Ok(())
    }
}
