//! userfaultfd(2): faults as events, and pages installed, protected and woken for by request.

// The descriptor is had by a system call and used by ioctls on addresses, for which there is no safe form.
#![allow(unsafe_code)]

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use super::PAGE;

/// Features that guest RAM cannot do without: events tell protection from absence, and both work for memory that
/// has a file. Linux 5.19 has them all.
pub(crate) const NEEDED: u64 =
    feature::WRITE_PROTECT | feature::MISSING_SHARED | feature::WRITE_PROTECT_SHARED;

/// Bits of `struct uffdio_api.features`.
pub(crate) mod feature {
    /// Events of write protection.
    pub(crate) const WRITE_PROTECT: u64 = 1 << 0;
    /// Missing pages of shared memory.
    pub(crate) const MISSING_SHARED: u64 = 1 << 5;
    /// Events name the thread.
    pub(crate) const THREAD: u64 = 1 << 8;
    /// Write protection of shared memory.
    pub(crate) const WRITE_PROTECT_SHARED: u64 = 1 << 12;
}

const UFFD_API: u64 = 0xaa;
const UFFD_USER_MODE_ONLY: libc::c_int = 1;
/// `_IO(0xaa, 0x00)`, of `/dev/userfaultfd`.
const USERFAULTFD_IOC_NEW: libc::c_ulong = 0xaa00;
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
const UFFDIO_WAKE: libc::c_ulong = 0x8010_aa02;
const UFFDIO_COPY: libc::c_ulong = 0xc028_aa03;
const UFFDIO_ZEROPAGE: libc::c_ulong = 0xc020_aa04;
const UFFDIO_WRITEPROTECT: libc::c_ulong = 0xc018_aa06;

const REGISTER_MISSING: u64 = 1;
const REGISTER_PROTECTED: u64 = 2;
const COPY_PROTECTED: u64 = 2;
const PROTECT: u64 = 1;
const EVENT_PAGEFAULT: u8 = 0x12;
const FLAG_WRITE: u64 = 1;
const FLAG_PROTECTED: u64 = 2;

#[repr(C)]
#[derive(Default)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Range {
    start: u64,
    len: u64,
}

#[repr(C)]
struct Register {
    range: Range,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct Copy {
    to: u64,
    from: u64,
    len: u64,
    mode: u64,
    copied: i64,
}

#[repr(C)]
struct ZeroPage {
    range: Range,
    mode: u64,
    zeroed: i64,
}

#[repr(C)]
struct WriteProtect {
    range: Range,
    mode: u64,
}

/// `struct uffd_msg` of a page fault.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Message {
    event: u8,
    reserved: [u8; 7],
    flags: u64,
    address: u64,
    thread: u32,
    padding: u32,
}

/// A thread stands still.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    /// Where in this process.
    pub(crate) address: usize,
    /// It wants to write.
    pub(crate) write: bool,
    /// The page is there but protected.
    pub(crate) protected: bool,
    /// The thread's id.
    pub(crate) thread: u32,
}

/// How many events are read at once.
const AT_ONCE: usize = 16;

/// Whose faults a descriptor sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// Faults of the kernel are seen too, as KVM's are.
    Full,
    /// Only those of user mode are: no use for guests.
    UserOnly,
}

/// A descriptor, and whose faults it sees. `UserOnly` if that is all that this process may have.
///
/// # Errors
/// The kernel has no userfaultfd or refuses it.
pub(crate) fn open() -> io::Result<(OwnedFd, Access)> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    match call(flags) {
        Ok(descriptor) => return Ok((descriptor, Access::Full)),
        Err(why) if why.kind() == io::ErrorKind::PermissionDenied => {}
        Err(why) => return Err(why),
    }
    if let Ok(device) = OpenOptions::new().read(true).write(true).open("/dev/userfaultfd") {
        // SAFETY: this ioctl takes flags by value and returns a new descriptor or an error.
        let descriptor = unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, flags) };
        if descriptor >= 0 {
            // SAFETY: it is new, so nobody else owns it.
            return Ok((unsafe { OwnedFd::from_raw_fd(descriptor) }, Access::Full));
        }
    }
    Ok((call(flags | UFFD_USER_MODE_ONLY)?, Access::UserOnly))
}

fn call(flags: libc::c_int) -> io::Result<OwnedFd> {
    // SAFETY: the call takes flags by value and returns a new descriptor or an error.
    let descriptor = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    let Some(descriptor) = i32::try_from(descriptor).ok().filter(|descriptor| *descriptor >= 0) else {
        return Err(io::Error::last_os_error());
    };
    // SAFETY: it is new, so nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// Settles on `features` and returns every feature that the kernel has, asked for or not. Once for each descriptor.
///
/// # Errors
/// `InvalidInput` if the kernel lacks one that was asked for.
pub(crate) fn agree(descriptor: &OwnedFd, features: u64) -> io::Result<u64> {
    let mut api = Api { api: UFFD_API, features, ioctls: 0 };
    // SAFETY: the ioctl reads and writes one uffdio_api, which `api` is, laid out as the kernel's.
    let result = unsafe { libc::ioctl(descriptor.as_raw_fd(), UFFDIO_API, &raw mut api) };
    if result == 0 { Ok(api.features) } else { Err(io::Error::last_os_error()) }
}

/// The faults of some mappings of guest RAM.
pub(in crate::memory) struct Userfault {
    descriptor: OwnedFd,
}

impl Userfault {
    /// A descriptor that sees every fault, with all that is [`NEEDED`].
    pub(in crate::memory) fn new() -> io::Result<Self> {
        let (descriptor, access) = open()?;
        if access == Access::UserOnly {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        agree(&descriptor, NEEDED | feature::THREAD)?;
        Ok(Self { descriptor })
    }

    /// From now on nobody touches a missing page of `[address, address + len)`, or writes to a protected one,
    /// without an event.
    ///
    /// # Safety
    /// The range is a mapping of a memfd that stays until the process ends and holds nothing but guest RAM, which
    /// may be zeros where a page is missing; whoever touches it may wait for ever.
    pub(in crate::memory) unsafe fn register(&self, address: usize, len: usize) -> io::Result<()> {
        let mode = REGISTER_MISSING | REGISTER_PROTECTED;
        let mut register = Register { range: range(address, len), mode, ioctls: 0 };
        self.ask(UFFDIO_REGISTER, &mut register)
    }

    /// Reads the faults that are there, at most a handful, into `faults`; `true` if there may be more.
    pub(in crate::memory) fn read(&self, faults: &mut Vec<Fault>) -> io::Result<bool> {
        let mut messages = [Message::default(); AT_ONCE];
        let (to, len) = (messages.as_mut_ptr().cast(), size_of_val(&messages));
        // SAFETY: the kernel writes whole messages into `messages`, whose every bit pattern is valid.
        let count = unsafe { libc::read(self.descriptor.as_raw_fd(), to, len) };
        let Ok(count) = usize::try_from(count) else {
            let why = io::Error::last_os_error();
            return match why.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(false),
                _ => Err(why),
            };
        };
        let read = messages.iter().take(count / size_of::<Message>());
        faults.extend(read.filter(|message| message.event == EVENT_PAGEFAULT).map(|message| Fault {
            address: message.address as usize,
            write: message.flags & FLAG_WRITE != 0,
            protected: message.flags & FLAG_PROTECTED != 0,
            thread: message.thread,
        }));
        Ok(count == size_of_val(&messages))
    }

    /// Puts a copy of the `len` bytes at `from` into place at `address`, all at once for whoever looks, and wakes
    /// who waits for it.
    ///
    /// # Errors
    /// `AlreadyExists` if a page is there; then those before it are in place.
    ///
    /// # Safety
    /// `from` is readable for `len` bytes.
    pub(in crate::memory) unsafe fn copy(
        &self,
        address: usize,
        from: *const u8,
        len: usize,
        protected: bool,
    ) -> io::Result<()> {
        let mode = if protected { COPY_PROTECTED } else { 0 };
        let mut done = 0;
        while done < len {
            let (to, from) = ((address + done) as u64, from.wrapping_add(done) as u64);
            let mut copy = Copy { to, from, len: (len - done) as u64, mode, copied: 0 };
            let result = self.ask(UFFDIO_COPY, &mut copy);
            done += advance(result, copy.copied)?;
        }
        Ok(())
    }

    /// Puts zeros into place, writable, and wakes who waits for them.
    ///
    /// # Errors
    /// As [`copy`](Self::copy).
    pub(in crate::memory) fn zero(&self, address: usize, len: usize) -> io::Result<()> {
        let mut done = 0;
        while done < len {
            let mut zero = ZeroPage { range: range(address + done, len - done), mode: 0, zeroed: 0 };
            let result = self.ask(UFFDIO_ZEROPAGE, &mut zero);
            done += advance(result, zero.zeroed)?;
        }
        Ok(())
    }

    /// When this returns, nobody can write to the range any more without an event, through this mapping.
    pub(in crate::memory) fn protect(&self, address: usize, len: usize) -> io::Result<()> {
        self.write_protect(address, len, PROTECT)
    }

    /// Lets everybody write to the range again, and wakes who waits for that.
    pub(in crate::memory) fn unprotect(&self, address: usize, len: usize) -> io::Result<()> {
        self.write_protect(address, len, 0)
    }

    fn write_protect(&self, address: usize, len: usize, mode: u64) -> io::Result<()> {
        loop {
            let mut protect = WriteProtect { range: range(address, len), mode };
            match self.ask(UFFDIO_WRITEPROTECT, &mut protect) {
                Err(why) if why.kind() == io::ErrorKind::WouldBlock => {}
                result => return result,
            }
        }
    }

    /// Has everybody who waits for a page of the range try again.
    pub(in crate::memory) fn wake(&self, address: usize, len: usize) -> io::Result<()> {
        self.ask(UFFDIO_WAKE, &mut range(address, len))
    }

    fn ask<T>(&self, request: libc::c_ulong, argument: &mut T) -> io::Result<()> {
        // SAFETY: only called above, with the structure that belongs to the request. What the requests do to
        // memory is restricted to ranges that were registered, where nothing but guest RAM is, which may change
        // at any time.
        let result =
            unsafe { libc::ioctl(self.descriptor.as_raw_fd(), request, std::ptr::from_mut(argument)) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

impl AsRawFd for Userfault {
    fn as_raw_fd(&self) -> RawFd {
        self.descriptor.as_raw_fd()
    }
}

fn range(address: usize, len: usize) -> Range {
    debug_assert!(address.is_multiple_of(PAGE) && len.is_multiple_of(PAGE), "whole pages");
    Range { start: address as u64, len: len as u64 }
}

/// How far a request for several pages came. It stops early while the address space is being changed; the rest
/// is then to be asked for again.
fn advance(result: io::Result<()>, done: i64) -> io::Result<usize> {
    match result {
        Err(why) if why.kind() != io::ErrorKind::WouldBlock => Err(why),
        _ => Ok(usize::try_from(done).unwrap_or(0)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_are_laid_out_as_the_kernels() {
        let size = |request: libc::c_ulong| (request >> 16 & 0x3fff) as usize;
        assert_eq!(size_of::<Api>(), size(UFFDIO_API));
        assert_eq!(size_of::<Register>(), size(UFFDIO_REGISTER));
        assert_eq!(size_of::<Range>(), size(UFFDIO_WAKE));
        assert_eq!(size_of::<Copy>(), size(UFFDIO_COPY));
        assert_eq!(size_of::<ZeroPage>(), size(UFFDIO_ZEROPAGE));
        assert_eq!(size_of::<WriteProtect>(), size(UFFDIO_WRITEPROTECT));
        assert_eq!((size_of::<Message>(), std::mem::offset_of!(Message, flags)), (32, 8));
    }
}
