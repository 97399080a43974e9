//! The guest's clock, by which timers count.

use std::sync::atomic::{AtomicU64, Ordering};

use devices::interrupt::Nanos;
use nix::time::{ClockId, clock_gettime};

/// Nanoseconds since the guest's power-on: this PC's monotonic clock, moved so that all members of a guest read the
/// same.
#[derive(Debug)]
pub struct Clock {
    /// What is added to the monotonic clock, wrapping.
    offset: AtomicU64,
}

impl Clock {
    /// A clock that says `now`.
    #[must_use]
    pub fn saying(now: Nanos) -> Self {
        Self { offset: AtomicU64::new(now.0.wrapping_sub(monotonic())) }
    }

    /// What it says.
    #[must_use]
    pub fn now(&self) -> Nanos {
        Nanos(monotonic().wrapping_add(self.offset.load(Ordering::Relaxed)))
    }

    /// Makes it say `now`, as after a restore, or when another member's clock was measured anew.
    pub fn set(&self, now: Nanos) {
        self.offset.store(now.0.wrapping_sub(monotonic()), Ordering::Relaxed);
    }
}

/// This PC's monotonic clock, in nanoseconds.
#[must_use]
pub fn monotonic() -> u64 {
    // The kernel always has this clock, and its seconds are not negative.
    clock_gettime(ClockId::CLOCK_MONOTONIC)
        .map_or(0, |time| time.tv_sec() as u64 * 1_000_000_000 + time.tv_nsec() as u64)
}
