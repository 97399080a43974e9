//! Driving a disk: directly, or through the queue of a virtio block device.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use devices::disk::{Disk, Done, Operation, Request};
use devices::virtio::blk;
use devices::virtio::testing::{DriverQueue, Harness, InlineBlk, Used};
use transport::buffer::Buffer;
use transport::ring::Ring;
use vm_memory::{Bytes, GuestAddress};

use crate::random::Random;
use crate::stats::{micros, rate};

/// Reads that are kept in flight.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Bytes of each.
    pub size: u64,
    /// How many at once.
    pub depth: usize,
    /// At random places, or one after the other.
    pub random: bool,
}

/// What came of a slice.
pub struct Outcome {
    /// Of each read, in microseconds.
    pub times: Vec<f64>,
    elapsed: Duration,
}

impl Outcome {
    /// Reads per second.
    #[must_use]
    pub fn rate(&self) -> f64 {
        rate(self.times.len() as u64, self.elapsed)
    }
}

/// Something that reads a disk.
pub trait Reader {
    /// Keeps `load` in flight for `slice`.
    ///
    /// # Errors
    /// A read fails.
    fn run(&mut self, load: Load, slice: Duration) -> Result<Outcome>;
}

/// Where the next read goes.
struct Places {
    load: Load,
    blocks: u64,
    next: u64,
    random: Random,
}

impl Places {
    fn new(load: Load, size: u64) -> Self {
        Self { load, blocks: size / load.size, next: 0, random: Random::new(99) }
    }

    fn next(&mut self) -> u64 {
        self.next += 1;
        let block = if self.load.random { self.random.below(self.blocks) } else { self.next % self.blocks };
        block * self.load.size
    }
}

/// A disk on this thread's ring.
pub struct Direct {
    disk: Box<dyn Disk>,
    ring: Ring,
}

impl Direct {
    /// Attaches `disk`.
    ///
    /// # Errors
    /// It cannot be attached.
    pub fn new(mut disk: Box<dyn Disk>) -> Result<Self> {
        let mut ring = Ring::new(256)?;
        disk.attach(&mut ring)?;
        Ok(Self { disk, ring })
    }
}

impl Reader for Direct {
    fn run(&mut self, load: Load, slice: Duration) -> Result<Outcome> {
        let mut places = Places::new(load, self.disk.geometry().size);
        let (start, mut end, mut times, mut in_flight) = (Instant::now(), None, Vec::new(), 0);
        let mut sent = vec![start; load.depth];
        let (mut idle, mut done): (Vec<(usize, Buffer)>, Vec<Done>) = (Vec::new(), Vec::new());
        idle.extend((0..load.depth).map(|tag| (tag, Buffer::zeroed(load.size as usize))));
        loop {
            for (tag, buffer) in idle.drain(..) {
                sent[tag] = Instant::now();
                in_flight += 1;
                let (operation, offset, len) = (Operation::Read, places.next(), load.size);
                let request = Request { tag: tag as u64, operation, offset, len, buffer };
                self.disk.submit(&mut self.ring, request, &mut done);
            }
            let next = self.disk.tick(&mut self.ring, Instant::now(), &mut done);
            if done.is_empty() {
                let most = Duration::from_secs(5);
                self.ring.wait(Some(
                    next.map_or(most, |at| at.saturating_duration_since(Instant::now()).min(most)),
                ))?;
            }
            while let Some(completion) = self.ring.reap() {
                self.disk.complete(&mut self.ring, completion, &mut done);
            }
            for Done { tag, result, buffer } in done.drain(..) {
                result?;
                let (now, tag) = (Instant::now(), tag as usize);
                in_flight -= 1;
                if end.is_none() {
                    times.push(micros(now - sent[tag]));
                }
                if now - start < slice {
                    idle.push((tag, buffer));
                } else {
                    end.get_or_insert(now);
                }
            }
            if in_flight == 0 && idle.is_empty() {
                return Ok(Outcome { times, elapsed: end.unwrap_or(start) - start });
            }
            if start.elapsed() > slice + Duration::from_secs(30) {
                bail!("The disk does not answer: {}", self.disk.describe());
            }
        }
    }
}

const HEADERS: u64 = 0;
const STATUSES: u64 = 0x8000;
const DATA: u64 = 0x1_0000;
/// Bytes of one data descriptor; the device takes 64 KiB.
const SEGMENT: u64 = 64 << 10;
const QUEUE: u16 = 256;

/// Guest RAM of the machine around the device.
const RAM: usize = 64 << 20;

/// A virtio block device whose queue a software driver works.
pub struct Queued {
    harness: Harness,
    queue: DriverQueue,
    /// The device, where it runs on the driver's thread.
    inline: Option<InlineBlk>,
    size: u64,
}

impl Queued {
    /// A device on `disk` with its worker thread: doorbells and interrupts wake threads.
    #[must_use]
    pub fn threaded(disk: Box<dyn Disk>) -> Self {
        let size = disk.geometry().size;
        let device = blk::Blk::new(disk, &blk::Options::default());
        let harness = Harness::new(Box::new(device), RAM);
        let queue = harness.run(1, QUEUE).pop().expect("one queue was asked for");
        Self { harness, queue, inline: None, size }
    }

    /// A device on `disk` that runs on the driver's thread: its queue is driven directly.
    ///
    /// # Errors
    /// The disk cannot be attached.
    pub fn inline(disk: Box<dyn Disk>) -> Result<Self> {
        let size = disk.geometry().size;
        let (harness, queue, inline) = InlineBlk::new(disk, RAM, QUEUE)?;
        Ok(Self { harness, queue, inline: Some(inline), size })
    }

    /// The next used buffer; `rung`: there are new requests.
    fn wait(&mut self, mut rung: bool) -> Result<Used> {
        const PATIENCE: Duration = Duration::from_secs(30);
        let Some(inline) = &mut self.inline else {
            return self.queue.wait_up_to(PATIENCE).context("The queue does not answer");
        };
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            inline.turn(rung, Duration::from_secs(1))?;
            rung = false;
            if let Some(used) = self.queue.poll() {
                return Ok(used);
            }
        }
        bail!("The queue does not answer")
    }

    fn at(&self, offset: u64) -> GuestAddress {
        self.harness.data(offset)
    }

    /// Makes a read of `slot`'s buffer available; returns its head.
    fn submit(&mut self, slot: usize, load: Load, offset: u64) -> Result<u16> {
        let (slot, memory) = (slot as u64, &self.harness.memory);
        let mut header = [0; 16]; // type VIRTIO_BLK_T_IN, reserved, sector
        header[8..].copy_from_slice(&(offset / 512).to_le_bytes());
        memory.write_slice(&header, self.at(HEADERS + 16 * slot))?;
        memory.write_obj(0xffu8, self.at(STATUSES + slot))?;
        let data = DATA + slot * load.size;
        let mut writable: Vec<(GuestAddress, u32)> = (0..load.size)
            .step_by(SEGMENT as usize)
            .map(|part| (self.at(data + part), (load.size - part).min(SEGMENT) as u32))
            .collect();
        writable.push((self.at(STATUSES + slot), 1));
        let readable = [(self.at(HEADERS + 16 * slot), 16)];
        Ok(self.queue.add(&readable, &writable))
    }
}

impl Reader for Queued {
    fn run(&mut self, load: Load, slice: Duration) -> Result<Outcome> {
        let mut places = Places::new(load, self.size);
        let (start, mut end, mut times, mut in_flight) = (Instant::now(), None, Vec::new(), 0);
        let mut sent = vec![start; load.depth];
        let mut slots = vec![0; usize::from(QUEUE)];
        let mut idle: Vec<usize> = (0..load.depth).collect();
        loop {
            let kick = !idle.is_empty();
            for slot in idle.drain(..) {
                sent[slot] = Instant::now();
                let head = self.submit(slot, load, places.next())?;
                slots[usize::from(head)] = slot;
                in_flight += 1;
            }
            if kick {
                self.queue.kick();
            }
            if in_flight == 0 {
                return Ok(Outcome { times, elapsed: end.unwrap_or(start) - start });
            }
            let mut used = Some(self.wait(kick)?);
            while let Some(done) = used {
                let (now, slot) = (Instant::now(), slots[usize::from(done.head)]);
                let status: u8 = self.harness.memory.read_obj(self.at(STATUSES + slot as u64))?;
                if status != 0 {
                    bail!("A read ended with status {status}");
                }
                in_flight -= 1;
                if end.is_none() {
                    times.push(micros(now - sent[slot]));
                }
                if now - start < slice {
                    idle.push(slot);
                } else {
                    end.get_or_insert(now);
                }
                used = self.queue.poll();
            }
        }
    }
}
