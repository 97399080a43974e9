//! The chipset's two other ways to reset a PC: the reset control register and system control port A.

use std::sync::atomic::{AtomicU8, Ordering};

use crate::bus::{Action, BusDevice, Outcome};
use crate::lifecycle::{DeviceState, Error, Lifecycle};

const VERSION: u32 = 1;

/// One readable and writable byte at offset 0.
#[derive(Debug)]
struct Register {
    kind: &'static str,
    initial: u8,
    value: AtomicU8,
}

impl Register {
    fn new(kind: &'static str, initial: u8) -> Self {
        Self { kind, initial, value: AtomicU8::new(initial) }
    }

    fn read(&self, offset: u64, data: &mut [u8]) -> Outcome {
        data.fill(0xff);
        if let (0, [byte, ..]) = (offset, data) {
            *byte = self.value.load(Ordering::Relaxed);
        }
        Outcome::Done
    }

    /// Stores what is written under `mask`; hands back the byte before and the byte written.
    fn write(&self, offset: u64, data: &[u8], mask: u8) -> Option<(u8, u8)> {
        let (0, [byte, ..]) = (offset, data) else { return None };
        Some((self.value.swap(byte & mask, Ordering::Relaxed), *byte))
    }

    fn save(&self) -> Result<DeviceState, Error> {
        DeviceState::of(self.kind, VERSION, &self.value.load(Ordering::Relaxed))
    }

    fn restore(&self, state: &DeviceState) -> Result<(), Error> {
        self.value.store(state.value(self.kind, VERSION)?, Ordering::Relaxed);
        Ok(())
    }

    fn reset(&self) {
        self.value.store(self.initial, Ordering::Relaxed);
    }
}

macro_rules! lifecycle_of_a_register {
    ($device:ty) => {
        impl Lifecycle for $device {
            fn kind(&self) -> &'static str {
                self.0.kind
            }
            fn start(&self) -> Result<(), Error> {
                Ok(())
            }
            fn stop(&self) -> Result<(), Error> {
                Ok(())
            }
            fn save(&self) -> Result<DeviceState, Error> {
                self.0.save()
            }
            fn restore(&self, state: &DeviceState) -> Result<(), Error> {
                self.0.restore(state)
            }
            fn reset(&self) -> Result<(), Error> {
                self.0.reset();
                Ok(())
            }
        }
    };
}

/// The reset control register at port 0xcf9 (Intel ICH9 data sheet, 13.7.5 `RST_CNT`): setting `RST_CPU` resets
/// the machine. It is ACPI's reset register too.
#[derive(Debug)]
pub struct ResetControl(Register);

/// `SYS_RST`: what kind of reset follows.
const SYS_RST: u8 = 1 << 1;
/// `RST_CPU`: a change from 0 to 1 resets.
const RST_CPU: u8 = 1 << 2;
/// `FULL_RST`.
const FULL_RST: u8 = 1 << 3;

impl Default for ResetControl {
    fn default() -> Self {
        Self(Register::new("reset-control", 0))
    }
}

impl BusDevice for ResetControl {
    fn read(&self, offset: u64, data: &mut [u8]) -> Outcome {
        self.0.read(offset, data)
    }

    fn write(&self, offset: u64, data: &[u8]) -> Outcome {
        match self.0.write(offset, data, SYS_RST | FULL_RST) {
            Some((_, byte)) if byte & RST_CPU != 0 => Outcome::Act(Action::Reset),
            _ => Outcome::Done,
        }
    }
}

lifecycle_of_a_register!(ResetControl);

/// System control port A at 0x92 (IBM PS/2): bit 0 resets at once, bit 1 opens the A20 gate. The gate
/// always is open; the bit only remembers what was asked.
#[derive(Debug)]
pub struct SystemControlA(Register);

/// `INIT_NOW`: a change from 0 to 1 resets.
const INIT_NOW: u8 = 1 << 0;
/// `ALT_A20_GATE`.
const A20: u8 = 1 << 1;

impl Default for SystemControlA {
    fn default() -> Self {
        Self(Register::new("system-control-a", A20))
    }
}

impl BusDevice for SystemControlA {
    fn read(&self, offset: u64, data: &mut [u8]) -> Outcome {
        self.0.read(offset, data)
    }

    fn write(&self, offset: u64, data: &[u8]) -> Outcome {
        match self.0.write(offset, data, !INIT_NOW) {
            Some((_, byte)) if byte & INIT_NOW != 0 => Outcome::Act(Action::Reset),
            _ => Outcome::Done,
        }
    }
}

lifecycle_of_a_register!(SystemControlA);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::ports;

    #[test]
    fn the_acpi_reset_value_resets_and_naming_the_kind_of_reset_alone_does_not() {
        let device = ResetControl::default();
        assert!(matches!(device.write(0, &[SYS_RST]), Outcome::Done));
        let mut byte = [0];
        device.read(0, &mut byte);
        assert_eq!(byte, [SYS_RST]);
        assert!(matches!(device.write(0, &[ports::RESET_VALUE]), Outcome::Act(Action::Reset)));
        assert!(matches!(device.write(1, &[0xff]), Outcome::Done));
        assert!(matches!(device.write(0, &[]), Outcome::Done));
    }

    #[test]
    fn port_92_resets_by_bit_0_and_remembers_a20() {
        let device = SystemControlA::default();
        let mut byte = [0];
        device.read(0, &mut byte);
        assert_eq!(byte, [A20], "the gate is open at power-on");
        assert!(matches!(device.write(0, &[0]), Outcome::Done));
        device.read(0, &mut byte);
        assert_eq!(byte, [0]);
        assert!(matches!(device.write(0, &[A20 | INIT_NOW]), Outcome::Act(Action::Reset)));
    }

    #[test]
    fn a_register_is_saved_restored_and_reset() {
        let device = SystemControlA::default();
        device.write(0, &[0xf0]);
        let state = device.save().expect("it saves");
        device.reset().expect("it resets");
        let mut byte = [0];
        device.read(0, &mut byte);
        assert_eq!(byte, [A20]);
        device.restore(&state).expect("it restores");
        device.read(0, &mut byte);
        assert_eq!(byte, [0xf0]);
        assert!(ResetControl::default().restore(&state).is_err(), "another device's state is refused");
    }
}
