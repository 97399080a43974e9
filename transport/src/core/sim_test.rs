//! One asking side and a serving process over a simulated network that delays, cuts at any byte and
//! restarts the server, step by step from a seed. What must hold is checked at every step.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::buffer::Buffer;
use crate::channel::{self, Call};
use crate::core::answerer::Answerer;
use crate::core::asker::{Asker, Identity};
use crate::core::stream::{Decoder, Outqueue};
use crate::server::{self, Limits, Request};
use crate::sessions::{Claimant, Sessions};
use crate::wire::{Body, Class, Fault, Status};

/// Small limits, so that they are reached.
const LIMITS: Limits =
    Limits { requests: 6, bytes: 4 << 20, sessions: 2, connections: 2, per_node: 2, rdma: false };

/// Calls in one run.
const CALLS: u64 = 300;

/// A small generator: the same seed, the same run.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) % sides
    }
}

/// The client's end of the connection that lasts.
struct ClientEnd {
    decoder: Decoder,
    out: Outqueue,
}

/// One connection in the network, with the server's end.
struct Wire {
    core: Answerer,
    decoder: Decoder,
    out: Outqueue,
    to_server: Vec<u8>,
    to_client: Vec<u8>,
    cut: Arc<AtomicBool>,
    woken: Arc<AtomicBool>,
    closed: bool,
    requests: Vec<Request>,
    last_id: HashMap<Class, u64>,
}

struct World {
    dice: Dice,
    now: Instant,
    sessions: Arc<Sessions>,
    instance: u32,
    client: Asker,
    end: Option<ClientEnd>,
    wires: Vec<Wire>,
    /// How often each call was carried out by each instance.
    carried_out: HashMap<(u32, u64), u32>,
    once: HashSet<u64>,
    answered: HashMap<u64, Status>,
    submitted: u64,
    opened: u32,
    resumed: u32,
    /// Set-up calls that the present session waits for before it is ready.
    setting_up: HashSet<u64>,
}

impl World {
    fn new(seed: u64) -> Self {
        let now = Instant::now();
        let identity = Identity { name: "sim".into(), instance: 1, boot: 1 };
        Self {
            dice: Dice(seed | 1),
            now,
            sessions: Sessions::new("sim server", LIMITS),
            instance: 0,
            client: Asker::new(identity, 7, Duration::from_secs(1000), now),
            end: None,
            wires: Vec::new(),
            carried_out: HashMap::new(),
            once: HashSet::new(),
            answered: HashMap::new(),
            submitted: 0,
            opened: 0,
            resumed: 0,
            setting_up: HashSet::new(),
        }
    }

    fn submit(&mut self, setup: bool) -> u64 {
        let number = self.submitted;
        self.submitted += 1;
        let class = [Class::Urgent, Class::Normal, Class::Control, Class::Bulk][self.dice.roll(4) as usize];
        let once = self.dice.roll(2) == 0;
        let mut size = || [0, 10, 9000, 400_000][self.dice.roll(4) as usize];
        let (payload, answer) = (size(), if once { 0 } else { size() });
        let deadline =
            (self.dice.roll(10) == 0).then(|| self.now + Duration::from_millis(self.dice.roll(50)));
        if once {
            self.once.insert(number);
        }
        let bytes = Buffer::zeroed(payload);
        bytes.fill(number as u8);
        self.client.submit(Call {
            tag: number,
            opcode: 300,
            class,
            body: Body::from_slice(&number.to_le_bytes()),
            payload: bytes,
            answer: Buffer::zeroed(answer),
            once,
            deadline,
            setup,
        });
        number
    }

    /// A new session: some calls bring the server's state back before everything else.
    fn set_up(&mut self) {
        assert!(self.setting_up.is_empty(), "the earlier set-up was given back");
        for _ in 0..self.dice.roll(20) {
            let number = self.submit(true);
            self.setting_up.insert(number);
        }
        if self.setting_up.is_empty() {
            self.client.ready();
        }
    }

    fn client_events(&mut self) {
        let mut events = Vec::new();
        self.client.take_events(&mut events);
        for event in events {
            match event {
                channel::Event::Opened { .. } => {
                    self.opened += 1;
                    self.set_up();
                }
                channel::Event::Resumed { .. } => self.resumed += 1,
                channel::Event::Carrier { .. } => {}
                channel::Event::Lost { reason } => panic!("the core loses nothing by itself: {reason}"),
                channel::Event::Answer(answer) => {
                    let earlier = self.answered.insert(answer.tag, answer.status);
                    assert_eq!(earlier, None, "call {} is answered once", answer.tag);
                    let setup = self.setting_up.remove(&answer.tag);
                    if setup && answer.status == Status::CANCELLED {
                        continue;
                    }
                    if setup && self.setting_up.is_empty() {
                        self.client.ready();
                    }
                    let held = !setup && answer.status == Status::OK && !self.setting_up.is_empty();
                    assert!(!held, "call {} waits until the session is set up", answer.tag);
                    if answer.status == Status::OK {
                        assert_eq!(answer.body.as_slice(), answer.tag.to_le_bytes());
                        let bytes = answer.answer.to_vec();
                        assert_eq!(answer.received, bytes.len());
                        assert!(bytes.iter().all(|byte| *byte == answer.tag as u8), "the answer's own bytes");
                    } else {
                        assert_eq!(answer.status, Status::DEADLINE);
                    }
                }
            }
        }
    }

    fn connect(&mut self) {
        let (cut, woken) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let (cuts, wakes) = (cut.clone(), woken.clone());
        let claimant = Claimant {
            number: self.sessions.number(),
            cut: Arc::new(move || cuts.store(true, Ordering::Relaxed)),
            wake: Arc::new(move || wakes.store(true, Ordering::Relaxed)),
        };
        self.wires.push(Wire {
            core: Answerer::new(self.sessions.clone(), claimant, self.now),
            decoder: Decoder::new(),
            out: Outqueue::default(),
            to_server: Vec::new(),
            to_client: Vec::new(),
            cut,
            woken,
            closed: false,
            requests: Vec::new(),
            last_id: HashMap::new(),
        });
        self.client.connected(self.now);
        self.end = Some(ClientEnd { decoder: Decoder::new(), out: Outqueue::default() });
    }

    /// The client's end goes away; the server's sees it some time later.
    fn hang_up(&mut self) {
        self.end = None;
        self.client.disconnected();
    }

    fn step(&mut self) {
        self.now += Duration::from_micros(self.dice.roll(200));
        let most = 1 + [0, 40, 30_000, 500_000][self.dice.roll(4) as usize] as usize;
        match self.dice.roll(100) {
            0..5 if self.submitted < CALLS => drop(self.submit(false)),
            0..10 => self.tick(),
            10..30 => self.client_sends(most),
            30..50 => self.server_receives(most),
            50..70 => self.server_sends(most),
            70..85 => self.client_receives(most),
            85..97 => self.carry_out(),
            97 if self.dice.roll(5) == 0 && self.end.is_some() => self.hang_up(),
            98 if self.dice.roll(100) == 0 => self.restart(),
            _ => self.notice_cuts(),
        }
        if self.end.is_none() && self.dice.roll(20) == 0 {
            self.connect();
        }
        self.client_events();
        for at in 0..self.wires.len() {
            self.server_events(at);
        }
        let number = |wire: &Wire| wire.closed && wire.requests.is_empty();
        let last = self.wires.len().saturating_sub(1);
        let mut at = 0;
        self.wires.retain(|wire| {
            at += 1;
            at - 1 == last || !number(wire)
        });
    }

    fn tick(&mut self) {
        let end = &mut self.end;
        let expired = |id, receiving| {
            if let Some(end) = end {
                end.out.detach(id);
                if receiving {
                    end.decoder.discard();
                }
            }
        };
        self.client.tick(self.now, expired).expect("nobody is dead here");
    }

    fn client_sends(&mut self, most: usize) {
        let (Some(end), Some(wire)) = (&mut self.end, self.wires.last_mut()) else { return };
        end.out.fill(&mut self.client);
        let bytes = end.out.take(most, &mut self.client);
        wire.to_server.extend(bytes);
    }

    fn server_receives(&mut self, most: usize) {
        let at = self.dice.roll(self.wires.len().max(1) as u64) as usize;
        let newest = at + 1 == self.wires.len();
        let Some(wire) = self.wires.get_mut(at).filter(|wire| !wire.closed) else { return };
        let most = most.min(wire.to_server.len());
        let bytes: Vec<u8> = wire.to_server.drain(..most).collect();
        match wire.decoder.feed(&bytes, &mut wire.core) {
            Ok(()) => {}
            Err(Fault::Superseded) if !newest => wire.cut.store(true, Ordering::Relaxed),
            Err(fault) => panic!("the client breaks no rule and no limit: {fault}"),
        }
    }

    fn server_sends(&mut self, most: usize) {
        let at = self.dice.roll(self.wires.len().max(1) as u64) as usize;
        let Some(wire) = self.wires.get_mut(at).filter(|wire| !wire.closed) else { return };
        wire.out.fill(&mut wire.core);
        let bytes = wire.out.take(most, &mut wire.core);
        wire.to_client.extend(bytes);
    }

    fn client_receives(&mut self, most: usize) {
        let (Some(end), Some(wire)) = (&mut self.end, self.wires.last_mut()) else { return };
        let most = most.min(wire.to_client.len());
        let bytes: Vec<u8> = wire.to_client.drain(..most).collect();
        end.decoder.feed(&bytes, &mut self.client).expect("the server breaks no rule");
    }

    /// The server's ends of connections that are cut notice it.
    fn notice_cuts(&mut self) {
        let last = self.wires.len().saturating_sub(1);
        for at in 0..self.wires.len() {
            let current = at == last && self.end.is_some();
            let wire = &mut self.wires[at];
            if wire.woken.swap(false, Ordering::Relaxed)
                && let Err(fault) = wire.core.claim()
            {
                assert!(!current, "the newest connection is not refused: {fault}");
            }
            let cut = wire.cut.load(Ordering::Relaxed);
            if !wire.closed && (cut || !current) {
                wire.closed = true;
                wire.core.closed(&Fault::Closed);
                if current {
                    self.hang_up();
                }
            }
        }
    }

    fn server_events(&mut self, at: usize) {
        let mut events = Vec::new();
        self.wires[at].core.take_events(&mut events);
        for event in events {
            match event {
                server::Event::Opened { .. } => {
                    let older: usize = self.wires[..at].iter().map(|wire| wire.requests.len()).sum();
                    assert_eq!(older, 0, "earlier connections of the session are finished");
                }
                server::Event::Request(request) => {
                    let wire = &mut self.wires[at];
                    let last = wire.last_id.insert(request.class, request.id);
                    assert!(last.is_none_or(|last| last < request.id), "a class keeps its order");
                    assert!(wire.requests.len() < LIMITS.requests as usize);
                    let number = number(&request.body);
                    assert!(request.payload.to_vec().iter().all(|byte| *byte == number as u8));
                    wire.requests.push(request);
                }
                server::Event::Carrier(_) | server::Event::Cancel { .. } | server::Event::Closed { .. } => {}
            }
        }
    }

    /// The server finishes some request.
    fn carry_out(&mut self) {
        let at = self.dice.roll(self.wires.len().max(1) as u64) as usize;
        let Some(wire) = self.wires.get_mut(at).filter(|wire| !wire.requests.is_empty()) else { return };
        let request = wire.requests.swap_remove(self.dice.roll(wire.requests.len() as u64) as usize);
        let number = number(&request.body);
        *self.carried_out.entry((self.instance, number)).or_default() += 1;
        let answer = wire.core.pool.take(request.answer_len);
        answer.fill(number as u8);
        wire.core.answer(request.id, Status::OK, &request.body, answer);
    }

    fn restart(&mut self) {
        if self.end.is_some() {
            self.hang_up();
        }
        self.wires.clear();
        self.sessions = Sessions::new("sim server", LIMITS);
        self.instance += 1;
    }

    fn check_end(&self) {
        assert_eq!(self.answered.len() as u64, self.submitted, "every call is answered");
        for ((instance, number), times) in &self.carried_out {
            if self.once.contains(number) {
                assert_eq!(*times, 1, "call {number} took effect once in instance {instance}");
            }
        }
        for (number, status) in &self.answered {
            if *status == Status::OK {
                let done = (0..=self.instance).any(|i| self.carried_out.contains_key(&(i, *number)));
                assert!(done, "call {number} was answered because it was carried out");
            }
        }
    }
}

fn number(body: &[u8]) -> u64 {
    body.first_chunk().map_or(u64::MAX, |bytes| u64::from_le_bytes(*bytes))
}

fn run(seed: u64) -> (u32, u32) {
    let mut world = World::new(seed);
    for _ in 0..400_000 {
        world.step();
        if world.submitted >= CALLS && world.answered.len() as u64 == world.submitted {
            break;
        }
    }
    world.check_end();
    (world.opened, world.resumed)
}

#[test]
fn each_once_request_takes_effect_once_and_each_call_is_answered_once_on_any_network() {
    let (mut opened, mut resumed) = (0, 0);
    for seed in 1..13 {
        let (o, r) = run(seed * 0x9E37_79B9);
        opened += o;
        resumed += r;
    }
    assert!(opened > 12 && resumed > 30, "the runs had restarts ({opened}) and cuts ({resumed})");
}
