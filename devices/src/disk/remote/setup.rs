//! The set-up of a new session: the lease, the volume, and everything acknowledged that the agent's PC may
//! have forgotten. Drawn in `docs/remote-disk.md`.

use std::time::{Duration, Instant};

use transport::buffer::Buffer;
use transport::channel::{Answer, Call};
use transport::wire::{Class, MAX_PAYLOAD, Status};

use super::core::{Core, Link, Tag, call, refusal};
use super::counters::Counters;
use super::log::Change;
use crate::disk::volume::{Access, Acquire, Acquired, Open, Opened, opcode, status};

/// How long to wait before a set-up that the agent refused is tried again.
const AGAIN: Duration = Duration::from_secs(1);
/// How many ranges are written again at once.
const WINDOW: u32 = 32;

/// How far the set-up of the current session is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Phase {
    /// No session was opened yet.
    #[default]
    Idle,
    /// The lease was asked for.
    Leasing,
    /// The volume is being opened.
    Opening,
    /// The log is being written again.
    Rewriting {
        /// Ranges from here on were not sent yet; within a range, bytes.
        next: u64,
        in_flight: u32,
    },
    /// The agent refused; the set-up begins again then.
    Refused(Instant),
    /// Requests are served.
    Ready,
}

/// The set-up of the current session.
#[derive(Debug, Default)]
pub(super) struct Setup {
    phase: Phase,
    /// Answers to an earlier attempt are recognised by its number.
    attempt: u64,
}

impl Setup {
    pub(super) fn is_ready(&self) -> bool {
        self.phase == Phase::Ready
    }

    pub(super) fn forget(&mut self) {
        self.phase = Phase::Idle;
        self.attempt += 1;
    }
}

impl Core {
    /// A session was opened with a peer that knows nothing of an earlier one.
    pub(super) fn begin_setup(&mut self, link: &mut impl Link) {
        self.acquire(link);
    }

    fn acquire(&mut self, link: &mut impl Link) {
        self.setup.attempt += 1;
        self.setup.phase = Phase::Leasing;
        let Self { options, lease, .. } = &*self;
        let acquire = Acquire {
            volume: options.volume.clone(),
            holder: lease.holder,
            expected: lease.epoch,
            name: options.name.clone(),
        };
        self.ask(link, opcode::ACQUIRE, acquire.encode(), Buffer::empty());
    }

    fn ask(&self, link: &mut impl Link, opcode: u16, body: transport::wire::Body, payload: Buffer) {
        let base = call(Tag::Setup(self.setup.attempt), opcode, Class::Control, body);
        link.call(Call { payload, setup: true, ..base });
    }

    /// The agent answered a step.
    pub(super) fn setup_answered(
        &mut self,
        link: &mut impl Link,
        attempt: u64,
        answer: &Answer,
        now: Instant,
    ) {
        if attempt != self.setup.attempt || answer.status == Status::CANCELLED {
            return;
        }
        if answer.status != Status::OK {
            return self.setup_refused(answer, now);
        }
        match self.setup.phase {
            Phase::Leasing => match Acquired::decode(&answer.body) {
                Ok(acquired) if acquired.epoch == self.lease.epoch => {
                    self.ttl = acquired.ttl.max(Duration::from_millis(100));
                    self.setup.phase = Phase::Opening;
                    let open = Open { epoch: self.lease.epoch, holder: self.lease.holder };
                    self.ask(link, opcode::OPEN, open.encode(), Buffer::empty());
                }
                Ok(_) => self.fenced("the agent gave another lease than the one this guest had".to_owned()),
                Err(e) => self.try_again(e.to_string(), now),
            },
            Phase::Opening => match Opened::decode(&answer.body) {
                Ok(opened) => self.opened(link, &opened, now),
                Err(e) => self.try_again(e.to_string(), now),
            },
            Phase::Rewriting { next, in_flight } => {
                self.setup.phase = Phase::Rewriting { next, in_flight: in_flight - 1 };
                self.rewrite(link, now);
            }
            Phase::Idle | Phase::Refused(_) | Phase::Ready => {}
        }
    }

    fn setup_refused(&mut self, answer: &Answer, now: Instant) {
        let why = refusal(answer).text;
        match answer.status {
            status::FENCED | status::LEASED => self.fenced(why),
            _ => self.try_again(why, now),
        }
    }

    fn try_again(&mut self, why: String, now: Instant) {
        tracing::warn!(disk = %self.place(), %why, "The agent refuses the volume; trying again");
        self.setup.attempt += 1;
        self.setup.phase = Phase::Refused(now + AGAIN);
        self.away_since.get_or_insert(now);
        self.away_why = why;
    }

    pub(super) fn setup_tick(&mut self, link: &mut impl Link, now: Instant) -> Option<Instant> {
        match self.setup.phase {
            Phase::Refused(at) if at <= now => {
                self.acquire(link);
                None
            }
            Phase::Refused(at) => Some(at),
            _ => None,
        }
    }

    fn opened(&mut self, link: &mut impl Link, opened: &Opened, now: Instant) {
        let known = opened.identity != 0 && self.identity != 0;
        if opened.geometry.size != self.geometry.size || known && opened.identity != self.identity {
            let why = "another image is now in the volume's place";
            return self.fenced(why.to_owned());
        }
        if opened.geometry.read_only && !self.geometry.read_only {
            return self.try_again("the volume has become read-only".to_owned(), now);
        }
        // Not only after a restart of the PC. Linux forgets what it could not write once one flush has said
        // so, and neither a new agent on the same boot nor we, if the answer was lost, know of that flush.
        if !self.log.is_empty() {
            tracing::warn!(
                disk = %self.place(), bytes = self.log.bytes(),
                "The agent does not know the session; what was acknowledged but not flushed is written again"
            );
            self.setup.phase = Phase::Rewriting { next: 0, in_flight: 0 };
            return self.rewrite(link, now);
        }
        self.set_up(link, now);
    }

    /// Writes the log's ranges again. They do not overlap, so their order does not matter, and the log
    /// does not change meanwhile: no other request is served.
    fn rewrite(&mut self, link: &mut impl Link, now: Instant) {
        let Phase::Rewriting { mut next, mut in_flight } = self.setup.phase else { return };
        while in_flight < WINDOW {
            let Some((offset, len, change)) = self.log.from(next) else { break };
            debug_assert!(len <= MAX_PAYLOAD as u64 || !matches!(change, Change::Data(_)));
            let (opcode, unmap, payload) = match change {
                Change::Data(data) => (opcode::WRITE, false, Buffer::from_vec(data.to_vec())),
                Change::Zeroes { unmap } => (opcode::WRITE_ZEROES, *unmap, Buffer::empty()),
                Change::Discard => (opcode::DISCARD, false, Buffer::empty()),
            };
            let access = Access { epoch: self.lease.epoch, offset, len, unmap };
            self.ask(link, opcode, access.encode(), payload);
            Counters::add(&self.counters.rewritten);
            next = offset + len;
            in_flight += 1;
        }
        self.setup.phase = Phase::Rewriting { next, in_flight };
        if in_flight == 0 {
            self.set_up(link, now);
        }
    }

    fn set_up(&mut self, link: &mut impl Link, now: Instant) {
        Counters::add(&self.counters.sessions);
        self.setup.phase = Phase::Ready;
        link.ready();
        self.back(now);
    }
}
