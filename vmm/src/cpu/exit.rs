//! Why a vCPU stopped, and what it goes on with.

use std::fmt;

/// One to eight bytes that an access moves.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Data {
    bytes: [u8; 8],
    len: u8,
}

impl Data {
    /// The first `len` bytes of `from` (at most 8), padded with zeros where it is shorter.
    #[must_use]
    pub fn new(from: &[u8], len: usize) -> Self {
        let len = len.min(8);
        let mut bytes = [0; 8];
        let given = from.len().min(len);
        bytes[..given].copy_from_slice(&from[..given]);
        Self { bytes, len: len as u8 }
    }

    /// `len` bytes (at most 8) of zeros, to be filled.
    #[must_use]
    pub fn zeroed(len: usize) -> Self {
        Self::new(&[], len)
    }

    /// The bytes, in guest order.
    #[must_use]
    pub fn as_slice(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }

    /// The bytes, to be filled.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        &mut self.bytes[..usize::from(self.len)]
    }
}

impl fmt::Debug for Data {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02x?}", self.as_slice())
    }
}

/// Why a vCPU stopped running guest code.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VmExit {
    /// It reads `size` bytes (1, 2 or 4) from an I/O port.
    PortRead {
        /// The port.
        port: u16,
        /// How many bytes.
        size: u8,
    },
    /// It writes to an I/O port.
    PortWrite {
        /// The port.
        port: u16,
        /// What it writes.
        data: Data,
    },
    /// It reads `size` bytes (1 to 8) from an address without memory.
    MmioRead {
        /// The guest-physical address.
        address: u64,
        /// How many bytes.
        size: u8,
    },
    /// It writes to an address without memory.
    MmioWrite {
        /// The guest-physical address.
        address: u64,
        /// What it writes.
        data: Data,
    },
    /// It was interrupted by a kick (or for no reason that matters) and has nothing to be answered.
    Interrupted,
    /// It halted and no interrupt controller in the hypervisor will wake it.
    Halted,
    /// A triple fault: the processor shut down.
    TripleFault,
    /// It cannot go on; why, in words.
    Failed(String),
}

/// What a vCPU goes on with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VmEntry {
    /// Nothing: the last exit needed no answer.
    Continue,
    /// The answer to a read.
    Read(Data),
}
