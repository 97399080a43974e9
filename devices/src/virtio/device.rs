//! What a virtio device is to its transport.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use vmm_sys_util::eventfd::EventFd;

use super::{Interrupts, Virtqueue};

/// One queue that the driver has enabled.
pub struct ActiveQueue {
    /// Its number.
    pub index: u16,
    /// The queue.
    pub queue: Virtqueue,
    /// Signalled by the driver when it made buffers available.
    pub doorbell: Arc<EventFd>,
}

/// Everything a device needs to serve its driver.
pub struct Activation {
    /// The negotiated features.
    pub features: u64,
    /// The enabled queues, in order of their numbers.
    pub queues: Vec<ActiveQueue>,
    /// How to interrupt the driver.
    pub interrupts: Arc<Interrupts>,
}

/// Called by a device when it has let go of its queues: nothing touches guest memory any more, and what
/// was not answered is in [`Virtqueue::unfinished`]. May come on any thread, at once or later.
pub type Returned = Box<dyn FnOnce(Vec<(u16, Virtqueue)>) + Send>;

/// A virtio device without its transport. Calls come one at a time, under the transport's lock, from
/// vCPU threads and the machine's: none of them may wait.
pub trait VirtioDevice: Send {
    /// Stable name, as `virtio-blk`: the kind of its state.
    fn kind(&self) -> &'static str;

    /// The device's type (section 5).
    fn device_type(&self) -> u16;

    /// The PCI class code that fits: `0xBBSSPP`.
    fn pci_class(&self) -> u32;

    /// The features of this device type that it offers. The transport adds those of the rings.
    fn features(&self) -> u64;

    /// Whether the device can work with this subset of the offered features.
    fn accepts(&self, _features: u64) -> bool {
        true
    }

    /// The largest size of each queue; powers of two.
    fn queue_sizes(&self) -> Vec<u16>;

    /// Reads device configuration; beyond its end zeros.
    fn read_config(&self, offset: usize, data: &mut [u8]);

    /// Writes device configuration, where the driver may.
    fn write_config(&mut self, _offset: usize, _data: &[u8]) {}

    /// Starts threads and back ends, once, before the first activation. `interrupts` stays the same for
    /// the life of the device.
    ///
    /// # Errors
    /// A thread or its ring cannot be made.
    fn start(&mut self, interrupts: &Arc<Interrupts>) -> io::Result<()>;

    /// The driver is ready: serve it. The queues' unfinished requests come first.
    ///
    /// # Errors
    /// The device cannot; it then needs a reset.
    fn activate(&mut self, activation: Activation) -> io::Result<()>;

    /// Finish what is in flight, or give it up unanswered when `patience` has passed, and hand the
    /// queues back. Only after [`activate`](Self::activate), once.
    fn deactivate(&mut self, patience: Duration, returned: Returned);

    /// The driver reset the device: forget what it configured. Only while not active.
    fn reset(&mut self) {}

    /// The machine ends, after [`deactivate`](Self::deactivate): threads end, what is held elsewhere is given
    /// back.
    fn end(&mut self) {}

    /// State beyond registers and queues.
    fn save(&self) -> Value {
        Value::Null
    }

    /// Takes over such a state.
    ///
    /// # Errors
    /// What is wrong with it; the device is then unchanged.
    fn restore(&mut self, _state: &Value) -> Result<(), String> {
        Ok(())
    }
}
