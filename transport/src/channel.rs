//! The asking side: one logical connection to a peer that outlives its sockets.

use std::time::{Duration, Instant};

use crate::buffer::Buffer;
use crate::ring::{Completion, Ring};
use crate::wire::{Body, Class, Status};

/// Where to connect and how patient to be.
#[derive(Clone, Debug)]
pub struct Config {
    /// `host:port`.
    pub address: String,
    /// Who we are, for the peer's log and its leases: shown, not trusted.
    pub name: String,
    /// A connection that carried nothing for this long, though pinged, is dead.
    pub dead_after: Duration,
    /// The first pause between two attempts to connect; it doubles up to `retry_most`.
    pub retry_first: Duration,
    /// The longest pause between two attempts to connect.
    pub retry_most: Duration,
}

/// One request.
#[derive(Debug)]
pub struct Call {
    /// Comes back with the answer.
    pub tag: u64,
    /// What is asked; numbered by the user of the transport.
    pub opcode: u16,
    /// How urgent it is.
    pub class: Class,
    /// A few structured bytes, at most [`MAX_BODY`](crate::wire::MAX_BODY).
    pub body: Body,
    /// Bytes to send along, at most [`MAX_PAYLOAD`](crate::wire::MAX_PAYLOAD).
    pub payload: Buffer,
    /// Where the answer's payload goes; an answer with more is an error of the peer. At most
    /// [`MAX_PAYLOAD`](crate::wire::MAX_PAYLOAD); empty for a `once` call, whose answer is status and body.
    pub answer: Buffer,
    /// The peer must not carry it out twice, even if it is sent again over a new connection. (A plain
    /// read may simply be repeated and costs the peer no memory.)
    pub once: bool,
    /// When to give up; `None` waits for ever.
    pub deadline: Option<Instant>,
    /// May go out while a new session [waits for its set-up](Event::Opened), before everything else. It
    /// belongs to that opening: if another session opens before its answer came, it is answered with
    /// [`Status::CANCELLED`] ahead of the new [`Event::Opened`]. If the session resumes, it is sent again.
    pub setup: bool,
}

/// The answer to one request.
#[derive(Debug)]
pub struct Answer {
    /// The request's tag.
    pub tag: u64,
    /// What the peer said, or [`Status::DEADLINE`].
    pub status: Status,
    /// The answer's structured bytes.
    pub body: Body,
    /// The request's `payload`, back.
    pub payload: Buffer,
    /// The request's `answer`, filled with `received` bytes.
    pub answer: Buffer,
    /// How many payload bytes came.
    pub received: usize,
}

/// What happened on a channel.
#[derive(Debug)]
pub enum Event {
    /// A session was opened with a peer that knows nothing of an earlier one (the first time, or the
    /// peer was restarted). Requests wait until [`Channel::ready`]; only `setup` requests go out.
    Opened {
        /// Changes with every start of the peer's process.
        instance: u128,
        /// Changes with every boot of the peer's kernel: what was not flushed to stable storage may be gone.
        boot: u128,
        /// The name by which the peer calls itself.
        peer: String,
    },
    /// The earlier session goes on over a new connection; what was in flight was sent again.
    Resumed,
    /// The connection is gone; the channel tries again by itself.
    Lost {
        /// Why, for people.
        reason: String,
    },
    /// An answer.
    Answer(Answer),
}

/// See the [module](self). Driven by the thread that owns the ring: [`submit`](Channel::submit)
/// requests, hand it its [completions](Channel::complete), and call [`tick`](Channel::tick) before every
/// wait of the ring: that is when everything that became ready goes out, in one system call.
///
/// The kernel never holds a pointer to a call's buffers between two calls of these functions.
pub struct Channel {
    _private: (),
}

impl Channel {
    /// A channel that starts to connect at the first [`tick`](Self::tick).
    #[must_use]
    pub fn new(_config: Config, _ring: &mut Ring) -> Self {
        Self { _private: () }
    }

    /// Takes `call`; it goes out at the next [`tick`](Self::tick) when credits, class and connection
    /// allow. Never blocks. A call that breaks a limit of [`Call`] is answered with
    /// [`Status::MALFORMED`] at the next tick.
    pub fn submit(&mut self, _call: Call) {}

    /// Looks at a completion of the ring. `false`: it is not this channel's.
    pub fn complete(&mut self, _ring: &mut Ring, _completion: Completion, _events: &mut Vec<Event>) -> bool {
        false
    }

    /// Ends the set-up of a new session: requests in flight are sent again in the order in which they were
    /// submitted, then new ones follow.
    pub fn ready(&mut self) {}

    /// Sends what is ready, does what is due (connecting, pings, deadlines) and returns when it wants to
    /// be called next at the latest. Call it before every wait of the ring.
    pub fn tick(&mut self, _ring: &mut Ring, _now: Instant, _events: &mut Vec<Event>) -> Option<Instant> {
        None
    }

    /// How many calls have no answer yet.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        0
    }

    /// Takes back every call that has no answer yet, in the order of submission, and closes the
    /// connection. The peer forgets the session. Never blocks.
    pub fn close(&mut self, _ring: &mut Ring) -> Vec<Call> {
        Vec::new()
    }
}
