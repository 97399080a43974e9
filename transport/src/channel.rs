//! The asking side: one logical connection to a peer that outlives its sockets.

use std::collections::VecDeque;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::buffer::Buffer;
pub use crate::carrier::Carrier;
use crate::core::asker::{Asker, Identity};
use crate::identity::{Peer, Security};
use crate::link::Link;
use crate::link::connect::{self, Resolver};
pub use crate::link::rdma::BUILT as RDMA_BUILT;
use crate::link::rdma::{self, Attempts, Side, Upgradable};
use crate::link::tcp::TcpLink;
use crate::link::tls::RECORDS;
use crate::link::tls::handshake::Handshake;
use crate::metrics::Recorder;
use crate::ring::{Completion, Ring, Source};
use crate::sessions::random;
use crate::wire::{Body, Class, Fault, Status};

/// Where to connect and how patient to be.
#[derive(Clone, Debug)]
pub struct Config {
    /// `host:port`.
    pub address: String,
    /// Who we are, for the peer's log and its leases: shown, not trusted.
    pub name: String,
    /// How the connection is protected.
    pub security: Security,
    /// The node that the peer must prove to be; `None`: any agent of the household, and for as long as this
    /// channel lives the one that it met first.
    pub node: Option<String>,
    /// A connection that carried nothing for this long, though pinged, is dead.
    pub dead_after: Duration,
    /// The first pause between two attempts to connect; it doubles up to `retry_most`.
    pub retry_first: Duration,
    /// The longest pause between two attempts to connect.
    pub retry_most: Duration,
    /// What may carry the connection.
    pub transport: Transport,
}

/// What may carry a connection. It always begins over TCP (with TLS where that is asked for); RDMA is agreed
/// on there and takes over when it has proved to work.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Transport {
    /// RDMA where both PCs have it, else TCP.
    #[default]
    Auto,
    /// As [`Auto`](Self::Auto), but [`Event::Carrier`] says each time why TCP has to stand in.
    Rdma,
    /// TCP only: for a link whose payloads must be encrypted.
    Tcp,
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

impl Call {
    /// A call of `body` alone, with no payload either way, that may be repeated and waits for ever.
    #[must_use]
    pub fn new(tag: u64, opcode: u16, class: Class, body: Body) -> Self {
        Self {
            tag,
            opcode,
            class,
            body,
            payload: Buffer::empty(),
            answer: Buffer::empty(),
            once: false,
            deadline: None,
            setup: false,
        }
    }
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
        /// The name by which the peer calls itself: shown, not trusted.
        name: String,
        /// Who the peer has proven to be; `None` without TLS.
        peer: Option<Peer>,
        /// What carries the connection.
        carrier: Carrier,
    },
    /// The earlier session goes on over a new connection; what was in flight was sent again.
    Resumed {
        /// What carries the new connection.
        carrier: Carrier,
    },
    /// Something else carries the connection from now on, or (`Tcp`, with the reason) RDMA could not be had.
    Carrier {
        /// What carries it.
        carrier: Carrier,
        /// Why it is not RDMA; empty if it is, or if nobody asked.
        why: String,
    },
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
    config: Config,
    core: Asker,
    source: Source,
    /// Counts connections, to tell their completions apart.
    generation: u64,
    names: Names,
    bell_polled: bool,
    state: State,
    /// The next pause between two attempts to connect.
    pause: Duration,
    /// Something came since the last tick.
    heard: bool,
    /// The peer seems dead.
    doubtful: bool,
    /// What ended the connection since the last tick.
    fault: Option<Fault>,
    /// Records of TLS after which a new connection takes over.
    records: u64,
    /// When the peer's certificate is looked up again.
    look_up_at: Instant,
    /// When RDMA may be tried again.
    attempts: Attempts,
    /// Why RDMA could not be had, as was said last.
    missed: String,
}

/// How far the connection is.
enum State {
    /// The next attempt is made at this time.
    Idle(Instant),
    /// The name is looked up.
    Resolving,
    /// The kernel connects, until this time; then it is the next address's turn.
    Connecting { socket: TcpStream, done: bool, until: Instant, rest: VecDeque<SocketAddr> },
    /// It is there.
    Linked(Box<dyn Link>),
    /// The channel was closed.
    Closed,
}

fn new_session(config: &Config, now: Instant) -> Asker {
    let dead_after = config.dead_after.max(Duration::from_millis(30));
    Asker::new(Identity::of_this_process(&config.name), random(), dead_after, now)
}

/// Finds the addresses behind a peer's name, on a thread of its own where it is a name and not a number.
///
/// A thread that is confined may not start another, and what the system's resolver does (files, other
/// sockets, libraries that it loads) is not a data path's: make this before, on a thread that may.
pub struct Names(Resolver);

impl Names {
    /// Of `address`, `host:port`.
    ///
    /// # Errors
    /// There is no thread or descriptor to be had.
    pub fn of(address: &str) -> io::Result<Self> {
        rdma::opener::start()?;
        Resolver::new(address).map(Self)
    }
}

/// The token of the resolver's bell.
const BELL: u64 = (1 << 48) - 1;

/// How often the peer's certificate is looked up in the list of those that were revoked.
const LOOK_UP_EVERY: Duration = Duration::from_secs(1);

/// The longest time for one attempt to connect.
const CONNECT_WITHIN: Duration = Duration::from_secs(5);

impl Channel {
    /// A channel that starts to connect at the first [`tick`](Self::tick), to `names`, which are those of the
    /// configuration's address. It starts no thread, so a confined one may make it.
    #[must_use]
    pub fn new(config: Config, names: Names, ring: &mut Ring) -> Self {
        let now = Instant::now();
        let core = new_session(&config, now);
        let pause = config.retry_first;
        Self {
            config,
            core,
            source: ring.source(),
            generation: 0,
            names,
            bell_polled: false,
            state: State::Idle(now),
            pause,
            heard: false,
            doubtful: false,
            fault: None,
            records: RECORDS,
            look_up_at: now,
            attempts: Attempts::new(now),
            missed: String::new(),
        }
    }

    /// Has what happens from here on counted by `recorder`; to be called before the first
    /// [`submit`](Self::submit).
    pub fn record(&mut self, recorder: Recorder) {
        self.core.recorder = Some(recorder);
    }

    /// Has a new connection take over after so many records of TLS, instead of after as many as are safe.
    #[doc(hidden)]
    pub fn replace_after(&mut self, records: u64) {
        self.records = records.min(RECORDS);
    }

    /// Takes `call`; it goes out at the next [`tick`](Self::tick) when credits, class and connection
    /// allow. Never blocks. A call that breaks a limit of [`Call`] is answered with
    /// [`Status::MALFORMED`] at the next tick.
    pub fn submit(&mut self, call: Call) {
        self.core.at(Instant::now());
        self.core.submit(call);
    }

    /// Looks at a completion of the ring. `false`: it is not this channel's.
    pub fn complete(&mut self, _ring: &mut Ring, completion: Completion, events: &mut Vec<Event>) -> bool {
        if completion.token.source() != self.source {
            return false;
        }
        let token = completion.token.payload();
        match &mut self.state {
            _ if token == BELL => self.bell_polled = false,
            State::Connecting { done, .. } if token == self.generation << 1 | 1 => *done = true,
            State::Linked(link) if self.fault.is_none() => {
                self.core.at(Instant::now());
                match link.completed(token, completion.result, &mut self.core) {
                    Ok(heard) => self.heard |= heard,
                    Err(fault) => self.fault = Some(fault),
                }
                self.core.take_events(events);
            }
            _ => {}
        }
        true
    }

    /// Ends the set-up of a new session: requests in flight are sent again in the order in which they were
    /// submitted, then new ones follow.
    pub fn ready(&mut self) {
        self.core.ready();
    }

    /// Sends what is ready, does what is due (connecting, pings, deadlines) and returns when it wants to
    /// be called next at the latest. Call it before every wait of the ring.
    pub fn tick(&mut self, ring: &mut Ring, now: Instant, events: &mut Vec<Event>) -> Option<Instant> {
        self.core.at(now);
        let carrier = match &self.state {
            State::Linked(link) => Some(link.carrier()),
            _ => None,
        };
        self.core.count(carrier);
        if std::mem::take(&mut self.heard) {
            self.doubtful = false;
            self.core.heard(now);
        }
        let due = self.clock(now);
        self.look_up(now);
        if let State::Linked(link) = &mut self.state
            && self.fault.is_none()
        {
            self.fault = link.send(&mut self.core).err();
        }
        self.core.take_events(events);
        if let Some(fault) = self.fault.take() {
            self.lost(ring, now, &fault, events);
        }
        let step = self.connect(ring, now, events);
        let mut wants = None;
        if let State::Linked(link) = &mut self.state {
            link.arm(ring);
            wants = link.due();
        }
        self.notice(events);
        if self.fault.is_some() {
            return Some(now);
        }
        [due, step, wants].into_iter().flatten().min()
    }

    /// Whether the peer's certificate was revoked meanwhile, now and then.
    fn look_up(&mut self, now: Instant) {
        if now < self.look_up_at || self.fault.is_some() {
            return;
        }
        self.look_up_at = now + LOOK_UP_EVERY;
        if let Some(proven) = self.core.proven()
            && proven.security.revokes(&proven.peer)
        {
            self.fault = Some(Fault::Revoked(proven.peer.name.clone()));
        }
    }

    /// Deadlines and silence.
    fn clock(&mut self, now: Instant) -> Option<Instant> {
        let link = &mut self.state;
        let expired = |id, receiving| {
            if let State::Linked(link) = &mut *link {
                link.let_go(id, receiving);
            }
        };
        match self.core.tick(now, expired) {
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

    /// Takes the connection one step further, and returns when the next one is due.
    fn connect(&mut self, ring: &mut Ring, now: Instant, events: &mut Vec<Event>) -> Option<Instant> {
        loop {
            match &mut self.state {
                State::Closed => return None,
                State::Idle(at) if *at > now => return Some(*at),
                State::Idle(_) => self.attempt(ring, now, events),
                State::Resolving => match self.names.0.answer() {
                    None => {
                        self.poll_bell(ring);
                        return None;
                    }
                    Some(Ok(found)) if !found.is_empty() => self.dial(ring, now, found, events),
                    Some(Ok(_)) => self.fail(ring, now, "the name has no address", events),
                    Some(Err(e)) => self.fail(ring, now, &e.to_string(), events),
                },
                State::Connecting { done: false, until, .. } if *until > now => return Some(*until),
                State::Connecting { .. } => self.connected(ring, now, events),
                State::Linked(link) => {
                    if self.core.is_open() && link.greeted() {
                        self.pause = self.config.retry_first;
                    }
                    return None;
                }
            }
        }
    }

    fn poll_bell(&mut self, ring: &mut Ring) {
        if let Some(bell) = self.names.0.bell()
            && !self.bell_polled
        {
            ring.poll_readable(bell.as_fd().as_raw_fd(), false, self.source.token(BELL));
            self.bell_polled = true;
        }
    }

    fn attempt(&mut self, ring: &mut Ring, now: Instant, events: &mut Vec<Event>) {
        match self.names.0.ask() {
            Some(addresses) => self.dial(ring, now, addresses, events),
            None => self.state = State::Resolving,
        }
    }

    /// Starts to connect to the first of `addresses`.
    fn dial(
        &mut self,
        ring: &mut Ring,
        now: Instant,
        mut rest: VecDeque<SocketAddr>,
        events: &mut Vec<Event>,
    ) {
        let mut reason = String::new();
        while let Some(address) = rest.pop_front() {
            match connect::start(address) {
                Ok(socket) => {
                    self.generation += 1;
                    ring.poll_writable(socket.as_raw_fd(), self.source.token(self.generation << 1 | 1));
                    let until = now + CONNECT_WITHIN;
                    self.state = State::Connecting { socket, done: false, until, rest };
                    return;
                }
                Err(e) => reason = e.to_string(),
            }
        }
        self.fail(ring, now, &reason, events);
    }

    /// The kernel is done connecting, or took too long.
    fn connected(&mut self, ring: &mut Ring, now: Instant, events: &mut Vec<Event>) {
        let idle = State::Idle(now);
        let State::Connecting { socket, done, rest, .. } = std::mem::replace(&mut self.state, idle) else {
            return;
        };
        let result = if done {
            connect::finish(&socket)
        } else {
            ring.cancel(self.source.token(self.generation << 1 | 1));
            Err(io::ErrorKind::TimedOut.into())
        };
        let local = socket.local_addr().ok();
        let link = result.and_then(|()| self.link(socket));
        match link {
            Ok(mut link) => {
                self.core.connected(now);
                self.doubtful = false;
                self.fault = link.send(&mut self.core).err();
                self.state = State::Linked(self.upgradable(Box::new(link), local));
            }
            Err(_) if !rest.is_empty() => self.dial(ring, now, rest, events),
            Err(e) => self.fail(ring, now, &e.to_string(), events),
        }
    }

    fn link(&self, socket: TcpStream) -> io::Result<TcpLink> {
        let handshake = match &self.config.security {
            Security::Plain => None,
            Security::Tls(identity) => {
                let handshake = Handshake::asking(identity, self.config.node.as_deref());
                Some(handshake.map_err(io::Error::other)?)
            }
        };
        let mut link = TcpLink::new(Arc::new(socket), self.source, self.generation, handshake)?;
        link.wears_out(self.records, true);
        Ok(link)
    }

    /// Lets a connection move to RDMA, where the configuration does.
    fn upgradable(&self, link: Box<dyn Link>, local: Option<SocketAddr>) -> Box<dyn Link> {
        match local {
            Some(local) if self.config.transport != Transport::Tcp => {
                let side = Side::Asking(self.attempts.clone());
                Box::new(Upgradable::new(link, side, local.ip(), self.source, self.generation))
            }
            _ => link,
        }
    }

    /// Says what carries the connection, when that changed; and once for each reason why it is not RDMA, if
    /// RDMA is what was asked for.
    fn notice(&mut self, events: &mut Vec<Event>) {
        let State::Linked(link) = &mut self.state else { return };
        while let Some((carrier, why)) = link.take_notice() {
            let news = self.missed != why;
            self.missed.clone_from(&why);
            if carrier == Carrier::Rdma || self.config.transport == Transport::Rdma && news {
                events.push(Event::Carrier { carrier, why });
            }
        }
    }

    /// An attempt failed.
    fn fail(&mut self, ring: &mut Ring, now: Instant, reason: &str, events: &mut Vec<Event>) {
        self.lost(ring, now, &Fault::Unreachable(self.config.address.clone(), reason.to_owned()), events);
    }

    /// The connection is gone; the next attempt follows after a pause.
    fn lost(&mut self, ring: &mut Ring, now: Instant, fault: &Fault, events: &mut Vec<Event>) {
        // Between half the pause and the whole, so that many peers do not come back at the same moment.
        let jitter = u32::from(random() as u16);
        let mut pause = self.pause / 2 + self.pause / 2 * jitter / u32::from(u16::MAX);
        if *fault == Fault::KeysUsed {
            pause = Duration::ZERO;
        }
        self.pause = (self.pause * 2).min(self.config.retry_most);
        if let State::Linked(mut link) = std::mem::replace(&mut self.state, State::Idle(now + pause)) {
            link.close(ring);
        }
        let said = self.core.farewell().map(Fault::Goodbye);
        self.core.disconnected();
        let reason = said.as_ref().unwrap_or(fault).to_string();
        if let Some(recorder) = &mut self.core.recorder {
            recorder.lost(&reason);
        }
        events.push(Event::Lost { reason });
    }

    /// Opens a channel that was [closed](Self::close) again, with a new session. Its names are
    /// kept, so a confined thread may do this.
    pub fn reopen(&mut self) {
        if matches!(self.state, State::Closed) {
            let now = Instant::now();
            let (recorder, node) = (self.core.recorder.take(), self.core.node.take());
            self.core = new_session(&self.config, now);
            (self.core.recorder, self.core.node) = (recorder, node);
            self.state = State::Idle(now);
            self.pause = self.config.retry_first;
            (self.heard, self.doubtful, self.fault) = (false, false, None);
        }
    }

    /// How many calls have no answer yet.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.core.in_flight()
    }

    /// Takes back every call that has no answer yet, in the order of submission, and closes the
    /// connection. The peer forgets the session. Never blocks.
    pub fn close(&mut self, ring: &mut Ring) -> Vec<Call> {
        let open = self.core.is_open();
        let calls = self.core.close();
        if let Some(recorder) = &mut self.core.recorder {
            recorder.closed();
        }
        match std::mem::replace(&mut self.state, State::Closed) {
            State::Linked(mut link) => {
                if open {
                    // As far as the network takes it now; the peer sees the end in any case.
                    let _ = link.send(&mut self.core);
                }
                link.close(ring);
            }
            State::Connecting { done: false, .. } => {
                ring.cancel(self.source.token(self.generation << 1 | 1));
            }
            _ => {}
        }
        if self.bell_polled {
            ring.cancel(self.source.token(BELL));
        }
        calls
    }
}
