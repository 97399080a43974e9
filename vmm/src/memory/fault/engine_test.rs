//! Handlers on this kernel's userfaultfd, over a source in memory.

use std::os::unix::fs::MetadataExt as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use vm_memory::{Bytes as _, GuestAddress};

use super::*;
use crate::memory::store::testing::{Handle, InMemory, Pace};
use crate::memory::{Backing, Layout, Ram};

/// RAM under handlers; dropped in this order.
pub(super) struct Scene {
    pub(super) engine: Engine,
    pub(super) ram: Ram,
    pub(super) sources: Vec<Handle>,
}

impl Scene {
    /// `None` where the kernel does not let us.
    pub(super) fn new(size: u64, local_pages: u64, paces: &[Pace]) -> Option<Self> {
        let layout = Layout::new(Bytes(size), 40).expect("it fits");
        let ram = Ram::new(&layout, Backing::Shared).expect("RAM");
        let (sources, handles): (Vec<Box<dyn Source>>, Vec<_>) = paces
            .iter()
            .map(|pace| {
                let (source, handle) = InMemory::new(*pace);
                (Box::new(source) as _, handle)
            })
            .unzip();
        let options = Options { local: Bytes(local_pages * PAGE as u64) };
        match Engine::start(&ram, sources, options) {
            Ok(engine) => Some(Self { engine, ram, sources: handles }),
            Err(Error::Userfault(why)) => {
                eprintln!("cannot run: no userfaultfd for the kernel's faults: {why}");
                None
            }
            Err(why) => panic!("{why}"),
        }
    }

    pub(super) fn write(&self, page: u64, value: u64) {
        self.ram.memory().write_obj(value, GuestAddress(page * PAGE as u64 + 8)).expect("RAM");
    }

    pub(super) fn read(&self, page: u64) -> u64 {
        self.ram.memory().read_obj(GuestAddress(page * PAGE as u64 + 8)).expect("RAM")
    }

    /// Pages that take up memory.
    pub(super) fn resident(&self) -> u64 {
        self.ram.file().expect("a file").metadata().expect("it is open").blocks() * 512 / PAGE as u64
    }

    /// Waits until `done`.
    pub(super) fn until(&self, what: &str, done: impl Fn(&Self) -> bool) {
        let end = std::time::Instant::now() + Duration::from_secs(60);
        while !done(self) {
            assert!(std::time::Instant::now() < end, "{what}: {:?}", self.engine.counters());
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    pub(super) fn no_promise_was_broken(&self) {
        for source in &self.sources {
            assert_eq!(source.lock().broken, [""; 0]);
        }
    }
}

fn dice(seed: &mut u64) -> u64 {
    *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    *seed >> 33
}

#[test]
fn what_was_written_is_read_though_most_of_it_does_not_fit() {
    let Some(scene) = Scene::new(64 << 20, 256, &[Pace::AtOnce]) else { return };
    for page in 0..4096 {
        scene.write(page, page + 1);
    }
    assert!(scene.resident() <= 256, "{} pages", scene.resident());
    for page in (0..4096).rev() {
        assert_eq!(scene.read(page), page + 1);
    }
    let counters = scene.engine.counters();
    assert!(counters.resident <= 256 && counters.remote >= 4096 - 256, "{counters:?}");
    assert_eq!(scene.read(9000), 0, "what was never written is zeros");
    scene.no_promise_was_broken();
}

#[test]
fn no_page_is_stale_lost_or_zero_whatever_the_order_of_answers() {
    for seed in 0..12 {
        let paces = [Pace::Shuffled(seed), Pace::Shuffled(seed + 100)];
        let Some(scene) = Scene::new(64 << 20, 128, &paces) else { return };
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            // Each thread has pages of its own, in both shards, and its own idea of what is in them.
            let threads: Vec<_> = (0..2u64)
                .map(|thread| {
                    let (scene, stop) = (&scene, &stop);
                    scope.spawn(move || {
                        let mut seed = seed * 2 + thread + 1;
                        let mut truth = vec![0_u64; 1024];
                        for step in 1..6000_u64 {
                            let slot = dice(&mut seed) % 1024;
                            let page = slot * 16 + thread * 7;
                            match dice(&mut seed) % 16 {
                                0 => {
                                    let address = GuestAddress(page * PAGE as u64);
                                    scene.engine.discard(address, PAGE as u64).expect("it is open");
                                    truth[slot as usize] = 0;
                                }
                                1..8 => {
                                    assert_eq!(
                                        scene.read(page),
                                        truth[slot as usize],
                                        "page {page}, step {step}"
                                    );
                                    scene.write(page, step << 1 | thread);
                                    truth[slot as usize] = step << 1 | thread;
                                }
                                _ => assert_eq!(
                                    scene.read(page),
                                    truth[slot as usize],
                                    "page {page}, step {step}"
                                ),
                            }
                        }
                        stop.store(true, Ordering::Relaxed);
                    })
                })
                .collect();
            threads.into_iter().for_each(|thread| thread.join().expect("no wrong page"));
        });
        let counters = scene.engine.counters();
        assert!(counters.remote_faults > 1000 && counters.stored > 1000, "{counters:?}");
        assert!(scene.resident() <= 128, "{} pages", scene.resident());
        scene.no_promise_was_broken();
    }
}
