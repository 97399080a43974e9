//! The interrupt command register: how a processor sends IPIs (Intel SDM vol. 3A, "Issuing Interprocessor
//! Interrupts").

use crate::interrupt::message::{ApicId, Delivery, Destination, Message, Trigger};
use crate::interrupt::vectors::LOWEST_VECTOR;

/// What can be written: all but the delivery status, which is always idle, and reserved bits.
pub(super) const WRITABLE: u64 = 0xff00_0000_000c_cfff;

/// An ICR that sends nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unsent {
    /// The vector is below 16.
    IllegalVector,
    /// A delivery mode or shorthand that the table "Valid Combinations for the Pentium 4 and Intel Xeon
    /// Processors' Local xAPIC Interrupt Command Register" does not have.
    Invalid,
    /// The INIT level de-assert of older processors.
    Deassert,
}

/// The message of `icr`, sent by `sender`. All are edge-triggered, whatever it says (the table's note 2).
pub(super) fn message(icr: u64, sender: ApicId) -> Result<Message, Unsent> {
    let low = icr as u32;
    let delivery = Delivery::in_icr(low >> 8).ok_or(Unsent::Invalid)?;
    let (level, asserted) = (low & (1 << 15) != 0, low & (1 << 14) != 0);
    if delivery == Delivery::Init && level && !asserted {
        return Err(Unsent::Deassert);
    }
    let address = (icr >> 56) as u8;
    let fixed = delivery == Delivery::Fixed;
    let destination = match (low >> 18) & 3 {
        0 if low & (1 << 11) != 0 => Destination::Logical(address),
        0 => Destination::Physical(ApicId(address)),
        1 if fixed => Destination::Itself(sender),
        2 if fixed => Destination::All,
        3 => Destination::AllBut(sender),
        _ => return Err(Unsent::Invalid),
    };
    if delivery.has_vector() && (low as u8) < LOWEST_VECTOR {
        return Err(Unsent::IllegalVector);
    }
    Ok(Message { destination, delivery, vector: low as u8, trigger: Trigger::Edge, asserted: true })
}

#[cfg(test)]
mod tests {
    use super::*;

    const ME: ApicId = ApicId(3);

    fn sent(low: u64) -> Result<(Destination, Delivery), Unsent> {
        message(0x0500_0000_0000_0000 | low, ME).map(|message| {
            assert_eq!((message.trigger, message.asserted), (Trigger::Edge, true));
            (message.destination, message.delivery)
        })
    }

    #[test]
    fn every_combination_of_the_table_is_sent_as_an_edge_and_no_other_is_sent() {
        let modes = [
            (0, Some(Delivery::Fixed)),
            (1, Some(Delivery::LowestPriority)),
            (2, Some(Delivery::Smi)),
            (3, None),
            (4, Some(Delivery::Nmi)),
            (5, Some(Delivery::Init)),
            (6, Some(Delivery::StartUp)),
            (7, None),
        ];
        for (bits, delivery) in modes {
            for (trigger, asserted) in [(0, 0), (0, 1 << 14), (1 << 15, 1 << 14)] {
                let low = 0x40 | bits << 8 | trigger | asserted;
                let expected = |destination, valid: bool| {
                    delivery.filter(|_| valid).map(|mode| (destination, mode)).ok_or(Unsent::Invalid)
                };
                let fixed = bits == 0;
                assert_eq!(sent(low), expected(Destination::Physical(ApicId(5)), true));
                assert_eq!(sent(low | 1 << 11), expected(Destination::Logical(5), true));
                assert_eq!(sent(low | 1 << 18), expected(Destination::Itself(ME), fixed));
                assert_eq!(sent(low | 2 << 18), expected(Destination::All, fixed));
                assert_eq!(sent(low | 3 << 18), expected(Destination::AllBut(ME), true));
            }
        }
    }

    #[test]
    fn an_init_level_deassert_is_sent_to_nobody() {
        assert_eq!(sent(0x8500), Err(Unsent::Deassert));
        assert!(sent(0xc500).is_ok());
    }

    #[test]
    fn a_vector_below_16_is_not_sent_where_it_is_one() {
        assert_eq!(sent(0x0f), Err(Unsent::IllegalVector));
        assert_eq!(sent(0x10f), Err(Unsent::IllegalVector));
        assert!(sent(0x400).is_ok(), "an NMI has none");
        assert!(sent(0x601).is_ok(), "a SIPI has a page");
    }
}
