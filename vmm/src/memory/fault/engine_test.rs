//! Handlers on this kernel's userfaultfd, over a source in memory.
#![allow(unsafe_code)] // Buffers over guest memory.

use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Command, Output};
use std::thread;
use std::time::{Duration, Instant};

use transport::buffer::Buffer;
use transport::ring::{Completion, Ring};

use vm_memory::{Bytes as _, GuestAddress, GuestMemoryBackend as _};

use super::*;
use crate::memory::store::Done;
use crate::memory::store::Urgency;
use crate::memory::store::testing::{Handle, InMemory, Pace};
use crate::memory::{Backing, Layout, Ram};

/// RAM under handlers; dropped in this order.
struct Scene {
    engine: Engine,
    ram: Ram,
    sources: Vec<Handle>,
}

impl Scene {
    /// `None` where the kernel does not let us.
    fn new(size: u64, local_pages: u64, paces: &[Pace]) -> Option<Self> {
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

    fn at(page: u64) -> GuestAddress {
        GuestAddress(page * PAGE as u64)
    }

    fn write(&self, page: u64, value: u64) {
        self.ram.memory().write_obj(value, GuestAddress(page * PAGE as u64 + 8)).expect("RAM");
    }

    fn read(&self, page: u64) -> u64 {
        self.ram.memory().read_obj(GuestAddress(page * PAGE as u64 + 8)).expect("RAM")
    }

    /// Pages that take up memory.
    fn resident(&self) -> u64 {
        self.ram.file().expect("a file").metadata().expect("it is open").blocks() * 512 / PAGE as u64
    }

    /// Waits until `done`.
    fn until(&self, what: &str, done: impl Fn(&Self) -> bool) {
        let end = Instant::now() + Duration::from_secs(60);
        while !done(self) {
            assert!(Instant::now() < end, "{what}: {:?}", self.engine.counters());
            thread::sleep(Duration::from_millis(1));
        }
    }

    fn no_promise_was_broken(&self) {
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
    assert_eq!(counters.faults_that_waited_for_write, 0, "{counters:?}");
    assert_eq!(scene.read(9000), 0, "what was never written is zeros");
    scene.no_promise_was_broken();
}

/// A thread with pages of its own, in every shard, and its own idea of what is in them.
fn use_and_remember(scene: &Scene, thread: u64, mut seed: u64) {
    let mut truth = vec![0_u64; 1024];
    for step in 1..6000_u64 {
        let slot = dice(&mut seed) % 1024;
        let page = slot * 16 + thread * 7;
        let known = &mut truth[slot as usize];
        match dice(&mut seed) % 32 {
            0 => {
                scene.engine.discard(Scene::at(page), PAGE as u64).expect("it is open");
                *known = 0;
            }
            1 => (0..64.min(1024 - slot)).for_each(|next| {
                let page = page + next * 16;
                assert_eq!(scene.read(page), truth[(slot + next) as usize], "page {page}, step {step}");
            }),
            2..16 => {
                assert_eq!(scene.read(page), *known, "page {page}, step {step}");
                *known = step << 1 | thread;
                scene.write(page, *known);
            }
            _ => assert_eq!(scene.read(page), *known, "page {page}, step {step}"),
        }
    }
}

#[test]
fn no_page_is_stale_lost_or_zero_whatever_the_order_of_answers() {
    for seed in 0..12 {
        let paces = [Pace::Shuffled(seed), Pace::Shuffled(seed + 100)];
        let Some(scene) = Scene::new(64 << 20, 128, &paces) else { return };
        thread::scope(|scope| {
            for thread in 0..2 {
                let scene = &scene;
                scope.spawn(move || use_and_remember(scene, thread, seed * 2 + thread + 1));
            }
        });
        let counters = scene.engine.counters();
        assert!(counters.remote_faults > 1000 && counters.stored > 1000, "{counters:?}");
        assert!(scene.resident() <= 128, "{} pages", scene.resident());
        scene.no_promise_was_broken();
    }
}

#[test]
fn reading_in_order_costs_few_faults_and_no_wrong_page_however_answers_come() {
    for pace in [Pace::AtOnce, Pace::Shuffled(9)] {
        let Some(scene) = Scene::new(64 << 20, 2048, &[pace]) else { return };
        (0..12288).for_each(|page| scene.write(page, page + 1));
        let before = scene.engine.counters();
        thread::scope(|scope| {
            // One forwards, one backwards, which also writes.
            scope.spawn(|| (0..4096).for_each(|page| assert_eq!(scene.read(page), page + 1)));
            let rewrite = |page| {
                assert_eq!(scene.read(page), page + 1);
                scene.write(page, page + 2);
            };
            scope.spawn(move || (4096..8192).rev().for_each(rewrite));
        });
        let counters = scene.engine.counters();
        let waited = counters.remote_faults + counters.late_faults + counters.parked_faults
            - (before.remote_faults + before.late_faults + before.parked_faults);
        assert!(waited <= 8192 / 10, "{waited} faults for 8192 pages: {counters:?}");
        (4096..8192).for_each(|page| assert_eq!(scene.read(page), page + 2));
        assert!(scene.resident() <= 2048, "{} pages", scene.resident());
        scene.no_promise_was_broken();
    }
}

#[test]
fn discarded_pages_cost_nothing_here_nor_at_the_source_and_are_zeros() {
    let Some(scene) = Scene::new(64 << 20, 2048, &[Pace::AtOnce, Pace::AtOnce]) else { return };
    for page in 0..8192 {
        scene.write(page, page + 1);
    }
    let kept = |scene: &Scene| scene.sources.iter().map(|source| source.lock().pages.len()).sum::<usize>();
    assert!(kept(&scene) > 4000, "{} pages are kept elsewhere", kept(&scene));
    // All but the first page and a half and the last half.
    let start = GuestAddress(PAGE as u64 * 3 / 2);
    scene.engine.discard(start, (8191 - 1) * PAGE as u64).expect("it is open");
    assert!(scene.resident() <= 3, "{} pages", scene.resident());
    scene.until("pages whose store was in flight are forgotten too", |scene| kept(scene) <= 3);
    assert_eq!([0, 1, 8191].map(|page| scene.read(page)), [1, 2, 8192]);
    assert!((2..8191).all(|page| scene.read(page) == 0));
    scene.engine.clear().expect("it is open");
    assert_eq!(scene.resident(), 0);
    scene.until("nothing is kept", |scene| kept(scene) == 0);
    assert!((0..8192).all(|page| scene.read(page) == 0));
    scene.no_promise_was_broken();
}

#[test]
fn pages_of_zeros_are_given_up_without_the_network() {
    let Some(scene) = Scene::new(64 << 20, 256, &[Pace::AtOnce]) else { return };
    for page in 0..4096 {
        scene.write(page, 0);
    }
    (0..4096).for_each(|page| assert_eq!(scene.read(page), 0));
    let counters = scene.engine.counters();
    assert_eq!((counters.stored, counters.remote_faults), (0, 0), "{counters:?}");
    assert!(counters.blanked > 3000, "{counters:?}");
}

/// Writes so much that page 0 is elsewhere, and returns a page that is here.
fn send_page_0_away(scene: &Scene) -> u64 {
    (0..1024).for_each(|page| scene.write(page, page + 1));
    scene.until("nothing is in flight", |scene| scene.engine.counters().storing == 0);
    let elsewhere = scene.sources[0].lock().pages.contains_key(&0);
    assert!(elsewhere, "it was written first, so it is the first to go");
    1023
}

#[test]
fn a_source_that_does_not_answer_stalls_only_who_needs_it() {
    let Some(scene) = Scene::new(16 << 20, 256, &[Pace::AtOnce]) else { return };
    let here = send_page_0_away(&scene);
    scene.sources[0].pace(Pace::Held);
    thread::scope(|scope| {
        let reader = scope.spawn(|| scene.read(0));
        scene.until("it asks", |scene| scene.engine.counters().fetching == 1);
        assert_eq!(scene.read(here), here + 1);
        assert_eq!(scene.read(3000), 0);
        scene.write(3001, 7);
        scene.engine.discard(Scene::at(3001), PAGE as u64).expect("it is open");
        assert_eq!(scene.read(3001), 0);
        assert!(!reader.is_finished(), "page 0 has not come");
        scene.sources[0].pace(Pace::AtOnce);
        assert_eq!(reader.join().expect("it reads"), 1);
    });
}

#[test]
fn writers_wait_when_nothing_can_be_stored_and_go_on_when_it_can() {
    let Some(scene) = Scene::new(16 << 20, 64, &[Pace::Held]) else { return };
    thread::scope(|scope| {
        let writer = scope.spawn(|| (0..1024).for_each(|page| scene.write(page, page + 1)));
        scene.until("it waits", |scene| scene.engine.counters().faults_that_waited_for_write == 1);
        assert!(scene.resident() <= 64, "the bound holds: {}", scene.resident());
        scene.sources[0].pace(Pace::AtOnce);
        writer.join().expect("it writes");
    });
    (0..1024).for_each(|page| assert_eq!(scene.read(page), page + 1));
    scene.no_promise_was_broken();
}

#[test]
fn a_lost_page_is_never_zeros_unless_the_guest_gives_it_back() {
    let Some(scene) = Scene::new(16 << 20, 256, &[Pace::AtOnce]) else { return };
    let here = send_page_0_away(&scene);
    scene.sources[0].lock().lost = Some("the helper `attic` was restarted".into());
    thread::scope(|scope| {
        let reader = scope.spawn(|| scene.read(0));
        scene.until("it is said", |scene| scene.engine.lost().is_some());
        assert_eq!(scene.engine.lost().as_deref(), Some("the helper `attic` was restarted"));
        assert_eq!(scene.read(here), here + 1);
        assert!(!reader.is_finished(), "nobody reads what is lost");
        assert_eq!(scene.engine.counters().lost, 1);
        scene.engine.discard(Scene::at(0), PAGE as u64).expect("it is open");
        assert_eq!(reader.join().expect("it reads"), 0);
    });
}

#[test]
fn system_calls_that_read_and_write_guest_memory_wait_for_its_pages() {
    let Some(scene) = Scene::new(64 << 20, 128, &[Pace::Shuffled(1), Pace::Shuffled(2)]) else { return };
    let len = 8 << 20;
    thread::scope(|scope| {
        for part in 0..2_u64 {
            let scene = &scene;
            scope.spawn(move || {
                let pattern: Vec<u8> =
                    (0..len as u64 / 8).flat_map(|i| (i * 3 + part).to_le_bytes()).collect();
                let mut file = tempfile::tempfile().expect("a file");
                file.write_all(&pattern).expect("it is written");
                file.seek(SeekFrom::Start(0)).expect("it seeks");
                // Across both shards, and not page by page.
                let at = GuestAddress((12 << 20) + part * (24 << 20) + 100);
                scene.ram.memory().read_exact_volatile_from(at, &mut file, len).expect("read(2) fills it");
                let mut copy = tempfile::tempfile().expect("a file");
                scene.ram.memory().write_all_volatile_to(at, &mut copy, len).expect("write(2) takes it");
                copy.seek(SeekFrom::Start(0)).expect("it seeks");
                let mut bytes = Vec::new();
                copy.read_to_end(&mut bytes).expect("it is read");
                assert!(bytes == pattern, "what was written is what was read");
            });
        }
    });
    scene.no_promise_was_broken();
}

/// A buffer over guest memory.
fn guest_buffer(scene: &Scene, at: u64, len: usize) -> Buffer {
    let base = scene.ram.memory().get_host_address(GuestAddress(at)).expect("RAM");
    let iovec = libc::iovec { iov_base: base.cast(), iov_len: len };
    // SAFETY: the range is in the first region of guest RAM, which is never unmapped.
    unsafe { Buffer::from_iovecs(Arc::new(()), &[iovec]) }
}

/// Submits one operation and returns what came of it.
fn perform(ring: &mut Ring, entry: io_uring::squeue::Entry) -> i32 {
    let source = ring.source();
    // SAFETY: its descriptors and guest memory outlive the operation, which is waited for.
    unsafe { ring.push(entry, source.token(0)) };
    loop {
        ring.wait(None).expect("it waits");
        if let Some(Completion { result, .. }) = ring.reap() {
            return result;
        }
    }
}

#[test]
fn io_uring_reads_and_receives_into_guest_memory_that_is_elsewhere() {
    use io_uring::{opcode, types};
    use std::os::fd::AsRawFd as _;
    let Some(scene) = Scene::new(64 << 20, 128, &[Pace::Shuffled(3), Pace::Shuffled(4)]) else { return };
    let len = 2 << 20;
    thread::scope(|scope| {
        for part in 0..2_u64 {
            let scene = &scene;
            scope.spawn(move || {
                let pattern: Vec<u8> =
                    (0..len as u64 / 8).flat_map(|i| (i * 5 + part).to_le_bytes()).collect();
                let (to, from) = (part * (32 << 20) + 4096, part * (32 << 20) + (20 << 20));
                let (to, from) = (guest_buffer(scene, to, len), guest_buffer(scene, from, len));
                let mut ring = Ring::new(8).expect("io_uring works here");
                let mut file = tempfile::tempfile().expect("a file");
                file.write_all(&pattern).expect("it is written");
                let base = |buffer: &Buffer| buffer.iovecs()[0].iov_base.cast::<u8>();
                let fd = types::Fd(file.as_raw_fd());
                let read = opcode::Read::new(fd, base(&from), len as u32).build();
                assert_eq!(perform(&mut ring, read), len as i32);
                // From guest memory to guest memory over a socket.
                let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
                let sender = TcpStream::connect(listener.local_addr().expect("bound")).expect("it connects");
                let (receiver, _) = listener.accept().expect("it connects");
                let mut rings = (ring, Ring::new(8).expect("io_uring works here"));
                let mut done = (0, 0);
                while done.1 < len {
                    if done.0 < len {
                        let (at, left) = (base(&from).wrapping_add(done.0), (len - done.0) as u32);
                        let send =
                            opcode::Send::new(types::Fd(sender.as_raw_fd()), at, left.min(64 << 10)).build();
                        done.0 += usize::try_from(perform(&mut rings.0, send)).expect("it sends");
                    }
                    let (at, left) = (base(&to).wrapping_add(done.1), (len - done.1) as u32);
                    let receive = opcode::Recv::new(types::Fd(receiver.as_raw_fd()), at, left).build();
                    done.1 += usize::try_from(perform(&mut rings.1, receive)).expect("it receives");
                }
                assert!(to.to_vec() == pattern && from.to_vec() == pattern, "not a byte is wrong");
            });
        }
    });
    scene.no_promise_was_broken();
}

#[test]
fn ram_that_is_private_or_was_touched_is_refused() {
    let layout = Layout::new(Bytes(16 << 20), 40).expect("it fits");
    let start = |ram: &Ram, local| {
        let (source, _) = InMemory::new(Pace::AtOnce);
        Engine::start(ram, vec![Box::new(source)], Options { local: Bytes(local) }).err()
    };
    let private = Ram::new(&layout, Backing::Private).expect("RAM");
    assert!(matches!(start(&private, 1 << 20), Some(Error::Unfit)));
    let shared = Ram::new(&layout, Backing::Shared).expect("RAM");
    assert!(matches!(start(&shared, 4096), Some(Error::TooLittle { .. })));
    shared.memory().write_obj(1_u8, GuestAddress(0)).expect("RAM");
    assert!(matches!(start(&shared, 1 << 20), Some(Error::Unfit)));
}

const CASE: &str = "OMEGA_MEMORY_TEST_CASE";

/// A source that fails after so many fetches.
struct Failing(InMemory, u32);

impl Source for Failing {
    fn attach(&mut self, ring: &mut Ring) -> io::Result<()> {
        self.0.attach(ring)
    }
    fn fetch(&mut self, first: Page, count: u32, urgency: Urgency) {
        assert!(self.1 > 0, "the source has a mistake");
        self.1 -= 1;
        self.0.fetch(first, count, urgency);
    }
    fn store(&mut self, first: Page, content: Buffer) {
        self.0.store(first, content);
    }
    fn forget(&mut self, first: Page, count: u32) {
        self.0.forget(first, count);
    }
    fn complete(&mut self, ring: &mut Ring, completion: Completion, done: &mut Vec<Done>) -> bool {
        self.0.complete(ring, completion, done)
    }
    fn tick(&mut self, ring: &mut Ring, now: Instant, done: &mut Vec<Done>) -> Option<Instant> {
        self.0.tick(ring, now, done)
    }
    fn close(&mut self, ring: &mut Ring) {
        self.0.close(ring);
    }
}

/// What the process started again does, with handlers that are confined: `panic`, or anything else to use memory.
#[test]
fn handles_memory_for_another_test() {
    let Ok(case) = std::env::var(CASE) else { return };
    crate::seccomp::install(crate::seccomp::Mode::Kill).expect("it installs");
    let layout = Layout::new(Bytes(64 << 20), 40).expect("it fits");
    let ram = Ram::new(&layout, Backing::Shared).expect("RAM");
    let (source, _) = InMemory::new(Pace::AtOnce);
    let source = Failing(source, if case == "panic" { 3 } else { u32::MAX });
    let options = Options { local: Bytes(1 << 20) };
    let engine = match Engine::start(&ram, vec![Box::new(source)], options) {
        Ok(engine) => engine,
        Err(why) => {
            eprintln!("cannot run: {why}");
            std::process::exit(0);
        }
    };
    for round in 0..3_u64 {
        for page in 0..2048 {
            let at = Scene::at(page);
            assert_eq!(ram.memory().read_obj::<u64>(at).expect("RAM"), round * page);
            ram.memory().write_obj((round + 1) * page, at).expect("RAM");
        }
    }
    engine.clear().expect("it is open");
    engine.close();
    println!("the end");
    std::process::exit(0);
}

fn run_again(case: &str) -> Output {
    Command::new(std::env::current_exe().expect("this program"))
        .args(["--exact", "memory::fault::engine::tests::handles_memory_for_another_test", "--nocapture"])
        .env(CASE, case)
        .env_remove("RUST_BACKTRACE")
        .output()
        .expect("it starts")
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

#[test]
fn confined_handlers_do_all_their_work() {
    let output = run_again("work");
    if said(&output).contains("cannot run") {
        eprintln!("cannot run: {}", said(&output));
        return;
    }
    assert!(output.status.success() && said(&output).contains("the end"), "{output:?}");
}

#[test]
fn a_handler_that_panics_ends_the_process_and_says_so() {
    let output = run_again("panic");
    if said(&output).contains("cannot run") {
        eprintln!("cannot run: {}", said(&output));
        return;
    }
    assert_eq!(output.status.signal(), Some(libc::SIGABRT), "{output:?}");
    assert!(said(&output).contains("The handler of the guest's memory failed"), "{output:?}");
}
