//! The end of a line that was dialled.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use super::protocol::{self, Header, opcode, status};
use super::{HELD, Hear, Message, Receiving, Sender, Sending, Violation};
use crate::buffer::Buffer;
use crate::ring::{Completion, Ring, Source};
use crate::server::{Connection, Request};
use crate::wire::{Body, Status};

/// What of a line outlives its connections; whoever serves keeps it as long as the session may come back.
pub struct Answering {
    sender: Sender,
    hear: Arc<dyn Hear>,
    receiving: Mutex<Receiving>,
}

impl Answering {
    /// What `sender` sends goes to the asking end, what comes from there `hear` hears.
    #[must_use]
    pub fn new(sender: Sender, hear: Arc<dyn Hear>) -> Arc<Self> {
        Arc::new(Self { sender, hear, receiving: Mutex::default() })
    }

    /// Ends the line: the other end hears why, and so does this one's user.
    pub fn end(&self, why: &str) {
        self.sender.end(why);
    }

    /// A message came, and what the other end has got.
    fn take(&self, request: &Request) -> Result<(), String> {
        let (header, message) = Header::decode(&request.body).map_err(|e| e.to_string())?;
        self.sender.with(|sending| sending.acked(header.acked)).map_err(|e| e.to_string())?;
        let payload = request.payload.slice(0, request.payload.len()).unwrap_or_default();
        if header.number == 0 {
            return Ok(());
        }
        let message = Message { body: Body::from_slice(message), payload };
        let heard =
            |Message { body, payload }| self.hear.hear(&body, Some(payload).filter(|p| !p.is_empty()));
        let mut receiving = self.receiving.lock().unwrap_or_else(PoisonError::into_inner);
        receiving.take(header.number, message, heard).map_err(|Violation(why)| why.to_owned())
    }

    fn last(&self) -> u64 {
        self.receiving.lock().unwrap_or_else(PoisonError::into_inner).last()
    }
}

/// A line's part of one connection: its requests that have no answer yet.
pub struct Serving {
    line: Arc<Answering>,
    held: VecDeque<u64>,
    source: Source,
    polled: bool,
    ended: Option<String>,
}

impl Serving {
    /// Of the connection that has the line's session now. The user of the line hears that it is
    /// [back](Hear::back).
    #[must_use]
    pub fn new(line: Arc<Answering>, ring: &mut Ring) -> Self {
        line.sender.with(Sending::rewind);
        line.hear.back();
        Self { line, held: VecDeque::new(), source: ring.source(), polled: false, ended: None }
    }

    /// Takes a request of the line: an [`opcode::POST`].
    pub fn request(&mut self, connection: &mut Connection, request: &Request) {
        let sender = &self.line.sender;
        if request.opcode != opcode::POST || request.answer_len < super::MOST_PAYLOAD {
            return connection.answer(request.id, Status::MALFORMED, &[], Buffer::empty());
        }
        self.held.push_back(request.id);
        if self.ended.is_some() || sender.ending().is_some() {
            return;
        }
        sender.awake();
        if let Err(why) = self.line.take(request) {
            sender.end(&why);
        }
    }

    /// Looks at a completion of the ring. `false`: it is not this line's.
    pub fn complete(&mut self, completion: Completion) -> bool {
        if completion.token.source() != self.source {
            return false;
        }
        self.polled &= completion.more();
        self.line.sender.hushed();
        true
    }

    /// Sends what is to be sent, as far as requests are here to be answered. Call it before every
    /// [`Connection::tick`], and so before every wait of the ring.
    pub fn tick(&mut self, ring: &mut Ring, connection: &mut Connection) {
        let sender = self.line.sender.clone();
        if self.ended.is_none() {
            loop {
                sender.awake();
                self.flush(connection);
                if sender.asleep(!self.held.is_empty()) || self.ended.is_some() {
                    break;
                }
            }
        }
        if let Some(why) = &self.ended {
            let why = protocol::reason(why);
            for id in self.held.drain(..) {
                connection.answer(id, status::ENDED, &why, Buffer::empty());
            }
            return;
        }
        if !self.polled {
            ring.poll_readable(sender.bell(), true, self.source.token(0));
            self.polled = true;
        }
    }

    fn flush(&mut self, connection: &mut Connection) {
        let acked = self.line.last();
        while let Some(id) = self.held.front().copied() {
            let Some((number, message)) = self.line.sender.with(Sending::next) else { break };
            self.held.pop_front();
            let body = Header { number, acked }.encode(&message.body);
            connection.answer(id, Status::OK, &body, message.payload);
        }
        if self.held.len() > HELD {
            self.let_go(connection, HELD);
        }
        if let Some(why) = self.line.sender.ending()
            && (self.held.is_empty() || self.line.sender.waiting() == 0)
        {
            self.line.sender.over();
            self.line.hear.over(&why);
            self.ended = Some(why);
        }
    }

    /// Answers all but `most` of the requests with nothing.
    fn let_go(&mut self, connection: &mut Connection, most: usize) {
        let body = Header { number: 0, acked: self.line.last() }.encode(&[]);
        while self.held.len() > most {
            let Some(id) = self.held.pop_front() else { break };
            connection.answer(id, Status::OK, &body, Buffer::empty());
        }
    }

    /// The connection is to end in order: nothing is held any more.
    pub fn stop(&mut self, connection: &mut Connection) {
        self.let_go(connection, 0);
    }

    /// The connection is over, because of `why`: the line waits for another one.
    pub fn closed(mut self, ring: &mut Ring, connection: &mut Connection, why: &str) {
        self.let_go(connection, 0);
        if self.polled {
            ring.cancel(self.source.token(0));
        }
        if self.ended.is_none() {
            self.line.hear.away(why);
        }
    }
}
