//! Which page is where in this process and in the guest's address space.

use std::ops::Range;

use devices::GuestMemory;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use super::{PAGE, Page};

/// A region of guest RAM.
#[derive(Clone, Copy, Debug)]
struct Span {
    /// Where the guest has it.
    guest: u64,
    /// Where this process has it, in the mapping that faults.
    host: usize,
    /// Its first page.
    first: u64,
    pages: u64,
}

/// The regions of a guest's RAM.
#[derive(Clone, Debug)]
pub(in crate::memory) struct Map {
    spans: Vec<Span>,
}

impl Map {
    /// `None` if `memory` is not all of a file.
    pub(in crate::memory) fn new(memory: &GuestMemory) -> Option<Self> {
        let span = |region: &vm_memory::GuestRegionMmap| {
            let host = region.get_host_address(MemoryRegionAddress(0)).ok()?.addr();
            let first = Page::at(region.file_offset()?.start()).0;
            Some(Span { guest: region.start_addr().0, host, first, pages: region.len() / PAGE as u64 })
        };
        memory.iter().map(span).collect::<Option<_>>().map(|spans| Self { spans })
    }

    /// The page at an address of this process.
    pub(in crate::memory) fn page(&self, address: usize) -> Option<Page> {
        self.spans.iter().find_map(|span| {
            let inside = (address.checked_sub(span.host)? / PAGE) as u64;
            (inside < span.pages).then(|| Page(span.first + inside))
        })
    }

    /// Where `page` is in this process, and how many of the `count` pages from there on follow it.
    pub(in crate::memory) fn host(&self, page: Page, count: u64) -> Option<(usize, u64)> {
        self.spans.iter().find_map(|span| {
            let inside = page.0.checked_sub(span.first)?;
            (inside < span.pages)
                .then(|| (span.host + inside as usize * PAGE, count.min(span.pages - inside)))
        })
    }

    /// The stretches of this process's memory that `count` pages from `page` on are.
    pub(in crate::memory) fn stretches(
        &self,
        page: Page,
        count: u64,
    ) -> impl Iterator<Item = (usize, usize)> + '_ {
        let mut rest = (page, count);
        std::iter::from_fn(move || {
            let (page, count) = rest;
            let (address, here) = self.host(page, count).filter(|_| count > 0)?;
            rest = (page.plus(here), count - here);
            Some((address, here as usize * PAGE))
        })
    }

    /// The whole pages in `len` bytes of the guest's address space from `start` on.
    pub(in crate::memory) fn guest(&self, start: GuestAddress, len: u64) -> Vec<Range<u64>> {
        let end = start.0.saturating_add(len);
        let page = PAGE as u64;
        let inside = |span: &Span| {
            let bytes = span.pages * page;
            let from = start.0.saturating_sub(span.guest).min(bytes).div_ceil(page);
            let to = end.saturating_sub(span.guest).min(bytes) / page;
            (from < to).then(|| span.first + from..span.first + to)
        };
        self.spans.iter().filter_map(inside).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Backing, Layout, Ram};
    use crate::units::Bytes;

    #[test]
    fn pages_are_found_by_both_of_their_addresses_across_the_hole() {
        let layout = Layout::new(Bytes(4 << 30), 40).expect("it fits");
        let ram = Ram::new(&layout, Backing::Shared).expect("untouched RAM costs nothing");
        let map = Map::new(ram.memory()).expect("it has a file");
        let below = (3 << 30) / PAGE as u64;
        for page in [0, 1, below - 1, below, below + 7, (4 << 30) / 4096 - 1].map(Page) {
            let (address, _) = map.host(page, 1).expect("it is RAM");
            assert_eq!(map.page(address + 17), Some(page));
        }
        assert_eq!(map.host(Page((4 << 30) / 4096), 1), None);
        assert_eq!(map.page(0), None);
        assert_eq!(map.stretches(Page(below - 2), 5).map(|(_, len)| len).collect::<Vec<_>>(), [8192, 12288]);
        assert_eq!(
            map.guest(GuestAddress(0x1001), 0x2fff),
            vec![Range { start: 2, end: 4 }],
            "only whole pages"
        );
        assert_eq!(
            map.guest(GuestAddress((3 << 30) - 4096), u64::MAX),
            [below - 1..below, below..(4 << 30) / 4096]
        );
        assert_eq!(map.guest(GuestAddress(3 << 30), 1 << 30), [], "the hole is no RAM");
    }
}
