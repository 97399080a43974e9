//! The transport as a guest meets it: capabilities, registers, BARs that move, vectors, lifecycle.

use std::time::Duration;

use super::super::features::{RING_EVENT_IDX, VERSION_1};
use super::super::rng::Rng;
use super::super::testing::{Harness, status};
use super::*;
use crate::bus::Action;
use crate::lifecycle::{DeviceState, Error, Lifecycle};

const RAM: usize = 16 << 20;

fn machine() -> Harness {
    Harness::new(Box::new(Rng::new()), RAM)
}

fn answers(machine: &Harness, queue: &mut super::super::testing::DriverQueue) -> bool {
    queue.add(&[], &[(machine.data(0), 64)]);
    queue.kick();
    queue.wait_up_to(Duration::from_secs(5)).is_some_and(|used| used.len == 64)
}

/// Offset of the virtio capability of type `kind`.
fn capability(machine: &Harness, kind: u8) -> u64 {
    let mut at = u64::from(machine.read_config(0x34) & 0xff);
    loop {
        let first = machine.read_config(at);
        if first & 0xff == 0x09 && (first >> 24) as u8 == kind {
            return at;
        }
        at = u64::from(first >> 8 & 0xff);
        assert_ne!(at, 0, "there is a capability of type {kind}");
    }
}

#[test]
fn a_guest_finds_a_modern_device_and_the_places_of_its_registers() {
    let machine = machine();
    assert_eq!(machine.read_config(0), 0x1044_1af4);
    assert_eq!(machine.read_config(8) & 0xff, 1, "not transitional");
    assert_eq!(machine.read_config(0x3c) >> 8 & 0xff, 0, "no INTx pin");
    for (kind, offset, len) in [(1, COMMON, 0x38), (2, NOTIFY, 4), (3, ISR, 1), (4, DEVICE, 0x1000)] {
        let at = capability(&machine, kind);
        assert_eq!(machine.read_config(at + 4) & 0xff, 0, "BAR 0");
        assert_eq!(u64::from(machine.read_config(at + 8)), offset);
        assert_eq!(machine.read_config(at + 12), len);
    }
    assert_eq!(machine.read_config(capability(&machine, 2) + 16), NOTIFY_MULTIPLIER);
    let msix = machine.msix_capability();
    assert_eq!(machine.read_config(msix) >> 16 & 0x7ff, 1, "two vectors");
    assert_eq!(u64::from(machine.read_config(msix + 4)), TABLE);
    assert_eq!(u64::from(machine.read_config(msix + 8)), PENDING);
}

#[test]
fn features_are_agreed_on_only_if_all_were_offered_and_version_1_is_among_them() {
    let machine = machine();
    assert_ne!(machine.offered() & VERSION_1, 0);
    assert!(machine.negotiate(RING_EVENT_IDX));
    machine.write(0x08, 0, 4);
    machine.write(0x0c, 0, 4);
    assert_eq!(machine.read(0x0c, 4), RING_EVENT_IDX, "features are fixed once they are agreed on");
    assert!(!machine.negotiate(1 << 40), "never offered");
    machine.set_status(0);
    machine.write(0x08, 1, 4);
    machine.write(0x0c, 0, 4);
    machine.set_status(11);
    assert_eq!(machine.status(), 3, "without version 1 there is no agreement");
    machine.set_status(15);
    assert_eq!(machine.status(), 3 | status::NEEDS_RESET, "and a driver that goes on regardless is stopped");
    machine.set_status(0);
    assert_eq!(machine.status(), 0);
}

#[test]
fn status_bits_are_only_added() {
    let machine = machine();
    machine.set_status(3);
    machine.set_status(1);
    assert_eq!(machine.status(), 3);
    machine.set_status(status::NEEDS_RESET | 3);
    assert_eq!(machine.status(), 3, "the driver cannot put the device into distress");
}

#[test]
fn a_queue_outside_of_ram_cannot_be_enabled() {
    let machine = machine();
    assert!(machine.negotiate(0));
    for (register, value) in [(0x20, 0x1000u64), (0x28, 1 << 40), (0x30, 0x3000)] {
        machine.write(register, value & 0xffff_ffff, 4);
        machine.write(register + 4, value >> 32, 4);
    }
    machine.write(0x1c, 1, 2);
    assert_eq!(machine.read(0x1c, 2), 0);
    assert_ne!(machine.status() & status::NEEDS_RESET, 0);
}

#[test]
fn registers_of_queues_that_do_not_exist_read_as_such_and_ignore_writes() {
    let machine = machine();
    machine.write(0x16, 77, 2);
    machine.write(0x18, 64, 2);
    machine.write(0x1c, 1, 2);
    assert_eq!((machine.read(0x18, 2), machine.read(0x1a, 2), machine.read(0x1c, 2)), (0, 0xffff, 0));
    machine.write(0x16, 0, 2);
    machine.write(0x18, 3, 2);
    assert_eq!(machine.read(0x18, 2), 64, "a size that is no power of two is not taken");
    machine.write(0x1a, 9, 2);
    assert_eq!(machine.read(0x1a, 2), 0xffff, "a vector that does not exist is not assigned");
    machine.write(0x18, 0x0010_0010, 4);
    assert_eq!(machine.read(0x18, 2), 64, "an access of the wrong width is not taken");
    assert_eq!(machine.read(0x14, 8), 0x0040_0000_0000 | 0xffff << 48, "a wide read sees several registers");
}

#[test]
fn doorbells_follow_the_bar_and_the_memory_space_bit() {
    let machine = machine();
    let at = machine.bar() + NOTIFY;
    assert_eq!(machine.doorbells.addresses(), [at]);
    machine.write_config(0x04, 0);
    assert!(machine.doorbells.addresses().is_empty());
    assert_eq!(machine.read(COMMON + 0x12, 2), 0xffff, "nobody answers");
    let moved = machine.bar() + 0x10_0000;
    machine.write_config(0x10, moved as u32);
    machine.write_config(0x04, 6);
    assert_eq!(machine.doorbells.addresses(), [moved + NOTIFY]);
    let mut data = [0; 2];
    machine.bus.read(moved + COMMON + 0x12, &mut data);
    assert_eq!(data, [1, 0], "the registers moved along");
    machine.write_config(0x10, 0x1000);
    assert!(machine.doorbells.addresses().is_empty(), "a BAR over RAM answers nowhere");
    machine.write_config(0x10, 0xffff_ffff);
    assert_eq!(machine.read_config(0x10), 0xffff_8000, "its size");
}

#[test]
fn a_doorbell_that_the_kernel_did_not_take_works_all_the_same() {
    let machine = machine();
    let mut queue = machine.run(1, 8).remove(0);
    queue.add(&[], &[(machine.data(0), 64)]);
    let at = queue.available;
    // As `kick`, but through the bus instead of the registered eventfd.
    vm_memory::Bytes::write_obj(&*machine.memory, 1u16, vm_memory::GuestAddress(at.0 + 2)).expect("RAM");
    machine.write(NOTIFY, 0, 2);
    assert_eq!(queue.wait().len, 64);
    machine.write(NOTIFY + 4, 0, 2);
}

#[test]
fn registers_can_be_reached_through_configuration_space() {
    let machine = machine();
    let window = capability(&machine, 5);
    let select = |offset: u32, len: u32| {
        machine.write_config(window + 4, 0);
        machine.write_config(window + 8, offset);
        machine.write_config(window + 12, len);
    };
    select(0x14, 1);
    machine.write_config(window + 16, 3);
    assert_eq!(machine.status(), 3);
    assert_eq!(machine.read_config(window + 16) & 0xff, 3);
    for (offset, len) in [(0x8000, 4), (0xffff_ffff, 1), (1, 2), (0, 3), (0, 0)] {
        select(offset, len);
        machine.write_config(window + 16, 0);
        machine.read_config(window + 16);
    }
    assert_eq!(machine.status(), 3, "places that do not exist are left alone");
}

#[test]
fn interrupts_of_a_masked_vector_are_pending_until_it_is_unmasked() {
    let machine = machine();
    let mut queue = machine.run(1, 8).remove(0);
    let route = machine.routes.get(1);
    assert_eq!((route.message().address, route.message().data, route.masked()), (0xfee0_0000, 0x41, false));
    machine.write(TABLE + 16 + 12, 1, 4);
    assert!(route.masked());
    queue.add(&[], &[(machine.data(0), 64)]);
    queue.kick();
    machine.wait_for("the pending bit", || machine.read(PENDING, 8) == 0b10);
    assert_eq!(route.count(), 0);
    machine.write(TABLE + 16 + 8, 0x99, 4);
    machine.write(TABLE + 16 + 12, 0, 4);
    assert_eq!((route.count(), route.message().data), (1, 0x99));
    assert_eq!(machine.read(PENDING, 8), 0);
    assert_eq!(queue.poll().map(|used| used.len), Some(64));

    // The same for the whole function.
    let capability = machine.msix_capability();
    machine.write_config(capability, 0xc000_0000);
    queue.add(&[], &[(machine.data(0), 64)]);
    queue.kick();
    machine.wait_for("the pending bit", || machine.read(PENDING, 8) == 0b10);
    machine.write_config(capability, 0x8000_0000);
    assert_eq!(route.count(), 2);
    assert_eq!(machine.read(TABLE + 16 + 8, 4), 0x99);
    machine.write(TABLE + 17, 0xff, 1);
    assert_eq!(machine.read(TABLE + 16, 4), 0xfee0_0000, "narrow writes are ignored");
}

#[test]
fn a_running_device_continues_elsewhere_from_its_state() {
    let machine = machine();
    let mut queue = machine.run(1, 8).remove(0);
    assert!(answers(&machine, &mut queue));
    assert!(matches!(machine.function.save(), Err(Error::Device { .. })), "only while stopped");
    machine.function.stop().expect("it stops");
    machine.function.stop().expect("twice is as once");
    let text = serde_json::to_string(&machine.function.save().expect("it saves")).expect("JSON");
    let state: DeviceState = serde_json::from_str(&text).expect("JSON");

    let other = Harness::stopped(Box::new(Rng::new()), machine.memory.clone());
    other.function.restore(&state).expect("it fits");
    assert_eq!(other.function.save().expect("it saves"), state, "nothing is lost");
    other.function.start().expect("it starts");
    assert_eq!(other.routes.get(1).message(), machine.routes.get(1).message());
    queue.add(&[], &[(machine.data(0), 64)]);
    queue.kick();
    other.write(NOTIFY, 0, 2);
    other.wait_for("its interrupt", || other.routes.get(1).count() > 0);
    assert_eq!(queue.poll().map(|used| used.len), Some(64));
}

#[test]
fn a_state_that_does_not_fit_changes_nothing() {
    let machine = machine();
    machine.run(1, 8);
    machine.function.stop().expect("it stops");
    let good = machine.function.save().expect("it saves");
    let other = Harness::stopped(Box::new(Rng::new()), machine.memory.clone());
    let before = other.function.save().expect("it saves");
    let mut wrong = good.clone();
    wrong.kind = "virtio-blk".to_owned();
    assert!(matches!(other.function.restore(&wrong), Err(Error::Foreign { .. })));
    let changes: [(&str, serde_json::Value); 6] = [
        ("/queues/0/layout/available", (1u64 << 50).into()),
        ("/queues/0/layout/size", 128.into()),
        ("/queues/0/layout/size", 7.into()),
        ("/driver_features", u64::MAX.into()),
        ("/config/bytes/0", 1.into()),
        ("/queues", serde_json::Value::Array(Vec::new())),
    ];
    for (path, value) in changes {
        let mut wrong = good.clone();
        *wrong.data.pointer_mut(path).expect("it exists") = value;
        assert!(matches!(other.function.restore(&wrong), Err(Error::Invalid { .. })), "{path}");
        assert_eq!(other.function.save().expect("it saves"), before, "{path}");
    }
    other.function.restore(&good).expect("the sound one fits");
}

#[test]
fn a_reset_of_the_machine_brings_back_the_state_of_power_on() {
    let machine = machine();
    let fresh = Harness::stopped(Box::new(Rng::new()), machine.memory.clone());
    let mut queue = machine.run(1, 8).remove(0);
    assert!(answers(&machine, &mut queue));
    machine.function.reset().expect("it resets");
    assert!(machine.doorbells.addresses().is_empty());
    machine.write_config(4, 6);
    assert_eq!(machine.function.save().expect("saved"), fresh.function.save().expect("saved"));
    machine.function.start().expect("it starts");
    let mut queue = machine.run(1, 8).remove(0);
    assert!(answers(&machine, &mut queue));
}

#[test]
fn a_stopped_device_answers_nothing_until_it_is_started() {
    let machine = machine();
    let mut queue = machine.run(1, 8).remove(0);
    machine.function.stop().expect("it stops");
    queue.add(&[], &[(machine.data(0), 64)]);
    queue.kick();
    queue.ring();
    assert_eq!(queue.wait_up_to(Duration::from_millis(50)), None);
    machine.function.start().expect("it starts");
    assert_eq!(queue.wait().len, 64, "the doorbell from before counts");
}

#[test]
fn both_ways_to_configuration_space_show_the_same_and_empty_slots_nothing() {
    let machine = machine();
    let ports = machine.root.ports();
    let read = |address: u32, offset: u64, len: usize| {
        assert!(matches!(ports.write(0, &(1 << 31 | address).to_le_bytes()), Outcome::Done));
        let mut data = [0; 4];
        ports.read(4 + offset, &mut data[..len]);
        u32::from_le_bytes(data)
    };
    assert_eq!(read(0x0800, 0, 4), 0x1044_1af4);
    assert_eq!(read(0x0800, 2, 2), 0x1044);
    assert_eq!(read(0x0800, 3, 1), 0x10);
    assert_eq!(read(0, 0, 4) & 0xffff, 0x8086, "the host bridge");
    assert_eq!(read(0x0008, 0, 4) >> 16, 0x0600);
    assert_eq!(read(0x0900, 0, 4), 0xffff_ffff, "function 1");
    assert_eq!(read(0x1000, 0, 4), 0xffff_ffff, "slot 2");
    assert_eq!(read(0x1_0800, 0, 4), 0xffff_ffff, "bus 1");
    let mut back = [0; 4];
    ports.read(0, &mut back);
    assert_eq!(u32::from_le_bytes(back), 1 << 31 | 0x1_0800);
    assert_eq!(machine.read_config(0x100), 0, "no extended capabilities");
    assert!(matches!(ports.write(1, &[6]), Outcome::Act(Action::Reset)), "port 0xcf9");
    assert!(matches!(ports.write(1, &[2]), Outcome::Done));
}
