//! `struct hvm_start_info` of the x86/HVM direct boot ABI, with its module list and memory map behind it.

use devices::GuestMemory;
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::{Address, Bytes};

use super::kernel::Boot;
use super::{Error, address};
use crate::memory::{Layout, Region};

const MAGIC: u32 = 0x336e_c578;
/// The version that has a memory map.
const VERSION: u32 = 1;
const MEMMAP_RAM: u32 = 1;
const MEMMAP_RESERVED: u32 = 2;
const MODULE_OFFSET: u64 = 0x40;
const MEMMAP_OFFSET: u64 = 0x80;

/// Writes the start info for `boot`.
pub(super) fn write(memory: &GuestMemory, layout: &Layout, boot: &Boot) -> Result<(), Error> {
    let room = |_| Error::NoRoom("the start info");
    let at = address::START_INFO;
    let (modules, map) = (at.unchecked_add(MODULE_OFFSET), at.unchecked_add(MEMMAP_OFFSET));
    if let Some((start, len)) = boot.initrd {
        let module = hvm_modlist_entry { paddr: start.0, size: len, ..Default::default() };
        memory.write_obj(module, modules).map_err(room)?;
    }
    let entries = layout.map();
    for (i, (range, region)) in entries.iter().enumerate() {
        let type_ = match region {
            Region::Ram => MEMMAP_RAM,
            Region::Reserved => MEMMAP_RESERVED,
        };
        let entry = hvm_memmap_table_entry { addr: range.base, size: range.len, type_, reserved: 0 };
        let place = map.unchecked_add((i * size_of::<hvm_memmap_table_entry>()) as u64);
        memory.write_obj(entry, place).map_err(room)?;
    }
    let info = hvm_start_info {
        magic: MAGIC,
        version: VERSION,
        nr_modules: boot.initrd.is_some().into(),
        modlist_paddr: modules.0,
        cmdline_paddr: boot.cmdline.0.0,
        rsdp_paddr: boot.rsdp.0,
        memmap_paddr: map.0,
        memmap_entries: entries.len() as u32,
        ..Default::default()
    };
    memory.write_obj(info, at).map_err(room)
}
