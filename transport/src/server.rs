//! The answering side: accepts connections, each driven by a ring of its own.

use std::sync::Arc;
use std::time::Instant;

use crate::buffer::Buffer;
use crate::ring::{Completion, Ring};
use crate::wire::{Body, Class, Status};

/// What all connections of one serving process share: its identity, limits, and the sessions that a
/// reconnecting peer may resume.
pub struct Sessions {
    _private: (),
}

/// Bounds per connection; a peer that breaks one is cut off with the reason.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Requests without an answer.
    pub requests: u32,
    /// Payload bytes of such requests and their answers together.
    pub bytes: u64,
    /// Sessions at once, with those kept for peers that may come back.
    pub sessions: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { requests: 256, bytes: 16 << 20, sessions: 256 }
    }
}

/// A request that came in.
#[derive(Debug)]
pub struct Request {
    /// Names it within the connection.
    pub id: u64,
    /// What is asked.
    pub opcode: u16,
    /// How urgent it is.
    pub class: Class,
    /// Its structured bytes.
    pub body: Body,
    /// Its payload, in a buffer of the connection's pool (registered with the ring where possible).
    pub payload: Buffer,
    /// How many payload bytes the peer expects back at most.
    pub answer_len: usize,
}

/// What happened on a connection.
#[derive(Debug)]
pub enum Event {
    /// The hello is done.
    Opened {
        /// The name by which the peer calls itself; not to be trusted.
        peer: String,
        /// The session's identity: the same over reconnections.
        session: u128,
        /// Whether the session went on from an earlier connection, whose requests are all finished.
        resumed: bool,
    },
    /// A request to carry out; never one of `once` that was carried out before.
    Request(Request),
    /// The peer no longer waits for the answer to this request. It must still be answered, perhaps early
    /// and with [`Status::CANCELLED`].
    Cancel {
        /// The request's id.
        id: u64,
    },
    /// The connection ended (a peer's error, a cut, or a newer connection of the same session). Finish
    /// what was begun, then drop it.
    Closed {
        /// Why, for people.
        reason: String,
    },
}

/// One accepted connection.
pub struct Connection {
    _private: (),
}

impl Sessions {
    /// A process that serves peers under `name`.
    #[must_use]
    pub fn new(_name: &str, _limits: Limits) -> Arc<Self> {
        Arc::new(Self { _private: () })
    }
}

impl Connection {
    /// Takes over an accepted socket.
    #[must_use]
    pub fn new(_socket: std::net::TcpStream, _sessions: Arc<Sessions>, _ring: &mut Ring) -> Self {
        Self { _private: () }
    }

    /// Looks at a completion of the ring. `false`: it is not this connection's.
    pub fn complete(&mut self, _ring: &mut Ring, _completion: Completion, _events: &mut Vec<Event>) -> bool {
        false
    }

    /// Sends what is ready, does what is due (time-outs) and returns when it wants to be called next at
    /// the latest. Call it before every wait of the ring.
    pub fn tick(&mut self, _ring: &mut Ring, _now: Instant, _events: &mut Vec<Event>) -> Option<Instant> {
        None
    }

    /// A page-aligned buffer of `len` bytes from the connection's pool, for an answer's payload; see
    /// [`Buffer::registered`]. Its content is what some earlier request of this connection left there.
    pub fn buffer(&mut self, len: usize) -> Buffer {
        Buffer::zeroed(len)
    }

    /// Answers the request `id`; it goes out at the next [`tick`](Self::tick). After [`Event::Closed`] the
    /// answer is kept for the session only.
    pub fn answer(&mut self, _id: u64, _status: Status, _body: &[u8], _payload: Buffer) {}

    /// Requests that were given out as events and have no answer yet.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        0
    }

    /// Whether everything is over: closed, and nothing in flight. Drop the connection then.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        false
    }

    /// Says goodbye: no new requests are taken (they are not answered either: the peer sends them again to
    /// whoever serves next), the ones in flight still get their answers, then [`Event::Closed`] comes. For
    /// a server that stops.
    pub fn stop(&mut self, _reason: &str) {}
}
