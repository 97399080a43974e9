//! Guest RAM.
//!
//! Private RAM is anonymous memory: the host may back it with huge pages, which makes a guest's first touch
//! of its memory (most of what a boot waits for) several hundred times rarer. Shared RAM is one memfd: a guest
//! whose pages live elsewhere runs on a mapping that userfaultfd watches, and the handlers of its faults read
//! the file, which never faults. Huge pages are off there.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use devices::GuestMemory;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestRegionMmap};

use super::{Layout, mapping};

/// What guest RAM is to the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// This process's alone.
    Private,
    /// A memfd, whose pages may be elsewhere; see [`fault`](super::fault).
    Shared,
}

/// Guest RAM could not be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No memory file.
    #[error("{0} bytes of guest RAM cannot be had: {1}")]
    Allocate(u64, io::Error),
    /// It cannot be mapped.
    #[error("Guest RAM cannot be mapped: {0}")]
    Map(String),
    /// It cannot be cleared.
    #[error("Guest RAM cannot be cleared: {0}")]
    Clear(io::Error),
}

/// A guest's RAM.
pub struct Ram {
    /// None: private.
    file: Option<File>,
    memory: GuestMemory,
    len: u64,
}

impl Ram {
    /// RAM at the addresses of `layout`, all zeros. Pages are taken from the host when they are touched.
    ///
    /// # Errors
    /// The host lacks memory or address space.
    pub fn new(layout: &Layout, backing: Backing) -> Result<Self, Error> {
        let len = layout.ram().map(|range| range.len).sum();
        let allocate = |error| Error::Allocate(len, error);
        let file = match backing {
            Backing::Private => None,
            Backing::Shared => Some(file(len).map_err(allocate)?),
        };
        let mut offset = 0;
        let mut regions = Vec::new();
        for range in layout.ram() {
            let size = usize::try_from(range.len).map_err(|error| Error::Map(error.to_string()))?;
            let part = match &file {
                Some(file) => Some((file.try_clone().map_err(allocate)?, offset)),
                None => None,
            };
            let mapping = mapping::map(size, part).map_err(allocate)?;
            let region = GuestRegionMmap::new(mapping, GuestAddress(range.base))
                .ok_or_else(|| Error::Map("it wraps around the address space".into()))?;
            regions.push(region);
            offset += range.len;
        }
        let memory = GuestMemory::from_regions(regions).map_err(|error| Error::Map(error.to_string()))?;
        Ok(Self { file, memory, len })
    }

    /// The mapping that the guest and its devices use.
    #[must_use]
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// The file of shared RAM: the view of it that never faults. Where the guest's mapping has a page, the file
    /// has the same.
    #[must_use]
    pub fn file(&self) -> Option<&File> {
        self.file.as_ref()
    }

    /// Makes all of it zeros and gives its pages back to the host, as at power-on.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn clear(&self) -> Result<(), Error> {
        let Some(file) = &self.file else {
            return self
                .memory
                .iter()
                .try_for_each(|region| mapping::drop_pages(region))
                .map_err(Error::Clear);
        };
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(file, flags, 0, self.len as libc::off_t).map_err(|errno| Error::Clear(errno.into()))
    }
}

fn file(len: u64) -> io::Result<File> {
    let fd: OwnedFd = memfd_create(c"guest-ram", MFdFlags::MFD_CLOEXEC)?;
    let file = File::from(fd);
    file.set_len(len)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes as _;

    use super::*;
    use crate::units::Bytes;

    #[test]
    fn ram_holds_what_is_written_until_it_is_cleared() {
        let layout = Layout::new(Bytes(4 << 30), 40).expect("it fits");
        for backing in [Backing::Private, Backing::Shared] {
            holds_until_cleared(&Ram::new(&layout, backing).expect("untouched RAM costs nothing"));
        }
    }

    fn holds_until_cleared(ram: &Ram) {
        let top = GuestAddress((5 << 30) - 8);
        let base = ram.memory().get_host_address(GuestAddress(0)).expect("RAM");
        assert!(base.addr().is_multiple_of(2 << 20), "huge pages fit");
        for at in [GuestAddress(0x1000), top] {
            ram.memory().write_obj(0x1234_u64, at).expect("RAM");
        }
        assert!(ram.memory().write_obj(1_u64, GuestAddress(3 << 30)).is_err(), "the hole is no RAM");
        assert_eq!(ram.memory().read_obj::<u64>(top).expect("RAM"), 0x1234);
        ram.clear().expect("it is cleared");
        assert_eq!(ram.memory().read_obj::<u64>(top).expect("RAM"), 0);
    }
}
