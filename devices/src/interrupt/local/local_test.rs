//! Against the Intel SDM vol. 3A, chapter "Advanced Programmable Interrupt Controller (APIC)".

use super::*;
use crate::interrupt::message::Destination;
use crate::interrupt::time::Nanos;

pub(super) const OPEN: Window = Window { interrupts: true, nmi: true };

pub(super) fn at(nanos: u64) -> Now {
    Now { nanos: Nanos(nanos), tsc: Tsc(nanos * 3) }
}

pub(super) fn get(apic: &mut LocalApic, offset: u64) -> u32 {
    get_at(apic, offset, 0)
}

pub(super) fn get_at(apic: &mut LocalApic, offset: u64, now: u64) -> u32 {
    let mut data = [0; 4];
    apic.read(offset, &mut data, at(now));
    u32::from_le_bytes(data)
}

pub(super) fn put(apic: &mut LocalApic, offset: u64, value: u32) -> Effects {
    put_at(apic, offset, value, 0)
}

pub(super) fn put_at(apic: &mut LocalApic, offset: u64, value: u32, now: u64) -> Effects {
    apic.write(offset, &value.to_le_bytes(), at(now))
}

/// The bootstrap processor's APIC, enabled.
pub(super) fn running() -> LocalApic {
    let mut apic = LocalApic::new(ApicId(0), true);
    assert_eq!(put(&mut apic, 0xf0, 0x1ff), Effects::default());
    apic
}

pub(super) fn send(apic: &mut LocalApic, delivery: Delivery, vector: u8, trigger: Trigger) -> bool {
    let destination = Destination::Physical(apic.id());
    apic.accept(&Message { destination, delivery, vector, trigger, asserted: true })
}

pub(super) fn edge(apic: &mut LocalApic, vector: u8) -> bool {
    send(apic, Delivery::Fixed, vector, Trigger::Edge)
}

pub(super) fn interrupt(vector: u8) -> Option<Event> {
    Some(Event::Interrupt { vector })
}

/// What a guest reads of every register after power-up.
const POWER_UP: [(u64, u32); 18] = [
    (0x030, 0x0005_0014),
    (0x080, 0),
    (0x090, 0),
    (0x0a0, 0),
    (0x0d0, 0),
    (0x0e0, 0xffff_ffff),
    (0x0f0, 0xff),
    (0x280, 0),
    (0x300, 0),
    (0x310, 0),
    (0x320, 0x1_0000),
    (0x330, 0x1_0000),
    (0x340, 0x1_0000),
    (0x350, 0x1_0000),
    (0x360, 0x1_0000),
    (0x370, 0x1_0000),
    (0x380, 0),
    (0x3e0, 0),
];

fn assert_power_up(apic: &mut LocalApic, id: u32) {
    assert_eq!(get(apic, 0x20), id << 24);
    for (offset, value) in POWER_UP {
        assert_eq!(get(apic, offset), value, "{offset:#x}");
    }
    for offset in (0x100..0x280).step_by(16) {
        assert_eq!(get(apic, offset), 0, "{offset:#x}");
    }
}

#[test]
fn registers_have_the_values_of_power_up() {
    assert_power_up(&mut LocalApic::new(ApicId(7), false), 7);
}

/// Writes all ones to everything and puts interrupts everywhere.
fn mess_up(apic: &mut LocalApic) {
    put(apic, 0xf0, 0x3ff);
    for vector in [0x31, 0x91] {
        assert!(send(apic, Delivery::Fixed, vector, Trigger::Level));
    }
    assert_eq!(apic.take(OPEN), interrupt(0x91));
    for offset in (0x80..0x400).step_by(16).filter(|offset| ![0xb0, 0xf0].contains(offset)) {
        put(apic, offset, 0xffff_ffff);
    }
    assert!(send(apic, Delivery::Nmi, 0, Trigger::Edge));
}

#[test]
fn an_init_leaves_the_state_of_power_up_but_for_the_id() {
    let mut apic = LocalApic::new(ApicId(7), false);
    assert!(send(&mut apic, Delivery::StartUp, 0x9a, Trigger::Edge));
    assert_eq!(apic.take(OPEN), Some(Event::StartUp { vector: 0x9a }));
    mess_up(&mut apic);
    assert!(send(&mut apic, Delivery::Init, 0, Trigger::Edge));
    assert_eq!(apic.pending(), Pending { reset: true, ..Pending::default() });
    assert_eq!(apic.take(OPEN), Some(Event::Init));
    assert_power_up(&mut apic, 7);
    assert_eq!(apic, LocalApic::new(ApicId(7), false));
}

#[test]
fn a_reset_leaves_the_state_of_power_up() {
    let mut apic = LocalApic::new(ApicId(0), true);
    mess_up(&mut apic);
    apic.reset();
    assert_eq!(apic, LocalApic::new(ApicId(0), true));
}

#[test]
fn what_is_written_is_read_back_within_the_bits_that_exist() {
    let mut apic = running();
    for (offset, expected) in [
        (0x80, 0xff),
        (0xd0, 0xff00_0000),
        (0xe0, 0xffff_ffff),
        (0xf0, 0x3ff),
        (0x310, 0xff00_0000),
        (0x320, 0x7_00ff),
        (0x330, 0x1_07ff),
        (0x340, 0x1_07ff),
        (0x350, 0x1_a7ff),
        (0x360, 0x1_a7ff),
        (0x370, 0x1_00ff),
        (0x3e0, 0xb),
        (0x20, 0),
        (0x30, 0x0005_0014),
    ] {
        put(&mut apic, offset, 0xffff_ffff);
        assert_eq!(get(&mut apic, offset), expected, "{offset:#x}");
    }
    put(&mut apic, 0xe0, 0);
    assert_eq!(get(&mut apic, 0xe0), 0x0fff_ffff, "the cluster model");
    assert_eq!(get(&mut apic, 0x280), 0, "none of it was an error");
}

#[test]
fn narrow_reads_give_their_bytes_and_other_odd_accesses_nothing() {
    let mut apic = running();
    let mut byte = [0];
    apic.read(0x32, &mut byte, at(0));
    assert_eq!(byte, [5]);
    let mut eight = [0xaa; 8];
    apic.read(0x30, &mut eight, at(0));
    assert_eq!(eight, [0; 8]);
    let mut across = [0xaa; 2];
    apic.read(0x33, &mut across, at(0));
    assert_eq!(across, [0; 2]);
    assert_eq!(apic.write(0x80, &[0xff], at(0)), Effects::default());
    assert_eq!(apic.write(0x84, &[0xff; 4], at(0)), Effects::default());
    assert_eq!(get(&mut apic, 0x80), 0);
}

#[test]
fn a_higher_class_interrupts_a_lower_one_and_the_same_class_waits() {
    let mut apic = running();
    for vector in [0x45, 0x4f, 0x51] {
        assert!(edge(&mut apic, vector));
    }
    assert_eq!(apic.take(OPEN), interrupt(0x51));
    assert_eq!((apic.take(OPEN), apic.pending()), (None, Pending::default()));
    assert!(edge(&mut apic, 0x62));
    assert_eq!(apic.take(OPEN), interrupt(0x62), "it preempts");
    assert_eq!(get(&mut apic, 0xa0), 0x60);
    put(&mut apic, 0xb0, 0);
    assert_eq!((get(&mut apic, 0xa0), apic.take(OPEN)), (0x50, None));
    put(&mut apic, 0xb0, 0);
    assert_eq!(apic.take(OPEN), interrupt(0x4f));
    assert_eq!(apic.take(OPEN), None, "0x45 is of the class in service");
    put(&mut apic, 0xb0, 0);
    assert_eq!(apic.take(OPEN), interrupt(0x45));
}

#[test]
fn the_task_priority_holds_back_its_class_and_those_below() {
    let mut apic = running();
    put(&mut apic, 0x80, 0x5a);
    assert!(edge(&mut apic, 0x5f));
    assert_eq!((apic.take(OPEN), apic.cr8(), get(&mut apic, 0xa0)), (None, 5, 0x5a));
    apic.set_cr8(4);
    assert_eq!(get(&mut apic, 0x80), 0x40);
    assert_eq!(apic.take(OPEN), interrupt(0x5f));
    apic.set_cr8(0xff);
    assert_eq!((apic.cr8(), get(&mut apic, 0xa0)), (15, 0xf0));
}

#[test]
fn a_vector_waits_once_while_the_same_one_is_in_service() {
    let mut apic = running();
    assert!(edge(&mut apic, 0x40));
    assert_eq!(apic.take(OPEN), interrupt(0x40));
    assert!(edge(&mut apic, 0x40) && edge(&mut apic, 0x40));
    assert_eq!((get(&mut apic, 0x120), get(&mut apic, 0x220)), (1, 1), "in service and requested");
    assert_eq!(apic.take(OPEN), None);
    put(&mut apic, 0xb0, 0);
    assert_eq!(apic.take(OPEN), interrupt(0x40));
    put(&mut apic, 0xb0, 0);
    assert_eq!(apic.take(OPEN), None);
}

#[test]
fn only_the_eoi_of_a_level_triggered_interrupt_is_broadcast() {
    let mut apic = running();
    assert_eq!(put(&mut apic, 0xb0, 0), Effects::default(), "nothing is in service");
    for (trigger, eoi) in [(Trigger::Edge, None), (Trigger::Level, Some(0x40)), (Trigger::Edge, None)] {
        assert!(send(&mut apic, Delivery::Fixed, 0x40, trigger));
        assert_eq!(get(&mut apic, 0x1a0), u32::from(eoi.is_some()), "TMR");
        assert_eq!(apic.take(OPEN), interrupt(0x40));
        assert_eq!(put(&mut apic, 0xb0, 0), Effects { eoi, message: None });
    }
}

#[test]
fn software_disables_vectors_and_the_vector_table_but_neither_nmi_init_sipi_nor_ipis() {
    let mut apic = running();
    put(&mut apic, 0x350, 0x40);
    put(&mut apic, 0x320, 0x41);
    assert!(edge(&mut apic, 0x50));
    put(&mut apic, 0xf0, 0xff);
    assert_eq!((get(&mut apic, 0x350), get(&mut apic, 0x320)), (0x1_0040, 0x1_0041));
    put(&mut apic, 0x350, 0x40);
    assert_eq!(get(&mut apic, 0x350), 0x1_0040, "the mask cannot be reset");
    assert!(!edge(&mut apic, 0x60));
    assert_eq!(apic.take(OPEN), interrupt(0x50), "what was accepted before is still handled");
    assert!(send(&mut apic, Delivery::Nmi, 0, Trigger::Edge));
    assert_eq!(apic.take(OPEN), Some(Event::Nmi));
    assert!(put(&mut apic, 0x300, 0xc_0040).message.is_some());
    assert!(send(&mut apic, Delivery::Init, 0, Trigger::Edge));
    assert_eq!(apic.take(OPEN), Some(Event::Init));
}

#[test]
fn a_processor_starts_at_the_first_sipi_after_init_and_ignores_others() {
    let mut apic = LocalApic::new(ApicId(1), false);
    assert!(apic.waits_for_start_up());
    assert!(send(&mut apic, Delivery::Nmi, 0, Trigger::Edge));
    assert_eq!((apic.take(OPEN), apic.pending()), (None, Pending::default()), "an NMI waits for the SIPI");
    // INIT, SIPI, SIPI, all before the vCPU's thread looks.
    for (delivery, vector) in [(Delivery::Init, 0), (Delivery::StartUp, 0x9a), (Delivery::StartUp, 0x9b)] {
        assert!(send(&mut apic, delivery, vector, Trigger::Edge));
    }
    assert_eq!(apic.take(OPEN), Some(Event::Init));
    assert_eq!(apic.take(OPEN), Some(Event::StartUp { vector: 0x9a }));
    assert!(send(&mut apic, Delivery::StartUp, 0x10, Trigger::Edge));
    assert_eq!((apic.take(OPEN), apic.pending()), (None, Pending::default()));
    // Again while it runs; the second INIT forgets the SIPI of the first.
    for (delivery, vector) in
        [(Delivery::Init, 0), (Delivery::StartUp, 0x20), (Delivery::Init, 0), (Delivery::StartUp, 0x30)]
    {
        assert!(send(&mut apic, delivery, vector, Trigger::Edge));
    }
    assert_eq!(apic.take(OPEN), Some(Event::Init));
    assert_eq!(apic.take(OPEN), Some(Event::StartUp { vector: 0x30 }));
}

#[test]
fn the_bootstrap_processor_runs_on_after_init_and_needs_no_sipi() {
    let mut apic = running();
    assert!(send(&mut apic, Delivery::Init, 0, Trigger::Edge));
    assert!(send(&mut apic, Delivery::StartUp, 0x9a, Trigger::Edge));
    assert_eq!((apic.take(OPEN), apic.take(OPEN)), (Some(Event::Init), None));
    assert!(!apic.waits_for_start_up());
}

#[test]
fn an_nmi_and_interrupts_wait_for_their_windows() {
    let mut apic = running();
    assert!(send(&mut apic, Delivery::Nmi, 0, Trigger::Edge) && edge(&mut apic, 0x40));
    assert_eq!(apic.pending(), Pending { reset: false, nmi: true, interrupt: true });
    assert_eq!(apic.take(Window::default()), None);
    assert_eq!(apic.take(Window { interrupts: true, nmi: false }), interrupt(0x40));
    assert_eq!(apic.take(Window { interrupts: false, nmi: true }), Some(Event::Nmi));
    assert_eq!(apic.pending(), Pending::default());
}

#[test]
fn the_error_register_is_latched_by_a_write_and_the_interrupt_armed_again() {
    let mut apic = running();
    put(&mut apic, 0x370, 0xfe);
    get(&mut apic, 0x2f0); // no such register: this APIC has no CMCI
    assert_eq!(get(&mut apic, 0x280), 0, "not before a write");
    assert_eq!(apic.take(OPEN), interrupt(0xfe));
    assert!(!edge(&mut apic, 15));
    assert_eq!(put(&mut apic, 0x300, 0x4_000f), Effects::default());
    put(&mut apic, 0xb0, 0);
    assert_eq!(apic.take(OPEN), None, "one interrupt until the register is written");
    put(&mut apic, 0x280, 0);
    assert_eq!(get(&mut apic, 0x280), 0b1110_0000);
    assert_eq!(get(&mut apic, 0x280), 0b1110_0000, "a read clears nothing");
    put(&mut apic, 0x280, 0);
    assert_eq!(get(&mut apic, 0x280), 0);
    put(&mut apic, 0x3f0, 0);
    assert_eq!(apic.take(OPEN), interrupt(0xfe));
}

#[test]
fn an_illegal_vector_in_the_error_entry_itself_is_one_more_error_and_no_loop() {
    let mut apic = running();
    put(&mut apic, 0x370, 0x0f);
    put(&mut apic, 0x3f0, 0);
    put(&mut apic, 0x280, 0);
    assert_eq!((get(&mut apic, 0x280), apic.take(OPEN)), (0b1100_0000, None));
}

#[test]
fn an_ipi_leaves_as_a_message_and_the_register_reads_idle() {
    let mut apic = running();
    put(&mut apic, 0x310, 0x0500_0000);
    let message = put(&mut apic, 0x300, 0x4040 | 1 << 12).message;
    let (delivery, trigger) = (Delivery::Fixed, Trigger::Edge);
    let destination = Destination::Physical(ApicId(5));
    assert_eq!(message, Some(Message { destination, delivery, vector: 0x40, trigger, asserted: true }));
    assert_eq!((get(&mut apic, 0x300), get(&mut apic, 0x310)), (0x4040, 0x0500_0000));
    assert_eq!(put(&mut apic, 0x300, 0x4_0600), Effects::default(), "no SIPI to oneself");
}

#[test]
fn the_arbitration_priority_follows_the_manuals_formula() {
    let mut apic = running();
    put(&mut apic, 0x80, 0x35);
    assert_eq!(get(&mut apic, 0x90), 0x35);
    assert!(edge(&mut apic, 0x71));
    assert_eq!(get(&mut apic, 0x90), 0x70);
    assert_eq!(apic.take(OPEN), interrupt(0x71));
    assert_eq!(get(&mut apic, 0x90), 0x30, "3 and 7");
}
