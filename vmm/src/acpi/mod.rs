//! The ACPI tables (ACPI 6.5): what the machine consists of, as the guest's operating system reads it.
//!
//! The platform is not hardware-reduced: it has the fixed power-management registers of
//! `devices::platform::Pm`, whose ports the tables take from `devices::platform::ports`.

mod dsdt;
mod fixed;
mod madt;
mod slit;
mod srat;

use acpi_tables::Aml;
use acpi_tables::facs::FACS;
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;
use devices::GuestMemory;
use vm_memory::{Bytes, GuestAddress};

use crate::config::NumaNode;
use crate::memory::{ECAM, Layout, TABLES};

const OEM: [u8; 6] = *b"OMEGA ";
const TABLE: [u8; 8] = *b"OMEGAVM ";
const REVISION: u32 = 1;
/// Tables begin at multiples of this; the FACS needs it (5.2.10).
const ALIGNMENT: u64 = 64;

/// The tables do not fit into the area that the layout has for them.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("The ACPI tables need {0} bytes, more than there is room for")]
pub struct TooLarge(u64);

/// Writes the tables for a machine with `cpus` vCPUs and `numa` nodes, between which are `distances`, a row for each
/// node (none: nothing is said of them); returns the RSDP's address.
///
/// # Errors
/// They do not fit.
pub fn write(
    memory: &GuestMemory,
    layout: &Layout,
    cpus: u8,
    numa: &[NumaNode],
    distances: &[Vec<u8>],
) -> Result<GuestAddress, TooLarge> {
    let mut area = Area { memory, next: TABLES.base + ALIGNMENT };
    let facs = area.put(&FACS::new())?;
    let dsdt = area.put(&dsdt::dsdt(layout))?;
    let mut xsdt = XSDT::new(OEM, TABLE, REVISION);
    xsdt.add_entry(area.put(&fixed::fadt(facs as u32, dsdt))?);
    xsdt.add_entry(area.put(&madt::madt(cpus))?);
    let mut mcfg = MCFG::new(OEM, TABLE, REVISION);
    mcfg.add_ecam(ECAM.base, 0, 0, 0);
    xsdt.add_entry(area.put(&mcfg)?);
    if numa.len() > 1 {
        xsdt.add_entry(area.put(&srat::srat(layout, numa))?);
    }
    if numa.len() > 1 && distances.len() == numa.len() {
        xsdt.add_entry(area.put(&slit::slit(distances))?);
    }
    let xsdt = area.put(&xsdt)?;
    // The first thing in the area, where operating systems that are not told look for it (5.2.5.1).
    area.next = TABLES.base;
    Ok(GuestAddress(area.put(&Rsdp::new(OEM, xsdt))?))
}

/// The place where tables are put, one after the other.
struct Area<'a> {
    memory: &'a GuestMemory,
    next: u64,
}

impl Area<'_> {
    fn put(&mut self, table: &dyn Aml) -> Result<u64, TooLarge> {
        let mut bytes = Vec::new();
        table.to_aml_bytes(&mut bytes);
        let (at, end) = (self.next, self.next + bytes.len() as u64);
        let fits = end <= TABLES.base + TABLES.len;
        if !fits || self.memory.write_slice(&bytes, GuestAddress(at)).is_err() {
            return Err(TooLarge(end - TABLES.base));
        }
        self.next = end.next_multiple_of(ALIGNMENT);
        Ok(at)
    }
}

#[cfg(test)]
#[path = "acpi_test.rs"]
mod tests;
