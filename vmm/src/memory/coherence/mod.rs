//! One guest's memory on several PCs at once: which member may read or write which page, and how that changes.
//!
//! Everything here is a function from a state and an event to the next state and what is then to be done; nothing has
//! an effect. A [`Page`] is what a member knows of a page, a [`Line`] what its home knows. The messages that travel
//! between them are in [`message`], the drawing and the reasons in `docs/coherence.md`. An exhaustive search
//! (`model_test.rs`) runs these very functions through everything that can happen to a few members and pages.
//!
//! It is a directory protocol of the kind that Censier and Feautrier described (IEEE Transactions on Computers C-27,
//! 1978), with one transaction per page at a time and data that travels straight from holder to requester.

pub mod home;
pub mod member;
pub mod message;

#[cfg(test)]
mod model_test;

pub use home::Line;
pub use member::Page;

/// A message that no member which keeps to the protocol sends. Whoever sent it is not to be trusted any further: the
/// guest stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
#[error("A member of the guest broke the protocol: {0}")]
pub struct Violation(pub &'static str);
