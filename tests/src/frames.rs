//! What the lab and the runner in a PC say to each other over a virtio-serial port.
//!
//! ```text
//!  0        4        8     9
//!  ┌────────┬────────┬─────┬───────────────┐
//!  │ length │ id     │kind │ length bytes  │     little endian; at most 64 KiB of payload
//!  └────────┴────────┴─────┴───────────────┘
//! ```
//! The lab chooses an id for each command that it starts; every frame about that command carries it.

use std::io::{self, Read, Write};

/// The most that one frame carries.
pub const MAX_PAYLOAD: usize = 64 << 10;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Both ways: "are you there"; the payload comes back.
    Hello = 0,
    /// To the PC: run this shell command.
    Exec = 1,
    /// To the PC: more standard input; empty means its end.
    Stdin = 2,
    /// To the PC: send this signal (i32) to the command and its children.
    Signal = 3,
    /// To the PC: random bytes for the kernel, so that PCs from one snapshot differ.
    Mix = 4,
    /// From the PC: standard output.
    Stdout = 16,
    /// From the PC: standard error.
    Stderr = 17,
    /// From the PC: it ended; the payload is an i32: exit code, or minus the signal.
    Exit = 18,
    /// From the PC: it could not be started; the payload says why.
    Failed = 19,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Self> {
        [
            Self::Hello,
            Self::Exec,
            Self::Stdin,
            Self::Signal,
            Self::Mix,
            Self::Stdout,
            Self::Stderr,
            Self::Exit,
            Self::Failed,
        ]
        .into_iter()
        .find(|kind| *kind as u8 == byte)
    }
}

/// One message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Which command it is about.
    pub id: u32,
    /// What it is.
    pub kind: Kind,
    /// Its content.
    pub payload: Vec<u8>,
}

impl Frame {
    /// A frame from its parts.
    pub fn new(id: u32, kind: Kind, payload: impl Into<Vec<u8>>) -> Self {
        Self { id, kind, payload: payload.into() }
    }

    /// The payload as a number (exit code, signal).
    pub fn number(&self) -> i32 {
        self.payload.get(..4).and_then(|b| b.try_into().ok()).map_or(0, i32::from_le_bytes)
    }

    /// Writes it in one piece.
    pub fn write(&self, to: &mut impl Write) -> io::Result<()> {
        let length = u32::try_from(self.payload.len()).map_err(io::Error::other)?;
        let mut bytes = Vec::with_capacity(9 + self.payload.len());
        bytes.extend_from_slice(&length.to_le_bytes());
        bytes.extend_from_slice(&self.id.to_le_bytes());
        bytes.push(self.kind as u8);
        bytes.extend_from_slice(&self.payload);
        to.write_all(&bytes)?;
        to.flush()
    }

    /// Reads the next one.
    pub fn read(from: &mut impl Read) -> io::Result<Self> {
        let mut head = [0u8; 9];
        from.read_exact(&mut head)?;
        let [l0, l1, l2, l3, i0, i1, i2, i3, kind] = head;
        let length = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
        let kind = Kind::from_byte(kind).filter(|_| length <= MAX_PAYLOAD);
        let kind =
            kind.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "The frame is malformed"))?;
        let mut payload = vec![0; length];
        from.read_exact(&mut payload)?;
        Ok(Self { id: u32::from_le_bytes([i0, i1, i2, i3]), kind, payload })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_comes_back_as_it_was_written() {
        let frame = Frame::new(7, Kind::Stderr, *b"no such file");
        let mut bytes = Vec::new();
        frame.write(&mut bytes).expect("a vector takes all");
        assert_eq!(Frame::read(&mut bytes.as_slice()).expect("whole"), frame);
    }

    #[test]
    fn a_frame_that_claims_too_much_is_refused() {
        let mut bytes = vec![0xff; 4];
        bytes.extend_from_slice(&[0, 0, 0, 0, 1]);
        assert!(Frame::read(&mut bytes.as_slice()).is_err());
    }
}
