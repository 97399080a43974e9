//! Agents that are killed, frozen and cut off in the middle of verified I/O, and storage that is full.

mod common;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use common::proxy::Proxy;
use common::{Agent, Driver, LIMIT};
use devices::disk::remote::{OnTimeout, connect};
use devices::disk::volume::opcode;
use devices::disk::{Disk, Error, Operation};
use nix::sys::signal::Signal;
use transport::blocking::Client;
use transport::buffer::Buffer;
use transport::identity::Security;
use transport::wire::{Class, MAX_PAYLOAD};

const VOLUME: &str = "[[volume]]\nname = 'v'\npath = 'DIR/v.img'\ncreate = '4M'\n";
const BLOCK: u64 = 4096;
const BLOCKS: u64 = 1024;

struct Random(u64);

impl Random {
    fn below(&mut self, most: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % most
    }
}

/// Writes, reads and flushes at random, several at once but never two on one block, and checks each read.
struct Verifier {
    driver: Driver,
    random: Random,
    /// What each block holds, as far as it was acknowledged.
    acknowledged: BTreeMap<u64, u64>,
    /// By tag: the block and, for a write, its number.
    flights: BTreeMap<u64, (u64, Option<u64>)>,
    number: u64,
    finished: u64,
}

impl Verifier {
    fn new(driver: Driver, seed: u64) -> Self {
        let random = Random(seed | 1);
        Self {
            driver,
            random,
            acknowledged: BTreeMap::new(),
            flights: BTreeMap::new(),
            number: 0,
            finished: 0,
        }
    }

    fn fill(number: u64) -> Vec<u8> {
        number.to_le_bytes().repeat(BLOCK as usize / 8)
    }

    fn submit(&mut self) {
        let block = self.random.below(BLOCKS);
        if self.flights.values().any(|(b, _)| *b == block) {
            return;
        }
        let (tag, number) = match self.random.below(20) {
            0 => {
                self.driver.submit(Operation::Flush, 0, 0, Buffer::empty());
                return;
            }
            1..10 => {
                let buffer = Buffer::zeroed(BLOCK as usize);
                (self.driver.submit(Operation::Read, block * BLOCK, BLOCK, buffer), None)
            }
            _ => {
                self.number += 1;
                let buffer = Buffer::from_vec(Self::fill(self.number));
                (self.driver.submit(Operation::Write, block * BLOCK, BLOCK, buffer), Some(self.number))
            }
        };
        self.flights.insert(tag, (block, number));
    }

    fn round(&mut self, most: Duration) {
        self.driver.round(most);
        for done in std::mem::take(&mut self.driver.done) {
            if let Err(error) = done.result {
                panic!("the guest sees an I/O error: {error:?}");
            }
            self.finished += 1;
            let Some((block, number)) = self.flights.remove(&done.tag) else { continue };
            match number {
                Some(number) => {
                    self.acknowledged.insert(block, number);
                }
                None => {
                    let expected = Self::fill(self.acknowledged.get(&block).copied().unwrap_or(0));
                    assert!(done.buffer.to_vec() == expected, "block {block} reads something else");
                }
            }
        }
    }

    /// Keeps `depth` requests in flight until `more` more are finished.
    fn work(&mut self, more: u64, depth: usize) {
        let (goal, until) = (self.finished + more, Instant::now() + LIMIT);
        while self.finished < goal {
            while self.flights.len() < depth {
                self.submit();
            }
            self.round(Duration::from_millis(50));
            assert!(Instant::now() < until, "{} of {goal}: {}", self.finished, self.driver.disk.describe());
        }
    }

    /// Has requests sent, but waits for nothing.
    fn begin(&mut self, depth: usize) {
        while self.flights.len() < depth {
            self.submit();
        }
        self.round(Duration::ZERO);
    }

    /// Reads everything back.
    fn verify(&mut self) {
        while !self.flights.is_empty() {
            self.round(Duration::from_millis(50));
        }
        for block in 0..BLOCKS {
            let expected = Self::fill(self.acknowledged.get(&block).copied().unwrap_or(0));
            let bytes = self.driver.read(block * BLOCK, BLOCK as usize);
            assert!(bytes == expected, "block {block} lost its write");
        }
    }
}

#[test]
fn an_agent_that_is_killed_and_restarted_thirty_times_loses_no_write() {
    let mut agent = Agent::start(VOLUME);
    let mut verifier = Verifier::new(agent.disk("v"), 1);
    for round in 0..30 {
        verifier.work(200 + round, 32);
        verifier.begin(32);
        agent.restart();
    }
    verifier.work(200, 32);
    verifier.verify();
    let counters = verifier.driver.disk.counters().snapshot();
    assert!(counters.sessions >= 30 && counters.errors == 0, "{counters:?}");
    let file = std::fs::read(agent.path("v.img")).expect("readable");
    for (block, number) in &verifier.acknowledged {
        let at = (block * BLOCK) as usize;
        assert!(file[at..at + BLOCK as usize] == Verifier::fill(*number), "block {block} in the file");
    }
}

#[test]
fn an_agent_that_stops_in_order_in_the_middle_of_io_loses_no_write() {
    let mut agent = Agent::start(VOLUME);
    let mut verifier = Verifier::new(agent.disk("v"), 2);
    for _ in 0..8 {
        verifier.work(200, 32);
        verifier.begin(32);
        agent.signal(Signal::SIGTERM);
        for _ in 0..20 {
            verifier.round(Duration::from_millis(5));
        }
        assert_eq!(agent.end(Signal::SIGTERM), Some(0), "{}", agent.log());
        agent.run();
    }
    verifier.work(200, 32);
    verifier.verify();
}

#[test]
fn a_frozen_agent_is_a_pause() {
    let agent = Agent::start(VOLUME);
    let mut options = agent.options("v");
    options.dead_after = Duration::from_millis(600);
    let disk = connect(options, Duration::from_secs(10)).expect("it connects");
    let mut verifier = Verifier::new(Driver::new(disk), 3);
    for frozen in [100, 1500, 100, 1500] {
        verifier.work(300, 16);
        verifier.begin(16);
        agent.signal(Signal::SIGSTOP);
        let until = Instant::now() + Duration::from_millis(frozen);
        while Instant::now() < until {
            verifier.round(Duration::from_millis(20));
        }
        agent.signal(Signal::SIGCONT);
    }
    verifier.work(300, 16);
    verifier.verify();
    assert!(verifier.driver.disk.counters().snapshot().cuts >= 2, "a long freeze is taken for a lost peer");
}

#[test]
fn an_agent_frozen_for_longer_than_a_lease_lasts_gives_no_holders_volume_away() {
    let agent = Agent::start(VOLUME);
    let mut holder = agent.disk("v");
    holder.write(0, &[1; 512]).expect("it writes");
    agent.signal(Signal::SIGSTOP);
    std::thread::sleep(Duration::from_millis(2500));
    agent.signal(Signal::SIGCONT);
    // The holder has not said anything since, so it cannot have renewed.
    let refused = connect(agent.options("v"), Duration::from_millis(500)).err().expect("leased").to_string();
    assert!(refused.contains("guest@test"), "{refused}");
    assert!(agent.log().contains("stood still"), "{}", agent.log());
    holder.write(0, &[2; 512]).expect("the holder goes on");
    assert_eq!(holder.read(0, 512), [2; 512]);
}

#[test]
fn a_link_that_is_cut_fifty_times_resumes_its_session() {
    let agent = Agent::start(VOLUME);
    let proxy = Proxy::new(&agent.address);
    let mut options = agent.options("v");
    options.agent.clone_from(&proxy.address);
    let disk = connect(options, Duration::from_secs(10)).expect("it connects");
    let mut verifier = Verifier::new(Driver::new(disk), 4);
    for _ in 0..50 {
        verifier.work(100, 32);
        verifier.begin(32);
        proxy.cut();
        verifier.round(Duration::from_millis(5));
        proxy.heal();
    }
    verifier.work(200, 32);
    verifier.verify();
    let counters = verifier.driver.disk.counters().snapshot();
    assert!(counters.resumptions >= 40 && counters.sessions <= 10, "{counters:?}");
}

#[test]
fn without_patience_the_guest_gets_errors_and_goes_on_when_the_agent_is_back() {
    let mut agent = Agent::start(VOLUME);
    let mut options = agent.options("v");
    options.patience = Some(Duration::from_millis(500));
    options.on_timeout = OnTimeout::Error;
    let mut driver = Driver::new(connect(options, Duration::from_secs(10)).expect("it connects"));
    driver.write(0, &[1; 512]).expect("it writes");
    agent.end(Signal::SIGKILL);
    let start = Instant::now();
    let error = driver.write(0, &[2; 512]).expect_err("patience is over");
    assert!(matches!(error, Error::Unreachable(_)), "{error}");
    assert!(start.elapsed() >= Duration::from_millis(400), "{:?}", start.elapsed());
    agent.run();
    let until = Instant::now() + LIMIT;
    while driver.write(0, &[3; 512]).is_err() {
        assert!(Instant::now() < until, "{}", driver.disk.describe());
        driver.idle(Duration::from_millis(50));
    }
    assert_eq!(driver.read(0, 512), [3; 512]);
}

#[test]
fn an_aborted_disk_goes_on_in_a_new_session() {
    let agent = Agent::start(VOLUME);
    let mut driver = agent.disk("v");
    driver.write(0, &[1; 4096]).expect("it writes");
    for _ in 0..50 {
        driver.submit(Operation::Write, 0, 4096, Buffer::zeroed(4096));
    }
    driver.round(Duration::ZERO);
    let Driver { disk, ring, done, .. } = &mut driver;
    disk.abort(ring, done);
    assert_eq!(driver.done.len(), 50, "every request came back");
    driver.done.clear();
    driver.write(0, &[9; 4096]).expect("it writes");
    driver.idle(Duration::from_millis(100));
    assert_eq!(driver.read(0, 4096), [9; 4096], "nothing from before the abort lands later");
}

/// A small file system, gone with the value.
struct TinyFs<'a>(&'a Agent);

impl<'a> TinyFs<'a> {
    fn new(agent: &'a Agent, size: u64) -> Option<Self> {
        use nix::mount::{MsFlags, mount};
        let path = agent.path("tiny");
        std::fs::create_dir(&path).expect("a folder");
        let data = format!("size={size}");
        match mount(Some("tiny"), &path, Some("tmpfs"), MsFlags::empty(), Some(data.as_str())) {
            Ok(()) => Some(Self(agent)),
            Err(e) => {
                eprintln!("cannot run: no tmpfs can be mounted here: {e}");
                None
            }
        }
    }
}

impl Drop for TinyFs<'_> {
    fn drop(&mut self) {
        nix::mount::umount2(&self.0.path("tiny"), nix::mount::MntFlags::MNT_DETACH).ok();
    }
}

#[test]
fn a_full_disk_on_the_agent_is_a_pause_and_a_clear_line_in_its_log() {
    let agent = Agent::start("[[volume]]\nname = 'v'\npath = 'DIR/tiny/v.img'\n");
    let Some(_tiny) = TinyFs::new(&agent, 2 << 20) else { return };
    common::image(&agent.path("tiny/v.img"), 4 << 20);
    let ballast = agent.path("tiny/ballast");
    std::fs::write(&ballast, vec![1; 1 << 20]).expect("there is room");
    let mut driver = agent.disk("v");
    let bytes: Vec<u8> = (0..1536 << 10).map(|i: u32| (i >> 8) as u8).collect();
    let buffer = Buffer::from_vec(bytes.clone());
    let tag = driver.submit(Operation::Write, 0, bytes.len() as u64, buffer);
    driver.idle(Duration::from_millis(1200));
    assert!(driver.done.is_empty(), "the guest sees nothing but a pause");
    assert!(agent.log().contains("No space is left for the volume"), "{}", agent.log());
    std::fs::remove_file(&ballast).expect("it goes");
    let until = Instant::now() + LIMIT;
    while driver.done.is_empty() {
        assert!(Instant::now() < until, "it never goes on");
        driver.round(Duration::from_millis(50));
    }
    let done = driver.done.pop().expect("one");
    assert_eq!(done.tag, tag);
    done.result.expect("it is written");
    assert!(driver.read(0, bytes.len()) == bytes, "nothing is lost");
}

#[test]
fn peers_that_send_garbage_or_nothing_do_not_disturb_others() {
    let agent = Agent::start(VOLUME);
    let mut driver = agent.disk("v");
    let mut random = Random(77);
    let mut silent = Vec::new();
    for round in 0..40 {
        let mut socket = TcpStream::connect(&agent.address).expect("it listens");
        if round % 4 == 0 {
            silent.push(socket);
            continue;
        }
        let garbage: Vec<u8> = (0..random.below(5000)).map(|_| random.below(256) as u8).collect();
        socket.write_all(&garbage).ok();
        driver.write(0, &[round as u8; 512]).expect("it writes");
    }
    assert_eq!(driver.read(0, 512), [39; 512]);
    assert!(!agent.log().contains("panicked"), "{}", agent.log());
}

#[test]
fn more_connections_than_allowed_are_refused_and_those_inside_go_on() {
    let agent = Agent::start(&format!("[limits]\nconnections = 3\n{VOLUME}"));
    let mut driver = agent.disk("v");
    driver.write(0, &[5; 512]).expect("it writes");
    let client = || Client::new(&agent.address, "tester", &Security::Plain, None).expect("a client");
    let ask = |client: &mut Client, timeout| {
        client.call(Class::Control, opcode::VOLUMES, &[], Vec::new(), MAX_PAYLOAD, timeout)
    };
    let (mut one, mut two, mut more) = (client(), client(), client());
    ask(&mut one, LIMIT).expect("there is room");
    ask(&mut two, LIMIT).expect("there is room");
    let refused = ask(&mut more, Duration::from_secs(2)).expect_err("there is none").to_string();
    assert!(refused.contains("as many"), "{refused}");
    assert!(agent.log().contains("before its peer was served"), "{}", agent.log());
    assert_eq!(driver.read(0, 512), [5; 512]);
    drop(one);
    ask(&mut more, LIMIT).expect("a place is free again");
}

#[test]
fn sockets_that_say_nothing_keep_no_guest_out_and_fill_no_log() {
    let agent = Agent::start(&format!("[limits]\nconnections = 3\n{VOLUME}"));
    let mut sockets: Vec<TcpStream> =
        (0..200).map(|_| TcpStream::connect(&agent.address).expect("the kernel accepts")).collect();
    // Well before the agent's patience with the silent ones is over.
    let disk = connect(agent.options("v"), Duration::from_secs(8));
    let mut driver = Driver::new(disk.unwrap_or_else(|e| panic!("{e}\n{}", agent.log())));
    driver.write(0, &[5; 512]).expect("it writes");
    let first = &mut sockets[0];
    first.set_read_timeout(Some(LIMIT)).expect("a socket");
    assert!(!matches!(first.read(&mut [0; 16]), Ok(1..)), "the oldest ones made room");
    assert!(agent.log().lines().count() < 60, "{}", agent.log());
}
