//! The suites.

pub mod boot;
pub mod coherence;
pub mod disk;
pub mod floor;
pub mod memory;
pub mod span;
pub mod start;
pub mod transport;

use anyhow::Result;

use crate::bench::{Bench, Readings, Suite};

/// All of them, in the order in which they run.
pub const ALL: &[Suite] = &[
    floor::SUITE,
    transport::SUITE,
    disk::SUITE,
    memory::SUITE,
    coherence::SUITE,
    start::SUITE,
    boot::SUITE,
    span::SUITE,
];

/// What is measured together.
type Part = fn(&Bench, &mut Readings) -> Result<()>;

/// Measures the parts of which figures are wanted. Figures of a part that fails are missing, with the reason.
fn parts(all: &[(Part, &[&'static str])], bench: &Bench, readings: &mut Readings) {
    for (part, names) in all {
        if names.iter().any(|name| bench.wants(name))
            && let Err(why) = part(bench, readings)
        {
            names.iter().for_each(|name| readings.missing(name, format!("{why:#}")));
        }
    }
}
