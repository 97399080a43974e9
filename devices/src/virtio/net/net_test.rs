//! The network card, driven as a guest would, with a datagram socket in the interface's place.

use std::os::unix::net::UnixDatagram;

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::lifecycle::Lifecycle;
use crate::virtio::features::RING_EVENT_IDX;
use crate::virtio::testing::{Harness, status};

const MAC: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];

fn card(pairs: usize) -> (Net, Vec<UnixDatagram>) {
    let ends = (0..pairs).map(|_| {
        let (ours, theirs) = UnixDatagram::pair().expect("sockets");
        ours.set_nonblocking(true).expect("a socket");
        theirs.set_read_timeout(Some(Duration::from_secs(10))).expect("a socket");
        (Tap::from_socket(ours.into()), theirs)
    });
    let (taps, wires): (Vec<_>, Vec<_>) = ends.unzip();
    (Net::new(taps, MAC), wires)
}

fn machine(pairs: usize) -> (Harness, Vec<UnixDatagram>, Arc<Counters>) {
    let (net, wires) = card(pairs);
    let counters = net.counters();
    (Harness::new(Box::new(net), 16 << 20), wires, counters)
}

/// A header of zeros and `len` bytes of frame.
fn packet(len: usize, seed: u8) -> Vec<u8> {
    let mut packet = vec![0; 12];
    packet.extend((0..len).map(|i| (i as u8).wrapping_add(seed)));
    packet
}

fn bytes(machine: &Harness, at: GuestAddress, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    machine.memory.read_slice(&mut bytes, at).expect("RAM");
    bytes
}

#[test]
fn frames_leave_as_the_guest_posted_them() {
    let (machine, wires, counters) = machine(1);
    let mut queues = machine.run(2, 16);
    let sent = packet(1500, 3);
    machine.memory.write_slice(&sent, machine.data(0)).expect("RAM");
    queues[1].add(&[(machine.data(0), 12), (machine.data(12), 600), (machine.data(612), 900)], &[]);
    queues[1].kick();
    queues[1].wait();
    let mut got = [0; 2000];
    let len = wires[0].recv(&mut got).expect("a frame");
    assert_eq!(&got[..len], sent);
    queues[1].add(&[(machine.data(0), 20)], &[]);
    queues[1].add(&[(GuestAddress(1 << 40), 100)], &[]);
    queues[1].add(&[(machine.data(0), 70_000)], &[]);
    queues[1].kick();
    (0..3).for_each(|_| assert_eq!(queues[1].wait().len, 0));
    let counted = counters.snapshot();
    assert_eq!((counted.sent, counted.sent_bytes, counted.dropped), (1, 1500, 3));
}

#[test]
fn a_received_frame_is_spread_over_as_many_buffers_as_it_needs() {
    let (machine, wires, _) = machine(1);
    let mut queues = machine.run(2, 64);
    for i in 0..64 {
        queues[0].add(&[], &[(machine.data(0x1_0000 + i * 0x800), 2048)]);
    }
    queues[0].kick();
    let mut next = 0;
    for (len, buffers) in [(60, 1), (2036, 1), (2037, 2), (9000, 5)] {
        let frame = packet(len, len as u8);
        wires[0].send(&frame).expect("it goes out");
        let mut got = Vec::new();
        for _ in 0..buffers {
            let used = queues[0].wait();
            got.extend(bytes(&machine, machine.data(0x1_0000 + next * 0x800), used.len as usize));
            next += 1;
        }
        assert_eq!(got.len(), frame.len());
        assert_eq!(got[10..12], [buffers, 0], "a frame of {len} bytes says over how many buffers it is");
        assert_eq!(got[12..], frame[12..]);
    }
}

#[test]
fn a_driver_without_merged_buffers_gets_one_buffer_for_each_frame() {
    let (machine, wires, _) = machine(1);
    assert!(machine.negotiate(RING_EVENT_IDX | feature::MAC));
    let mut queue = machine.queue(0, 8).event_idx(true);
    machine.ready();
    for round in 0..3u8 {
        queue.add(&[], &[(machine.data(0), 12), (machine.data(0x100), 1514)]);
        queue.kick();
        wires[0].send(&packet(100, round)).expect("it goes out");
        assert_eq!(queue.wait().len, 112);
        assert_eq!(bytes(&machine, machine.data(0), 12)[10..], [1, 0]);
        assert_eq!(bytes(&machine, machine.data(0x100), 100), packet(100, round)[12..]);
    }
}

#[test]
fn frames_that_come_before_there_are_buffers_wait() {
    let (machine, wires, _) = machine(1);
    let mut queues = machine.run(2, 64);
    for i in 0..3 {
        wires[0].send(&packet(64, i)).expect("it goes out");
    }
    assert_eq!(queues[0].wait_up_to(Duration::from_millis(30)), None);
    for i in 0..64 {
        queues[0].add(&[], &[(machine.data(i * 0x800), 2048)]);
    }
    queues[0].kick();
    (0..3).for_each(|_| assert_eq!(queues[0].wait().len, 76));
}

#[test]
fn buffers_that_no_frame_came_for_survive_a_stop_and_a_restore() {
    let (machine, _wires, _) = machine(1);
    let mut queues = machine.run(2, 64);
    for i in 0..64 {
        queues[0].add(&[], &[(machine.data(i * 0x800), 2048)]);
    }
    queues[0].kick();
    std::thread::sleep(Duration::from_millis(30));
    machine.function.stop().expect("it stops");
    let state = machine.function.save().expect("it saves");
    let unfinished = state.data["queues"][0]["layout"]["unfinished"].as_array().expect("a list").len();
    assert_eq!(unfinished, 33, "what the largest frame needs was taken in advance");
    let (net, wires) = card(1);
    let other = Harness::stopped(Box::new(net), machine.memory.clone());
    other.function.restore(&state).expect("it fits");
    other.function.start().expect("it starts");
    // As many frames as fit while the largest one still could.
    for i in 0..32 {
        wires[0].send(&packet(64, i)).expect("it goes out");
    }
    let mut heads = Vec::new();
    machine.wait_for("32 frames", || other.routes.get(1).count() > 0);
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    while heads.len() < 32 {
        assert!(std::time::Instant::now() < deadline, "{} of 32 buffers were used", heads.len());
        heads.extend(queues[0].poll().map(|used| used.head));
    }
    heads.sort_unstable();
    heads.dedup();
    assert_eq!(heads.len(), 32, "each buffer is used once");
}

#[test]
fn the_control_queue_sets_the_number_of_pairs_and_refuses_the_rest() {
    let (machine, wires, counters) = machine(4);
    assert_eq!(machine.read(0x2000 + 8, 2), 4);
    let mut queues = machine.run(9, 16);
    let mut command = |bytes: &[u8]| {
        machine.memory.write_slice(bytes, machine.data(0)).expect("RAM");
        queues[8].add(&[(machine.data(0), bytes.len() as u32)], &[(machine.data(0x100), 1)]);
        queues[8].kick();
        assert_eq!(queues[8].wait().len, 1);
        self::bytes(&machine, machine.data(0x100), 1)[0]
    };
    assert_eq!(command(&[4, 0, 3, 0]), 0);
    assert_eq!(counters.pairs(), 3);
    assert_eq!(command(&[4, 0, 0, 0]), 1);
    assert_eq!(command(&[4, 0, 5, 0]), 1);
    assert_eq!(command(&[4, 0]), 1);
    assert_eq!(command(&[1, 0, 1, 0]), 1, "no other class is offered");
    machine.memory.write_slice(&packet(64, 1), machine.data(0)).expect("RAM");
    queues[7].add(&[(machine.data(0), 76)], &[]);
    queues[7].kick();
    queues[7].wait();
    assert_eq!(wires[3].recv(&mut [0; 100]).expect("a frame"), 76, "each pair has its own descriptor");
    machine.function.reset().expect("all workers hand their queues back");
    assert_eq!(counters.pairs(), 0);
}

#[test]
fn features_that_need_others_are_refused_without_them() {
    let (machine, _wires, _) = machine(2);
    for bad in [feature::GUEST_TSO4, feature::HOST_TSO6 | feature::GUEST_CSUM, feature::MQ] {
        assert!(!machine.negotiate(bad), "{bad:#x}");
    }
    assert!(machine.negotiate(feature::HOST_TSO6 | feature::CSUM));
    assert_eq!(machine.status() & status::NEEDS_RESET, 0);
    let mac = (0..6u64).map(|i| machine.read(0x2000 + i, 1) as u8).collect::<Vec<_>>();
    assert_eq!(mac, MAC);
}
