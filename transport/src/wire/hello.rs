//! The hello: what both sides send first. Its preface is the same in every version for ever.

use super::{Fault, OLDEST_VERSION, VERSION, printable};

/// Length of the preface in bytes.
pub(crate) const PREFACE: usize = 16;

/// Longest hello after the preface in bytes, in any version.
pub(crate) const HELLO_MOST: usize = 512;

/// Length of a hello after the preface in bytes, without the name.
const FIXED: usize = 88;

const MAGIC: [u8; 8] = *b"omega\r\n\x1a";

/// The part of a hello that every version understands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Preface {
    /// The oldest version that the sender speaks.
    pub(crate) oldest: u16,
    /// The newest one. The answering side sends the one it chose in both fields.
    pub(crate) newest: u16,
    /// Bytes that follow.
    pub(crate) len: u16,
}

impl Preface {
    /// The preface of this program before `len` bytes.
    pub(crate) fn ours(len: usize) -> Self {
        Self { oldest: OLDEST_VERSION, newest: VERSION, len: len as u16 }
    }

    /// The preface of an answering side that chose `version`.
    pub(crate) fn chosen(version: u16, len: usize) -> Self {
        Self { oldest: version, newest: version, len: len as u16 }
    }

    /// The newest version that its sender and this program speak.
    pub(crate) fn common(&self) -> u16 {
        self.newest.min(VERSION)
    }

    /// The bytes on the wire.
    pub(crate) fn encode(&self) -> [u8; PREFACE] {
        let mut bytes = [0; PREFACE];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..10].copy_from_slice(&self.oldest.to_le_bytes());
        bytes[10..12].copy_from_slice(&self.newest.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.len.to_le_bytes());
        bytes
    }

    /// Whether `bytes` may be how a preface begins.
    ///
    /// # Errors
    /// They are not.
    pub(crate) fn begins(bytes: &[u8]) -> Result<(), Fault> {
        match bytes {
            // A record of TLS: of a type, version 3.x.
            [20..=23] => Ok(()),
            [20..=23, 3, ..] => Err(Fault::TlsPeer),
            _ if MAGIC.iter().zip(bytes).all(|(ours, theirs)| ours == theirs) => Ok(()),
            _ => Err(Fault::NotOmega),
        }
    }

    /// Reads and checks a preface.
    ///
    /// # Errors
    /// It is none, or the versions have nothing in common with ours.
    pub(crate) fn decode(bytes: &[u8; PREFACE]) -> Result<Self, Fault> {
        let [magic @ .., o0, o1, n0, n1, l0, l1, _, _] = *bytes;
        if magic != MAGIC {
            return Err(Fault::NotOmega);
        }
        let oldest = u16::from_le_bytes([o0, o1]);
        let newest = u16::from_le_bytes([n0, n1]);
        if oldest > VERSION || newest < OLDEST_VERSION || oldest > newest {
            return Err(Fault::Version { oldest, newest });
        }
        let len = u16::from_le_bytes([l0, l1]);
        if usize::from(len) > HELLO_MOST {
            return Err(Fault::Protocol("a hello longer than 512 bytes"));
        }
        Ok(Self { oldest, newest, len })
    }
}

/// Which side of the connection sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Role {
    /// Sends requests.
    Asking = 1,
    /// Answers them.
    Answering = 2,
}

/// A hello of versions 1 and 2.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Hello {
    pub(crate) role: Role,
    /// Answering: the session named by the peer goes on.
    pub(crate) resumed: bool,
    /// Answering: requests without an answer that the peer may have at once.
    pub(crate) requests: u32,
    /// Answering: payload and expected answer bytes of these.
    pub(crate) bytes: u64,
    /// Answering: `once` requests that the peer may have unconfirmed.
    pub(crate) window: u32,
    /// Asking: it pings after so much silence, in milliseconds.
    pub(crate) keepalive_ms: u32,
    /// Which of its lives the session is in. Asking: the one to resume, 0 for none.
    pub(crate) serial: u64,
    pub(crate) session: u128,
    pub(crate) instance: u128,
    pub(crate) boot: u128,
    pub(crate) name: String,
}

impl Hello {
    /// The bytes on the wire, with the preface: that of the asking side names all versions that it speaks,
    /// that of the answering side `version`, which it chose.
    pub(crate) fn encode(&self, version: u16) -> Vec<u8> {
        let name = &self.name.as_bytes()[..self.name.len().min(64)];
        let mut bytes = Vec::with_capacity(PREFACE + FIXED + name.len());
        let len = FIXED + name.len();
        let preface = match self.role {
            Role::Asking => Preface::ours(len),
            Role::Answering => Preface::chosen(version, len),
        };
        bytes.extend_from_slice(&preface.encode());
        bytes.push(self.role as u8);
        bytes.push(u8::from(self.resumed));
        bytes.extend_from_slice(&(name.len() as u16).to_le_bytes());
        bytes.extend_from_slice(&self.requests.to_le_bytes());
        bytes.extend_from_slice(&self.bytes.to_le_bytes());
        bytes.extend_from_slice(&self.window.to_le_bytes());
        bytes.extend_from_slice(&self.keepalive_ms.to_le_bytes());
        bytes.extend_from_slice(&self.serial.to_le_bytes());
        bytes.extend_from_slice(&[0; 8]);
        bytes.extend_from_slice(&self.session.to_le_bytes());
        bytes.extend_from_slice(&self.instance.to_le_bytes());
        bytes.extend_from_slice(&self.boot.to_le_bytes());
        bytes.extend_from_slice(name);
        bytes
    }

    /// Reads what follows the preface. Bytes after the name are for later versions and skipped.
    ///
    /// # Errors
    /// It is too short or a field makes no sense.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, Fault> {
        let mut fields = Fields(bytes);
        let [role, resumed] = fields.take()?;
        let role = match role {
            1 => Role::Asking,
            2 => Role::Answering,
            _ => return Err(Fault::Protocol("a hello of an unknown role")),
        };
        let name_len = usize::from(u16::from_le_bytes(fields.take()?));
        let requests = u32::from_le_bytes(fields.take()?);
        let granted = u64::from_le_bytes(fields.take()?);
        let window = u32::from_le_bytes(fields.take()?);
        let keepalive_ms = u32::from_le_bytes(fields.take()?);
        let serial = u64::from_le_bytes(fields.take()?);
        let _: [u8; 8] = fields.take()?;
        let session = u128::from_le_bytes(fields.take()?);
        let instance = u128::from_le_bytes(fields.take()?);
        let boot = u128::from_le_bytes(fields.take()?);
        let name = fields.0.get(..name_len).filter(|n| n.len() <= 64);
        let name = printable(name.ok_or(Fault::Protocol("a hello with a name of a wrong length"))?);
        Ok(Self {
            role,
            resumed: resumed & 1 != 0,
            requests,
            bytes: granted,
            window,
            keepalive_ms,
            serial,
            session,
            instance,
            boot,
            name,
        })
    }
}

/// Takes fixed fields off the front of a slice.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], Fault> {
        let (field, rest) = self.0.split_first_chunk().ok_or(Fault::Protocol("a hello that is too short"))?;
        self.0 = rest;
        Ok(*field)
    }
}
