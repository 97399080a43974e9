//! What this PC's clocks say.

use devices::interrupt::Nanos;

use super::protocol::Moment;
use crate::cpu::monotonic;

impl Moment {
    /// Now.
    #[must_use]
    pub fn here() -> Self {
        Self { tsc: crate::kvm::tsc::now(), monotonic: Nanos(monotonic()) }
    }
}
