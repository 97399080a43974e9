//! One 8259A (Intel 8259A data sheet; 8086 mode).

use serde::{Deserialize, Serialize};

/// What the next write to the odd address is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Expects {
    #[default]
    Ocw1,
    Icw2,
    Icw3,
    Icw4,
}

/// OCW2, "rotate".
const ROTATE: u8 = 1 << 7;
/// OCW2, "specific level".
const SPECIFIC: u8 = 1 << 6;
/// OCW2, "end of interrupt".
const EOI: u8 = 1 << 5;

/// An 8259A. Requests are bits; bit 0 is IR0.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Chip {
    irr: u8,
    isr: u8,
    imr: u8,
    /// The inputs.
    lines: u8,
    /// ELCR: which inputs are level-triggered.
    level: u8,
    /// The vector of IR0: ICW2's upper five bits.
    base: u8,
    /// The level of the lowest priority: 7 unless rotated.
    lowest: u8,
    /// ICW1 asked for an ICW4, and said that there is no cascade.
    wants_icw4: bool,
    single: bool,
    expects: Expects,
    icw3: u8,
    automatic_eoi: bool,
    rotate_on_automatic_eoi: bool,
    special_fully_nested: bool,
    special_mask: bool,
    /// A read of the even address gives ISR instead of IRR.
    reads_isr: bool,
    /// The next read is a poll.
    poll: bool,
}

impl Default for Chip {
    /// As firmware leaves it that uses no interrupts: all masked.
    fn default() -> Self {
        Self {
            irr: 0,
            isr: 0,
            imr: 0xff,
            lines: 0,
            level: 0,
            base: 0,
            lowest: 7,
            wants_icw4: false,
            single: false,
            expects: Expects::Ocw1,
            icw3: 0,
            automatic_eoi: false,
            rotate_on_automatic_eoi: false,
            special_fully_nested: false,
            special_mask: false,
            reads_isr: false,
            poll: false,
        }
    }
}

impl Chip {
    /// The state of power-up. The inputs stay as they are.
    pub(super) fn reset(&mut self) {
        *self = Self { lines: self.lines, ..Self::default() };
    }

    pub(super) fn level(&self) -> u8 {
        self.level
    }

    /// Makes the inputs in `level` level-triggered, the others edge-triggered.
    pub(super) fn set_level(&mut self, level: u8) {
        let changed = self.level ^ level;
        self.level = level;
        self.irr = (self.irr & !changed) | (changed & level & self.lines);
    }

    /// An input's level. An edge is remembered though the input falls again before it is acknowledged (the
    /// data sheet would have it stay), so that a pulse is never lost.
    pub(super) fn set_line(&mut self, line: u8, high: bool) {
        let bit = 1 << (line & 7);
        let rose = high && self.lines & bit == 0;
        self.lines = if high { self.lines | bit } else { self.lines & !bit };
        if self.level & bit != 0 {
            self.irr = (self.irr & !bit) | (self.lines & bit);
        } else if rose {
            self.irr |= bit;
        }
    }

    /// The input that the other chip's output is wired to: the request follows it, whatever ELCR says.
    pub(super) fn set_cascade(&mut self, line: u8, high: bool) {
        let bit = 1 << (line & 7);
        let set = |bits: u8| if high { bits | bit } else { bits & !bit };
        (self.lines, self.irr) = (set(self.lines), set(self.irr));
    }

    /// The first of `levels` in the order of priority, as its distance from the highest.
    fn first(&self, levels: u8) -> Option<u8> {
        let rotated = levels.rotate_right(u32::from(self.lowest & 7) + 1);
        (rotated != 0).then(|| rotated.trailing_zeros() as u8)
    }

    fn at(&self, distance: u8) -> u8 {
        (self.lowest.wrapping_add(1).wrapping_add(distance)) & 7
    }

    /// The levels in service that inhibit others: not those that are masked, in special mask mode.
    fn inhibiting(&self) -> u8 {
        if self.special_mask { self.isr & !self.imr } else { self.isr }
    }

    /// The level whose request is to be served now (data sheet, "Fully Nested Mode" and "Special Mask Mode").
    fn served(&self) -> Option<u8> {
        let request = self.first(self.irr & !self.imr)?;
        // The cascade's input is served again while it is in service: its chip has its own priorities.
        let again = if self.special_fully_nested { self.icw3 } else { 0 };
        let allowed = self.first(self.inhibiting()).is_none_or(|in_service| {
            request < in_service || (request == in_service && again & (1 << self.at(request)) != 0)
        });
        allowed.then(|| self.at(request))
    }

    /// The INT output.
    pub(super) fn output(&self) -> bool {
        self.served().is_some()
    }

    /// An INTA cycle: the level, and whether there was a request at all. Without one it is IR7, which is not in
    /// service then (data sheet, "default IR7").
    pub(super) fn acknowledge(&mut self) -> (u8, bool) {
        let Some(level) = self.served() else { return (7, false) };
        let bit = 1 << level;
        if self.level & bit == 0 {
            self.irr &= !bit;
        }
        if !self.automatic_eoi {
            self.isr |= bit;
        } else if self.rotate_on_automatic_eoi {
            self.lowest = level;
        }
        (level, true)
    }

    pub(super) fn vector(&self, level: u8) -> u8 {
        self.base & 0xf8 | level & 7
    }

    /// Whether a chip is cascaded to `line` (ICW3).
    pub(super) fn cascades(&self, line: u8) -> bool {
        !self.single && self.icw3 & (1 << (line & 7)) != 0
    }

    /// A read of the even address (A0 = 0), or of the odd one.
    pub(super) fn read(&mut self, odd: bool) -> u8 {
        if std::mem::take(&mut self.poll) {
            return match self.acknowledge() {
                (level, true) => 0x80 | level,
                (_, false) => 0,
            };
        }
        match (odd, self.reads_isr) {
            (true, _) => self.imr,
            (false, true) => self.isr,
            (false, false) => self.irr,
        }
    }

    /// A write of the even address (A0 = 0), or of the odd one.
    pub(super) fn write(&mut self, odd: bool, value: u8) {
        if odd {
            self.write_odd(value);
        } else if value & 0x10 != 0 {
            self.initialize(value);
        } else if value & 0x08 != 0 {
            self.ocw3(value);
        } else {
            self.ocw2(value);
        }
    }

    /// ICW1 (data sheet, "Initialization Command Words 1 and 2", items a to f). Triggering is by ELCR, not LTIM.
    fn initialize(&mut self, icw1: u8) {
        *self = Self {
            irr: self.level & self.lines,
            imr: 0,
            lines: self.lines,
            level: self.level,
            base: self.base,
            wants_icw4: icw1 & 1 != 0,
            single: icw1 & 2 != 0,
            expects: Expects::Icw2,
            ..Self::default()
        };
    }

    fn write_odd(&mut self, value: u8) {
        let icw4 = if self.wants_icw4 { Expects::Icw4 } else { Expects::Ocw1 };
        self.expects = match self.expects {
            Expects::Ocw1 => {
                self.imr = value;
                Expects::Ocw1
            }
            Expects::Icw2 => {
                self.base = value & 0xf8;
                if self.single { icw4 } else { Expects::Icw3 }
            }
            Expects::Icw3 => {
                self.icw3 = value;
                icw4
            }
            Expects::Icw4 => {
                self.automatic_eoi = value & 2 != 0;
                self.special_fully_nested = value & 0x10 != 0;
                Expects::Ocw1
            }
        };
    }

    fn ocw2(&mut self, value: u8) {
        let (rotate, specific) = (value & ROTATE != 0, value & SPECIFIC != 0);
        match (value & EOI != 0, specific) {
            (true, true) => {
                self.isr &= !(1 << (value & 7));
                if rotate {
                    self.lowest = value & 7;
                }
            }
            (true, false) => {
                let Some(level) = self.first(self.inhibiting()).map(|distance| self.at(distance)) else {
                    return;
                };
                self.isr &= !(1 << level);
                if rotate {
                    self.lowest = level;
                }
            }
            (false, true) if rotate => self.lowest = value & 7,
            (false, true) => {}
            (false, false) => self.rotate_on_automatic_eoi = rotate,
        }
    }

    fn ocw3(&mut self, value: u8) {
        if value & 0x40 != 0 {
            self.special_mask = value & 0x20 != 0;
        }
        if value & 0x02 != 0 {
            self.reads_isr = value & 0x01 != 0;
        }
        self.poll = value & 0x04 != 0;
    }
}
