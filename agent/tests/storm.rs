//! A storm over guest memory: real agents that are killed, frozen, cut off, emptied and made to forget, in the middle of
//! threads that check every page they touch, while most of their memory is elsewhere.
//!
//! What a page must hold follows from its number, how often it was written to and how often a word of it was, so one
//! page that is stale, lost, torn or zero is noticed. `OMEGA_SEEDS=100..200` runs other storms than the usual ones.

mod common;

use std::fs::File;
use std::io::{Seek as _, Write as _};
use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use common::proxy::Proxy;
use common::systemd::Systemd;
use common::{Agent, LIMIT};
use nix::sys::signal::Signal;
use transport::channel::Transport;
use transport::identity::Security;
use vm_memory::{Bytes as _, GuestAddress};
use vmm::memory::fault::{Engine, Error, Options, PAGE, Pieces, Shards};
use vmm::memory::store::{Connected, Helper, OnLoss, Source, Standing, Terms, connect};
use vmm::memory::{Backing, Layout, Ram};
use vmm::units::Bytes;

const MEMORY: &str = "lease_ttl = '60s'\n[memory]\nsize = '256M'\nlock = false\n";
/// Four pieces, for two handlers.
const RAM: u64 = 64 << 20;
const PIECE: u64 = 4096;
const HANDLERS: u32 = 2;
/// A quarter of what is used.
const LOCAL: u64 = 1 << 20;
const THREADS: u64 = 3;
/// Each thread's blocks, and the pages of one.
const BLOCKS: u64 = 43;
const BLOCK: u64 = 8;

struct Dice(u64);

impl Dice {
    fn below(&mut self, most: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % most
    }

    fn while_away(&mut self) {
        sleep(Duration::from_millis(self.below(400)));
    }
}

/// What a page must hold: nothing was ever written to it, or so often all of it, and then one word.
type Content = Option<(u64, u64)>;

/// The word that is written to alone.
const LONE: usize = 77;

fn content(page: u64, content: Content) -> Vec<u8> {
    let Some((version, lone)) = content else { return vec![0; PAGE] };
    let word = |word| match word {
        0 => page,
        1 => version,
        LONE => lone,
        // Half of them shrink, so that both kinds cross the link.
        _ if page.is_multiple_of(2) => version,
        _ => (page << 32 ^ version ^ (word as u64) << 48).wrapping_mul(0x9e37_79b9_7f4a_7c15),
    };
    (0..PAGE / 8).map(word).flat_map(u64::to_le_bytes).collect()
}

/// Guest RAM under handlers.
struct Guest {
    engine: Engine,
    ram: Ram,
    failed: OnceLock<String>,
    ended: AtomicBool,
    work: [AtomicU64; THREADS as usize],
}

impl Guest {
    fn at(page: u64) -> GuestAddress {
        GuestAddress(page * PAGE as u64)
    }

    fn check(&self, page: u64, what: Content) -> Result<(), String> {
        let mut found = vec![0; PAGE];
        self.ram.memory().read_slice(&mut found, Self::at(page)).map_err(|e| e.to_string())?;
        compare(page, &found, what)
    }
}

fn compare(page: u64, found: &[u8], what: Content) -> Result<(), String> {
    if found == content(page, what) {
        return Ok(());
    }
    let words: Vec<u64> =
        found.chunks(8).map(|word| u64::from_le_bytes(word.try_into().expect("8 bytes"))).collect();
    Err(format!("page {page} is not {what:?}: it begins {:x?}, {} alone", &words[..4], words[LONE]))
}

/// One thread of the guest, and what its pages must hold.
struct Worker<'a> {
    guest: &'a Guest,
    dice: Dice,
    blocks: Vec<Range<u64>>,
    held: Vec<[Content; BLOCK as usize]>,
    file: File,
    versions: u64,
}

impl<'a> Worker<'a> {
    fn new(guest: &'a Guest, number: u64, seed: u64) -> Self {
        let block = |block: u64| {
            let first = block % 4 * PIECE + block / 4 * BLOCK;
            first..first + BLOCK
        };
        let blocks = (0..BLOCKS).map(|at| block(at * THREADS + number)).collect();
        let file = tempfile::tempfile().expect("a file");
        let dice = Dice(seed * 31 + number);
        Self { guest, dice, blocks, held: vec![[None; BLOCK as usize]; BLOCKS as usize], file, versions: 0 }
    }

    fn step(&mut self) -> Result<(), String> {
        let block = self.dice.below(BLOCKS) as usize;
        let at = self.dice.below(BLOCK);
        let page = self.blocks[block].start + at;
        let memory = self.guest.ram.memory();
        let held = &mut self.held[block][at as usize];
        let failed = |why: vm_memory::GuestMemoryError| why.to_string();
        match self.dice.below(100) {
            0..40 => self.guest.check(page, *held),
            40..70 => {
                self.versions += 1;
                *held = Some((self.versions, 0));
                memory.write_slice(&content(page, *held), Guest::at(page)).map_err(failed)
            }
            70..85 => {
                let Some((_, lone)) = held else { return Ok(()) };
                *lone += 1;
                let address = GuestAddress(page * PAGE as u64 + LONE as u64 * 8);
                memory.write_obj(*lone, address).map_err(failed)
            }
            // The kernel reads or writes it, as for a device.
            85..91 => {
                self.file.rewind().map_err(|e| e.to_string())?;
                memory.write_all_volatile_to(Guest::at(page), &mut self.file, PAGE).map_err(failed)?;
                let mut found = vec![0; PAGE];
                std::os::unix::fs::FileExt::read_exact_at(&self.file, &mut found, 0)
                    .map_err(|e| e.to_string())?;
                compare(page, &found, *held)
            }
            91..97 => {
                self.versions += 1;
                *held = Some((self.versions, 0));
                std::os::unix::fs::FileExt::write_all_at(&self.file, &content(page, *held), 0)
                    .and_then(|()| self.file.rewind())
                    .map_err(|e| e.to_string())?;
                memory.read_exact_volatile_from(Guest::at(page), &mut self.file, PAGE).map_err(failed)
            }
            // The guest gives a block back.
            _ => {
                self.held[block] = [None; BLOCK as usize];
                let first = Guest::at(self.blocks[block].start);
                let discarded = self.guest.engine.discard(first, BLOCK * PAGE as u64);
                discarded.map(drop).map_err(|e| e.to_string())
            }
        }
    }

    fn work(mut self, number: usize) {
        while !self.guest.ended.load(Ordering::Relaxed) {
            if let Err(why) = self.step() {
                drop(self.guest.failed.set(why));
                return;
            }
            self.guest.work[number].fetch_add(1, Ordering::Relaxed);
        }
        for (block, held) in self.blocks.iter().zip(&self.held) {
            for (page, held) in block.clone().zip(held) {
                if let Err(why) = self.guest.check(page, *held) {
                    drop(self.guest.failed.set(why));
                }
            }
        }
    }
}

/// An agent whose memory outlives its process, and the way there.
struct Pc {
    agent: Agent,
    proxy: Proxy,
    left: bool,
}

impl Pc {
    fn new() -> Self {
        let mut agent = Agent::start(MEMORY);
        agent.end(Signal::SIGTERM);
        agent.systemd = Some(Systemd::start(agent.folder.path()));
        agent.run();
        let proxy = Proxy::new(&agent.address);
        Self { agent, proxy, left: false }
    }

    fn helper(&self) -> Helper {
        Helper {
            agent: self.proxy.address.clone(),
            node: None,
            security: Security::Plain,
            transport: Transport::Tcp,
            size: RAM,
        }
    }
}

struct Storm<'a> {
    guest: &'a Guest,
    all: &'a Connected,
    pcs: Vec<Pc>,
    on_loss: OnLoss,
    dice: Dice,
    seed: u64,
    /// What happened until now.
    log: Vec<String>,
}

impl Storm<'_> {
    /// Ends the whole process, since threads may stand still in the guest's memory for ever.
    fn fail(&self, why: &str) -> ! {
        let report = self.all.health.report();
        let (seed, log) = (self.seed, &self.log);
        let said = format!("storm {seed}, {:?}: {why}\n{log:#?}\n{report:?}\n", self.on_loss);
        std::io::stderr().write_all(said.as_bytes()).ok();
        for pc in &self.pcs {
            std::io::stderr().write_all(pc.agent.log().as_bytes()).ok();
        }
        std::process::exit(101);
    }

    fn until(&self, what: &str, so: impl Fn() -> bool) {
        let end = Instant::now() + LIMIT;
        while !so() {
            if let Some(why) = self.guest.failed.get() {
                self.fail(why);
            }
            if let Some(why) = self.guest.engine.lost() {
                self.fail(&format!("pages were lost: {why}"));
            }
            if Instant::now() > end {
                self.fail(&format!("{what}: not within {LIMIT:?}"));
            }
            sleep(Duration::from_millis(2));
        }
    }

    /// Every thread has touched so many pages more.
    fn goes_on(&self, more: u64) {
        let before = self.guest.work.each_ref().map(|work| work.load(Ordering::Relaxed));
        let each = || self.guest.work.iter().zip(before);
        self.until("the guest goes on", || {
            each().all(|(work, before)| work.load(Ordering::Relaxed) >= before + more)
        });
    }

    /// Everybody is here and has what they should have.
    fn settles(&self) {
        self.until("everything is where it should be", || {
            let report = self.all.health.report();
            let away = |standing: &Standing| matches!(standing, Standing::Away { .. });
            report.degraded == 0 && !report.helpers.iter().any(|helper| away(&helper.standing))
        });
    }

    fn happens(&mut self) {
        let here: Vec<usize> = (0..self.pcs.len()).filter(|pc| !self.pcs[*pc].left).collect();
        let at = here[self.dice.below(here.len() as u64) as usize];
        let most = if self.on_loss == OnLoss::None { 3 } else { 5 };
        let what = self.dice.below(most);
        self.log
            .push(format!("helper {at}: {}", ["killed", "frozen", "cut", "forgot", "dead"][what as usize]));
        match what {
            0 => {
                self.pcs[at].agent.end(Signal::SIGKILL);
                self.dice.while_away();
                self.pcs[at].agent.run();
            }
            1 => {
                self.pcs[at].agent.signal(Signal::SIGSTOP);
                self.dice.while_away();
                self.pcs[at].agent.signal(Signal::SIGCONT);
            }
            2 => {
                self.pcs[at].proxy.cut();
                self.dice.while_away();
                self.pcs[at].proxy.heal();
            }
            _ => {
                // Only one at a time may forget, once the others have everything.
                self.settles();
                self.pcs[at].agent.end(Signal::SIGKILL);
                self.pcs[at].agent.systemd.as_ref().expect("it has one").forget();
                if what == 4 {
                    self.goes_on(20);
                }
                self.pcs[at].agent.run();
                self.settles();
            }
        }
    }

    /// A helper is emptied and switched off.
    fn drain(&mut self) {
        let at = self.dice.below(self.pcs.len() as u64) as usize;
        self.log.push(format!("helper {at}: drained"));
        let name = self.pcs[at].proxy.address.clone();
        if let Err(why) = self.all.control.drain(&name) {
            self.fail(&why.to_string());
        }
        self.until("it has left", || {
            matches!(self.all.health.report().helpers[at].standing, Standing::Left { .. })
        });
        self.pcs[at].left = true;
        self.pcs[at].agent.end(Signal::SIGKILL);
    }
}

/// `false`: it cannot be had here.
fn storm(seed: u64) -> bool {
    let on_loss = [OnLoss::None, OnLoss::Mirror, OnLoss::LocalDisk][seed as usize % 3];
    let pcs: Vec<Pc> = (0..if on_loss == OnLoss::Mirror { 3 } else { 2 }).map(|_| Pc::new()).collect();
    let folder = tempfile::tempdir().expect("a folder");
    let shards = Shards::new(Pieces::new(Bytes(RAM)), HANDLERS);
    let terms = Terms {
        swap_file: (on_loss == OnLoss::LocalDisk).then(|| folder.path().join("swap")),
        patience: Duration::from_millis(300),
        dead_after: Duration::from_millis(500),
        hedge: Duration::from_millis(50),
        ..Terms::new("guest", "guest@test", shards, on_loss)
    };
    let helpers: Vec<Helper> = pcs.iter().map(Pc::helper).collect();
    let mut all = connect(&helpers, &terms).unwrap_or_else(|e| panic!("{e}"));
    let sources = all.stores.drain(..).map(|store| Box::new(store) as Box<dyn Source>).collect();
    let layout = Layout::new(Bytes(RAM), 40).expect("it fits");
    let ram = Ram::new(&layout, Backing::Shared).expect("RAM");
    let engine = match Engine::start(&ram, sources, Options { local: Bytes(LOCAL) }) {
        Ok(engine) => engine,
        Err(Error::Userfault(why)) => {
            eprintln!("cannot run: no userfaultfd for the kernel's faults: {why}");
            return false;
        }
        Err(why) => panic!("{why}"),
    };
    let (failed, ended, work) = Default::default();
    let guest = Guest { engine, ram, failed, ended, work };
    thread::scope(|scope| {
        let mut threads = Vec::new();
        for number in 0..THREADS {
            let worker = Worker::new(&guest, number, seed);
            threads.push(scope.spawn(move || worker.work(number as usize)));
        }
        let (log, dice) = (Vec::new(), Dice(seed));
        let mut storm = Storm { guest: &guest, all: &all, pcs, on_loss, dice, seed, log };
        storm.goes_on(500);
        for _ in 0..6 {
            storm.happens();
            storm.goes_on(50);
        }
        if on_loss != OnLoss::LocalDisk {
            storm.drain();
            storm.goes_on(50);
            storm.happens();
            storm.goes_on(50);
        }
        guest.ended.store(true, Ordering::Relaxed);
        storm.until("all is checked", || threads.iter().all(thread::ScopedJoinHandle::is_finished));
        if let Some(why) = guest.failed.get() {
            storm.fail(why);
        }
        let counters = guest.engine.counters();
        assert!(
            counters.remote_faults > 100 && counters.dropped > 100,
            "hardly anything was elsewhere: {counters:?}"
        );
        println!("storm {seed}, {on_loss:?}: {:?}; {counters:?}", storm.log);
    });
    guest.engine.close();
    true
}

/// One storm after the other, in as many tests as there are policies.
fn storms(of: u64) {
    let seeds = std::env::var("OMEGA_SEEDS").ok();
    let seeds = seeds.as_deref().and_then(|seeds| seeds.split_once(".."));
    let seeds = seeds.and_then(|(first, end)| Some(first.parse().ok()?..end.parse().ok()?)).unwrap_or(0..6);
    for seed in seeds.filter(|seed| seed % 3 == of) {
        if !storm(seed) {
            return;
        }
    }
}

#[test]
fn without_copies_no_page_is_wrong_whatever_happens_to_helpers_that_keep_their_memory() {
    storms(0);
}

#[test]
fn a_mirror_has_every_page_right_whatever_happens_to_one_helper_at_a_time() {
    storms(1);
}

#[test]
fn a_local_file_has_every_page_right_whatever_happens_to_one_helper_at_a_time() {
    storms(2);
}
