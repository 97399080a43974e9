//! From a descriptor chain to a request that is known to be sound (section 5.2.6).

use vm_memory::GuestAddress;

use super::{RANGE_MAX, REQUEST_MAX, SECTOR, SEG_MAX, feature};
use crate::GuestMemory;
use crate::disk::{Geometry, Operation};
use crate::virtio::{Broken, Chain};

/// What the status byte says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

const RANGE_UNMAP: u32 = 1;

/// What the guest asks for. The data of reads and writes is what is left in the chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// An operation of the disk, at this byte, on this many bytes; in range and aligned to sectors.
    Disk { operation: Operation, offset: u64, len: u64 },
    /// The serial number.
    Id,
}

/// A request with the place of its answer.
#[derive(Debug)]
pub(crate) struct Parsed {
    pub(crate) status: GuestAddress,
    /// The kind of request, for the counters; `None` where it could not be read.
    pub(crate) kind: Option<Operation>,
    pub(crate) wanted: Result<Wanted, Status>,
}

/// Takes header and status off `chain` and checks everything that the guest said.
///
/// # Errors
/// [`Broken::NoAnswer`]: the status byte is missing, read-only or not RAM.
pub(crate) fn parse(
    chain: &mut Chain,
    memory: &GuestMemory,
    geometry: &Geometry,
    features: u64,
) -> Result<Parsed, Broken> {
    let status = chain.take_last_writable(memory).ok_or(Broken::NoAnswer)?;
    let mut header = [0; 16];
    if !chain.take_readable(memory, &mut header) {
        return Ok(Parsed { status, kind: None, wanted: Err(Status::IoError) });
    }
    let [kind, _, low, high] = words(&header);
    let sector = u64::from(high) << 32 | u64::from(low);
    let operation = match kind {
        T_IN => Some(Operation::Read),
        T_OUT => Some(Operation::Write),
        T_FLUSH => Some(Operation::Flush),
        T_DISCARD => Some(Operation::Discard),
        T_WRITE_ZEROES => Some(Operation::WriteZeroes { unmap: false }),
        _ => None,
    };
    let wanted = match operation {
        Some(operation @ (Operation::Read | Operation::Write)) => {
            transfer(chain, geometry, operation, sector)
        }
        Some(operation @ Operation::Flush) => Ok(Wanted::Disk { operation, offset: 0, len: 0 }),
        Some(operation) => range(chain, memory, geometry, features, operation),
        None if kind == T_GET_ID => Ok(Wanted::Id),
        None => Err(Status::Unsupported),
    };
    Ok(Parsed { status, kind: operation, wanted })
}

fn words(bytes: &[u8; 16]) -> [u32; 4] {
    let mut words = [0; 4];
    for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(4)) {
        *word = bytes.iter().rev().fold(0, |word, byte| word << 8 | u32::from(*byte));
    }
    words
}

/// Whether `len` bytes from `sector` on lie on the disk; the byte where they begin.
fn on_disk(geometry: &Geometry, sector: u64, len: u64) -> Option<u64> {
    let offset = sector.checked_mul(SECTOR)?;
    (offset.checked_add(len)? <= geometry.size).then_some(offset)
}

fn transfer(chain: &Chain, geometry: &Geometry, operation: Operation, sector: u64) -> Result<Wanted, Status> {
    let write = operation == Operation::Write;
    let (data, other) =
        if write { (&chain.readable, &chain.writable) } else { (&chain.writable, &chain.readable) };
    let len = if write { chain.readable_len() } else { chain.writable_len() };
    let sound = other.is_empty()
        && data.len() <= SEG_MAX
        && len > 0
        && len <= REQUEST_MAX
        && len.is_multiple_of(SECTOR)
        && !(write && geometry.read_only);
    let offset = on_disk(geometry, sector, len).filter(|_| sound).ok_or(Status::IoError)?;
    Ok(Wanted::Disk { operation, offset, len })
}

/// Discard and write zeroes carry one range: sector, number of sectors, flags.
fn range(
    chain: &mut Chain,
    memory: &GuestMemory,
    geometry: &Geometry,
    features: u64,
    operation: Operation,
) -> Result<Wanted, Status> {
    let discard = operation == Operation::Discard;
    let needed = if discard { feature::DISCARD } else { feature::WRITE_ZEROES };
    if features & needed == 0 {
        return Err(Status::Unsupported);
    }
    let mut range = [0; 16];
    if chain.readable_len() != 16 || !chain.take_readable(memory, &mut range) {
        return Err(Status::IoError);
    }
    let [low, high, sectors, flags] = words(&range);
    if flags & !RANGE_UNMAP != 0 || (discard && flags != 0) {
        return Err(Status::Unsupported);
    }
    let len = u64::from(sectors) * SECTOR;
    let sound = sectors > 0 && sectors <= RANGE_MAX && !geometry.read_only;
    let offset = on_disk(geometry, u64::from(high) << 32 | u64::from(low), len)
        .filter(|_| sound)
        .ok_or(Status::IoError)?;
    let unmap = flags & RANGE_UNMAP != 0;
    let operation = if discard { operation } else { Operation::WriteZeroes { unmap } };
    Ok(Wanted::Disk { operation, offset, len })
}
