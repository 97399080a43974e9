//! How a virtio device interrupts its driver: used buffers, changed configuration, and distress.

use std::fmt::Display;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering};

use crate::pci::Msix;

/// No vector is assigned (section 4.1.4.3).
pub(crate) const NO_VECTOR: u16 = 0xffff;

const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// The vectors of one device and the little state that its worker and the driver's registers share.
pub struct Interrupts {
    msix: Arc<Msix>,
    config_vector: AtomicU16,
    queue_vectors: Vec<AtomicU16>,
    isr: AtomicU8,
    generation: AtomicU8,
    needs_reset: AtomicBool,
    live: AtomicBool,
}

impl Interrupts {
    pub(super) fn new(msix: Arc<Msix>, queues: usize) -> Self {
        Self {
            msix,
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            isr: AtomicU8::new(0),
            generation: AtomicU8::new(0),
            needs_reset: AtomicBool::new(false),
            live: AtomicBool::new(false),
        }
    }

    /// Tells the driver that `queue` has used buffers.
    pub fn signal_queue(&self, queue: u16) {
        if let Some(vector) = self.queue_vectors.get(usize::from(queue)) {
            self.signal(vector.load(Ordering::Acquire), ISR_QUEUE);
        }
    }

    /// Tells the driver that the device configuration changed. Before the driver is ready only the
    /// generation moves.
    pub fn signal_config(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
        if self.live.load(Ordering::Acquire) {
            self.signal(self.config_vector.load(Ordering::Acquire), ISR_CONFIG);
        }
    }

    /// The device cannot go on until the driver resets it (DEVICE_NEEDS_RESET, section 2.1). Logged
    /// once for each reset, so that a guest cannot fill the log faster than it can reset.
    pub fn fail(&self, device: &'static str, why: &dyn Display) {
        if !self.needs_reset.swap(true, Ordering::AcqRel) {
            tracing::warn!(device, "the device needs a reset: {why}");
            if self.live.load(Ordering::Acquire) {
                self.signal(self.config_vector.load(Ordering::Acquire), ISR_CONFIG);
            }
        }
    }

    fn signal(&self, vector: u16, cause: u8) {
        if !self.msix.enabled() {
            self.isr.fetch_or(cause, Ordering::AcqRel);
        } else if vector != NO_VECTOR {
            self.msix.trigger(vector);
        }
    }

    pub(super) fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::Acquire)
    }

    pub(super) fn set_needs_reset(&self, needed: bool) {
        self.needs_reset.store(needed, Ordering::Release);
    }

    /// Whether the driver is ready (DRIVER_OK).
    pub(super) fn set_live(&self, live: bool) {
        self.live.store(live, Ordering::Release);
    }

    pub(super) fn generation(&self) -> u8 {
        self.generation.load(Ordering::Acquire)
    }

    pub(super) fn take_isr(&self) -> u8 {
        self.isr.swap(0, Ordering::AcqRel)
    }

    pub(super) fn vector(&self, queue: Option<u16>) -> u16 {
        match queue {
            None => self.config_vector.load(Ordering::Acquire),
            Some(queue) => {
                self.queue_vectors.get(usize::from(queue)).map_or(NO_VECTOR, |v| v.load(Ordering::Acquire))
            }
        }
    }

    /// Assigns a vector; one that does not exist counts as none, which the driver reads back.
    pub(super) fn set_vector(&self, queue: Option<u16>, vector: u16) {
        let vector = if vector < self.msix.count() { vector } else { NO_VECTOR };
        let place = match queue {
            None => Some(&self.config_vector),
            Some(queue) => self.queue_vectors.get(usize::from(queue)),
        };
        if let Some(place) = place {
            place.store(vector, Ordering::Release);
        }
    }

    pub(super) fn reset(&self) {
        self.config_vector.store(NO_VECTOR, Ordering::Release);
        for vector in &self.queue_vectors {
            vector.store(NO_VECTOR, Ordering::Release);
        }
        self.isr.store(0, Ordering::Release);
        self.set_needs_reset(false);
        self.set_live(false);
    }
}
