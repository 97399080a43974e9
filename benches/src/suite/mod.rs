//! The suites.

pub mod boot;
pub mod coherence;
pub mod disk;
pub mod floor;
pub mod memory;
pub mod start;
pub mod transport;

use crate::bench::Suite;

/// All of them, in the order in which they run.
pub const ALL: &[Suite] = &[
    floor::SUITE,
    transport::SUITE,
    disk::SUITE,
    memory::SUITE,
    coherence::SUITE,
    start::SUITE,
    boot::SUITE,
];
