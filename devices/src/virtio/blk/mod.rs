//! Block device (section 5.2) on any [`Disk`].

mod backend;
mod counters;
mod request;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;

pub(crate) use self::backend::BlkBackend;
pub use self::counters::{Counters, OperationCounters, Snapshot};
use super::worker::Worker;
use super::{Activation, Chain, Interrupts, Returned, VirtioDevice};
use crate::GuestMemory;
use crate::disk::{Disk, Geometry};
use crate::thread::Role;

const SECTOR: u64 = 512;
const QUEUE_SIZE: u16 = 256;
/// Operations that the worker's ring takes at once.
const RING_ENTRIES: u32 = 256;
const MAX_QUEUES: u16 = 16;

/// Most data segments of a request: a queue's worth of descriptors without header and status.
pub(crate) const SEG_MAX: usize = QUEUE_SIZE as usize - 2;
/// Most bytes of one segment, so that no request is larger than [`REQUEST_MAX`].
pub(crate) const SIZE_MAX: u32 = 64 << 10;
/// Most bytes of a read or write.
pub(crate) const REQUEST_MAX: u64 = SEG_MAX as u64 * SIZE_MAX as u64;
/// Most sectors of a discard or write zeroes: 1 GiB.
pub(crate) const RANGE_MAX: u32 = 1 << 21;

/// Length of the serial number (section 5.2.6).
pub(crate) const ID_LEN: usize = 20;

pub(crate) mod feature {
    pub(crate) const SIZE_MAX: u64 = 1 << 1;
    pub(crate) const SEG_MAX: u64 = 1 << 2;
    pub(crate) const RO: u64 = 1 << 5;
    pub(crate) const BLK_SIZE: u64 = 1 << 6;
    pub(crate) const FLUSH: u64 = 1 << 9;
    pub(crate) const TOPOLOGY: u64 = 1 << 10;
    pub(crate) const MQ: u64 = 1 << 12;
    pub(crate) const DISCARD: u64 = 1 << 13;
    pub(crate) const WRITE_ZEROES: u64 = 1 << 14;
}

/// How a disk appears to the guest.
#[derive(Clone, Debug)]
pub struct Options {
    /// The serial number that the guest reads; at most 20 bytes count.
    pub serial: String,
    /// How many request queues, 1 to 16; one worker serves all of them.
    pub queues: u16,
}

impl Default for Options {
    fn default() -> Self {
        Self { serial: String::new(), queues: 1 }
    }
}

/// A virtio block device.
pub struct Blk {
    geometry: Geometry,
    queues: u16,
    config: [u8; 60],
    counters: Arc<Counters>,
    worker: Worker<BlkBackend>,
}

impl Blk {
    /// A block device that stands on `disk`.
    #[must_use]
    pub fn new(disk: Box<dyn Disk>, options: &Options) -> Self {
        let geometry = disk.geometry();
        let queues = options.queues.clamp(1, MAX_QUEUES);
        let mut id = [0; ID_LEN];
        let len = options.serial.len().min(ID_LEN);
        id[..len].copy_from_slice(&options.serial.as_bytes()[..len]);
        let counters = Arc::new(Counters::default());
        let worker = Worker::new(BlkBackend::new(disk, id, counters.clone()));
        let config = configuration(&geometry, queues);
        Self { geometry, queues, config, counters, worker }
    }

    /// What its worker would drive, for who takes the turns himself.
    pub(crate) fn take_backend(&mut self) -> Option<BlkBackend> {
        self.worker.take_backend()
    }

    /// What the guest did with the disk, counted as it happens.
    #[must_use]
    pub fn counters(&self) -> Arc<Counters> {
        self.counters.clone()
    }
}

/// Parses whatever is in `chain`, for fuzzing; what is accepted must lie on the disk.
#[doc(hidden)]
pub fn fuzz_parse(chain: &mut Chain, memory: &GuestMemory, geometry: &Geometry) {
    let all = feature::FLUSH | feature::DISCARD | feature::WRITE_ZEROES;
    let Ok(parsed) = request::parse(chain, memory, geometry, all) else { return };
    if let Ok(request::Wanted::Disk { offset, len, .. }) = parsed.wanted {
        assert!(offset.checked_add(len).is_some_and(|end| end <= geometry.size));
    }
}

/// The device configuration layout (section 5.2.4).
fn configuration(geometry: &Geometry, queues: u16) -> [u8; 60] {
    let mut config = [0; 60];
    let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
    let blocks = geometry.block_size.max(512) / 512;
    put(0, &(geometry.size / SECTOR).to_le_bytes());
    put(8, &SIZE_MAX.to_le_bytes());
    put(12, &(SEG_MAX as u32).to_le_bytes());
    // Guests may address any 512 bytes; the disk's own block is the one that they should prefer.
    put(20, &512u32.to_le_bytes());
    put(24, &[blocks.ilog2() as u8]);
    put(26, &(blocks.min(u32::from(u16::MAX)) as u16).to_le_bytes());
    put(34, &queues.to_le_bytes());
    put(36, &RANGE_MAX.to_le_bytes());
    put(40, &1u32.to_le_bytes());
    put(44, &blocks.to_le_bytes());
    put(48, &RANGE_MAX.to_le_bytes());
    put(52, &1u32.to_le_bytes());
    put(56, &[u8::from(geometry.discard)]);
    config
}

#[derive(Serialize, Deserialize)]
struct State {
    sectors: u64,
}

impl VirtioDevice for Blk {
    fn kind(&self) -> &'static str {
        "virtio-blk"
    }

    fn device_type(&self) -> u16 {
        2
    }

    fn pci_class(&self) -> u32 {
        0x01_80_00
    }

    fn features(&self) -> u64 {
        let optional = [
            (self.geometry.read_only, feature::RO),
            (self.queues > 1, feature::MQ),
            (self.geometry.discard && !self.geometry.read_only, feature::DISCARD),
            (self.geometry.write_zeroes && !self.geometry.read_only, feature::WRITE_ZEROES),
        ];
        let always =
            feature::SIZE_MAX | feature::SEG_MAX | feature::BLK_SIZE | feature::FLUSH | feature::TOPOLOGY;
        optional.iter().filter(|(there, _)| *there).fold(always, |all, (_, bit)| all | bit)
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; usize::from(self.queues)]
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = self.config.get(offset + i).copied().unwrap_or(0);
        }
    }

    fn start(&mut self, _interrupts: &Arc<Interrupts>) -> io::Result<()> {
        self.worker.start(Role::Disk, self.kind(), RING_ENTRIES)
    }

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        self.worker.activate(activation)
    }

    fn deactivate(&mut self, patience: Duration, returned: Returned) {
        self.worker.deactivate(patience, returned);
    }

    fn end(&mut self) {
        self.worker.end();
    }

    fn save(&self) -> Value {
        serde_json::json!(State { sectors: self.geometry.size / SECTOR })
    }

    fn restore(&mut self, state: &Value) -> Result<(), String> {
        let state = State::deserialize(state).map_err(|e| e.to_string())?;
        if state.sectors != self.geometry.size / SECTOR {
            let own = self.geometry.size / SECTOR;
            return Err(format!("its disk has {} sectors, this one has {own}", state.sectors));
        }
        Ok(())
    }
}

#[cfg(test)]
mod blk_test;
