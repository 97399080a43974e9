//! The frame header.

use super::{Class, Fault, MAX_BODY, MAX_PAYLOAD};

/// Length of a frame header in bytes.
pub(crate) const HEADER: usize = 32;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    /// Something is asked.
    Request = 1,
    /// A request is answered.
    Reply = 2,
    /// The asking side no longer waits for an answer.
    Cancel = 3,
    /// Are you there?
    Ping = 4,
    /// Yes.
    Pong = 5,
    /// The connection ends; the body says why.
    Goodbye = 6,
    /// Version 2: the asking side offers to move to RDMA; the body says where it can be reached.
    Offer = 7,
    /// Version 2: the answer to an offer. Code 0 and parameters, or why not.
    Accept = 8,
    /// Version 2: everything that the sender sends after this frame goes over RDMA.
    Switch = 9,
}

impl Kind {
    /// The first version of the format that has it.
    pub(crate) fn since(self) -> u16 {
        match self {
            Self::Request | Self::Reply | Self::Cancel | Self::Ping | Self::Pong | Self::Goodbye => 1,
            Self::Offer | Self::Accept | Self::Switch => super::RDMA_SINCE,
        }
    }
}

/// Bits of [`Header::flags`].
pub(crate) struct Flags;

impl Flags {
    /// On a request: it must not be carried out twice.
    pub(crate) const ONCE: u16 = 1;
    /// On a goodbye: the session is over and need not be kept.
    pub(crate) const FORGET: u16 = 2;
}

/// A frame's first 32 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) kind: Kind,
    pub(crate) class: Class,
    /// Opcode of a request, status of a reply.
    pub(crate) code: u16,
    pub(crate) flags: u16,
    pub(crate) body_len: u16,
    pub(crate) payload_len: u32,
    /// On a request: the longest payload that its reply may have.
    pub(crate) answer_len: u32,
    /// The request that this is about.
    pub(crate) id: u64,
    /// From the asking side: every `once` request with a lower id has its answer.
    pub(crate) acked: u64,
}

impl Header {
    /// A header of `kind` with nothing else set.
    pub(crate) fn new(kind: Kind) -> Self {
        Self {
            kind,
            class: Class::Urgent,
            code: 0,
            flags: 0,
            body_len: 0,
            payload_len: 0,
            answer_len: 0,
            id: 0,
            acked: 0,
        }
    }

    /// How many bytes the whole frame has.
    pub(crate) fn frame_len(&self) -> usize {
        HEADER + usize::from(self.body_len) + self.payload_len as usize
    }

    /// The bytes on the wire.
    pub(crate) fn encode(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[0] = self.kind as u8;
        bytes[1] = self.class as u8;
        bytes[2..4].copy_from_slice(&self.code.to_le_bytes());
        bytes[4..6].copy_from_slice(&self.flags.to_le_bytes());
        bytes[6..8].copy_from_slice(&self.body_len.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.payload_len.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.answer_len.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.id.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.acked.to_le_bytes());
        bytes
    }

    /// Reads and checks a header.
    ///
    /// # Errors
    /// A field has a value that no version knows, or one that its kind does not allow.
    pub(crate) fn decode(bytes: &[u8; HEADER]) -> Result<Self, Fault> {
        let [kind, class, c0, c1, f0, f1, b0, b1, p0, p1, p2, p3, a0, a1, a2, a3, ids @ ..] = *bytes;
        let kind = match kind {
            1 => Kind::Request,
            2 => Kind::Reply,
            3 => Kind::Cancel,
            4 => Kind::Ping,
            5 => Kind::Pong,
            6 => Kind::Goodbye,
            7 => Kind::Offer,
            8 => Kind::Accept,
            9 => Kind::Switch,
            _ => return Err(Fault::Protocol("a frame of an unknown kind")),
        };
        let class = match class {
            0 => Class::Urgent,
            1 => Class::Normal,
            2 => Class::Control,
            3 => Class::Bulk,
            _ => return Err(Fault::Protocol("a frame of an unknown class")),
        };
        let [i0, i1, i2, i3, i4, i5, i6, i7, k0, k1, k2, k3, k4, k5, k6, k7] = ids;
        let header = Self {
            kind,
            class,
            code: u16::from_le_bytes([c0, c1]),
            flags: u16::from_le_bytes([f0, f1]),
            body_len: u16::from_le_bytes([b0, b1]),
            payload_len: u32::from_le_bytes([p0, p1, p2, p3]),
            answer_len: u32::from_le_bytes([a0, a1, a2, a3]),
            id: u64::from_le_bytes([i0, i1, i2, i3, i4, i5, i6, i7]),
            acked: u64::from_le_bytes([k0, k1, k2, k3, k4, k5, k6, k7]),
        };
        header.check()?;
        Ok(header)
    }

    fn check(&self) -> Result<(), Fault> {
        let known = match self.kind {
            Kind::Request => Flags::ONCE,
            Kind::Goodbye => Flags::FORGET,
            _ => 0,
        };
        if self.flags & !known != 0 {
            return Err(Fault::Protocol("a frame with unknown flags"));
        }
        if usize::from(self.body_len) > MAX_BODY {
            return Err(Fault::Protocol("a body longer than 4096 bytes"));
        }
        if self.payload_len as usize > MAX_PAYLOAD || self.answer_len as usize > MAX_PAYLOAD {
            return Err(Fault::Protocol("a payload longer than 1 MiB"));
        }
        let carries = matches!(self.kind, Kind::Request | Kind::Reply);
        if self.payload_len != 0 && !carries {
            return Err(Fault::Protocol("a payload on a frame that has none"));
        }
        if self.answer_len != 0 && (self.kind != Kind::Request || self.flags & Flags::ONCE != 0) {
            return Err(Fault::Protocol("an answer length on a frame that has none"));
        }
        let says = matches!(self.kind, Kind::Goodbye | Kind::Offer | Kind::Accept);
        if self.body_len != 0 && !carries && !says {
            return Err(Fault::Protocol("a body on a frame that has none"));
        }
        Ok(())
    }
}
