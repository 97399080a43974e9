//! The I/O APIC, as a value (Intel 82093AA data sheet; the EOI register is that of version 0x20).

use serde::{Deserialize, Serialize};
use smallvec::SmallVec;

use super::message::{ApicId, Delivery, Destination, Message, Trigger};

/// How many pins there are.
pub const PINS: usize = 24;

/// Version 0x20, and the number of the last pin.
const VERSION: u32 = 0x20 | ((PINS as u32 - 1) << 16);

/// The redirection entry's bits that are the I/O APIC's own: delivery status (always idle) and Remote IRR.
const REMOTE_IRR: u64 = 1 << 14;
const WRITABLE: u64 = 0xff00_0000_0001_afff;
const ACTIVE_LOW: u64 = 1 << 13;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;

/// A message of a pin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Raised {
    /// Which pin; [`IoApic::refused`] wants to know.
    pub pin: u8,
    /// To be routed.
    pub message: Message,
}

/// What an event makes the I/O APIC send: at most one message per pin.
pub type Messages = SmallVec<[Raised; 2]>;

/// Entry of the redirection table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Entry(u64);

impl Entry {
    /// Level-triggered as far as it counts: the other delivery modes are edge-triggered whatever the bit says.
    fn level(self) -> bool {
        self.0 & LEVEL != 0 && self.delivery().is_some_and(Delivery::has_vector)
    }

    fn delivery(self) -> Option<Delivery> {
        Delivery::in_pin((self.0 >> 8) as u32)
    }

    fn has(self, bit: u64) -> bool {
        self.0 & bit != 0
    }

    fn message(self) -> Option<Message> {
        let address = (self.0 >> 56) as u8;
        let logical = self.0 & (1 << 11) != 0;
        Some(Message {
            destination: if logical {
                Destination::Logical(address)
            } else {
                Destination::Physical(ApicId(address))
            },
            delivery: self.delivery()?,
            vector: self.0 as u8,
            trigger: if self.level() { Trigger::Level } else { Trigger::Edge },
            asserted: true,
        })
    }
}

/// An I/O APIC with [`PINS`] pins.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IoApic {
    id: u8,
    /// IOREGSEL.
    select: u8,
    entries: [Entry; PINS],
    /// The pins' electrical levels, a bit each.
    levels: u32,
}

impl Default for IoApic {
    /// The state of power-up: all pins masked and low.
    fn default() -> Self {
        Self { id: 0, select: 0, entries: [Entry(MASKED); PINS], levels: 0 }
    }
}

impl IoApic {
    /// The state of power-up. The pins keep their levels.
    pub fn reset(&mut self) {
        *self = Self { levels: self.levels, ..Self::default() };
    }

    /// A read of the 32-bit registers IOREGSEL (0x00) and IOWIN (0x10), or of bytes within them.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let value = match offset & !3 {
            0x00 => self.select.into(),
            0x10 => self.register(),
            _ => return,
        };
        let from = (offset & 3) as usize;
        for (to, byte) in data.iter_mut().zip(value.to_le_bytes().into_iter().skip(from)) {
            *to = byte;
        }
    }

    /// A write of IOREGSEL, IOWIN or the EOI register (0x40): at least the lowest byte, and of IOWIN all 32 bits.
    #[must_use]
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Messages {
        let word = data.get(..4).and_then(|bytes| bytes.try_into().ok()).map(u32::from_le_bytes);
        match (offset, data.first(), word) {
            (0x00, Some(index), _) => self.select = *index,
            (0x10, _, Some(value)) => return self.set_register(value),
            (0x40, Some(vector), _) => return self.end_of_interrupt(*vector),
            _ => {}
        }
        Messages::new()
    }

    /// Which half of which entry IOREGSEL selects.
    fn selected(&self) -> Option<(usize, u32)> {
        let at = usize::from(self.select.checked_sub(0x10)?);
        (at / 2 < PINS).then_some((at / 2, if at % 2 == 0 { 0 } else { 32 }))
    }

    fn register(&self) -> u32 {
        match (self.select, self.selected()) {
            (0 | 2, _) => u32::from(self.id) << 24, // the arbitration ID follows the ID
            (1, _) => VERSION,
            (_, Some((pin, shift))) => (self.entries[pin].0 >> shift) as u32,
            _ => 0,
        }
    }

    fn set_register(&mut self, value: u32) -> Messages {
        if self.select == 0 {
            self.id = (value >> 24) as u8 & 0xf;
        }
        let Some((pin, shift)) = self.selected() else { return Messages::new() };
        let was_active = self.active(pin);
        let entry = &mut self.entries[pin];
        let written = 0xffff_ffff_u64 << shift & WRITABLE;
        entry.0 = (entry.0 & !written) | (u64::from(value) << shift & written);
        if !entry.level() {
            entry.0 &= !REMOTE_IRR;
        }
        let edge = !was_active && self.active(pin);
        self.raise(pin, edge).into_iter().collect()
    }

    fn active(&self, pin: usize) -> bool {
        (self.levels & (1 << pin) != 0) != self.entries[pin].has(ACTIVE_LOW)
    }

    /// The message of `pin`, if it has one to send: at an edge, or while its level is active and the last message
    /// was not finished. Nothing that happens to a masked pin is remembered but its level (data sheet, "Interrupt
    /// Mask").
    fn raise(&mut self, pin: usize, edge: bool) -> Option<Raised> {
        let active = self.active(pin);
        let entry = self.entries.get_mut(pin)?;
        let due = if entry.level() { active && !entry.has(REMOTE_IRR) } else { edge };
        if !due || entry.has(MASKED) {
            return None;
        }
        let message = entry.message()?;
        if entry.level() {
            entry.0 |= REMOTE_IRR;
        }
        Some(Raised { pin: pin as u8, message })
    }

    /// A pin's electrical level. By the pin's polarity, it is active high or low.
    #[must_use]
    pub fn set_pin(&mut self, pin: u8, high: bool) -> Option<Raised> {
        let pin = usize::from(pin);
        if pin >= PINS {
            return None;
        }
        let was_active = self.active(pin);
        self.levels = (self.levels & !(1 << pin)) | (u32::from(high) << pin);
        let edge = !was_active && self.active(pin);
        self.raise(pin, edge)
    }

    /// A local APIC finished a level-triggered interrupt of `vector`: the pins of this vector are free again, and
    /// those that are still active send again.
    #[must_use]
    pub fn end_of_interrupt(&mut self, vector: u8) -> Messages {
        let mut messages = Messages::new();
        for pin in 0..PINS {
            let entry = &mut self.entries[pin];
            if entry.level() && entry.has(REMOTE_IRR) && entry.0 as u8 == vector {
                entry.0 &= !REMOTE_IRR;
                messages.extend(self.raise(pin, false));
            }
        }
        messages
    }

    /// No local APIC took the message of `pin`, so no EOI will come. A level-triggered pin tries again with the
    /// next [`Self::retry`].
    pub fn refused(&mut self, pin: u8) {
        if let Some(entry) = self.entries.get_mut(usize::from(pin)) {
            entry.0 &= !REMOTE_IRR;
        }
    }

    /// As [`Self::refused`], told by an APIC that knows only the vector. A pin of the same vector whose message is still
    /// on its way may interrupt once more than it had to.
    pub fn refused_vector(&mut self, vector: u8) {
        for entry in self.entries.iter_mut().filter(|entry| entry.level() && entry.0 as u8 == vector) {
            entry.0 &= !REMOTE_IRR;
        }
    }

    /// What waits because it was refused: to be asked when a local APIC's [`View`](super::View) changes.
    #[must_use]
    pub fn retry(&mut self) -> Messages {
        (0..PINS).filter_map(|pin| self.raise(pin, false)).collect()
    }
}

#[cfg(test)]
#[path = "io_apic_test.rs"]
mod tests;
