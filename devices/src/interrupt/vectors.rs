//! Sets of interrupt vectors, as the registers ISR, TMR and IRR hold them.

use serde::{Deserialize, Serialize};

/// The lowest vector that an interrupt may have; those below are the processor's exceptions' (Intel SDM vol. 3A,
/// "Valid Interrupt Vectors").
pub const LOWEST_VECTOR: u8 = 16;

/// A priority class: bits 7:4 of a vector or of a priority register (Intel SDM vol. 3A, "Interrupt, Task, and
/// Processor Priority").
#[must_use]
pub fn class(vector: u8) -> u8 {
    vector >> 4
}

/// A set of the 256 vectors, 32 to a register.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vectors([u32; 8]);

impl Vectors {
    /// Whether `vector` is in the set.
    #[must_use]
    pub fn contains(&self, vector: u8) -> bool {
        self.0[usize::from(vector / 32)] & (1 << (vector % 32)) != 0
    }

    /// Puts `vector` in or takes it out.
    pub fn set(&mut self, vector: u8, present: bool) {
        let register = &mut self.0[usize::from(vector / 32)];
        let bit = 1 << (vector % 32);
        *register = if present { *register | bit } else { *register & !bit };
    }

    /// The highest vector of the set, which is the one of the highest priority.
    #[must_use]
    pub fn highest(&self) -> Option<u8> {
        let (at, register) = self.0.iter().enumerate().rev().find(|(_, register)| **register != 0)?;
        Some((at as u8) * 32 + register.ilog2() as u8)
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> u32 {
        self.0.iter().map(|register| register.count_ones()).sum()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0 == [0; 8]
    }

    /// The 32 vectors from `32 * index` on, as the guest reads them; 0 where there is no such register.
    #[must_use]
    pub fn register(&self, index: usize) -> u32 {
        self.0.get(index).copied().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_highest_vector_is_found_in_whichever_register_it_is() {
        let mut set = Vectors::default();
        assert_eq!(set.highest(), None);
        for vector in [0, 31, 32, 64, 200, 255] {
            set.set(vector, true);
            assert_eq!(set.highest(), Some(vector));
            assert!(set.contains(vector));
        }
        assert_eq!((set.len(), set.register(0), set.register(8)), (6, 0x8000_0001, 0));
        set.set(255, false);
        assert_eq!(set.highest(), Some(200));
    }
}
