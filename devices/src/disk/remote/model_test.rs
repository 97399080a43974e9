//! Any history of reads, writes, flushes, flushes that fail, aborts, cuts, agent restarts and PC restarts that
//! lose what was not flushed, against a model of what a disk may then return.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use transport::Carrier;
use transport::buffer::Buffer;
use transport::channel::{Answer, Call, Event};
use transport::wire::{Body, Status};

use super::core::{Core, Link};
use super::*;
use crate::disk::volume::{self, Access, Acquire, Acquired, Lease, Opened, opcode};
use crate::disk::{Operation, Request};

const SECTOR: usize = 512;
const SECTORS: usize = 16;
const TTL: Duration = Duration::from_secs(15);

struct Random(u64);

impl Random {
    fn below(&mut self, most: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % most
    }

    fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }
}

/// The agent's PC: what its memory and its stable storage hold for each sector.
struct Pc {
    cached: Vec<u64>,
    stable: Vec<u64>,
    /// What each sector held since the last flush: after a restart it may hold any of it.
    since: Vec<Vec<u64>>,
    boot: u128,
    /// Of the agent's process.
    instance: u128,
    /// A flush of this process failed, so that none succeeds again.
    flush_failed: bool,
    /// How many flushes failed to write something.
    failures: u64,
}

impl Pc {
    fn new() -> Self {
        Self {
            cached: vec![0; SECTORS],
            stable: vec![0; SECTORS],
            since: vec![Vec::new(); SECTORS],
            boot: 1,
            instance: 1,
            flush_failed: false,
            failures: 0,
        }
    }

    fn change(&mut self, sector: usize, value: u64) {
        self.cached[sector] = value;
        self.since[sector].push(value);
    }

    /// Writes the sectors that are dirty. One that an earlier flush could not write no longer is.
    fn flush(&mut self, random: &mut Random) -> Status {
        if self.flush_failed {
            return volume::status::IO;
        }
        if random.one_in(10) {
            self.failures += u64::from(self.since.iter().any(|values| !values.is_empty()));
            self.write_some(random);
            self.flush_failed = true;
            return volume::status::IO;
        }
        for sector in (0..SECTORS).filter(|s| !self.since[*s].is_empty()) {
            self.stable[sector] = self.cached[sector];
        }
        self.since.iter_mut().for_each(Vec::clear);
        Status::OK
    }

    /// The kernel is done with every dirty sector, but what is stable may be any value that it had.
    fn write_some(&mut self, random: &mut Random) {
        for (stable, since) in self.stable.iter_mut().zip(&mut self.since) {
            if let Some(kept) = since.get(random.below(since.len() + 1)) {
                *stable = *kept;
            }
            since.clear();
        }
    }

    fn restart_agent(&mut self, random: &mut Random) {
        for sector in (0..SECTORS).filter(|s| self.since[*s].is_empty()) {
            // The page cache lets clean pages go when it likes.
            if random.one_in(2) {
                self.cached[sector] = self.stable[sector];
            }
        }
        self.flush_failed = false;
        self.instance += 1;
    }

    fn restart(&mut self, random: &mut Random) {
        self.write_some(random);
        self.cached.clone_from(&self.stable);
        self.restart_agent(random);
        self.boot += 1;
    }

    /// Carries out a call and returns its answer; a read fills the call's buffer.
    fn carry_out(&mut self, call: &Call, random: &mut Random) -> (Status, Body) {
        match call.opcode {
            opcode::ACQUIRE => {
                let acquire = Acquire::decode(&call.body).expect("well-formed");
                assert_eq!((acquire.expected, acquire.volume.as_str()), (7, "v"));
                return (Status::OK, Acquired { epoch: 7, ttl: TTL }.encode());
            }
            opcode::OPEN => {
                return (Status::OK, Opened { geometry: geometry(), identity: 5 }.encode());
            }
            opcode::RENEW => return (Status::OK, Body::new()),
            opcode::FLUSH => return (self.flush(random), Body::new()),
            _ => {}
        }
        let access = Access::decode(&call.body).expect("well-formed");
        let sectors = access.offset as usize / SECTOR..(access.offset + access.len) as usize / SECTOR;
        for (at, sector) in sectors.enumerate() {
            match call.opcode {
                opcode::READ => {
                    call.answer.write_at(at * SECTOR, &self.cached[sector].to_le_bytes());
                }
                opcode::WRITE => {
                    let mut value = [0; 8];
                    call.payload.read_at(at * SECTOR, &mut value);
                    self.change(sector, u64::from_le_bytes(value));
                }
                _ => self.change(sector, 0),
            }
        }
        (Status::OK, Body::new())
    }
}

fn geometry() -> Geometry {
    let size = (SECTORS * SECTOR) as u64;
    Geometry { size, block_size: 512, read_only: false, discard: true, write_zeroes: true }
}

#[derive(Clone, Copy, PartialEq)]
enum Session {
    /// Never connected or forgotten.
    None,
    Opening,
    Ready,
}

/// The connection: calls in flight, and the answers that wait to be delivered.
struct Wire {
    calls: Vec<(Call, Option<(Status, Body)>)>,
    session: Session,
    up: bool,
}

impl Link for Wire {
    fn call(&mut self, call: Call) {
        self.calls.push((call, None));
    }

    fn ready(&mut self) {
        assert!(self.session == Session::Opening, "ready only ends a set-up");
        self.session = Session::Ready;
    }
}

/// What the guest knows: the values that each sector may hold.
struct Model {
    possible: Vec<BTreeSet<u64>>,
    /// Requests in flight: tag, range, the value they write, and what a read may return.
    flights: Vec<Flight>,
}

struct Flight {
    tag: u64,
    sectors: std::ops::Range<usize>,
    value: Option<u64>,
    readable: Vec<BTreeSet<u64>>,
}

impl Model {
    fn add(&mut self, sector: usize, value: u64) {
        self.possible[sector].insert(value);
        for flight in self.flights.iter_mut().filter(|f| f.value.is_none()) {
            if flight.sectors.contains(&sector) {
                let at = sector - flight.sectors.start;
                flight.readable[at].insert(value);
            }
        }
    }

    fn submit(&mut self, tag: u64, sectors: std::ops::Range<usize>, value: Option<u64>) {
        if let Some(value) = value {
            sectors.clone().for_each(|sector| self.add(sector, value));
        }
        let readable = sectors.clone().map(|s| self.possible[s].clone()).collect();
        self.flights.push(Flight { tag, sectors, value, readable });
    }

    fn finish(&mut self, done: &Done) {
        let at = self.flights.iter().position(|f| f.tag == done.tag).expect("one result for each request");
        let flight = self.flights.remove(at);
        if done.result.is_err() {
            return;
        }
        for (at, sector) in flight.sectors.clone().enumerate() {
            if let Some(value) = flight.value {
                // Whatever was there is gone, unless something later is in flight over it.
                let later =
                    self.flights.iter().filter(|f| f.sectors.contains(&sector)).filter_map(|f| f.value);
                self.possible[sector] = later.chain([value]).collect();
            } else {
                let mut value = [0; 8];
                done.buffer.read_at(at * SECTOR, &mut value);
                let value = u64::from_le_bytes(value);
                let allowed = &flight.readable[at];
                assert!(allowed.contains(&value), "sector {sector} reads {value}, allowed are {allowed:?}");
            }
        }
    }
}

struct World {
    core: Core,
    wire: Wire,
    pc: Pc,
    model: Model,
    random: Random,
    now: Instant,
    next_tag: u64,
    /// Calls of a session that was given up, which an agent may still carry out.
    zombies: Vec<Call>,
    done: Vec<Done>,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut options = Options::new("pc2", "v", "test").expect("random bytes");
        options.log_bytes = 6 * SECTOR as u64;
        let lease = Lease { epoch: 7, holder: options.holder };
        let mut possible = Vec::new();
        possible.resize_with(SECTORS, || BTreeSet::from([0]));
        Self {
            core: Core::new(options, geometry(), 5, lease, TTL),
            wire: Wire { calls: Vec::new(), session: Session::None, up: false },
            pc: Pc::new(),
            model: Model { possible, flights: Vec::new() },
            random: Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1),
            now: Instant::now(),
            next_tag: 1,
            zombies: Vec::new(),
            done: Vec::new(),
        }
    }

    fn event(&mut self, event: Event) {
        self.core.event(&mut self.wire, event, self.now, &mut self.done);
        self.results();
    }

    fn results(&mut self) {
        for done in self.done.drain(..) {
            self.model.finish(&done);
        }
    }

    fn guest(&mut self) {
        let tag = self.next_tag;
        self.next_tag += 1;
        let first = self.random.below(SECTORS);
        let count = 1 + self.random.below((SECTORS - first).min(5));
        let sectors = first..first + count;
        let (mut offset, mut len) = ((first * SECTOR) as u64, (count * SECTOR) as u64);
        let mut buffer = Buffer::empty();
        let (operation, value) = match self.random.below(10) {
            0..4 => {
                buffer = Buffer::zeroed(len as usize);
                (0..count).for_each(|at| {
                    buffer.write_at(at * SECTOR, &tag.to_le_bytes());
                });
                (Operation::Write, Some(tag))
            }
            4 => (Operation::WriteZeroes { unmap: true }, Some(0)),
            5 => (Operation::Discard, Some(0)),
            6..9 => {
                buffer = Buffer::zeroed(len as usize);
                (Operation::Read, None)
            }
            _ => {
                (offset, len) = (0, 0);
                (Operation::Flush, None)
            }
        };
        let sectors = if operation == Operation::Flush { 0..0 } else { sectors };
        self.model.submit(tag, sectors, value);
        let request = Request { tag, operation, offset, len, buffer };
        self.core.submit(&mut self.wire, request, self.now, &mut self.done);
        self.results();
    }

    /// The agent carries out a call that reached it.
    fn agent(&mut self) {
        if !self.zombies.is_empty() && self.random.one_in(2) {
            let zombie = self.zombies.swap_remove(self.random.below(self.zombies.len()));
            self.pc.carry_out(&zombie, &mut self.random);
            return;
        }
        let session = self.wire.session;
        let may = |(call, answer): &(Call, Option<(Status, Body)>)| {
            answer.is_none() && (session == Session::Ready || session == Session::Opening && call.setup)
        };
        let open: Vec<usize> = (0..self.wire.calls.len()).filter(|i| may(&self.wire.calls[*i])).collect();
        if open.is_empty() {
            return;
        }
        let index = open[self.random.below(open.len())];
        let (call, answer) = &mut self.wire.calls[index];
        if call.opcode == opcode::OPEN {
            // Binding the volume to this session ends what others left behind.
            self.zombies.clear();
        }
        *answer = Some(self.pc.carry_out(call, &mut self.random));
    }

    fn deliver(&mut self) {
        let ready: Vec<usize> =
            (0..self.wire.calls.len()).filter(|i| self.wire.calls[*i].1.is_some()).collect();
        if ready.is_empty() || !self.wire.up {
            return;
        }
        let index = ready[self.random.below(ready.len())];
        let (call, Some((status, body))) = self.wire.calls.remove(index) else { return };
        self.answer(call, status, body);
    }

    fn answer(&mut self, call: Call, status: Status, body: Body) {
        let Call { tag, payload, answer, .. } = call;
        let received = answer.len();
        self.event(Event::Answer(Answer { tag, status, body, payload, answer, received }));
    }

    fn cut(&mut self) {
        if self.wire.up {
            self.wire.up = false;
            self.event(Event::Lost { reason: "cut".to_owned() });
        }
        // The server remembers the answers of `once` calls only; others are carried out again.
        for (call, answer) in &mut self.wire.calls {
            if !call.once {
                *answer = None;
            }
        }
    }

    fn restart(&mut self, whole_pc: bool) {
        self.cut();
        self.zombies.clear();
        self.wire.session = Session::None;
        self.wire.calls.iter_mut().for_each(|(_, answer)| *answer = None);
        if whole_pc {
            self.pc.restart(&mut self.random);
        } else {
            self.pc.restart_agent(&mut self.random);
        }
    }

    fn connect(&mut self) {
        if self.wire.up {
            return;
        }
        self.wire.up = true;
        if self.wire.session != Session::None {
            return self.event(Event::Resumed { carrier: Carrier::Tcp });
        }
        let (setup, rest) = std::mem::take(&mut self.wire.calls).into_iter().partition(|(c, _)| c.setup);
        self.wire.calls = rest;
        for (call, _) in setup {
            self.answer(call, Status::CANCELLED, Body::new());
        }
        self.wire.session = Session::Opening;
        let Pc { instance, boot, .. } = self.pc;
        self.event(Event::Opened {
            instance,
            boot,
            name: "pc2".to_owned(),
            peer: None,
            carrier: Carrier::Tcp,
        });
    }

    fn abort(&mut self) {
        let calls = std::mem::take(&mut self.wire.calls);
        if self.wire.session == Session::Ready {
            self.zombies.extend(calls.into_iter().filter(|(_, a)| a.is_none()).map(|(call, _)| call));
        }
        self.wire.session = Session::None;
        self.wire.up = false;
        self.core.give_up(|| Error::Unreachable("given up".to_owned()), &mut self.done);
        self.results();
        assert!(self.model.flights.is_empty(), "every request came back");
    }

    fn tick(&mut self, by: Duration) {
        self.now += by;
        self.core.tick(&mut self.wire, self.now, &mut self.done);
        self.results();
    }

    fn step(&mut self) {
        match self.random.below(200) {
            0..50 if self.model.flights.len() < 12 => self.guest(),
            0..110 => self.agent(),
            110..170 => self.deliver(),
            170..184 => self.connect(),
            184..190 => self.cut(),
            190..193 => self.restart(false),
            193..196 => self.restart(true),
            196 => self.abort(),
            _ => self.tick(Duration::from_millis(700)),
        }
    }

    fn settle(&mut self) {
        for _ in 0..100_000 {
            if self.model.flights.is_empty() {
                return;
            }
            self.connect();
            self.agent();
            self.deliver();
            self.tick(Duration::from_millis(1));
        }
        panic!("{} requests never end", self.model.flights.len());
    }

    fn read_all(&mut self) {
        let tag = self.next_tag;
        self.next_tag += 1;
        let len = (SECTORS * SECTOR) as u64;
        self.model.submit(tag, 0..SECTORS, None);
        let buffer = Buffer::zeroed(len as usize);
        let request = Request { tag, operation: Operation::Read, offset: 0, len, buffer };
        self.core.submit(&mut self.wire, request, self.now, &mut self.done);
        self.settle();
    }
}

#[test]
fn no_history_of_failures_loses_or_undoes_an_acknowledged_write() {
    let (mut rewritten, mut conflicts, mut flushes, mut failed) = (0, 0, 0, 0);
    for seed in 1..1500 {
        let world = std::panic::catch_unwind(|| {
            let mut world = World::new(seed);
            (0..600).for_each(|_| world.step());
            world.settle();
            world.restart(true);
            world.read_all();
            world
        });
        let Ok(world) = world else { panic!("the history with seed {seed} breaks the disk") };
        let counters = world.core.counters.snapshot();
        rewritten += counters.rewritten;
        conflicts += counters.conflicts;
        flushes += counters.background_flushes;
        failed += world.pc.failures;
    }
    let least = rewritten.min(conflicts).min(flushes).min(failed);
    assert!(least > 1000, "{rewritten} {conflicts} {flushes} {failed}");
}

fn ready() -> World {
    let mut world = World::new(3);
    world.connect();
    while world.wire.session != Session::Ready {
        world.agent();
        world.deliver();
    }
    world
}

#[test]
fn another_image_in_the_volumes_place_is_not_written_to() {
    let mut world = ready();
    world.guest();
    world.restart(false);
    world.connect();
    world.agent();
    world.deliver();
    let position = world.wire.calls.iter().position(|(c, _)| c.opcode == opcode::OPEN).expect("it opens");
    let (call, _) = world.wire.calls.remove(position);
    world.answer(call, Status::OK, Opened { geometry: geometry(), identity: 6 }.encode());
    assert!(matches!(world.core.failure, Some(Failure::Fenced(_))));
    assert!(world.wire.session == Session::Opening, "no request goes out");
}

#[test]
fn a_lost_lease_ends_every_request_with_an_error_that_says_so() {
    let mut world = ready();
    while world.wire.calls.is_empty() {
        world.guest();
    }
    let (call, _) = world.wire.calls.remove(0);
    let refusal = volume::Refusal::because("guest b has the lease");
    world.answer(call, volume::status::FENCED, refusal.encode());
    let error = world.core.refusing(world.now).expect("it refuses").to_string();
    assert_eq!(error, "The lease was lost: guest b has the lease");
}

#[test]
fn a_full_agent_makes_writes_wait_and_go_on_when_there_is_room() {
    let mut world = ready();
    let request =
        |tag| Request { tag, operation: Operation::Write, offset: 0, len: 512, buffer: Buffer::zeroed(512) };
    let mut done = Vec::new();
    world.core.submit(&mut world.wire, request(1), world.now, &mut done);
    let (call, _) = world.wire.calls.remove(0);
    let refusal = volume::Refusal::because("full").encode();
    world.answer(call, volume::status::FULL, refusal.clone());
    assert!(world.done.is_empty() && world.wire.calls.is_empty(), "it is held back");
    world.tick(Duration::from_secs(1));
    assert_eq!(world.wire.calls.len(), 1, "it is sent again");
    world.core.options.on_timeout = OnTimeout::Error;
    world.core.options.patience = Some(Duration::from_millis(500));
    let (Call { tag, payload, answer, .. }, _) = world.wire.calls.remove(0);
    let event = Event::Answer(Answer {
        tag,
        status: volume::status::FULL,
        body: refusal,
        payload,
        answer,
        received: 0,
    });
    world.core.event(&mut world.wire, event, world.now, &mut done);
    assert!(matches!(done[0].result, Err(Error::Full)), "patience is over: {done:?}");
}

#[test]
fn patience_ends_in_errors_only_if_the_configuration_says_so() {
    for (on_timeout, fails) in [(OnTimeout::Wait, false), (OnTimeout::Error, true)] {
        let mut world = ready();
        world.core.options.patience = Some(Duration::from_secs(3));
        world.core.options.on_timeout = on_timeout;
        world.cut();
        world.guest();
        let mut done = Vec::new();
        world.core.tick(&mut world.wire, world.now + Duration::from_secs(2), &mut done);
        assert!(world.core.failure.is_none(), "too early");
        world.core.tick(&mut world.wire, world.now + Duration::from_secs(4), &mut done);
        assert_eq!(world.core.failure.is_some(), fails, "{on_timeout:?}");
    }
}
