//! What connections count: requests, bytes and latencies for each peer, class and operation.
//!
//! A [`Recorder`] belongs to one [`Channel`](crate::channel::Channel) or
//! [`Connection`](crate::server::Connection) and is written by the one thread that drives it; any thread may
//! read the [`Metrics`] behind it. The numbers are relaxed atomics, so recording takes no lock, and nothing
//! is allocated for a request but for the first one of its class and operation. A [`Snapshot`] is therefore
//! not of one instant: a request that ends meanwhile may be in one number and not yet in another.
//!
//! A server with many connections keeps their recorders in a [`Registry`], by peer. Every number is
//! described in `docs/metrics.md`.

mod histogram;
mod recorder;
mod registry;
mod snapshot;

pub use histogram::{Distribution, Histogram};
pub(crate) use recorder::{Ended, Kind};
pub use recorder::{Metrics, Recorder};
pub use registry::{OTHERS, Registration, Registry};
pub use snapshot::{Credit, Series, Snapshot};

/// The operations that the user of a transport has: their opcodes and the names under which they are
/// counted. All other opcodes are counted as [`OTHER`] together.
#[derive(Clone, Copy, Debug, Default)]
pub struct Operations(pub &'static [(u16, &'static str)]);

/// Under this name requests with an opcode are counted that the table of operations does not have.
pub const OTHER: &str = "other";

impl Operations {
    /// The name of an opcode.
    #[must_use]
    pub fn name(&self, opcode: u16) -> &'static str {
        self.0.iter().find(|(known, _)| *known == opcode).map_or(OTHER, |(_, name)| name)
    }

    /// The place of an opcode in the table; the table's length for one that is not in it.
    fn place(&self, opcode: u16) -> usize {
        self.0.iter().position(|(known, _)| *known == opcode).unwrap_or(self.0.len())
    }

    /// The name at a [place](Self::place).
    fn at(&self, place: usize) -> &'static str {
        self.0.get(place).map_or(OTHER, |(_, name)| name)
    }
}
