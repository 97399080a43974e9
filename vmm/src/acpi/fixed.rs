//! The FADT (5.2.9): the fixed registers, and what the machine does not have.

use acpi_tables::fadt::{FADT, FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use devices::bus::Range;
use devices::platform::{ports, rtc};

use super::{OEM, REVISION, TABLE};

/// `IAPC_BOOT_ARCH`: there are ISA devices.
const LEGACY_DEVICES: u16 = 1 << 0;
/// `IAPC_BOOT_ARCH`: there is no VGA; do not look for one.
const NO_VGA: u16 = 1 << 2;
// The bit for a keyboard controller stays clear: the machine has only its reset line, and a guest that
// looks for keyboards there waits long.

pub(super) fn fadt(facs: u32, dsdt: u64) -> FADT {
    let mut fadt = FADTBuilder::new(OEM, TABLE, REVISION)
        .preferred_pm_profile(PmProfile::Desktop)
        .firmware_ctrl_32(facs)
        .dsdt_64(dsdt)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::TmrValExt)
        .flag(Flags::ResetRegSup);
    fadt.sci_int = (ports::SCI_IRQ as u16).into();
    fadt.pm1a_evt_blk = (ports::PM1A_EVENT.base as u32).into();
    fadt.pm1_evt_len = ports::PM1A_EVENT.len as u8;
    fadt.pm1a_cnt_blk = (ports::PM1A_CONTROL.base as u32).into();
    fadt.pm1_cnt_len = ports::PM1A_CONTROL.len as u8;
    fadt.pm_tmr_blk = (ports::PM_TIMER.base as u32).into();
    fadt.pm_tmr_len = ports::PM_TIMER.len as u8;
    fadt.x_pm1a_evt_blk = port(ports::PM1A_EVENT, AccessSize::WordAccess);
    fadt.x_pm1a_cnt_blk = port(ports::PM1A_CONTROL, AccessSize::WordAccess);
    fadt.x_pm_tmr_blk = port(ports::PM_TIMER, AccessSize::DwordAccess);
    // Latencies above these limits say that C2 and C3 do not exist.
    fadt.p_lvl2_lat = 101.into();
    fadt.p_lvl3_lat = 1001.into();
    fadt.century = rtc::CENTURY;
    fadt.iapc_boot_arch = (LEGACY_DEVICES | NO_VGA).into();
    fadt.reset_reg = port(ports::RESET, AccessSize::ByteAccess);
    fadt.reset_value = ports::RESET_VALUE;
    fadt.finalize()
}

fn port(range: Range, access: AccessSize) -> GAS {
    GAS::new(AddressSpace::SystemIo, (range.len * 8) as u8, 0, access, range.base)
}
