//! The other end of a guest's control socket.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde::de::DeserializeOwned;

use super::protocol::{Answer, Command, LONGEST_ANSWER, Outcome, Request, VERSION};
use super::{Counters, HelperStatus, MemoryStatus, Peers, Status};
use crate::memory::coherence;

/// A request could not be made or was refused.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nobody answers at the socket, or the connection broke.
    #[error("The guest does not answer: {0}")]
    Unreachable(#[from] io::Error),
    /// What came back is no answer to what was asked.
    #[error("The guest answers in a way that this version does not understand: {0}")]
    Strange(String),
    /// The guest refused.
    #[error("{0}")]
    Refused(#[from] super::Error),
}

/// A connection to a guest's control socket.
#[derive(Debug)]
pub struct Client {
    stream: BufReader<UnixStream>,
    next: u64,
}

impl Client {
    /// Connects to the socket at `path`. Every answer must come within `patience`, for ever without one.
    ///
    /// # Errors
    /// [`Error::Unreachable`].
    pub fn connect(path: &Path, patience: Option<Duration>) -> Result<Self, Error> {
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(patience)?;
        stream.set_write_timeout(patience)?;
        Ok(Self { stream: BufReader::new(stream), next: 1 })
    }

    /// What the guest is and does.
    ///
    /// # Errors
    /// See [`Client::ask`].
    pub fn status(&mut self) -> Result<Status, Error> {
        self.ask_for(Command::Status)
    }

    /// What was counted.
    ///
    /// # Errors
    /// See [`Client::ask`].
    pub fn counters(&mut self) -> Result<Counters, Error> {
        self.ask_for(Command::Counters)
    }

    /// What was counted with the peers of the guest's devices.
    ///
    /// # Errors
    /// See [`Client::ask`].
    pub fn peers(&mut self) -> Result<Peers, Error> {
        self.ask_for(Command::Peers)
    }

    /// Where the guest's memory is.
    ///
    /// # Errors
    /// See [`Client::ask`].
    pub fn memory(&mut self) -> Result<MemoryStatus, Error> {
        self.ask_for(Command::Memory)
    }

    /// What it cost the vCPUs of this PC to share memory with those of others.
    ///
    /// # Errors
    /// See [`Client::ask`].
    pub fn coherence(&mut self) -> Result<coherence::Counters, Error> {
        self.ask_for(Command::Coherence)
    }

    /// How the helpers are that lend the guest memory.
    ///
    /// # Errors
    /// See [`Client::ask`].
    pub fn helpers(&mut self) -> Result<Vec<HelperStatus>, Error> {
        self.ask_for(Command::MemoryHelpers)
    }

    fn ask_for<T: DeserializeOwned>(&mut self, command: Command) -> Result<T, Error> {
        let value = self.ask(command)?;
        serde_json::from_value(value).map_err(|why| Error::Strange(why.to_string()))
    }

    /// Has `command` carried out, and waits for what it comes to.
    ///
    /// # Errors
    /// The guest does not answer, does so strangely, or refuses.
    pub fn ask(&mut self, command: Command) -> Result<serde_json::Value, Error> {
        let id = self.next;
        self.next += 1;
        let request = Request { version: VERSION, id, command };
        let mut line = serde_json::to_vec(&request).map_err(io::Error::other)?;
        line.push(b'\n');
        self.stream.get_mut().write_all(&line)?;
        let answer = self.answer()?;
        if answer.version != VERSION || answer.id.is_some_and(|answered| answered != id) {
            let Answer { version, id, .. } = answer;
            return Err(Error::Strange(format!("version {version}, request {id:?}")));
        }
        match answer.outcome {
            Outcome::Ok(value) => Ok(value),
            Outcome::Error(error) => Err(Error::Refused(error)),
        }
    }

    fn answer(&mut self) -> Result<Answer, Error> {
        let mut line = Vec::new();
        let most = LONGEST_ANSWER as u64 + 1;
        let taken = self.stream.by_ref().take(most).read_until(b'\n', &mut line);
        taken.map_err(|why| match why.kind() {
            io::ErrorKind::WouldBlock => io::Error::from(io::ErrorKind::TimedOut),
            _ => why,
        })?;
        if line.is_empty() {
            return Err(Error::Unreachable(io::ErrorKind::ConnectionReset.into()));
        }
        if line.last() != Some(&b'\n') {
            return Err(Error::Strange("the answer is cut off or too long".into()));
        }
        serde_json::from_slice(&line).map_err(|why| Error::Strange(why.to_string()))
    }
}
