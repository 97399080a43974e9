//! All vCPUs of a machine pause and resume together.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use devices::bus::Deferred;

/// How often a vCPU that waits for a deferred access looks whether it shall pause.
const GLANCE: Duration = Duration::from_millis(5);
/// How often kicks are repeated while vCPUs have not paused: one may fall into the moment before a vCPU's
/// thread can take it.
const KICK_AGAIN: Duration = Duration::from_millis(50);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Order {
    Run,
    Pause,
    End,
}

struct State {
    order: Order,
    /// vCPUs that have paused with every access finished.
    parked: usize,
    /// vCPUs that wait for a deferred access and know that they shall pause.
    holding: usize,
}

/// vCPUs did not pause in time.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("{0} vCPUs have not paused")]
pub struct Stuck(usize);

/// Something that makes the vCPU threads leave guest code.
pub type Kick = Box<dyn Fn() + Send + Sync>;

/// The vCPUs of a machine, as one. Starts paused.
pub struct Gang {
    count: usize,
    state: Mutex<State>,
    changed: Condvar,
    kick: Mutex<Option<Kick>>,
}

impl Gang {
    /// A gang of `count` vCPUs, all to be parked by their threads first.
    #[must_use]
    pub fn new(count: usize) -> Self {
        let state = State { order: Order::Pause, parked: 0, holding: 0 };
        Self { count, state: Mutex::new(state), changed: Condvar::new(), kick: Mutex::new(None) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How the vCPU threads are made to leave guest code, once they exist.
    pub fn set_kick(&self, kick: Kick) {
        *self.kick.lock().unwrap_or_else(PoisonError::into_inner) = Some(kick);
    }

    fn kick(&self) {
        if let Some(kick) = &*self.kick.lock().unwrap_or_else(PoisonError::into_inner) {
            kick();
        }
    }

    fn order(&self, order: Order) {
        let mut state = self.lock();
        if state.order != Order::End {
            state.order = order;
        }
        drop(state);
        self.changed.notify_all();
        if order != Order::Run {
            self.kick();
        }
    }

    /// Whether a vCPU may run guest code now.
    #[must_use]
    pub fn may_run(&self) -> bool {
        self.lock().order == Order::Run
    }

    /// Makes all vCPUs pause, without waiting for it; a vCPU may call it.
    pub fn request_pause(&self) {
        self.order(Order::Pause);
    }

    /// Pauses all vCPUs: at return none runs guest code, though some may still wait for a device to
    /// finish an access ([`settle`](Self::settle) waits for these too).
    ///
    /// # Errors
    /// Some have not paused within `patience`.
    pub fn pause(&self, patience: Duration) -> Result<(), Stuck> {
        self.pause_unless(patience, &|| false)
    }

    /// As [`pause`](Self::pause), but gives up as soon as `hopeless` says so, which is asked now and then: a vCPU
    /// whose page is on a PC that is away leaves guest code only when that is back. The order stays: such a vCPU
    /// runs no instruction of the guest before it pauses.
    ///
    /// # Errors
    /// Some have not paused within `patience`, or it is hopeless.
    pub fn pause_unless(&self, patience: Duration, hopeless: &dyn Fn() -> bool) -> Result<(), Stuck> {
        self.request_pause();
        self.wait(patience, hopeless, |state| state.parked + state.holding)
    }

    /// After a pause and after the devices have finished what they were asked: waits until every access
    /// is finished and every vCPU's state is whole.
    ///
    /// # Errors
    /// Some are not there within `patience`.
    pub fn settle(&self, patience: Duration) -> Result<(), Stuck> {
        self.settle_unless(patience, &|| false)
    }

    /// As [`settle`](Self::settle), but gives up as soon as `hopeless` says so.
    ///
    /// # Errors
    /// Some are not there within `patience`, or it is hopeless.
    pub fn settle_unless(&self, patience: Duration, hopeless: &dyn Fn() -> bool) -> Result<(), Stuck> {
        self.wait(patience, hopeless, |state| state.parked)
    }

    fn wait(
        &self,
        patience: Duration,
        hopeless: &dyn Fn() -> bool,
        paused: impl Fn(&State) -> usize,
    ) -> Result<(), Stuck> {
        let end = Instant::now() + patience;
        let mut state = self.lock();
        while paused(&state) < self.count {
            if Instant::now() >= end {
                return Err(Stuck(self.count - paused(&state)));
            }
            let waited = self.changed.wait_timeout(state, KICK_AGAIN);
            let (guard, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
            state = guard;
            if timeout.timed_out() {
                drop(state);
                self.kick();
                let hopeless = hopeless();
                state = self.lock();
                if hopeless && paused(&state) < self.count {
                    return Err(Stuck(self.count - paused(&state)));
                }
            }
        }
        Ok(())
    }

    /// Lets all vCPUs run.
    pub fn resume(&self) {
        self.order(Order::Run);
    }

    /// Makes all vCPU threads end.
    pub fn end(&self) {
        self.order(Order::End);
    }

    /// Called by a vCPU's thread outside [`run`](super::run): waits while paused. False means that the
    /// thread shall end.
    pub fn park(&self) -> bool {
        let mut state = self.lock();
        if state.order == Order::Pause {
            state.parked += 1;
            self.changed.notify_all();
            while state.order == Order::Pause {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            state.parked -= 1;
        }
        state.order == Order::Run
    }

    /// Waits for a deferred access, through pauses; `None` when the gang ends before it is completed.
    pub fn hold(&self, token: &Deferred) -> Option<Vec<u8>> {
        let mut counted = false;
        let answer = loop {
            if let Some(answer) = token.wait(GLANCE) {
                break Some(answer);
            }
            let mut state = self.lock();
            let paused = state.order == Order::Pause;
            match (paused, counted) {
                (true, false) => state.holding += 1,
                (false, true) => state.holding -= 1,
                _ => {}
            }
            counted = paused;
            if state.order == Order::End {
                break None;
            }
            self.changed.notify_all();
        };
        if counted {
            self.lock().holding -= 1;
        }
        answer
    }
}

#[cfg(test)]
#[path = "gang_test.rs"]
mod tests;
