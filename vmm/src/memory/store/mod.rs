//! Where guest pages are that are not in this PC's memory.

use std::io;
use std::time::Instant;

use transport::buffer::Buffer;
use transport::ring::{Completion, Ring};

use super::fault::Page;

mod ask;
mod compress;
mod connect;
mod control;
mod copies;
mod core;
mod file;
mod health;
#[cfg(test)]
mod model_test;
mod moves;
pub mod packed;
mod placement;
pub mod protocol;
mod remote;
mod requests;
mod room;
mod stores;
#[cfg(test)]
pub(crate) mod testing;

pub use compress::{Compress, Compression};
pub(crate) use connect::random;
pub use connect::{ConnectError, Connected, MOST_THAT_HELP, OnLoss, Terms, connect};
pub use control::{Control, NoSuchHelper};
pub use file::Error as FileError;
pub use health::{Health, HelperReport, Report, Standing, Stuck};
pub use remote::Helper;
pub use room::{least, suffices};
pub use stores::Stores;

/// How soon a page is needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Urgency {
    /// Somebody stands still until it is here.
    Fault,
    /// It will probably be needed soon.
    Ahead,
}

/// Who holds the pages that are not here, for the shard of one handler: driven by that handler's thread on its
/// ring, as a [`Disk`](devices::disk::Disk) is by its worker's. No method may block.
///
/// What the handler promises, for each page by itself:
/// - [`fetch`](Self::fetch) only what was stored and not forgotten since, and only one at a time;
/// - [`store`](Self::store) only one at a time, and never together with a fetch;
/// - [`forget`](Self::forget) only while neither is in flight.
///
/// What the source promises: every page of a fetch or store is answered exactly once, in any order and grouping;
/// a request that cannot be carried out now waits. A store that follows a forget of the same page is not undone by
/// it, nor is a fetch answered with what an older store brought.
pub trait Source: Send {
    /// Prepares to be driven by `ring`. Called on the ring's thread, once, before anything below.
    ///
    /// # Errors
    /// The kernel lacks something that the source needs.
    fn attach(&mut self, ring: &mut Ring) -> io::Result<()>;

    /// Asks for `count` pages from `first` on, all of one piece.
    fn fetch(&mut self, first: Page, count: u32, urgency: Urgency);

    /// Has `content`, whole pages from `first` on and all of one piece, kept in place of what was there.
    fn store(&mut self, first: Page, content: Buffer);

    /// Says that the content of `count` pages from `first` on, all of one piece, is worthless from now on. Has no
    /// answer. Pages that nothing is kept of may be among them.
    fn forget(&mut self, first: Page, count: u32);

    /// How many pages the handler should [forget](Self::forget) that it has itself: of which what is kept is a copy, or
    /// outdated. Asked before every wait of the ring. Only as long as it does so, sources need not have room for all of
    /// the guest's RAM.
    fn short(&self) -> u64 {
        0
    }

    /// Looks at a completion of the ring; appends what it finished to `done`. `false`: it is not this source's.
    fn complete(&mut self, ring: &mut Ring, completion: Completion, done: &mut Vec<Done>) -> bool;

    /// Sends what is ready and does what is due; called before every wait of the ring. Appends what is finished
    /// to `done`, and returns when it wants to be called next at the latest.
    fn tick(&mut self, ring: &mut Ring, now: Instant, done: &mut Vec<Done>) -> Option<Instant>;

    /// Gives everything up, at the end of the guest: what is kept is worthless from now on. Nothing is called
    /// afterwards.
    fn close(&mut self, ring: &mut Ring);
}

/// What a [`Source`] has finished.
#[derive(Debug)]
pub enum Done {
    /// Pages that were asked for are here.
    Fetched {
        /// The first of them.
        first: Page,
        /// How many.
        count: u32,
        /// Their content, `count` times 4096 bytes.
        content: Buffer,
    },
    /// Every copy that the guest's policy asks for has these pages.
    Stored {
        /// The first of them.
        first: Page,
        /// How many.
        count: u32,
    },
    /// No copy is left of these pages. Answers the fetch or the store of them, if there is one in flight; also
    /// said unasked.
    Lost {
        /// The first of them.
        first: Page,
        /// How many.
        count: u32,
        /// Why, for people.
        why: String,
    },
}
