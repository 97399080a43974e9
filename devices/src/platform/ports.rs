//! Where the platform devices stand on the port bus, and which interrupts they raise.

use crate::bus::Range;

/// The 8042 keyboard controller: data at 0x60, status and command at 0x64. The ports between belong to
/// nobody (0x61 is the in-kernel timer's, which answers before this bus is asked).
pub const I8042: Range = Range { base: 0x60, len: 5 };
/// CMOS RAM and clock: index at 0x70, data at 0x71.
pub const RTC: Range = Range { base: 0x70, len: 2 };
/// System control port A: fast A20 and fast reset.
pub const SYSTEM_CONTROL_A: Range = Range { base: 0x92, len: 1 };
/// The first serial port, COM1.
pub const SERIAL: Range = Range { base: 0x3f8, len: 8 };
/// The ISA pvpanic device.
pub const PVPANIC: Range = Range { base: 0x505, len: 1 };
/// Everything of [`Pm`](super::Pm): the blocks below lie inside.
pub const PM: Range = Range { base: 0x600, len: 0x10 };
/// ACPI `PM1a_EVT_BLK`: status and enable, two bytes each.
pub const PM1A_EVENT: Range = Range { base: PM.base, len: 4 };
/// ACPI `PM1a_CNT_BLK`.
pub const PM1A_CONTROL: Range = Range { base: PM.base + 4, len: 2 };
/// ACPI `PM_TMR_BLK`; all 32 bits count (`TMR_VAL_EXT`).
pub const PM_TIMER: Range = Range { base: PM.base + 8, len: 4 };
/// The chipset's reset control register, which is ACPI's `RESET_REG` too. It lies inside the PCI
/// configuration address register 0xcf8 to 0xcfb: put it on the bus as its own range and let the PCI
/// host take 4-byte accesses to 0xcf8 only.
pub const RESET: Range = Range { base: 0xcf9, len: 1 };

/// What ACPI's `RESET_VALUE` writes to [`RESET`].
pub const RESET_VALUE: u8 = 0x06;
/// `SLP_TYPa` of `\_S5`: what the guest writes to power itself off.
pub const SLEEP_TYPE_S5: u8 = 5;
/// The ACPI hardware id by which Linux and Windows drivers know the pvpanic device.
pub const PVPANIC_HID: &str = "QEMU0001";

/// The serial port's line: edge-triggered.
pub const SERIAL_IRQ: u32 = 4;
/// The clock's line, which nothing raises yet.
pub const RTC_IRQ: u32 = 8;
/// The ACPI system control interrupt: level-triggered, active high (say so in the MADT).
pub const SCI_IRQ: u32 = 9;
