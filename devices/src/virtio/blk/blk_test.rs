//! The block device, driven as a guest would.

use std::time::{Duration, Instant};

use transport::ring::{Completion, Ring};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::disk::memory::MemoryDisk;
use crate::disk::{Done, Error, Operation, Request};
use crate::lifecycle::Lifecycle;
use crate::virtio::testing::{DriverQueue, Harness, INDIRECT, NEXT, Used, WRITE, status};

const RAM: usize = 16 << 20;
const HEADER: u64 = 0;
const STATUS: u64 = 0x100;
const DATA: u64 = 0x1000;

fn harness(disk: impl Disk + 'static, queues: u16) -> Harness {
    let options = Options { serial: "omega-0001".to_owned(), queues };
    Harness::new(Box::new(Blk::new(Box::new(disk), &options)), RAM)
}

/// Puts a header and an impossible status byte into slot `slot` of guest memory.
fn prepare(machine: &Harness, slot: u64, kind: u32, sector: u64) -> (GuestAddress, GuestAddress) {
    let (header, status) = (machine.data(slot * 0x200 + HEADER), machine.data(slot * 0x200 + STATUS));
    machine.memory.write_obj([kind, 0], header).expect("RAM");
    machine.memory.write_obj(sector, GuestAddress(header.0 + 8)).expect("RAM");
    machine.memory.write_obj(0xeeu8, status).expect("RAM");
    (header, status)
}

fn status_at(machine: &Harness, at: GuestAddress) -> u8 {
    machine.memory.read_obj(at).expect("RAM")
}

/// One request, carried out; its status and used length.
fn request(
    machine: &Harness,
    queue: &mut DriverQueue,
    kind: u32,
    sector: u64,
    readable: &[(GuestAddress, u32)],
    writable: &[(GuestAddress, u32)],
) -> (u8, u32) {
    let (header, status) = prepare(machine, 0, kind, sector);
    let readable: Vec<_> = [(header, 16)].iter().chain(readable).copied().collect();
    let writable: Vec<_> = writable.iter().copied().chain([(status, 1)]).collect();
    let head = queue.add(&readable, &writable);
    queue.kick();
    let used = queue.wait();
    assert_eq!(used.head, head);
    (status_at(machine, status), used.len)
}

fn data(machine: &Harness) -> GuestAddress {
    machine.data(0x10_0000 + DATA)
}

#[test]
fn what_was_written_is_read_back_through_any_layout_of_descriptors() {
    let machine = harness(MemoryDisk::new(1 << 20), 1);
    let mut queue = machine.run(1, 64).remove(0);
    let from = data(&machine);
    let bytes: Vec<u8> = (0..4096u32).map(|i| (i * 7 % 251) as u8).collect();
    machine.memory.write_slice(&bytes, from).expect("RAM");
    let parts = [(from, 1000), (GuestAddress(from.0 + 1000), 3096)];
    assert_eq!(request(&machine, &mut queue, 1, 8, &parts, &[]), (0, 1));
    let to = GuestAddress(from.0 + 0x10000);
    let parts = [(to, 1), (GuestAddress(to.0 + 1), 4095)];
    assert_eq!(request(&machine, &mut queue, 0, 8, &[], &parts), (0, 4097));
    let mut back = vec![0; 4096];
    machine.memory.read_slice(&mut back, to).expect("RAM");
    assert!(back == bytes, "the same bytes come back");
    assert_eq!(request(&machine, &mut queue, 4, 0, &[], &[]), (0, 1));
    assert_eq!(request(&machine, &mut queue, 8, 0, &[], &[(to, 20)]), (0, 21));
    machine.memory.read_slice(&mut back[..20], to).expect("RAM");
    assert_eq!(&back[..20], b"omega-0001\0\0\0\0\0\0\0\0\0\0");
}

#[test]
fn discard_and_write_zeroes_take_one_range_that_must_lie_on_the_disk() {
    let machine = harness(MemoryDisk::from_vec(vec![1; 1 << 20]), 1);
    let mut queue = machine.run(1, 64).remove(0);
    let at = data(&machine);
    let mut range = |kind, sector: u64, sectors: u32, flags: u32| {
        machine.memory.write_obj(sector, at).expect("RAM");
        machine.memory.write_obj([sectors, flags], GuestAddress(at.0 + 8)).expect("RAM");
        request(&machine, &mut queue, kind, 0, &[(at, 16)], &[]).0
    };
    assert_eq!(range(13, 8, 8, 1), 0);
    assert_eq!(range(11, 16, 8, 0), 0);
    assert_eq!(range(11, 16, 8, 1), 2, "discard has no unmap flag");
    assert_eq!(range(13, 16, 8, 2), 2, "unknown flags are not supported");
    assert_eq!(range(13, 2047, 2, 0), 1, "it ends beyond the disk");
    assert_eq!(range(13, u64::MAX, 1, 0), 1);
    assert_eq!(range(13, 0, 0, 0), 1);
    assert_eq!(request(&machine, &mut queue, 0, 8, &[], &[(at, 512)]), (0, 513));
    assert_eq!(machine.memory.read_obj::<u64>(at).expect("RAM"), 0);
}

#[test]
fn requests_that_make_no_sense_are_answered_with_errors() {
    let machine = harness(MemoryDisk::new(1 << 20), 1);
    let mut queue = machine.run(1, 256).remove(0);
    let at = data(&machine);
    let nowhere = GuestAddress(1 << 40);
    let edge = GuestAddress(RAM as u64 - 512);
    let mut try_it = |kind, sector, readable: &[_], writable: &[_]| {
        request(&machine, &mut queue, kind, sector, readable, writable)
    };
    assert_eq!(try_it(0, 2048, &[], &[(at, 512)]), (1, 1), "beyond the end");
    assert_eq!(try_it(0, 2047, &[], &[(at, 1024)]), (1, 1), "across the end");
    assert_eq!(try_it(0, u64::MAX, &[], &[(at, 512)]), (1, 1), "the sector overflows");
    assert_eq!(try_it(0, 0, &[], &[(at, 511)]), (1, 1), "not whole sectors");
    assert_eq!(try_it(0, 0, &[], &[]), (1, 1), "no data");
    assert_eq!(try_it(0, 0, &[(at, 512)], &[]), (1, 1), "data to read from, for a read");
    assert_eq!(try_it(1, 0, &[], &[(at, 512)]), (1, 1), "data to write to, for a write");
    assert_eq!(try_it(0, 0, &[], &[(nowhere, 512)]), (1, 1), "not RAM");
    assert_eq!(try_it(1, 0, &[(edge, 1024)], &[]), (1, 1), "half in RAM");
    assert_eq!(try_it(0, 0, &[], &[(GuestAddress(u64::MAX), 512)]), (1, 1), "the address overflows");
    assert_eq!(try_it(99, 0, &[], &[]), (2, 1), "an unknown kind");
    assert_eq!(try_it(8, 0, &[], &[(nowhere, 20)]), (1, 1));
    assert_eq!(try_it(1, 0, &[(at, 512)], &[]), (0, 1), "and the next sound one works");
    assert_eq!(machine.status() & status::NEEDS_RESET, 0);
}

#[test]
fn a_disk_that_is_read_only_says_so_and_refuses_writes() {
    let machine = harness(MemoryDisk::new(1 << 20).read_only(), 1);
    assert_ne!(machine.offered() & feature::RO, 0);
    assert_eq!(machine.offered() & (feature::DISCARD | feature::WRITE_ZEROES), 0);
    let mut queue = machine.run(1, 64).remove(0);
    assert_eq!(request(&machine, &mut queue, 1, 0, &[(data(&machine), 512)], &[]), (1, 1));
    assert_eq!(request(&machine, &mut queue, 0, 0, &[], &[(data(&machine), 512)]), (0, 513));
}

#[test]
fn the_configuration_tells_size_limits_and_queues() {
    let machine = harness(MemoryDisk::new(1 << 20), 4);
    let read = |offset: u64, len| machine.read(0x2000 + offset, len);
    assert_eq!(read(0, 8), 2048);
    assert_eq!((read(8, 4), read(12, 4)), (u64::from(SIZE_MAX), SEG_MAX as u64));
    assert_eq!((read(20, 4), read(34, 2)), (512, 4));
    assert_eq!(read(0xffc, 4), 0, "beyond the end there is nothing");
    assert_ne!(machine.offered() & feature::MQ, 0);
}

#[test]
fn every_queue_has_its_own_doorbell_and_vector() {
    let machine = harness(MemoryDisk::new(1 << 20), 4);
    let mut queues = machine.run(4, 16);
    for _ in 0..3 {
        for queue in &mut queues {
            assert_eq!(request(&machine, queue, 4, 0, &[], &[]), (0, 1));
        }
    }
    for queue in &queues {
        assert!(queue.route().count() >= 1);
    }
}

/// What makes a ring broken: each is done to a fresh device, which must then ask for a reset.
#[test]
fn a_broken_ring_ends_in_needs_reset_and_a_reset_mends_it() {
    type Break = fn(&Harness, &mut DriverQueue);
    let breaks: [(&str, Break); 10] = [
        ("a chain that loops", |m, q| {
            q.describe(0, m.data(0).0, 16, NEXT, 1);
            q.describe(1, m.data(0).0, 16, NEXT, 0);
            q.offer(0);
        }),
        ("a next that leaves the table", |m, q| {
            q.describe(0, m.data(0).0, 16, NEXT, 64);
            q.offer(0);
        }),
        ("a head beyond the table", |_, q| q.offer(0xffff)),
        ("readable after writable", |m, q| {
            q.describe(0, m.data(0).0, 16, NEXT | WRITE, 1);
            q.describe(1, m.data(0).0, 16, 0, 0);
            q.offer(0);
        }),
        ("no status byte", |m, q| {
            q.describe(0, m.data(0).0, 16, 0, 0);
            q.offer(0);
        }),
        ("a status byte outside of RAM", |m, q| {
            q.describe(0, m.data(0).0, 16, NEXT, 1);
            q.describe(1, 1 << 50, 1, WRITE, 0);
            q.offer(0);
        }),
        ("indirect within indirect", |m, q| {
            let table = virtio_queue::desc::split::Descriptor::new(m.data(0).0, 16, INDIRECT, 0);
            m.memory.write_obj(table, m.data(0x800)).expect("RAM");
            q.describe(0, m.data(0x800).0, 16, INDIRECT, 0);
            q.offer(0);
        }),
        ("an indirect table of no entries", |m, q| {
            q.describe(0, m.data(0x800).0, 0, INDIRECT, 0);
            q.offer(0);
        }),
        ("an indirect table of half an entry", |m, q| {
            q.describe(0, m.data(0x800).0, 24, INDIRECT, 0);
            q.offer(0);
        }),
        ("more chains than entries", |m, q| {
            let (header, status) = prepare(m, 0, 4, 0);
            q.describe(0, header.0, 16, NEXT, 1);
            q.describe(1, status.0, 1, WRITE, 0);
            (0..65).for_each(|_| q.offer(0));
        }),
    ];
    let machine = harness(MemoryDisk::new(1 << 20), 1);
    for (what, break_it) in breaks {
        let mut queue = machine.run(1, 64).remove(0);
        assert_eq!(machine.status() & status::NEEDS_RESET, 0, "before {what}");
        let before = machine.routes.get(0).count();
        break_it(&machine, &mut queue);
        queue.kick();
        queue.ring();
        machine.wait_for(what, || machine.status() & status::NEEDS_RESET != 0);
        assert_eq!(machine.routes.get(0).count(), before + 1, "the driver is told of {what}");
    }
    let mut queue = machine.run(1, 64).remove(0);
    assert_eq!(request(&machine, &mut queue, 4, 0, &[], &[]), (0, 1));
}

#[test]
fn a_request_may_sit_in_an_indirect_table() {
    let machine = harness(MemoryDisk::from_vec(vec![9; 1 << 20]), 1);
    let mut queue = machine.run(1, 4).remove(0);
    let (header, state) = prepare(&machine, 0, 0, 0);
    let table = machine.data(0x8000);
    let parts = [(header.0, 16, NEXT, 1), (data(&machine).0, 512, NEXT | WRITE, 2), (state.0, 1, WRITE, 0)];
    for (i, (address, len, flags, next)) in (0u64..).zip(parts) {
        let descriptor = virtio_queue::desc::split::Descriptor::new(address, len, flags, next);
        machine.memory.write_obj(descriptor, GuestAddress(table.0 + 16 * i)).expect("RAM");
    }
    queue.describe(0, table.0, 48, INDIRECT, 0);
    queue.offer(0);
    queue.kick();
    assert_eq!(queue.wait(), Used { head: 0, len: 513 });
    assert_eq!(status_at(&machine, state), 0);
    assert_eq!(machine.memory.read_obj::<[u8; 4]>(data(&machine)).expect("RAM"), [9; 4]);
}

#[test]
fn a_batch_of_requests_raises_few_interrupts() {
    let machine = harness(MemoryDisk::new(1 << 20), 1);
    let mut queue = machine.run(1, 256).remove(0);
    let mut answered = 0;
    for round in 0..10 {
        for slot in 0..64 {
            let (header, status) = prepare(&machine, slot, 4, 0);
            queue.add(&[(header, 16)], &[(status, 1)]);
        }
        queue.kick();
        for _ in 0..64 {
            queue.wait();
            answered += 1;
        }
        assert_eq!(answered, (round + 1) * 64);
    }
    let interrupts = queue.route().count();
    assert!(interrupts <= 64, "{interrupts} interrupts for ten batches of 64 requests");
}

/// A disk whose requests finish only when they are given up, as one whose PC is away.
struct Away {
    held: Vec<Request>,
    answers: bool,
}

impl Disk for Away {
    fn geometry(&self) -> Geometry {
        MemoryDisk::new(1 << 20).geometry()
    }
    fn attach(&mut self, _ring: &mut Ring) -> Result<(), Error> {
        Ok(())
    }
    fn submit(&mut self, _ring: &mut Ring, request: Request, done: &mut Vec<Done>) {
        if self.answers {
            done.push(Done { tag: request.tag, result: Ok(()), buffer: request.buffer });
        } else {
            self.held.push(request);
        }
    }
    fn complete(&mut self, _ring: &mut Ring, _completion: Completion, _done: &mut Vec<Done>) -> bool {
        false
    }
    fn tick(&mut self, _ring: &mut Ring, _now: Instant, _done: &mut Vec<Done>) -> Option<Instant> {
        None
    }
    fn abort(&mut self, _ring: &mut Ring, done: &mut Vec<Done>) {
        for request in self.held.drain(..) {
            let result = Err(Error::Unreachable("given up".to_owned()));
            done.push(Done { tag: request.tag, result, buffer: request.buffer });
        }
        self.answers = true;
    }
    fn describe(&self) -> String {
        "away".to_owned()
    }
}

fn away() -> Away {
    Away { held: Vec::new(), answers: false }
}

#[test]
fn a_guest_whose_disk_is_away_can_be_stopped_and_its_requests_are_carried_out_at_the_next_start() {
    let machine = harness(away(), 1);
    let mut queue = machine.run(1, 64).remove(0);
    let mut heads = Vec::new();
    for slot in 0..5 {
        let (header, status) = prepare(&machine, slot, 1, slot);
        heads.push(queue.add(&[(header, 16), (data(&machine), 512)], &[(status, 1)]));
    }
    queue.kick();
    assert_eq!(queue.wait_up_to(Duration::from_millis(50)), None);
    machine.function.stop().expect("it stops without its disk");
    assert_eq!(queue.poll(), None, "nothing is answered");
    let state = machine.function.save().expect("it can be saved");
    let unfinished = state.data["queues"][0]["layout"]["unfinished"].as_array().expect("a list").len();
    assert_eq!(unfinished, 5);

    // Another device, over the same memory, takes the state over.
    let options = Options { serial: "omega-0001".to_owned(), queues: 1 };
    let device = Box::new(Blk::new(Box::new(MemoryDisk::new(1 << 20)), &options));
    let other = Harness::stopped(device, machine.memory.clone());
    other.function.restore(&state).expect("the state fits");
    other.function.start().expect("it starts");
    let mut answered: Vec<u16> = (0..5)
        .map(|_| {
            machine.wait_for("an answer", || other.routes.get(1).count() > 0);
            queue.poll().expect("all are answered at once").head
        })
        .collect();
    answered.sort_unstable();
    heads.sort_unstable();
    assert_eq!(answered, heads);
    assert_eq!(status_at(&machine, machine.data(STATUS)), 0);
}

#[test]
fn a_reset_with_requests_in_flight_reads_as_done_only_when_nothing_touches_memory_any_more() {
    let machine = harness(away(), 1);
    let mut queue = machine.run(1, 64).remove(0);
    let (header, status) = prepare(&machine, 0, 0, 0);
    queue.add(&[(header, 16)], &[(data(&machine), 512), (status, 1)]);
    queue.kick();
    assert_eq!(queue.wait_up_to(Duration::from_millis(50)), None);
    let start = Instant::now();
    machine.set_status(0);
    assert!(start.elapsed() < Duration::from_secs(1), "no vCPU waits for the disk");
    assert_ne!(machine.status(), 0, "the reset is not done while the request is in flight");
    machine.wait_for("the reset", || machine.status() == 0);
    assert_eq!(queue.poll(), None, "a reset answers nothing");
    let mut queue = machine.run(1, 64).remove(0);
    assert_eq!(request(&machine, &mut queue, 4, 0, &[], &[]), (0, 1), "and then it works again");
}

#[test]
fn without_a_flush_command_every_write_is_followed_by_a_flush() {
    struct Flushes(MemoryDisk, std::sync::mpsc::Sender<Operation>);
    impl Disk for Flushes {
        fn geometry(&self) -> Geometry {
            self.0.geometry()
        }
        fn attach(&mut self, ring: &mut Ring) -> Result<(), Error> {
            self.0.attach(ring)
        }
        fn submit(&mut self, ring: &mut Ring, request: Request, done: &mut Vec<Done>) {
            self.1.send(request.operation).expect("the test listens");
            self.0.submit(ring, request, done);
        }
        fn complete(&mut self, ring: &mut Ring, completion: Completion, done: &mut Vec<Done>) -> bool {
            self.0.complete(ring, completion, done)
        }
        fn tick(&mut self, ring: &mut Ring, now: Instant, done: &mut Vec<Done>) -> Option<Instant> {
            self.0.tick(ring, now, done)
        }
        fn abort(&mut self, ring: &mut Ring, done: &mut Vec<Done>) {
            self.0.abort(ring, done);
        }
        fn describe(&self) -> String {
            self.0.describe()
        }
    }
    let (sender, operations) = std::sync::mpsc::channel();
    let machine = harness(Flushes(MemoryDisk::new(1 << 20), sender), 1);
    assert!(machine.negotiate(0));
    let mut queue = machine.queue(0, 64);
    machine.ready();
    assert_eq!(request(&machine, &mut queue, 1, 0, &[(data(&machine), 512)], &[]), (0, 1));
    assert_eq!(request(&machine, &mut queue, 0, 0, &[], &[(data(&machine), 512)]), (0, 513));
    let seen: Vec<Operation> = operations.try_iter().collect();
    assert_eq!(seen, [Operation::Write, Operation::Flush, Operation::Read]);
}

#[test]
fn counters_tell_what_the_guest_did() {
    let options = Options::default();
    let device = Blk::new(Box::new(MemoryDisk::new(1 << 20)), &options);
    let counters = device.counters();
    let machine = Harness::new(Box::new(device), RAM);
    let mut queue = machine.run(1, 64).remove(0);
    for sector in [0, 8, 4096] {
        request(&machine, &mut queue, 0, sector, &[], &[(data(&machine), 4096)]);
    }
    request(&machine, &mut queue, 1, 0, &[(data(&machine), 512)], &[]);
    request(&machine, &mut queue, 4, 0, &[], &[]);
    let (reads, writes) = (counters.reads.snapshot(), counters.writes.snapshot());
    assert_eq!((reads.requests, reads.bytes, reads.errors), (3, 8192, 1));
    assert_eq!((writes.requests, writes.bytes, writes.errors), (1, 512, 0));
    assert_eq!(reads.latency.iter().sum::<u64>(), 3);
    assert_eq!(counters.flushes.snapshot().requests, 1);
}
