//! The file in RAM (memfd) behind a lease, and this process's mapping of it.
#![allow(unsafe_code)] // maps a file and hands its memory out as buffers and atomic words

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, LazyLock};

use nix::fcntl::{FallocateFlags, FcntlArg, SealFlag, fallocate, fcntl};
use nix::libc;
use nix::sys::memfd::{MFdFlags, memfd_create};
use transport::buffer::Buffer;

/// Nobody can change the length any more, so no access to the mapping can fail for that.
const SEALS: SealFlag = SealFlag::F_SEAL_SHRINK.union(SealFlag::F_SEAL_GROW).union(SealFlag::F_SEAL_SEAL);

/// Whether this PC makes huge pages of files in RAM that nobody asked for them: a write of one page would take the
/// memory of 512. A page that is there before the write stays as it is, and a fault of this mapping makes small ones.
static HUGE: LazyLock<bool> = LazyLock::new(|| {
    let chosen =
        std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/shmem_enabled").unwrap_or_default();
    ["[always]", "[within_size]", "[force]"].iter().any(|mode| chosen.contains(mode))
});

/// A memfd of fixed length and its mapping, which is not cleared by dropping it: the file goes with its last
/// descriptor, wherever that is.
#[derive(Debug)]
pub(super) struct Mapping {
    file: File,
    base: *mut libc::c_void,
    len: usize,
}

// SAFETY: the pointer is to a shared mapping that lives as long as the value; all access through it is atomic
// (`words`) or by the kernel and raw copies (`buffer`), from whatever thread.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// A new file of `len` bytes, of which none takes memory yet.
    ///
    /// # Errors
    /// The kernel has no memory or descriptors left.
    pub(super) fn create(name: &str, len: u64) -> io::Result<Self> {
        let name = CString::new(name)?;
        let fd = memfd_create(name.as_c_str(), MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
        let file = File::from(fd);
        file.set_len(len)?;
        fcntl(&file, FcntlArg::F_ADD_SEALS(SEALS))?;
        Self::map(file, len)
    }

    /// The file of an earlier process.
    ///
    /// # Errors
    /// It is none that [`create`](Self::create) made, or cannot be mapped.
    pub(super) fn of(fd: OwnedFd) -> io::Result<Self> {
        let file = File::from(fd);
        let seals = fcntl(&file, FcntlArg::F_GET_SEALS)?;
        if !SealFlag::from_bits_retain(seals).contains(SEALS) {
            return Err(io::Error::other("the file's length is not fixed"));
        }
        let len = file.metadata()?.len();
        Self::map(file, len)
    }

    fn map(file: File, len: u64) -> io::Result<Self> {
        let len = usize::try_from(len).map_err(io::Error::other)?;
        let (access, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_NORESERVE);
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing else.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), len, access, flags, file.as_raw_fd(), 0) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let mapping = Self { file, base, len };
        // A huge page would take 512 times what is stored; guests' memory has no place in a core dump. Where the
        // kernel knows none of either, there is nothing to be said.
        for advice in [libc::MADV_NOHUGEPAGE, libc::MADV_DONTDUMP] {
            // SAFETY: the range is the mapping; these advices change nothing that is read from it.
            unsafe { libc::madvise(mapping.base, mapping.len, advice) };
        }
        Ok(mapping)
    }

    /// Has what is stored from now on kept in RAM, once [`settle`](Self::settle) was called for it.
    ///
    /// # Errors
    /// As many bytes may not be locked.
    pub(super) fn lock(&self) -> io::Result<()> {
        // SAFETY: the range is the mapping.
        let done = unsafe { libc::mlock2(self.base, self.len, libc::MLOCK_ONFAULT as libc::c_uint) };
        if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// The file, to be kept by another process.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    pub(super) fn len(&self) -> u64 {
        self.len as u64
    }

    /// The memory that the file takes, in bytes.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub(super) fn taken(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.blocks() * 512)
    }

    /// Where the range is in this process.
    ///
    /// # Panics
    /// It does not lie in the file: a mistake of the caller's, who has checked what a peer said.
    fn at(&self, offset: u64, len: u64) -> *mut libc::c_void {
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.len as u64), "inside the file");
        self.base.wrapping_byte_add(offset as usize)
    }

    /// `count` numbers at `offset`, a multiple of 8.
    ///
    /// # Panics
    /// They do not lie in the file: a mistake of the caller's.
    pub(super) fn words(&self, offset: u64, count: usize) -> &[AtomicU64] {
        assert!(offset.is_multiple_of(8), "aligned");
        let start = self.at(offset, 8 * count as u64).cast::<AtomicU64>();
        // SAFETY: the range lies in the mapping, which lives as long as `self` and whose file cannot shrink; it is
        // aligned, every value is valid, and these words are only accessed atomically in here.
        unsafe { std::slice::from_raw_parts(start, count) }
    }

    /// `len` bytes at `offset` as an answer's payload. `owner` keeps the mapping.
    ///
    /// # Panics
    /// As [`words`](Self::words).
    pub(super) fn buffer<T: AsRef<Self> + Send + Sync + 'static>(
        owner: Arc<T>,
        offset: u64,
        len: u64,
    ) -> Buffer {
        let iov_base = (*owner).as_ref().at(offset, len);
        let segment = libc::iovec { iov_base, iov_len: len as usize };
        // SAFETY: the range lies in the mapping, which `owner` keeps, and the file cannot shrink.
        unsafe { Buffer::from_iovecs(owner, &[segment]) }
    }

    /// Copies `content` to `offset`. Where no memory may be had (as by the kernel's overcommit limit) this fails; a
    /// fault would kill.
    ///
    /// # Errors
    /// No memory is left. Some of it may have been written.
    pub(super) fn write(&self, offset: u64, content: &Buffer) -> io::Result<()> {
        if *HUGE {
            self.make_small(offset, content.len() as u64);
        }
        let mut done = 0;
        while done < content.len() {
            let left = content.slice(done, content.len() - done).unwrap_or_default();
            let segments = left.iovecs();
            let segments = &segments[..segments.len().min(libc::UIO_MAXIOV as usize)];
            let at = libc::off_t::try_from(offset + done as u64).map_err(io::Error::other)?;
            // SAFETY: the segments are mapped while `content` lives; the kernel copies.
            let written = unsafe {
                libc::pwritev(self.file.as_raw_fd(), segments.as_ptr(), segments.len() as libc::c_int, at)
            };
            match written {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                1.. => done += written as usize,
                _ => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
            }
        }
        Ok(())
    }

    /// Makes the pages of a range, by faults. Where that fails, whoever writes there will see why.
    fn make_small(&self, offset: u64, len: u64) {
        let start = self.at(offset, len);
        // SAFETY: the range lies in the mapping; its pages are only made present.
        unsafe { libc::madvise(start, len as usize, libc::MADV_POPULATE_WRITE) };
    }

    /// Enters what was just written into the page tables, so that a fetch finds it without a fault and the lock
    /// holds it.
    pub(super) fn settle(&self, offset: u64, len: u64) {
        let start = self.at(offset, len);
        // SAFETY: the range lies in the mapping; its pages are only made present.
        let done = unsafe { libc::madvise(start, len as usize, libc::MADV_POPULATE_READ) };
        if done != 0 {
            // Linux before 5.14: by reading a byte of each page.
            for page in (0..len as usize).step_by(super::PAGE as usize) {
                // SAFETY: the byte lies in the mapping; whatever it is, it is not used.
                unsafe { start.wrapping_byte_add(page).cast::<u8>().read_volatile() };
            }
        }
    }

    /// Gives the memory of a range back; it reads as zeros afterwards.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(super) fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        let how = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let (offset, len) = (libc::off_t::try_from(offset), libc::off_t::try_from(len));
        let wrong = |_| io::ErrorKind::InvalidInput;
        Ok(fallocate(&self.file, how, offset.map_err(wrong)?, len.map_err(wrong)?)?)
    }

    /// Takes the memory of a range, so that no access to it can run out of memory.
    ///
    /// # Errors
    /// There is none.
    pub(super) fn reserve(&self, offset: u64, len: u64) -> io::Result<()> {
        if *HUGE {
            self.make_small(offset, len);
        }
        let (offset, len) = (libc::off_t::try_from(offset), libc::off_t::try_from(len));
        let wrong = |_| io::ErrorKind::InvalidInput;
        Ok(fallocate(&self.file, FallocateFlags::empty(), offset.map_err(wrong)?, len.map_err(wrong)?)?)
    }

    /// Writes plain bytes.
    ///
    /// # Errors
    /// No memory is left.
    pub(super) fn write_bytes(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, offset)
    }

    /// Reads plain bytes.
    ///
    /// # Errors
    /// They are not all there.
    pub(super) fn read_bytes(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(bytes, offset)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is this value's mapping; whoever uses it holds this value.
        unsafe { libc::munmap(self.base, self.len) };
    }
}
