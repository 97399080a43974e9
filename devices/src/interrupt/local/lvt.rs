//! The local vector table (Intel SDM vol. 3A, "Local Vector Table").

use serde::{Deserialize, Serialize};

use crate::interrupt::message::{Delivery, Trigger};

/// Bit 12 is the delivery status, which is always idle; bit 14 is the Remote IRR.
pub(super) const REMOTE_IRR: u32 = 1 << 14;
pub(super) const MASKED: u32 = 1 << 16;
const ACTIVE_LOW: u32 = 1 << 13;
const LEVEL: u32 = 1 << 15;

/// A row of the table, in the order of the registers from 320H on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    Timer,
    Thermal,
    Performance,
    Lint0,
    Lint1,
    Error,
}

/// How many rows there are; "Max LVT Entry" in the version register is one less.
pub(super) const ROWS: usize = 6;

impl Source {
    /// The row of register `offset`.
    pub(super) fn at(offset: u32) -> Option<Self> {
        Some(match offset {
            0x320 => Self::Timer,
            0x330 => Self::Thermal,
            0x340 => Self::Performance,
            0x350 => Self::Lint0,
            0x360 => Self::Lint1,
            0x370 => Self::Error,
            _ => return None,
        })
    }

    /// The bits that can be written.
    fn writable(self) -> u32 {
        match self {
            Self::Timer => 0x7_00ff,
            Self::Thermal | Self::Performance => 0x1_07ff,
            Self::Lint0 | Self::Lint1 => 0x1_a7ff,
            Self::Error => 0x1_00ff,
        }
    }
}

/// The six registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Lvt([u32; ROWS]);

/// What a row says is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) vector: u8,
    pub(super) delivery: Option<Delivery>,
    pub(super) masked: bool,
    pub(super) active_low: bool,
    pub(super) trigger: Trigger,
    pub(super) remote_irr: bool,
}

impl Default for Lvt {
    /// All masked, as after power-up.
    fn default() -> Self {
        Self([MASKED; ROWS])
    }
}

impl Lvt {
    pub(super) fn read(&self, source: Source) -> u32 {
        self.0[source as usize]
    }

    /// Writes what can be written; while software has disabled the APIC the mask stays set.
    pub(super) fn write(&mut self, source: Source, value: u32, enabled: bool) {
        let register = &mut self.0[source as usize];
        *register = (*register & REMOTE_IRR) | (value & source.writable());
        if !enabled {
            *register |= MASKED;
        }
        if *register & LEVEL == 0 {
            *register &= !REMOTE_IRR;
        }
    }

    pub(super) fn mask(&mut self, source: Source) {
        self.0[source as usize] |= MASKED;
    }

    pub(super) fn mask_all(&mut self) {
        self.0.iter_mut().for_each(|register| *register |= MASKED);
    }

    pub(super) fn set_remote_irr(&mut self, source: Source, on: bool) {
        let register = &mut self.0[source as usize];
        *register = if on { *register | REMOTE_IRR } else { *register & !REMOTE_IRR };
    }

    /// What the row says. LINT0 alone can be level-triggered, and only in mode Fixed; timer and error rows have
    /// no delivery mode and are Fixed.
    pub(super) fn entry(&self, source: Source) -> Entry {
        let value = self.read(source);
        let delivery = Delivery::in_pin(value >> 8).filter(|mode| match mode {
            Delivery::Fixed | Delivery::Smi | Delivery::Nmi => true,
            Delivery::Init | Delivery::External => matches!(source, Source::Lint0 | Source::Lint1),
            Delivery::LowestPriority | Delivery::StartUp => false,
        });
        let level = source == Source::Lint0 && value & LEVEL != 0 && delivery == Some(Delivery::Fixed);
        Entry {
            vector: value as u8,
            delivery,
            masked: value & MASKED != 0,
            active_low: value & ACTIVE_LOW != 0,
            trigger: if level { Trigger::Level } else { Trigger::Edge },
            remote_irr: value & REMOTE_IRR != 0,
        }
    }
}
