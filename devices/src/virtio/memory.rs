//! Where guest addresses become memory that the kernel may read and write.
#![allow(unsafe_code)] // buffers over guest memory are raw pointers; this is where they are made

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use nix::fcntl::{FallocateFlags, fallocate};
use smallvec::SmallVec;
use transport::buffer::Buffer;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::Segment;
use crate::GuestMemory;

/// The page of the balloon's and this PC's: 4 KiB.
pub(crate) const PAGE: u64 = 4096;

/// A buffer over guest memory, without a copy; `None` if a segment is not all RAM.
pub(crate) fn buffer(memory: &Arc<GuestMemory>, segments: &[Segment]) -> Option<Buffer> {
    let mut iovecs: SmallVec<[libc::iovec; 8]> = SmallVec::new();
    for segment in segments {
        let (mut address, mut left) = (segment.address, u64::from(segment.len));
        while left > 0 {
            // A segment may lie across regions that follow each other.
            let (region, at) = memory.to_region_addr(address)?;
            let here = left.min(region.len().checked_sub(at.0)?);
            let base = region.get_host_address(at).ok()?;
            iovecs.push(libc::iovec { iov_base: base.cast(), iov_len: here as usize });
            left -= here;
            address.0 = address.0.checked_add(here)?;
        }
    }
    // SAFETY: each range lies inside a mapped, writable region of `memory`, which the buffer keeps.
    Some(unsafe { Buffer::from_iovecs(memory.clone(), &iovecs) })
}

/// Gives the pages of `[address, address + len)` back to this PC: they read as zeros afterwards. A hole is
/// punched into memory that has a file (a memfd), which frees it in every mapping; anonymous memory is
/// dropped. Both ends must be page-aligned and in one region, otherwise nothing happens. Returns how many
/// bytes were given back.
pub(crate) fn release(memory: &GuestMemory, address: GuestAddress, len: u64) -> io::Result<u64> {
    let Some((region, at)) = memory.to_region_addr(address) else { return Ok(0) };
    let aligned = address.0.is_multiple_of(PAGE) && len.is_multiple_of(PAGE);
    if len == 0 || !aligned || len > region.len() - at.0 {
        return Ok(0);
    }
    if let Some(file) = region.file_offset() {
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let offset = file.start() + at.0;
        fallocate(file.file(), flags, offset as libc::off_t, len as libc::off_t)?;
        return Ok(len);
    }
    let base = region.get_host_address(at).map_err(io::Error::other)?;
    // SAFETY: the range lies inside the region's mapping. Its memory is only ever read and written as
    // bytes that the guest may change at any time, so bytes that turn to zero break nothing.
    let result = unsafe { libc::madvise(base.cast(), len as usize, libc::MADV_DONTNEED) };
    if result == 0 { Ok(len) } else { Err(io::Error::last_os_error()) }
}

/// Reads from `fd` into `buffer`.
pub(crate) fn readv(fd: BorrowedFd<'_>, buffer: &Buffer) -> io::Result<usize> {
    let list = buffer.iovecs();
    // SAFETY: the buffer keeps its segments mapped during the call, and the list is as long as stated.
    let count = unsafe { libc::readv(fd.as_raw_fd(), list.as_ptr(), list.len() as libc::c_int) };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

/// Writes `buffer` to `fd`.
pub(crate) fn writev(fd: BorrowedFd<'_>, buffer: &Buffer) -> io::Result<usize> {
    let list = buffer.iovecs();
    // SAFETY: as in `readv`; the kernel only reads the segments.
    let count = unsafe { libc::writev(fd.as_raw_fd(), list.as_ptr(), list.len() as libc::c_int) };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}
