//! The end of a machine, in order: vCPUs, devices with what the guest wrote, memory on other PCs.
//!
//! Threads that hang in a page fault are never waited for: their page may never come. And the fault engine is closed
//! only when nothing touches guest RAM any more: what hung would go on with zeros, perhaps onto a disk. If that cannot
//! be, the end of the process ends everything at once, and the leases run out.

use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread::{JoinHandle, sleep};
use std::time::{Duration, Instant};

use devices::thread::{Role, spawn};

use super::parts::{Parts, lock};
use super::spanning::Spanning;
use super::vcpus::Threads;
use super::{Error, Exit};
use crate::control::State;

/// How long vCPUs may take before the devices are drained without them.
const VCPUS: Duration = Duration::from_secs(2);
/// How long everything may take of a guest that is ended without being asked, or whose memory is away.
const ABRUPT: Duration = Duration::from_secs(8);
const LOOK: Duration = Duration::from_millis(100);

/// Ends the machine that came to `exit`.
pub(super) fn end(parts: &Arc<Parts>, keeper: JoinHandle<()>, exit: &Result<Exit, Error>) {
    parts.set_state(State::Ending);
    parts.gang.end();
    let abrupt = matches!(exit, Ok(Exit::Killed | Exit::MemoryLost));
    if parts.paging.is_some() || parts.spanning.is_some() {
        paged(parts, abrupt);
        return;
    }
    if abrupt {
        // A device may be waiting for something that never comes; the process's end frees it all.
        return;
    }
    for thread in parts.threads.take() {
        let _ = thread.join();
    }
    drop(keeper);
    let _life = lock(&parts.life);
    drain(parts);
}

/// Ends a machine with memory on other PCs, on a thread of its own: anything may hang in a page fault.
fn paged(parts: &Arc<Parts>, abrupt: bool) {
    let (tell, told) = channel();
    let (all, vcpus) = (Arc::clone(parts), parts.threads.clone());
    let body = move || {
        let still = vcpus.ended_within(if abrupt { VCPUS } else { Duration::MAX });
        if drain(&all) && still {
            all.paging.iter().for_each(|paging| paging.engine.close());
            all.spanning.iter().for_each(Spanning::close);
        }
        // Nobody waits any more if it took too long.
        let _ = tell.send(());
    };
    // Its memory is not given back before the process ends, which is what closes the engine otherwise.
    std::mem::forget(Arc::clone(parts));
    if let Err(error) = spawn(Role::Main, "ending", body) {
        tracing::warn!(%error, "The guest's devices could not be drained at the end");
        return;
    }
    let mut hopeless: Option<Instant> = abrupt.then(Instant::now);
    while told.recv_timeout(LOOK) == Err(RecvTimeoutError::Timeout) {
        if !abrupt {
            hopeless = parts.waits_for_memory().then(|| hopeless.unwrap_or_else(Instant::now));
        }
        if hopeless.is_some_and(|since| since.elapsed() >= ABRUPT) {
            tracing::warn!("The guest ended without waiting for what needs its memory on a PC that is away");
            return;
        }
    }
}

/// Drains the devices, so that what the guest wrote is where it belongs, and ends them. `false` if some may still
/// touch guest RAM.
fn drain(parts: &Parts) -> bool {
    let mut whole = true;
    let stopped: Vec<_> = parts
        .devices
        .iter()
        .filter(|device| match device.life.stop() {
            Ok(()) => true,
            Err(error) => {
                tracing::warn!(device = device.name, %error, "The device could not be drained at the end");
                whole = false;
                false
            }
        })
        .collect();
    // Controllers hold these parts until the process ends, so nothing would be dropped before.
    for device in if parts.paging.is_some() || parts.spanning.is_some() {
        stopped
    } else {
        parts.devices.iter().collect()
    } {
        device.life.end();
    }
    whole
}

impl Threads {
    /// Waits until every vCPU's thread has ended, at most for `patience`; whether they have.
    fn ended_within(&self, patience: Duration) -> bool {
        let begun = Instant::now();
        while !self.ended() {
            if begun.elapsed() >= patience {
                return false;
            }
            sleep(Duration::from_millis(2));
        }
        true
    }
}
