//! The few questions to the kernel that neither `std` nor `nix` asks.
#![allow(unsafe_code)] // statx and two ioctls, each on a descriptor that the caller holds open

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;

nix::ioctl_read_bad!(blksszget, libc::BLKSSZGET, libc::c_int);

/// What `O_DIRECT` asks of memory and of offsets, in bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Alignment {
    pub(super) memory: usize,
    pub(super) offset: usize,
}

/// The logical block size of a block device.
pub(super) fn logical_block(file: &File) -> io::Result<u32> {
    let mut size = 0;
    // SAFETY: the descriptor is open and `size` is the integer that the ioctl writes.
    unsafe { blksszget(file.as_raw_fd(), &raw mut size) }?;
    u32::try_from(size).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

/// What the file asks of `O_DIRECT` operations, if the kernel says (Linux 6.1 and newer, some file systems).
pub(super) fn direct_alignment(file: &File) -> Option<Alignment> {
    const EMPTY: &CStr = c"";
    let mut answer = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the descriptor is open, the path is a C string and `answer` has the size of a statx.
    let rc = unsafe {
        libc::statx(
            file.as_raw_fd(),
            EMPTY.as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            answer.as_mut_ptr(),
        )
    };
    if rc != 0 {
        return None;
    }
    // SAFETY: all bits zero is a valid statx, and the kernel only wrote plain numbers into it.
    let answer = unsafe { answer.assume_init() };
    let (memory, offset) = (answer.stx_dio_mem_align as usize, answer.stx_dio_offset_align as usize);
    let known = answer.stx_mask & libc::STATX_DIOALIGN != 0;
    (known && memory.is_power_of_two() && offset.is_power_of_two()).then_some(Alignment { memory, offset })
}
