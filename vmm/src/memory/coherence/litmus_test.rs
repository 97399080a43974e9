//! Litmus tests between members: what threads on different PCs may see of each other's writes, in the form of the litmus
//! tests of the x86 memory model (Owens, Sarkar and Sewell, "A Better x86 Memory Model: x86-TSO", 2009).
//!
//! Many instances of a test lie side by side in a few pages, as the tool `litmus7` does it, so that pages travel in the
//! middle of what is tested. `make litmus` runs more than a million.

use std::fmt::Write as _;
use std::sync::Mutex;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::{AtomicUsize, fence};
use std::thread;

use super::testing::{Order, Scene, Words, dice};
use crate::memory::frames::PAGE;

/// Instances between two barriers.
const BATCH: usize = 64;

/// Pages over which the instances of each place are spread.
const SPREAD: usize = 4;

/// How often each test is done: some hundreds at least, or as many as `make litmus` says.
fn iterations() -> usize {
    let more = std::env::var("OMEGA_LITMUS").ok().and_then(|count| count.parse().ok());
    more.unwrap_or(1500)
}

/// One instance of a test as one thread sees it: its places, and the number that stands for "written" this time. What is
/// less was written by an earlier one.
struct Instance {
    words: Words,
    places: [usize; 2],
    new: u64,
}

impl Instance {
    fn write(&self, place: usize) {
        self.words.u64(self.places[place]).store(self.new, Release);
    }

    /// Whether it was written by now.
    fn read(&self, place: usize) -> bool {
        self.words.u64(self.places[place]).load(Acquire) == self.new
    }
}

/// What the threads of an instance have read, two bits each.
type Outcome = [u8; 4];

struct Test {
    name: &'static str,
    threads: usize,
    /// What a thread does, and what it has read.
    run: fn(usize, &Instance) -> [bool; 2],
    forbidden: fn(Outcome) -> bool,
}

const X: usize = 0;
const Y: usize = 1;

const TESTS: [Test; 6] = [
    Test {
        name: "message passing",
        threads: 2,
        run: |thread, at| {
            if thread == 0 {
                at.write(X);
                at.write(Y);
                return [false; 2];
            }
            [at.read(Y), at.read(X)]
        },
        forbidden: |[_, read, ..]| read == 0b01,
    },
    Test {
        name: "store buffering",
        threads: 2,
        run: |thread, at| {
            at.write(thread);
            fence(SeqCst);
            [at.read(1 - thread), true]
        },
        forbidden: |[first, second, ..]| first & 1 == 0 && second & 1 == 0,
    },
    Test {
        name: "load buffering",
        threads: 2,
        run: |thread, at| {
            let read = at.read(1 - thread);
            at.write(thread);
            [read, true]
        },
        forbidden: |[first, second, ..]| first & 1 != 0 && second & 1 != 0,
    },
    Test {
        name: "write to read causality",
        threads: 3,
        run: |thread, at| match thread {
            0 => {
                at.write(X);
                [false; 2]
            }
            1 => {
                let read = at.read(X);
                at.write(Y);
                [read, true]
            }
            _ => [at.read(Y), at.read(X)],
        },
        forbidden: |[_, middle, last, _]| middle & 1 != 0 && last == 0b01,
    },
    Test {
        name: "independent reads of independent writes",
        threads: 4,
        run: |thread, at| match thread {
            0 | 1 => {
                at.write(thread);
                [false; 2]
            }
            2 => [at.read(X), at.read(Y)],
            _ => [at.read(Y), at.read(X)],
        },
        forbidden: |[_, _, first, second]| first == 0b01 && second == 0b01,
    },
    Test {
        name: "coherence of one location",
        threads: 4,
        run: |thread, at| {
            if thread == 0 {
                at.write(X);
                return [false; 2];
            }
            [at.read(X), at.read(X)]
        },
        forbidden: |outcome| outcome[1..].contains(&0b01),
    },
];

/// Where place `place` of instance `at` is: each place in pages of its own, or all of an instance in one page.
fn place(place: usize, at: usize, together: bool) -> usize {
    let page = if together { at % SPREAD } else { place * SPREAD + at % SPREAD };
    page * PAGE + at / SPREAD * 16 + place * 8
}

/// Has `threads` wait for each other. They are more than CPUs, so nobody watches for long.
struct Barrier {
    came: AtomicUsize,
    threads: usize,
}

impl Barrier {
    fn wait(&self) {
        let round = self.came.fetch_add(1, SeqCst) / self.threads + 1;
        while self.came.load(SeqCst) < round * self.threads {
            thread::yield_now();
        }
    }
}

/// Runs `test` between `members`, and returns how often which outcome came.
fn run(test: &Test, members: usize, order: Order) -> Option<Vec<(Outcome, usize)>> {
    let scene = Scene::new(members as u8, 16 << 20, 1, order)?;
    let batches = iterations().div_ceil(BATCH);
    let barrier = Barrier { came: AtomicUsize::new(0), threads: test.threads };
    let read: Vec<Mutex<Vec<u8>>> = (0..test.threads).map(|_| Mutex::default()).collect();
    thread::scope(|scope| {
        for (thread, read) in read.iter().enumerate() {
            let (words, barrier) = (scene.words(thread % members), &barrier);
            scope.spawn(move || {
                let mut seed = thread as u64;
                let mut all = Vec::with_capacity(batches * BATCH);
                for batch in 0..batches {
                    barrier.wait();
                    for at in 0..BATCH {
                        let places = [X, Y].map(|number| place(number, at, batch % 4 == 0));
                        let seen = (test.run)(thread, &Instance { words, places, new: batch as u64 + 1 });
                        all.push(u8::from(seen[0]) | u8::from(seen[1]) << 1);
                        (0..dice(&mut seed) % 64).for_each(|_| std::hint::spin_loop());
                    }
                }
                *read.lock().expect("no panic") = all;
            });
        }
    });
    scene.nobody_stopped();
    let read: Vec<Vec<u8>> = read.into_iter().map(|read| read.into_inner().expect("no panic")).collect();
    let mut counts: Vec<(Outcome, usize)> = Vec::new();
    for at in 0..batches * BATCH {
        let mut outcome = [0; 4];
        outcome.iter_mut().zip(&read).for_each(|(outcome, read)| *outcome = read[at]);
        match counts.iter_mut().find(|(other, _)| *other == outcome) {
            Some((_, count)) => *count += 1,
            None => counts.push((outcome, 1)),
        }
    }
    counts.sort_unstable();
    Some(counts)
}

fn told(outcome: Outcome, threads: usize) -> String {
    outcome[..threads].iter().fold(String::new(), |mut text, read| {
        let _ = write!(text, "{}{} ", read & 1, read >> 1);
        text
    })
}

#[test]
fn no_litmus_test_has_an_outcome_that_x86_forbids() {
    let mut all = 0;
    for (test, seed) in TESTS.iter().zip(1..) {
        for (members, order) in [(2, Order::Sent), (3, Order::Any(seed)), (test.threads, Order::Sent)] {
            let Some(counts) = run(test, members, order) else { return };
            let iterations: usize = counts.iter().map(|(_, count)| count).sum();
            let (forbidden, allowed): (Vec<_>, Vec<_>) =
                counts.iter().partition(|(outcome, _)| (test.forbidden)(*outcome));
            let outcomes: Vec<String> = allowed
                .iter()
                .map(|(outcome, count)| format!("{}x {count}", told(*outcome, test.threads)))
                .collect();
            println!(
                "{}, {members} members: {iterations} iterations, {} forbidden; {}",
                test.name,
                forbidden.len(),
                outcomes.join(", ")
            );
            assert!(forbidden.is_empty(), "{}: {forbidden:?}", test.name);
            assert!(allowed.len() > 1, "{}: nobody ever met anybody: {counts:?}", test.name);
            all += iterations;
        }
    }
    println!("litmus: {all} iterations, 0 forbidden outcomes");
}

/// Runs `work` on two threads of each of `members`, and then looks at RAM as each of them sees it.
fn between(
    members: usize,
    order: Order,
    work: impl Fn(usize, Words, usize) + Sync,
    look: impl Fn(Words, usize),
) {
    let Some(scene) = Scene::new(members as u8, 16 << 20, 1, order) else { return };
    let threads = 2 * members;
    let each = iterations().div_ceil(threads);
    thread::scope(|scope| {
        for thread in 0..threads {
            let (words, work) = (scene.words(thread % members), &work);
            scope.spawn(move || work(thread, words, each));
        }
    });
    (0..members).for_each(|member| look(scene.words(member), threads * each));
    scene.nobody_stopped();
    println!("{} iterations between {members} members", threads * each);
}

#[test]
fn no_atomic_increment_is_lost() {
    for (members, order) in [(2, Order::Sent), (3, Order::Any(11))] {
        let work = |_, words: Words, each| {
            for at in 0..each {
                words.count(at % 3);
                words.u32(3 * PAGE + at % 2 * 4).fetch_add(1, SeqCst);
            }
        };
        between(members, order, work, |words, all| {
            let counted: u64 = (0..3).map(|page| words.page(page).load(SeqCst)).sum();
            let beside: u32 = (0..2).map(|at| words.u32(3 * PAGE + at * 4).load(SeqCst)).sum();
            assert_eq!((counted, beside as usize), (all as u64, all));
        });
    }
}

#[test]
fn who_has_a_lock_is_alone_with_what_it_protects_even_where_that_straddles_pages() {
    const STRADDLING: usize = 3 * PAGE - 3;
    for (members, order) in [(2, Order::Sent), (3, Order::Any(12))] {
        let work = |_, words: Words, each| {
            for _ in 0..each {
                while words.page(0).compare_exchange(0, 1, Acquire, Relaxed).is_err() {
                    thread::yield_now();
                }
                // Not atomic: the lock has to do.
                let count = words.page(1).load(Relaxed);
                let beside = words.load_anywhere(STRADDLING);
                words.page(1).store(count + 1, Relaxed);
                words.store_anywhere(STRADDLING, beside.wrapping_add(0x0101_0101_0101_0101));
                words.page(0).store(0, Release);
            }
        };
        between(members, order, work, |words, all| {
            assert_eq!(words.page(1).load(SeqCst), all as u64);
            let sum = (all as u64).wrapping_mul(0x0101_0101_0101_0101);
            assert_eq!(words.load_anywhere(STRADDLING), sum);
        });
    }
}

#[test]
fn neighbours_in_a_page_do_not_disturb_each_other() {
    for (members, order) in [(2, Order::Sent), (3, Order::Any(13))] {
        let work = |thread: usize, words: Words, each| {
            let own = words.u64(thread * 8);
            for round in 0..each as u64 {
                assert_eq!(own.load(Relaxed), round, "thread {thread}");
                own.store(round + 1, Relaxed);
            }
        };
        between(members, order, work, |words, all| {
            let sum: u64 = (0..2 * members).map(|thread| words.u64(thread * 8).load(SeqCst)).sum();
            assert_eq!(sum, all as u64);
        });
    }
}

#[test]
fn a_message_that_straddles_pages_is_whole_when_its_flag_is_seen() {
    let Some(scene) = Scene::new(2, 16 << 20, 1, Order::Any(14)) else { return };
    let rounds = (iterations() / 8).max(500) as u64;
    let [writer, reader] = [0, 1].map(|member| scene.words(member));
    let places = [PAGE - 1, 2 * PAGE - 4, 3 * PAGE - 7];
    let value = |round: u64| round.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    thread::scope(|scope| {
        scope.spawn(move || {
            for round in 1..=rounds {
                places.iter().for_each(|place| writer.store_anywhere(*place, value(round)));
                writer.page(5).store(round, Release);
                while writer.page(6).load(Acquire) < round {
                    std::hint::spin_loop();
                }
            }
        });
        for round in 1..=rounds {
            while reader.page(5).load(Acquire) < round {
                std::hint::spin_loop();
            }
            places
                .iter()
                .for_each(|place| assert_eq!(reader.load_anywhere(*place), value(round), "at {place}"));
            reader.page(6).store(round, Release);
        }
    });
    scene.nobody_stopped();
    println!("{rounds} messages across the ends of pages");
}
