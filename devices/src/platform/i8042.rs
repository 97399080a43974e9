//! The 8042 keyboard controller, with nothing plugged in.

use std::sync::Mutex;

use serde::{Deserialize, Serialize};

use super::lock;
use crate::bus::{Action, BusDevice, Outcome};
use crate::lifecycle::{DeviceState, Error, Lifecycle};

const KIND: &str = "i8042";
const VERSION: u32 = 1;

/// The data port, as an offset in the device's range.
const DATA: u64 = 0;
/// Status when read, command when written.
const STATUS: u64 = 4;

/// Status: the output buffer holds a byte for the guest.
const OUTPUT_FULL: u8 = 1 << 0;
/// Status: the controller passed its self-test.
const SYSTEM: u8 = 1 << 2;
/// Status: the last write went to the command port.
const COMMAND: u8 = 1 << 3;
/// Status: the keyboard is not locked.
const UNLOCKED: u8 = 1 << 4;

/// Output port: 0 holds the processor in reset.
const OUT_RESET: u8 = 1 << 0;
/// Output port: the A20 gate is open. It always is; the bit only remembers what was asked.
const OUT_A20: u8 = 1 << 1;

/// Command byte at power-on: both ports disabled, no interrupts, system flag.
const CTR_INITIAL: u8 = 0x34;

/// The controller (IBM PC AT technical reference, 1-42 to 1-59) answers its own commands, so a driver that
/// probes it ends at once; no keyboard or mouse is there. Pulsing the reset line resets the machine.
#[derive(Debug)]
pub struct I8042(Mutex<State>);

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    /// The command byte.
    ctr: u8,
    /// The output port.
    port: u8,
    /// A byte that the guest has not read yet.
    output: Option<u8>,
    /// A command that waits for its parameter on the data port.
    command: Option<u8>,
    /// Whether the last write went to the command port.
    after_command: bool,
}

impl State {
    fn initial() -> Self {
        Self {
            ctr: CTR_INITIAL,
            port: OUT_RESET | OUT_A20,
            output: None,
            command: None,
            after_command: false,
        }
    }

    fn status(&self) -> u8 {
        let flag = |set, bit| if set { bit } else { 0 };
        UNLOCKED
            | self.ctr & SYSTEM
            | flag(self.output.is_some(), OUTPUT_FULL)
            | flag(self.after_command, COMMAND)
    }

    fn command(&mut self, command: u8) -> Outcome {
        self.after_command = true;
        self.command = None;
        match command {
            0x20 => self.output = Some(self.ctr),
            0xaa => {
                self.ctr |= SYSTEM;
                self.output = Some(0x55); // self-test passed
            }
            0xa7 => self.ctr |= 0x20,         // disable the mouse port
            0xa8 => self.ctr &= !0x20,        // enable it
            0xa9 => self.output = Some(0x01), // its clock line is stuck low: nobody there
            0xab => self.output = Some(0x00), // the keyboard's lines are fine
            0xad => self.ctr |= 0x10,         // disable the keyboard port
            0xae => self.ctr &= !0x10,        // enable it
            0xc0 => self.output = Some(0x80), // input port: not locked
            0xd0 => self.output = Some(self.port),
            0x60 | 0xd1..=0xd4 => self.command = Some(command),
            // Pulse output lines low: the lower four bits say which are not pulsed.
            0xf0..=0xff if command & OUT_RESET == 0 => return Outcome::Act(Action::Reset),
            _ => {}
        }
        Outcome::Done
    }

    fn data(&mut self, byte: u8) -> Outcome {
        self.after_command = false;
        match self.command.take() {
            Some(0x60) => self.ctr = byte,
            Some(0xd1) => {
                if byte & OUT_RESET == 0 {
                    return Outcome::Act(Action::Reset);
                }
                self.port = byte;
            }
            Some(0xd2) => self.output = Some(byte), // as if the keyboard had sent it
            // To a keyboard or mouse: nobody answers.
            _ => {}
        }
        Outcome::Done
    }
}

impl Default for I8042 {
    fn default() -> Self {
        Self(Mutex::new(State::initial()))
    }
}

impl BusDevice for I8042 {
    fn read(&self, offset: u64, data: &mut [u8]) -> Outcome {
        data.fill(0xff);
        if let [byte, ..] = data {
            let mut state = lock(&self.0);
            match offset {
                DATA => *byte = state.output.take().unwrap_or(0),
                STATUS => *byte = state.status(),
                _ => {}
            }
        }
        Outcome::Done
    }

    fn write(&self, offset: u64, data: &[u8]) -> Outcome {
        match (offset, data) {
            (DATA, [byte, ..]) => lock(&self.0).data(*byte),
            (STATUS, [byte, ..]) => lock(&self.0).command(*byte),
            _ => Outcome::Done,
        }
    }
}

impl Lifecycle for I8042 {
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
        DeviceState::of(KIND, VERSION, &*lock(&self.0))
    }

    fn restore(&self, state: &DeviceState) -> Result<(), Error> {
        *lock(&self.0) = state.value(KIND, VERSION)?;
        Ok(())
    }

    fn reset(&self) -> Result<(), Error> {
        *lock(&self.0) = State::initial();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(device: &I8042, offset: u64) -> u8 {
        let mut byte = [0];
        device.read(offset, &mut byte);
        byte[0]
    }

    fn ask(device: &I8042, command: u8) -> Option<u8> {
        device.write(STATUS, &[command]);
        (read(device, STATUS) & OUTPUT_FULL != 0).then(|| read(device, DATA))
    }

    #[test]
    fn a_probing_driver_gets_its_answers_at_once_and_finds_nobody_plugged_in() {
        let device = I8042::default();
        assert_eq!(read(&device, STATUS) & OUTPUT_FULL, 0, "nothing to flush");
        assert_eq!(ask(&device, 0x20), Some(CTR_INITIAL));
        assert_eq!(ask(&device, 0xaa), Some(0x55), "the self-test passes");
        device.write(STATUS, &[0x60]);
        device.write(DATA, &[0x65]);
        assert_eq!(ask(&device, 0x20), Some(0x65), "the command byte reads as written");
        assert_ne!(ask(&device, 0xa9), Some(0), "the mouse port's test fails");
        device.write(DATA, &[0xff]);
        assert_eq!(read(&device, STATUS) & OUTPUT_FULL, 0, "no keyboard answers a reset");
    }

    #[test]
    fn pulsing_the_reset_line_resets_and_pulsing_nothing_does_not() {
        let device = I8042::default();
        assert_eq!(
            read(&device, STATUS) & 0x02,
            0,
            "the input buffer is empty: Linux's kb_wait ends at once"
        );
        assert!(matches!(device.write(STATUS, &[0xfe]), Outcome::Act(Action::Reset)));
        assert!(matches!(device.write(STATUS, &[0xff]), Outcome::Done));
        device.write(STATUS, &[0xd1]);
        assert!(matches!(device.write(DATA, &[0xdf]), Outcome::Done), "A20 on, reset line high");
        assert_eq!(ask(&device, 0xd0), Some(0xdf));
        device.write(STATUS, &[0xd1]);
        assert!(matches!(device.write(DATA, &[0xde]), Outcome::Act(Action::Reset)));
    }

    #[test]
    fn a_half_given_command_survives_save_and_restore_and_not_a_reset() {
        let device = I8042::default();
        device.write(STATUS, &[0x60]);
        let state = device.save().expect("it saves");
        device.reset().expect("it resets");
        assert_eq!(*lock(&device.0), State::initial());
        device.restore(&state).expect("it restores");
        device.write(DATA, &[0x47]);
        assert_eq!(ask(&device, 0x20), Some(0x47));
    }

    #[test]
    fn any_access_of_any_size_is_harmless() {
        let device = I8042::default();
        for offset in [0, 1, 2, 3, 4, 5, u64::MAX] {
            for len in [0, 1, 2, 4, 8, 64] {
                device.read(offset, &mut vec![0; len]);
                device.write(offset, &vec![0xd1; len]);
            }
        }
    }
}
