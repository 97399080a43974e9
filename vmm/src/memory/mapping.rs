//! Mappings of guest RAM, which huge pages fit into where it is private.
#![allow(unsafe_code)] // Places mappings at chosen addresses.

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr;

use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, MmapRegion};

/// The size of a huge page on x86-64.
const HUGE: usize = 2 << 20;
const READ_WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;

/// Maps `len` bytes of zeros, or of `file` from an offset on, at an address that is a multiple of a huge
/// page: only then can a huge page of this process be one of the guest too.
///
/// The mapping stays until the process ends: threads of devices may hold it longer than anything else of
/// the machine.
pub(super) fn map(len: usize, file: Option<(File, u64)>) -> io::Result<MmapRegion> {
    let padded = len.checked_add(HUGE).ok_or(io::ErrorKind::InvalidInput)?;
    let reserve = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let start = mmap(ptr::null_mut(), padded, libc::PROT_NONE, reserve, -1, 0)?;
    let skip = start.addr().next_multiple_of(HUGE) - start.addr();
    // `skip` is less than HUGE, so that `len` bytes from there lie in the reservation.
    let address = start.wrapping_byte_add(skip);
    let (flags, fd, offset) = match &file {
        Some((file, offset)) => (libc::MAP_SHARED, file.as_raw_fd(), *offset),
        None => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0),
    };
    let flags = flags | libc::MAP_NORESERVE | libc::MAP_FIXED;
    mmap(address, len, READ_WRITE, flags, fd, offset)?;
    if file.is_some() {
        // SAFETY: advice about a mapping of our own. Where the kernel has no huge pages, none come.
        unsafe { libc::madvise(address, len, libc::MADV_NOHUGEPAGE) };
        return region(address, len, flags, file);
    }
    // Not the first one, of which a starting machine touches a few small pages (start info, ACPI tables): a
    // huge page of zeros there would cost milliseconds before the guest's first instruction.
    let huge = address.wrapping_byte_add(HUGE.min(len));
    // SAFETY: advice about a mapping of our own. Where the kernel has no huge pages, none come.
    unsafe { libc::madvise(huge, len.saturating_sub(HUGE), libc::MADV_HUGEPAGE) };
    region(address, len, flags, file)
}

/// `len` bytes at `address`, which [`map`] has mapped.
fn region(address: *mut c_void, len: usize, flags: i32, file: Option<(File, u64)>) -> io::Result<MmapRegion> {
    // SAFETY: `address` is `len` bytes that were mapped by the only caller just now and are never unmapped.
    let builder = unsafe { MmapRegionBuilder::new(len).with_raw_mmap_pointer(address.cast()) };
    let builder = builder.with_mmap_prot(READ_WRITE).with_mmap_flags(flags & !libc::MAP_FIXED);
    let builder = match file {
        Some((file, offset)) => builder.with_file_offset(FileOffset::new(file, offset)),
        None => builder,
    };
    builder.build().map_err(io::Error::other)
}

/// Makes a mapping of anonymous memory zeros, and gives its pages back to the host.
pub(super) fn drop_pages(region: &MmapRegion) -> io::Result<()> {
    // SAFETY: the range is a live mapping of guest RAM, which is only ever read and written as bytes that
    // the guest may change at any time.
    let result = unsafe { libc::madvise(region.as_ptr().cast(), region.size(), libc::MADV_DONTNEED) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn mmap(at: *mut c_void, len: usize, prot: i32, flags: i32, fd: i32, offset: u64) -> io::Result<*mut c_void> {
    let offset = libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: without MAP_FIXED the kernel takes free addresses; with it, the caller gives a part of a
    // reservation of its own that nothing points into.
    let mapped = unsafe { libc::mmap(at, len, prot, flags, fd, offset) };
    if mapped == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(mapped) }
}
