//! What this PC's clocks say.
#![allow(unsafe_code)] // Reads the time stamp counter.

use devices::interrupt::{Nanos, Tsc};

use super::protocol::Moment;
use crate::cpu::monotonic;

impl Moment {
    /// Now.
    #[must_use]
    pub fn here() -> Self {
        // SAFETY: every processor that has KVM has a time stamp counter, and Linux lets programs read it.
        let tsc = unsafe { std::arch::x86_64::_rdtsc() };
        Self { tsc: Tsc(tsc), monotonic: Nanos(monotonic()) }
    }
}
