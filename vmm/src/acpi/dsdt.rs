//! The DSDT (5.2.11.1): the devices that cannot be found by looking, and how the machine sleeps.

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Memory32Fixed, Name, Package,
    ResourceTemplate, Scope, ZERO,
};
use acpi_tables::sdt::Sdt;
use devices::bus::Range;
use devices::platform::ports;

use super::{OEM, REVISION, TABLE};
use crate::memory::{ECAM, Layout, WINDOW_32};

const HEADER: u32 = 36;
/// `_STA`: present, enabled, shown, working.
const PRESENT: u8 = 0xf;

pub(super) fn dsdt(layout: &Layout) -> Sdt {
    let mut body = Vec::new();
    Scope::new("\\_SB_".into(), vec![&PciRoot(layout), &Chipset, &SerialPort, &Clock, &PanicNotifier])
        .to_aml_bytes(&mut body);
    // Types for PM1a_CNT and PM1b_CNT, and two reserved values (7.4.2).
    let s5: Vec<&dyn Aml> = vec![&ports::SLEEP_TYPE_S5, &ZERO, &ZERO, &ZERO];
    Name::new("_S5_".into(), &Package::new(s5)).to_aml_bytes(&mut body);
    let mut dsdt = Sdt::new(*b"DSDT", HEADER, 2, OEM, TABLE, REVISION);
    dsdt.append_slice(&body);
    dsdt
}

/// An ISA port range as a resource.
fn io(range: Range) -> IO {
    IO::new(range.base as u16, range.base as u16, 1, range.len as u8)
}

/// The PCI host bridge of bus 0. It has no `_PRT`, since no function has an interrupt pin: all use MSI-X.
struct PciRoot<'a>(&'a Layout);

impl Aml for PciRoot<'_> {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        let low = WINDOW_32;
        let high = self.0.window_64();
        let memory = AddressSpaceCacheable::NotCacheable;
        Device::new(
            "PCI0".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0A08")),
                &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
                &Name::new("_SEG".into(), &ZERO),
                &Name::new("_BBN".into(), &ZERO),
                &Name::new("_UID".into(), &ZERO),
                &Name::new(
                    "_CRS".into(),
                    &ResourceTemplate::new(vec![
                        &AddressSpace::new_bus_number(0_u16, 0_u16),
                        &IO::new(0xcf8, 0xcf8, 1, 8),
                        &AddressSpace::new_memory(
                            memory,
                            true,
                            low.base as u32,
                            (low.base + low.len - 1) as u32,
                            None,
                        ),
                        &AddressSpace::new_memory(memory, true, high.base, high.base + high.len - 1, None),
                    ]),
                ),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// What the chipset occupies beside its devices: without it, an operating system does not trust MCFG.
struct Chipset;

impl Aml for Chipset {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        Device::new(
            "MBRD".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0C02")),
                &Name::new("_UID".into(), &ZERO),
                &Name::new(
                    "_CRS".into(),
                    &ResourceTemplate::new(vec![
                        &Memory32Fixed::new(true, ECAM.base as u32, ECAM.len as u32),
                        &io(ports::PM),
                    ]),
                ),
            ],
        )
        .to_aml_bytes(sink);
    }
}

struct SerialPort;

impl Aml for SerialPort {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        Device::new(
            "COM1".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0501")),
                &Name::new("_UID".into(), &ZERO),
                &Name::new(
                    "_CRS".into(),
                    &ResourceTemplate::new(vec![
                        &io(ports::SERIAL),
                        &Interrupt::new(true, true, false, false, ports::SERIAL_IRQ),
                    ]),
                ),
            ],
        )
        .to_aml_bytes(sink);
    }
}

struct Clock;

impl Aml for Clock {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        Device::new(
            "RTC_".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0B00")),
                &Name::new(
                    "_CRS".into(),
                    &ResourceTemplate::new(vec![
                        &io(ports::RTC),
                        &Interrupt::new(true, true, false, false, ports::RTC_IRQ),
                    ]),
                ),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// The device by which a guest's kernel reports its panic.
struct PanicNotifier;

impl Aml for PanicNotifier {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        Device::new(
            "PEVT".into(),
            vec![
                &Name::new("_HID".into(), &ports::PVPANIC_HID),
                &Name::new("_STA".into(), &PRESENT),
                &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&io(ports::PVPANIC)])),
            ],
        )
        .to_aml_bytes(sink);
    }
}
