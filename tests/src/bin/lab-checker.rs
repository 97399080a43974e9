//! Verified I/O on a disk, for guests: writes blocks that say what they are, remembers every write that was
//! acknowledged, and reads back that none is lost, none old and none torn.
//!
//! ```text
//! lab-checker run DEVICE MIB      until a line comes on standard input; then reads everything once more
//! lab-checker digest DEVICE MIB   prints the digest of what `run` left there
//! lab-checker check DEVICE MIB    looks whether each block is one whole write of `run`, or was never written to
//! ```
//! It bypasses the guest's page cache, so every request reaches the disk; four threads keep four in flight.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

const BLOCK: usize = 4096;
const THREADS: u64 = 4;
/// The most blocks of one request.
const SPAN: u64 = 16;

#[derive(Default)]
struct Counters {
    writes: AtomicU64,
    reads: AtomicU64,
    flushes: AtomicU64,
    lost: AtomicU64,
    errors: AtomicU64,
    longest_us: AtomicU64,
    stop: AtomicBool,
}

/// Bytes at an address that direct I/O accepts.
struct Aligned {
    bytes: Vec<u8>,
    start: usize,
}

impl Aligned {
    fn new(length: usize) -> Self {
        let bytes = vec![0; length + BLOCK];
        let start = bytes.as_ptr().align_offset(BLOCK);
        Self { bytes, start }
    }

    fn slice(&mut self, length: usize) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + length]
    }
}

/// A small generator of numbers that only have to be scattered.
struct Scatter(u64);

impl Scatter {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

/// Fills a block: every 8 bytes depend on its number, its generation and where in it they are.
fn fill(block: &mut [u8], number: u64, generation: u64) {
    let mut words = Scatter(number << 32 ^ generation);
    let (head, body) = block.split_at_mut(16);
    head[..8].copy_from_slice(&number.to_le_bytes());
    head[8..].copy_from_slice(&generation.to_le_bytes());
    for word in body.chunks_exact_mut(8) {
        word.copy_from_slice(&words.next().to_le_bytes());
    }
}

/// One thread's share of the disk, and what it knows to be there.
struct Share<'a> {
    disk: &'a File,
    first: u64,
    /// The generation that was acknowledged, for each block.
    generations: Vec<u64>,
    scatter: Scatter,
    buffer: Aligned,
    counters: &'a Counters,
}

impl Share<'_> {
    fn timed<T>(&mut self, what: &str, at: u64, act: impl FnOnce(&mut Self) -> io::Result<T>) -> Option<T> {
        let start = Instant::now();
        let result = act(self);
        let took = u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.counters.longest_us.fetch_max(took, Ordering::Relaxed);
        match result {
            Ok(value) => Some(value),
            Err(error) => {
                if self.counters.errors.fetch_add(1, Ordering::Relaxed) < 10 {
                    println!("lab-checker: error: {what} at block {at}: {error}");
                }
                None
            }
        }
    }

    fn write(&mut self, at: u64, count: u64) {
        let length = count as usize * BLOCK;
        for (i, block) in self.buffer.slice(length).chunks_exact_mut(BLOCK).enumerate() {
            let index = at + i as u64;
            fill(block, self.first + index, self.generations[index as usize] + 1);
        }
        let offset = (self.first + at) * BLOCK as u64;
        if self.timed("write", at, |me| me.disk.write_all_at(me.buffer.slice(length), offset)).is_some() {
            for generation in &mut self.generations[at as usize..(at + count) as usize] {
                *generation += 1;
            }
            self.counters.writes.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn verify(&mut self, at: u64, count: u64) {
        let length = count as usize * BLOCK;
        let offset = (self.first + at) * BLOCK as u64;
        if self.timed("read", at, |me| me.disk.read_exact_at(me.buffer.slice(length), offset)).is_none() {
            return;
        }
        self.counters.reads.fetch_add(1, Ordering::Relaxed);
        let mut right = vec![0; BLOCK];
        for i in 0..count {
            let index = at + i;
            let generation = self.generations[index as usize];
            fill(&mut right, self.first + index, generation);
            let start = i as usize * BLOCK;
            let block = &self.buffer.slice(length)[start..start + BLOCK];
            if block != right && self.counters.lost.fetch_add(1, Ordering::Relaxed) < 10 {
                let word =
                    |at: usize| block[at..at + 8].iter().rev().fold(0u64, |n, b| n << 8 | u64::from(*b));
                println!(
                    "lab-checker: lost: block {} should be generation {generation}, its head says block {} generation {}",
                    self.first + index,
                    word(0),
                    word(8),
                );
            }
        }
    }

    fn work(&mut self) {
        let blocks = self.generations.len() as u64;
        // Everything has a known content before the first question.
        for at in (0..blocks).step_by(SPAN as usize) {
            self.write(at, SPAN.min(blocks - at));
        }
        while !self.counters.stop.load(Ordering::Relaxed) {
            let count = 1 + self.scatter.below(SPAN);
            let at = self.scatter.below(blocks - count + 1);
            match self.scatter.below(100) {
                0..4 => {
                    if self.timed("flush", at, |me| me.disk.sync_data()).is_some() {
                        self.counters.flushes.fetch_add(1, Ordering::Relaxed);
                    }
                }
                4..60 => self.write(at, count),
                _ => self.verify(at, count),
            }
        }
    }

    fn verify_all(&mut self) {
        let blocks = self.generations.len() as u64;
        for at in (0..blocks).step_by(SPAN as usize) {
            self.verify(at, SPAN.min(blocks - at));
        }
    }
}

fn report(counters: &Counters, word: &str, more: &str) {
    let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    println!(
        "lab-checker: {word} writes={} reads={} flushes={} lost={} errors={} longest_ms={}{more}",
        get(&counters.writes),
        get(&counters.reads),
        get(&counters.flushes),
        get(&counters.lost),
        get(&counters.errors),
        get(&counters.longest_us) / 1000,
    );
    let _ = io::stdout().flush();
}

/// FNV-1a over the first `mib` MiB.
fn digest(disk: &File, mib: u64) -> io::Result<u64> {
    let mut buffer = Aligned::new(1 << 20);
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for at in 0..mib {
        let piece = buffer.slice(1 << 20);
        disk.read_exact_at(piece, at << 20)?;
        for word in piece.chunks_exact(8) {
            let word = word.iter().rev().fold(0u64, |n, b| n << 8 | u64::from(*b));
            hash = (hash ^ word).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
    Ok(hash)
}

/// Whether every block is whole, whenever `run` was cut short.
fn check(disk: &File, mib: u64) -> io::Result<bool> {
    let (mut buffer, mut right) = (Aligned::new(BLOCK), vec![0; BLOCK]);
    let (mut whole, mut blank, mut torn) = (0_u64, 0_u64, 0_u64);
    for number in 0..(mib << 20) / BLOCK as u64 {
        let block = buffer.slice(BLOCK);
        disk.read_exact_at(block, number * BLOCK as u64)?;
        let generation = block[8..16].iter().rev().fold(0, |n, byte| n << 8 | u64::from(*byte));
        fill(&mut right, number, generation);
        match () {
            () if block.iter().all(|byte| *byte == 0) => blank += 1,
            () if block == right => whole += 1,
            () => torn += 1,
        }
    }
    println!("lab-checker: checked whole={whole} blank={blank} torn={torn}");
    Ok(torn == 0)
}

fn run(disk: &File, mib: u64) -> io::Result<bool> {
    let counters = Arc::new(Counters::default());
    let each = (mib << 20) / BLOCK as u64 / THREADS;
    let mut shares: Vec<Share<'_>> = (0..THREADS)
        .map(|thread| Share {
            disk,
            first: thread * each,
            generations: vec![0; each as usize],
            scatter: Scatter(thread),
            buffer: Aligned::new(SPAN as usize * BLOCK),
            counters: &counters,
        })
        .collect();
    let listener = Arc::clone(&counters);
    thread::spawn(move || {
        let _ = io::stdin().read_line(&mut String::new());
        listener.stop.store(true, Ordering::Relaxed);
    });
    thread::scope(|scope| {
        let workers: Vec<_> = shares.iter_mut().map(|share| scope.spawn(|| share.work())).collect();
        while !workers.iter().all(thread::ScopedJoinHandle::is_finished) {
            report(&counters, "progress", "");
            thread::sleep(Duration::from_secs(1));
        }
    });
    disk.sync_data()?;
    report(&counters, "verifying", "");
    thread::scope(|scope| {
        for share in &mut shares {
            scope.spawn(|| share.verify_all());
        }
    });
    let digest = digest(disk, mib)?;
    report(&counters, "done", &format!(" digest={digest:016x}"));
    Ok(counters.lost.load(Ordering::Relaxed) == 0 && counters.errors.load(Ordering::Relaxed) == 0)
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, act, path, mib] = arguments.as_slice() else {
        eprintln!("lab-checker: usage: lab-checker run|digest|check DEVICE MIB");
        return ExitCode::from(2);
    };
    let Ok(mib) = mib.parse::<u64>() else {
        eprintln!("lab-checker: `{mib}` is not a number of MiB");
        return ExitCode::from(2);
    };
    let disk = OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(path);
    let result = disk.and_then(|disk| match act.as_str() {
        "run" => run(&disk, mib),
        "check" => check(&disk, mib),
        _ => digest(&disk, mib).map(|digest| {
            println!("lab-checker: digest={digest:016x}");
            true
        }),
    });
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            println!("lab-checker: error: {path}: {error}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_that_is_half_a_write_is_reported_as_torn() {
        let file = tempfile::tempfile().expect("a file");
        file.set_len(1 << 20).expect("sized");
        let mut block = vec![0; BLOCK];
        fill(&mut block, 7, 3);
        file.write_all_at(&block, 7 * BLOCK as u64).expect("written");
        assert!(check(&file, 1).expect("it reads"));
        fill(&mut block, 7, 4);
        file.write_all_at(&block[..BLOCK / 2], 7 * BLOCK as u64).expect("written");
        assert!(!check(&file, 1).expect("it reads"), "half of another");
        fill(&mut block, 8, 1);
        file.write_all_at(&block, 7 * BLOCK as u64).expect("written");
        assert!(!check(&file, 1).expect("it reads"), "in another's place");
    }

    #[test]
    fn a_block_that_went_back_to_an_older_write_is_reported_as_lost() {
        let file = tempfile::tempfile().expect("a file");
        file.set_len(32 * BLOCK as u64).expect("sized");
        let counters = Counters::default();
        let mut share = Share {
            disk: &file,
            first: 0,
            generations: vec![0; 32],
            scatter: Scatter(1),
            buffer: Aligned::new(SPAN as usize * BLOCK),
            counters: &counters,
        };
        share.write(0, 16);
        share.write(16, 16);
        let mut old = vec![0; BLOCK];
        file.read_exact_at(&mut old, 5 * BLOCK as u64).expect("read");
        share.write(4, 4);
        share.verify_all();
        assert_eq!(counters.lost.load(Ordering::Relaxed), 0);
        file.write_all_at(&old, 5 * BLOCK as u64).expect("written");
        share.verify_all();
        assert_eq!(counters.lost.load(Ordering::Relaxed), 1);
    }
}
