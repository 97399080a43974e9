//! The pages of a guest on real agents: stored, fetched, mirrored, drained, and lost only where no copy is left.

mod common;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use common::systemd::Systemd;
use common::{Agent, LIMIT};
use nix::sys::signal::Signal;
use transport::buffer::Buffer;
use transport::channel::Transport;
use transport::identity::Security;
use transport::ring::Ring;
use vmm::memory::fault::{PAGE, Page, Pieces, Shards};
use vmm::memory::store::{
    ConnectError, Connected, Done, Helper, OnLoss, Source, Standing, Stores, Terms, Urgency, connect,
};
use vmm::units::Bytes;

const MEMORY: &str = "lease_ttl = '60s'\n[memory]\nsize = '256M'\nlock = false\n";
/// Four pieces.
const RAM: u64 = 64 << 20;
const PIECE: u64 = 4096;

fn agent() -> Agent {
    Agent::start(MEMORY)
}

/// An agent whose memory outlives its process.
fn lasting() -> Agent {
    let mut agent = agent();
    agent.end(Signal::SIGTERM);
    agent.systemd = Some(Systemd::start(agent.folder.path()));
    agent.run();
    agent
}

fn helper(agent: &Agent) -> Helper {
    Helper {
        agent: agent.address.clone(),
        node: None,
        security: Security::Plain,
        transport: Transport::Tcp,
        size: RAM,
    }
}

fn terms(on_loss: OnLoss) -> Terms {
    let shards = Shards::new(Pieces::new(Bytes(RAM)), 1);
    Terms { patience: Duration::from_millis(500), ..Terms::new("guest", "guest@test", shards, on_loss) }
}

/// A guest's memory, driven as a fault handler drives it.
struct Guest {
    ring: Ring,
    stores: Stores,
    all: Connected,
    /// What each page must hold.
    held: BTreeMap<u64, u64>,
    seed: u64,
    lost: Vec<(u64, String)>,
    waiting: u64,
}

impl Guest {
    fn new(agents: &[&Agent], terms: &Terms) -> Self {
        Self::of(&agents.iter().map(|agent| helper(agent)).collect::<Vec<_>>(), terms)
    }

    fn of(helpers: &[Helper], terms: &Terms) -> Self {
        let mut all = connect(helpers, terms).unwrap_or_else(|e| panic!("{e}"));
        let mut ring = Ring::new(64).expect("io_uring works here");
        let mut stores = all.stores.remove(0);
        stores.attach(&mut ring).expect("it attaches");
        Self { ring, stores, all, held: BTreeMap::new(), seed: 0, lost: Vec::new(), waiting: 0 }
    }

    /// Lets things happen until `so`.
    fn until(&mut self, what: &str, mut so: impl FnMut(&Self) -> bool) {
        let end = Instant::now() + LIMIT;
        let mut done = Vec::new();
        loop {
            let now = Instant::now();
            let next = self.stores.tick(&mut self.ring, now, &mut done);
            self.take(&mut done);
            if so(self) {
                return;
            }
            assert!(now < end, "{what}, within {LIMIT:?}: {:?}", self.all.health.report());
            let wait = next.map_or(Duration::from_millis(50), |next| next.saturating_duration_since(now));
            self.ring.wait(Some(wait.min(Duration::from_millis(50)))).expect("it waits");
            while let Some(completion) = self.ring.reap() {
                assert!(self.stores.complete(&mut self.ring, completion, &mut done));
            }
            self.take(&mut done);
        }
    }

    fn take(&mut self, done: &mut Vec<Done>) {
        for done in done.drain(..) {
            match done {
                Done::Stored { count, .. } => self.waiting -= u64::from(count),
                Done::Fetched { first, count, content } => {
                    self.waiting -= u64::from(count);
                    let content = content.to_vec();
                    assert_eq!(content.len(), count as usize * PAGE);
                    for (page, content) in (first.0..).zip(content.chunks(PAGE)) {
                        assert!(content == page_of(page, self.held[&page]), "page {page} is wrong");
                    }
                }
                Done::Lost { first, count, why } => {
                    for page in first.0..first.0 + u64::from(count) {
                        self.held.remove(&page);
                        self.lost.push((page, why.clone()));
                    }
                }
            }
        }
    }

    /// Sends a store of new content.
    fn send(&mut self, first: u64, count: u64) {
        self.seed += 1;
        let content = (first..first + count).flat_map(|page| page_of(page, self.seed)).collect();
        self.held.extend((first..first + count).map(|page| (page, self.seed)));
        self.waiting += count;
        self.stores.store(Page(first), Buffer::from_vec(content));
    }

    fn store(&mut self, first: u64, count: u64) {
        self.send(first, count);
        self.until("it is stored", |guest| guest.waiting == 0);
    }

    /// Asks for what is held of the first `most` pages of each piece; what comes is compared.
    fn ask_below(&mut self, most: u64) {
        for page in self.held.clone().into_keys().filter(|page| page % PIECE < most) {
            self.waiting += 1;
            self.stores.fetch(Page(page), 1, Urgency::Fault);
        }
    }

    fn check_all(&mut self) {
        self.ask_below(PIECE);
        self.until("everything is there", |guest| guest.waiting == 0);
        assert!(self.lost.is_empty(), "{:?}", self.lost);
    }

    fn pages_at(&self, helper: usize) -> u64 {
        self.all.health.report().helpers[helper].pages
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.stores.close(&mut self.ring);
    }
}

fn page_of(page: u64, seed: u64) -> Vec<u8> {
    let words = (0..PAGE as u64 / 8).map(|word| page.wrapping_mul(0x9e37_79b9) ^ seed << 32 ^ word);
    words.flat_map(u64::to_le_bytes).collect()
}

/// A few pages of every piece.
fn fill(guest: &mut Guest) {
    (0..4).for_each(|piece| guest.send(piece * PIECE + 5, 40));
    guest.until("it is stored", |guest| guest.waiting == 0);
}

#[test]
fn pages_are_spread_over_helpers_and_come_back_as_they_were_stored() {
    let (one, other) = (agent(), agent());
    let mut guest = Guest::new(&[&one, &other], &terms(OnLoss::None));
    fill(&mut guest);
    assert_eq!((guest.pages_at(0), guest.pages_at(1)), (80, 80));
    guest.check_all();
    guest.store(7, 20);
    guest.stores.forget(Page(PIECE + 5), 40);
    guest.held.retain(|page, _| *page / PIECE != 1);
    guest.store(PIECE + 10, 4);
    guest.check_all();
    assert_eq!(guest.pages_at(0) + guest.pages_at(1), 124);
    let report = guest.all.health.report();
    let urgent = report.helpers.iter().flat_map(|helper| &helper.connections);
    assert!(urgent.flat_map(|connection| &connection.series).count() > 0, "the connections count");
}

#[test]
fn without_copies_the_guest_waits_for_its_helper_and_goes_on_when_it_is_back() {
    let mut agent = lasting();
    let mut guest = Guest::new(&[&agent], &terms(OnLoss::None));
    fill(&mut guest);
    agent.end(Signal::SIGKILL);
    guest.send(5, 3);
    guest.until("it says whom it waits for", |guest| guest.all.health.report().stuck.is_some());
    guest.until("it is not impatient", |guest| {
        let stuck = guest.all.health.report().stuck.expect("nobody is there");
        stuck.since.elapsed() > Duration::from_secs(1)
    });
    agent.run();
    guest.until("it goes on", |guest| guest.waiting == 0);
    guest.check_all();
    guest.until("nothing is stuck", |guest| guest.all.health.report().stuck.is_none());
}

#[test]
fn pages_that_a_helper_forgot_are_lost_and_never_zeros() {
    let mut agent = agent();
    let mut guest = Guest::new(&[&agent], &terms(OnLoss::None));
    fill(&mut guest);
    agent.restart();
    guest.until("it is lost", |guest| guest.lost.len() == 160);
    let report = guest.all.health.report();
    assert_eq!(report.lost.map(|(pages, _)| pages), Some(160));
    guest.lost.clear();
    // What is stored from now on is kept under a new lease.
    fill(&mut guest);
    guest.check_all();
}

#[test]
fn a_mirror_outlives_one_helper_after_the_other_when_a_third_takes_over() {
    let (mut one, mut two, three) = (agent(), agent(), agent());
    let mut guest = Guest::new(&[&one, &two, &three], &terms(OnLoss::Mirror));
    fill(&mut guest);
    assert_eq!((0..3).map(|helper| guest.pages_at(helper)).sum::<u64>(), 320);
    // In the middle of stores and fetches.
    (0..4).for_each(|piece| guest.send(piece * PIECE + 100, 100));
    guest.ask_below(100);
    one.end(Signal::SIGKILL);
    guest.until("it goes on", |guest| guest.waiting == 0);
    guest.check_all();
    guest.until("everything is there twice again", |guest| {
        guest.pages_at(0) == 0 && guest.pages_at(1) == 560 && guest.pages_at(2) == 560
    });
    two.end(Signal::SIGKILL);
    guest.send(50, 10);
    guest.until("it goes on", |guest| guest.waiting == 0);
    guest.check_all();
    assert!(guest.all.health.report().degraded > 0);
    // A helper that is back without its memory gets new copies.
    one.run();
    guest.until("nothing lacks a copy", |guest| {
        guest.all.health.report().degraded == 0 && guest.pages_at(0) == guest.pages_at(2)
    });
    guest.check_all();
}

#[test]
fn a_mirrored_helper_that_comes_back_with_old_pages_is_not_read_for_them() {
    let (mut one, two) = (lasting(), agent());
    let mut guest = Guest::new(&[&one, &two], &terms(OnLoss::Mirror));
    fill(&mut guest);
    one.end(Signal::SIGKILL);
    guest.send(5, 40);
    guest.until("the other one suffices", |guest| guest.waiting == 0);
    one.run();
    guest.until("it has everything again", |guest| {
        guest.pages_at(0) == 160 && guest.all.health.report().degraded == 0
    });
    drop(two);
    guest.check_all();
}

#[test]
fn a_helper_is_emptied_while_the_guest_goes_on() {
    let (one, two) = (agent(), agent());
    let mut guest = Guest::new(&[&one, &two], &terms(OnLoss::None));
    (0..4).for_each(|piece| guest.send(piece * PIECE, 256));
    guest.until("it is stored", |guest| guest.waiting == 0);
    assert!(guest.all.control.drain("nobody").is_err());
    guest.until("both are here", |guest| guest.all.control.lacks_without(&one.address) == 0);
    guest.all.control.drain(&one.address).expect("it is one of them");
    let mut round = 0;
    let left = |guest: &Guest| matches!(guest.all.health.report().helpers[0].standing, Standing::Left { .. });
    while !left(&guest) {
        guest.store(round % 4 * PIECE + round % 200, 5);
        round += 1;
    }
    assert_eq!((guest.pages_at(0), guest.pages_at(1)), (0, 1024));
    drop(one);
    guest.check_all();
}

#[test]
fn a_helper_that_joins_takes_what_must_leave_another() {
    let (one, two) = (agent(), agent());
    let mut guest = Guest::new(&[&one], &terms(OnLoss::None));
    fill(&mut guest);
    assert_eq!(guest.all.control.lacks_without(&one.address), RAM);
    assert_eq!(guest.all.control.lacks_without("nobody"), 0);
    guest.all.control.drain(&one.address).expect("it is there");
    guest.until("nobody has room", |guest| guest.all.health.report().helpers[0].leaving == 4);
    guest.all.control.add(&helper(&two)).unwrap_or_else(|e| panic!("{e}"));
    guest.until("it has left", |guest| {
        matches!(guest.all.health.report().helpers[0].standing, Standing::Left { .. })
    });
    drop(one);
    assert_eq!(guest.pages_at(1), 160);
    guest.check_all();
}

#[test]
fn helpers_with_exactly_the_least_room_keep_what_is_not_here() {
    let (one, two) = (agent(), agent());
    let local = 16 << 20;
    let least = vmm::memory::store::least(RAM, local);
    assert_eq!(least, 52 << 20);
    let terms = Terms { local, ..terms(OnLoss::None) };
    let half = |agent: &Agent| Helper { size: least / 2, ..helper(agent) };
    let error = connect(&[Helper { size: least - 4096, ..helper(&one) }], &terms).err();
    assert!(matches!(error, Some(ConnectError::TooSmall { .. })));
    let mut guest = Guest::of(&[half(&one), half(&two)], &terms);
    // Of all RAM but the last 12 MiB, most of it in pieces of one helper.
    let pages = least / PAGE as u64;
    for first in (0..pages).step_by(16) {
        guest.send(first, 16);
        guest.until("it keeps up", |guest| guest.waiting < 256);
    }
    guest.until("it is stored", |guest| guest.waiting == 0);
    assert_eq!(guest.pages_at(0) + guest.pages_at(1), pages, "every page finds the room that there is");
    assert!(guest.stores.short() > 0, "and no more");
    guest.send(pages, 16);
    guest.until("it asks for room", |guest| guest.stores.short() >= 16);
    // Some of which the handler has again.
    guest.stores.forget(Page(40), 1000);
    guest.held.retain(|page, _| !(40..1040).contains(page));
    guest.until("it has found some", |guest| guest.waiting == 0);
    guest.until("it has enough", |guest| guest.stores.short() == 0);
    guest.check_all();
}

#[test]
fn the_local_file_has_what_a_lost_helper_had() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut agent = agent();
    let terms = Terms { swap_file: Some(folder.path().join("swap")), ..terms(OnLoss::LocalDisk) };
    let mut guest = Guest::new(&[&agent], &terms);
    fill(&mut guest);
    agent.end(Signal::SIGKILL);
    guest.check_all();
    guest.store(6, 30);
    guest.check_all();
    agent.run();
    guest.until("the helper has everything again", |guest| guest.pages_at(0) == 160);
    guest.check_all();
}

#[test]
fn every_handler_has_its_own_lease_and_all_are_given_back() {
    let agent = agent();
    let shards = Shards::new(Pieces::new(Bytes(RAM)), 3);
    let terms = Terms { shards, ..terms(OnLoss::None) };
    let mut all = connect(&[helper(&agent)], &terms).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(all.stores.len(), 3);
    let mut ring = Ring::new(64).expect("io_uring works here");
    all.stores[0].attach(&mut ring).expect("it attaches");
    all.stores[0].tick(&mut ring, Instant::now(), &mut Vec::new());
    all.stores[0].close(&mut ring);
    drop(all);
    // All of what the agent lends is free again, or will be soon.
    let whole = Helper { size: 256 << 20, ..helper(&agent) };
    let shards = Shards::new(Pieces::new(Bytes(256 << 20)), 1);
    connect(&[whole], &Terms { shards, ..terms }).map(drop).unwrap_or_else(|e| panic!("{e}"));
}

#[test]
fn what_cannot_work_is_said_in_one_line_before_the_guest_starts() {
    let agent = agent();
    let line = |helper: Helper, terms: &Terms| {
        let error = connect(&[helper], terms).err().expect("it cannot work");
        let line = error.to_string();
        assert!(!line.contains('\n') && line.len() < 300, "{line}");
        (error, line)
    };
    let shards = Shards::new(Pieces::new(Bytes(512 << 20)), 2);
    let large = Terms { shards, ..terms(OnLoss::None) };
    let (error, said) = line(Helper { size: 512 << 20, ..helper(&agent) }, &large);
    assert!(matches!(error, ConnectError::Refused { .. }) && said.contains("512 MiB"), "{said}");
    let (error, said) = line(Helper { size: RAM - 1, ..helper(&agent) }, &terms(OnLoss::None));
    assert!(matches!(error, ConnectError::TooSmall { .. }) && said.contains("63 MiB"), "{said}");
    let impatient = Terms { timeout: Duration::from_millis(300), ..terms(OnLoss::None) };
    let (error, said) = line(Helper { agent: "127.0.0.1:1".to_owned(), ..helper(&agent) }, &impatient);
    assert!(matches!(error, ConnectError::Unreachable { .. }) && said.contains("127.0.0.1:1"), "{said}");
    let (error, _) = line(helper(&agent), &terms(OnLoss::LocalDisk));
    assert!(matches!(error, ConnectError::NoFile));
}
