//! The clocks that timers count by. Who drives a timer reads them; nothing in here does.

use serde::{Deserialize, Serialize};

/// Nanoseconds since the guest's power-on: the one clock of all its members.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Nanos(pub u64);

impl Nanos {
    /// The time from `earlier` until this; 0 if that was not earlier.
    #[must_use]
    pub fn since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }

    /// `nanos` later, at most the end of time.
    #[must_use]
    pub fn after(self, nanos: u64) -> Self {
        Self(self.0.saturating_add(nanos))
    }
}

/// A value of the guest's time stamp counter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Tsc(pub u64);

/// What both clocks say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Now {
    /// The guest's clock.
    pub nanos: Nanos,
    /// The time stamp counter of the vCPU in question.
    pub tsc: Tsc,
}

/// When a timer has to be looked at again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deadline {
    /// At this time of the guest's clock.
    Nanos(Nanos),
    /// When the vCPU's time stamp counter has this value.
    Tsc(Tsc),
}
