//! Base address registers: sizes, and where each BAR answers at the moment (section 6.2.5).

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::bus::Range;

/// How wide a memory BAR's address is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarKind {
    /// One register; the BAR lies below 4 GiB.
    Memory32,
    /// Two registers; the BAR may lie anywhere.
    Memory64,
}

/// What a BAR needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BarSpec {
    /// The register, 0 to 5; a 64-bit BAR also takes the next one.
    pub index: usize,
    /// How wide its address is.
    pub kind: BarKind,
    /// Its size in bytes: a power of two, at least 16. Its address is a multiple of it.
    pub size: u64,
}

/// A BAR that does not answer.
const NOWHERE: u64 = u64::MAX;

/// A function's BARs: read without a lock on every MMIO access, written when the guest moves a BAR or
/// flips the memory space bit.
pub struct Bars {
    specs: Vec<BarSpec>,
    places: Vec<AtomicU64>,
    windows: OnceLock<Vec<Range>>,
}

impl Bars {
    /// BARs that answer nowhere yet.
    #[must_use]
    pub fn new(specs: &[BarSpec]) -> Self {
        let places = specs.iter().map(|_| AtomicU64::new(NOWHERE)).collect();
        Self { specs: specs.to_vec(), places, windows: OnceLock::new() }
    }

    /// What the BARs need.
    #[must_use]
    pub fn specs(&self) -> &[BarSpec] {
        &self.specs
    }

    /// Where BARs may answer: an address outside of all windows is as good as none. Set by the root.
    pub(super) fn confine(&self, windows: &[Range]) {
        let _ = self.windows.set(windows.to_vec());
    }

    /// Notes that BAR `index` now decodes at `address` (`None`: not at all). Returns where it answers:
    /// nowhere, if that is outside of the root's windows.
    pub fn set(&self, index: usize, address: Option<u64>) -> Option<u64> {
        let (spec, place) = self.specs.iter().zip(&self.places).find(|(spec, _)| spec.index == index)?;
        let address = address.filter(|&base| {
            let windows = self.windows.get().map_or(&[][..], Vec::as_slice);
            windows
                .iter()
                .any(|w| base >= w.base && base - w.base <= w.len && spec.size <= w.len - (base - w.base))
        });
        place.store(address.unwrap_or(NOWHERE), Ordering::Release);
        address
    }

    /// Where BAR `index` answers now.
    #[must_use]
    pub fn get(&self, index: usize) -> Option<u64> {
        let at = self.specs.iter().position(|spec| spec.index == index)?;
        Some(self.places[at].load(Ordering::Acquire)).filter(|&place| place != NOWHERE)
    }

    /// Which BAR answers to all of `[address, address + len)`, and at which offset.
    #[must_use]
    pub fn find(&self, address: u64, len: usize) -> Option<(usize, u64)> {
        self.specs.iter().zip(&self.places).find_map(|(spec, place)| {
            let offset = address.checked_sub(place.load(Ordering::Acquire))?;
            (offset < spec.size && len as u64 <= spec.size - offset).then_some((spec.index, offset))
        })
    }
}
