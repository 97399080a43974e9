//! The bytes on the wire: frame header, hello, limits. Drawn in `docs/wire.md`.

use smallvec::SmallVec;

/// A frame's structured bytes. Up to 64 of them need no allocation.
pub type Body = SmallVec<[u8; 64]>;

/// Longest body of a frame in bytes.
pub const MAX_BODY: usize = 4096;

/// Longest payload of a frame in bytes.
pub const MAX_PAYLOAD: usize = 1 << 20;

/// How urgent a request is. A lower number goes first; frames of one class keep their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Class {
    /// Somebody's CPU stands still until the answer is here: page faults, vCPU exits.
    Urgent = 0,
    /// Disk reads and writes.
    Normal = 1,
    /// Leases, inventory, flushes of state.
    Control = 2,
    /// Copies that nobody waits for.
    Bulk = 3,
}

/// What a request was answered with. 0 is success; the values below 256 belong to the transport, the
/// others to whoever uses it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Status(pub u16);

impl Status {
    /// The request was carried out.
    pub const OK: Self = Self(0);
    /// The peer does not know the operation.
    pub const UNKNOWN_OPERATION: Self = Self(1);
    /// The request's bytes make no sense.
    pub const MALFORMED: Self = Self(2);
    /// The deadline passed before an answer came (made up locally, never sent).
    pub const DEADLINE: Self = Self(3);
    /// The request was cancelled.
    pub const CANCELLED: Self = Self(4);
    /// The peer is stopping and takes no new work.
    pub const STOPPING: Self = Self(5);
}
