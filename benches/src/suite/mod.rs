//! The suites.

pub mod floor;

use crate::bench::Suite;

/// All of them, in the order in which they run.
pub const ALL: &[Suite] = &[floor::SUITE];
