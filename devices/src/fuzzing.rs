//! Entry points for fuzzers: what guests write into rings and registers, and what agents answer.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

use crate::GuestMemory;
use crate::disk::Geometry;
use crate::disk::memory::MemoryDisk;
use crate::virtio::blk::{Blk, Options, fuzz_parse};
use crate::virtio::testing::{Harness, status};
use crate::virtio::{Chain, QueueLayout, Virtqueue};

pub use crate::disk::volume::fuzz as fuzz_volume;
pub use crate::interrupt::fuzz::fuzz_interrupts;

/// Entries of the fuzzed rings.
const SIZE: u16 = 16;
/// How many bytes of an input are descriptors and available ring; the rest is what they may point at.
const RINGS: usize = 0x200;
const RAM: usize = 0x1_0000;
const BODY: u64 = 0x1000;

/// A queue in a small memory that is all the input's: whatever it says, taking chains ends, and no chain
/// is larger than the queue.
pub fn fuzz_chain(data: &[u8]) {
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), RAM)]).expect("memory is left");
    let memory = Arc::new(memory);
    let (rings, body) = data.split_at(data.len().min(RINGS));
    memory.write_slice(rings, GuestAddress(0)).expect("the rings fit");
    let body = &body[..body.len().min(RAM - BODY as usize)];
    memory.write_slice(body, GuestAddress(BODY)).expect("the body fits");
    let layout = QueueLayout { size: SIZE, available: 0x100, used: 0x800, ..QueueLayout::default() };
    let mut queue = Virtqueue::new(&layout, true, memory.clone()).expect("the rings lie in RAM");
    let geometry =
        Geometry { size: 1 << 20, block_size: 512, read_only: false, discard: true, write_zeroes: true };
    let mut chain = Chain::default();
    for taken in 0.. {
        assert!(taken <= SIZE, "a ring holds no more chains than entries");
        match queue.pop(&mut chain) {
            Ok(true) => {}
            Ok(false) | Err(_) => break,
        }
        assert!(chain.readable.len() + chain.writable.len() <= usize::from(SIZE));
        fuzz_parse(&mut chain, &memory, &geometry);
        if taken % 2 == 0 {
            queue.push_used(chain.head, 0).expect("the used ring lies in RAM");
        }
    }
}

/// A whole block device, whose rings are the input's: it survives, and works again after a reset.
pub fn fuzz_blk(data: &[u8]) {
    static MACHINE: Mutex<Option<Harness>> = Mutex::new(None);
    let mut machine = MACHINE.lock().unwrap_or_else(PoisonError::into_inner);
    let machine = machine.get_or_insert_with(|| {
        let disk = Box::new(MemoryDisk::new(1 << 20));
        Harness::new(Box::new(Blk::new(disk, &Options::default())), 16 << 20)
    });
    let mut queue = machine.run(1, SIZE).remove(0);
    let (rings, body) = data.split_at(data.len().min(RINGS));
    let (table, available) = rings.split_at(rings.len().min(16 * usize::from(SIZE)));
    machine.memory.write_slice(table, queue.descriptors).expect("RAM");
    machine.memory.write_slice(available, queue.available).expect("RAM");
    machine.memory.write_slice(&body[..body.len().min(RAM)], GuestAddress(BODY)).expect("RAM");
    queue.ring();
    // Give the worker the time to look at it: a reset at once would be faster than the doorbell.
    let deadline = Instant::now() + Duration::from_millis(2);
    let mut untouched = || queue.poll().is_none() && machine.status() & status::NEEDS_RESET == 0;
    while untouched() && Instant::now() < deadline {
        std::thread::yield_now();
    }

    let mut queue = machine.run(1, SIZE).remove(0);
    let (header, state) = (machine.data(0), machine.data(0x100));
    machine.memory.write_obj([4u32, 0, 0, 0], header).expect("RAM");
    queue.add(&[(header, 16)], &[(state, 1)]);
    queue.kick();
    queue.wait();
    assert_eq!(machine.status() & status::NEEDS_RESET, 0, "it works again");
}

/// Accesses to configuration space and BAR, eight bytes of input each: kind, length, offset, value.
pub fn fuzz_pci(data: &[u8]) {
    static MACHINE: Mutex<Option<Harness>> = Mutex::new(None);
    let mut machine = MACHINE.lock().unwrap_or_else(PoisonError::into_inner);
    let machine = machine.get_or_insert_with(|| {
        let disk = Box::new(MemoryDisk::new(1 << 20));
        let options = Options { queues: 2, ..Options::default() };
        Harness::new(Box::new(Blk::new(disk, &options)), 16 << 20)
    });
    for access in data.chunks_exact(8).take(4096) {
        let len = 1usize << (access[1] & 3);
        let offset = u64::from(u16::from_le_bytes([access[2], access[3]]));
        let value = u32::from_le_bytes([access[4], access[5], access[6], access[7]]);
        match access[0] & 3 {
            0 => machine.write_config(offset & 0xfc, value),
            1 => drop(machine.read_config(offset & 0xfff)),
            2 => machine.write(offset, value.into(), len),
            _ => drop(machine.read(offset, len)),
        }
    }
    // The machine's reset brings everything back, whatever was moved, masked or switched off.
    machine.power_cycle();
    let mut queues = machine.run(2, SIZE);
    let (header, state) = (machine.data(0), machine.data(0x100));
    machine.memory.write_obj([4u32, 0, 0, 0], header).expect("RAM");
    for queue in &mut queues {
        queue.add(&[(header, 16)], &[(state, 1)]);
        queue.kick();
        queue.wait();
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::virtio::testing::{INDIRECT, NEXT, WRITE};

    /// Descriptors, heads that are available, and a body.
    fn ring(descriptors: &[(u64, u32, u16, u16)], heads: &[u16], body: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (address, len, flags, next) in descriptors {
            bytes.extend(address.to_le_bytes());
            bytes.extend(len.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
            bytes.extend(next.to_le_bytes());
        }
        bytes.resize(0x100, 0);
        bytes.extend([0, 0]);
        bytes.extend((heads.len() as u16).to_le_bytes());
        heads.iter().for_each(|head| bytes.extend(head.to_le_bytes()));
        bytes.resize(RINGS, 0);
        bytes.extend(body);
        bytes
    }

    fn header(kind: u32, sector: u64) -> Vec<u8> {
        let mut bytes = [kind, 0].map(u32::to_le_bytes).concat();
        bytes.extend(sector.to_le_bytes());
        bytes.resize(64, 0);
        bytes
    }

    fn access(kind: u8, len: u8, offset: u16, value: u32) -> Vec<u8> {
        let mut bytes = vec![kind, len];
        bytes.extend(offset.to_le_bytes());
        bytes.extend(value.to_le_bytes());
        bytes
    }

    fn seeds(name: &str) -> Vec<Vec<u8>> {
        let (read, end) = ((0x2000, 512, NEXT | WRITE, 2), (0x1020, 1, WRITE, 0));
        let whole = [(BODY, 16, NEXT, 1), read, end];
        let written = [(BODY, 16, NEXT, 1), (0x2000, 512, NEXT, 2), end];
        let range = [(BODY, 16, NEXT, 1), (0x1010, 16, NEXT, 2), end];
        let mut table = header(0, 1);
        table.resize(0x100, 0);
        table.extend(&ring(&whole, &[], &[])[..48]);
        let moved = [0x10, 0x14, 0x04].map(|at| access(0, 2, at, 0xffff_ffff)).concat();
        let set_up =
            [(0x14, 0, 3u32), (0x08, 2, 1), (0x0c, 2, 1), (0x14, 0, 11), (0x1c, 1, 1), (0x14, 0, 15)];
        let set_up = set_up.map(|(offset, len, value)| access(2, len, offset, value)).concat();
        let window = [0x84, 0x88, 0x8c, 0x90].map(|at| access(0, 2, at, 4)).concat();
        match name {
            "pci" => vec![moved, set_up, window, access(2, 2, 0x400c, 0)],
            _ => vec![
                ring(&whole, &[0, 0, 0], &header(0, 0)),
                ring(&written, &[0], &header(1, 2047)),
                ring(&range, &[0], &header(13, 8)),
                ring(&[(0x1100, 48, INDIRECT, 0)], &[0], &table),
                ring(&[(0x1000, 16, NEXT, 1), (0x1000, 16, NEXT, 0)], &[0], &header(4, 0)),
            ],
        }
    }

    /// Runs the corpus and `rounds` deterministic random mutations of it.
    fn exercise(name: &str, target: fn(&[u8]), rounds: usize) {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fuzz/corpus").join(name);
        if std::env::var_os("OMEGA_WRITE_CORPUS").is_some() {
            std::fs::create_dir_all(&folder).expect("a folder");
            for (i, seed) in seeds(name).iter().enumerate() {
                std::fs::write(folder.join(format!("seed-{i}")), seed).expect("a file");
            }
        }
        let files = std::fs::read_dir(&folder).expect("the corpus is there");
        let corpus: Vec<Vec<u8>> =
            files.map(|file| std::fs::read(file.expect("a file").path()).expect("readable")).collect();
        assert!(!corpus.is_empty(), "{}", folder.display());
        corpus.iter().for_each(|bytes| target(bytes));
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut roll = |most: usize| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state % most.max(1) as u64) as usize
        };
        for _ in 0..rounds {
            let mut bytes = corpus[roll(corpus.len())].clone();
            for _ in 0..=roll(8) {
                let at = roll(bytes.len());
                match roll(5) {
                    0 => bytes[at] ^= 1 << roll(8),
                    1 => bytes[at] = [0, 1, 2, 4, 15, 16, 0x7f, 0x80, 0xff][roll(9)],
                    2 => bytes.truncate(at.max(8)),
                    3 => {
                        let other = &corpus[roll(corpus.len())];
                        let (from, to) = (roll(other.len()), roll(bytes.len()));
                        let len = roll(32).min(other.len() - from).min(bytes.len() - to);
                        bytes[to..to + len].copy_from_slice(&other[from..from + len]);
                    }
                    _ => {
                        // A descriptor's flags and next are where the harm is done.
                        let at = (16 * roll(usize::from(SIZE)) + 12 + roll(4)).min(bytes.len() - 1);
                        bytes[at] = roll(18) as u8;
                    }
                }
            }
            target(&bytes);
        }
    }

    #[test]
    fn fuzz_chain_corpus_and_mutations_never_take_more_than_the_ring_holds() {
        exercise("chain", fuzz_chain, 20_000);
    }

    #[test]
    fn fuzz_blk_corpus_and_mutations_leave_a_device_that_a_reset_mends() {
        exercise("blk", fuzz_blk, 1_000);
    }

    #[test]
    fn fuzz_pci_corpus_and_mutations_leave_a_function_that_a_power_cycle_mends() {
        exercise("pci", fuzz_pci, 1_000);
    }

    #[test]
    fn fuzz_interrupts_corpus_and_mutations_leave_controllers_that_can_be_saved() {
        exercise("interrupts", fuzz_interrupts, 2_000);
    }
}
