//! The connection that is measured.

use std::time::{Duration, Instant};

use devices::disk::volume::{OPERATIONS, opcode};
use transport::Carrier;
use transport::buffer::Buffer;
use transport::channel::{Answer, Call, Channel, Config, Event, Names, Transport};
use transport::metrics::Recorder;
use transport::ring::Ring;
use transport::wire::{Body, Class, Status};

use super::{BLOCK, DEPTH, Error, Options};

/// How often an interruption is looked for.
const LOOK: Duration = Duration::from_millis(50);

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    /// To the agent.
    Up,
    /// From the agent.
    Down,
}

/// What came of a request.
pub(super) enum Trip {
    Answered(Duration),
    Lost,
    Interrupted,
}

/// See the [module](self).
pub(super) struct Way<'a> {
    address: String,
    timeout: Duration,
    stop: &'a dyn Fn() -> bool,
    ring: Ring,
    channel: Channel,
    events: Vec<Event>,
    answers: Vec<Answer>,
    open: bool,
    tag: u64,
    /// What last happened to the connection.
    reason: String,
    pub(super) name: String,
    pub(super) proven: Option<String>,
    pub(super) carrier: Carrier,
    pub(super) why_not_rdma: Option<String>,
    pub(super) losses: u32,
}

impl<'a> Way<'a> {
    /// Connects.
    pub(super) fn open(options: &Options, stop: &'a dyn Fn() -> bool) -> Result<Self, Error> {
        let mut ring = Ring::new(64)?;
        let config = Config {
            address: options.address.clone(),
            name: options.name.clone(),
            security: options.security.clone(),
            node: options.node.clone(),
            dead_after: options.timeout.max(Duration::from_secs(1)),
            retry_first: Duration::from_millis(50),
            retry_most: Duration::from_secs(1),
            // As `Auto`, but the reason comes where TCP stands in.
            transport: Transport::Rdma,
        };
        let names = Names::of(&config.address)?;
        let mut channel = Channel::new(config, names, &mut ring);
        // For the operation's name in the log.
        channel.record(Recorder::new(OPERATIONS));
        let mut way = Self {
            address: options.address.clone(),
            timeout: options.timeout,
            stop,
            ring,
            channel,
            events: Vec::new(),
            answers: Vec::new(),
            open: false,
            tag: 0,
            reason: "no connection yet".to_owned(),
            name: String::new(),
            proven: None,
            carrier: Carrier::Tcp,
            why_not_rdma: None,
            losses: 0,
        };
        let until = Instant::now() + way.timeout;
        while !way.open {
            if stop() {
                return Err(Error::Interrupted(way.address.clone()));
            }
            if Instant::now() >= until {
                let (address, reason) = (way.address.clone(), way.reason.clone());
                return Err(Error::Unreachable { address, timeout: way.timeout, reason });
            }
            way.round(until)?;
        }
        way.losses = 0;
        Ok(way)
    }

    /// Sends what is ready and waits for something, until `until` at the longest.
    fn round(&mut self, until: Instant) -> Result<(), Error> {
        let now = Instant::now();
        let due = self.channel.tick(&mut self.ring, now, &mut self.events);
        if self.events.is_empty() {
            let wait = due.map_or(until, |due| due.min(until)).saturating_duration_since(now);
            self.ring.wait(Some(wait.min(LOOK)))?;
        }
        while let Some(completion) = self.ring.reap() {
            self.channel.complete(&mut self.ring, completion, &mut self.events);
        }
        for event in std::mem::take(&mut self.events) {
            match event {
                Event::Opened { name, peer, carrier, .. } => {
                    (self.name, self.carrier, self.open) = (name, carrier, true);
                    self.proven = peer.map(|peer| peer.name);
                    self.channel.ready();
                }
                Event::Resumed { carrier } => self.carrier = carrier,
                Event::Carrier { carrier, why } => {
                    self.carrier = carrier;
                    self.why_not_rdma = Some(why).filter(|why| !why.is_empty());
                }
                Event::Lost { reason } => {
                    self.losses += 1;
                    self.reason = reason;
                }
                Event::Answer(answer) => self.answers.push(answer),
            }
        }
        Ok(())
    }

    fn submit(&mut self, class: Class, payload: Buffer, answer: Buffer) {
        self.tag += 1;
        self.channel.submit(Call {
            payload,
            answer,
            deadline: Some(Instant::now() + self.timeout),
            ..Call::new(self.tag, opcode::ECHO, class, Body::new())
        });
    }

    /// Lets a time pass; `true` if it was interrupted.
    pub(super) fn pause(&mut self, pause: Duration) -> Result<bool, Error> {
        let until = Instant::now() + pause;
        while Instant::now() < until {
            if (self.stop)() {
                return Ok(true);
            }
            self.round(until)?;
        }
        Ok((self.stop)())
    }

    fn refused(&self, Status(status): Status) -> Error {
        let why = match Status(status) {
            Status::UNKNOWN_OPERATION => "it is of a version that knows no echo".to_owned(),
            _ => format!("it answers with status {status}"),
        };
        Error::Refused { address: self.address.clone(), why }
    }

    /// One request and its answer, with `size` bytes each way.
    pub(super) fn round_trip(&mut self, class: Class, size: usize) -> Result<Trip, Error> {
        let (payload, answer) = (Buffer::zeroed(size), Buffer::zeroed(size));
        payload.fill(self.tag as u8);
        let started = Instant::now();
        self.submit(class, payload, answer);
        loop {
            // The deadline answers it at the latest.
            self.round(started + self.timeout)?;
            // Those of an earlier, interrupted measurement are nobody's.
            let tag = self.tag;
            let answer = std::mem::take(&mut self.answers).into_iter().find(|answer| answer.tag == tag);
            if let Some(answer) = answer {
                let took = started.elapsed();
                return match answer.status {
                    Status::OK if answer.received == size => Ok(Trip::Answered(took)),
                    Status::DEADLINE => Ok(Trip::Lost),
                    status => Err(self.refused(status)),
                };
            }
            if (self.stop)() {
                return Ok(Trip::Interrupted);
            }
        }
    }

    /// Payload bytes per second in one direction, kept up for `span`. `None`: it was interrupted, or an
    /// answer did not come.
    pub(super) fn bandwidth(
        &mut self,
        class: Class,
        direction: Direction,
        span: Duration,
    ) -> Result<Option<f64>, Error> {
        let started = Instant::now();
        for _ in 0..DEPTH {
            match direction {
                Direction::Up => self.submit(class, Buffer::zeroed(BLOCK), Buffer::empty()),
                Direction::Down => self.submit(class, Buffer::empty(), Buffer::zeroed(BLOCK)),
            }
        }
        let (mut in_flight, mut bytes) = (DEPTH, 0u64);
        let mut end = started;
        while in_flight > 0 {
            self.round(Instant::now() + LOOK)?;
            let now = Instant::now();
            let over = now - started >= span;
            for answer in std::mem::take(&mut self.answers) {
                in_flight = in_flight.saturating_sub(1);
                match answer.status {
                    Status::OK => {}
                    Status::DEADLINE => return Ok(None),
                    status => return Err(self.refused(status)),
                }
                bytes += BLOCK as u64;
                end = now;
                if !over {
                    in_flight += 1;
                    self.submit(class, answer.payload, answer.answer);
                }
            }
            if (self.stop)() {
                return Ok(None);
            }
        }
        let seconds = (end - started).as_secs_f64();
        Ok((seconds > 0.0).then(|| bytes as f64 / seconds))
    }
}

impl Drop for Way<'_> {
    fn drop(&mut self) {
        drop(self.channel.close(&mut self.ring));
        // The goodbye is a courtesy.
        let _ = self.ring.submit();
    }
}
