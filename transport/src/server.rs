//! The answering side: accepts connections, each driven by a ring of its own.

use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::eventfd::EventFd;

use crate::buffer::Buffer;
pub use crate::carrier::Carrier;
use crate::core::answerer::Answerer;
use crate::identity::{Peer, Security};
use crate::link::Link;
use crate::link::connect::eventfd;
use crate::link::rdma::{self, Side, Upgradable};
use crate::link::tcp::TcpLink;
use crate::link::tls::RECORDS;
use crate::link::tls::handshake::Handshake;
use crate::metrics::Recorder;
use crate::ring::{Completion, Ring, Source};
use crate::sessions::Claimant;
use crate::wire::{Body, Class, Fault, Status};

pub use crate::sessions::Sessions;

/// Bounds per connection; a peer that breaks one is cut off with the reason.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Requests without an answer.
    pub requests: u32,
    /// Payload bytes of such requests and their answers together.
    pub bytes: u64,
    /// Sessions at once, with those kept for peers that may come back.
    pub sessions: usize,
    /// Sessions that have a connection at once.
    pub connections: usize,
    /// As many of these may be one node's, by the name that it proved.
    pub per_node: usize,
    /// Whether peers may move to RDMA, whose payloads are not encrypted.
    pub rdma: bool,
}

impl Default for Limits {
    fn default() -> Self {
        Self { requests: 256, bytes: 16 << 20, sessions: 256, connections: 256, per_node: 256, rdma: true }
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
    /// Follows the request through the logs of both sides: what is logged within it carries the request's
    /// name (`docs/metrics.md`). Disabled, and so free, unless such a log is wanted.
    pub span: tracing::Span,
}

/// What happened on a connection.
#[derive(Debug)]
pub enum Event {
    /// The hello is done.
    Opened {
        /// The name by which the peer calls itself; not to be trusted.
        name: String,
        /// Who the peer has proven to be; `None` without TLS.
        peer: Option<Peer>,
        /// The session's identity: the same over reconnections.
        session: u128,
        /// Whether the session went on from an earlier connection, whose requests are all finished.
        resumed: bool,
        /// What carries the connection.
        carrier: Carrier,
    },
    /// Something else carries the connection from now on.
    Carrier(Carrier),
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

/// One accepted connection, driven by the ring of one thread: hand it the ring's
/// [completions](Self::complete), and [`tick`](Self::tick) it before every wait.
pub struct Connection {
    core: Answerer,
    link: Option<Box<dyn Link>>,
    source: Source,
    /// Rung by the thread of an earlier connection of the same session when that is finished.
    bell: Option<Arc<EventFd>>,
    bell_polled: bool,
    heard: bool,
    /// The peer seems gone.
    doubtful: bool,
    fault: Option<Fault>,
    /// When a connection that was stopped is closed if the peer does not do it.
    closes_at: Option<Instant>,
}

/// The token of the bell.
const BELL: u64 = (1 << 48) - 1;

/// How long a peer may refuse to read.
const STUCK: Duration = Duration::from_secs(60);

/// How long a peer may take to close after all its answers are out.
const FAREWELL: Duration = Duration::from_secs(2);

/// Well behind the number at which the asking side replaces the connection, and well before what is safe.
const RECORDS_MOST: u64 = RECORDS + RECORDS / 4;

fn link(socket: Arc<TcpStream>, source: Source, security: &Security) -> Result<Box<dyn Link>, Fault> {
    let handshake = match security {
        Security::Plain => None,
        Security::Tls(identity) => Some(Handshake::answering(identity)?),
    };
    let mut link = TcpLink::new(socket, source, 0, handshake)?;
    link.wears_out(RECORDS_MOST, false);
    Ok(Box::new(link))
}

impl Connection {
    /// Takes over an accepted socket. With TLS, the peer must prove to be a node of the household before
    /// anything else.
    #[must_use]
    pub fn new(socket: TcpStream, sessions: Arc<Sessions>, security: &Security, ring: &mut Ring) -> Self {
        let source = ring.source();
        let socket = Arc::new(socket);
        let (cut, bell) = (socket.clone(), eventfd().map(Arc::new));
        let rings = bell.as_ref().ok().cloned();
        let claimant = Claimant {
            number: sessions.number(),
            cut: Arc::new(move || {
                // It fails only on a socket that is closed already.
                let _ = cut.shutdown(Shutdown::Both);
            }),
            wake: Arc::new(move || {
                // It fails only if the bell has been rung for ever, and then it is heard anyway.
                let _ = rings.as_ref().map(|bell| bell.write(1));
            }),
        };
        // Without an address, or a thread, it is refused as on a PC without a device.
        let local = socket.local_addr().map_or(std::net::Ipv4Addr::UNSPECIFIED.into(), |local| local.ip());
        let allowed = sessions.limits.rdma;
        let _ = rdma::opener::start();
        let core = Answerer::new(sessions, claimant, Instant::now());
        let mut fault = None;
        let link = link(socket, source, security).map_err(|e| fault = Some(e)).ok().map(|link| {
            let side = Side::Answering { allowed };
            Box::new(Upgradable::new(link, side, local, source, 0)) as Box<dyn Link>
        });
        let bell = bell.map_err(|e| fault = Some(e.into())).ok();
        Self {
            core,
            link,
            source,
            bell,
            bell_polled: false,
            heard: false,
            doubtful: false,
            fault,
            closes_at: None,
        }
    }

    /// Has what happens from here on counted by `recorder`; to be called before the first
    /// [`tick`](Self::tick).
    pub fn record(&mut self, recorder: Recorder) {
        self.core.recorder = Some(recorder);
    }

    /// Looks at a completion of the ring. `false`: it is not this connection's.
    pub fn complete(&mut self, _ring: &mut Ring, completion: Completion, events: &mut Vec<Event>) -> bool {
        if completion.token.source() != self.source {
            return false;
        }
        self.core.at(Instant::now());
        if completion.token.payload() == BELL {
            self.bell_polled = false;
            let _ = self.bell.as_ref().map(|bell| bell.read());
            self.fault = self.fault.take().or(self.core.claim().err());
        } else if let Some(link) = &mut self.link
            && self.fault.is_none()
            && self.core.check().is_ok()
        {
            match link.completed(completion.token.payload(), completion.result, &mut self.core) {
                Ok(heard) => self.heard |= heard,
                Err(fault) => self.fault = Some(fault),
            }
        }
        self.core.take_events(events);
        true
    }

    /// Sends what is ready, does what is due (time-outs) and returns when it wants to be called next at
    /// the latest. Call it before every wait of the ring.
    pub fn tick(&mut self, ring: &mut Ring, now: Instant, events: &mut Vec<Event>) -> Option<Instant> {
        self.core.at(now);
        self.core.count(self.link.as_ref().map(|link| link.carrier()));
        if std::mem::take(&mut self.heard) {
            self.doubtful = false;
            self.core.heard(now);
        }
        let due = self.clock(now);
        self.fault = self.fault.take().or(self.core.check().err());
        let (mut stuck, mut wants) = (None, None);
        if let Some(link) = &mut self.link {
            if self.fault.is_none() {
                self.fault = link.send(&mut self.core).err();
            }
            stuck = link.blocked_since().map(|since| since + STUCK);
            if stuck.is_some_and(|at| at <= now) {
                self.fault = self.fault.take().or(Some(Fault::Stuck(STUCK.as_secs())));
            }
            wants = link.due();
            if self.core.is_drained() && link.is_flushed() && self.closes_at.is_none() {
                link.finish();
                self.closes_at = Some(now + FAREWELL);
            }
        }
        if self.closes_at.is_some_and(|at| at <= now) {
            self.fault = self.fault.take().or(Some(Fault::Closed));
        }
        if let Some(fault) = self.fault.take() {
            self.end(ring, &fault);
        }
        self.core.pool.register(ring);
        self.arm(ring);
        if let Some(link) = &mut self.link {
            while let Some((carrier, _)) = link.take_notice() {
                events.push(Event::Carrier(carrier));
            }
        }
        self.core.take_events(events);
        self.link.as_ref()?;
        [due, stuck, self.closes_at, wants].into_iter().flatten().min()
    }

    fn clock(&mut self, now: Instant) -> Option<Instant> {
        match self.core.tick(now) {
            Ok(due) => return due,
            // Perhaps it was this thread that did not listen: it has one more look at the ring.
            Err(_) if !self.doubtful => {
                self.doubtful = true;
                return Some(now);
            }
            Err(fault) => self.fault = self.fault.take().or(Some(fault)),
        }
        None
    }

    fn arm(&mut self, ring: &mut Ring) {
        let Some(link) = &mut self.link else { return };
        link.arm(ring);
        if let Some(bell) = &self.bell
            && (self.core.is_waiting() || self.core.is_proven())
            && !self.bell_polled
        {
            ring.poll_readable(bell.as_fd().as_raw_fd(), false, self.source.token(BELL));
            self.bell_polled = true;
        }
    }

    /// Ends the connection, with a word to the peer where it helps.
    fn end(&mut self, ring: &mut Ring, fault: &Fault) {
        let Some(mut link) = self.link.take() else { return self.core.closed(fault) };
        // Who was revoked gets nothing more of what it asked for.
        let quiet = matches!(fault, Fault::Revoked(_));
        if quiet {
            self.core.drop_replies();
        }
        self.core.say_goodbye(fault);
        if !quiet || link.drop_queued() {
            // As far as the network takes it now; the peer sees the end in any case.
            let _ = link.send(&mut self.core);
        }
        link.close(ring);
        if self.bell_polled {
            ring.cancel(self.source.token(BELL));
        }
        self.core.pool.unregister(ring);
        self.core.closed(fault);
    }

    /// A page-aligned buffer of `len` bytes from the connection's pool, for an answer's payload; see
    /// [`Buffer::registered`]. Its content is what some earlier request of this connection left there.
    pub fn buffer(&mut self, len: usize) -> Buffer {
        self.core.pool.take(len)
    }

    /// Answers the request `id`; it goes out at the next [`tick`](Self::tick). After [`Event::Closed`] the
    /// answer is kept for the session only.
    pub fn answer(&mut self, id: u64, status: Status, body: &[u8], payload: Buffer) {
        self.core.at(Instant::now());
        self.core.answer(id, status, body, payload);
    }

    /// Requests that were given out as events and have no answer yet.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.core.in_flight()
    }

    /// Whether the peer's hello came: with TLS, it has proven then who it is.
    #[must_use]
    pub fn is_known(&self) -> bool {
        self.core.is_known()
    }

    /// Who the peer has proven to be, as long as the connection lives; `None` without TLS.
    #[must_use]
    pub fn peer(&self) -> Option<&Peer> {
        self.core.peer()
    }

    /// Whether everything is over: closed, and nothing in flight. Drop the connection then.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.core.is_finished()
    }

    /// Says goodbye: no new requests are taken (they are not answered either: the peer sends them again to
    /// whoever serves next), the ones in flight still get their answers, then [`Event::Closed`] comes. For
    /// a server that stops.
    pub fn stop(&mut self, reason: &str) {
        if self.core.is_greeting() {
            self.fault = self.fault.take().or(Some(Fault::Closed));
        }
        self.core.stop(reason);
    }
}
