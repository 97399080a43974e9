//! What a device on the PCI bus offers to the root.

use super::Bars;
use crate::bus::Outcome;
use crate::lifecycle::Lifecycle;

/// One function (device) of the bus. Accesses come from many vCPU threads at once and never wait for
/// anything but a short lock.
pub trait PciFunction: Lifecycle {
    /// Reads 1, 2 or 4 bytes of configuration space; they lie within one double word, below 0x100.
    fn read_config(&self, offset: usize, data: &mut [u8]);

    /// Writes 1, 2 or 4 bytes of configuration space; they lie within one double word, below 0x100.
    fn write_config(&self, offset: usize, data: &[u8]) -> Outcome;

    /// The BARs: what they need, and where they are now.
    fn bars(&self) -> &Bars;

    /// Sets where BAR `bar` is at power-on. Called by the root when the function is added.
    fn place_bar(&self, bar: usize, address: u64);

    /// Reads `data.len()` bytes at `offset` of BAR `bar`; they lie inside it.
    fn read_bar(&self, bar: usize, offset: u64, data: &mut [u8]) -> Outcome;

    /// Writes `data` at `offset` of BAR `bar`; it lies inside it.
    fn write_bar(&self, bar: usize, offset: u64, data: &[u8]) -> Outcome;
}
