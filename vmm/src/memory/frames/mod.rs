//! Guest RAM as the engines see it that answer its page faults: cut into pages, pieces and shards, found by address,
//! installed, protected, read and given back by the kernel.
#![allow(unsafe_code)] // Pages are installed from raw memory.

mod geometry;
mod map;
pub(crate) mod userfault;
pub(in crate::memory) mod worker;

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};

use nix::fcntl::{FallocateFlags, fallocate};
use transport::buffer::Buffer;

pub use geometry::{PAGE, Page, Piece, Pieces, Shards};

pub(in crate::memory) use geometry::LEAST;
pub(in crate::memory) use map::Map;
pub(in crate::memory) use userfault::Fault;

use super::Ram;
use crate::units::Bytes;
use userfault::Userfault;

/// Zeros to copy from: enough for a run.
static ZEROS: [u8; 16 * PAGE] = [0; 16 * PAGE];

/// All of a guest's RAM, before anybody has touched it.
pub(in crate::memory) struct Whole {
    file: File,
    pub(in crate::memory) map: Map,
    pub(in crate::memory) pieces: Pieces,
}

impl Whole {
    /// `None` if it is private, or somebody has touched it.
    ///
    /// # Errors
    /// The kernel says nothing of its file.
    pub(in crate::memory) fn new(ram: &Ram) -> io::Result<Option<Self>> {
        let (Some(file), Some(map)) = (ram.file(), Map::new(ram.memory())) else { return Ok(None) };
        let metadata = file.metadata()?;
        let pieces = Pieces::new(Bytes(metadata.len()));
        Ok(if metadata.blocks() > 0 { None } else { Some(Self { file: file.try_clone()?, map, pieces }) })
    }
}

/// Why faults cannot be seen.
#[derive(Debug)]
pub(in crate::memory) enum Unwatched {
    /// No userfaultfd that sees the guest's faults.
    Userfault(io::Error),
    /// Something else is short.
    Start(io::Error),
}

/// The memory behind the pages of a shard. Pages are one shard's, runs of them within a piece.
pub(in crate::memory) struct Frames {
    userfault: Userfault,
    map: Map,
    /// The file of guest RAM.
    memory: File,
    /// `/proc/self/pagemap`.
    mapped: File,
}

impl Frames {
    /// From now on the faults of `shard` are seen here alone. To be called before this process is confined.
    ///
    /// # Errors
    /// There is no userfaultfd that sees the guest's faults ([`Unwatched::Userfault`]), or too few descriptors.
    pub(in crate::memory) fn new(whole: &Whole, shards: &Shards, shard: u32) -> Result<Self, Unwatched> {
        let userfault = Userfault::new().map_err(Unwatched::Userfault)?;
        for piece in shards.of(shard) {
            let pages = shards.pieces().range(piece);
            for (address, len) in whole.map.stretches(Page(pages.start), pages.end - pages.start) {
                // SAFETY: these are regions of guest RAM, which are never unmapped and are a memfd: `Map` took no
                // others. Guest RAM may change at any time, and whoever touches it is told that it may wait.
                unsafe { userfault.register(address, len) }.map_err(Unwatched::Userfault)?;
            }
        }
        let memory = whole.file.try_clone().map_err(Unwatched::Start)?;
        let mapped = File::open("/proc/self/pagemap").map_err(Unwatched::Start)?;
        Ok(Self { userfault, map: whole.map.clone(), memory, mapped })
    }

    /// As [`Userfault::read`].
    pub(in crate::memory) fn faults(&self, faults: &mut Vec<Fault>) -> io::Result<bool> {
        self.userfault.read(faults)
    }

    /// The page at an address of this process.
    pub(in crate::memory) fn page(&self, address: usize) -> Option<Page> {
        self.map.page(address)
    }

    /// Installs zeros.
    pub(in crate::memory) fn zero(&self, first: Page, count: u64, protected: bool) -> io::Result<()> {
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
    pub(in crate::memory) fn install(
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
    pub(in crate::memory) fn wake(&self, first: Page, count: u64) -> io::Result<()> {
        self.each(first, count, |address, len| self.userfault.wake(address, len))
    }

    /// When this returns, nobody can write to the pages without an event.
    pub(in crate::memory) fn protect(&self, first: Page, count: u64) -> io::Result<()> {
        self.each(first, count, |address, len| self.userfault.protect(address, len))
    }

    /// Lets everybody write to the pages, and wakes who waits for that.
    pub(in crate::memory) fn unprotect(&self, first: Page, count: u64) -> io::Result<()> {
        self.each(first, count, |address, len| self.userfault.unprotect(address, len))
    }

    /// What is in the pages, which must be in memory: reading one that is not would give zeros.
    pub(in crate::memory) fn read(&self, first: Page, count: u64) -> io::Result<Vec<u8>> {
        let mut content = vec![0; count as usize * PAGE];
        self.memory.read_exact_at(&mut content, first.offset())?;
        Ok(content)
    }

    /// Which of at most 64 pages were touched since they were last looked at: bit 0 is the first. They are mapped
    /// when they are touched, and unmapped here; their content and protection stay.
    pub(in crate::memory) fn look(&self, first: Page, count: usize) -> u64 {
        let mut bits = 0;
        let mut done = 0;
        for (address, len) in self.map.stretches(first, count.min(64) as u64) {
            let mut entries = [0_u8; 64 * 8];
            let Some(entries) = entries.get_mut(..len / PAGE * 8) else { break };
            if self.mapped.read_exact_at(entries, (address / PAGE * 8) as u64).is_err() {
                break;
            }
            let entries =
                entries.chunks_exact(8).map(|entry| entry.last().is_some_and(|high| high & 0x80 != 0));
            let here = entries.enumerate().fold(0, |bits, (at, mapped)| bits | u64::from(mapped) << at);
            if here != 0 {
                let (low, high) = (here.trailing_zeros() as usize, 64 - here.leading_zeros() as usize);
                self.unmap(address + low * PAGE, (high - low) * PAGE);
            }
            bits |= here << done;
            done += len / PAGE;
        }
        bits
    }

    /// Takes a range of the guest's mapping out of it. If that fails, pages there count as touched.
    fn unmap(&self, address: usize, len: usize) {
        // SAFETY: `Map` names mappings of the memory's file only, where this takes nothing but page table entries
        // away: whoever touches a page finds it in the file again.
        unsafe { libc::madvise(address as *mut libc::c_void, len, libc::MADV_DONTNEED) };
    }

    /// Takes the pages out of memory, in every mapping.
    pub(in crate::memory) fn punch(&self, first: Page, count: u64) -> io::Result<()> {
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
