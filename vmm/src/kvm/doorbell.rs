//! Doorbells that ring without leaving the kernel: `KVM_IOEVENTFD`.

use std::io;
use std::sync::Arc;

use devices::bus::DoorbellRegistry;
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::EventFd;

/// Registers doorbells with a VM.
#[derive(Clone)]
pub struct Doorbells(Arc<VmFd>);

impl Doorbells {
    pub(super) fn new(vm: Arc<VmFd>) -> Self {
        Self(vm)
    }
}

fn io(error: kvm_ioctls::Error) -> io::Error {
    io::Error::from_raw_os_error(error.errno())
}

impl DoorbellRegistry for Doorbells {
    fn register(&self, address: u64, len: u32, value: Option<u64>, event: &EventFd) -> io::Result<()> {
        let at = IoEventAddress::Mmio(address);
        match (value, len) {
            // Without a value KVM may match every length, which it finds fastest.
            (None, _) => self.0.register_ioevent(event, &at, NoDatamatch),
            (Some(value), 1) => self.0.register_ioevent(event, &at, value as u8),
            (Some(value), 2) => self.0.register_ioevent(event, &at, value as u16),
            (Some(value), 4) => self.0.register_ioevent(event, &at, value as u32),
            (Some(value), _) => self.0.register_ioevent(event, &at, value),
        }
        .map_err(io)
    }

    fn unregister(&self, address: u64, len: u32, value: Option<u64>, event: &EventFd) -> io::Result<()> {
        let at = IoEventAddress::Mmio(address);
        match (value, len) {
            (None, _) => self.0.unregister_ioevent(event, &at, NoDatamatch),
            (Some(value), 1) => self.0.unregister_ioevent(event, &at, value as u8),
            (Some(value), 2) => self.0.unregister_ioevent(event, &at, value as u16),
            (Some(value), 4) => self.0.unregister_ioevent(event, &at, value as u32),
            (Some(value), _) => self.0.unregister_ioevent(event, &at, value),
        }
        .map_err(io)
    }
}
