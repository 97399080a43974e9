//! Guest RAM whose pages may be elsewhere: faults are seen through userfaultfd, pages are installed and given up
//! here. Where they are meanwhile is a [`Source`](super::store::Source)'s business.

pub mod ageing;
mod counters;
mod engine;
mod evict;
mod handler;
mod ledger;
mod mailbox;
mod pages;
pub mod streams;

pub use super::frames::{PAGE, Page, Piece, Pieces, Shards};
pub use counters::Counters;
pub use engine::{Engine, Error, Options};

/// How many handlers a guest of so many vCPUs gets: no more than can fault at once, and than leave a CPU of this PC for
/// each to the vCPUs. Where CPUs are few, one handler answers several vCPUs faster than several fight for a CPU with
/// them.
#[must_use]
pub fn handlers(vcpus: usize) -> usize {
    let host = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    vcpus.min(host / 2).clamp(1, 4)
}
