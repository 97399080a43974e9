//! Against the Intel 8259A data sheet.

use proptest::prelude::*;

use super::*;

const MASTER: u64 = 0x20;
const SLAVE: u64 = 0xa0;

fn put(pic: &mut Pic, address: u64, value: u8) {
    pic.write(Port::at(address).expect("a register"), value);
}

fn get(pic: &mut Pic, address: u64) -> u8 {
    pic.read(Port::at(address).expect("a register"))
}

/// Set up as Linux does it, with `icw4` for both.
fn set_up(icw4: u8) -> Pic {
    let mut pic = Pic::default();
    for (chip, base, icw3) in [(MASTER, 0x30, 4), (SLAVE, 0x38, 2)] {
        put(&mut pic, chip, 0x11);
        for value in [base, icw3, icw4] {
            put(&mut pic, chip + 1, value);
        }
    }
    pic
}

fn pulse(pic: &mut Pic, irq: u8) {
    pic.set_line(irq, true);
    pic.set_line(irq, false);
}

fn requests(pic: &mut Pic, chip: u64) -> u8 {
    put(pic, chip, 0x0a);
    get(pic, chip)
}

fn in_service(pic: &mut Pic, chip: u64) -> u8 {
    put(pic, chip, 0x0b);
    get(pic, chip)
}

#[test]
fn all_is_masked_at_power_up_and_the_masks_can_be_probed_before_any_initialization() {
    let mut pic = Pic::default();
    pic.set_line(1, true);
    assert!(!pic.output());
    put(&mut pic, 0x21, 0xfb);
    assert_eq!((get(&mut pic, 0x21), get(&mut pic, 0xa1)), (0xfb, 0xff));
}

#[test]
fn initialization_takes_as_many_words_as_the_first_one_says() {
    for (icw1, words) in [(0x11, &[0x48, 4, 1][..]), (0x10, &[0x48, 4]), (0x13, &[0x48, 1]), (0x12, &[0x48])]
    {
        let mut pic = Pic::default();
        put(&mut pic, MASTER, icw1);
        for word in words {
            put(&mut pic, 0x21, *word);
        }
        put(&mut pic, 0x21, 0xfd);
        assert_eq!(get(&mut pic, 0x21), 0xfd, "{icw1:#x}: this is OCW1 already");
        pulse(&mut pic, 1);
        assert_eq!(pic.acknowledge(), 0x49, "{icw1:#x}");
    }
}

#[test]
fn initialization_clears_masks_services_and_latched_edges() {
    let mut pic = set_up(1);
    put(&mut pic, 0x21, 0x80);
    pulse(&mut pic, 1);
    assert_eq!(pic.acknowledge(), 0x31);
    pulse(&mut pic, 3);
    put(&mut pic, MASTER, 0x11);
    assert_eq!((in_service(&mut pic, MASTER), requests(&mut pic, MASTER)), (0, 0));
    let pic2 = &mut set_up(1);
    assert_eq!((get(pic2, 0x21), get(pic2, 0xa1)), (0, 0));
}

#[test]
fn the_second_chips_vectors_come_between_those_of_lines_1_and_3() {
    let mut pic = set_up(1);
    for irq in [15, 3, 0, 8, 1, 7] {
        pulse(&mut pic, irq);
    }
    let mut served = Vec::new();
    while pic.output() {
        let vector = pic.acknowledge();
        served.push(vector - 0x30);
        if vector >= 0x38 {
            put(&mut pic, SLAVE, 0x20);
        }
        put(&mut pic, MASTER, 0x20);
    }
    assert_eq!(served, [0, 1, 8, 15, 3, 7]);
}

#[test]
fn an_interrupt_in_service_holds_back_lower_ones_until_its_eoi() {
    let mut pic = set_up(1);
    pulse(&mut pic, 4);
    assert_eq!(pic.acknowledge(), 0x34);
    pulse(&mut pic, 4);
    pulse(&mut pic, 5);
    assert!(!pic.output());
    pulse(&mut pic, 3);
    assert_eq!(pic.acknowledge(), 0x33, "a higher one is nested");
    assert_eq!((in_service(&mut pic, MASTER), requests(&mut pic, MASTER)), (0x18, 0x30));
    put(&mut pic, MASTER, 0x20);
    assert!(!pic.output());
    put(&mut pic, MASTER, 0x64);
    assert_eq!(pic.acknowledge(), 0x34, "after a specific EOI of level 4");
}

#[test]
fn a_masked_request_waits() {
    let mut pic = set_up(1);
    put(&mut pic, 0x21, 0x02);
    pulse(&mut pic, 1);
    assert!(!pic.output());
    put(&mut pic, 0x21, 0);
    assert!(pic.output());
}

#[test]
fn edges_are_counted_once_and_levels_as_long_as_they_last() {
    let mut pic = set_up(1);
    put(&mut pic, 0x4d0, 0xff);
    put(&mut pic, 0x4d1, 0xff);
    assert_eq!((get(&mut pic, 0x4d0), get(&mut pic, 0x4d1)), (0xf8, 0xde));
    for (irq, again) in [(1, false), (5, true), (8, false), (9, true)] {
        pic.set_line(irq, true);
        assert_eq!(pic.acknowledge(), 0x30 + irq);
        put(&mut pic, SLAVE, 0x20);
        put(&mut pic, MASTER, 0x20);
        assert_eq!(pic.output(), again, "{irq}");
        pic.set_line(irq, false);
        assert!(!pic.output());
    }
}

#[test]
fn a_line_that_becomes_level_triggered_asks_while_it_is_high_and_only_then() {
    let mut pic = set_up(1);
    pic.set_line(5, true);
    pulse(&mut pic, 6);
    assert_eq!(pic.acknowledge(), 0x35);
    put(&mut pic, MASTER, 0x20);
    assert_eq!(requests(&mut pic, MASTER), 0x40, "the edges that were remembered");
    put(&mut pic, 0x4d0, 0x60);
    assert_eq!(requests(&mut pic, MASTER), 0x20, "the levels");
    put(&mut pic, 0x4d0, 0);
    assert_eq!(requests(&mut pic, MASTER), 0, "no new edge");
}

#[test]
fn a_request_that_is_gone_is_a_spurious_line_7_that_is_not_in_service() {
    let mut pic = set_up(1);
    put(&mut pic, 0x4d0, 0x20);
    pic.set_line(5, true);
    assert!(pic.output());
    pic.set_line(5, false);
    assert_eq!((pic.acknowledge(), in_service(&mut pic, MASTER)), (0x37, 0));
}

#[test]
fn a_poll_of_the_second_chip_leaves_nothing_for_the_acknowledgement() {
    let mut pic = set_up(1);
    pulse(&mut pic, 11);
    put(&mut pic, SLAVE, 0x0c);
    assert_eq!(get(&mut pic, SLAVE), 0x83);
    assert!(!pic.output());
    assert_eq!(in_service(&mut pic, SLAVE), 8);
    put(&mut pic, SLAVE, 0x0c);
    assert_eq!(get(&mut pic, SLAVE), 0, "nothing more");
    assert_eq!(get(&mut pic, SLAVE), 8, "one read is a poll, the next is what it was");
}

#[test]
fn rotation_makes_the_served_level_the_lowest() {
    let mut pic = set_up(1);
    for irq in [4, 6] {
        pulse(&mut pic, irq);
    }
    assert_eq!(pic.acknowledge(), 0x34);
    put(&mut pic, MASTER, 0xa0); // rotate on non-specific EOI
    for irq in [4, 5] {
        pulse(&mut pic, irq);
    }
    let order: Vec<u8> = (0..3)
        .map(|_| {
            let vector = pic.acknowledge();
            put(&mut pic, MASTER, 0x20);
            vector
        })
        .collect();
    assert_eq!(order, [0x35, 0x36, 0x34]);
    put(&mut pic, MASTER, 0xc0 | 2); // set priority: level 3 is the highest
    for irq in [1, 3, 0] {
        pulse(&mut pic, irq);
    }
    assert_eq!(pic.acknowledge(), 0x33);
    put(&mut pic, MASTER, 0xe0 | 3); // rotate on specific EOI: level 4 is the highest
    assert_eq!((in_service(&mut pic, MASTER), pic.acknowledge()), (0, 0x30));
}

#[test]
fn automatic_eoi_leaves_nothing_in_service_and_can_rotate() {
    let mut pic = set_up(3);
    put(&mut pic, MASTER, 0x80);
    for _ in 0..2 {
        for irq in [0, 1] {
            pulse(&mut pic, irq);
        }
    }
    assert_eq!((pic.acknowledge(), in_service(&mut pic, MASTER)), (0x30, 0));
    pulse(&mut pic, 0);
    assert_eq!((pic.acknowledge(), pic.acknowledge()), (0x31, 0x30), "level 0 had become the lowest");
    put(&mut pic, MASTER, 0x00);
    pulse(&mut pic, 8);
    pulse(&mut pic, 9);
    assert_eq!((pic.acknowledge(), pic.acknowledge(), pic.output()), (0x38, 0x39, false));
}

#[test]
fn special_mask_mode_lets_lower_levels_in_past_a_masked_one() {
    let mut pic = set_up(1);
    pulse(&mut pic, 1);
    assert_eq!(pic.acknowledge(), 0x31);
    put(&mut pic, 0x21, 0x02);
    pulse(&mut pic, 5);
    assert!(!pic.output());
    put(&mut pic, MASTER, 0x68);
    assert_eq!(pic.acknowledge(), 0x35);
    put(&mut pic, MASTER, 0x20);
    assert_eq!(in_service(&mut pic, MASTER), 2, "a non-specific EOI spares the masked level");
    put(&mut pic, MASTER, 0x48);
    pulse(&mut pic, 5);
    assert!(!pic.output(), "the mode is off");
}

#[test]
fn special_fully_nested_mode_serves_the_second_chip_while_it_is_in_service() {
    for (icw4, nested) in [(1, false), (0x11, true)] {
        let mut pic = set_up(icw4);
        pulse(&mut pic, 12);
        assert_eq!(pic.acknowledge(), 0x3c);
        pulse(&mut pic, 9);
        assert_eq!(pic.output(), nested);
        pulse(&mut pic, 12);
        put(&mut pic, SLAVE, 0x20);
        put(&mut pic, MASTER, 0x20);
        assert_eq!(pic.acknowledge(), 0x39);
    }
}

#[test]
fn a_reset_masks_all_and_keeps_the_lines() {
    let mut pic = set_up(1);
    put(&mut pic, 0x4d0, 0x20);
    pic.set_line(5, true);
    pic.reset();
    assert!(!pic.output());
    let mut other = Pic::default();
    other.set_line(5, true);
    other.reset();
    assert_eq!(pic, other);
}

proptest! {
    /// Pulses of all lines, accesses of all kinds, and an owner that acknowledges when asked.
    #[test]
    fn a_guest_that_serves_what_comes_loses_no_edge(
        pulses in proptest::collection::vec((0..16u8, any::<bool>()), 0..100),
    ) {
        let mut pic = set_up(1);
        let mut waiting = 0_u16;
        let serve = |pic: &mut Pic, waiting: &mut u16| {
            let vector = pic.acknowledge();
            assert!(*waiting & (1 << (vector - 0x30)) != 0, "{vector:#x} was asked for");
            *waiting &= !(1 << (vector - 0x30));
            if vector >= 0x38 {
                put(pic, SLAVE, 0x20);
            }
            put(pic, MASTER, 0x20);
        };
        for (irq, serves) in pulses {
            pulse(&mut pic, irq);
            waiting |= if irq == 2 { 0 } else { 1 << irq };
            prop_assert_eq!(pic.output(), waiting != 0);
            if serves && pic.output() {
                serve(&mut pic, &mut waiting);
            }
        }
        while pic.output() {
            serve(&mut pic, &mut waiting);
        }
        prop_assert_eq!(waiting, 0);
    }

    #[test]
    fn any_accesses_leave_a_pair_that_initialization_mends(
        steps in proptest::collection::vec((0..8usize, any::<u8>()), 0..200),
    ) {
        let mut pic = Pic::default();
        for (what, value) in steps {
            match what {
                6 => pic.set_line(value, value & 0x80 != 0),
                7 => drop(pic.acknowledge()),
                port => {
                    let address = [0x20, 0x21, 0xa0, 0xa1, 0x4d0, 0x4d1][port];
                    put(&mut pic, address, value);
                    get(&mut pic, address);
                }
            }
        }
        let saved = serde_json::to_value(&pic).expect("it is plain data");
        let mut pic: Pic = serde_json::from_value(saved).expect("it is its own");
        for (chip, base, icw3) in [(MASTER, 0x30, 4), (SLAVE, 0x38, 2)] {
            put(&mut pic, chip, 0x11);
            for value in [base, icw3, 1] {
                put(&mut pic, chip + 1, value);
            }
        }
        for irq in 0..16 {
            pic.set_line(irq, false);
        }
        put(&mut pic, 0x4d0, 0);
        put(&mut pic, 0x4d1, 0);
        while pic.output() {
            pic.acknowledge();
            put(&mut pic, SLAVE, 0x20);
            put(&mut pic, MASTER, 0x20);
        }
        pulse(&mut pic, 8);
        prop_assert_eq!(pic.acknowledge(), 0x38);
    }
}
