//! The end of a line that dials.

use std::sync::Arc;
use std::time::Instant;

use super::protocol::{self, Header, opcode};
use super::{Hear, MOST_PAYLOAD, Message, Receiving, Sender, Sending, WINDOW};
use crate::buffer::Buffer;
use crate::channel::{Answer, Call, Channel, Config, Event, Names};
use crate::metrics::Recorder;
use crate::pool::Pool;
use crate::ring::{Completion, Ring, Source};
use crate::wire::{Body, Class, Status};

const OPEN: u64 = 1;
const POST: u64 = 2;

/// How far the line is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The other end has not agreed.
    Opening,
    /// Messages go.
    Open,
    /// For good.
    Over,
}

/// See the [module](super). Driven as a [`Channel`] is: hand it the ring's [completions](Self::complete), and
/// [`tick`](Self::tick) it before every wait.
pub struct Asking {
    channel: Channel,
    sender: Sender,
    hear: Arc<dyn Hear>,
    /// What the line is for.
    purpose: Body,
    receiving: Receiving,
    phase: Phase,
    /// Requests without an answer.
    outstanding: usize,
    /// So many of them the other end may hold.
    held: usize,
    answers: Pool,
    source: Source,
    polled: bool,
    events: Vec<Event>,
}

impl Asking {
    /// A line to the agent behind `config` and `names`, that asks there for `purpose`. What `sender` sends goes there,
    /// what comes from there `hear` hears.
    #[must_use]
    pub fn new(
        config: Config,
        names: Names,
        purpose: Body,
        sender: Sender,
        hear: Arc<dyn Hear>,
        ring: &mut Ring,
    ) -> Self {
        let channel = Channel::new(config, names, ring);
        Self {
            channel,
            sender,
            hear,
            purpose,
            receiving: Receiving::default(),
            phase: Phase::Opening,
            outstanding: 0,
            held: 0,
            answers: Pool::new((WINDOW * MOST_PAYLOAD) as u64),
            source: ring.source(),
            polled: false,
            events: Vec::new(),
        }
    }

    /// Has what happens from here on counted by `recorder`; to be called before the first [`tick`](Self::tick).
    pub fn record(&mut self, recorder: Recorder) {
        self.channel.record(recorder);
    }

    /// Whether the line is over.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.phase == Phase::Over
    }

    /// Looks at a completion of the ring, and hears what came with it. `false`: it is not this line's.
    pub fn complete(&mut self, ring: &mut Ring, completion: Completion) -> bool {
        if completion.token.source() == self.source {
            self.polled &= completion.more();
            self.sender.hushed();
            return true;
        }
        let mut events = std::mem::take(&mut self.events);
        let ours = self.channel.complete(ring, completion, &mut events);
        self.sender.awake();
        self.handle(ring, &mut events);
        self.events = events;
        ours
    }

    /// Sends what is to be sent, does what is due, and returns when it wants to be called next at the latest. Call it
    /// before every wait of the ring.
    pub fn tick(&mut self, ring: &mut Ring, now: Instant) -> Option<Instant> {
        let mut events = std::mem::take(&mut self.events);
        let due = loop {
            if self.phase == Phase::Over {
                break None;
            }
            self.sender.awake();
            self.fill();
            let due = self.channel.tick(ring, now, &mut events);
            let quiet = events.is_empty();
            self.handle(ring, &mut events);
            self.end_in_order(ring);
            if quiet && self.sender.asleep(self.may_send()) {
                break due;
            }
        };
        if !self.polled && self.phase != Phase::Over {
            ring.poll_readable(self.sender.bell(), true, self.source.token(0));
            self.polled = true;
        }
        self.events = events;
        due
    }

    fn may_send(&self) -> bool {
        self.phase == Phase::Open && self.outstanding < WINDOW
    }

    /// Makes requests of what waits to be sent, and so many more that the other end can always say something.
    fn fill(&mut self) {
        while self.may_send() {
            let next = self.sender.with(Sending::pop);
            let Some((number, Message { body, payload })) = next else { break };
            self.post(number, &body, payload);
        }
        while self.phase == Phase::Open && self.outstanding < self.held {
            self.post(0, &[], Buffer::empty());
        }
    }

    fn post(&mut self, number: u64, message: &[u8], payload: Buffer) {
        let body = Header { number, acked: self.receiving.last() }.encode(message);
        let answer = self.answers.take(MOST_PAYLOAD);
        self.channel.submit(Call { payload, answer, ..Call::new(POST, opcode::POST, Class::Urgent, body) });
        self.outstanding += 1;
    }

    fn handle(&mut self, ring: &mut Ring, events: &mut Vec<Event>) {
        for event in events.drain(..) {
            if self.phase == Phase::Over {
                continue;
            }
            if let Err(why) = self.event(event) {
                self.over(ring, &why);
            }
        }
    }

    /// # Errors
    /// The line is over, for this reason.
    fn event(&mut self, event: Event) -> Result<(), String> {
        match event {
            Event::Opened { .. } if self.phase == Phase::Opening => self.channel.submit(Call {
                setup: true,
                ..Call::new(OPEN, opcode::OPEN, Class::Urgent, self.purpose.clone())
            }),
            Event::Opened { .. } => return Err("the other side was started anew".to_owned()),
            Event::Resumed { .. } if self.phase == Phase::Open => self.hear.back(),
            Event::Resumed { .. } | Event::Carrier { .. } => {}
            Event::Lost { reason } => self.hear.away(&reason),
            Event::Answer(answer) if answer.tag == POST => return self.answered(&answer),
            Event::Answer(answer) => return self.opened(&answer),
        }
        Ok(())
    }

    fn opened(&mut self, answer: &Answer) -> Result<(), String> {
        match answer.status {
            // Another session opens, and asks again.
            Status::CANCELLED => return Ok(()),
            Status::OK => {}
            status => return Err(protocol::reason_of(status, &answer.body)),
        }
        self.held = protocol::welcomed(&answer.body).map_err(|e| e.to_string())?;
        self.phase = Phase::Open;
        self.channel.ready();
        self.hear.back();
        Ok(())
    }

    fn answered(&mut self, answer: &Answer) -> Result<(), String> {
        self.outstanding = self.outstanding.saturating_sub(1);
        if answer.status != Status::OK {
            return Err(protocol::reason_of(answer.status, &answer.body));
        }
        let (header, message) = Header::decode(&answer.body).map_err(|e| e.to_string())?;
        if header.number == 0 {
            return Ok(());
        }
        let payload = answer.answer.slice(0, answer.received).unwrap_or_default();
        let message = Message { body: Body::from_slice(message), payload };
        let hear = &self.hear;
        let heard = |Message { body, payload }| hear.hear(&body, Some(payload).filter(|p| !p.is_empty()));
        self.receiving.take(header.number, message, heard).map_err(|e| e.to_string())
    }

    /// Ends the line if its user wants that, and all that it sent before is on the network.
    fn end_in_order(&mut self, ring: &mut Ring) {
        if let Some(why) = self.sender.ending()
            && !(self.may_send() && self.sender.waiting() > 0)
        {
            self.over(ring, &why);
        }
    }

    fn over(&mut self, ring: &mut Ring, why: &str) {
        if self.phase == Phase::Over {
            return;
        }
        self.phase = Phase::Over;
        self.sender.over();
        self.close(ring);
        self.hear.over(why);
    }

    /// Ends the connection at once; nobody hears of it any more.
    pub fn close(&mut self, ring: &mut Ring) {
        self.phase = Phase::Over;
        self.sender.over();
        drop(self.channel.close(ring));
        if std::mem::take(&mut self.polled) {
            ring.cancel(self.source.token(0));
        }
    }
}
