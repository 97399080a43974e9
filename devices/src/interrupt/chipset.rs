//! The interrupt controllers that a machine has one of, wired as on a PC: I/O APIC, PIC and PIT.
//!
//! It stands on the console node. What it sends are [`Message`](super::Message)s to local APICs, which are where
//! their vCPUs run, and the PIC's output, which is LINT0 of the bootstrap processor.

use serde::{Deserialize, Serialize};

use super::io_apic::{IoApic, Messages};
use super::pic::{self, Pic};
use super::pit::{self, Pit};
use super::time::Nanos;

/// The global system interrupt of the timer: ISA interrupt 0, as the MADT's interrupt source override says.
const TIMER: u8 = 2;

/// I/O APIC, PIC and PIT. After each event its caller asks [`Chipset::advance`], [`Chipset::deadline`] and
/// [`Chipset::intr`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Chipset {
    io_apic: IoApic,
    pic: Pic,
    pit: Pit,
}

impl Chipset {
    /// The state of power-up. Lines stay as they are.
    pub fn reset(&mut self) {
        self.io_apic.reset();
        self.pic.reset();
        self.pit.reset();
    }

    /// The I/O APIC: accesses to its page, EOIs, and what becomes of its messages.
    pub fn io_apic(&mut self) -> &mut IoApic {
        &mut self.io_apic
    }

    /// Line `gsi` goes high or low. It is a pin of the I/O APIC, and up to 15 one of the PIC.
    #[must_use]
    pub fn set_line(&mut self, gsi: u8, high: bool) -> Messages {
        match gsi {
            TIMER => self.pic.set_line(0, high),
            0 | 16.. => {}
            irq => self.pic.set_line(irq, high),
        }
        self.io_apic.set_pin(gsi, high).into_iter().collect()
    }

    /// Lets the timer interrupt if it is due, or if an access came across it.
    #[must_use]
    pub fn advance(&mut self, now: Nanos) -> Messages {
        let mut messages = Messages::new();
        if self.pit.advance(now) {
            messages.extend(self.set_line(TIMER, true));
            messages.extend(self.set_line(TIMER, false));
        }
        messages
    }

    /// When [`Self::advance`] has something to do.
    #[must_use]
    pub fn deadline(&self) -> Option<Nanos> {
        self.pit.deadline()
    }

    /// The PIC's output.
    #[must_use]
    pub fn intr(&self) -> bool {
        self.pic.output()
    }

    /// The bootstrap processor takes an external interrupt: its vector.
    pub fn acknowledge(&mut self) -> u8 {
        self.pic.acknowledge()
    }

    /// A read of a byte at `address` of the port bus; `None` if it is not of these devices.
    pub fn read_port(&mut self, address: u64, now: Nanos) -> Option<u8> {
        if let Some(port) = pic::Port::at(address) {
            return Some(self.pic.read(port));
        }
        pit::Port::at(address).map(|port| self.pit.read(port, now))
    }

    /// A write of a byte at `address` of the port bus; `false` if it is not of these devices.
    pub fn write_port(&mut self, address: u64, value: u8, now: Nanos) -> bool {
        if let Some(port) = pic::Port::at(address) {
            self.pic.write(port, value);
        } else if let Some(port) = pit::Port::at(address) {
            self.pit.write(port, value, now);
        } else {
            return false;
        }
        true
    }
}

#[cfg(test)]
#[path = "machine_test.rs"]
mod tests;
