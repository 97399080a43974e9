//! One guest's memory on several PCs at once: which member may read or write which page, and how that changes.
//!
//! What is decided is a function from a state and an event to the next state and what is then to be done, without
//! effects; an [`Engine`] carries it out on real memory. A [`Page`] is what a member knows of a page, a [`Line`] what its home knows. The messages that travel
//! between them are in [`message`], the drawing and the reasons in `docs/coherence.md`. An exhaustive search
//! (`model_test.rs`) runs these very functions through everything that can happen to a few members and pages.
//!
//! It is a directory protocol of the kind that Censier and Feautrier described (IEEE Transactions on Computers C-27,
//! 1978), with one transaction per page at a time and data that travels straight from holder to requester.

mod ahead;
mod attend;
mod counters;
mod engine;
mod holds;
pub mod home;
mod homes;
pub mod member;
pub mod message;
mod shard;
mod table;
mod timer;
pub mod wire;

#[cfg(test)]
mod litmus_test;
#[cfg(test)]
mod model_test;
#[cfg(test)]
pub(crate) mod testing;

pub use attend::{Board, Rider};
pub use counters::Counters;
pub use engine::{Broken, Ear, Engine, Error, Lines, Options};
pub use home::Line;
pub use homes::Homes;
pub use member::Page;

/// A message that no member which keeps to the protocol sends. Whoever sent it is not to be trusted any further: the
/// guest stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
#[error("A member of the guest broke the protocol: {0}")]
pub struct Violation(pub &'static str);
