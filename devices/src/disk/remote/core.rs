//! A remote disk without its connection: what to ask, when, and what the answers mean. It is driven by
//! events and speaks through a [`Link`], so that tests can put any history of failures before it.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use slab::Slab;
use transport::buffer::Buffer;
use transport::channel::{Answer, Call, Event};
use transport::wire::{Class, Status};

use super::counters::Counters;
use super::log::{Log, Sequence};
use super::setup::Setup;
use super::{OnTimeout, Options};
use crate::disk::volume::{Access, Lease, Refusal, opcode, status};
use crate::disk::{Done, Error, Geometry, Operation, Request};

/// How long a request waits before it is sent again to storage that was full.
const FULL_PAUSE: Duration = Duration::from_millis(500);
/// The oldest change that no flush covers may be so old before the disk flushes by itself.
const FLUSH_AFTER: Duration = Duration::from_secs(5);
/// A guest that waits for so long is worth a line in the log.
const NOTICE_AFTER: Duration = Duration::from_secs(10);

/// Where calls go.
pub(super) trait Link {
    /// Sends a call, when the connection allows.
    fn call(&mut self, call: Call);
    /// The set-up of a new session is done.
    fn ready(&mut self);
}

/// What an answer's tag refers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tag {
    /// A frame of a request, or the disk's own flush.
    Frame(usize),
    /// A step of the set-up with this number.
    Setup(u64),
    /// The renewal of the lease.
    Renewal,
    /// The lease, given back.
    Release,
    /// What the household revoked, handed on.
    Revocations,
}

impl Tag {
    pub(super) fn number(self) -> u64 {
        match self {
            Self::Frame(index) => (index as u64) << 2,
            Self::Setup(number) => number << 2 | 1,
            Self::Renewal => 2,
            Self::Release => 3,
            Self::Revocations => 3 | 1 << 2,
        }
    }

    fn from_number(number: u64) -> Self {
        match number & 3 {
            0 => Self::Frame((number >> 2) as usize),
            1 => Self::Setup(number >> 2),
            2 => Self::Renewal,
            _ if number == Self::Release.number() => Self::Release,
            _ => Self::Revocations,
        }
    }
}

/// A request of the guest that has no result yet.
pub(super) struct Pending {
    pub(super) request: Request,
    /// Frames without an answer.
    pub(super) frames: u32,
    pub(super) error: Option<Error>,
    pub(super) started: Instant,
}

/// A part of a request that fits the transport, sent or about to be sent again.
pub(super) struct Frame {
    /// Which request; `None`: the disk's own flush.
    pub(super) request: Option<usize>,
    pub(super) operation: Operation,
    pub(super) access: Access,
    /// Where the part begins in the request's buffer.
    pub(super) from: usize,
    /// A flush: what it covers.
    pub(super) covers: Sequence,
    /// Since when the agent's storage was full.
    pub(super) full_since: Option<Instant>,
}

/// A range that a write, discard or clearing in flight changes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Changing {
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) request: usize,
}

/// Why the disk must take its calls back from the connection.
#[derive(Clone, Debug)]
pub(super) enum Failure {
    /// For good.
    Fenced(String),
    /// Until the agent is back.
    Unreachable(String),
}

impl Failure {
    pub(super) fn error(&self) -> Error {
        match self {
            Self::Fenced(why) => Error::Fenced(why.clone()),
            Self::Unreachable(why) => Error::Unreachable(why.clone()),
        }
    }
}

pub(super) struct Core {
    pub(super) options: Options,
    pub(super) geometry: Geometry,
    pub(super) identity: u128,
    pub(super) lease: Lease,
    pub(super) ttl: Duration,
    pub(super) counters: Arc<Counters>,

    pub(super) setup: Setup,
    pub(super) log: Log,

    pub(super) requests: Slab<Pending>,
    pub(super) frames: Slab<Frame>,
    pub(super) changing: Vec<Changing>,
    /// What changes in flight will cost the log.
    pub(super) reserved: u64,
    /// Changes that wait for room in the log or for one that they overlap.
    pub(super) waiting: VecDeque<usize>,
    /// Frames to send again, and when.
    held: VecDeque<(Instant, usize)>,
    flushes: u32,
    renewal: Option<Instant>,
    renewing: bool,

    /// Since when requests cannot be served.
    pub(super) away_since: Option<Instant>,
    pub(super) away_why: String,
    noticed: bool,
    /// Set when calls must be taken back; cleared by [`Core::give_up`] unless it is for good.
    pub(super) failure: Option<Failure>,
}

impl Core {
    pub(super) fn new(
        options: Options,
        geometry: Geometry,
        identity: u128,
        lease: Lease,
        ttl: Duration,
    ) -> Self {
        Self {
            options,
            geometry,
            identity,
            lease,
            ttl,
            counters: Arc::default(),
            setup: Setup::default(),
            log: Log::default(),
            requests: Slab::new(),
            frames: Slab::new(),
            changing: Vec::new(),
            reserved: 0,
            waiting: VecDeque::new(),
            held: VecDeque::new(),
            flushes: 0,
            renewal: None,
            renewing: false,
            away_since: None,
            away_why: "not connected yet".to_owned(),
            noticed: false,
            failure: None,
        }
    }

    /// Where and what, for the log.
    pub(super) fn place(&self) -> String {
        format!("volume {} on {}", self.options.volume, self.options.agent)
    }

    /// What happened on the connection.
    pub(super) fn event(&mut self, link: &mut impl Link, event: Event, now: Instant, done: &mut Vec<Done>) {
        match event {
            Event::Opened { boot, instance, name, carrier, .. } => {
                let (instance, boot) = (format_args!("{instance:x}"), format_args!("{boot:x}"));
                tracing::debug!(peer = %name, %instance, %boot, %carrier, "A session was opened");
                self.begin_setup(link);
            }
            Event::Resumed { .. } => {
                Counters::add(&self.counters.resumptions);
                if self.setup.is_ready() {
                    self.back(now);
                }
            }
            Event::Carrier { carrier, why } => {
                self.counters.carried_by(carrier);
                if why.is_empty() {
                    tracing::info!(disk = %self.place(), %carrier, "The connection's carrier changed");
                } else {
                    tracing::warn!(disk = %self.place(), %carrier, %why, "RDMA cannot be had for now");
                }
            }
            Event::Lost { reason } => {
                self.counters.over_rdma.store(false, Ordering::Relaxed);
                if self.away_since.is_none() {
                    Counters::add(&self.counters.cuts);
                    tracing::info!(disk = %self.place(), %reason, "The connection was lost; requests wait");
                }
                self.away_since.get_or_insert(now);
                self.away_why = reason;
            }
            Event::Answer(answer) => match Tag::from_number(answer.tag) {
                Tag::Frame(index) => self.frame_answered(link, index, &answer, now, done),
                Tag::Setup(number) => self.setup_answered(link, number, &answer, now),
                Tag::Renewal => self.renewal_answered(&answer),
                Tag::Release | Tag::Revocations => {}
            },
        }
        if !self.waiting.is_empty() {
            self.pump(link, now, done);
        }
    }

    /// Does what is due and says when to come again.
    pub(super) fn tick(
        &mut self,
        link: &mut impl Link,
        now: Instant,
        done: &mut Vec<Done>,
    ) -> Option<Instant> {
        let mut next = self.setup_tick(link, now);
        while let Some((at, index)) = self.held.front().copied() {
            if at > now {
                next = earlier(next, at);
                break;
            }
            self.held.pop_front();
            self.send_frame(link, index);
        }
        if !self.waiting.is_empty() {
            self.pump(link, now, done);
        }
        if self.is_serving() {
            next = self.renew(link, now, next);
            next = self.flush_old(link, now, next);
        }
        self.lose_patience(now, next)
    }

    /// Whether the agent serves requests now.
    pub(super) fn is_serving(&self) -> bool {
        self.failure.is_none() && self.setup.is_ready() && self.away_since.is_none()
    }

    /// Requests are served again.
    pub(super) fn back(&mut self, now: Instant) {
        if let Some(since) = self.away_since.take()
            && self.noticed
        {
            let away = now.saturating_duration_since(since);
            tracing::info!(disk = %self.place(), ?away, "The agent is back");
        }
        self.noticed = false;
        self.renewal = Some(now + self.ttl / 3);
    }

    fn renew(&mut self, link: &mut impl Link, now: Instant, next: Option<Instant>) -> Option<Instant> {
        let due = *self.renewal.get_or_insert(now + self.ttl / 3);
        if due > now {
            return earlier(next, due);
        }
        self.renewal = Some(now + self.ttl / 3);
        if !self.renewing {
            self.renewing = true;
            link.call(call(Tag::Renewal, opcode::RENEW, Class::Control, self.lease.encode()));
        }
        earlier(next, now + self.ttl / 3)
    }

    fn renewal_answered(&mut self, answer: &Answer) {
        self.renewing = false;
        if answer.status == status::FENCED {
            self.fenced(refusal(answer).text);
        }
    }

    /// The lease is somebody else's: nothing may be done under it again.
    pub(super) fn fenced(&mut self, why: String) {
        if !matches!(self.failure, Some(Failure::Fenced(_))) {
            tracing::error!(disk = %self.place(), %why, "The lease was lost; the guest gets I/O errors");
            self.failure = Some(Failure::Fenced(why));
        }
    }

    fn lose_patience(&mut self, now: Instant, next: Option<Instant>) -> Option<Instant> {
        let Some(since) = self.away_since else { return next };
        let mut next = next;
        let away = now.saturating_duration_since(since);
        let notice = self.options.patience.unwrap_or(NOTICE_AFTER);
        if !self.noticed && away >= notice {
            self.noticed = true;
            let (waiting, reason) = (self.requests.len(), &self.away_why);
            tracing::warn!(disk = %self.place(), ?away, waiting, %reason, "The agent is away; the guest waits");
        } else if !self.noticed {
            next = earlier(next, since + notice);
        }
        if let (Some(patience), OnTimeout::Error) = (self.options.patience, self.options.on_timeout) {
            if away < patience {
                next = earlier(next, since + patience);
            } else if self.failure.is_none() && !self.requests.is_empty() {
                let why = format!("{}: no answer for {away:.1?} ({})", self.place(), self.away_why);
                self.failure = Some(Failure::Unreachable(why));
            }
        }
        next
    }

    /// Whether requests are refused at once, and why.
    pub(super) fn refusing(&self, now: Instant) -> Option<Error> {
        if let Some(failure) = &self.failure {
            return Some(failure.error());
        }
        let (since, patience) = (self.away_since?, self.options.patience?);
        let over = now.saturating_duration_since(since) >= patience;
        (over && self.options.on_timeout == OnTimeout::Error)
            .then(|| Error::Unreachable(format!("{}: {}", self.place(), self.away_why)))
    }

    /// Ends every request with `error`, after their calls were taken back from the connection.
    pub(super) fn give_up(&mut self, error: impl Fn() -> Error, done: &mut Vec<Done>) {
        for pending in self.requests.drain() {
            Counters::add(&self.counters.errors);
            done.push(Done {
                tag: pending.request.tag,
                result: Err(error()),
                buffer: pending.request.buffer,
            });
        }
        self.frames.clear();
        self.changing.clear();
        self.waiting.clear();
        self.held.clear();
        self.reserved = 0;
        self.flushes = 0;
        self.renewing = false;
        self.setup.forget();
        if matches!(self.failure, Some(Failure::Unreachable(_))) {
            self.failure = None;
        }
    }

    /// Sends the disk's own flush when the log holds something for long.
    fn flush_old(&mut self, link: &mut impl Link, now: Instant, next: Option<Instant>) -> Option<Instant> {
        let Some(oldest) = self.log.oldest() else { return next };
        if now >= oldest + FLUSH_AFTER {
            self.flush_by_itself(link);
            return next;
        }
        earlier(next, oldest + FLUSH_AFTER)
    }

    /// Keeps the log short without the guest's help.
    pub(super) fn flush_by_itself(&mut self, link: &mut impl Link) {
        if self.flushes == 0 && !self.log.is_empty() {
            Counters::add(&self.counters.background_flushes);
            self.send_flush(link, None);
        }
    }

    pub(super) fn send_flush(&mut self, link: &mut impl Link, request: Option<usize>) {
        self.flushes += 1;
        let access = Access { epoch: self.lease.epoch, offset: 0, len: 0, unmap: false };
        let covers = self.log.next();
        let operation = Operation::Flush;
        let index =
            self.frames.insert(Frame { request, operation, access, from: 0, covers, full_since: None });
        self.send_frame(link, index);
    }

    pub(super) fn flush_ended(&mut self) {
        self.flushes = self.flushes.saturating_sub(1);
    }

    /// Sends a frame of a request, for the first time or again.
    pub(super) fn send_frame(&mut self, link: &mut impl Link, index: usize) {
        let Some(frame) = self.frames.get(index) else { return };
        let part = || {
            let pending = self.requests.get(frame.request?)?;
            pending.request.buffer.slice(frame.from, frame.access.len as usize)
        };
        let (opcode, payload, answer) = match frame.operation {
            Operation::Read => (opcode::READ, Buffer::empty(), part().unwrap_or_default()),
            Operation::Write => (opcode::WRITE, part().unwrap_or_default(), Buffer::empty()),
            Operation::Flush => (opcode::FLUSH, Buffer::empty(), Buffer::empty()),
            Operation::Discard => (opcode::DISCARD, Buffer::empty(), Buffer::empty()),
            Operation::WriteZeroes { .. } => (opcode::WRITE_ZEROES, Buffer::empty(), Buffer::empty()),
        };
        let once = frame.operation != Operation::Read;
        let body = frame.access.encode();
        let base = call(Tag::Frame(index), opcode, Class::Normal, body);
        link.call(Call { payload, answer, once, ..base });
    }

    /// Sends a frame again after a while, because the agent could not carry it out now.
    pub(super) fn hold(&mut self, index: usize, now: Instant) {
        self.held.push_back((now + FULL_PAUSE, index));
    }

    /// Whether a frame that the agent's storage has no room for waits on (`true`) or fails.
    pub(super) fn waits_for_room(&mut self, index: usize, now: Instant) -> bool {
        Counters::add(&self.counters.full);
        let (patience, on_timeout) = (self.options.patience, self.options.on_timeout);
        let Some(frame) = self.frames.get_mut(index) else { return false };
        let since = *frame.full_since.get_or_insert(now);
        if since == now && self.held.is_empty() {
            tracing::warn!(disk = %self.place(), "No space is left on the agent; the guest's writes wait");
        }
        match (on_timeout, patience) {
            (OnTimeout::Wait, _) | (OnTimeout::Error, None) => true,
            (OnTimeout::Error, Some(patience)) => now.saturating_duration_since(since) < patience,
        }
    }

    pub(super) fn note_log(&self) {
        self.counters.log_bytes.store(self.log.bytes(), Ordering::Relaxed);
    }
}

/// A call without payload.
pub(super) fn call(tag: Tag, opcode: u16, class: Class, body: transport::wire::Body) -> Call {
    Call::new(tag.number(), opcode, class, body)
}

/// What a refused call's answer says; the bare status if its body makes no sense.
pub(super) fn refusal(answer: &Answer) -> Refusal {
    Refusal::decode(&answer.body).unwrap_or_else(|_| {
        let Status(code) = answer.status;
        Refusal::because(format!("the agent answered with status {code}"))
    })
}

pub(super) fn earlier(next: Option<Instant>, at: Instant) -> Option<Instant> {
    Some(next.map_or(at, |next| next.min(at)))
}
