//! A PC's pair of interrupt controllers, as a value: two 8259A, the second cascaded to IR2 of the first, with the
//! edge/level registers (ELCR) that EISA brought.

mod chip;

use serde::{Deserialize, Serialize};

use chip::Chip;

/// The input of the first chip that the second one is cascaded to.
const CASCADE: u8 = 2;
/// Which inputs can be level-triggered: not the timer's, the keyboard's, the cascade's, the clock's and the
/// coprocessor's (Intel 82371AB data sheet, "ELCR1" and "ELCR2").
const ELCR: [u8; 2] = [0xf8, 0xde];

/// Where the pair answers on the port bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Port {
    /// 0x20 and 0xa0 (`odd` is false), 0x21 and 0xa1.
    Chip {
        /// Which chip.
        second: bool,
        /// Its A0.
        odd: bool,
    },
    /// 0x4d0 and 0x4d1.
    Elcr {
        /// Which chip's.
        second: bool,
    },
}

impl Port {
    /// The register at an address of the port bus.
    #[must_use]
    pub fn at(address: u64) -> Option<Self> {
        Some(match address {
            0x20 | 0x21 => Self::Chip { second: false, odd: address & 1 != 0 },
            0xa0 | 0xa1 => Self::Chip { second: true, odd: address & 1 != 0 },
            0x4d0 | 0x4d1 => Self::Elcr { second: address & 1 != 0 },
            _ => return None,
        })
    }
}

/// The pair. After each event [`Pic::output`] says what LINT0 of the bootstrap processor is to be.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pic {
    chips: [Chip; 2],
}

impl Pic {
    /// The state of power-up: all masked. The lines stay as they are.
    pub fn reset(&mut self) {
        self.chips.iter_mut().for_each(Chip::reset);
        self.cascade();
    }

    /// Line `irq`, 0 to 15, goes high or low. There is no line 2.
    pub fn set_line(&mut self, irq: u8, high: bool) {
        match irq {
            CASCADE | 16.. => {}
            0..8 => self.chips[0].set_line(irq, high),
            8..16 => self.chips[1].set_line(irq - 8, high),
        }
        self.cascade();
    }

    /// The second chip's output is the first one's input, as a level: it is gone when the second has nothing more.
    fn cascade(&mut self) {
        let output = self.chips[1].output();
        self.chips[0].set_cascade(CASCADE, output);
    }

    /// The INTR output.
    #[must_use]
    pub fn output(&self) -> bool {
        self.chips[0].output()
    }

    /// The processor acknowledges: the vector to take. There is always one; without a request it is that of IR7 of
    /// the chip that was asked.
    pub fn acknowledge(&mut self) -> u8 {
        let (level, real) = self.chips[0].acknowledge();
        let vector = if real && self.chips[0].cascades(level) && level == CASCADE {
            let (level, _) = self.chips[1].acknowledge();
            self.chips[1].vector(level)
        } else {
            self.chips[0].vector(level)
        };
        self.cascade();
        vector
    }

    /// A read of a register.
    pub fn read(&mut self, port: Port) -> u8 {
        let value = match port {
            Port::Chip { second, odd } => self.chips[usize::from(second)].read(odd),
            Port::Elcr { second } => self.chips[usize::from(second)].level(),
        };
        self.cascade(); // a poll acknowledges
        value
    }

    /// A write of a register.
    pub fn write(&mut self, port: Port, value: u8) {
        match port {
            Port::Chip { second, odd } => self.chips[usize::from(second)].write(odd, value),
            Port::Elcr { second } => {
                let chip = usize::from(second);
                self.chips[chip].set_level(value & ELCR[chip]);
            }
        }
        self.cascade();
    }
}

#[cfg(test)]
#[path = "pic_test.rs"]
mod tests;
