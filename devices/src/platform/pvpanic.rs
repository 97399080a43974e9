//! The ISA pvpanic device: one port by which a guest's kernel says that it has panicked.

use crate::bus::{Action, BusDevice, Outcome};
use crate::lifecycle::{DeviceState, Error, Lifecycle};

const KIND: &str = "pvpanic";
const VERSION: u32 = 1;

/// The kernel has panicked.
const PANICKED: u8 = 1 << 0;
/// The kernel has panicked and runs its crash kernel: it goes on by itself.
const CRASH_LOADED: u8 = 1 << 1;

/// The pvpanic device (QEMU's `docs/specs/pvpanic`): a read says which events it knows, a write reports one.
#[derive(Debug, Default)]
pub struct Pvpanic;

impl BusDevice for Pvpanic {
    fn read(&self, offset: u64, data: &mut [u8]) -> Outcome {
        data.fill(0xff);
        if let (0, [events, ..]) = (offset, data) {
            *events = PANICKED | CRASH_LOADED;
        }
        Outcome::Done
    }

    fn write(&self, offset: u64, data: &[u8]) -> Outcome {
        match (offset, data) {
            (0, [event, ..]) if event & PANICKED != 0 => Outcome::Act(Action::Panic),
            _ => Outcome::Done,
        }
    }
}

/// It has no state: an empty value is saved, so that the layout may grow.
impl Lifecycle for Pvpanic {
    fn kind(&self) -> &'static str {
        KIND
    }

    fn start(&self) -> Result<(), Error> {
        Ok(())
    }

    fn stop(&self) -> Result<(), Error> {
        Ok(())
    }

    fn save(&self) -> Result<DeviceState, Error> {
        DeviceState::of(KIND, VERSION, &())
    }

    fn restore(&self, state: &DeviceState) -> Result<(), Error> {
        state.value(KIND, VERSION)
    }

    fn reset(&self) -> Result<(), Error> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_ends_the_guest_and_a_loaded_crash_kernel_does_not() {
        let mut events = [0];
        Pvpanic.read(0, &mut events);
        assert_eq!(events, [3], "bits 0 and 1: panicked, crash kernel loaded");
        assert!(matches!(Pvpanic.write(0, &[1]), Outcome::Act(Action::Panic)));
        assert!(matches!(Pvpanic.write(0, &[2]), Outcome::Done));
        assert!(matches!(Pvpanic.write(0, &[]), Outcome::Done));
        assert!(matches!(Pvpanic.write(7, &[1]), Outcome::Done));
    }
}
