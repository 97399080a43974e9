//! The answering side of a connection. Its states are drawn in `docs/wire.md`.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::buffer::Buffer;
use crate::carrier::Carrier;
use crate::core::asker::{frame, versions_only};
use crate::core::stream::{Head, Outgoing, Peer, Place};
use crate::link::tls::handshake::Proven;
use crate::metrics::{Ended, Kind as Counted, Recorder};
use crate::pool::Pool;
use crate::server::{Event, Request};
use crate::sessions::{Attendance, Claim, Claimant, Records, Sessions};
use crate::trace;
use crate::wire::{
    Body, Class, Fault, Flags, Header, Hello, Kind, MAX_BODY, PREFACE, Role, Status, VERSION, printable,
};

/// How long a peer may take for its hello.
const HELLO_WITHIN: Duration = Duration::from_secs(10);

/// How long a peer may wait in silence for its session, which an earlier connection is still finishing.
const WAIT_WITHIN: Duration = Duration::from_secs(60);

/// The shortest silence after which a peer counts as gone.
const SILENCE_LEAST: Duration = Duration::from_secs(10);

/// Where the connection stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The peer's hello is not here.
    Greeting,
    /// The session is still being finished by an earlier connection.
    Waiting,
    /// Requests come in.
    Open,
    /// The ones in flight are finished, no new ones are taken.
    Stopping,
    /// The socket is gone.
    Closed,
}

/// A request that was given out and has no answer yet.
struct InFlight {
    class: Class,
    once: bool,
    cost: u64,
    answer_len: usize,
    payload_len: usize,
    cancelled: bool,
    since: Instant,
    counted: Counted,
    span: tracing::Span,
}

/// A request that is coming in.
struct Incoming {
    request: Request,
    once: bool,
}

/// See the [module](self).
pub(crate) struct Answerer {
    sessions: Arc<Sessions>,
    claimant: Claimant,
    phase: Phase,
    hello: Option<Hello>,
    /// What both sides speak.
    version: u16,
    carrier: Carrier,
    /// Who the peer proved to be, where a revocation finds it.
    attendance: Option<Attendance>,
    /// Whether the session is ours to hand back.
    holds: bool,
    in_flight: HashMap<u64, InFlight>,
    once_in_flight: usize,
    records: Records,
    forget: bool,
    /// Requests and bytes whose replies are not on the network yet.
    used: (u32, u64),
    incoming: Option<Incoming>,
    greeting: VecDeque<Outgoing>,
    pong_due: Option<u64>,
    goodbye_due: Option<String>,
    replies: [VecDeque<Outgoing>; 4],
    heard: Instant,
    /// The wait for the session ended since the last tick, so the peer's silence counts from there.
    granted: bool,
    ticked: Instant,
    silence: Duration,
    farewell: Option<String>,
    events: Vec<Event>,
    pub(crate) pool: Pool,
    /// The time, as far as what is counted needs it.
    clock: Instant,
    pub(crate) recorder: Option<Recorder>,
}

impl Answerer {
    pub(crate) fn new(sessions: Arc<Sessions>, claimant: Claimant, now: Instant) -> Self {
        let pool = Pool::new(sessions.limits.bytes);
        Self {
            sessions,
            claimant,
            phase: Phase::Greeting,
            hello: None,
            version: VERSION,
            carrier: Carrier::Tcp,
            attendance: None,
            holds: false,
            in_flight: HashMap::new(),
            once_in_flight: 0,
            records: Records::default(),
            forget: false,
            used: (0, 0),
            incoming: None,
            greeting: VecDeque::new(),
            pong_due: None,
            goodbye_due: None,
            replies: Default::default(),
            heard: now,
            granted: false,
            ticked: now,
            silence: SILENCE_LEAST,
            farewell: None,
            events: Vec::new(),
            pool,
            clock: now,
            recorder: None,
        }
    }

    /// What happens from here on happens now.
    pub(crate) fn at(&mut self, now: Instant) {
        // A caller may have looked at the clock before it submitted something.
        self.clock = self.clock.max(now);
    }

    /// Writes down what carries the frames and how much credit is in use.
    pub(crate) fn count(&mut self, carrier: Option<Carrier>) {
        if let (Some(recorder), Some(carrier)) = (&mut self.recorder, carrier) {
            recorder.carried_by(carrier);
            recorder.used(self.used.0, self.used.1);
        }
    }

    /// Asks for the peer's session, if that waits.
    ///
    /// # Errors
    /// The session is not to be had.
    pub(crate) fn claim(&mut self) -> Result<(), Fault> {
        let Some(hello) = self.hello.as_ref().filter(|_| self.phase == Phase::Waiting) else { return Ok(()) };
        let limits = self.sessions.limits;
        let mut ours = Hello {
            role: Role::Answering,
            resumed: false,
            requests: limits.requests,
            bytes: limits.bytes,
            window: self.sessions.window(),
            keepalive_ms: 0,
            serial: 0,
            session: hello.session,
            instance: self.sessions.identity.instance,
            boot: self.sessions.identity.boot,
            name: self.sessions.identity.name.clone(),
        };
        let peer = self.attendance.as_ref().map(Attendance::peer);
        let owner = peer.map(|peer| peer.name.as_str());
        let refusal = match self.sessions.claim(hello.session, hello.serial, &self.claimant, owner) {
            Claim::Wait => return Ok(()),
            Claim::Granted { serial, resumed, records } => {
                (ours.serial, ours.resumed) = (serial, resumed);
                self.records = records;
                self.holds = true;
                self.granted = true;
                self.phase = Phase::Open;
                if let Some(recorder) = &mut self.recorder {
                    recorder.connected(&hello.name, resumed, (limits.requests, limits.bytes));
                }
                self.events.push(Event::Opened {
                    name: hello.name.clone(),
                    peer: peer.cloned(),
                    session: hello.session,
                    resumed,
                    carrier: self.carrier,
                });
                None
            }
            Claim::Superseded => Some(Fault::Superseded),
            Claim::Full => Some(Fault::Full),
            Claim::Crowded => Some(Fault::Crowded),
            Claim::NotYours => Some(Fault::NotYours),
        };
        if refusal.is_some() {
            ours.requests = 0;
        }
        let head = Head::from_vec(ours.encode(self.version));
        self.greeting.push_back(Outgoing { head, payload: Buffer::empty(), id: 0, cost: 0 });
        refusal.map_or(Ok(()), Err)
    }

    /// Answers a request.
    pub(crate) fn answer(&mut self, id: u64, status: Status, body: &[u8], payload: Buffer) {
        let Some(request) = self.in_flight.remove(&id) else {
            debug_assert!(false, "request {id} is answered once");
            return;
        };
        let fits = body.len() <= MAX_BODY && payload.len() <= request.answer_len;
        debug_assert!(fits, "the answer to request {id} fits");
        let body = &body[..body.len().min(MAX_BODY)];
        let took = self.clock.saturating_duration_since(request.since);
        if let Some(recorder) = &mut self.recorder {
            let (request_bytes, answer_bytes) = (request.payload_len, payload.len());
            recorder.ended(request.counted, &Ended { status, took, request_bytes, answer_bytes });
        }
        trace::answered(&request.span, status, took);
        if request.once {
            self.once_in_flight -= 1;
            if id >= self.records.acked {
                self.records.finished.insert(id, (status, Body::from_slice(body)));
            }
        }
        if matches!(self.phase, Phase::Open | Phase::Stopping) {
            let payload = match payload.slice(0, request.answer_len) {
                Some(part) if part.len() < payload.len() => part,
                _ => payload,
            };
            self.reply(id, request.class, status, body, payload, request.cost);
        } else {
            self.release_when_done();
        }
    }

    fn reply(&mut self, id: u64, class: Class, status: Status, body: &[u8], payload: Buffer, cost: u64) {
        let header = Header { class, code: status.0, id, ..Header::new(Kind::Reply) };
        self.replies[class as usize].push_back(frame(&header, body, payload, cost));
    }

    /// The socket is gone.
    pub(crate) fn closed(&mut self, reason: &Fault) {
        if self.phase == Phase::Closed {
            return;
        }
        if self.phase == Phase::Waiting
            && let Some(hello) = &self.hello
        {
            self.sessions.release(hello.session, self.claimant.number, None);
        }
        self.phase = Phase::Closed;
        self.attendance = None;
        self.incoming = None;
        self.replies.iter_mut().for_each(VecDeque::clear);
        let said = self.farewell.take();
        if let Some(recorder) = &mut self.recorder {
            match &said {
                Some(_) => recorder.closed(),
                None => recorder.lost(&reason.to_string()),
            }
        }
        let reason = said.unwrap_or_else(|| reason.to_string());
        self.events.push(Event::Closed { reason });
        self.release_when_done();
    }

    fn release_when_done(&mut self) {
        if self.phase == Phase::Closed && self.in_flight.is_empty() {
            self.release(!self.forget);
        }
    }

    fn release(&mut self, keep: bool) {
        if !std::mem::take(&mut self.holds) {
            return;
        }
        let records = std::mem::take(&mut self.records);
        if let Some(hello) = &self.hello {
            self.sessions.release(hello.session, self.claimant.number, keep.then_some(records));
        }
    }

    /// Requests without an answer.
    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Whether the socket is gone and everything is answered.
    pub(crate) fn is_finished(&self) -> bool {
        self.phase == Phase::Closed && self.in_flight.is_empty()
    }

    /// Takes no new requests.
    pub(crate) fn stop(&mut self, reason: &str) {
        if self.phase == Phase::Open {
            self.phase = Phase::Stopping;
            self.goodbye_due = Some(reason.to_owned());
        }
    }

    /// Forgets what waits to go to the peer.
    pub(crate) fn drop_replies(&mut self) {
        self.greeting.clear();
        self.replies.iter_mut().for_each(VecDeque::clear);
    }

    /// Tells the peer why the connection ends.
    pub(crate) fn say_goodbye(&mut self, reason: &Fault) {
        let told = matches!(
            reason,
            Fault::Protocol(_)
                | Fault::OverCredit
                | Fault::Superseded
                | Fault::Full
                | Fault::Crowded
                | Fault::NotYours
                | Fault::Revoked(_)
        );
        if told {
            self.goodbye_due = Some(reason.to_string());
        }
    }

    /// Whether [`stop`](Self::stop) was called and every answer is out.
    pub(crate) fn is_drained(&self) -> bool {
        self.phase == Phase::Stopping && self.in_flight.is_empty() && !self.wants_to_send()
    }

    /// Whether there is no hello yet, so that nothing can be stopped in order.
    pub(crate) fn is_greeting(&self) -> bool {
        matches!(self.phase, Phase::Greeting | Phase::Waiting)
    }

    /// Who the peer proved to be, while the connection lives.
    pub(crate) fn peer(&self) -> Option<&crate::identity::Peer> {
        self.attendance.as_ref().map(Attendance::peer)
    }

    /// Whether the peer's hello came, after its proof where there is TLS.
    pub(crate) fn is_known(&self) -> bool {
        self.hello.is_some()
    }

    /// Whether an earlier connection still has the session.
    pub(crate) fn is_waiting(&self) -> bool {
        self.phase == Phase::Waiting
    }

    /// Whether frames may be waiting to be sent.
    pub(crate) fn wants_to_send(&self) -> bool {
        !self.greeting.is_empty()
            || self.pong_due.is_some()
            || self.goodbye_due.is_some()
            || self.replies.iter().any(|queue| !queue.is_empty())
    }

    /// Something came from the peer. Before its hello is there, that wins it no time.
    pub(crate) fn heard(&mut self, now: Instant) {
        if self.phase != Phase::Greeting {
            self.heard = now;
        }
    }

    /// Why the connection must end whatever else happens: the peer's certificate was revoked.
    ///
    /// # Errors
    /// It was.
    pub(crate) fn check(&self) -> Result<(), Fault> {
        self.attendance.as_ref().map_or(Ok(()), Attendance::check)
    }

    /// Whether the peer has proven who it is.
    pub(crate) fn is_proven(&self) -> bool {
        self.attendance.is_some()
    }

    /// Moves the events that happened to `events`.
    pub(crate) fn take_events(&mut self, events: &mut Vec<Event>) {
        events.append(&mut self.events);
    }

    /// Does what is due by the clock, and returns when that is next.
    ///
    /// # Errors
    /// The peer was silent for too long.
    pub(crate) fn tick(&mut self, now: Instant) -> Result<Option<Instant>, Fault> {
        let (patience, fault) = match self.phase {
            Phase::Closed => return Ok(None),
            // The peer waits in silence, as it should, and normally its own patience ends the socket.
            Phase::Waiting => (WAIT_WITHIN, Fault::Silent(WAIT_WITHIN.as_millis() as u64)),
            Phase::Greeting => (HELLO_WITHIN, Fault::HelloTimeout),
            Phase::Open | Phase::Stopping => (self.silence, Fault::Silent(self.silence.as_millis() as u64)),
        };
        if std::mem::take(&mut self.granted) || now.saturating_duration_since(self.ticked) > patience {
            // Or this thread itself stood still.
            self.heard = now;
        }
        self.ticked = now;
        let due = self.heard + patience;
        if due <= now { Err(fault) } else { Ok(Some(due)) }
    }

    /// A request came, with its payload if that is here already.
    fn request(&mut self, header: &Header, body: &[u8], payload: Option<Buffer>) -> Result<Place, Fault> {
        self.records.confirm(header.acked);
        if self.phase == Phase::Stopping {
            return Ok(Place::Discard);
        }
        let once = header.flags & Flags::ONCE != 0;
        let cost = u64::from(header.payload_len) + u64::from(header.answer_len);
        let limits = self.sessions.limits;
        let (requests, bytes) = self.used;
        if requests >= limits.requests || bytes.saturating_add(cost) > limits.bytes {
            return Err(Fault::OverCredit);
        }
        if self.in_flight.contains_key(&header.id) {
            return Err(Fault::Protocol("a request with the id of one in flight"));
        }
        if once {
            if header.id < self.records.acked {
                return Err(Fault::Protocol("a request that was confirmed already"));
            }
            if let Some((status, body)) = self.records.finished.get(&header.id).cloned() {
                // It was carried out over an earlier connection.
                self.used = (requests + 1, bytes + cost);
                if let Some(recorder) = &mut self.recorder {
                    recorder.replayed();
                }
                self.reply(header.id, header.class, status, &body, Buffer::empty(), cost);
                return Ok(Place::Discard);
            }
            let remembered = self.records.finished.len() + self.once_in_flight;
            if remembered >= self.sessions.window() as usize + limits.requests as usize {
                return Err(Fault::OverCredit);
            }
        }
        let payload = payload.unwrap_or_else(|| self.pool.take(header.payload_len as usize));
        let place = match payload.slice(0, payload.len()) {
            Some(part) if !part.is_empty() => Place::Buffer(part),
            _ => Place::Discard,
        };
        self.used = (requests + 1, bytes + cost);
        let request = Request {
            id: header.id,
            opcode: header.code,
            class: header.class,
            body: Body::from_slice(body),
            payload,
            answer_len: header.answer_len as usize,
            span: tracing::Span::none(),
        };
        self.incoming = Some(Incoming { request, once });
        Ok(place)
    }
}

impl Peer for Answerer {
    fn version(&mut self, version: u16) {
        self.version = version;
    }

    fn secured(&mut self, carrier: Carrier, proven: Proven) -> Result<(), Fault> {
        self.carrier = carrier;
        let attendance = Attendance::new(&self.sessions, &self.claimant, proven.peer);
        // Looked at once it is where a revocation finds it, so that none passes by a handshake.
        if proven.security.revokes(attendance.peer()) {
            return Err(Fault::Revoked(attendance.peer().name.clone()));
        }
        self.attendance = Some(attendance);
        Ok(())
    }

    fn hello(&mut self, hello: &[u8]) -> Result<(), Fault> {
        if let Some(recorder) = &mut self.recorder {
            recorder.received_frame(PREFACE + hello.len());
        }
        let hello = Hello::decode(hello)?;
        if hello.role != Role::Asking {
            return Err(Fault::Protocol("the peer answers instead of asking"));
        }
        self.silence = (Duration::from_millis(hello.keepalive_ms.into()) * 4)
            .clamp(SILENCE_LEAST, Duration::from_secs(600));
        self.hello = Some(hello);
        self.phase = Phase::Waiting;
        self.claim()
    }

    fn other_version(&mut self) {
        self.greeting.push_back(versions_only());
    }

    fn begin(&mut self, header: &Header, body: &[u8]) -> Result<Place, Fault> {
        if !matches!(self.phase, Phase::Open | Phase::Stopping) {
            return Err(Fault::Protocol("a frame before the hello was answered"));
        }
        if let Some(recorder) = &mut self.recorder {
            recorder.received_frame(header.frame_len());
        }
        match header.kind {
            Kind::Request => return self.request(header, body, None),
            Kind::Cancel => {
                self.records.confirm(header.acked);
                let request = self.in_flight.get_mut(&header.id);
                if let Some(request) = request.filter(|request| !request.cancelled) {
                    request.cancelled = true;
                    self.events.push(Event::Cancel { id: header.id });
                }
            }
            Kind::Ping => {
                self.records.confirm(header.acked);
                self.pong_due = Some(header.id);
            }
            Kind::Pong => {}
            Kind::Goodbye => {
                self.forget = header.flags & Flags::FORGET != 0;
                self.farewell = Some(printable(body));
            }
            Kind::Reply => return Err(Fault::Protocol("a reply from the asking side")),
            Kind::Offer | Kind::Accept | Kind::Switch => {
                return Err(Fault::Protocol("RDMA without an offer"));
            }
        }
        Ok(Place::Discard)
    }

    fn room(&mut self, len: usize) -> Option<Buffer> {
        self.pool.pooled(len)
    }

    fn fetched(&mut self, header: &Header, body: &[u8], payload: Buffer) -> Result<(), Fault> {
        if !matches!(self.phase, Phase::Open | Phase::Stopping) {
            return Err(Fault::Protocol("a frame before the hello was answered"));
        }
        self.request(header, body, Some(payload))?;
        self.end();
        Ok(())
    }

    fn end(&mut self) {
        let Some(Incoming { mut request, once }) = self.incoming.take() else { return };
        let cost = (request.payload.len() + request.answer_len) as u64;
        let counted = match &mut self.recorder {
            None => Counted::default(),
            Some(recorder) => {
                let counted = recorder.kind(request.class, request.opcode);
                recorder.begun(counted);
                counted
            }
        };
        let session = self.hello.as_ref().map_or(0, |hello| hello.session);
        request.span = trace::received(session, &request, self.recorder.as_ref());
        let entry = InFlight {
            class: request.class,
            once,
            cost,
            answer_len: request.answer_len,
            payload_len: request.payload.len(),
            cancelled: false,
            since: self.clock,
            counted,
            span: request.span.clone(),
        };
        self.once_in_flight += usize::from(once);
        self.in_flight.insert(request.id, entry);
        self.events.push(Event::Request(request));
    }

    fn next(&mut self) -> Option<Outgoing> {
        if let Some(hello) = self.greeting.pop_front() {
            return Some(hello);
        }
        if let Some(id) = self.pong_due.take() {
            let header = Header { id, ..Header::new(Kind::Pong) };
            return Some(Outgoing { id: 0, ..frame(&header, &[], Buffer::empty(), 0) });
        }
        if let Some(reason) = self.goodbye_due.take() {
            let reason = reason.as_bytes();
            let header = Header::new(Kind::Goodbye);
            return Some(frame(&header, &reason[..reason.len().min(256)], Buffer::empty(), 0));
        }
        self.replies.iter_mut().find_map(VecDeque::pop_front)
    }

    fn sent(&mut self, frame: &Outgoing) {
        if let Some(recorder) = &mut self.recorder {
            recorder.sent_frame(frame.len());
        }
        if frame.id != 0 {
            self.used.0 = self.used.0.saturating_sub(1);
            self.used.1 = self.used.1.saturating_sub(frame.cost);
        }
    }
}

impl Drop for Answerer {
    fn drop(&mut self) {
        if self.phase == Phase::Waiting
            && let Some(hello) = &self.hello
        {
            self.sessions.release(hello.session, self.claimant.number, None);
        }
        // What is in flight will never be answered: nobody knows whether it took effect, so the session
        // cannot promise "once" any more and is over.
        self.release(self.once_in_flight == 0 && !self.forget);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::Limits;

    fn answerer(sessions: &Arc<Sessions>, now: Instant) -> Answerer {
        let claimant = Claimant { number: sessions.number(), cut: Arc::new(|| ()), wake: Arc::new(|| ()) };
        Answerer::new(Arc::clone(sessions), claimant, now)
    }

    /// A connection that waits for the session of one that is cut and has request 1 in flight.
    fn waiting(now: Instant) -> (Answerer, Answerer) {
        let limits = Limits { requests: 4, bytes: 1 << 20, sessions: 2, rdma: false, ..Limits::default() };
        let sessions = Sessions::new("test", limits);
        let hello = Hello {
            role: Role::Asking,
            resumed: false,
            requests: 4,
            bytes: 1 << 20,
            window: 4,
            keepalive_ms: 1000,
            serial: 0,
            session: 5,
            instance: 2,
            boot: 2,
            name: "peer".into(),
        };
        // The stream reads the preface.
        let hello = hello.encode(VERSION).split_off(PREFACE);
        let (mut first, mut second) = (answerer(&sessions, now), answerer(&sessions, now));
        first.hello(&hello).expect("it is served");
        let request = Header { id: 1, ..Header::new(Kind::Request) };
        first.begin(&request, &[]).expect("it is taken");
        first.end();
        first.closed(&Fault::Closed);
        second.hello(&hello).expect("it may wait");
        assert!(second.is_waiting());
        (first, second)
    }

    #[test]
    fn a_peer_does_not_wait_for_a_busy_session_for_ever() {
        let now = Instant::now();
        let (_first, mut second) = waiting(now);
        for second_passed in 1..60 {
            let due = second.tick(now + Duration::from_secs(second_passed)).expect("it may wait");
            assert_eq!(due, Some(now + WAIT_WITHIN));
        }
        assert!(matches!(second.tick(now + WAIT_WITHIN), Err(Fault::Silent(60_000))));
    }

    #[test]
    fn the_silence_of_a_peer_that_waited_counts_from_the_end_of_its_wait() {
        let now = Instant::now();
        let (mut first, mut second) = waiting(now);
        for second_passed in 1..50 {
            second.tick(now + Duration::from_secs(second_passed)).expect("it may wait");
        }
        first.answer(1, Status::OK, &[], Buffer::empty());
        second.claim().expect("the session is free");
        assert!(!second.is_waiting());
        let at = now + Duration::from_secs(50);
        assert_eq!(second.tick(at).expect("it is heard of"), Some(at + SILENCE_LEAST));
    }
}
