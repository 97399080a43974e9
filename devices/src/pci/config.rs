//! A function's configuration space: the type 0 header and a list of capabilities (section 6.1, 6.7).
//!
//! Every byte has a mask of the bits that the guest can change. BARs need nothing beyond that: their
//! address bits below the size are not writable, so writing all ones and reading back yields the size.

use serde::{Deserialize, Serialize};

use super::{BarKind, BarSpec, Bars};

/// How many bytes of configuration space a function has.
pub(super) const SIZE: usize = 256;

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const CACHE_LINE_SIZE: usize = 0x0c;
const BAR0: usize = 0x10;
const CAPABILITIES_POINTER: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
const FIRST_CAPABILITY: usize = 0x40;

const COMMAND_MEMORY: u8 = 1 << 1;
const COMMAND_BUS_MASTER: u8 = 1 << 2;
const STATUS_CAPABILITIES: u8 = 1 << 4;
const BAR_TYPE_64: u8 = 0b100;

/// Who a function is (section 6.2.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Revision ID.
    pub revision: u8,
    /// Base class, sub-class, programming interface: `0xBBSSPP`.
    pub class: u32,
    /// Subsystem vendor ID.
    pub subsystem_vendor: u16,
    /// Subsystem ID.
    pub subsystem: u16,
}

/// What the guest can change in a configuration space, as a value.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigState {
    /// All 256 bytes.
    pub bytes: Vec<u8>,
}

/// One function's 256 bytes.
pub struct ConfigSpace {
    bytes: [u8; SIZE],
    writable: [u8; SIZE],
    power_on: [u8; SIZE],
    specs: Vec<BarSpec>,
    last_capability: Option<usize>,
    next_free: usize,
}

impl ConfigSpace {
    /// The header of a function with these BARs, all at address 0, and no capabilities.
    #[must_use]
    pub fn new(identity: &Identity, specs: &[BarSpec]) -> Self {
        let mut space = Self {
            bytes: [0; SIZE],
            writable: [0; SIZE],
            power_on: [0; SIZE],
            specs: specs.to_vec(),
            last_capability: None,
            next_free: FIRST_CAPABILITY,
        };
        space.put(0x00, &identity.vendor.to_le_bytes());
        space.put(0x02, &identity.device.to_le_bytes());
        space.put(0x08, &[identity.revision]);
        space.put(0x09, &identity.class.to_le_bytes()[..3]);
        space.put(0x2c, &identity.subsystem_vendor.to_le_bytes());
        space.put(0x2e, &identity.subsystem.to_le_bytes());
        space.writable[COMMAND] = COMMAND_MEMORY | COMMAND_BUS_MASTER;
        space.writable[COMMAND + 1] = 1 << 2; // interrupt disable: kept, though there is no pin
        space.writable[CACHE_LINE_SIZE] = 0xff;
        space.writable[INTERRUPT_LINE] = 0xff;
        for spec in specs {
            let mask = !(spec.size - 1);
            let at = BAR0 + 4 * spec.index;
            space.writable[at..at + 4].copy_from_slice(&(mask as u32 & !0xf).to_le_bytes());
            if spec.kind == BarKind::Memory64 {
                space.put(at, &[BAR_TYPE_64]);
                space.writable[at + 4..at + 8].copy_from_slice(&((mask >> 32) as u32).to_le_bytes());
            }
        }
        space
    }

    fn put(&mut self, offset: usize, bytes: &[u8]) {
        self.bytes[offset..offset + bytes.len()].copy_from_slice(bytes);
        self.power_on[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    /// Appends a capability: `body` follows its ID and next pointer, and `writable` masks what of the
    /// body the guest can change (missing bytes: nothing). Returns the offset of its first byte.
    ///
    /// # Panics
    /// The capabilities do not fit, which is a mistake in the device.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> usize {
        let at = self.next_free;
        assert!(at + 2 + body.len() <= SIZE && writable.len() <= body.len(), "capabilities must fit");
        self.put(at, &[id, 0]);
        self.put(at + 2, body);
        self.writable[at + 2..at + 2 + writable.len()].copy_from_slice(writable);
        self.put(self.last_capability.map_or(CAPABILITIES_POINTER, |last| last + 1), &[at as u8]);
        self.put(STATUS, &[STATUS_CAPABILITIES]);
        self.last_capability = Some(at);
        self.next_free = (at + 2 + body.len()).next_multiple_of(4);
        at
    }

    /// Sets the address that BAR `index` has at power-on, and now.
    pub fn place_bar(&mut self, index: usize, address: u64) {
        let Some(spec) = self.specs.iter().find(|spec| spec.index == index).copied() else { return };
        let at = BAR0 + 4 * index;
        let kind = self.bytes[at] & 0xf;
        self.put(at, &(address as u32 & !0xf | u32::from(kind)).to_le_bytes());
        if spec.kind == BarKind::Memory64 {
            self.put(at + 4, &((address >> 32) as u32).to_le_bytes());
        }
    }

    /// Reads from `offset`; what lies beyond the end reads as zeros.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = self.bytes.get(offset.saturating_add(i)).copied().unwrap_or(0);
        }
    }

    /// Writes the bits that the guest may change.
    pub fn write(&mut self, offset: usize, data: &[u8]) {
        for (i, &new) in data.iter().enumerate() {
            let at = offset.saturating_add(i);
            if let (Some(byte), Some(&mask)) = (self.bytes.get_mut(at), self.writable.get(at)) {
                *byte = *byte & !mask | new & mask;
            }
        }
    }

    /// The byte at `offset`, for whoever owns a capability.
    #[must_use]
    pub fn byte(&self, offset: usize) -> u8 {
        self.bytes.get(offset).copied().unwrap_or(0)
    }

    /// The double word at `offset`, for whoever owns a capability.
    #[must_use]
    pub fn dword(&self, offset: usize) -> u32 {
        let mut bytes = [0; 4];
        self.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// The address at which BAR `index` decodes now; `None` if the memory space bit is off.
    #[must_use]
    pub fn bar_address(&self, index: usize) -> Option<u64> {
        let spec = self.specs.iter().find(|spec| spec.index == index)?;
        if self.bytes[COMMAND] & COMMAND_MEMORY == 0 {
            return None;
        }
        let at = BAR0 + 4 * index;
        let low = u64::from(self.dword(at) & !0xf);
        Some(match spec.kind {
            BarKind::Memory32 => low,
            BarKind::Memory64 => low | u64::from(self.dword(at + 4)) << 32,
        })
    }

    /// Tells `bars` where each BAR decodes now.
    pub fn update_bars(&self, bars: &Bars) {
        for spec in &self.specs {
            bars.set(spec.index, self.bar_address(spec.index));
        }
    }

    /// Back to the state of power-on.
    pub fn reset(&mut self) {
        self.bytes = self.power_on;
    }

    /// The state as a value.
    #[must_use]
    pub fn save(&self) -> ConfigState {
        ConfigState { bytes: self.bytes.to_vec() }
    }

    /// Whether `state` could be this function's: it differs in nothing that the guest cannot change.
    #[must_use]
    pub fn accepts(&self, state: &ConfigState) -> bool {
        let fixed = |bytes: &[u8]| -> Vec<u8> {
            bytes.iter().zip(&self.writable).map(|(byte, mask)| byte & !mask).collect()
        };
        state.bytes.len() == SIZE && fixed(&state.bytes) == fixed(&self.bytes)
    }

    /// Takes over the guest's part of `state`.
    pub fn restore(&mut self, state: &ConfigState) {
        self.write(0, &state.bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPECS: [BarSpec; 2] = [
        BarSpec { index: 0, kind: BarKind::Memory32, size: 0x8000 },
        BarSpec { index: 2, kind: BarKind::Memory64, size: 1 << 33 },
    ];

    fn space() -> ConfigSpace {
        let identity = Identity {
            vendor: 0x1af4,
            device: 0x1042,
            revision: 1,
            class: 0x01_80_00,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1042,
        };
        ConfigSpace::new(&identity, &SPECS)
    }

    #[test]
    fn a_guest_that_writes_all_ones_reads_the_size_of_a_bar() {
        let mut space = space();
        space.place_bar(0, 0xe000_0000);
        space.place_bar(2, 0x80_0000_0000);
        assert_eq!(space.dword(0x10), 0xe000_0000);
        for at in [0x10, 0x18, 0x1c, 0x14, 0x20] {
            space.write(at, &[0xff; 4]);
        }
        assert_eq!(space.dword(0x10), 0xffff_8000);
        assert_eq!((space.dword(0x1c), space.dword(0x18)), (0xffff_fffe, 0x4));
        assert_eq!((space.dword(0x14), space.dword(0x20)), (0, 0), "registers without a BAR stay zero");
        space.reset();
        assert_eq!(space.dword(0x10), 0xe000_0000, "a reset brings the placement back");
        assert_eq!(space.dword(0x1c), 0x80);
    }

    #[test]
    fn a_bar_decodes_only_while_the_memory_space_bit_is_set() {
        let mut space = space();
        space.place_bar(0, 0xe000_0000);
        space.place_bar(2, 0x80_0000_0000);
        assert_eq!(space.bar_address(0), None);
        space.write(COMMAND, &[0xff, 0xff]);
        assert_eq!(space.dword(COMMAND) & 0xffff, 0x0406);
        assert_eq!(space.bar_address(0), Some(0xe000_0000));
        assert_eq!(space.bar_address(2), Some(0x80_0000_0000));
        assert_eq!(space.bar_address(1), None);
    }

    #[test]
    fn capabilities_form_a_list_that_the_guest_cannot_break() {
        let mut space = space();
        assert_eq!(space.dword(COMMAND) >> 16, 0, "no list without a capability");
        let first = space.add_capability(0x11, &[1, 2, 3], &[0, 0xf0]);
        let second = space.add_capability(0x09, &[9; 14], &[]);
        space.write(0, &[0xff; SIZE]);
        assert_eq!(usize::from(space.byte(CAPABILITIES_POINTER)), first);
        assert_eq!(usize::from(space.byte(first + 1)), second);
        assert_eq!(space.byte(second + 1), 0);
        assert_eq!([space.byte(first + 2), space.byte(first + 3)], [1, 0xf2]);
        assert_eq!(space.dword(COMMAND) >> 16, 0x10);
        assert_eq!(space.dword(0), 0x1042_1af4);
    }

    #[test]
    fn a_state_of_another_function_is_not_accepted() {
        let mut space = space();
        space.write(COMMAND, &[6]);
        let state = space.save();
        space.reset();
        assert!(space.accepts(&state));
        space.restore(&state);
        assert_eq!(space.save(), state);
        let mut other = state.clone();
        other.bytes[2] ^= 1;
        assert!(!space.accepts(&other));
        other.bytes.truncate(64);
        assert!(!space.accepts(&other));
    }
}
