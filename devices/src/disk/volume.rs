//! The volume protocol: what a remote disk and an agent say to each other in a transport's requests.
//! Drawn in `docs/volume-protocol.md`. All numbers are little-endian.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use transport::metrics::Operations;
pub use transport::wire::fields::Malformed;
use transport::wire::fields::{Reader, put_text};
use transport::wire::{Body, Status};

use super::{Error, Geometry};

/// A volume's or holder's name has at most so many bytes.
pub const MAX_NAME: usize = 255;
/// The text of a refusal has at most so many bytes.
pub const MAX_TEXT: usize = 512;

/// What is asked.
pub mod opcode {
    /// Take or confirm a lease: [`Acquire`](super::Acquire) to [`Acquired`](super::Acquired).
    pub const ACQUIRE: u16 = 0x0101;
    /// Keep a lease: [`Lease`](super::Lease) to nothing.
    pub const RENEW: u16 = 0x0102;
    /// Give a lease back: [`Lease`](super::Lease) to nothing.
    pub const RELEASE: u16 = 0x0103;
    /// Bind a leased volume to this session: [`Open`](super::Open) to [`Opened`](super::Opened).
    pub const OPEN: u16 = 0x0104;
    /// [`Access`](super::Access) to a payload of the same length.
    pub const READ: u16 = 0x0110;
    /// [`Access`](super::Access) with a payload of the same length, to nothing.
    pub const WRITE: u16 = 0x0111;
    /// [`Access`](super::Access) with an empty range, to nothing.
    pub const FLUSH: u16 = 0x0112;
    /// [`Access`](super::Access) to nothing.
    pub const DISCARD: u16 = 0x0113;
    /// [`Access`](super::Access) to nothing.
    pub const WRITE_ZEROES: u16 = 0x0114;
    /// Nothing to a payload: JSON, a list of [`Volume`](super::Volume).
    pub const VOLUMES: u16 = 0x0120;
    /// Nothing to a payload: JSON, the agent's inventory.
    pub const INVENTORY: u16 = 0x0121;
    /// A payload, back: as many bytes of it as the answer may have. For measuring the way.
    pub const ECHO: u16 = 0x0122;
}

/// The operations' names, for what counts them.
pub const OPERATIONS: Operations = Operations(&[
    (opcode::READ, "read"),
    (opcode::WRITE, "write"),
    (opcode::FLUSH, "flush"),
    (opcode::DISCARD, "discard"),
    (opcode::WRITE_ZEROES, "write_zeroes"),
    (opcode::RENEW, "renew"),
    (opcode::ACQUIRE, "acquire"),
    (opcode::RELEASE, "release"),
    (opcode::OPEN, "open"),
    (opcode::VOLUMES, "volumes"),
    (opcode::INVENTORY, "inventory"),
    (opcode::ECHO, "echo"),
]);

/// Answers other than success; the body is a [`Refusal`].
pub mod status {
    use super::Status;

    /// The agent serves no volume of this name.
    pub const NO_SUCH_VOLUME: Status = Status(0x0100);
    /// Somebody else holds the lease.
    pub const LEASED: Status = Status(0x0101);
    /// The lease is no longer the asker's.
    pub const FENCED: Status = Status(0x0102);
    /// The volume cannot be served: its file is missing, too short, locked.
    pub const UNFIT: Status = Status(0x0103);
    /// The volume is read-only.
    pub const READ_ONLY: Status = Status(0x0104);
    /// The range is not inside the volume or not aligned.
    pub const OUT_OF_RANGE: Status = Status(0x0105);
    /// No space is left where the volume is stored.
    pub const FULL: Status = Status(0x0106);
    /// The volume does not support the operation.
    pub const UNSUPPORTED: Status = Status(0x0107);
    /// The storage failed; the refusal carries the `errno`.
    pub const IO: Status = Status(0x0108);
    /// The agent is at its limits.
    pub const BUSY: Status = Status(0x0109);
    /// The agent's policy does not allow it to the node that asks.
    pub const FORBIDDEN: Status = Status(0x010A);
}

/// Asks for the lease of a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Acquire {
    /// Which volume.
    pub volume: String,
    /// Who asks: random for each guest's run.
    pub holder: u128,
    /// The epoch that the holder had before, 0 at first. The agent refuses if another epoch is current,
    /// because somebody else may have written since.
    pub expected: u64,
    /// Who asks, for people.
    pub name: String,
}

/// A lease was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Acquired {
    /// Names the lease in every request; grows with each new holder of any volume of the agent.
    pub epoch: u64,
    /// Somebody else may take it when it was not renewed for so long.
    pub ttl: Duration,
}

/// Names a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lease {
    /// Which one.
    pub epoch: u64,
    /// Who holds it.
    pub holder: u128,
}

/// Binds a leased volume to the session that asks: other sessions of the same lease are cut off, and their
/// requests are finished before the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Open {
    /// The lease.
    pub epoch: u64,
    /// Who holds it.
    pub holder: u128,
}

/// A volume is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Opened {
    /// Size and limits.
    pub geometry: Geometry,
    /// Whether this is still the same image; 0 if the agent cannot tell.
    pub identity: u128,
}

/// A range of a leased volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// The lease.
    pub epoch: u64,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// A cleared range's space may be given back.
    pub unmap: bool,
}

/// Why a request was refused.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Refusal {
    /// The storage's error, 0 if it is none.
    pub errno: i32,
    /// [`status::LEASED`]: the lease may be taken after so long if nobody renews it; zero if its holder is
    /// connected.
    pub wait: Duration,
    /// Why, for people.
    pub text: String,
}

/// A volume in the answer to [`opcode::VOLUMES`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    /// Its name.
    pub name: String,
    /// Its size in bytes, if it can be served.
    pub size: Option<u64>,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Whether I/O goes past the agent's page cache.
    pub direct: bool,
    /// Who holds it.
    pub holder: Option<String>,
    /// Its lease's epoch, if it was ever leased.
    pub epoch: Option<u64>,
    /// Why it cannot be served.
    pub problem: Option<String>,
}

impl Acquire {
    /// As bytes. Names that are too long are cut.
    #[must_use]
    pub fn encode(&self) -> Body {
        let mut out = Body::new();
        out.extend(self.holder.to_le_bytes());
        out.extend(self.expected.to_le_bytes());
        put_text(&mut out, &self.volume, MAX_NAME);
        put_text(&mut out, &self.name, MAX_NAME);
        out
    }

    /// From bytes.
    ///
    /// # Errors
    /// They are none of this.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut r = Reader::new(bytes, "acquire request");
        let (holder, expected) = (r.u128()?, r.u64()?);
        let (volume, name) = (r.text(MAX_NAME)?, r.text(MAX_NAME)?);
        r.end(Self { volume, holder, expected, name })
    }
}

impl Acquired {
    /// As bytes.
    #[must_use]
    pub fn encode(&self) -> Body {
        let ttl = u32::try_from(self.ttl.as_millis()).unwrap_or(u32::MAX);
        let mut out = Body::new();
        out.extend(self.epoch.to_le_bytes());
        out.extend(ttl.to_le_bytes());
        out
    }

    /// From bytes.
    ///
    /// # Errors
    /// They are none of this.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut r = Reader::new(bytes, "acquire answer");
        let (epoch, ttl) = (r.u64()?, Duration::from_millis(r.u32()?.into()));
        r.end(Self { epoch, ttl })
    }
}

impl Lease {
    /// As bytes.
    #[must_use]
    pub fn encode(&self) -> Body {
        let mut out = Body::new();
        out.extend(self.epoch.to_le_bytes());
        out.extend(self.holder.to_le_bytes());
        out
    }

    /// From bytes.
    ///
    /// # Errors
    /// They are none of this.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut r = Reader::new(bytes, "lease request");
        let (epoch, holder) = (r.u64()?, r.u128()?);
        r.end(Self { epoch, holder })
    }
}

impl Open {
    /// As bytes.
    #[must_use]
    pub fn encode(&self) -> Body {
        Lease { epoch: self.epoch, holder: self.holder }.encode()
    }

    /// From bytes.
    ///
    /// # Errors
    /// They are none of this.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        Lease::decode(bytes).map(|Lease { epoch, holder }| Self { epoch, holder })
    }
}

const READ_ONLY: u32 = 1;
const DISCARD: u32 = 2;
const WRITE_ZEROES: u32 = 4;

impl Opened {
    /// As bytes.
    #[must_use]
    pub fn encode(&self) -> Body {
        let g = &self.geometry;
        let flags = [(g.read_only, READ_ONLY), (g.discard, DISCARD), (g.write_zeroes, WRITE_ZEROES)];
        let flags: u32 = flags.iter().filter(|(set, _)| *set).map(|(_, flag)| flag).sum();
        let mut out = Body::new();
        out.extend(g.size.to_le_bytes());
        out.extend(g.block_size.to_le_bytes());
        out.extend(flags.to_le_bytes());
        out.extend(self.identity.to_le_bytes());
        out
    }

    /// From bytes.
    ///
    /// # Errors
    /// They are none of this, or no disk can have this geometry.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut r = Reader::new(bytes, "open answer");
        let (size, block_size, flags, identity) = (r.u64()?, r.u32()?, r.u32()?, r.u128()?);
        let fits = (512..=65536).contains(&block_size) && block_size.is_power_of_two();
        if !fits || size == 0 || size % 512 != 0 || size > i64::MAX as u64 || flags >= 8 {
            return Err(r.malformed());
        }
        let geometry = Geometry {
            size,
            block_size,
            read_only: flags & READ_ONLY != 0,
            discard: flags & DISCARD != 0,
            write_zeroes: flags & WRITE_ZEROES != 0,
        };
        r.end(Self { geometry, identity })
    }
}

impl Access {
    /// As bytes: 32 of them.
    #[must_use]
    pub fn encode(&self) -> Body {
        let mut out = Body::new();
        out.extend(self.epoch.to_le_bytes());
        out.extend(self.offset.to_le_bytes());
        out.extend(self.len.to_le_bytes());
        out.extend(u64::from(self.unmap).to_le_bytes());
        out
    }

    /// From bytes. Whether the range fits a volume is for the volume to check.
    ///
    /// # Errors
    /// They are none of this.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut r = Reader::new(bytes, "access request");
        let (epoch, offset, len, flags) = (r.u64()?, r.u64()?, r.u64()?, r.u64()?);
        if flags > 1 {
            return Err(r.malformed());
        }
        r.end(Self { epoch, offset, len, unmap: flags == 1 })
    }
}

impl Refusal {
    /// A refusal that only has a text.
    #[must_use]
    pub fn because(text: impl Into<String>) -> Self {
        Self { text: text.into(), ..Self::default() }
    }

    /// As bytes. A text that is too long is cut.
    #[must_use]
    pub fn encode(&self) -> Body {
        let wait = u32::try_from(self.wait.as_millis()).unwrap_or(u32::MAX);
        let mut out = Body::new();
        out.extend(self.errno.to_le_bytes());
        out.extend(wait.to_le_bytes());
        put_text(&mut out, &self.text, MAX_TEXT);
        out
    }

    /// From bytes.
    ///
    /// # Errors
    /// They are none of this.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut r = Reader::new(bytes, "refusal");
        let errno = i32::from_le_bytes(r.array()?);
        let (wait, text) = (Duration::from_millis(r.u32()?.into()), r.text(MAX_TEXT)?);
        r.end(Self { errno, wait, text })
    }

    /// How a disk's error is told: its status and refusal.
    #[must_use]
    pub fn of(error: &Error) -> (Status, Self) {
        let status = match error {
            Error::OutOfRange { .. } => status::OUT_OF_RANGE,
            Error::ReadOnly => status::READ_ONLY,
            Error::Full => status::FULL,
            Error::Unsupported => status::UNSUPPORTED,
            Error::Fenced(_) => status::FENCED,
            Error::Unreachable(_) | Error::Io(_) => status::IO,
        };
        let (errno, text) = match error {
            Error::Io(e) => (e.raw_os_error().unwrap_or(0), e.to_string()),
            Error::Fenced(text) | Error::Unreachable(text) => (0, text.clone()),
            other => (0, other.to_string()),
        };
        (status, Self { errno, wait: Duration::ZERO, text })
    }

    /// What a status and refusal mean to a disk's user.
    #[must_use]
    pub fn into_error(self, status: Status, access: &Access) -> Error {
        match status {
            status::OUT_OF_RANGE => Error::OutOfRange { offset: access.offset, len: access.len },
            status::READ_ONLY => Error::ReadOnly,
            status::FULL => Error::Full,
            status::UNSUPPORTED => Error::Unsupported,
            status::FENCED => Error::Fenced(self.text),
            status::IO if self.errno > 0 => std::io::Error::from_raw_os_error(self.errno).into(),
            Status(code) => std::io::Error::other(format!("{} (status {code})", self.text)).into(),
        }
    }
}

/// Decodes `data` as every body there is; each that decodes must encode to the same bytes again.
#[doc(hidden)]
pub fn fuzz(data: &[u8]) {
    let again = [
        Acquire::decode(data).ok().map(|v| v.encode()),
        Acquired::decode(data).ok().map(|v| v.encode()),
        Lease::decode(data).ok().map(|v| v.encode()),
        Open::decode(data).ok().map(|v| v.encode()),
        Opened::decode(data).ok().map(|v| v.encode()),
        Access::decode(data).ok().map(|v| v.encode()),
        Refusal::decode(data).ok().map(|v| v.encode()),
    ];
    for bytes in again.into_iter().flatten() {
        assert_eq!(&bytes[..], data, "a body has one encoding");
    }
}

#[cfg(test)]
#[path = "volume_test.rs"]
mod volume_test;
