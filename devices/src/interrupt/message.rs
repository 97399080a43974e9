//! Interrupt messages: what IPIs, pins of the I/O APIC and MSIs all become.

use serde::{Deserialize, Serialize};

use crate::irq::MsiMessage;

/// A local APIC's ID, which is its vCPU's. 0xff is every APIC's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ApicId(pub u8);

/// Whom a message is for (Intel SDM vol. 3A, "Determining IPI Destination").
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Destination {
    /// Physical mode: the APIC of this ID, or all for 0xff.
    Physical(ApicId),
    /// Logical mode: the APICs whose LDR and DFR match this address (MDA).
    Logical(u8),
    /// The shorthand "self", of this APIC.
    Itself(ApicId),
    /// The shorthand "all including self".
    All,
    /// The shorthand "all excluding self", from this APIC.
    AllBut(ApicId),
}

/// What is delivered (Intel SDM vol. 3A, "Interrupt Command Register", delivery mode).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Delivery {
    /// The vector, to every destination.
    Fixed,
    /// The vector, to the destination that has the lowest priority.
    LowestPriority,
    /// A system management interrupt. Omega's guests have no system management mode; it is dropped.
    Smi,
    /// A non-maskable interrupt; the vector means nothing.
    Nmi,
    /// INIT; the vector means nothing.
    Init,
    /// SIPI: start at the page that the vector names.
    StartUp,
    /// The vector is to be asked of the PIC (8259A).
    External,
}

/// Whether the sender wants to know of the EOI.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Trigger {
    /// It does not.
    #[default]
    Edge,
    /// It does: TMR has the vector, and the EOI is broadcast to the I/O APICs.
    Level,
}

/// An interrupt on its way to local APICs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Message {
    /// Whom it is for.
    pub destination: Destination,
    /// What it does to them.
    pub delivery: Delivery,
    /// Which vector.
    pub vector: u8,
    /// Edge or level.
    pub trigger: Trigger,
    /// Assert or, of level-triggered ones, de-assert.
    pub asserted: bool,
}

impl Delivery {
    /// The delivery mode of the three bits that the ICR, the LVT, redirection entries and MSI data have at 10:8.
    /// `None` for 3 (remote read, which no processor with an xAPIC has). What 6 and 7 mean differs; see
    /// [`Self::in_icr`] and [`Self::in_pin`].
    fn common(bits: u32) -> Option<Self> {
        match bits & 7 {
            0 => Some(Self::Fixed),
            1 => Some(Self::LowestPriority),
            2 => Some(Self::Smi),
            4 => Some(Self::Nmi),
            5 => Some(Self::Init),
            _ => None,
        }
    }

    /// The delivery mode in an ICR: 6 is start-up, 7 is reserved.
    #[must_use]
    pub fn in_icr(bits: u32) -> Option<Self> {
        if bits & 7 == 6 { Some(Self::StartUp) } else { Self::common(bits) }
    }

    /// The delivery mode in a redirection entry, LVT entry or MSI: 6 is reserved, 7 is ExtINT.
    #[must_use]
    pub fn in_pin(bits: u32) -> Option<Self> {
        if bits & 7 == 7 { Some(Self::External) } else { Self::common(bits) }
    }

    /// Whether it carries a vector that lands in the IRR.
    #[must_use]
    pub fn has_vector(self) -> bool {
        matches!(self, Self::Fixed | Self::LowestPriority)
    }
}

impl Message {
    /// The message that a write of `msi` is, if it is one: physical or logical by the address's bit 2, redirected
    /// to the lowest priority by bit 3 (Intel SDM vol. 3A, "Message Signalled Interrupts", address and data
    /// register formats).
    ///
    /// Bit 2 counts whatever bit 3 says, as on the processors that guests know.
    #[must_use]
    pub fn from_msi(msi: MsiMessage) -> Option<Self> {
        if msi.address >> 20 != 0xfee {
            return None;
        }
        let id = (msi.address >> 12) as u8;
        let (redirected, logical) = (msi.address & 8 != 0, msi.address & 4 != 0);
        let delivery = match Delivery::in_pin(msi.data >> 8)? {
            Delivery::Fixed if redirected && logical => Delivery::LowestPriority,
            other => other,
        };
        let level = msi.data & (1 << 15) != 0 && delivery.has_vector();
        Some(Self {
            destination: if logical { Destination::Logical(id) } else { Destination::Physical(ApicId(id)) },
            delivery,
            vector: msi.data as u8,
            trigger: if level { Trigger::Level } else { Trigger::Edge },
            asserted: !level || msi.data & (1 << 14) != 0,
        })
    }

    /// Whether it does anything at all: a level-triggered de-assertion does not, and the INIT that carries one
    /// only told the APICs of the P6 family to agree on their arbitration IDs.
    #[must_use]
    pub fn acts(&self) -> bool {
        self.asserted || self.trigger == Trigger::Edge
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn msi(address: u64, data: u32) -> Option<Message> {
        Message::from_msi(MsiMessage { address, data })
    }

    fn fixed(destination: Destination, vector: u8) -> Message {
        Message { destination, delivery: Delivery::Fixed, vector, trigger: Trigger::Edge, asserted: true }
    }

    #[test]
    fn an_msi_is_decoded_as_the_manual_draws_address_and_data() {
        let physical = fixed(Destination::Physical(ApicId(0x12)), 0x41);
        assert_eq!(msi(0xfee1_2000, 0x41), Some(physical));
        assert_eq!(msi(0xfee1_2008, 0x41), Some(physical), "a hint to redirect means nothing for one APIC");
        let logical = fixed(Destination::Logical(0x12), 0x41);
        assert_eq!(msi(0xfee1_2004, 0x41), Some(logical));
        let lowest = Message { delivery: Delivery::LowestPriority, ..logical };
        assert_eq!(msi(0xfee1_200c, 0x41), Some(lowest));
        assert_eq!(msi(0xfee1_2004, 0x141), Some(lowest));
        let level = Message { trigger: Trigger::Level, ..physical };
        assert_eq!(msi(0xfee1_2000, 0xc041), Some(level));
        assert_eq!(msi(0xfee1_2000, 0x8041), Some(Message { asserted: false, ..level }));
    }

    #[test]
    fn every_delivery_mode_of_an_msi_is_known_or_refused() {
        let modes = (0..8).map(|mode| msi(0xfee0_0000, mode << 8).map(|m| m.delivery));
        let expected = [
            Some(Delivery::Fixed),
            Some(Delivery::LowestPriority),
            Some(Delivery::Smi),
            None,
            Some(Delivery::Nmi),
            Some(Delivery::Init),
            None,
            Some(Delivery::External),
        ];
        assert!(modes.eq(expected));
        assert_eq!(Delivery::in_icr(6), Some(Delivery::StartUp));
        assert_eq!(Delivery::in_icr(7), None);
    }

    #[test]
    fn a_write_elsewhere_is_no_msi() {
        for address in [0, 0xfed0_0000, 0xfef0_0000, 0x1_fee0_0000, u64::MAX] {
            assert_eq!(msi(address, 0x41), None, "{address:#x}");
        }
    }
}
