//! A few control calls from a thread that has nothing else to do, such as a command-line tool.

use std::time::Duration;

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
    #[error("No answer from {address} within {timeout:?}: {reason}")]
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
}

/// A connection for calls that are made one after the other.
pub struct Client {
    _private: (),
}

impl Client {
    /// A client of the peer at `address` (`host:port`) that calls itself `name`. It connects at the first
    /// call.
    ///
    /// # Errors
    /// The kernel refuses io_uring.
    pub fn new(_address: &str, _name: &str) -> Result<Self, Error> {
        Ok(Self { _private: () })
    }

    /// Asks `opcode` with `body` and `payload`, and waits for the answer, with at most `answer_len` bytes
    /// of payload. It connects, and connects again, until `timeout` has passed.
    ///
    /// # Errors
    /// No answer in time.
    pub fn call(
        &mut self,
        _class: Class,
        _opcode: u16,
        _body: &[u8],
        _payload: Vec<u8>,
        _answer_len: usize,
        _timeout: Duration,
    ) -> Result<Reply, Error> {
        Err(Error::Ring(std::io::ErrorKind::Unsupported.into()))
    }
}
