//! How devices interrupt the guest, whoever implements the interrupt controller.

use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

/// A wired interrupt: an ISA line or a PCI INTx pin.
pub trait InterruptLine: Send + Sync {
    /// Edge-triggered lines: one pulse. Level-triggered lines: raise or lower.
    ///
    /// # Errors
    /// The hypervisor refuses.
    fn set(&self, high: bool) -> io::Result<()>;
}

/// What a message-signalled interrupt writes, and where (PCI 3.0, section 6.8).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MsiMessage {
    /// The address: 0xfee00000 upwards on x86.
    pub address: u64,
    /// The data: vector, delivery mode, trigger mode.
    pub data: u32,
}

/// One MSI or MSI-X vector of one device.
pub trait MsiRoute: Send + Sync {
    /// Sets the message. Takes effect for interrupts signalled after it returns.
    ///
    /// # Errors
    /// The hypervisor refuses.
    fn set(&self, message: MsiMessage) -> io::Result<()>;
    /// Masks (interrupts are held back by the caller) or unmasks the vector.
    ///
    /// # Errors
    /// The hypervisor refuses.
    fn mask(&self, masked: bool) -> io::Result<()>;
    /// Delivers one interrupt. Callable from any thread.
    ///
    /// # Errors
    /// The hypervisor refuses.
    fn trigger(&self) -> io::Result<()>;
    /// An eventfd that does the same without leaving the kernel, where there is one (irqfd).
    fn event(&self) -> Option<&EventFd>;
}

/// The machine's interrupt controller as devices see it.
pub trait InterruptController: Send + Sync {
    /// A line by its global system interrupt number.
    ///
    /// # Errors
    /// There is no such line, or the hypervisor refuses.
    fn line(&self, gsi: u32) -> io::Result<Arc<dyn InterruptLine>>;
    /// A new MSI vector; given back when dropped.
    ///
    /// # Errors
    /// No routes are left, or the hypervisor refuses.
    fn msi(&self) -> io::Result<Arc<dyn MsiRoute>>;
}
