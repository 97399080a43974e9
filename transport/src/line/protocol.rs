//! The requests of a line and the bytes around its messages.

use crate::wire::fields::{self, Malformed, Reader};
use crate::wire::{Body, Status};

/// Opcodes: 0x03xx is lines.
pub mod opcode {
    /// Carries a message there, or none, and takes one back: an answer is due when there is one, or when too many of
    /// these are outstanding.
    pub const POST: u16 = 0x0301;
    /// What the line is for, in the words of its users; the first request of a session.
    pub const OPEN: u16 = 0x0302;
}

/// Their names, to count them by.
pub const NAMES: [(u16, &str); 2] = [(opcode::POST, "line-post"), (opcode::OPEN, "line-open")];

/// Statuses: 0x03xx is lines.
pub mod status {
    use super::Status;

    /// There is no such line, or it is over; the body says why.
    pub const ENDED: Status = Status(0x0300);
}

/// Bytes before each message's own.
pub const HEADER: usize = 16;

/// The longest reason in bytes.
const MOST_TEXT: usize = 512;

/// What stands before a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    /// Counts the messages of this direction from 1 on; 0: no message.
    pub(crate) number: u64,
    /// All messages of the other direction up to this one have come.
    pub(crate) acked: u64,
}

impl Header {
    /// The body of a request or an answer with this message.
    pub(crate) fn encode(self, message: &[u8]) -> Body {
        let mut body = Body::with_capacity(HEADER + message.len());
        body.extend_from_slice(&self.number.to_le_bytes());
        body.extend_from_slice(&self.acked.to_le_bytes());
        body.extend_from_slice(message);
        body
    }

    /// Splits a body into header and message.
    ///
    /// # Errors
    /// It is too short, or has a message without a number.
    pub(crate) fn decode(body: &[u8]) -> Result<(Self, &[u8]), Malformed> {
        let mut reader = Reader::new(body, "message of a line");
        let header = Self { number: reader.u64()?, acked: reader.u64()? };
        let rest = reader.take(reader.left())?;
        if header.number == 0 && !rest.is_empty() {
            return Err(reader.malformed());
        }
        Ok((header, rest))
    }
}

/// The answer to an [`opcode::OPEN`] that is granted: so many requests may wait.
#[must_use]
pub fn welcome(held: usize) -> Body {
    Body::from_slice(&(held as u32).to_le_bytes())
}

/// What [`welcome`] said.
pub(crate) fn welcomed(body: &[u8]) -> Result<usize, Malformed> {
    let mut reader = Reader::new(body, "answer to the opening of a line");
    let held = reader.u32()? as usize;
    if held == 0 || held > super::HELD {
        return Err(reader.malformed());
    }
    reader.end(held)
}

/// The body of an answer that refuses or ends a line.
#[must_use]
pub fn reason(why: &str) -> Body {
    let mut body = Body::new();
    fields::put_text(&mut body, why, MOST_TEXT);
    body
}

/// What [`reason`] said, or something in its place.
pub(crate) fn reason_of(status: Status, body: &[u8]) -> String {
    let mut reader = Reader::new(body, "reason");
    match reader.text(MOST_TEXT) {
        Ok(text) if status == status::ENDED => text,
        _ => format!("the peer answers with status {}", status.0),
    }
}
