//! What one handler has at one helper: a connection, a lease of its own, and what is said over it.
//!
//! Each handler has its own lease at each helper. So a helper that lost what it had gets a new one by itself, what
//! was asked under the old one can do nothing to it, and handlers need not agree on anything.
//!
//! ```text
//!              connected, a new session                  answered
//!   Apart ───────────────────────────────► Opening ───────────────► Serving
//!     │  ▲                                   │  ▲                      │
//!     │  │ the lease is over: Lost           │  │ after a pause        │ cut, resumed: still Serving
//!     │  └──────────────◄────────────────────┤  │                      │ a new session: Opening
//!     │        connected                     ▼  │                      │ the lease is over: Lost, Apart
//!     └──► Leasing ───────────────────────► Refused
//! ```

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use transport::blocking::{self, Client};
use transport::channel::{Answer, Call, Channel, Config, Event, Names, Transport};
use transport::identity::Security;
use transport::metrics::{Metrics, Recorder};
use transport::pool::Pool;
use transport::ring::{Completion, Ring};
use transport::wire::{Class, Status};

use super::Urgency;
use super::ask::{Ask, News, Outcome, What};
use super::compress::{Compress, Compressor};
use super::health::Counters;
use super::protocol::{
    Absent, Forget, Lease, OPERATIONS, Open, Opened, Pages, Refusal, Take, Taken, opcode, status,
};
use crate::memory::fault::PAGE;

/// How long to wait before a set-up that was refused is tried again.
const AGAIN: Duration = Duration::from_secs(1);
/// Memory for answers: as much as a stream of faults has on its way, twice. More comes from the heap.
const ANSWERS: u64 = 8 << 20;
/// How long giving a lease back may take.
pub(super) const RELEASE_TIMEOUT: Duration = Duration::from_secs(2);

/// A PC that lends memory, and how to reach it.
#[derive(Clone, Debug)]
pub struct Helper {
    /// The agent: `host` or `host:port`. Its name in reports.
    pub agent: String,
    /// The node that it must prove to be; `None`: any agent of the household, and then the one that was met first.
    pub node: Option<String>,
    /// How connections to it are protected.
    pub security: Security,
    /// What may carry them.
    pub transport: Transport,
    /// How much of its memory this guest may have, in bytes.
    pub size: u64,
}

impl Helper {
    /// How many pages of this guest it may have.
    pub(super) fn pages(&self) -> u64 {
        self.size / PAGE as u64
    }

    /// A connection for the calls around a guest's life.
    pub(super) fn client(&self, name: &str) -> Result<Client, blocking::Error> {
        let address = devices::disk::remote::with_port(&self.agent);
        Client::new(&address, name, &self.security, self.node.as_deref())
    }
}

/// A lease, and what it takes to take another.
#[derive(Clone, Debug)]
pub(super) struct Holding {
    pub(super) take: Take,
    /// `None`: it is over.
    pub(super) taken: Option<Taken>,
}

impl Holding {
    fn lease(&self) -> Lease {
        Lease { epoch: self.taken.map_or(0, |taken| taken.epoch), holder: self.take.holder }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// No session was opened.
    Apart,
    Leasing,
    Opening,
    /// The set-up begins again then.
    Refused(Instant),
    Serving,
    /// The lease is being given back.
    Leaving,
    Closed,
}

/// Own calls have this in their tags, the core's do not: it numbers fewer.
const OWN: u64 = 1 << 31;
const RENEWAL: u64 = OWN | 1;
const RELEASE: u64 = OWN | 2;
/// Steps of the set-up, with the number of the attempt above.
const SETUP: u64 = OWN | 3;

/// See the [module](self).
pub(super) struct Remote {
    helper: Helper,
    name: String,
    dead_after: Duration,
    holding: Holding,
    names: Option<Names>,
    recorder: Option<Recorder>,
    metrics: Arc<Metrics>,
    channel: Option<Channel>,
    /// Answers are received into memory that earlier ones have warmed: it is not made anew, nor zeroed.
    pool: Pool,
    phase: Phase,
    attempt: u64,
    /// A connection is there.
    up: bool,
    renew_at: Option<Instant>,
    renewing: bool,
    /// When another lease was asked for last.
    leased: Option<Instant>,
    compressor: Compressor,
    /// The connection was closed for good.
    shut: bool,
    events: Vec<Event>,
}

impl Remote {
    /// Of a lease that was just taken. `name` is shown to the helper's owner.
    pub(super) fn new(
        helper: Helper,
        name: String,
        dead_after: Duration,
        compress: Compress,
        holding: Holding,
    ) -> io::Result<Self> {
        let names = Names::of(&devices::disk::remote::with_port(&helper.agent))?;
        let recorder = Recorder::new(OPERATIONS);
        Ok(Self {
            helper,
            name,
            dead_after,
            holding,
            names: Some(names),
            metrics: recorder.metrics(),
            recorder: Some(recorder),
            channel: None,
            pool: Pool::new(ANSWERS),
            phase: Phase::Apart,
            attempt: 0,
            up: false,
            renew_at: None,
            renewing: false,
            leased: None,
            compressor: Compressor::new(compress),
            shut: false,
            events: Vec::new(),
        })
    }

    /// Its agent, as it was given.
    pub(super) fn agent(&self) -> &str {
        &self.helper.agent
    }

    pub(super) fn metrics(&self) -> Arc<Metrics> {
        Arc::clone(&self.metrics)
    }

    /// What is counted of it, with what it counts itself.
    pub(super) fn counters(&self) -> Arc<Counters> {
        Arc::new(Counters { compression: self.compressor.tally(), ..Counters::default() })
    }

    pub(super) fn attach(&mut self, ring: &mut Ring) -> io::Result<()> {
        let again = || io::Error::other("The store was attached already");
        let config = Config {
            address: devices::disk::remote::with_port(&self.helper.agent),
            name: self.name.clone(),
            security: self.helper.security.clone(),
            node: self.helper.node.clone(),
            dead_after: self.dead_after,
            retry_first: Duration::from_millis(20),
            retry_most: Duration::from_secs(1),
            transport: self.helper.transport,
        };
        let channel = Channel::new(config, self.names.take().ok_or_else(again)?, ring);
        let channel = self.channel.insert(channel);
        self.recorder.take().into_iter().for_each(|recorder| channel.record(recorder));
        Ok(())
    }

    /// Sends what the core asks.
    pub(super) fn push(&mut self, asks: &mut Vec<Ask>) {
        let epoch = self.holding.lease().epoch;
        let Some(channel) = self.channel.as_mut().filter(|_| !self.shut) else { return asks.clear() };
        for Ask { tag, what } in asks.drain(..) {
            let call = match what {
                What::Fetch { first, count, urgency } => {
                    let class = if urgency == Urgency::Fault { Class::Urgent } else { Class::Bulk };
                    let flags = self.compressor.fetch(tag, count as usize * PAGE, urgency);
                    let body = Pages { epoch, first, count, flags }.encode();
                    let answer = self.pool.take(count as usize * PAGE);
                    Call { answer, ..Call::new(tag, opcode::FETCH, class, body) }
                }
                What::Store { first, content } => {
                    let count = (content.len() / PAGE) as u32;
                    let (payload, flags) = self.compressor.store(tag, content);
                    let body = Pages { epoch, first, count, flags }.encode();
                    Call { payload, once: true, ..Call::new(tag, opcode::STORE, Class::Bulk, body) }
                }
                What::Forget { ranges } => {
                    let body = Forget { epoch, ranges }.encode();
                    Call { once: true, ..Call::new(tag, opcode::FORGET, Class::Bulk, body) }
                }
            };
            channel.submit(call);
        }
    }

    /// Looks at a completion. `false`: it is not this connection's.
    pub(super) fn complete(&mut self, ring: &mut Ring, completion: Completion, news: &mut Vec<News>) -> bool {
        let Some(channel) = &mut self.channel else { return false };
        if !channel.complete(ring, completion, &mut self.events) {
            return false;
        }
        if self.shut {
            self.events.clear();
        }
        self.handle(ring, Instant::now(), news);
        true
    }

    pub(super) fn tick(&mut self, ring: &mut Ring, now: Instant, news: &mut Vec<News>) -> Option<Instant> {
        if self.shut {
            return None;
        }
        let mut next = None;
        match self.phase {
            Phase::Refused(at) if at <= now => self.set_up(now),
            Phase::Refused(at) => next = Some(at),
            Phase::Serving if self.up => next = self.renew(now),
            _ => {}
        }
        let channel = self.channel.as_mut()?;
        let mut due = channel.tick(ring, now, &mut self.events);
        if !self.events.is_empty() {
            self.handle(ring, now, news);
            // What the events led to goes out before the ring waits.
            due = self.channel.as_mut()?.tick(ring, now, &mut self.events);
            if !self.events.is_empty() {
                due = Some(now);
            }
        }
        [next, due].into_iter().flatten().min()
    }

    fn renew(&mut self, now: Instant) -> Option<Instant> {
        let third = self.holding.taken?.ttl.max(Duration::from_millis(300)) / 3;
        let due = *self.renew_at.get_or_insert(now + third);
        if due > now {
            return Some(due);
        }
        self.renew_at = Some(now + third);
        if !std::mem::replace(&mut self.renewing, true) {
            let body = self.holding.lease().encode();
            self.submit(Call::new(RENEWAL, opcode::RENEW, Class::Control, body));
        }
        self.renew_at
    }

    fn submit(&mut self, call: Call) {
        if let Some(channel) = &mut self.channel {
            channel.submit(call);
        }
    }

    fn handle(&mut self, ring: &mut Ring, now: Instant, news: &mut Vec<News>) {
        let mut events = std::mem::take(&mut self.events);
        for event in events.drain(..) {
            if !self.event(event, now, news) {
                // What else there is belongs to what is over.
                self.start_over(ring);
                break;
            }
        }
        if self.events.is_empty() {
            events.clear();
            self.events = events;
        }
    }

    /// `false`: the lease is over.
    fn event(&mut self, event: Event, now: Instant, news: &mut Vec<News>) -> bool {
        match event {
            Event::Opened { carrier, .. } => {
                tracing::debug!(helper = %self.helper.agent, %carrier, "A session was opened");
                self.up = true;
                if self.phase == Phase::Serving {
                    news.push(News::Away("its session is being set up anew".to_owned()));
                }
                if self.phase == Phase::Leaving {
                    self.release(now);
                } else {
                    self.set_up(now);
                }
            }
            Event::Resumed { .. } => {
                self.up = true;
                if self.phase == Phase::Serving {
                    news.push(News::Here);
                }
            }
            Event::Carrier { carrier, why } => {
                tracing::info!(helper = %self.helper.agent, %carrier, %why, "The connection's carrier changed");
            }
            Event::Lost { reason } => {
                self.compressor.lost();
                if std::mem::replace(&mut self.up, false) {
                    tracing::info!(helper = %self.helper.agent, %reason, "The connection was lost; pages wait");
                }
                news.push(News::Away(reason));
            }
            Event::Answer(answer) => return self.answered(answer, now, news),
        }
        true
    }

    fn answered(&mut self, mut answer: Answer, now: Instant, news: &mut Vec<News>) -> bool {
        let gone = answer.status == status::GONE && self.phase != Phase::Leaving;
        if answer.tag & OWN == 0 {
            if gone {
                news.push(News::Lost(refusal(&answer)));
                return false;
            }
            if answer.status == status::NOT_OPEN && self.phase == Phase::Serving {
                self.set_up(now);
            }
            let unpacked = self.compressor.answered(&mut answer);
            let tag = answer.tag;
            let outcome = unpacked.map_or_else(Outcome::Refused, |()| outcome(answer));
            news.push(News::Answer(tag, outcome));
            return true;
        }
        match answer.tag & u64::from(u32::MAX) {
            RENEWAL => self.renewing = false,
            RELEASE => self.phase = Phase::Closed,
            SETUP if answer.tag >> 32 == self.attempt && answer.status != Status::CANCELLED => {
                return self.set_up_answered(&answer, now, news);
            }
            _ => return true,
        }
        if gone {
            news.push(News::Lost(refusal(&answer)));
        }
        !gone
    }

    /// Asks for the lease if there is none, else opens it.
    fn set_up(&mut self, now: Instant) {
        if self.holding.taken.is_none() {
            // A helper that ends each lease at once is not asked without a pause.
            if let Some(at) = self.leased.filter(|at| now < *at + AGAIN) {
                self.phase = Phase::Refused(at + AGAIN);
                return;
            }
            self.leased = Some(now);
        }
        self.attempt = (self.attempt + 1) & u64::from(u32::MAX);
        let (opcode, body) = match self.holding.taken {
            None => {
                self.phase = Phase::Leasing;
                (opcode::LEASE, self.holding.take.encode())
            }
            Some(Taken { epoch, instance, .. }) => {
                self.phase = Phase::Opening;
                self.compressor.opening();
                (opcode::OPEN, Open { epoch, holder: self.holding.take.holder, instance }.encode())
            }
        };
        let tag = SETUP | self.attempt << 32;
        self.submit(Call { setup: true, ..Call::new(tag, opcode, Class::Control, body) });
    }

    /// A step of the set-up was answered. `false`: the lease is over.
    fn set_up_answered(&mut self, answer: &Answer, now: Instant, news: &mut Vec<News>) -> bool {
        if answer.status == status::GONE {
            news.push(News::Lost(refusal(answer)));
            return false;
        }
        let result = match (answer.status, self.phase) {
            (Status::OK, Phase::Leasing) => Taken::decode(&answer.body).map(|taken| {
                self.holding.taken = Some(taken);
                self.set_up(now);
            }),
            (Status::OK, Phase::Opening) => Opened::decode(&answer.body).map(|opened| {
                self.compressor.opened(opened.flags);
                self.phase = Phase::Serving;
                self.renew_at = None;
                self.channel.iter_mut().for_each(Channel::ready);
                news.push(News::Here);
            }),
            (Status::OK, _) => Ok(()),
            _ => {
                self.refused(refusal(answer), now, news);
                Ok(())
            }
        };
        if let Err(error) = result {
            self.refused(error.to_string(), now, news);
        }
        true
    }

    fn refused(&mut self, why: String, now: Instant, news: &mut Vec<News>) {
        if self.attempt.is_power_of_two() {
            tracing::warn!(helper = %self.helper.agent, %why, "The helper refuses its memory; trying again");
        }
        self.attempt = (self.attempt + 1) & u64::from(u32::MAX);
        self.phase = Phase::Refused(now + AGAIN);
        news.push(News::Away(why));
    }

    /// The lease is over: another one is taken over a new session, and nothing from before is answered.
    fn start_over(&mut self, ring: &mut Ring) {
        self.holding.taken = None;
        self.phase = Phase::Apart;
        self.compressor.lost();
        (self.up, self.renewing, self.renew_at) = (false, false, None);
        self.events.clear();
        if let Some(channel) = &mut self.channel {
            drop(channel.close(ring));
            channel.reopen();
        }
    }

    /// Gives the lease back; [`over`](Self::over) says when that is done.
    pub(super) fn leave(&mut self, now: Instant) {
        match self.phase {
            Phase::Serving | Phase::Opening if self.up => self.release(now),
            // A guest that ends as soon as it began.
            Phase::Apart if self.holding.taken.is_some() && self.channel.is_some() => {
                self.phase = Phase::Leaving;
            }
            // It will expire, if it is not over.
            _ => self.phase = Phase::Closed,
        }
    }

    fn release(&mut self, now: Instant) {
        self.phase = Phase::Leaving;
        let deadline = Some(now + RELEASE_TIMEOUT);
        let body = self.holding.lease().encode();
        self.submit(Call {
            deadline,
            setup: true,
            ..Call::new(RELEASE, opcode::RELEASE, Class::Control, body)
        });
    }

    pub(super) fn over(&self) -> bool {
        self.phase == Phase::Closed
    }

    pub(super) fn close(&mut self, ring: &mut Ring) {
        self.phase = Phase::Closed;
        // It stays, to know its completions that are still to come.
        if let Some(channel) = self.channel.as_mut().filter(|_| !std::mem::replace(&mut self.shut, true)) {
            drop(channel.close(ring));
        }
    }
}

impl Drop for Remote {
    fn drop(&mut self) {
        // One that was attached gives its lease back before it is closed; this is for one that never was.
        if self.names.is_some() && self.phase != Phase::Closed {
            release(&self.helper, &self.name, self.holding.lease());
        }
    }
}

/// Gives a lease back, so that its memory is free at once.
pub(super) fn release(helper: &Helper, name: &str, lease: Lease) {
    let result = helper.client(name).and_then(|mut client| {
        client.call(Class::Control, opcode::RELEASE, &lease.encode(), Vec::new(), 0, RELEASE_TIMEOUT)
    });
    if let Err(error) = result {
        tracing::info!(helper = %helper.agent, %error, "The memory could not be given back; its lease will expire");
    }
}

/// What an answer means to the core.
fn outcome(answer: Answer) -> Outcome {
    match answer.status {
        Status::OK if answer.received < answer.answer.len() => {
            Outcome::Refused("the answer is too short".to_owned())
        }
        Status::OK if answer.answer.is_empty() => Outcome::Done,
        Status::OK => Outcome::Fetched(answer.answer),
        status::ABSENT => {
            Outcome::Absent(Absent::decode(&answer.body).map_or(u64::MAX, |absent| absent.page))
        }
        _ => Outcome::Refused(refusal(&answer)),
    }
}

/// What a refused call's answer says; the bare status if its body makes no sense.
fn refusal(answer: &Answer) -> String {
    Refusal::decode(&answer.body).map_or_else(
        |_| {
            let Status(code) = answer.status;
            format!("the helper answered with status {code:#06x}")
        },
        |refusal| refusal.text,
    )
}
