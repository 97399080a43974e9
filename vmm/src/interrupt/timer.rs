//! The thread that makes the PIT interrupt. An operating system uses the PIT for a moment at its start, if at all, so
//! the thread sleeps nearly always.

use std::io;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use devices::thread::{Role, spawn};

use super::board::Shared;

/// Starts it; it ends with the board.
pub(super) fn start(shared: Arc<Shared>) -> io::Result<()> {
    spawn(Role::Device, "pit", move || run(&shared)).map(drop)
}

fn run(shared: &Shared) {
    let mut held = shared.lock();
    while !held.ended {
        shared.settle(&mut held);
        let deadline = held.deadline();
        held.sleeps_until = deadline;
        held = match deadline {
            None => shared.changed.wait(held).unwrap_or_else(PoisonError::into_inner),
            Some(deadline) => {
                let patience = Duration::from_nanos(deadline.since(shared.now()));
                shared.changed.wait_timeout(held, patience).unwrap_or_else(PoisonError::into_inner).0
            }
        };
    }
}
