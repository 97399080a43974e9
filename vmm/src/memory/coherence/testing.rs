//! Members in one process, each with RAM and a userfaultfd of its own, and lines between them in memory.
#![allow(unsafe_code)] // RAM is touched as a guest touches it, by address.

use std::collections::VecDeque;
use std::os::fd::AsRawFd as _;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use transport::buffer::Buffer;
use transport::ring::{Completion, Ring, Source};
use vm_memory::{GuestAddress, GuestMemoryBackend as _};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::engine::{Ear, Engine, Error, Lines, Options};
use super::message::{Member, Members};
use super::{Board, Counters, Homes, Rider};
use crate::memory::frames::{PAGE, Pieces};
use crate::memory::{Backing, Layout, Ram};
use crate::units::Bytes;

/// In which order messages arrive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// As they were sent.
    Sent,
    /// Any, by this seed.
    Any(u64),
    /// As they were sent, heard on the ring of the member's shard.
    Riding,
}

pub(crate) fn member(number: u8) -> Member {
    Member::new(number).expect("a small number")
}

/// Numbers that look random.
pub(crate) fn dice(seed: &mut u64) -> u64 {
    *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    *seed >> 33
}

type Message = (Member, Vec<u8>, Option<Buffer>);

/// What waits to be heard by a member; `None`: nobody hears any more.
struct Queue {
    waiting: Mutex<Option<VecDeque<Message>>>,
    came: Condvar,
    bell: EventFd,
    /// How many messages this member has sent.
    sent: AtomicUsize,
}

/// What a member sends by.
struct Post {
    me: Member,
    queues: Arc<Vec<Queue>>,
}

impl Lines for Post {
    fn send(&self, to: Member, body: &[u8], content: Option<Buffer>) {
        self.queues[usize::from(self.me.number())].sent.fetch_add(1, Ordering::SeqCst);
        let queue = &self.queues[usize::from(to.number())];
        if let Some(waiting) = queue.waiting.lock().expect("no panic").as_mut() {
            waiting.push_back((self.me, body.to_vec(), content));
            queue.came.notify_one();
            let _ = queue.bell.write(1);
        }
    }
}

fn hear(queue: &Queue, ear: &Ear, order: Order) {
    let mut seed = if let Order::Any(seed) = order { seed } else { 0 };
    loop {
        let mut waiting = queue.waiting.lock().expect("no panic");
        let (from, body, content) = loop {
            let Some(messages) = waiting.as_mut() else { return };
            let next = match order {
                Order::Sent | Order::Riding => messages.pop_front(),
                Order::Any(_) => messages.swap_remove_back(dice(&mut seed) as usize % messages.len().max(1)),
            };
            match next {
                Some(message) => break message,
                None => waiting = queue.came.wait(waiting).expect("no panic"),
            }
        };
        drop(waiting);
        ear.hear(from, &body, content);
    }
}

/// Hears on a shard's ring.
struct Riding {
    queues: Arc<Vec<Queue>>,
    me: usize,
    ear: Ear,
    own: Source,
}

impl Riding {
    fn board(queues: Arc<Vec<Queue>>, me: usize) -> Board {
        Box::new(move |ring, ear| {
            let own = ring.source();
            ring.poll_readable(queues[me].bell.as_raw_fd(), true, own.token(0));
            Ok(Box::new(Self { queues, me, ear, own }))
        })
    }
}

impl Rider for Riding {
    fn complete(&mut self, _: &mut Ring, completion: Completion) -> bool {
        if completion.token.source() != self.own {
            return false;
        }
        let queue = &self.queues[self.me];
        let _ = queue.bell.read();
        let next = || queue.waiting.lock().expect("no panic").as_mut().and_then(VecDeque::pop_front);
        while let Some((from, body, content)) = next() {
            self.ear.hear(from, &body, content);
        }
        true
    }

    fn tick(&mut self, _: &mut Ring, _: Instant) -> Option<Instant> {
        None
    }

    fn close(&mut self, ring: &mut Ring) {
        ring.cancel(self.own.token(0));
    }
}

/// Members that share RAM. Dropped when nobody touches it any more.
pub(crate) struct Scene {
    pub(crate) engines: Vec<Engine>,
    pub(crate) rams: Vec<Ram>,
    queues: Arc<Vec<Queue>>,
    threads: Vec<JoinHandle<()>>,
    /// Why members had to stop.
    pub(crate) stopped: Arc<Mutex<Vec<String>>>,
}

impl Scene {
    /// So many members of RAM of `size` bytes; `None` where the kernel does not let us.
    pub(crate) fn new(count: u8, size: u64, shards: u32, order: Order) -> Option<Self> {
        let members = (0..count).map(member).fold(Members::default(), Members::with);
        let all: Vec<Member> = members.iter().collect();
        let homes = Homes::spread(Pieces::new(Bytes(size)), &all).expect("there are members");
        let queue = || Queue {
            waiting: Mutex::new(Some(VecDeque::new())),
            came: Condvar::new(),
            bell: EventFd::new(EFD_NONBLOCK).expect("an eventfd"),
            sent: AtomicUsize::new(0),
        };
        let queues: Arc<Vec<Queue>> = Arc::new(all.iter().map(|_| queue()).collect());
        let mut scene = Self {
            engines: Vec::new(),
            rams: Vec::new(),
            queues: queues.clone(),
            threads: Vec::new(),
            stopped: Arc::default(),
        };
        for me in all {
            let layout = Layout::new(Bytes(size), 36).expect("it fits");
            let ram = Ram::new(&layout, Backing::Shared).expect("RAM");
            let options = Options { me, members, homes: homes.clone(), shards };
            let lines = Arc::new(Post { me, queues: queues.clone() });
            let stopped = scene.stopped.clone();
            let broken = Box::new(move |why: &str| stopped.lock().expect("no panic").push(why.into()));
            let number = usize::from(me.number());
            let boards =
                if order == Order::Riding { vec![Riding::board(queues.clone(), number)] } else { Vec::new() };
            match Engine::start(&ram, &options, lines, broken, boards) {
                Ok(engine) => scene.engines.push(engine),
                Err(Error::Userfault(why)) => {
                    eprintln!("cannot run: no userfaultfd for the kernel's faults: {why}");
                    return None;
                }
                Err(why) => panic!("{why}"),
            }
            scene.rams.push(ram);
        }
        for (number, engine) in scene.engines.iter().enumerate().filter(|_| order != Order::Riding) {
            let (ear, queues) = (engine.ear(), queues.clone());
            scene.threads.push(thread::spawn(move || hear(&queues[number], &ear, order)));
        }
        Some(scene)
    }

    /// As `member` sees RAM.
    pub(crate) fn words(&self, member: usize) -> Words {
        let base = self.rams[member].memory().get_host_address(GuestAddress(0)).expect("RAM");
        Words { base: base as usize, len: 16 << 20 }
    }

    /// How many messages `member` has sent.
    pub(crate) fn lines(&self, member: usize) -> usize {
        self.queues[member].sent.load(Ordering::SeqCst)
    }

    /// What `member` has counted.
    pub(crate) fn counters(&self, member: usize) -> Counters {
        self.engines[member].counters()
    }

    pub(crate) fn nobody_stopped(&self) {
        assert_eq!(*self.stopped.lock().expect("no panic"), [""; 0]);
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        for queue in self.queues.iter() {
            *queue.waiting.lock().expect("no panic") = None;
            queue.came.notify_all();
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// The first 16 MiB of RAM as one member sees it; touching it may wait for others.
#[derive(Clone, Copy)]
pub(crate) struct Words {
    base: usize,
    len: usize,
}

impl Words {
    fn at(&self, offset: usize, len: usize) -> usize {
        assert!(offset + len <= self.len, "{offset:#x} is in RAM");
        self.base + offset
    }

    /// The word of eight bytes at `offset`.
    pub(crate) fn u64(&self, offset: usize) -> &AtomicU64 {
        assert!(offset.is_multiple_of(8));
        // SAFETY: it is aligned and in RAM, which is never unmapped and only touched by atomic operations.
        unsafe { AtomicU64::from_ptr(self.at(offset, 8) as *mut u64) }
    }

    /// The word of four bytes at `offset`.
    pub(crate) fn u32(&self, offset: usize) -> &AtomicU32 {
        assert!(offset.is_multiple_of(4));
        // SAFETY: it is aligned and in RAM, which is never unmapped and only touched by atomic operations.
        unsafe { AtomicU32::from_ptr(self.at(offset, 4) as *mut u32) }
    }

    /// Reads eight bytes anywhere, with one instruction.
    pub(crate) fn load_anywhere(&self, offset: usize) -> u64 {
        let address = self.at(offset, 8);
        let value: u64;
        // SAFETY: eight bytes of RAM are read.
        unsafe { std::arch::asm!("mov {}, [{}]", out(reg) value, in(reg) address, options(nostack)) };
        value
    }

    /// Writes eight bytes anywhere, with one instruction.
    pub(crate) fn store_anywhere(&self, offset: usize, value: u64) {
        let address = self.at(offset, 8);
        // SAFETY: eight bytes of RAM are written.
        unsafe { std::arch::asm!("mov [{}], {}", in(reg) address, in(reg) value, options(nostack)) };
    }

    /// The first word of `page`.
    pub(crate) fn page(&self, page: usize) -> &AtomicU64 {
        self.u64(page * PAGE)
    }

    /// Adds one to the first word of `page`.
    pub(crate) fn count(&self, page: usize) {
        self.page(page).fetch_add(1, Ordering::SeqCst);
    }
}
