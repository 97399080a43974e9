//! Memory whose pages are touched one by one, whoever answers for them.
#![allow(unsafe_code)] // It is a mapping whose pages come and go.

use std::num::NonZero;
use std::ptr::NonNull;

use anyhow::{Context, Result};
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};

/// The bytes of a page.
pub const PAGE: usize = 4096;

/// Pages that may be read and written at any time by any thread.
#[derive(Clone, Copy)]
pub struct Region {
    base: NonNull<u8>,
    pages: u64,
}

// SAFETY: all accesses are volatile ones of aligned words, and what is in memory is not trusted by anybody.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    /// The pages from `base` on.
    ///
    /// # Safety
    /// They are mapped for reading and writing for as long as the region or a copy of it is used, and hold nothing
    /// that Rust knows of.
    #[must_use]
    pub unsafe fn new(base: NonNull<u8>, pages: u64) -> Self {
        Self { base, pages }
    }

    /// How many there are.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.pages
    }

    fn word(&self, page: u64) -> NonNull<u64> {
        assert!(page < self.pages, "a page of the region");
        // SAFETY: the page is inside the mapping.
        unsafe { self.base.add(page as usize * PAGE) }.cast()
    }

    /// The first word of `page`.
    #[must_use]
    pub fn read(&self, page: u64) -> u64 {
        // SAFETY: an aligned word inside the mapping, for which every bit pattern is valid.
        unsafe { self.word(page).read_volatile() }
    }

    /// Writes the first word of `page`.
    pub fn write(&self, page: u64, value: u64) {
        // SAFETY: as above.
        unsafe { self.word(page).write_volatile(value) }
    }

    /// Fills `page` with words that are all different, so that it is no page that compresses to nothing.
    pub fn fill(&self, page: u64) {
        let word = self.word(page);
        let mut value = page.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        self.write(page, page);
        for at in 1..PAGE / 8 {
            value ^= value << 13;
            value ^= value >> 7;
            value ^= value << 17;
            // SAFETY: the rest of the same page.
            unsafe { word.add(at).write_volatile(value) }
        }
    }

    /// Whether `page` is in memory.
    ///
    /// # Errors
    /// The kernel does not say.
    pub fn present(&self, page: u64) -> Result<bool> {
        let mut state = 0_u8;
        let address = self.word(page).as_ptr().cast();
        // SAFETY: one byte is written for the one page that is asked about.
        let result = unsafe { libc::mincore(address, PAGE, &raw mut state) };
        (result == 0).then_some(state & 1 != 0).context("mincore")
    }
}

/// Anonymous memory, which the kernel may swap out. Dropping it gives it back.
pub struct Anonymous {
    region: Region,
}

impl Anonymous {
    /// So many pages.
    ///
    /// # Errors
    /// There is not enough address space.
    pub fn new(pages: u64) -> Result<Self> {
        let len = NonZero::new(pages as usize * PAGE).context("no pages")?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice takes nothing away from anybody.
        let base = unsafe { mmap_anonymous(None, len, protection, MapFlags::MAP_PRIVATE) }?;
        // SAFETY: the advice changes nothing of what is in memory.
        unsafe { libc::madvise(base.as_ptr(), len.get(), libc::MADV_NOHUGEPAGE) };
        // SAFETY: it was mapped just now, and stays until it is dropped.
        Ok(Self { region: unsafe { Region::new(base.cast(), pages) } })
    }

    /// Its pages.
    #[must_use]
    pub fn region(&self) -> &Region {
        &self.region
    }
}

impl Drop for Anonymous {
    fn drop(&mut self) {
        // SAFETY: the region is borrowed from here, so nobody uses it any more.
        let _ = unsafe { munmap(self.region.base.cast(), self.region.pages as usize * PAGE) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_kept_and_pages_are_there_once_touched() {
        let memory = Anonymous::new(8).expect("memory");
        let region = memory.region();
        region.write(3, 7);
        region.fill(5);
        assert_eq!((region.read(3), region.read(5), region.read(4)), (7, 5, 0));
        assert!(region.present(3).expect("the kernel says"));
    }
}
