//! The asking side of a session. Its states are drawn in `docs/wire.md`.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::buffer::Buffer;
use crate::carrier::Carrier;
use crate::channel::{Answer, Call, Event};
use crate::core::stream::{Head, Outgoing, Peer, Place};
use crate::core::table::{Pending, Table};
use crate::identity::Role as Purpose;
use crate::link::tls::handshake::Proven;
use crate::metrics::{Ended, Kind as Counted, Recorder};
use crate::trace;
use crate::wire::{
    Body, Class, Fault, Flags, Header, Hello, Kind, MAX_BODY, MAX_PAYLOAD, PREFACE, Preface, Role, Status,
    VERSION, printable,
};

/// Who a side is.
#[derive(Clone, Debug)]
pub(crate) struct Identity {
    pub(crate) name: String,
    pub(crate) instance: u128,
    pub(crate) boot: u128,
}

/// Where the session stands with the connection that lasts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// There is none.
    Down,
    /// Our hello is out, the peer's is not here.
    Greeting,
    /// A new session: only `setup` calls go out.
    Setup,
    /// Everything goes out.
    Up,
    /// The peer is stopping: nothing new goes out, answers still come.
    Draining,
}

/// What the peer granted.
#[derive(Clone, Copy, Debug, Default)]
struct Grant {
    requests: u32,
    bytes: u64,
    window: u32,
}

/// After an urgent request the next one is expected for so long.
const URGENCY: Duration = Duration::from_millis(10);

/// So many bytes of bulk may then be under way, wherever they are: what is on the network or in a kernel cannot be
/// overtaken. 10 Gbit/s over 100 us.
const BULK_BESIDE_URGENT: u64 = 128 << 10;

/// Credit in use.
#[derive(Clone, Copy, Debug, Default)]
struct Used {
    requests: u32,
    bytes: u64,
}

/// A reply that is coming in.
struct Incoming {
    id: u64,
    status: Status,
    body: Body,
    received: usize,
}

/// See the [module](self).
pub(crate) struct Asker {
    identity: Identity,
    session: u128,
    serial: u64,
    dead_after: Duration,
    phase: Phase,
    set_up: bool,
    grant: Grant,
    used: Used,
    bulk: Used,
    table: Table,
    /// Slots of calls that wait to go out.
    setup: VecDeque<usize>,
    queues: [VecDeque<usize>; 4],
    cancels: VecDeque<u64>,
    refused: Vec<Call>,
    incoming: Option<Incoming>,
    hello_due: bool,
    ping_due: bool,
    pong_due: Option<u64>,
    goodbye_due: bool,
    heard: Instant,
    pinged: Option<Instant>,
    ticked: Instant,
    /// No deadline is earlier than this.
    earliest: Option<Instant>,
    /// When something urgent was submitted last.
    urgent: Option<Instant>,
    farewell: Option<String>,
    carrier: Carrier,
    proven: Option<Proven>,
    /// The node that the first connection proved to lead to: all later ones must.
    pub(crate) node: Option<String>,
    events: Vec<Event>,
    /// The time, as far as what is counted needs it.
    clock: Instant,
    pub(crate) recorder: Option<Recorder>,
}

impl Asker {
    pub(crate) fn new(identity: Identity, session: u128, dead_after: Duration, now: Instant) -> Self {
        Self {
            identity,
            session,
            serial: 0,
            dead_after,
            phase: Phase::Down,
            set_up: false,
            grant: Grant::default(),
            used: Used::default(),
            bulk: Used::default(),
            table: Table::new(),
            setup: VecDeque::new(),
            queues: Default::default(),
            cancels: VecDeque::new(),
            refused: Vec::new(),
            incoming: None,
            hello_due: false,
            ping_due: false,
            pong_due: None,
            goodbye_due: false,
            heard: now,
            pinged: None,
            ticked: now,
            earliest: None,
            urgent: None,
            farewell: None,
            carrier: Carrier::Tcp,
            proven: None,
            node: None,
            events: Vec::new(),
            clock: now,
            recorder: None,
        }
    }

    /// What happens from here on happens now.
    pub(crate) fn at(&mut self, now: Instant) {
        // A caller may have looked at the clock before it submitted something.
        self.clock = self.clock.max(now);
    }

    /// Takes a call.
    pub(crate) fn submit(&mut self, call: Call) {
        let once_with_answer = call.once && !call.answer.is_empty();
        if call.body.len() > MAX_BODY
            || call.payload.len() > MAX_PAYLOAD
            || call.answer.len() > MAX_PAYLOAD
            || once_with_answer
        {
            self.refused.push(call);
            return;
        }
        if let Some(deadline) = call.deadline {
            self.earliest = Some(self.earliest.map_or(deadline, |e| e.min(deadline)));
        }
        let (class, setup) = (call.class, call.setup);
        if class == Class::Urgent {
            self.urgent = Some(self.clock);
        }
        let kind = match &mut self.recorder {
            None => Counted::default(),
            Some(recorder) => {
                let kind = recorder.kind(class, call.opcode);
                recorder.begun(kind);
                kind
            }
        };
        let slot = self.table.insert(call, self.clock, kind);
        self.queue(slot, class, setup);
    }

    fn queue(&mut self, slot: usize, class: Class, setup: bool) {
        if setup {
            self.setup.push_back(slot);
        } else {
            self.queues[class as usize].push_back(slot);
        }
    }

    /// Calls without an answer.
    pub(crate) fn in_flight(&self) -> usize {
        self.table.len() + self.refused.len()
    }

    /// A connection is there: the hello goes out.
    pub(crate) fn connected(&mut self, now: Instant) {
        self.phase = Phase::Greeting;
        self.hello_due = true;
        self.heard = now;
        self.pinged = None;
        self.farewell = None;
        (self.carrier, self.proven) = (Carrier::Tcp, None);
    }

    /// Who the peer proved to be on the connection that lasts.
    pub(crate) fn proven(&self) -> Option<&Proven> {
        self.proven.as_ref()
    }

    /// The connection is gone: everything without an answer will be sent again.
    pub(crate) fn disconnected(&mut self) {
        self.phase = Phase::Down;
        self.incoming = None;
        (self.hello_due, self.ping_due, self.pong_due) = (false, false, None);
        (self.used, self.bulk) = (Used::default(), Used::default());
        self.cancels.clear();
        self.setup.clear();
        self.queues.iter_mut().for_each(VecDeque::clear);
        for slot in self.table.in_order() {
            let Some(pending) = self.table.get_mut(slot) else { continue };
            if pending.call.is_none() {
                self.table.remove(slot);
                continue;
            }
            pending.sent = false;
            let (class, setup) = (pending.class, pending.setup);
            self.queue(slot, class, setup);
        }
    }

    /// Why the peer ended the connection, if it said so.
    pub(crate) fn farewell(&mut self) -> Option<String> {
        self.farewell.take()
    }

    /// The set-up of the session is done.
    pub(crate) fn ready(&mut self) {
        if self.serial != 0 {
            self.set_up = true;
        }
        if self.phase == Phase::Setup {
            self.phase = Phase::Up;
        }
    }

    /// Whether the hello of the connection that lasts is done.
    pub(crate) fn is_open(&self) -> bool {
        !matches!(self.phase, Phase::Down | Phase::Greeting)
    }

    /// Something came from the peer.
    pub(crate) fn heard(&mut self, now: Instant) {
        self.heard = now;
        self.pinged = None;
    }

    /// Moves the events that happened to `events`.
    pub(crate) fn take_events(&mut self, events: &mut Vec<Event>) {
        events.append(&mut self.events);
        let refused = self.refused.drain(..).map(|call| answer(call, Status::MALFORMED));
        events.extend(refused.map(Event::Answer));
    }

    /// Does what is due by the clock. Requests whose deadline passed are handed to `expired`, which makes
    /// the connection let go of their memory (of that of the payload coming in too, if it says `true`).
    ///
    /// # Errors
    /// The peer is dead.
    pub(crate) fn tick(
        &mut self,
        now: Instant,
        mut expired: impl FnMut(u64, bool),
    ) -> Result<Option<Instant>, Fault> {
        if self.earliest.is_some_and(|e| e <= now) {
            self.expire(now, &mut expired);
        }
        // This thread itself stood still (a stopped process, a suspended PC): the peer gets a new chance.
        let quiet = self.dead_after / 3;
        if now.saturating_duration_since(self.ticked) > self.dead_after {
            self.heard = now;
            self.pinged = None;
        }
        self.ticked = now;
        let mut next = self.earliest;
        if self.phase != Phase::Down {
            let due = match self.pinged {
                None => self.heard + quiet,
                Some(pinged) => pinged + (self.dead_after - quiet),
            };
            if due > now {
                next = Some(next.map_or(due, |n| n.min(due)));
            } else if self.pinged.is_some() {
                return Err(Fault::Silent(self.dead_after.as_millis() as u64));
            } else {
                // A hello cannot be pinged; there it only counts the time.
                self.ping_due = self.is_open();
                self.pinged = Some(now);
                let due = now + (self.dead_after - quiet);
                next = Some(next.map_or(due, |n| n.min(due)));
            }
        }
        Ok(next)
    }

    fn expire(&mut self, now: Instant, expired: &mut impl FnMut(u64, bool)) {
        self.earliest = None;
        for slot in self.table.in_order() {
            let Some(pending) = self.table.get_mut(slot) else { continue };
            let Some(deadline) = pending.call.as_ref().and_then(|call| call.deadline) else { continue };
            if deadline > now {
                self.earliest = Some(self.earliest.map_or(deadline, |e| e.min(deadline)));
                continue;
            }
            let (id, kind) = (pending.id, pending.kind);
            pending.span.in_scope(|| tracing::trace!(target: trace::TARGET, "The deadline passed"));
            expired(id, self.incoming.as_ref().is_some_and(|incoming| incoming.id == id));
            let Some(call) = pending.call.take() else { continue };
            if let Some(recorder) = &mut self.recorder {
                recorder.expired(kind);
            }
            if pending.sent {
                // The entry stays until the peer answers or the connection ends: the credit is in use.
                self.table.confirm(id);
                self.cancels.push_back(id);
            } else {
                let (class, setup) = (pending.class, pending.setup);
                self.table.remove(slot);
                let queue = if setup { &mut self.setup } else { &mut self.queues[class as usize] };
                queue.retain(|other| *other != slot);
            }
            self.events.push(Event::Answer(answer(call, Status::DEADLINE)));
        }
    }

    /// Takes everything back that has no answer, and asks for a goodbye to go out.
    pub(crate) fn close(&mut self) -> Vec<Call> {
        let mut calls = Vec::new();
        for slot in self.table.in_order() {
            let Some(Pending { call: Some(call), kind, .. }) = self.table.remove(slot) else { continue };
            if let Some(recorder) = &mut self.recorder {
                recorder.dropped(kind);
            }
            calls.push(call);
        }
        calls.append(&mut self.refused);
        self.disconnected();
        self.goodbye_due = true;
        calls
    }

    fn opened(&mut self, hello: Hello) -> Result<(), Fault> {
        if hello.role != Role::Answering {
            return Err(Fault::Protocol("the peer asks instead of answering"));
        }
        if hello.requests == 0 {
            // A refusal; the goodbye that follows says why.
            self.phase = Phase::Draining;
            return Ok(());
        }
        if hello.bytes < 4 * MAX_PAYLOAD as u64 || hello.window == 0 || hello.serial == 0 {
            return Err(Fault::Protocol("a hello that grants too little"));
        }
        self.grant = Grant { requests: hello.requests, bytes: hello.bytes, window: hello.window };
        if hello.resumed {
            if self.serial == 0 || hello.serial != self.serial {
                return Err(Fault::Protocol("a hello that resumes a session of which we know nothing"));
            }
            self.phase = if self.set_up { Phase::Up } else { Phase::Setup };
            self.count_connection(&hello);
            self.events.push(Event::Resumed { carrier: self.carrier });
            return Ok(());
        }
        for slot in std::mem::take(&mut self.setup) {
            let Some(Pending { call: Some(call), kind, .. }) = self.table.remove(slot) else { continue };
            if let Some(recorder) = &mut self.recorder {
                recorder.dropped(kind);
            }
            self.events.push(Event::Answer(answer(call, Status::CANCELLED)));
        }
        self.table.forget_ids();
        self.serial = hello.serial;
        self.set_up = false;
        self.phase = Phase::Setup;
        self.count_connection(&hello);
        self.events.push(Event::Opened {
            instance: hello.instance,
            boot: hello.boot,
            name: hello.name,
            peer: self.proven.as_ref().map(|proven| proven.peer.clone()),
            carrier: self.carrier,
        });
        Ok(())
    }

    fn count_connection(&mut self, hello: &Hello) {
        if let Some(recorder) = &mut self.recorder {
            recorder.connected(&hello.name, hello.resumed, (hello.requests, hello.bytes));
        }
    }

    /// Writes down what carries the frames and how much credit is in use.
    pub(crate) fn count(&mut self, carrier: Option<Carrier>) {
        if let (Some(recorder), Some(carrier)) = (&mut self.recorder, carrier) {
            recorder.carried_by(carrier);
            recorder.used(self.used.requests, self.used.bytes);
        }
    }

    fn our_hello(&self) -> Outgoing {
        let hello = Hello {
            role: Role::Asking,
            resumed: false,
            requests: 0,
            bytes: 0,
            window: 0,
            keepalive_ms: (self.dead_after / 3).as_millis().clamp(1, u128::from(u32::MAX)) as u32,
            serial: self.serial,
            session: self.session,
            instance: self.identity.instance,
            boot: self.identity.boot,
            name: self.identity.name.clone(),
        };
        Outgoing { head: Head::from_vec(hello.encode(VERSION)), payload: Buffer::empty(), id: 0, cost: 0 }
    }

    fn control(&self, mut header: Header, body: &[u8]) -> Outgoing {
        header.acked = self.table.acked();
        Outgoing { id: 0, ..frame(&header, body, Buffer::empty(), 0) }
    }

    /// Whether a request may go out by the credit that is left.
    fn affordable(&self, pending: &Pending) -> bool {
        let fits = |used: &Used, requests: u32, bytes: u64| {
            used.requests < requests && used.bytes + pending.cost <= bytes
        };
        // Bulk gets half, so that something urgent always finds credit.
        let Grant { requests, bytes, .. } = self.grant;
        fits(&self.used, requests, bytes)
            && (pending.class != Class::Bulk || fits(&self.bulk, (requests / 2).max(1), bytes / 2))
            && (pending.class != Class::Bulk || !self.is_urgent() || self.is_little_beside(pending))
    }

    /// Whether somebody's CPU waits for this connection every now and then.
    fn is_urgent(&self) -> bool {
        self.urgent.is_some_and(|last| self.clock.saturating_duration_since(last) < URGENCY)
    }

    /// Whether bulk stays so little with this request that an urgent answer waits for little.
    fn is_little_beside(&self, pending: &Pending) -> bool {
        self.bulk.requests == 0 || self.bulk.bytes + pending.cost <= BULK_BESIDE_URGENT
    }

    /// Whether the peer may have to remember one more request, if this is a new one of `once`.
    fn rememberable(&self, slot: usize) -> bool {
        let new_once = self.table.get(slot).is_some_and(|pending| pending.once && pending.id == 0);
        !new_once || self.table.unconfirmed() < self.grant.window as usize
    }

    /// The frame of the request in `slot`, if it may go out.
    fn request(&mut self, slot: usize) -> Option<Outgoing> {
        if !self.affordable(self.table.get(slot)?) {
            return None;
        }
        self.table.number(slot);
        let acked = self.table.acked();
        let pending = self.table.get_mut(slot)?;
        let call = pending.call.as_ref()?;
        let header = Header {
            class: call.class,
            code: call.opcode,
            flags: if call.once { Flags::ONCE } else { 0 },
            answer_len: call.answer.len() as u32,
            id: pending.id,
            acked,
            ..Header::new(Kind::Request)
        };
        let payload = call.payload.slice(0, call.payload.len())?;
        let out = frame(&header, &call.body, payload, pending.cost);
        pending.sent = true;
        let again = std::mem::replace(&mut pending.went, true);
        if let Some(recorder) = &mut self.recorder {
            if again {
                recorder.replayed();
            } else {
                recorder.sent(pending.kind, self.clock.saturating_duration_since(pending.since));
            }
        }
        trace::sent(&mut pending.span, self.session, &header, self.recorder.as_ref(), again);
        let (cost, bulk) = (pending.cost, pending.class == Class::Bulk);
        for used in std::iter::once(&mut self.used).chain(bulk.then_some(&mut self.bulk)) {
            used.requests += 1;
            used.bytes += cost;
        }
        Some(out)
    }

    fn next_request(&mut self) -> Option<Outgoing> {
        if let Some(slot) = self.setup.front().copied() {
            if !self.rememberable(slot) {
                return None;
            }
            let out = self.request(slot)?;
            self.setup.pop_front();
            return Some(out);
        }
        if self.phase != Phase::Up {
            return None;
        }
        for class in 0..self.queues.len() {
            let Some(slot) = self.queues[class].front().copied() else { continue };
            if !self.rememberable(slot) {
                continue;
            }
            // Without credit for it nothing less urgent goes out either: it would take what comes back.
            let out = self.request(slot)?;
            self.queues[class].pop_front();
            return Some(out);
        }
        None
    }
}

impl Peer for Asker {
    fn secured(&mut self, carrier: Carrier, proven: Proven) -> Result<(), Fault> {
        let name = &proven.peer.name;
        // TLS verified a name or the role, whichever it was asked for.
        if !proven.peer.roles.has(Purpose::Agent) {
            return Err(Fault::Tls(format!("The node {name} is no agent by its certificate")));
        }
        match &self.node {
            Some(node) if node != name => return Err(Fault::OtherNode(node.clone(), name.clone())),
            Some(_) => {}
            None => self.node = Some(name.clone()),
        }
        (self.carrier, self.proven) = (carrier, Some(proven));
        Ok(())
    }

    fn hello(&mut self, hello: &[u8]) -> Result<(), Fault> {
        if let Some(recorder) = &mut self.recorder {
            recorder.received_frame(PREFACE + hello.len());
        }
        self.opened(Hello::decode(hello)?)
    }

    fn version(&mut self, _version: u16) {}

    fn other_version(&mut self) {}

    fn begin(&mut self, header: &Header, body: &[u8]) -> Result<Place, Fault> {
        if let Some(recorder) = &mut self.recorder {
            recorder.received_frame(header.frame_len());
        }
        match header.kind {
            Kind::Reply => {}
            Kind::Ping => {
                self.pong_due = Some(header.id);
                return Ok(Place::Discard);
            }
            Kind::Pong => return Ok(Place::Discard),
            Kind::Goodbye => {
                self.farewell = Some(printable(body));
                self.phase = Phase::Draining;
                return Ok(Place::Discard);
            }
            Kind::Request | Kind::Cancel => return Err(Fault::Protocol("a request from the answering side")),
            Kind::Offer | Kind::Accept | Kind::Switch => {
                return Err(Fault::Protocol("RDMA without an offer"));
            }
        }
        let pending = self.table.find(header.id).and_then(|slot| self.table.get(slot));
        let Some(pending) = pending.filter(|pending| pending.sent) else {
            return Err(Fault::Protocol("a reply to something that was not asked"));
        };
        let received = header.payload_len as usize;
        let place = match &pending.call {
            None => Place::Discard,
            Some(call) => match call.answer.slice(0, received) {
                Some(_) if received == 0 => Place::Discard,
                Some(part) => Place::Buffer(part),
                None => return Err(Fault::Protocol("a reply with more payload than was asked for")),
            },
        };
        self.incoming = Some(Incoming {
            id: header.id,
            status: Status(header.code),
            body: Body::from_slice(body),
            received,
        });
        Ok(place)
    }

    fn end(&mut self) {
        let Some(Incoming { id, status, body, received }) = self.incoming.take() else { return };
        let Some(pending) = self.table.find(id).and_then(|slot| self.table.remove(slot)) else { return };
        let bulk = pending.class == Class::Bulk;
        for used in std::iter::once(&mut self.used).chain(bulk.then_some(&mut self.bulk)) {
            used.requests = used.requests.saturating_sub(1);
            used.bytes = used.bytes.saturating_sub(pending.cost);
        }
        if let Some(Call { tag, payload, answer, .. }) = pending.call {
            let took = self.clock.saturating_duration_since(pending.since);
            if let Some(recorder) = &mut self.recorder {
                let (request_bytes, answer_bytes) = (payload.len(), received);
                recorder.ended(pending.kind, &Ended { status, took, request_bytes, answer_bytes });
            }
            trace::answered(&pending.span, status, took);
            self.events.push(Event::Answer(Answer { tag, status, body, payload, answer, received }));
        }
    }

    fn next(&mut self) -> Option<Outgoing> {
        if std::mem::take(&mut self.hello_due) {
            return Some(self.our_hello());
        }
        if std::mem::take(&mut self.goodbye_due) {
            let header = Header { flags: Flags::FORGET, ..Header::new(Kind::Goodbye) };
            return Some(self.control(header, b"the asking side is done"));
        }
        if !self.is_open() {
            return None;
        }
        if let Some(id) = self.pong_due.take() {
            return Some(self.control(Header { id, ..Header::new(Kind::Pong) }, &[]));
        }
        if std::mem::take(&mut self.ping_due) {
            return Some(self.control(Header::new(Kind::Ping), &[]));
        }
        if self.phase == Phase::Draining {
            return None;
        }
        if let Some(id) = self.cancels.pop_front() {
            return Some(self.control(Header { id, ..Header::new(Kind::Cancel) }, &[]));
        }
        self.next_request()
    }

    fn sent(&mut self, frame: &Outgoing) {
        if let Some(recorder) = &mut self.recorder {
            recorder.sent_frame(frame.len());
        }
    }
}

/// A frame of `header`, whose lengths are set here.
pub(crate) fn frame(header: &Header, body: &[u8], payload: Buffer, cost: u64) -> Outgoing {
    let header = Header { body_len: body.len() as u16, payload_len: payload.len() as u32, ..*header };
    let mut head = Head::from_slice(&header.encode());
    head.extend_from_slice(body);
    Outgoing { head, payload, id: header.id, cost }
}

/// A preface that says which versions we speak, and nothing else.
pub(crate) fn versions_only() -> Outgoing {
    Outgoing { head: Head::from_slice(&Preface::ours(0).encode()), payload: Buffer::empty(), id: 0, cost: 0 }
}

fn answer(call: Call, status: Status) -> Answer {
    let Call { tag, payload, answer, .. } = call;
    Answer { tag, status, body: Body::new(), payload, answer, received: 0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::PREFACE;

    fn call(class: Class, answer: usize) -> Call {
        Call { answer: Buffer::zeroed(answer), ..Call::new(0, 1, class, Body::new()) }
    }

    fn asker(now: Instant) -> Asker {
        let identity = Identity { name: "a".into(), instance: 1, boot: 1 };
        let mut asker = Asker::new(identity, 5, Duration::from_secs(5), now);
        let hello = Hello {
            role: Role::Answering,
            resumed: false,
            requests: 256,
            bytes: 16 << 20,
            window: 256,
            keepalive_ms: 0,
            serial: 1,
            session: 5,
            instance: 2,
            boot: 2,
            name: "b".into(),
        };
        asker.connected(now);
        asker.hello(&hello.encode(VERSION).split_off(PREFACE)).expect("it is served");
        asker.ready();
        while asker.next().is_some() {}
        asker
    }

    fn sent(asker: &mut Asker) -> usize {
        std::iter::from_fn(|| asker.next()).count()
    }

    #[test]
    fn little_bulk_is_under_way_beside_urgent_requests_and_much_without_them() {
        let now = Instant::now();
        let mut asker = asker(now);
        (0..64).for_each(|_| asker.submit(call(Class::Bulk, 64 << 10)));
        assert_eq!(sent(&mut asker), 64, "half of 16 MiB");
        asker.disconnected();

        let mut asker = self::asker(now);
        asker.submit(call(Class::Urgent, 4096));
        (0..64).for_each(|_| asker.submit(call(Class::Bulk, 64 << 10)));
        assert_eq!(sent(&mut asker), 1 + 2, "128 KiB beside the urgent one");
        asker.at(now + URGENCY);
        assert_eq!(sent(&mut asker), 62, "nothing urgent came since");
    }

    #[test]
    fn one_bulk_request_is_under_way_however_large() {
        let now = Instant::now();
        let mut asker = asker(now);
        asker.submit(call(Class::Urgent, 0));
        (0..3).for_each(|_| asker.submit(call(Class::Bulk, MAX_PAYLOAD)));
        assert_eq!(sent(&mut asker), 2);
    }
}
