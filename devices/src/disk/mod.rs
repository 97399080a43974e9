//! Disks: what a virtio-blk device stands on. Caching, mirroring, delay and fault injection are disks
//! that wrap disks.

pub mod delay;
pub mod fault;
pub mod file;
pub mod memory;
pub mod remote;
pub mod volume;

use std::io;
use std::time::Instant;

use transport::buffer::Buffer;
use transport::ring::{Completion, Ring};

/// Size and limits of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Size in bytes; a multiple of 512.
    pub size: u64,
    /// Smallest unit of a request's offset and length that the disk takes without a read-modify-write;
    /// a power of two, at least 512.
    pub block_size: u32,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Whether [`Operation::Discard`] frees space.
    pub discard: bool,
    /// Whether [`Operation::WriteZeroes`] is done without sending zeros.
    pub write_zeroes: bool,
}

/// What a disk is asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Fill the buffer from `[offset, offset + len)`.
    Read,
    /// Store the buffer at `[offset, offset + len)`. May stay in a volatile cache until a flush.
    Write,
    /// Everything whose completion was reported before this was submitted is on stable storage afterwards.
    Flush,
    /// The content of the range does not matter any more.
    Discard,
    /// The range reads as zeros afterwards.
    WriteZeroes {
        /// Its space may be given back.
        unmap: bool,
    },
}

/// One request.
#[derive(Debug)]
pub struct Request {
    /// Comes back with the completion.
    pub tag: u64,
    /// What to do.
    pub operation: Operation,
    /// Where, in bytes; a multiple of 512. 0 for a flush.
    pub offset: u64,
    /// How much, in bytes; a multiple of 512, and inside the disk: whoever submits has checked it, and
    /// the disk checks again. The buffer's length for reads and writes.
    pub len: u64,
    /// The data; empty for operations without any.
    pub buffer: Buffer,
}

/// A request that is finished.
#[derive(Debug)]
pub struct Done {
    /// The request's tag.
    pub tag: u64,
    /// Whether it was carried out.
    pub result: Result<(), Error>,
    /// The request's buffer, back.
    pub buffer: Buffer,
}

/// A disk could not carry out a request or be opened.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The range is not inside the disk or not aligned.
    #[error("The range at byte {offset}, {len} bytes long, is not inside the disk or not aligned")]
    OutOfRange {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// A write to a disk that is read-only.
    #[error("The disk is read-only")]
    ReadOnly,
    /// No space is left where the disk is stored.
    #[error("No space is left where the disk is stored")]
    Full,
    /// The operation is not supported by this disk.
    #[error("The disk does not support this operation")]
    Unsupported,
    /// The disk's owner took the lease away.
    #[error("The lease was lost: {0}")]
    Fenced(String),
    /// The disk could not be reached for as long as its configuration allows.
    #[error("The disk cannot be reached: {0}")]
    Unreachable(String),
    /// Anything else.
    #[error("The disk failed")]
    Io(#[from] io::Error),
}

/// A disk, driven by one thread and its ring. Requests complete in any order; there is no order between
/// requests in flight, except that of [`Operation::Flush`].
pub trait Disk: Send {
    /// Size and limits. They do not change while the disk is attached.
    fn geometry(&self) -> Geometry;

    /// Prepares to be driven by `ring`. Called on the ring's thread, once, before anything below.
    ///
    /// # Errors
    /// The ring's kernel lacks something that the disk needs.
    fn attach(&mut self, ring: &mut Ring) -> Result<(), Error>;

    /// Takes a request. What can be answered at once goes straight into `done`. Never blocks.
    fn submit(&mut self, ring: &mut Ring, request: Request, done: &mut Vec<Done>);

    /// Looks at a completion of the ring. `false`: it is not this disk's.
    fn complete(&mut self, ring: &mut Ring, completion: Completion, done: &mut Vec<Done>) -> bool;

    /// Does what is due (time-outs, reconnection), and returns when it wants to be called next. Called
    /// before each wait of the ring.
    fn tick(&mut self, ring: &mut Ring, now: Instant, done: &mut Vec<Done>) -> Option<Instant>;

    /// Gives up everything in flight: each request comes back through `done` with an error, and nothing
    /// touches its buffer afterwards. May block until the kernel lets go.
    fn abort(&mut self, ring: &mut Ring, done: &mut Vec<Done>);

    /// Ends the use of the disk, with nothing in flight, and gives back what it holds elsewhere, such as a
    /// lease. May block for a bounded time. Nothing is called afterwards.
    fn close(&mut self, _ring: &mut Ring) {}

    /// One line for people: what and where this disk is, and how it does.
    fn describe(&self) -> String;
}

/// Whether a disk of this geometry takes `request`: every disk asks this before it does anything.
///
/// # Errors
/// [`Error::OutOfRange`], [`Error::ReadOnly`].
pub fn check(geometry: &Geometry, request: &Request) -> Result<(), Error> {
    let Request { operation, offset, len, buffer, .. } = request;
    let (offset, len) = (*offset, *len);
    if *operation == Operation::Flush {
        return Ok(());
    }
    let inside = offset.checked_add(len).is_some_and(|end| end <= geometry.size);
    let moves = matches!(operation, Operation::Read | Operation::Write);
    if !inside || (offset | len) % 512 != 0 || (moves && buffer.len() as u64 != len) {
        return Err(Error::OutOfRange { offset, len });
    }
    if geometry.read_only && *operation != Operation::Read {
        return Err(Error::ReadOnly);
    }
    Ok(())
}
