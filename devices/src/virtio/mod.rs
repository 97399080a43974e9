//! Virtio 1.2 devices on PCI, modern only. Section numbers are those of the OASIS specification
//! "Virtual I/O Device (VIRTIO) Version 1.2".
//!
//! ```text
//! guest ──▶ pci::VirtioPci ──activate──▶ a VirtioDevice ──▶ worker thread (one Ring)
//!            registers, status           blk, net, rng,       │  doorbells ─▶ Virtqueue ─▶ back end
//!            machine, vectors            console, balloon     └─ used ring, Interrupts ─▶ MSI-X
//! ```
//!
//! A vCPU thread only ever touches registers, under a short lock; everything that can take time happens
//! on the device's worker.

pub mod balloon;
pub mod blk;
pub mod console;
mod device;
mod interrupts;
mod memory;
pub mod net;
pub mod pci;
mod queue;
pub mod rng;
#[doc(hidden)]
pub mod testing;
mod worker;

pub use device::{Activation, ActiveQueue, Returned, VirtioDevice};
pub use interrupts::Interrupts;
pub use queue::{Broken, Chain, QueueLayout, Segment, Virtqueue};

/// Feature bits that belong to the transport and the rings (section 6).
pub mod features {
    /// Chains may sit in a table of their own.
    pub const RING_INDIRECT_DESC: u64 = 1 << 28;
    /// Both sides say from which index on they want to be notified.
    pub const RING_EVENT_IDX: u64 = 1 << 29;
    /// The device follows version 1 or later of the specification.
    pub const VERSION_1: u64 = 1 << 32;
}
