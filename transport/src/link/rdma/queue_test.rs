//! Both sides of a session over queue pairs in memory, which break at any moment.
#![allow(unsafe_code)] // one-sided transfers between registered regions are raw copies

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::RawFd;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use super::flow::Flow;
use super::queue::{Done, Keys, Queue, SLOTS, Transfer, Work};
use crate::buffer::{Buffer, Region};
use crate::channel::{self, Call};
use crate::core::answerer::Answerer;
use crate::core::asker::{Asker, Identity};
use crate::core::stream::Peer;
use crate::dice::Dice;
use crate::server::{self, Limits, Sessions};
use crate::sessions::Claimant;
use crate::wire::rdma::{Place, SLOT};
use crate::wire::{Body, Class, PREFACE, Status};

/// An operation, the bytes that it sends, and whether it ends a group.
type Posted = (Work, Option<Vec<u8>>, bool);

/// What both ends share: the network and both devices.
struct Net {
    broken: bool,
    /// By side: operations that were posted and not carried out.
    posted: [VecDeque<Posted>; 2],
    /// Receiving slots that are free, in the order in which they were posted.
    free: [VecDeque<u16>; 2],
    slots: [Vec<Vec<u8>>; 2],
    done: [VecDeque<Done>; 2],
    regions: Vec<(usize, Arc<Region>)>,
}

struct End {
    net: Arc<Mutex<Net>>,
    side: usize,
    sending: Vec<Vec<u8>>,
    received: Vec<Vec<u8>>,
}

fn pair() -> (Arc<Mutex<Net>>, [End; 2]) {
    let empty = || vec![vec![0; SLOT]; usize::from(SLOTS)];
    let net = Arc::new(Mutex::new(Net {
        broken: false,
        posted: Default::default(),
        free: [(0..SLOTS).collect(), (0..SLOTS).collect()],
        slots: [empty(), empty()],
        done: Default::default(),
        regions: Vec::new(),
    }));
    let end = |side| End { net: net.clone(), side, sending: empty(), received: empty() };
    let ends = [end(0), end(1)];
    (net, ends)
}

impl Net {
    /// The memory that a transfer names at the side `side`, if it is registered there.
    fn find(&self, side: usize, key: u32, at: u64, len: u32) -> Option<*mut u8> {
        let (owner, region) = self.regions.get(key as usize)?;
        let from = (at as usize).checked_sub(region.base())?;
        (*owner == side && from + len as usize <= region.len()).then_some(at as *mut u8)
    }

    /// Carries one operation of `side` out.
    fn step(&mut self, side: usize) {
        let Some((work, message, ends)) = self.posted[side].pop_front() else { return };
        if self.broken {
            return self.done[side].push_back(Done::Failed("broken".into()));
        }
        let transfer = |net: &Self, t: Transfer| {
            assert_eq!(side, 1, "only the answering side reads and writes");
            let local = net.find(1, t.local_key, t.local, t.len).expect("our own memory is registered");
            let remote = net.find(0, t.remote_key, t.remote, t.len).expect("the peer's memory is registered");
            (local, remote, t.len as usize)
        };
        match work {
            Work::Send { .. } => {
                let slot = self.free[1 - side].pop_front().expect("credit keeps a receiver ready");
                let message = message.expect("it was copied when it was posted");
                let len = message.len() as u32;
                self.slots[1 - side][usize::from(slot)] = message;
                self.done[1 - side].push_back(Done::Received { slot, len });
            }
            Work::Read(t) => {
                let (local, remote, len) = transfer(self, t);
                // SAFETY: both ranges lie in registered regions, which live; they are different memory.
                unsafe { std::ptr::copy_nonoverlapping(remote, local, len) };
            }
            Work::Write(t) => {
                let (local, remote, len) = transfer(self, t);
                // SAFETY: as above.
                unsafe { std::ptr::copy_nonoverlapping(local, remote, len) };
            }
        }
        if ends {
            self.done[side].push_back(Done::Group);
        }
    }
}

impl End {
    fn net(&self) -> MutexGuard<'_, Net> {
        self.net.lock().expect("no test panicked with it")
    }
}

impl Drop for End {
    fn drop(&mut self) {
        self.net().broken = true;
    }
}

impl Queue for End {
    fn place(&self) -> Place {
        unreachable!("both ends are connected already")
    }

    fn slot(&mut self, slot: u16) -> &mut [u8] {
        &mut self.sending[usize::from(slot)]
    }

    fn received(&self, slot: u16, len: u32) -> &[u8] {
        &self.received[usize::from(slot)][..len as usize]
    }

    fn repost(&mut self, slot: u16) -> io::Result<()> {
        let side = self.side;
        self.net().free[side].push_back(slot);
        Ok(())
    }

    fn post(&mut self, works: &[(Work, bool)]) -> io::Result<()> {
        for (work, ends) in works {
            let message = match work {
                Work::Send { slot, len } => Some(self.sending[usize::from(*slot)][..*len as usize].to_vec()),
                _ => None,
            };
            self.net().posted[self.side].push_back((*work, message, *ends));
        }
        Ok(())
    }

    fn poll(&mut self, done: &mut Vec<Done>) {
        let mut net = self.net.lock().expect("no test panicked with it");
        if net.broken {
            done.push(Done::Failed("broken".into()));
        }
        while let Some(what) = net.done[self.side].pop_front() {
            if let Done::Received { slot, .. } = what {
                self.received[usize::from(slot)].clone_from(&net.slots[self.side][usize::from(slot)]);
            }
            done.push(what);
        }
    }

    fn notify(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn completions(&self) -> RawFd {
        -1
    }

    fn woken(&mut self) {}

    fn events(&self) -> RawFd {
        -1
    }

    fn take_event(&mut self) -> Option<String> {
        None
    }

    fn register(&mut self, region: &Arc<Region>) -> Option<Keys> {
        let side = self.side;
        let mut net = self.net();
        let known =
            net.regions.iter().position(|(owner, other)| *owner == side && Arc::ptr_eq(other, region));
        let key = known.unwrap_or_else(|| {
            net.regions.push((side, region.clone()));
            net.regions.len() - 1
        });
        Some(Keys { local: key as u32, remote: key as u32 })
    }
}

const LIMITS: Limits =
    Limits { requests: 16, bytes: 8 << 20, sessions: 2, connections: 2, per_node: 2, rdma: true };
const READ: u16 = 300;
const WRITE: u16 = 301;

/// A connection of the session, from the first hello on.
struct Connection {
    net: Arc<Mutex<Net>>,
    answerer: Answerer,
    flows: [Flow; 2],
}

fn connect(asker: &mut Asker, sessions: &Arc<Sessions>, now: Instant) -> Connection {
    let claimant = Claimant { number: sessions.number(), cut: Arc::new(|| ()), wake: Arc::new(|| ()) };
    let mut answerer = Answerer::new(sessions.clone(), claimant, now);
    asker.connected(now);
    let hello = asker.next().expect("a hello");
    answerer.version(2);
    answerer.hello(&hello.head[PREFACE..]).expect("it is understood");
    let hello = answerer.next().expect("a hello");
    asker.version(2);
    asker.hello(&hello.head[PREFACE..]).expect("it is understood");
    let (net, [asking, answering]) = pair();
    let flows = [Flow::new(Box::new(asking), SLOTS), Flow::new(Box::new(answering), SLOTS)];
    Connection { net, answerer, flows }
}

fn pattern(seed: u64, len: usize) -> Vec<u8> {
    (0..len as u64).map(|at| (seed.wrapping_mul(31).wrapping_add(at * at + at / 251)) as u8).collect()
}

/// What the answering side's user does; `effects` counts the writes.
fn serve(connection: &mut Connection, dice: &mut Dice, effects: &mut BTreeMap<u64, u32>) {
    let mut events = Vec::new();
    connection.answerer.take_events(&mut events);
    for event in events {
        let server::Event::Request(request) = event else { continue };
        let seed = u64::from_le_bytes(request.body[..8].try_into().expect("eight bytes"));
        let answer = if request.opcode == WRITE {
            assert_eq!(
                request.payload.to_vec(),
                pattern(seed, request.payload.len()),
                "the payload is whole"
            );
            *effects.entry(seed).or_default() += 1;
            Buffer::empty()
        } else if dice.roll(4) == 0 {
            // Memory that nobody registers.
            Buffer::from_vec(pattern(seed, request.answer_len))
        } else {
            let answer = connection.answerer.pool.take(request.answer_len);
            answer.write_at(0, &pattern(seed, request.answer_len));
            answer
        };
        connection.answerer.answer(request.id, Status::OK, &request.body, answer);
    }
}

fn call(seed: u64, dice: &mut Dice) -> Call {
    let len = [0, 1, 255, 256, 257, 4096, 65536, 300_000][dice.roll(8)];
    let write = dice.roll(2) == 0;
    Call {
        tag: seed,
        opcode: if write { WRITE } else { READ },
        class: [Class::Urgent, Class::Normal, Class::Bulk][dice.roll(3)],
        body: Body::from_slice(&seed.to_le_bytes()),
        payload: if write { Buffer::from_vec(pattern(seed, len)) } else { Buffer::empty() },
        answer: if write { Buffer::empty() } else { Buffer::zeroed(len) },
        once: write,
        deadline: None,
        setup: false,
    }
}

/// One history: `breaks` times the queue pair breaks, at moments that the dice choose.
fn history(seed: u64, breaks: usize) {
    let (mut dice, now) = (Dice(seed | 1), Instant::now());
    let identity = Identity { name: "test".into(), instance: 1, boot: 2 };
    let mut asker = Asker::new(identity, 3, Duration::from_secs(60), now);
    let sessions = Sessions::new("test", LIMITS);
    let mut effects = BTreeMap::new();
    let mut writes = 0;
    let calls = 120;
    for seed in 0..calls {
        let call = call(seed, &mut dice);
        writes += usize::from(call.once);
        asker.submit(call);
    }
    let (mut answered, mut events) = (0, Vec::new());
    let mut left = breaks;
    let mut connection = connect(&mut asker, &sessions, now);
    asker.ready();
    for round in 0.. {
        assert!(round < 200_000, "it comes to an end: {answered} of {calls}");
        let Connection { net, answerer, flows: [asking, answering] } = &mut connection;
        let peers: [(&mut Flow, &mut dyn Peer); 2] = [(asking, &mut asker), (answering, answerer)];
        let mut fault = None;
        for (flow, peer) in peers {
            if dice.roll(3) > 0 {
                fault = fault.or(flow.progress(true, &mut *peer).err()).or(flow.send(peer).err());
            }
        }
        for _ in 0..dice.roll(6) {
            net.lock().expect("no panic").step(dice.roll(2));
        }
        if left > 0 && dice.roll(120) == 0 {
            left -= 1;
            net.lock().expect("no panic").broken = true;
        }
        serve(&mut connection, &mut dice, &mut effects);
        asker.take_events(&mut events);
        for event in events.drain(..) {
            if let channel::Event::Answer(answer) = event {
                assert_eq!(answer.status, Status::OK);
                let whole = pattern(answer.tag, answer.received);
                assert_eq!(answer.answer.to_vec(), whole, "the answer is whole");
                answered += 1;
            }
        }
        if let Some(fault) = fault {
            assert!(fault.to_string().contains("broken"), "{fault}");
            connection.answerer.closed(&fault);
            drop(connection);
            asker.disconnected();
            connection = connect(&mut asker, &sessions, now);
        }
        if answered == calls && left == 0 {
            break;
        }
        if answered == calls {
            left = 0;
        }
    }
    assert_eq!(effects.len(), writes, "each write took effect");
    assert!(effects.values().all(|times| *times == 1), "and only once: {effects:?}");
}

#[test]
fn all_sizes_go_both_ways_whole_and_the_receiver_is_always_ready() {
    for seed in 1..20 {
        history(seed * 7919, 0);
    }
}

#[test]
fn a_queue_pair_that_breaks_at_any_moment_loses_and_repeats_nothing() {
    for seed in 1..40 {
        history(seed * 104_729, 1 + seed as usize % 6);
    }
}
