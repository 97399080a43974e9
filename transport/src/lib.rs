//! Connections between the PCs that lend parts to one guest.
//!
//! A [`Channel`](channel::Channel) is the asking side: it sends requests of several
//! [classes](wire::Class), receives the answers in any order, reconnects by itself and replays what
//! was in flight so that each request takes effect once. A [`Connection`](server::Connection) is the
//! answering side. Both are driven by a [`Ring`](ring::Ring), one io_uring owned by one thread, so
//! a user of this crate submits its own file I/O and its network I/O with one system call.
//!
//! This crate knows nothing of what it carries. The wire format is drawn in `docs/wire.md`.

pub mod blocking;
pub mod buffer;
mod carrier;
pub mod channel;
mod core;
#[cfg(test)]
mod dice;
#[doc(hidden)]
pub mod fuzzing;
pub mod identity;
pub mod line;
mod link;
pub mod metrics;
pub mod pool;
pub mod ring;
pub mod server;
mod sessions;
mod trace;
pub mod wire;

pub use carrier::Carrier;
