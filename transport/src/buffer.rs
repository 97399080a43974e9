//! Memory that an I/O operation reads or writes, owned while the operation is in flight.
#![allow(unsafe_code)] // scatter lists are raw pointers; this module is where they become safe to pass on

use std::any::Any;
use std::sync::Arc;

use smallvec::SmallVec;

/// A scatter list and whatever keeps its memory alive.
///
/// The kernel reads or writes the memory while an operation is in flight; holding the `Buffer` until
/// its completion is what makes that sound, so operations take it by value and hand it back.
/// Several buffers may name the same guest memory, as a guest may post the same page twice: nobody
/// builds references (`&[u8]`) to the memory, it is only copied to and from.
#[derive(Default)]
pub struct Buffer {
    iovecs: SmallVec<[libc::iovec; 4]>,
    len: usize,
    owner: Option<Arc<dyn Any + Send + Sync>>,
    registered: Option<u16>,
    region: Option<Arc<Region>>,
}

/// Memory that stays where it is for long, so that it pays to register it with a device.
pub(crate) struct Region {
    base: usize,
    len: usize,
    /// Keeps it mapped.
    _owner: Option<Arc<dyn Any + Send + Sync>>,
}

impl std::fmt::Debug for Region {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Region({} bytes at {:#x})", self.len, self.base)
    }
}

#[cfg_attr(not(feature = "rdma"), allow(dead_code, reason = "only a device asks, and this build has none"))]
impl Region {
    /// Where it begins.
    pub(crate) fn base(&self) -> usize {
        self.base
    }

    /// Its length in bytes.
    pub(crate) fn len(&self) -> usize {
        self.len
    }
}

// SAFETY: the pointers stay valid wherever `owner` goes, and access through them is by copy only.
unsafe impl Send for Buffer {}

impl Buffer {
    /// A buffer of no bytes.
    #[must_use]
    pub fn empty() -> Self {
        Self::default()
    }

    /// A zeroed buffer of `len` bytes on the heap, aligned to a page from a page's length on, as `O_DIRECT`
    /// wants it.
    #[must_use]
    pub fn zeroed(len: usize) -> Self {
        if len < PAGE {
            return Self::from_vec(vec![0; len]);
        }
        let pages = vec![Page([0; PAGE]); len.div_ceil(PAGE)].into_boxed_slice();
        let bytes = HeapPages(Box::into_raw(pages));
        let iovec = libc::iovec { iov_base: bytes.0.cast(), iov_len: len };
        let iovecs = SmallVec::from_slice(&[iovec]);
        Self { iovecs, len, owner: Some(Arc::new(bytes)), registered: None, region: None }
    }

    /// The same memory, with `guard` dropped when the last buffer that shares it goes.
    pub(crate) fn guarded<T: Any + Send + Sync>(self, guard: T) -> Self {
        Self { owner: Some(Arc::new((guard, self.owner))), ..self }
    }

    /// All of this buffer's memory, as a region; `None` if it is not one segment.
    pub(crate) fn to_region(&self) -> Option<Arc<Region>> {
        let [whole] = self.iovecs() else { return None };
        Some(Arc::new(Region {
            base: whole.iov_base as usize,
            len: whole.iov_len,
            _owner: self.owner.clone(),
        }))
    }

    /// The same memory, known as a part of `region`.
    pub(crate) fn within(self, region: Arc<Region>) -> Self {
        debug_assert!(
            self.iovecs.iter().all(|v| {
                let from = (v.iov_base as usize).checked_sub(region.base);
                from.is_some_and(|from| from + v.iov_len <= region.len)
            }),
            "the buffer lies in its region"
        );
        Self { region: Some(region), ..self }
    }

    /// The region that the memory is a part of, if it is known, and where in this process it begins: then it
    /// is one segment.
    pub(crate) fn region(&self) -> Option<(&Arc<Region>, u64)> {
        let [whole] = self.iovecs() else { return None };
        self.region.as_ref().map(|region| (region, whole.iov_base as u64))
    }

    /// The same memory, known as registered under `index`.
    pub(crate) fn registered_as(self, index: Option<u16>) -> Self {
        Self { registered: index, ..self }
    }

    /// Takes over the bytes of `bytes`.
    #[must_use]
    pub fn from_vec(bytes: Vec<u8>) -> Self {
        let mut bytes = bytes.into_boxed_slice();
        let iovec = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
        let len = bytes.len();
        let iovecs = SmallVec::from_slice(&[iovec]);
        Self {
            iovecs,
            len,
            owner: Some(Arc::new(HeapBytes(Box::into_raw(bytes)))),
            registered: None,
            region: None,
        }
    }

    /// Names memory that `owner` keeps alive.
    ///
    /// # Safety
    /// Every range must be mapped readable and writable, and stay so for as long as `owner` lives.
    #[must_use]
    pub unsafe fn from_iovecs(owner: Arc<dyn Any + Send + Sync>, iovecs: &[libc::iovec]) -> Self {
        let iovecs: SmallVec<[libc::iovec; 4]> = iovecs.iter().copied().filter(|v| v.iov_len > 0).collect();
        let len = iovecs.iter().map(|v| v.iov_len).sum();
        Self { iovecs, len, owner: Some(owner), registered: None, region: None }
    }

    /// Length in bytes over all segments.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the buffer holds no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The index under which the memory is registered with the ring of the connection that it comes from:
    /// then it is one segment, good for `READ_FIXED` and `WRITE_FIXED` on that ring.
    #[must_use]
    pub fn registered(&self) -> Option<u16> {
        self.registered
    }

    /// The segments, for a system call. They are valid while this buffer lives.
    #[must_use]
    pub fn iovecs(&self) -> &[libc::iovec] {
        &self.iovecs
    }

    /// The part `[offset, offset + len)`, sharing the memory; `None` if it does not lie inside.
    #[must_use]
    pub fn slice(&self, offset: usize, len: usize) -> Option<Self> {
        if offset.checked_add(len)? > self.len {
            return None;
        }
        let (mut skip, mut left) = (offset, len);
        let mut iovecs = SmallVec::new();
        for v in &self.iovecs {
            if left == 0 {
                break;
            }
            if skip >= v.iov_len {
                skip -= v.iov_len;
                continue;
            }
            let take = left.min(v.iov_len - skip);
            let base = v.iov_base.cast::<u8>().wrapping_add(skip);
            iovecs.push(libc::iovec { iov_base: base.cast(), iov_len: take });
            left -= take;
            skip = 0;
        }
        let (owner, region) = (self.owner.clone(), self.region.clone());
        Some(Self { iovecs, len, owner, registered: self.registered, region })
    }

    /// Copies `from` into the buffer at `offset`; returns how many bytes fitted.
    pub fn write_at(&self, offset: usize, from: &[u8]) -> usize {
        let Some(part) = self.slice(offset, from.len().min(self.len.saturating_sub(offset))) else {
            return 0;
        };
        let mut done = 0;
        for v in &part.iovecs {
            // SAFETY: the segment is mapped while `owner` lives, and `from` has at least `part.len` bytes.
            unsafe { std::ptr::copy_nonoverlapping(from.as_ptr().add(done), v.iov_base.cast(), v.iov_len) };
            done += v.iov_len;
        }
        done
    }

    /// Copies the first `len` bytes of `from`, as far as both have them; returns how many.
    pub(crate) fn copy_from(&self, from: &Self, len: usize) -> usize {
        let mut done = 0;
        for v in from.iovecs() {
            let now = v.iov_len.min(len - done);
            // SAFETY: the segment is mapped while `from` lives; the copy goes through a raw pointer in chunks
            // that nobody else borrows.
            done += unsafe { self.write_raw(done, v.iov_base.cast(), now) };
        }
        done
    }

    /// Copies `len` bytes at `from` into the buffer at `offset`; returns how many fitted.
    ///
    /// # Safety
    /// `from` must be readable for `len` bytes.
    unsafe fn write_raw(&self, offset: usize, from: *const u8, len: usize) -> usize {
        let len = len.min(self.len.saturating_sub(offset));
        let (mut skip, mut done) = (offset, 0);
        for v in &self.iovecs {
            if done == len {
                break;
            }
            if skip >= v.iov_len {
                skip -= v.iov_len;
                continue;
            }
            let now = (len - done).min(v.iov_len - skip);
            let to = v.iov_base.cast::<u8>().wrapping_add(skip);
            // SAFETY: the segment is mapped while `owner` lives; guests may make ranges overlap.
            unsafe { std::ptr::copy(from.wrapping_add(done), to, now) };
            done += now;
            skip = 0;
        }
        done
    }

    /// Copies from the buffer at `offset` into `to`; returns how many bytes there were.
    pub fn read_at(&self, offset: usize, to: &mut [u8]) -> usize {
        let Some(part) = self.slice(offset, to.len().min(self.len.saturating_sub(offset))) else {
            return 0;
        };
        let mut done = 0;
        for v in &part.iovecs {
            // SAFETY: the segment is mapped while `owner` lives, and `to` has at least `part.len` bytes.
            unsafe {
                std::ptr::copy_nonoverlapping(v.iov_base.cast(), to.as_mut_ptr().add(done), v.iov_len);
            };
            done += v.iov_len;
        }
        done
    }

    /// Fills the buffer with `byte`.
    pub fn fill(&self, byte: u8) {
        for v in &self.iovecs {
            // SAFETY: the segment is mapped while `owner` lives.
            unsafe { std::ptr::write_bytes(v.iov_base.cast::<u8>(), byte, v.iov_len) };
        }
    }

    /// A copy of all bytes on the heap.
    #[must_use]
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len];
        self.read_at(0, &mut bytes);
        bytes
    }
}

impl std::fmt::Debug for Buffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Buffer({} bytes in {} segments)", self.len, self.iovecs.len())
    }
}

/// Smallest unit of aligned memory.
const PAGE: usize = 4096;

/// Aligned zeros.
#[derive(Clone)]
#[repr(C, align(4096))]
struct Page([u8; PAGE]);

/// Heap pages known only by raw pointer.
struct HeapPages(*mut [Page]);

// SAFETY: as for `HeapBytes`.
unsafe impl Send for HeapPages {}
// SAFETY: as for `HeapBytes`.
unsafe impl Sync for HeapPages {}

impl Drop for HeapPages {
    fn drop(&mut self) {
        // SAFETY: it came from `Box::into_raw` in `zeroed` and is freed once, here.
        drop(unsafe { Box::from_raw(self.0) });
    }
}

/// Heap bytes known only by raw pointer, so that no reference to them exists while they are in flight.
struct HeapBytes(*mut [u8]);

// SAFETY: the pointer is the only owner of the allocation and is used only to free it.
unsafe impl Send for HeapBytes {}
// SAFETY: as above; a shared reference gives no access at all.
unsafe impl Sync for HeapBytes {}

impl Drop for HeapBytes {
    fn drop(&mut self) {
        // SAFETY: it came from `Box::into_raw` in `from_vec` and is freed once, here.
        drop(unsafe { Box::from_raw(self.0) });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_and_copies_across_segments() {
        let owner: Arc<Vec<u8>> = Arc::new(Vec::new());
        let mut bytes: Vec<u8> = (0..10).collect();
        let at = |from: usize, len| libc::iovec {
            iov_base: bytes.as_ptr().wrapping_add(from) as *mut _,
            iov_len: len,
        };
        let list = [at(6, 4), at(0, 3)];
        bytes[0] = 100;
        // SAFETY: `bytes` outlives `buffer`, which does not leave this function.
        let buffer = unsafe { Buffer::from_iovecs(owner, &list) };
        assert_eq!(buffer.to_vec(), [6, 7, 8, 9, 100, 1, 2]);
        let part = buffer.slice(3, 3).expect("it lies inside");
        assert_eq!(part.to_vec(), [9, 100, 1]);
        assert_eq!(part.write_at(1, &[50, 51, 52]), 2);
        assert_eq!(buffer.to_vec(), [6, 7, 8, 9, 50, 51, 2]);
        assert!(buffer.slice(5, 3).is_none());
        assert!(buffer.slice(usize::MAX, 2).is_none());
    }
}
