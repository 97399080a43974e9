//! The memory behind a handler's pages: installed, protected, read and given back by the kernel.
#![allow(unsafe_code)] // Pages are installed from raw memory.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileExt as _;

use nix::fcntl::{FallocateFlags, fallocate};
use transport::buffer::Buffer;

use super::map::Map;
use super::userfault::{Fault, Userfault};
use super::{PAGE, Page};

/// Zeros to copy from: enough for a run.
static ZEROS: [u8; 16 * PAGE] = [0; 16 * PAGE];

/// See the [module](self). Pages are one shard's, runs of them within a piece.
pub(super) struct Frames {
    userfault: Userfault,
    map: Map,
    /// The file of guest RAM.
    memory: File,
}

impl Frames {
    pub(super) fn new(userfault: Userfault, map: Map, memory: File) -> Self {
        Self { userfault, map, memory }
    }

    /// As [`Userfault::read`].
    pub(super) fn faults(&self, faults: &mut Vec<Fault>) -> io::Result<bool> {
        self.userfault.read(faults)
    }

    /// The page at an address of this process.
    pub(super) fn page(&self, address: usize) -> Option<Page> {
        self.map.page(address)
    }

    /// Installs zeros.
    pub(super) fn zero(&self, first: Page, count: u64, protected: bool) -> io::Result<()> {
        self.each(first, count, |address, len| {
            if !protected {
                return self.userfault.zero(address, len);
            }
            for at in (0..len).step_by(ZEROS.len()) {
                // SAFETY: as many zeros as are copied lie there.
                unsafe {
                    self.userfault.copy(address + at, ZEROS.as_ptr(), ZEROS.len().min(len - at), true)
                }?;
            }
            Ok(())
        })
    }

    /// Installs `content`, as many bytes as the pages have.
    pub(super) fn install(
        &self,
        first: Page,
        count: u64,
        content: &Buffer,
        protected: bool,
    ) -> io::Result<()> {
        let mut done = 0;
        self.each(first, count, |address, len| {
            let part = content.slice(done, len).ok_or(io::ErrorKind::InvalidInput)?;
            done += len;
            if let [whole] = part.iovecs() {
                // SAFETY: `part` keeps the segment, which is as long as it, mapped.
                return unsafe { self.userfault.copy(address, whole.iov_base.cast(), len, protected) };
            }
            let bytes = part.to_vec();
            // SAFETY: `bytes` is as long as `part`.
            unsafe { self.userfault.copy(address, bytes.as_ptr(), len, protected) }
        })
    }

    /// Has whoever waits for one of the pages try again.
    pub(super) fn wake(&self, first: Page, count: u64) -> io::Result<()> {
        self.each(first, count, |address, len| self.userfault.wake(address, len))
    }

    /// When this returns, nobody can write to the pages without an event.
    pub(super) fn protect(&self, first: Page, count: u64) -> io::Result<()> {
        self.each(first, count, |address, len| self.userfault.protect(address, len))
    }

    /// Lets everybody write to the pages, and wakes who waits for that.
    pub(super) fn unprotect(&self, first: Page, count: u64) -> io::Result<()> {
        self.each(first, count, |address, len| self.userfault.unprotect(address, len))
    }

    /// What is in the pages, which must be in memory: reading one that is not would give zeros.
    pub(super) fn read(&self, first: Page, count: u64) -> io::Result<Vec<u8>> {
        let mut content = vec![0; count as usize * PAGE];
        self.memory.read_exact_at(&mut content, first.offset())?;
        Ok(content)
    }

    /// Takes the pages out of memory, in every mapping.
    pub(super) fn punch(&self, first: Page, count: u64) -> io::Result<()> {
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let len = count * PAGE as u64;
        loop {
            match fallocate(&self.memory, flags, first.offset() as libc::off_t, len as libc::off_t) {
                Err(nix::errno::Errno::EINTR) => {}
                result => return Ok(result?),
            }
        }
    }

    fn each(
        &self,
        first: Page,
        count: u64,
        mut act: impl FnMut(usize, usize) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut whole = 0;
        for (address, len) in self.map.stretches(first, count) {
            act(address, len)?;
            whole += len;
        }
        if whole == count as usize * PAGE { Ok(()) } else { Err(io::ErrorKind::InvalidInput.into()) }
    }
}

impl AsRawFd for Frames {
    /// The userfaultfd's.
    fn as_raw_fd(&self) -> RawFd {
        self.userfault.as_raw_fd()
    }
}
