//! A block device whose driver and worker share one thread: what the queue and the device cost, without
//! what it costs to wake threads.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::{DriverQueue, Harness};
use crate::disk::Disk;
use crate::virtio::blk::{Blk, BlkBackend, Options};
use crate::virtio::worker::Inline;
use crate::virtio::{Activation, Interrupts, Returned, VirtioDevice};

type Slot = Arc<Mutex<Option<Activation>>>;

/// A block device that keeps its activation for whoever asks.
struct Waiting {
    blk: Blk,
    slot: Slot,
}

impl VirtioDevice for Waiting {
    fn kind(&self) -> &'static str {
        self.blk.kind()
    }

    fn device_type(&self) -> u16 {
        self.blk.device_type()
    }

    fn pci_class(&self) -> u32 {
        self.blk.pci_class()
    }

    fn features(&self) -> u64 {
        self.blk.features()
    }

    fn queue_sizes(&self) -> Vec<u16> {
        self.blk.queue_sizes()
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        self.blk.read_config(offset, data);
    }

    fn start(&mut self, _interrupts: &Arc<Interrupts>) -> io::Result<()> {
        Ok(())
    }

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        *self.slot.lock().unwrap_or_else(PoisonError::into_inner) = Some(activation);
        Ok(())
    }

    fn deactivate(&mut self, _patience: Duration, returned: Returned) {
        returned(Vec::new());
    }
}

/// A block device whose queue the caller's own thread serves.
pub struct InlineBlk(Inline<BlkBackend>);

impl InlineBlk {
    /// A device on `disk` in a machine with `ram` bytes, set up through its registers; its first queue, of
    /// `size` entries, has no doorbell.
    ///
    /// # Errors
    /// The disk cannot be attached to a ring.
    ///
    /// # Panics
    /// The device refuses its driver.
    pub fn new(disk: Box<dyn Disk>, ram: usize, size: u16) -> io::Result<(Harness, DriverQueue, Self)> {
        let mut blk = Blk::new(disk, &Options::default());
        let backend = blk.take_backend().expect("it was not started");
        let slot = Slot::default();
        let harness = Harness::new(Box::new(Waiting { blk, slot: Arc::clone(&slot) }), ram);
        let queue = harness.run(1, size).pop().expect("one queue was asked for").silent();
        let activation = slot.lock().unwrap_or_else(PoisonError::into_inner).take();
        let activation = activation.expect("the driver was ready");
        Ok((harness, queue, Self(Inline::new("virtio-blk", 256, backend, activation)?)))
    }

    /// Serves what the driver made available (`rung`), finishes what is done, and waits for up to `patience`
    /// if nothing is to do.
    ///
    /// # Errors
    /// The ring fails.
    pub fn turn(&mut self, rung: bool, patience: Duration) -> io::Result<()> {
        self.0.turn(rung, patience)
    }
}
