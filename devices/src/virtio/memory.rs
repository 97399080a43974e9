//! Where guest addresses become memory that the kernel may read and write.
#![allow(unsafe_code)] // buffers over guest memory are raw pointers; this is where they are made

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use smallvec::SmallVec;
use transport::buffer::Buffer;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use super::Segment;
use crate::GuestMemory;

/// A buffer over guest memory, without a copy; `None` if a segment is not all RAM.
pub(crate) fn buffer(memory: &Arc<GuestMemory>, segments: &[Segment]) -> Option<Buffer> {
    let mut iovecs: SmallVec<[libc::iovec; 8]> = SmallVec::new();
    for segment in segments {
        let (mut address, mut left) = (segment.address, u64::from(segment.len));
        while left > 0 {
            // A segment may lie across regions that follow each other.
            let (region, at) = memory.to_region_addr(address)?;
            let here = left.min(region.len().checked_sub(at.0)?);
            let base = region.get_host_address(MemoryRegionAddress(at.0)).ok()?;
            iovecs.push(libc::iovec { iov_base: base.cast(), iov_len: here as usize });
            left -= here;
            address.0 = address.0.checked_add(here)?;
        }
    }
    // SAFETY: each range lies inside a mapped, writable region of `memory`, which the buffer keeps.
    Some(unsafe { Buffer::from_iovecs(memory.clone(), &iovecs) })
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
