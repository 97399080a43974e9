//! A few control calls from a thread that has nothing else to do, such as a command-line tool.

use std::time::{Duration, Instant};

use crate::buffer::Buffer;
use crate::carrier::Carrier;
use crate::channel::{Answer, Call, Channel, Config, Event, Names, Transport};
use crate::identity::{Peer, Security};
use crate::ring::Ring;
use crate::wire::{Body, Class, Status};

/// The answer to a [`Client::call`].
#[derive(Clone, Debug)]
pub struct Reply {
    /// What the peer said.
    pub status: Status,
    /// The answer's structured bytes.
    pub body: Body,
    /// The answer's payload.
    pub payload: Vec<u8>,
}

/// A call could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No answer came in time.
    #[error("No answer from {address} within {timeout:.0?}: {reason}")]
    Timeout {
        /// Whom we asked.
        address: String,
        /// How long we waited.
        timeout: Duration,
        /// What last happened to the connection.
        reason: String,
    },
    /// The kernel refuses io_uring.
    #[error("The kernel refuses io_uring")]
    Ring(#[from] std::io::Error),
    /// There is no thread or descriptor to be had.
    #[error("No thread can be started that finds {address}")]
    Names {
        /// Whom we asked.
        address: String,
        /// Why not.
        source: std::io::Error,
    },
}

/// A connection for calls that are made one after the other.
pub struct Client {
    address: String,
    ring: Ring,
    channel: Channel,
    /// What last happened to the connection.
    reason: String,
    calls: u64,
    met: Option<Met>,
}

/// With whom the connection was made.
struct Met {
    name: String,
    peer: Option<Peer>,
    carrier: Carrier,
}

impl Client {
    /// A client of the peer at `address` (`host:port`) that calls itself `name`. With TLS, the peer must prove
    /// to be `node`, or any agent. It connects at the first call.
    ///
    /// # Errors
    /// The kernel refuses io_uring, or there is no thread to look the name up.
    pub fn new(address: &str, name: &str, security: &Security, node: Option<&str>) -> Result<Self, Error> {
        let mut ring = Ring::new(8)?;
        let config = Config {
            address: address.to_owned(),
            name: name.to_owned(),
            security: security.clone(),
            node: node.map(str::to_owned),
            dead_after: Duration::from_secs(5),
            retry_first: Duration::from_millis(50),
            retry_most: Duration::from_secs(1),
            // A few small calls: not worth the setting up.
            transport: Transport::Tcp,
        };
        let names =
            Names::of(address).map_err(|source| Error::Names { address: address.to_owned(), source })?;
        let channel = Channel::new(config, names, &mut ring);
        let reason = "no connection yet".to_owned();
        Ok(Self { address: address.to_owned(), ring, channel, reason, calls: 0, met: None })
    }

    /// The name by which the peer called itself when the connection was made.
    #[must_use]
    pub fn peer(&self) -> Option<&str> {
        Some(&self.met.as_ref()?.name)
    }

    /// Who the peer proved to be when the connection was made; `None` without TLS.
    #[must_use]
    pub fn proven(&self) -> Option<&Peer> {
        self.met.as_ref()?.peer.as_ref()
    }

    /// What carries the connection that was made last.
    #[must_use]
    pub fn carrier(&self) -> Option<Carrier> {
        Some(self.met.as_ref()?.carrier)
    }

    /// Asks `opcode` with `body` and `payload`, and waits for the answer, with at most `answer_len` bytes
    /// of payload. It connects, and connects again, until `timeout` has passed.
    ///
    /// # Errors
    /// No answer in time.
    pub fn call(
        &mut self,
        class: Class,
        opcode: u16,
        body: &[u8],
        payload: Vec<u8>,
        answer_len: usize,
        timeout: Duration,
    ) -> Result<Reply, Error> {
        self.calls += 1;
        self.channel.submit(Call {
            payload: Buffer::from_vec(payload),
            answer: Buffer::zeroed(answer_len),
            deadline: Some(Instant::now() + timeout),
            ..Call::new(self.calls, opcode, class, Body::from_slice(body))
        });
        let answer = self.wait(self.calls)?;
        if answer.status == Status::DEADLINE {
            let (address, reason) = (self.address.clone(), self.reason.clone());
            return Err(Error::Timeout { address, timeout, reason });
        }
        let mut payload = vec![0; answer.received];
        answer.answer.read_at(0, &mut payload);
        Ok(Reply { status: answer.status, body: answer.body, payload })
    }

    fn wait(&mut self, tag: u64) -> Result<Answer, Error> {
        let mut events = Vec::new();
        loop {
            let now = Instant::now();
            let due = self.channel.tick(&mut self.ring, now, &mut events);
            if events.is_empty() {
                self.ring.wait(due.map(|due| due.saturating_duration_since(now)))?;
            }
            while let Some(completion) = self.ring.reap() {
                self.channel.complete(&mut self.ring, completion, &mut events);
            }
            for event in events.drain(..) {
                match event {
                    Event::Opened { name, peer, carrier, .. } => {
                        self.reason = "the peer is slow".to_owned();
                        self.met = Some(Met { name, peer, carrier });
                        self.channel.ready();
                    }
                    Event::Carrier { .. } => {}
                    Event::Resumed { carrier } => {
                        self.reason = "the peer is slow".to_owned();
                        self.met.iter_mut().for_each(|met| met.carrier = carrier);
                    }
                    Event::Lost { reason } => self.reason = reason,
                    Event::Answer(answer) if answer.tag == tag => return Ok(answer),
                    Event::Answer(_) => {}
                }
            }
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.channel.close(&mut self.ring);
    }
}
