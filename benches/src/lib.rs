//! Figures of Omega, each beside its floor or peer, measured in the same run.
//!
//! Absolute speeds on a shared machine mean little: what counts is the ratio to something bare that does the
//! same work next to it, so every comparison alternates between the two and compares medians.

pub mod agent;
pub mod bench;
pub mod drive;
pub mod figure;
pub mod floor;
pub mod inside;
pub mod members;
pub mod omega;
pub mod paged;
pub mod peer;
pub mod random;
pub mod region;
pub mod smaps;
pub mod stats;
pub mod suite;
pub mod zipf;
