//! A disk whose volume an agent on another PC serves.
//!
//! A broken connection, a restarted agent or a frozen PC shows in the guest only as a pause. Why nothing
//! acknowledged is lost or undone is argued in `docs/remote-disk.md`.

mod connect;
mod core;
mod counters;
mod flow;
mod log;
mod revocations;
mod setup;

#[cfg(test)]
mod model_test;

use std::sync::Arc;
use std::time::{Duration, Instant};

use transport::blocking::{self, Client};
use transport::channel::{Call, Channel, Config, Event, Names, Transport};
use transport::identity::Security;
use transport::metrics::{Metrics, Recorder};
use transport::ring::{Completion, Ring};
use transport::wire::Class;

pub use connect::{ConnectError, DEFAULT_PORT, connect, with_port};
pub use counters::{Counters, Latencies, Snapshot};

use self::core::{Core, Failure, Link, Tag};
use self::revocations::Revocations;
use super::volume::{Lease, opcode};
use super::{Disk, Done, Error, Geometry, Request};

/// What a guest's request meets when the agent was away for longer than the disk's patience.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnTimeout {
    /// It waits on; only the log says so.
    #[default]
    Wait,
    /// An I/O error.
    Error,
}

/// Which volume, and how patient to be.
#[derive(Clone, Debug)]
pub struct Options {
    /// The agent: `host` or `host:port`.
    pub agent: String,
    /// The volume's name there.
    pub volume: String,
    /// Who takes the lease: random for each run of a guest.
    pub holder: u128,
    /// The holder's name, for people: the guest's and this PC's.
    pub name: String,
    /// How connections to the agent are protected.
    pub security: Security,
    /// The node that the agent must prove to be; `None`: any agent of the household, and then the one that
    /// [`connect`] met.
    pub node: Option<String>,
    /// Refuse the guest's writes.
    pub read_only: bool,
    /// How long requests wait for an agent that cannot be reached; `None`: for ever.
    pub patience: Option<Duration>,
    /// What happens then.
    pub on_timeout: OnTimeout,
    /// How many bytes of acknowledged writes that no flush covers are kept in memory at most.
    pub log_bytes: u64,
    /// A connection that carried nothing for this long, though pinged, is dead.
    pub dead_after: Duration,
    /// What may carry the connection.
    pub transport: Transport,
}

impl Options {
    /// A volume with the default patience (for ever) and log (32 MiB), for a new, random holder, without TLS.
    ///
    /// # Errors
    /// The kernel gives no random bytes.
    pub fn new(agent: &str, volume: &str, name: &str) -> Result<Self, Error> {
        let mut holder = [0; 16];
        getrandom::fill(&mut holder).map_err(|e| Error::Io(std::io::Error::other(e.to_string())))?;
        Ok(Self {
            agent: with_port(agent),
            volume: volume.to_owned(),
            holder: u128::from_le_bytes(holder),
            name: name.to_owned(),
            security: Security::Plain,
            node: None,
            read_only: false,
            patience: None,
            on_timeout: OnTimeout::Wait,
            log_bytes: 32 << 20,
            dead_after: Duration::from_secs(5),
            transport: Transport::Auto,
        })
    }

    /// A connection for the calls around a guest's life.
    fn client(&self) -> Result<Client, blocking::Error> {
        Client::new(&self.agent, &self.name, &self.security, self.node.as_deref())
    }

    fn channel(&self) -> Config {
        Config {
            address: with_port(&self.agent),
            name: self.name.clone(),
            security: self.security.clone(),
            node: self.node.clone(),
            dead_after: self.dead_after,
            retry_first: Duration::from_millis(20),
            retry_most: Duration::from_secs(1),
            transport: self.transport,
        }
    }
}

/// A volume on another PC. Made by [`connect`]; gives its lease back when it is closed.
pub struct RemoteDisk {
    core: Core,
    channel: Option<Channel>,
    /// How the channel finds the agent: made before, since the disk's thread may not start another.
    names: Option<Names>,
    /// What its channel counts, and who will write it.
    metrics: Arc<Metrics>,
    recorder: Option<Recorder>,
    events: Vec<Event>,
    /// What the agent knows of what the household revoked.
    revocations: Revocations,
    /// Whether the agent answered when it was last heard of.
    reachable: bool,
}

/// The core's way to the connection, while its calls are made.
struct Calls<'a>(&'a mut Channel);

impl Link for Calls<'_> {
    fn call(&mut self, call: Call) {
        self.0.submit(call);
    }

    fn ready(&mut self) {
        self.0.ready();
    }
}

impl RemoteDisk {
    /// Its counters, for whoever reports them.
    #[must_use]
    pub fn counters(&self) -> Arc<Counters> {
        Arc::clone(&self.core.counters)
    }

    /// What its connection counts: requests, bytes and latencies by class and operation.
    #[must_use]
    pub fn metrics(&self) -> Arc<Metrics> {
        Arc::clone(&self.metrics)
    }

    /// Hands what happened to the core.
    fn handle(&mut self, ring: &mut Ring, now: Instant, done: &mut Vec<Done>) {
        if let Some(channel) = &mut self.channel {
            for event in self.events.drain(..) {
                self.reachable = !matches!(event, Event::Lost { .. });
                if !self.reachable {
                    self.revocations.forget();
                }
                if let Event::Answer(answer) = &event
                    && answer.tag == Tag::Revocations.number()
                {
                    self.revocations.answered(&self.core.options.security, answer);
                }
                self.core.event(&mut Calls(channel), event, now, done);
            }
        }
        self.give_up_if_failed(ring, done);
    }

    /// Takes every call back and ends the requests, if the core says that nothing else is left to do.
    fn give_up_if_failed(&mut self, ring: &mut Ring, done: &mut Vec<Done>) {
        let Some(failure) = self.core.failure.clone() else { return };
        let Some(mut channel) = self.channel.take() else { return };
        drop(channel.close(ring));
        self.events.clear();
        self.revocations.forget();
        self.core.give_up(|| failure.error(), done);
        if let Failure::Unreachable(_) = failure {
            // A new session: what the old one left behind on the agent ends before this one is served.
            channel.reopen();
            self.channel = Some(channel);
        }
    }
}

impl Disk for RemoteDisk {
    fn geometry(&self) -> Geometry {
        self.core.geometry
    }

    fn attach(&mut self, ring: &mut Ring) -> Result<(), Error> {
        let now = Instant::now();
        let config = self.core.options.channel();
        let again = || Error::Io(std::io::Error::other("The disk was attached already"));
        let names = self.names.take().ok_or_else(again)?;
        let channel = self.channel.insert(Channel::new(config, names, ring));
        self.recorder.take().into_iter().for_each(|recorder| channel.record(recorder));
        self.core.away_since = Some(now);
        Ok(())
    }

    fn submit(&mut self, ring: &mut Ring, request: Request, done: &mut Vec<Done>) {
        let now = Instant::now();
        match &mut self.channel {
            Some(channel) => self.core.submit(&mut Calls(channel), request, now, done),
            None => {
                let not_attached = || Error::Io(std::io::Error::other("The disk is not attached"));
                let error = self.core.failure.as_ref().map_or_else(not_attached, Failure::error);
                done.push(Done { tag: request.tag, result: Err(error), buffer: request.buffer });
            }
        }
        self.give_up_if_failed(ring, done);
    }

    fn complete(&mut self, ring: &mut Ring, completion: Completion, done: &mut Vec<Done>) -> bool {
        let Some(channel) = &mut self.channel else { return false };
        if !channel.complete(ring, completion, &mut self.events) {
            return false;
        }
        if !self.events.is_empty() {
            self.handle(ring, Instant::now(), done);
        }
        true
    }

    fn tick(&mut self, ring: &mut Ring, now: Instant, done: &mut Vec<Done>) -> Option<Instant> {
        let channel = self.channel.as_mut()?;
        let core = self.core.tick(&mut Calls(channel), now, done);
        if self.reachable {
            let call = self.revocations.tick(&self.core.options.security, now);
            call.into_iter().for_each(|call| channel.submit(call));
        }
        let mut next = channel.tick(ring, now, &mut self.events);
        if !self.events.is_empty() {
            self.handle(ring, now, done);
            // What the events led to goes out before the ring waits.
            next = self.channel.as_mut()?.tick(ring, now, &mut self.events);
            if !self.events.is_empty() {
                next = Some(now);
            }
        }
        self.give_up_if_failed(ring, done);
        [core, next].into_iter().flatten().min()
    }

    fn abort(&mut self, ring: &mut Ring, done: &mut Vec<Done>) {
        let Some(mut channel) = self.channel.take() else { return };
        drop(channel.close(ring));
        self.events.clear();
        self.revocations.forget();
        let failure = self.core.failure.clone();
        let given_up = || Error::Io(std::io::Error::from_raw_os_error(libc::ECANCELED));
        self.core.give_up(|| failure.as_ref().map_or_else(given_up, Failure::error), done);
        if !matches!(failure, Some(Failure::Fenced(_))) {
            channel.reopen();
            self.channel = Some(channel);
            self.core.away_since.get_or_insert_with(Instant::now);
        }
    }

    fn close(&mut self, ring: &mut Ring) {
        let Some(mut channel) = self.channel.take() else { return };
        if self.core.is_serving() {
            give_back(&mut channel, ring, self.core.lease);
        }
        channel.close(ring);
        self.reachable = false;
    }

    fn describe(&self) -> String {
        let away = match (&self.core.failure, self.core.away_since) {
            (Some(failure), _) => format!(", {}", failure.error()),
            (None, Some(since)) => format!(", away for {:.1?}: {}", since.elapsed(), self.core.away_why),
            (None, None) => String::new(),
        };
        format!("{}, {} bytes{away}", self.core.place(), self.core.geometry.size)
    }
}

/// Gives the lease back over the connection that is there, so that the next holder need not wait until it
/// expires.
fn give_back(channel: &mut Channel, ring: &mut Ring, lease: Lease) {
    let until = Instant::now() + connect::RELEASE_TIMEOUT;
    let base = core::call(Tag::Release, opcode::RELEASE, Class::Control, lease.encode());
    channel.submit(Call { deadline: Some(until), ..base });
    let (mut events, mut others) = (Vec::new(), Vec::new());
    loop {
        let now = Instant::now();
        let next = channel.tick(ring, now, &mut events).unwrap_or(until).min(until);
        let is_end = |event: &Event| match event {
            Event::Answer(answer) => answer.tag == Tag::Release.number(),
            Event::Lost { .. } => true,
            Event::Opened { .. } | Event::Resumed { .. } | Event::Carrier { .. } => false,
        };
        if events.drain(..).any(|event| is_end(&event)) || now >= until {
            break;
        }
        if ring.wait(Some(next.saturating_duration_since(now))).is_err() {
            break;
        }
        while let Some(completion) = ring.reap() {
            if !channel.complete(ring, completion, &mut events) {
                others.push(completion);
            }
        }
    }
    ring.put_back(others);
}

impl Drop for RemoteDisk {
    fn drop(&mut self) {
        let fenced = matches!(self.core.failure, Some(Failure::Fenced(_)));
        // A disk that was attached gives its lease back when it is closed; this is for one that never was.
        if self.reachable && !fenced && self.channel.is_none() {
            connect::release(&self.core.options, self.core.lease);
        }
    }
}
