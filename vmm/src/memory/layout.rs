//! Guest-physical addresses.
//!
//! ```text
//!            0  RAM (boot structures in its first page frames)
//!   0x0009fc00  reserved: nothing, as a PC's extended BIOS data area
//!   0x000e0000  ACPI tables, to 0x000fffff
//!   0x00100000  RAM, to 3 GiB at most
//!   0xc0000000  PCI BARs below 4 GiB (512 MiB)
//!   0xe0000000  PCI configuration space (ECAM) of bus 0
//!   0xfec00000  I/O APIC
//!   0xfee00000  local APICs, message-signalled interrupts
//!  0x100000000  the rest of RAM
//!          ...  PCI BARs above 4 GiB: the upper half of the address space
//! ```

use devices::bus::Range;

use crate::units::Bytes;

/// Where RAM below the PC's legacy areas ends.
pub const LOW_RAM_END: u64 = 0x9_fc00;
/// Where ACPI tables lie: the area in which a PC's operating system looks for them.
pub const TABLES: Range = Range { base: 0xe_0000, len: 0x2_0000 };
/// Where RAM above the legacy areas begins.
const HIGH_RAM: u64 = 0x10_0000;
/// Where RAM below 4 GiB ends at most.
pub const RAM_END_32: u64 = 3 << 30;
/// PCI BARs below 4 GiB.
pub const WINDOW_32: Range = Range { base: RAM_END_32, len: 512 << 20 };
/// PCI configuration space: one bus, so that no guest searches 255 empty ones.
pub const ECAM: Range = Range { base: 0xe000_0000, len: 1 << 20 };
/// The I/O APIC's registers.
pub const IO_APIC: u32 = 0xfec0_0000;
/// The local APICs' registers.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
const FOUR_GIB: u64 = 4 << 30;
/// No larger window for PCI BARs helps anybody.
const WINDOW_64_MAX: u64 = 1 << 40;

/// What a stretch of the address space is to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Region {
    /// Usable RAM.
    Ram,
    /// Not to be used or given to devices.
    Reserved,
}

/// The address space of a guest with so much RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    ram: u64,
    window_64: Range,
}

impl Layout {
    /// The layout for `ram` bytes of RAM, a multiple of 4 KiB, under addresses of `address_bits` bits;
    /// `None` if they do not fit.
    #[must_use]
    pub fn new(ram: Bytes, address_bits: u8) -> Option<Self> {
        let half = 1u64 << address_bits.clamp(36, 52).saturating_sub(1);
        let window_64 = Range { base: half, len: half.min(WINDOW_64_MAX) };
        let layout = Self { ram: ram.0, window_64 };
        let fits = layout.high().is_none_or(|high| high.base.saturating_add(high.len) <= half);
        (fits && ram.0 >= HIGH_RAM).then_some(layout)
    }

    /// RAM below 4 GiB, including the legacy areas.
    #[must_use]
    pub fn low(&self) -> Range {
        Range { base: 0, len: self.ram.min(RAM_END_32) }
    }

    /// RAM above 4 GiB.
    #[must_use]
    pub fn high(&self) -> Option<Range> {
        let len = self.ram.saturating_sub(RAM_END_32);
        (len > 0).then_some(Range { base: FOUR_GIB, len })
    }

    /// All RAM, in address order.
    pub fn ram(&self) -> impl Iterator<Item = Range> + use<> {
        [Some(self.low()), self.high()].into_iter().flatten()
    }

    /// PCI BARs above RAM.
    #[must_use]
    pub fn window_64(&self) -> Range {
        self.window_64
    }

    /// The map that firmware hands to the operating system, in address order.
    #[must_use]
    pub fn map(&self) -> Vec<(Range, Region)> {
        let mut map = vec![
            (Range { base: 0, len: LOW_RAM_END }, Region::Ram),
            (Range { base: LOW_RAM_END, len: 0xa_0000 - LOW_RAM_END }, Region::Reserved),
            (TABLES, Region::Reserved),
            (Range { base: HIGH_RAM, len: self.low().len - HIGH_RAM }, Region::Ram),
            (ECAM, Region::Reserved),
        ];
        map.extend(self.high().map(|high| (high, Region::Ram)));
        map
    }

    /// The address ranges of `len` bytes of RAM from the `start`th byte on: what a NUMA node owns.
    #[must_use]
    pub fn slice(&self, start: u64, len: u64) -> Vec<Range> {
        let end = start.saturating_add(len);
        let mut before = 0;
        let mut ranges = Vec::new();
        for ram in self.ram() {
            let (from, to) = (start.max(before), end.min(before + ram.len));
            if from < to {
                ranges.push(Range { base: ram.base + from - before, len: to - from });
            }
            before += ram.len;
        }
        ranges
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_leaves_the_hole_below_four_gib_to_devices() {
        let small = Layout::new(Bytes(512 << 20), 40).expect("it fits");
        assert_eq!((small.low().len, small.high()), (512 << 20, None));
        let large = Layout::new(Bytes(8 << 30), 40).expect("it fits");
        assert_eq!(large.low().len, 3 << 30);
        assert_eq!(large.high(), Some(Range { base: 4 << 30, len: 5 << 30 }));
        assert_eq!(Layout::new(Bytes(64 << 30), 36), None, "36 bits address 64 GiB, half of it for RAM");
    }

    #[test]
    fn the_map_is_sorted_without_overlap() {
        for ram in [64 << 20, 3 << 30, 16 << 30] {
            let map = Layout::new(Bytes(ram), 40).expect("it fits").map();
            let mut end = 0;
            for (range, _) in map {
                assert!(range.base >= end, "{range:x?} begins before {end:#x}");
                end = range.base + range.len;
            }
        }
    }

    #[test]
    fn a_numa_node_may_lie_on_both_sides_of_the_hole() {
        let layout = Layout::new(Bytes(4 << 30), 40).expect("it fits");
        assert_eq!(layout.slice(0, 2 << 30), [Range { base: 0, len: 2 << 30 }]);
        let both = [Range { base: 2 << 30, len: 1 << 30 }, Range { base: 4 << 30, len: 1 << 30 }];
        assert_eq!(layout.slice(2 << 30, 2 << 30), both);
    }
}
