//! Pages packed on their way: fewer bytes cross the link, and every one of them comes back as it was.

mod common;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::{Agent, LIMIT};
use transport::buffer::Buffer;
use transport::channel::Transport;
use transport::identity::Security;
use transport::ring::Ring;
use vmm::memory::fault::{PAGE, Page, Pieces, Shards};
use vmm::memory::store::{
    Compress, Compression, Connected, Done, Helper, OnLoss, Source, Stores, Terms, Urgency, connect,
};
use vmm::units::Bytes;

const MEMORY: &str = "lease_ttl = '60s'\n[memory]\nsize = '64M'\nlock = false\n";
/// One piece.
const RAM: u64 = 16 << 20;

/// A link between a guest and an agent, which counts what crosses it and, if `rate` says so, lets only so many bytes
/// per second cross it each way.
struct Wire {
    address: String,
    to_agent: Arc<AtomicU64>,
    to_guest: Arc<AtomicU64>,
}

impl Wire {
    fn new(agent: &Agent, rate: Option<u64>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address").to_string();
        let wire = Self { address, to_agent: Arc::default(), to_guest: Arc::default() };
        let (there, back) = (Arc::clone(&wire.to_agent), Arc::clone(&wire.to_guest));
        let agent = agent.address.clone();
        std::thread::spawn(move || {
            for guest in listener.incoming() {
                let (Ok(guest), Ok(agent)) = (guest, TcpStream::connect(&agent)) else { return };
                for (from, to, count) in [(&guest, &agent, &there), (&agent, &guest, &back)] {
                    let ends = from.try_clone().and_then(|from| Ok((from, to.try_clone()?)));
                    let (count, (from, to)) = (Arc::clone(count), ends.expect("descriptors"));
                    std::thread::spawn(move || carry(from, to, &count, rate));
                }
            }
        });
        wire
    }

    /// What crossed while `what` was done: to the agent, and to the guest.
    fn while_doing(&self, what: impl FnOnce()) -> (u64, u64) {
        let now = || (self.to_agent.load(Ordering::SeqCst), self.to_guest.load(Ordering::SeqCst));
        let before = now();
        what();
        let after = now();
        (after.0 - before.0, after.1 - before.1)
    }
}

fn carry(mut from: TcpStream, mut to: TcpStream, count: &AtomicU64, rate: Option<u64>) {
    let mut bytes = [0; 16 << 10];
    let mut free = Instant::now();
    while let Ok(len @ 1..) = from.read(&mut bytes) {
        if let Some(rate) = rate {
            free = free.max(Instant::now()) + Duration::from_secs_f64(len as f64 / rate as f64);
            std::thread::sleep(free.saturating_duration_since(Instant::now()));
        }
        count.fetch_add(len as u64, Ordering::SeqCst);
        if to.write_all(&bytes[..len]).is_err() {
            break;
        }
    }
    // The other side may be gone already.
    let _ = to.shutdown(std::net::Shutdown::Write);
}

/// A guest's memory on one agent, driven as a fault handler drives it.
struct Guest {
    ring: Ring,
    stores: Stores,
    all: Connected,
    waiting: u64,
    fetched: Vec<(u64, Vec<u8>)>,
}

impl Guest {
    fn new(wire: &Wire, compress: Compress) -> Self {
        let helper = Helper {
            agent: wire.address.clone(),
            node: None,
            security: Security::Plain,
            transport: Transport::Tcp,
            size: RAM,
        };
        let shards = Shards::new(Pieces::new(Bytes(RAM)), 1);
        let terms = Terms { compress, ..Terms::new("guest", "guest@test", shards, OnLoss::None) };
        let mut all = connect(&[helper], &terms).unwrap_or_else(|e| panic!("{e}"));
        let mut ring = Ring::new(64).expect("io_uring works here");
        let mut stores = all.stores.remove(0);
        stores.attach(&mut ring).expect("it attaches");
        Self { ring, stores, all, waiting: 0, fetched: Vec::new() }
    }

    /// Waits until everything is answered.
    fn settle(&mut self) {
        let end = Instant::now() + LIMIT;
        let mut done = Vec::new();
        while self.waiting > 0 {
            let now = Instant::now();
            assert!(now < end, "{} pages have no answer: {:?}", self.waiting, self.all.health.report());
            let next = self.stores.tick(&mut self.ring, now, &mut done);
            if done.is_empty() {
                let wait = next.map_or(Duration::from_millis(50), |next| next.saturating_duration_since(now));
                self.ring.wait(Some(wait.min(Duration::from_millis(50)))).expect("it waits");
                while let Some(completion) = self.ring.reap() {
                    assert!(self.stores.complete(&mut self.ring, completion, &mut done));
                }
            }
            for done in done.drain(..) {
                match done {
                    Done::Stored { count, .. } => self.waiting -= u64::from(count),
                    Done::Fetched { first, count, content } => {
                        self.waiting -= u64::from(count);
                        self.fetched.push((first.0, content.to_vec()));
                    }
                    Done::Lost { first, why, .. } => panic!("{first:?}: {why}"),
                }
            }
        }
    }

    /// Stores the pages of a piece in parts of 16, with content of this kind.
    fn store_all(&mut self, kind: Kind, pages: u64) {
        for first in (0..pages).step_by(16) {
            self.waiting += 16;
            self.stores.store(Page(first), Buffer::from_vec(content(kind, first, 16)));
        }
        self.settle();
    }

    fn fetch_all(&mut self, kind: Kind, pages: u64, at_once: u32, urgency: Urgency) {
        for first in (0..pages).step_by(at_once as usize) {
            self.waiting += u64::from(at_once);
            self.stores.fetch(Page(first), at_once, urgency);
        }
        self.settle();
        for (first, found) in self.fetched.drain(..) {
            let count = (found.len() / PAGE) as u64;
            assert!(found == content(kind, first, count), "pages from {first} on are wrong");
        }
    }

    fn compression(&self) -> Compression {
        self.all.health.report().helpers[0].compression
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.stores.close(&mut self.ring);
    }
}

#[derive(Clone, Copy)]
enum Kind {
    /// As most memory is.
    Soft,
    /// As pictures and what is encrypted are.
    Hard,
    /// Both, page by page.
    Mixed,
}

fn content(kind: Kind, first: u64, count: u64) -> Vec<u8> {
    (first..first + count).flat_map(|page| page_of(kind, page)).collect()
}

fn page_of(kind: Kind, page: u64) -> Vec<u8> {
    let hard = match kind {
        Kind::Soft => false,
        Kind::Hard => true,
        Kind::Mixed => page.is_multiple_of(2),
    };
    let mut x = page.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut word = |at: u64| {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        if hard || at.is_multiple_of(8) { x } else { 0x7f32_0000_0000 | at }
    };
    (0..PAGE as u64 / 8).flat_map(|at| word(at).to_le_bytes()).collect()
}

const PAGES: u64 = 1024;
const BYTES: u64 = PAGES * PAGE as u64;

#[test]
fn packed_pages_take_fewer_bytes_of_the_link_both_ways_and_come_back_as_they_were() {
    let agent = Agent::start(MEMORY);
    let wire = Wire::new(&agent, None);
    let mut guest = Guest::new(&wire, Compress::On);
    // The session is opened with the first answer.
    guest.store_all(Kind::Soft, 16);
    for (kind, most) in [(Kind::Soft, 6), (Kind::Mixed, 8)] {
        let (stored, _) = wire.while_doing(|| guest.store_all(kind, PAGES));
        let (_, ahead) = wire.while_doing(|| guest.fetch_all(kind, PAGES, 64, Urgency::Ahead));
        let (_, single) = wire.while_doing(|| guest.fetch_all(kind, PAGES, 1, Urgency::Fault));
        for (what, crossed) in [("stored", stored), ("ahead", ahead), ("single", single)] {
            assert!(crossed < BYTES / 10 * most, "{what}: {crossed} of {BYTES} bytes");
        }
    }
    guest.store_all(Kind::Hard, PAGES);
    guest.fetch_all(Kind::Hard, PAGES, 64, Urgency::Ahead);
    guest.fetch_all(Kind::Hard, PAGES, 1, Urgency::Fault);
    let counted = guest.compression();
    assert!(counted.connections == 1 && counted.packed_bytes < counted.raw_bytes / 5 * 4, "{counted:?}");
}

#[test]
fn without_compression_pages_cross_as_they_are() {
    let agent = Agent::start(MEMORY);
    let wire = Wire::new(&agent, None);
    let mut guest = Guest::new(&wire, Compress::Off);
    let (stored, _) = wire.while_doing(|| guest.store_all(Kind::Soft, PAGES));
    let (_, fetched) = wire.while_doing(|| guest.fetch_all(Kind::Soft, PAGES, 64, Urgency::Ahead));
    assert!(stored > BYTES && fetched > BYTES, "{stored} and {fetched} of {BYTES} bytes");
    assert_eq!(guest.compression().pages, 0);
}

#[test]
fn over_a_slow_link_packing_begins_by_itself() {
    let agent = Agent::start(MEMORY);
    // A page takes 4 ms as it is.
    let wire = Wire::new(&agent, Some(1 << 20));
    let mut guest = Guest::new(&wire, Compress::Auto);
    let until = Instant::now() + LIMIT;
    while guest.compression().pages < PAGES {
        guest.store_all(Kind::Soft, 256);
        guest.fetch_all(Kind::Soft, 256, 64, Urgency::Ahead);
        assert!(Instant::now() < until, "{:?}", guest.compression());
    }
    let counted = guest.compression();
    assert!(counted.packed_bytes < counted.raw_bytes / 10 * 6, "{counted:?}");
    assert!(counted.link > 0 && counted.per_mille < 600, "{counted:?}");
}
