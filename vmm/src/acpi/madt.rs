//! The MADT (5.2.12): the local APICs, the I/O APIC and how ISA interrupts reach it.

use acpi_tables::Aml;
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::sdt::Sdt;
use devices::platform::ports;

use super::{OEM, REVISION, TABLE};
use crate::memory::{IO_APIC, LOCAL_APIC};

const HEADER: u32 = 36;
/// There is a pair of 8259s too.
const PCAT_COMPAT: u32 = 1;
const INTERRUPT_SOURCE_OVERRIDE: u8 = 2;
const LOCAL_APIC_NMI: u8 = 4;
/// MPS INTI flags: active high, level-triggered.
const ACTIVE_HIGH_LEVEL: u16 = 0b11_01;

pub(super) fn madt(cpus: u8) -> Sdt {
    let mut body = Vec::new();
    body.extend(LOCAL_APIC.to_le_bytes());
    body.extend(PCAT_COMPAT.to_le_bytes());
    for cpu in 0..cpus {
        ProcessorLocalApic::new(cpu, cpu, EnabledStatus::Enabled).to_aml_bytes(&mut body);
    }
    IoApic::new(0, IO_APIC, 0).to_aml_bytes(&mut body);
    // The timer's ISA interrupt is wired to pin 2, as on every PC.
    body.extend(source_override(0, 2, 0));
    body.extend(source_override(ports::SCI_IRQ as u8, ports::SCI_IRQ, ACTIVE_HIGH_LEVEL));
    // NMI at LINT1 of every processor.
    body.extend([LOCAL_APIC_NMI, 6, 0xff, 0, 0, 1]);
    let mut madt = Sdt::new(*b"APIC", HEADER, 5, OEM, TABLE, REVISION);
    madt.append_slice(&body);
    madt
}

/// ISA interrupt `source` arrives as global system interrupt `gsi`.
fn source_override(source: u8, gsi: u32, flags: u16) -> impl Iterator<Item = u8> {
    [INTERRUPT_SOURCE_OVERRIDE, 10, 0, source].into_iter().chain(gsi.to_le_bytes()).chain(flags.to_le_bytes())
}
