//! Moves a connection that began over TCP to RDMA, and carries it there.
//!
//! The asking side offers, the answering side accepts, a probe shows that the way works in both directions,
//! and then each side says *switch* over TCP: what it sends after that goes over the queue pair. Nothing is
//! lost if the way does not work: the connection stays on TCP, and the offer is made again later. A queue pair
//! that breaks after the switch ends the connection as a broken socket does; the session goes on over the next
//! one. The TCP connection stays open below, since whoever cuts it (a revocation, a newer connection of
//! the session) means this connection. Drawn in `docs/wire.md`; what it trusts whom with in `docs/rdma.md`.

#[cfg(not(feature = "rdma"))]
mod absent;
#[cfg_attr(not(feature = "rdma"), allow(dead_code, reason = "only a device asks, and this build has none"))]
mod cache;
mod flow;
pub(crate) mod opener;
#[cfg_attr(not(feature = "rdma"), allow(dead_code, reason = "only a device asks, and this build has none"))]
mod queue;
#[cfg(test)]
mod queue_test;

#[cfg(feature = "rdma")]
mod verbs;

#[cfg(not(feature = "rdma"))]
use absent as device;
#[cfg(feature = "rdma")]
use verbs as device;

use std::collections::VecDeque;
use std::net::IpAddr;
use std::os::fd::RawFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use self::flow::{Flow, broke};
use self::opener::{Made, Ticket};
use self::queue::Queue;
use super::{Carrier, Link};
use crate::buffer::Buffer;
use crate::core::asker::frame;
use crate::core::stream::{Outgoing, Peer, Place};
use crate::link::tls::handshake::Proven;
use crate::ring::{Ring, Source};
use crate::wire::rdma::{self, code};
use crate::wire::{Fault, Header, Kind, RDMA_SINCE, printable};

/// Whether this build can use RDMA devices.
pub const BUILT: bool = cfg!(feature = "rdma");

/// The first pause after an attempt that failed; it doubles up to [`PAUSE_MOST`].
const PAUSE_FIRST: Duration = Duration::from_secs(5);

/// The longest pause between two attempts.
const PAUSE_MOST: Duration = Duration::from_secs(60);

/// RDMA that held for so long is trusted again.
const TRUSTED_AFTER: Duration = Duration::from_secs(60);

/// When the asking side may try again: kept over connections.
#[derive(Clone)]
pub(crate) struct Attempts(Arc<Mutex<Schedule>>);

struct Schedule {
    not_before: Instant,
    pause: Duration,
}

impl Attempts {
    /// The first may be made at once.
    pub(crate) fn new(now: Instant) -> Self {
        Self(Arc::new(Mutex::new(Schedule { not_before: now, pause: PAUSE_FIRST })))
    }

    fn not_before(&self) -> Instant {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).not_before
    }

    /// An attempt failed, or RDMA that had held since `since` broke.
    fn failed(&self, now: Instant, since: Option<Instant>) {
        let mut schedule = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if since.is_some_and(|since| now.saturating_duration_since(since) >= TRUSTED_AFTER) {
            schedule.pause = PAUSE_FIRST;
        }
        schedule.not_before = now + schedule.pause;
        schedule.pause = (schedule.pause * 2).min(PAUSE_MOST);
    }
}

/// What this side does about RDMA.
pub(crate) enum Side {
    /// It offers.
    Asking(Attempts),
    /// It accepts, unless it must not.
    Answering { allowed: bool },
}

enum State {
    /// Nothing is under way.
    Rest,
    /// Nothing ever will be on this connection.
    Never,
    /// Asking: the queue pair is being made.
    Making(Ticket),
    /// Asking: the offer is out.
    Offered(Box<device::Endpoint>),
    /// It is being connected to this place.
    Connecting(Ticket, rdma::Place),
    /// Asking: a probe is under way.
    Probing(Flow),
    /// Answering: the other side may switch.
    Accepted(Flow),
    /// Our frames go over the queue pair, the other side's still come over TCP.
    Switching(Flow),
    /// RDMA carries everything, since then.
    On(Flow, Instant),
}

impl State {
    fn flow(&mut self) -> Option<&mut Flow> {
        match self {
            Self::Probing(flow) | Self::Accepted(flow) | Self::Switching(flow) | Self::On(flow, _) => {
                Some(flow)
            }
            Self::Rest | Self::Never | Self::Making(_) | Self::Offered(_) | Self::Connecting(..) => None,
        }
    }

    fn ticket(&self) -> Option<&Ticket> {
        match self {
            Self::Making(ticket) | Self::Connecting(ticket, _) => Some(ticket),
            _ => None,
        }
    }
}

/// See the [module](self).
pub(crate) struct Upgradable {
    base: Box<dyn Link>,
    side: Side,
    local: IpAddr,
    source: Source,
    generation: u64,
    state: State,
    /// What both sides speak.
    version: u16,
    /// Frames of the upgrade that wait to go out over TCP.
    control: VecDeque<Outgoing>,
    /// Those that came, with their bodies.
    came: VecDeque<(Header, Vec<u8>)>,
    /// Nothing but the upgrade's frames goes out over TCP any more.
    silent: bool,
    /// Nothing more may come over TCP.
    deaf: bool,
    notice: VecDeque<(Carrier, String)>,
    /// Descriptors that the ring polls: the opener's bell, completions, device events.
    polled: [Option<u64>; 3],
    /// Counts what is polled anew: tickets and queue pairs.
    epoch: u64,
    /// There is something to do at once.
    nop: bool,
}

/// Marks this link's completions among those of the one below.
const MINE: u64 = 1 << 47;

/// Which descriptor, or that there is something to do, in a completion's token.
const BELL: usize = 0;
const COMPLETIONS: usize = 1;
const EVENTS: usize = 2;
const NOP: usize = 3;

/// Stands between the link below and the session: takes the upgrade's frames out.
struct Between<'a> {
    peer: &'a mut dyn Peer,
    control: &'a mut VecDeque<Outgoing>,
    came: &'a mut VecDeque<(Header, Vec<u8>)>,
    version: &'a mut u16,
    silent: bool,
    deaf: bool,
    /// The frame that began last is the upgrade's.
    ours: bool,
}

impl Peer for Between<'_> {
    fn secured(&mut self, carrier: Carrier, proven: Proven) -> Result<(), Fault> {
        self.peer.secured(carrier, proven)
    }

    fn version(&mut self, version: u16) {
        *self.version = version;
        self.peer.version(version);
    }

    fn hello(&mut self, hello: &[u8]) -> Result<(), Fault> {
        self.peer.hello(hello)
    }

    fn other_version(&mut self) {
        self.peer.other_version();
    }

    fn begin(&mut self, header: &Header, body: &[u8]) -> Result<Place, Fault> {
        if self.deaf {
            return Err(Fault::Protocol("a frame over TCP after the switch to RDMA"));
        }
        self.ours = header.kind.since() >= RDMA_SINCE;
        if !self.ours {
            return self.peer.begin(header, body);
        }
        self.deaf = header.kind == Kind::Switch;
        // The rules allow one each way at a time; a few more are refused when they are looked at.
        if self.came.len() >= 4 {
            return Err(Fault::Protocol("more about RDMA than there is to say"));
        }
        self.came.push_back((*header, body.to_vec()));
        Ok(Place::Discard)
    }

    fn end(&mut self) {
        if !std::mem::take(&mut self.ours) {
            self.peer.end();
        }
    }

    fn next(&mut self) -> Option<Outgoing> {
        if let Some(frame) = self.control.pop_front() {
            return Some(frame);
        }
        if self.silent { None } else { self.peer.next() }
    }

    fn sent(&mut self, frame: &Outgoing) {
        self.peer.sent(frame);
    }
}

impl Upgradable {
    /// A connection over `base`, whose own end has the address `local`.
    pub(crate) fn new(
        base: Box<dyn Link>,
        side: Side,
        local: IpAddr,
        source: Source,
        generation: u64,
    ) -> Self {
        Self {
            base,
            side,
            local,
            source,
            generation,
            state: State::Rest,
            version: 0,
            control: VecDeque::new(),
            came: VecDeque::new(),
            silent: false,
            deaf: false,
            notice: VecDeque::new(),
            polled: [None; 3],
            epoch: 0,
            nop: false,
        }
    }

    fn token(&self, epoch: u64, which: usize) -> u64 {
        MINE | (self.generation & 0xff_ffff) << 20 | (epoch & 0x3_ffff) << 2 | which as u64
    }

    /// Lets the link below do `what`, and looks at what it brought.
    fn below<T>(
        &mut self,
        peer: &mut dyn Peer,
        what: impl FnOnce(&mut dyn Link, &mut dyn Peer) -> Result<T, Fault>,
    ) -> Result<T, Fault> {
        let mut between = Between {
            peer: &mut *peer,
            control: &mut self.control,
            came: &mut self.came,
            version: &mut self.version,
            silent: self.silent,
            deaf: self.deaf,
            ours: false,
        };
        let result = what(self.base.as_mut(), &mut between);
        self.deaf |= between.deaf;
        let result = result?;
        while let Some((header, body)) = self.came.pop_front() {
            self.heard(&header, &body, peer)?;
        }
        Ok(result)
    }

    fn say(&mut self, kind: Kind, code: u16, body: &[u8]) {
        let header = Header { code, ..Header::new(kind) };
        self.control.push_back(frame(&header, &body[..body.len().min(200)], Buffer::empty(), 0));
    }

    /// A frame of the upgrade came.
    fn heard(&mut self, header: &Header, body: &[u8], peer: &mut dyn Peer) -> Result<(), Fault> {
        let state = std::mem::replace(&mut self.state, State::Rest);
        match (header.kind, &self.side, state) {
            (Kind::Offer, Side::Answering { allowed }, State::Rest | State::Accepted(_)) => {
                let other = rdma::Place::decode(body)?;
                if !allowed {
                    self.say(Kind::Accept, code::NEVER, b"it may not use RDMA by its configuration");
                } else {
                    match Ticket::answer(self.local, other) {
                        Ok(ticket) => self.connecting(ticket, other),
                        Err(why) => self.refuse(&why),
                    }
                }
            }
            (Kind::Accept, Side::Asking(_), State::Offered(endpoint)) => match header.code {
                code::OK => {
                    let other = rdma::Place::decode(body)?;
                    match Ticket::connect(endpoint, other) {
                        Ok(ticket) => self.connecting(ticket, other),
                        Err(why) => self.gave_up(why),
                    }
                }
                code::NEVER => {
                    self.gave_up(format!("the peer says: {}", printable(body)));
                    self.state = State::Never;
                }
                _ => self.gave_up(format!("the peer says: {}", printable(body))),
            },
            (Kind::Switch, Side::Answering { .. }, State::Accepted(flow)) => {
                self.say(Kind::Switch, 0, &[]);
                self.switched(flow, peer)?;
            }
            (Kind::Switch, Side::Asking(_), State::Switching(flow)) => self.switched(flow, peer)?,
            _ => return Err(Fault::Protocol("a step towards RDMA out of turn")),
        }
        Ok(())
    }

    fn connecting(&mut self, ticket: Ticket, other: rdma::Place) {
        self.epoch += 1;
        self.state = State::Connecting(ticket, other);
    }

    /// The other side sends over the queue pair from now on, and so do we.
    fn switched(&mut self, flow: Flow, peer: &mut dyn Peer) -> Result<(), Fault> {
        (self.silent, self.deaf) = (true, true);
        self.state = State::On(flow, Instant::now());
        self.notice.push_back((Carrier::Rdma, String::new()));
        self.advance(peer).map(drop)
    }

    /// Answering: it does not work now.
    fn refuse(&mut self, why: &str) {
        let code = if BUILT { code::LATER } else { code::NEVER };
        self.say(Kind::Accept, code, why.as_bytes());
        self.state = State::Rest;
    }

    /// Asking: it does not work now.
    fn gave_up(&mut self, why: String) {
        if let Side::Asking(attempts) = &self.side {
            attempts.failed(Instant::now(), None);
        }
        self.state = if BUILT { State::Rest } else { State::Never };
        self.notice.push_back((self.base.carrier(), why));
    }

    /// Asking: makes an offer, if it is time.
    fn attempt(&mut self) {
        let Side::Asking(attempts) = &self.side else { return };
        let ready = self.version >= RDMA_SINCE && self.base.greeted();
        if !matches!(self.state, State::Rest) || !ready || attempts.not_before() > Instant::now() {
            return;
        }
        match Ticket::make(self.local) {
            Ok(ticket) => {
                self.epoch += 1;
                self.state = State::Making(ticket);
            }
            Err(why) => self.gave_up(why),
        }
    }

    /// The opener is done with what it was asked.
    fn made(&mut self) -> Result<(), Fault> {
        let Some(made) = self.state.ticket().and_then(Ticket::poll) else { return Ok(()) };
        let asking = matches!(self.side, Side::Asking(_));
        match (made, std::mem::replace(&mut self.state, State::Rest)) {
            (Ok(Made::Open(endpoint)), State::Making(_)) => {
                let place = endpoint.place().encode();
                self.say(Kind::Offer, 0, &place);
                self.state = State::Offered(endpoint);
            }
            (Ok(Made::Ready(queue)), State::Connecting(_, other)) => {
                let place = queue.place().encode();
                let mut flow = Flow::new(queue, other.slots);
                self.epoch += 1;
                self.state = if asking {
                    flow.probe()?;
                    State::Probing(flow)
                } else {
                    self.say(Kind::Accept, code::OK, &place);
                    State::Accepted(flow)
                };
            }
            (Err(why), _) if asking => self.gave_up(why),
            (Err(why), _) => self.refuse(&why),
            _ => {}
        }
        Ok(())
    }

    /// Handles what the queue pair completed.
    fn advance(&mut self, peer: &mut dyn Peer) -> Result<bool, Fault> {
        match &mut self.state {
            State::Probing(flow) => {
                let result = flow.progress(false, peer);
                if let Err(fault) = result {
                    self.gave_up(fault.to_string());
                } else if flow.has_proved() {
                    // What was handed to TCP goes out before the switch, nothing after it.
                    self.say(Kind::Switch, 0, &[]);
                    self.silent = true;
                    if let State::Probing(flow) = std::mem::replace(&mut self.state, State::Rest) {
                        self.state = State::Switching(flow);
                    }
                }
                Ok(false)
            }
            State::Accepted(flow) => {
                if flow.progress(false, peer).is_err() {
                    // The other side finds out as well, stays on TCP and offers again.
                    self.state = State::Rest;
                }
                Ok(false)
            }
            State::Switching(flow) => flow.progress(false, peer),
            State::On(flow, _) => flow.progress(true, peer),
            _ => Ok(false),
        }
    }

    /// A descriptor of this link became readable.
    fn rang(&mut self, which: usize, peer: &mut dyn Peer) -> Result<bool, Fault> {
        match which {
            BELL => self.made()?,
            COMPLETIONS => {
                if let Some(flow) = self.state.flow() {
                    flow.queue().woken();
                }
            }
            EVENTS => {
                if let Some(why) = self.state.flow().and_then(|flow| flow.queue().take_event()) {
                    return match self.state {
                        State::Switching(_) | State::On(..) => Err(broke(&why)),
                        State::Probing(_) => {
                            self.gave_up(why);
                            Ok(false)
                        }
                        _ => {
                            self.state = State::Rest;
                            Ok(false)
                        }
                    };
                }
            }
            _ => {}
        }
        self.advance(peer)
    }

    /// Polls the present descriptor `which`, once.
    fn poll(&mut self, ring: &mut Ring, which: usize, fd: RawFd) {
        if self.polled[which] == Some(self.epoch) {
            return;
        }
        self.forget(ring, which);
        self.polled[which] = Some(self.epoch);
        ring.poll_readable(fd, false, self.source.token(self.token(self.epoch, which)));
    }

    /// Ends the poll of the descriptor `which`: an operation would keep it, and the device behind it, open.
    fn forget(&mut self, ring: &mut Ring, which: usize) {
        if let Some(epoch) = self.polled[which].take() {
            ring.cancel(self.source.token(self.token(epoch, which)));
        }
    }

    fn arm_flow(&mut self, ring: &mut Ring) {
        let Some(flow) = self.state.flow() else {
            self.forget(ring, COMPLETIONS);
            self.forget(ring, EVENTS);
            return;
        };
        let mut stirs = flow.stirs();
        if !stirs {
            let armed = flow.queue().notify().is_ok();
            // What completed before that does not ring.
            stirs = flow.stirs() || !armed;
        }
        let (completions, events) = (flow.queue().completions(), flow.queue().events());
        self.poll(ring, COMPLETIONS, completions);
        self.poll(ring, EVENTS, events);
        if stirs && !self.nop {
            self.nop = true;
            ring.wake(self.source.token(self.token(self.epoch, NOP)));
        }
    }

    /// The queue pair is given up, before anybody's memory is.
    fn give_up_flow(&mut self, ring: &mut Ring) {
        for which in [BELL, COMPLETIONS, EVENTS] {
            self.forget(ring, which);
        }
        if let (State::On(_, since), Side::Asking(attempts)) = (&self.state, &self.side) {
            attempts.failed(Instant::now(), Some(*since));
        }
        self.state = State::Never;
    }
}

impl Link for Upgradable {
    fn send(&mut self, peer: &mut dyn Peer) -> Result<(), Fault> {
        self.attempt();
        self.below(peer, |base, peer| base.send(peer))?;
        match &mut self.state {
            State::Switching(flow) | State::On(flow, _) => flow.send(peer),
            _ => Ok(()),
        }
    }

    fn arm(&mut self, ring: &mut Ring) {
        self.base.arm(ring);
        if let Some(fd) = self.state.ticket().map(Ticket::bell) {
            self.poll(ring, BELL, fd);
        }
        self.arm_flow(ring);
    }

    fn completed(&mut self, token: u64, result: i32, peer: &mut dyn Peer) -> Result<bool, Fault> {
        if token & MINE != 0 {
            let which = (token & 3) as usize;
            if which == NOP {
                self.nop &= token >> 20 != self.token(0, 0) >> 20;
            } else if self.polled[which].is_some_and(|epoch| token == self.token(epoch, which)) {
                self.polled[which] = None;
            } else {
                return Ok(false);
            }
            return self.rang(which, peer);
        }
        match self.below(peer, |base, peer| base.completed(token, result, peer)) {
            Ok(heard) => Ok(heard),
            Err(fault) => {
                // What came over the queue pair before the other side closed still counts.
                let _ = self.advance(peer);
                Err(fault)
            }
        }
    }

    fn is_flushed(&self) -> bool {
        let rdma = match &self.state {
            State::Switching(flow) | State::On(flow, _) => flow.is_flushed(),
            _ => true,
        };
        rdma && self.control.is_empty() && self.base.is_flushed()
    }

    fn blocked_since(&self) -> Option<Instant> {
        let rdma = match &self.state {
            State::Switching(flow) | State::On(flow, _) => flow.blocked_since(),
            _ => None,
        };
        self.base.blocked_since().or(rdma)
    }

    fn let_go(&mut self, id: u64, receiving: bool) {
        self.base.let_go(id, receiving);
        if let Some(flow) = self.state.flow() {
            flow.let_go(id);
        }
    }

    fn greeted(&self) -> bool {
        self.base.greeted()
    }

    fn due(&self) -> Option<Instant> {
        let ours = match (&self.side, &self.state) {
            (Side::Asking(attempts), State::Rest) if self.version >= RDMA_SINCE && self.base.greeted() => {
                Some(attempts.not_before())
            }
            _ => None,
        };
        [ours, self.base.due()].into_iter().flatten().min()
    }

    fn carrier(&self) -> Carrier {
        match self.state {
            State::On(..) => Carrier::Rdma,
            _ => self.base.carrier(),
        }
    }

    fn take_notice(&mut self) -> Option<(Carrier, String)> {
        self.notice.pop_front().or_else(|| self.base.take_notice())
    }

    fn drop_queued(&mut self) -> bool {
        let over_tcp = !matches!(self.state, State::Switching(_) | State::On(..));
        self.control.clear();
        self.base.drop_queued() && over_tcp
    }

    fn finish(&mut self) {
        self.base.finish();
    }

    fn close(&mut self, ring: &mut Ring) {
        self.give_up_flow(ring);
        self.base.close(ring);
    }
}
