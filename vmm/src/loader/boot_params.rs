//! Linux' `struct boot_params`, the "zero page".

use devices::GuestMemory;
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::Bytes;

use super::kernel::Boot;
use super::{Error, address};
use crate::memory::{Layout, Region};

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
const BOOT_FLAG: u16 = 0xaa55;
const HDRS: u32 = 0x5372_6448;
/// `type_of_loader`: none of the registered ones.
const LOADER_UNDEFINED: u8 = 0xff;

/// Writes the parameters for `boot`; `header` is the bzImage's setup header, where there is one.
pub(super) fn write(
    memory: &GuestMemory,
    layout: &Layout,
    boot: &Boot,
    header: Option<setup_header>,
) -> Result<(), Error> {
    let no_elf_header = || setup_header { boot_flag: BOOT_FLAG, header: HDRS, ..Default::default() };
    let mut params = boot_params {
        hdr: header.unwrap_or_else(no_elf_header),
        acpi_rsdp_addr: boot.rsdp.0,
        ..Default::default()
    };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = boot.cmdline.0.0 as u32;
    if let Some((start, len)) = boot.initrd {
        params.hdr.ramdisk_image = start.0 as u32;
        params.hdr.ramdisk_size = len as u32;
        params.ext_ramdisk_size = (len >> 32) as u32;
    }
    for (entry, (range, region)) in params.e820_table.iter_mut().zip(layout.map()) {
        let type_ = match region {
            Region::Ram => E820_RAM,
            Region::Reserved => E820_RESERVED,
        };
        *entry = boot_e820_entry { addr: range.base, size: range.len, r#type: type_ };
        params.e820_entries += 1;
    }
    memory.write_obj(params, address::BOOT_PARAMS).map_err(|_| Error::NoRoom("the boot parameters"))
}
