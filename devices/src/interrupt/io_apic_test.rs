//! Against the Intel 82093AA data sheet.

use proptest::prelude::*;

use super::*;

fn get(io: &mut IoApic, index: u8) -> u32 {
    let mut data = [0; 4];
    assert!(io.write(0, &u32::from(index).to_le_bytes()).is_empty());
    io.read(0x10, &mut data);
    u32::from_le_bytes(data)
}

fn put(io: &mut IoApic, index: u8, value: u32) -> Messages {
    assert!(io.write(0, &u32::from(index).to_le_bytes()).is_empty());
    io.write(0x10, &value.to_le_bytes())
}

/// Programs `pin` with the low half `low`, for APIC 3.
fn program(io: &mut IoApic, pin: u8, low: u32) -> Messages {
    assert!(put(io, 0x10 + 2 * pin, 0x1_0000).is_empty());
    assert!(put(io, 0x11 + 2 * pin, 0x0300_0000).is_empty());
    put(io, 0x10 + 2 * pin, low)
}

fn raised(pin: u8, vector: u8, trigger: Trigger) -> Raised {
    let (destination, delivery) = (Destination::Physical(ApicId(3)), Delivery::Fixed);
    Raised { pin, message: Message { destination, delivery, vector, trigger, asserted: true } }
}

const LEVEL_LOW_HALF: u32 = 1 << 15;
const MASK: u32 = 1 << 16;

#[test]
fn registers_have_the_values_of_power_up_and_the_bits_that_exist() {
    let mut io = IoApic::default();
    assert_eq!((get(&mut io, 0), get(&mut io, 1), get(&mut io, 2)), (0, 0x0017_0020, 0));
    for pin in 0..24 {
        assert_eq!((get(&mut io, 0x10 + 2 * pin), get(&mut io, 0x11 + 2 * pin)), (MASK, 0));
        assert!(
            put(&mut io, 0x10 + 2 * pin, u32::MAX).is_empty()
                && put(&mut io, 0x11 + 2 * pin, u32::MAX).is_empty()
        );
        assert_eq!((get(&mut io, 0x10 + 2 * pin), get(&mut io, 0x11 + 2 * pin)), (0x1_afff, 0xff00_0000));
    }
    assert!(put(&mut io, 0, u32::MAX).is_empty() && put(&mut io, 1, u32::MAX).is_empty());
    assert_eq!((get(&mut io, 0), get(&mut io, 1), get(&mut io, 2)), (0x0f00_0000, 0x0017_0020, 0x0f00_0000));
    assert!(put(&mut io, 0x40, u32::MAX).is_empty() && put(&mut io, 0xff, u32::MAX).is_empty());
    assert_eq!((get(&mut io, 0x40), get(&mut io, 0xff), get(&mut io, 3)), (0, 0, 0));
    io.reset();
    let _ = get(&mut io, 0);
    assert_eq!(io, IoApic::default());
}

#[test]
fn an_edge_is_sent_once_and_needs_no_eoi() {
    let mut io = IoApic::default();
    assert!(program(&mut io, 4, 0x41).is_empty());
    for _ in 0..2 {
        assert_eq!(io.set_pin(4, true), Some(raised(4, 0x41, Trigger::Edge)));
        assert_eq!(io.set_pin(4, true), None);
        assert_eq!(io.set_pin(4, false), None);
    }
    assert_eq!(get(&mut io, 0x18), 0x41);
}

#[test]
fn an_edge_while_masked_is_forgotten_and_a_level_is_sent_when_unmasked() {
    let mut io = IoApic::default();
    assert!(program(&mut io, 4, 0x41 | MASK).is_empty());
    assert_eq!(io.set_pin(4, true), None);
    assert!(put(&mut io, 0x18, 0x41).is_empty());
    assert!(program(&mut io, 9, 0x42 | MASK | LEVEL_LOW_HALF).is_empty());
    assert_eq!(io.set_pin(9, true), None);
    assert_eq!(put(&mut io, 0x22, 0x42 | LEVEL_LOW_HALF)[..], [raised(9, 0x42, Trigger::Level)]);
}

#[test]
fn a_level_is_sent_once_until_its_eoi_and_again_after_it_while_it_is_active() {
    let mut io = IoApic::default();
    assert!(program(&mut io, 9, 0x42 | LEVEL_LOW_HALF).is_empty());
    assert_eq!(io.set_pin(9, true), Some(raised(9, 0x42, Trigger::Level)));
    assert_eq!(get(&mut io, 0x22), 0x42 | LEVEL_LOW_HALF | 1 << 14, "Remote IRR");
    assert_eq!((io.set_pin(9, false), io.set_pin(9, true)), (None, None));
    assert!(io.end_of_interrupt(0x43).is_empty(), "another vector");
    assert_eq!(io.end_of_interrupt(0x42)[..], [raised(9, 0x42, Trigger::Level)]);
    assert_eq!(io.set_pin(9, false), None);
    assert!(io.end_of_interrupt(0x42).is_empty());
    assert_eq!(get(&mut io, 0x22), 0x42 | LEVEL_LOW_HALF);
}

#[test]
fn the_eoi_register_ends_an_interrupt_too_and_masking_does_not() {
    let mut io = IoApic::default();
    assert!(program(&mut io, 9, 0x42 | LEVEL_LOW_HALF).is_empty());
    assert!(io.set_pin(9, true).is_some());
    assert!(put(&mut io, 0x22, 0x42 | LEVEL_LOW_HALF | MASK).is_empty());
    assert!(put(&mut io, 0x22, 0x42 | LEVEL_LOW_HALF).is_empty(), "it is still being handled");
    assert_eq!(io.write(0x40, &0x42_u32.to_le_bytes())[..], [raised(9, 0x42, Trigger::Level)]);
    assert!(put(&mut io, 0x22, 0x42 | LEVEL_LOW_HALF | MASK).is_empty());
    assert!(io.end_of_interrupt(0x42).is_empty(), "masked meanwhile");
    assert_eq!(get(&mut io, 0x22), 0x42 | LEVEL_LOW_HALF | MASK);
}

#[test]
fn becoming_edge_triggered_clears_remote_irr() {
    let mut io = IoApic::default();
    assert!(program(&mut io, 9, 0x42 | LEVEL_LOW_HALF).is_empty());
    assert!(io.set_pin(9, true).is_some());
    assert!(put(&mut io, 0x22, 0x42 | MASK).is_empty());
    assert_eq!(get(&mut io, 0x22), 0x42 | MASK);
    assert_eq!(put(&mut io, 0x22, 0x42 | LEVEL_LOW_HALF).len(), 1);
}

#[test]
fn one_eoi_ends_all_pins_of_its_vector() {
    let mut io = IoApic::default();
    for pin in 0..24 {
        assert!(program(&mut io, pin, 0x42 | LEVEL_LOW_HALF).is_empty());
        assert!(io.set_pin(pin, true).is_some());
    }
    assert_eq!(io.end_of_interrupt(0x42).len(), 24);
}

#[test]
fn an_active_low_pin_is_asserted_while_it_is_low() {
    let mut io = IoApic::default();
    assert_eq!(io.set_pin(9, true), None);
    assert!(program(&mut io, 9, 0x42 | LEVEL_LOW_HALF | 1 << 13).is_empty());
    assert_eq!(io.set_pin(9, false), Some(raised(9, 0x42, Trigger::Level)));
    assert_eq!(io.set_pin(9, true), None);
    assert!(io.end_of_interrupt(0x42).is_empty());
}

#[test]
fn a_refused_level_is_tried_again_and_a_refused_edge_is_not() {
    let mut io = IoApic::default();
    assert!(program(&mut io, 9, 0x42 | LEVEL_LOW_HALF).is_empty());
    assert!(program(&mut io, 4, 0x41).is_empty());
    assert!(io.set_pin(9, true).is_some() && io.set_pin(4, true).is_some());
    assert!(io.retry().is_empty());
    io.refused(9);
    io.refused(4);
    assert_eq!(io.retry()[..], [raised(9, 0x42, Trigger::Level)]);
}

#[test]
fn every_delivery_mode_is_sent_as_it_is_and_only_vectors_are_ever_level_triggered() {
    let modes = [
        (0, Some(Delivery::Fixed)),
        (1, Some(Delivery::LowestPriority)),
        (2, Some(Delivery::Smi)),
        (3, None),
        (4, Some(Delivery::Nmi)),
        (5, Some(Delivery::Init)),
        (6, None),
        (7, Some(Delivery::External)),
    ];
    for (bits, delivery) in modes {
        let mut io = IoApic::default();
        assert!(program(&mut io, 1, bits << 8 | 1 << 11 | LEVEL_LOW_HALF | 0x42).is_empty());
        let message = io.set_pin(1, true).map(|raised| raised.message);
        let trigger = if bits < 2 { Trigger::Level } else { Trigger::Edge };
        let expected = delivery.map(|delivery| Message {
            destination: Destination::Logical(3),
            delivery,
            vector: 0x42,
            trigger,
            asserted: true,
        });
        assert_eq!(message, expected, "{bits}");
    }
}

#[test]
fn odd_accesses_are_harmless() {
    let mut io = IoApic::default();
    for offset in [0, 1, 3, 0xd, 0x10, 0x13, 0x40, 0x1000, u64::MAX] {
        for len in [0, 1, 2, 4, 8] {
            let mut data = vec![0xaa; len];
            io.read(offset, &mut data);
            assert!(io.write(offset, &data).is_empty());
        }
    }
    assert_eq!(io.set_pin(24, true), None);
    assert_eq!(io.set_pin(255, true), None);
    io.refused(255);
}

proptest! {
    /// A line as devices share it: asserted until the guest has served them.
    #[test]
    fn a_level_triggered_line_is_in_flight_exactly_once_from_its_assertion_until_it_is_served(
        steps in proptest::collection::vec(0..4u8, 0..100),
    ) {
        let mut io = IoApic::default();
        prop_assert!(program(&mut io, 9, 0x42 | LEVEL_LOW_HALF).is_empty());
        let (mut asserted, mut masked, mut in_flight) = (false, false, false);
        for step in steps {
            let sent = match step {
                0 | 1 => {
                    asserted = step == 1;
                    io.set_pin(9, asserted).into_iter().count()
                }
                2 => {
                    masked = !masked;
                    put(&mut io, 0x22, 0x42 | LEVEL_LOW_HALF | u32::from(masked) << 16).len()
                }
                _ => {
                    in_flight = false;
                    io.end_of_interrupt(0x42).len()
                }
            };
            let due = asserted && !masked && !in_flight;
            prop_assert_eq!(sent, usize::from(due));
            in_flight |= due;
        }
    }
}
