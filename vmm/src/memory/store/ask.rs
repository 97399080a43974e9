//! What the [core](super::core) and its places say to each other: no protocol, no connection.

use std::ops::Range;

use smallvec::SmallVec;
use transport::buffer::Buffer;

use super::Urgency;

/// A request to one place. Pages are counted along the RAM file.
///
/// A place carries stores and forgets out in the order in which it was asked, also when it was away meanwhile.
#[derive(Debug)]
pub(super) struct Ask {
    /// Comes back with the answer.
    pub(super) tag: u64,
    pub(super) what: What,
}

#[derive(Debug)]
pub(super) enum What {
    Fetch { first: u64, count: u32, urgency: Urgency },
    Store { first: u64, content: Buffer },
    Forget { ranges: SmallVec<[Range<u64>; 4]> },
}

/// The answer to an [`Ask`].
#[derive(Debug)]
pub(super) enum Outcome {
    /// As many bytes as were asked for.
    Fetched(Buffer),
    /// It is stored, or forgotten.
    Done,
    /// This page of a fetch is not there.
    Absent(u64),
    /// Not now; it is to be asked again after a while.
    Refused(String),
}

/// What happened at a place.
#[derive(Debug)]
pub(super) enum News {
    /// It answers, and has what it had.
    Here,
    /// It does not; requests wait.
    Away(String),
    /// What it had is gone, and no request from before is answered. It may be used again once it is here.
    Lost(String),
    /// As [`Lost`](Self::Lost), and it is never here again.
    Left(String),
    /// The answer to the request with this tag.
    Answer(u64, Outcome),
}
