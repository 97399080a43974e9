//! A vCPU on KVM: turns `kvm_run` into [`VmExit`]s and back.
#![allow(unsafe_code)] // Reads the fields of `kvm_run`'s union that the exit reason names.

use kvm_bindings::{
    KVM_EXIT_FAIL_ENTRY, KVM_EXIT_HLT, KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_INTR, KVM_EXIT_IO, KVM_EXIT_IO_IN,
    KVM_EXIT_IRQ_WINDOW_OPEN, KVM_EXIT_MEMORY_FAULT, KVM_EXIT_MMIO, KVM_EXIT_SET_TPR, KVM_EXIT_SHUTDOWN,
    kvm_run, kvm_xsave,
};
use kvm_ioctls::VcpuFd;

use super::bare::Bare;
use super::{Controllers, CpuState, Error};
use crate::cpu::{Data, Processor, VmEntry, VmExit};

/// A vCPU. Its thread owns it while it runs.
pub struct Vcpu {
    fd: VcpuFd,
    index: u8,
    msrs: Vec<u32>,
    pending: Pending,
    /// Of a vCPU whose interrupt controllers are not the kernel's.
    pub(super) bare: Option<Bare>,
}

/// Where the answer to the last exit goes.
#[derive(Clone, Copy)]
enum Pending {
    None,
    Mmio,
    Port(PortAccess),
}

/// What is left of a port access; a string instruction (`rep insb`) hands over many elements at once.
#[derive(Clone, Copy)]
struct PortAccess {
    port: u16,
    read: bool,
    size: u8,
    left: u32,
    /// Of the current element, in the mapping of `kvm_run`.
    offset: u64,
}

impl Vcpu {
    pub(super) fn new(fd: VcpuFd, index: u8, msrs: Vec<u32>, bare: Option<Bare>) -> Self {
        Self { fd, index, msrs, pending: Pending::None, bare }
    }

    /// Whose local APIC it has.
    pub(super) fn controllers(&self) -> Controllers {
        if self.bare.is_some() { Controllers::Userspace } else { Controllers::Kernel }
    }

    /// Its number, which is its APIC id.
    #[must_use]
    pub fn index(&self) -> u8 {
        self.index
    }

    /// What this process and KVM tell each other about it.
    pub(super) fn kvm_run(&mut self) -> &mut kvm_run {
        self.fd.get_kvm_run()
    }

    /// KVM's handle, for boot state and tests.
    pub(crate) fn fd(&self) -> &VcpuFd {
        &self.fd
    }

    /// The whole state. Only when its last exit was [`VmExit::Interrupted`] or none.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn save(&self) -> Result<CpuState, Error> {
        CpuState::save(&self.fd, &self.msrs, self.controllers())
    }

    /// Takes over a saved state.
    ///
    /// # Errors
    /// The state is not one that KVM takes.
    pub fn restore(&mut self, state: &CpuState) -> Result<(), Error> {
        self.pending = Pending::None;
        state.restore(&self.fd)?;
        self.bare.iter_mut().for_each(|bare| bare.restored(state));
        Ok(())
    }

    /// The element of a port access in `kvm_run`'s mapping.
    fn element(&mut self, access: PortAccess) -> *mut u8 {
        let base: *mut kvm_run = self.fd.get_kvm_run();
        // SAFETY: KVM reports offsets and counts that stay inside the mapping that `base` begins.
        unsafe { base.cast::<u8>().add(access.offset as usize) }
    }

    fn answer(&mut self, entry: VmEntry) {
        let VmEntry::Read(data) = entry else { return };
        let data = data.as_slice();
        match self.pending {
            Pending::Port(access) if access.read => {
                let target = self.element(access);
                let len = data.len().min(access.size.into());
                // SAFETY: `target` is `access.size` bytes inside `kvm_run`'s mapping, which no one else uses
                // while this vCPU does not run.
                unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), target, len) };
            }
            Pending::Mmio => {
                // SAFETY: the last exit was `KVM_EXIT_MMIO`, so `mmio` is the union's field.
                let mmio = unsafe { &mut self.fd.get_kvm_run().__bindgen_anon_1.mmio };
                if mmio.is_write == 0 {
                    mmio.data[..data.len()].copy_from_slice(data);
                }
            }
            Pending::Port(_) | Pending::None => {}
        }
    }

    /// The exit for the current element of a port access.
    fn port(&mut self, access: PortAccess) -> VmExit {
        self.pending = Pending::Port(access);
        let PortAccess { port, size, .. } = access;
        if access.read {
            return VmExit::PortRead { port, size };
        }
        let source = self.element(access);
        // SAFETY: as in `answer`.
        let bytes = unsafe { std::slice::from_raw_parts(source, size.into()) };
        VmExit::PortWrite { port, data: Data::new(bytes, size.into()) }
    }

    fn exit(&mut self) -> VmExit {
        let run = self.fd.get_kvm_run();
        let union = &run.__bindgen_anon_1;
        match run.exit_reason {
            KVM_EXIT_IO => {
                // SAFETY: the exit reason says that this is the union's field.
                let io = unsafe { union.io };
                let (port, size, read) = (io.port, io.size, u32::from(io.direction) == KVM_EXIT_IO_IN);
                self.port(PortAccess { port, read, size, left: io.count, offset: io.data_offset })
            }
            KVM_EXIT_MMIO => {
                // SAFETY: the exit reason says that this is the union's field.
                let mmio = unsafe { union.mmio };
                let (address, size) = (mmio.phys_addr, mmio.len.min(8) as u8);
                self.pending = Pending::Mmio;
                if mmio.is_write == 0 {
                    VmExit::MmioRead { address, size }
                } else {
                    VmExit::MmioWrite { address, data: Data::new(&mmio.data, size.into()) }
                }
            }
            KVM_EXIT_INTR | KVM_EXIT_IRQ_WINDOW_OPEN | KVM_EXIT_SET_TPR => VmExit::Interrupted,
            KVM_EXIT_HLT => VmExit::Halted,
            KVM_EXIT_SHUTDOWN => VmExit::TripleFault,
            KVM_EXIT_FAIL_ENTRY => {
                // SAFETY: the exit reason says that this is the union's field.
                let reason = unsafe { union.fail_entry.hardware_entry_failure_reason };
                VmExit::Failed(format!("The processor refused to enter the guest (reason {reason:#x})"))
            }
            KVM_EXIT_INTERNAL_ERROR => {
                // SAFETY: the exit reason says that this is the union's field.
                let suberror = unsafe { union.internal.suberror };
                let rip = self.fd.get_regs().map_or(0, |regs| regs.rip);
                VmExit::Failed(format!(
                    "KVM cannot run the instruction at {rip:#x} (internal error {suberror})"
                ))
            }
            other => VmExit::Failed(format!("KVM gave up with exit reason {other}")),
        }
    }
}

impl Processor for Vcpu {
    fn enter(&mut self, entry: VmEntry) -> VmExit {
        self.answer(entry);
        if let Pending::Port(access) = self.pending
            && access.left > 1
        {
            let offset = access.offset + u64::from(access.size);
            return self.port(PortAccess { left: access.left - 1, offset, ..access });
        }
        self.pending = Pending::None;
        let result = self.fd.run().map(drop);
        if let Some(bare) = &mut self.bare {
            bare.left(self.fd.get_kvm_run());
        }
        match result {
            Ok(()) => self.exit(),
            // EAGAIN: the vCPU waited for its start and was woken.
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                // Cleared before the caller asks the gang, so that a kick from now on is not lost.
                self.fd.set_kvm_immediate_exit(0);
                VmExit::Interrupted
            }
            Err(error) => {
                let fault = self.fd.get_kvm_run().exit_reason == KVM_EXIT_MEMORY_FAULT;
                let what = if fault { "a page of guest memory cannot be had" } else { "KVM_RUN failed" };
                VmExit::Failed(format!("{what}: {error}"))
            }
        }
    }

    fn interrupt(&mut self) {
        self.fd.set_kvm_immediate_exit(1);
    }
}

/// Restores the extended state.
pub(super) fn set_xsave(fd: &VcpuFd, xsave: &kvm_xsave) -> Result<(), kvm_ioctls::Error> {
    // SAFETY: Omega never asks the kernel for permission to use dynamically enabled features (AMX), so
    // KVM reads no more than `kvm_xsave`'s 4096 bytes.
    unsafe { fd.set_xsave(xsave) }
}
