//! The devices of Omega's machine: buses, platform devices, PCI, virtio, and the disks behind them.
//!
//! A device knows nothing of which back end serves it, and a back end knows nothing of virtio. What a
//! device needs from the machine comes through three small traits: [`irq::InterruptController`],
//! [`bus::DoorbellRegistry`] and the guest's memory. What the machine may ask of every device is
//! [`lifecycle::Lifecycle`]; the contracts are written down in `docs/devices.md`. The interrupt controllers in
//! [`interrupt`] are for guests that span PCs (`docs/interrupts.md`); others have the kernel's.

pub mod bus;
pub mod disk;
#[doc(hidden)]
pub mod fuzzing;
pub mod interrupt;
pub mod irq;
pub mod lifecycle;
pub mod pci;
pub mod platform;
pub mod thread;
pub mod virtio;

/// The guest's RAM as devices see it.
pub type GuestMemory = vm_memory::GuestMemoryMmap<()>;
