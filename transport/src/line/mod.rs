//! A *line*: messages both ways over one session, posted by whoever has something to say.
//!
//! A session has a side that asks and a side that answers. Here the asking side keeps requests outstanding, and each
//! of them may carry a message there; its answer may carry a message back, whenever there is one. So a message there
//! and the one that it leads to are a request and its answer: a line costs what a bare round trip costs.
//!
//! In each direction messages are numbered. They arrive in order, none is lost, and none comes twice, whatever happens to
//! the connections of the session. When the session is gone (one of both ends was started anew), so is the line, and
//! both ends are told why. Drawn in `docs/wire.md`.
//!
//! [`Asking`] is the end that dials, driven on anybody's [`Ring`](crate::ring::Ring), or by a thread of its own:
//! [`thread::start`]. [`Answering`] is the end that was dialled, and [`Serving`] its part of one connection.

mod answering;
mod asking;
mod order;
pub mod protocol;
mod sender;
pub mod thread;

pub use answering::{Answering, Serving};
pub use asking::Asking;
pub(crate) use order::{Receiving, Sending, Violation, exercise};
pub use sender::Sender;

use crate::buffer::Buffer;
use crate::wire::{Body, MAX_BODY};

/// The longest body of a message, in bytes.
pub const MOST_BODY: usize = MAX_BODY - protocol::HEADER;
/// The longest payload of a message, in bytes: a few pages.
pub const MOST_PAYLOAD: usize = 16 << 10;
/// So many requests of a line are outstanding at most.
pub const WINDOW: usize = 128;
/// So many of them wait at the answering end for a message, at most.
pub const HELD: usize = 32;

/// One message.
#[derive(Debug)]
pub(crate) struct Message {
    pub(crate) body: Body,
    pub(crate) payload: Buffer,
}

impl Message {
    /// How much memory it takes, about.
    fn cost(&self) -> usize {
        self.body.len() + self.payload.len() + size_of::<Self>()
    }

    /// The same message, sharing its payload.
    fn again(&self) -> Self {
        let payload = self.payload.slice(0, self.payload.len()).unwrap_or_default();
        Self { body: self.body.clone(), payload }
    }
}

/// Who hears what comes down a line. All of it is called on the thread that drives the line's end, between its waits: it
/// should be quick, and what it [sends](Sender::send) goes out with the same system call.
pub trait Hear: Send + Sync {
    /// A message came.
    fn hear(&self, body: &[u8], payload: Option<Buffer>);

    /// The connection is gone (or there is none yet), and messages wait. It is being made anew.
    fn away(&self, why: &str);

    /// The line is there: for the first time, or again.
    fn back(&self);

    /// The line is over for good. What was not delivered never will be.
    fn over(&self, why: &str);
}
