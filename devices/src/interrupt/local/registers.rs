//! The 4 KiB page of registers (Intel SDM vol. 3A, "Local APIC Register Address Map").

use super::icr::{self, Unsent};
use super::lvt::{ROWS, Source};
use super::timer::Mode;
use super::{ENABLED, Effects, LocalApic};
use crate::interrupt::time::Now;
use crate::interrupt::vectors::class;

/// ESR, "Send Illegal Vector".
pub(super) const SENT_ILLEGAL_VECTOR: u8 = 1 << 5;
/// ESR, "Receive Illegal Vector".
pub(super) const RECEIVED_ILLEGAL_VECTOR: u8 = 1 << 6;
/// ESR, "Illegal Register Address".
const ILLEGAL_REGISTER: u8 = 1 << 7;

/// An integrated APIC (version 14H) with [`ROWS`] rows of the LVT and no suppression of EOI broadcasts.
const VERSION: u32 = 0x14 | ((ROWS as u32 - 1) << 16);

impl LocalApic {
    /// A read of the page at `offset`, of 1, 2 or 4 bytes within a register; other accesses read as zeros, which
    /// the manual leaves undefined.
    pub fn read(&mut self, offset: u64, data: &mut [u8], now: Now) {
        data.fill(0);
        let Ok(offset) = u32::try_from(offset) else { return };
        let (register, from) = (offset & !0xf, (offset & 0xf) as usize);
        if from + data.len() > 4 {
            return;
        }
        self.advance(now);
        let value = self.read_register(register, now).to_le_bytes();
        data.copy_from_slice(&value[from..from + data.len()]);
    }

    /// A write of the page at `offset`: 4 bytes at the start of a register. Others do nothing.
    #[must_use]
    pub fn write(&mut self, offset: u64, data: &[u8], now: Now) -> Effects {
        let (Ok(offset), Ok(bytes)) = (u32::try_from(offset), data.try_into()) else {
            return Effects::default();
        };
        if !offset.is_multiple_of(16) {
            return Effects::default();
        }
        self.advance(now);
        let effects = self.write_register(offset, u32::from_le_bytes(bytes), now);
        self.advance(now);
        effects
    }

    fn read_register(&mut self, offset: u32, now: Now) -> u32 {
        if let Some(source) = Source::at(offset) {
            return self.lvt.read(source);
        }
        let index = ((offset >> 4) & 7) as usize;
        match offset {
            0x020 => u32::from(self.id.0) << 24,
            0x030 => VERSION,
            0x080 => self.tpr.into(),
            0x090 => self.apr().into(),
            0x0a0 => self.ppr().into(),
            0x0d0 => u32::from(self.ldr) << 24,
            0x0e0 => u32::from(self.dfr) << 28 | 0x0fff_ffff,
            0x0f0 => self.svr,
            0x100..=0x170 => self.isr.register(index),
            0x180..=0x1f0 => self.tmr.register(index),
            0x200..=0x270 => self.irr.register(index),
            0x280 => self.esr.into(),
            0x300 => self.icr as u32,
            0x310 => (self.icr >> 32) as u32,
            0x380 => self.timer.initial(),
            0x390 => self.timer.current(self.timer_mode(), now),
            0x3e0 => self.timer.divide(),
            0x0b0 | 0x0c0 => 0, // EOI is write-only; no APIC since the Pentium 4 has remote read
            _ => {
                self.detect(ILLEGAL_REGISTER);
                0
            }
        }
    }

    fn write_register(&mut self, offset: u32, value: u32, now: Now) -> Effects {
        if let Some(source) = Source::at(offset) {
            self.write_lvt(source, value);
            return Effects::default();
        }
        match offset {
            0x080 => self.tpr = value as u8,
            0x0b0 => return self.end_of_interrupt(),
            0x0d0 => self.ldr = (value >> 24) as u8,
            0x0e0 => self.dfr = (value >> 28) as u8,
            0x0f0 => self.write_svr(value),
            0x280 => self.esr = std::mem::take(&mut self.detected),
            0x300 => return self.send(value),
            0x310 => self.icr = (self.icr & 0xffff_ffff) | (u64::from(value) << 32 & icr::WRITABLE),
            0x380 => self.timer.set_initial(value, self.timer_mode(), now),
            0x3e0 => self.timer.set_divide(value, self.timer_mode(), now),
            // Read-only.
            0x020 | 0x030 | 0x090 | 0x0a0 | 0x0c0 | 0x100..=0x270 | 0x390 => {}
            _ => self.detect(ILLEGAL_REGISTER),
        }
        Effects::default()
    }

    /// The arbitration priority, by the formula of the manual. It decides nothing: arbitration is
    /// [`route`](crate::interrupt::route::route)'s, by task priority, as since the Pentium 4.
    fn apr(&self) -> u8 {
        let in_service = class(self.isr.highest().unwrap_or(0));
        let requested = class(self.irr.highest().unwrap_or(0));
        let task = class(self.tpr);
        if task >= requested && task > in_service {
            self.tpr
        } else {
            (task & in_service).max(requested) << 4
        }
    }

    fn write_svr(&mut self, value: u32) {
        self.svr = value & 0x3ff;
        if self.svr & ENABLED == 0 {
            self.lvt.mask_all();
        }
    }

    fn write_lvt(&mut self, source: Source, value: u32) {
        let mode = self.timer_mode();
        let pin = matches!(source, Source::Lint0 | Source::Lint1);
        let was = pin && self.pin_asserted(source);
        self.lvt.write(source, value, self.enabled());
        if source == Source::Timer {
            self.timer.change_mode(mode, Mode::of(value));
        }
        // Another polarity can be an edge; a level that is asserted counts from now on.
        if pin && !was && self.pin_asserted(source) {
            self.pin_rose(source);
        } else if source == Source::Lint0 {
            self.renew_level();
        }
    }

    fn send(&mut self, low: u32) -> Effects {
        self.icr = (self.icr & !0xffff_ffff) | (u64::from(low) & icr::WRITABLE);
        match icr::message(self.icr, self.id) {
            Ok(message) => Effects { message: Some(message), ..Effects::default() },
            Err(Unsent::IllegalVector) => {
                self.detect(SENT_ILLEGAL_VECTOR);
                Effects::default()
            }
            Err(Unsent::Invalid | Unsent::Deassert) => Effects::default(),
        }
    }
}
