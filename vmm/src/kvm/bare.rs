//! A vCPU without the kernel's local APIC: what [`ApicCpu`](crate::cpu::ApicCpu) asks of it.
#![allow(unsafe_code)] // `KVM_INTERRUPT`, for which the bindings have no call.

use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

use kvm_bindings::{kvm_debugregs, kvm_interrupt, kvm_regs, kvm_run, kvm_sregs, kvm_vcpu_events};
use kvm_ioctls::VcpuFd;

use super::alarm::Alarm;
use super::{Context, CpuState, Error, Vcpu, kick};
use crate::cpu::{Core, Kick};
use crate::memory::LOCAL_APIC;

/// `_IOW(KVMIO, 0x86, struct kvm_interrupt)`.
const KVM_INTERRUPT: libc::Ioctl = 0x4004_ae86_u32 as libc::Ioctl;
/// RFLAGS.IF.
const INTERRUPTS: u64 = 1 << 9;
/// IA32_APIC_BASE: this is the bootstrap processor; the APIC is on.
const BASE_BOOTSTRAP: u64 = 1 << 8;
const BASE_ENABLED: u64 = 1 << 11;
/// What INIT leaves of CR0: how caches work.
const CR0_CACHES: u64 = 3 << 29;

/// What such a vCPU has beside others.
pub(super) struct Bare {
    /// As of the last exit.
    ready: bool,
    cr8: u8,
    apic_base: u64,
    alarm: Option<Alarm>,
    after_init: AfterInit,
}

/// The registers that INIT sets, which are those of a new vCPU.
#[derive(Clone, Copy)]
struct AfterInit {
    regs: kvm_regs,
    sregs: kvm_sregs,
    debug: kvm_debugregs,
    events: kvm_vcpu_events,
}

impl Bare {
    /// Of a vCPU that was just created, whose APIC's base is set here.
    pub(super) fn new(fd: &VcpuFd, bootstrap: bool) -> Result<Self, Error> {
        const WHAT: &str = "read a vCPU's registers";
        let mut sregs = fd.get_sregs().to(WHAT)?;
        let apic_base = u64::from(LOCAL_APIC) | BASE_ENABLED | if bootstrap { BASE_BOOTSTRAP } else { 0 };
        sregs.apic_base = apic_base;
        fd.set_sregs(&sregs).to("set a vCPU's registers")?;
        let after_init = AfterInit {
            regs: fd.get_regs().to(WHAT)?,
            sregs,
            debug: fd.get_debug_regs().to(WHAT)?,
            events: fd.get_vcpu_events().to(WHAT)?,
        };
        Ok(Self { ready: false, cr8: 0, apic_base, alarm: None, after_init })
    }

    /// `KVM_RUN` has returned.
    pub(super) fn left(&mut self, run: &kvm_run) {
        self.ready = run.ready_for_interrupt_injection != 0;
        self.cr8 = (run.cr8 & 0xf) as u8;
        self.apic_base = run.apic_base;
    }

    /// The vCPU took over a state.
    pub(super) fn restored(&mut self, state: &CpuState) {
        let CpuState { regs, sregs, events, .. } = state;
        let delivers = events.interrupt.injected != 0 || events.exception.injected != 0;
        self.ready = regs.rflags & INTERRUPTS != 0 && events.interrupt.shadow == 0 && !delivers;
        self.cr8 = (sregs.cr8 & 0xf) as u8;
        self.apic_base = sregs.apic_base;
    }
}

/// Of a vCPU whose APIC is the kernel's all of this fails or does nothing.
const WITHOUT: &str = "its interrupt controllers are the kernel's";

impl Core for Vcpu {
    type Attached = kick::Attached;

    fn attach(&mut self) -> kick::Attached {
        if let Some(bare) = &mut self.bare {
            kick::sleep_exactly();
            if !bare.alarm.as_ref().is_some_and(Alarm::is_of_this_thread) {
                bare.alarm = Alarm::of_this_thread()
                    .inspect_err(|error| tracing::error!(%error, "A vCPU's timer cannot be had"))
                    .ok();
            }
        }
        self.set_alarm(None);
        kick::attach(self.kvm_run())
    }

    fn kick(&self) -> Kick {
        kick::of_this_thread()
    }

    fn set_alarm(&mut self, after: Option<Duration>) {
        if let Some(alarm) = self.bare.as_ref().and_then(|bare| bare.alarm.as_ref()) {
            alarm.set(after);
        }
    }

    fn ready(&self) -> bool {
        self.bare.as_ref().is_some_and(|bare| bare.ready)
    }

    fn inject(&mut self, vector: u8) -> Result<(), String> {
        let bare = self.bare.as_mut().ok_or(WITHOUT)?;
        bare.ready = false;
        let interrupt = kvm_interrupt { irq: vector.into() };
        // SAFETY: the descriptor is a vCPU's, and the kernel reads a `kvm_interrupt`.
        let result = unsafe { libc::ioctl(self.fd().as_raw_fd(), KVM_INTERRUPT, &raw const interrupt) };
        if result == 0 {
            return Ok(());
        }
        Err(format!("KVM refused an interrupt: {}", io::Error::last_os_error()))
    }

    fn inject_nmi(&mut self) -> Result<(), String> {
        self.fd().nmi().map_err(|error| format!("KVM refused an NMI: {error}"))
    }

    fn request_window(&mut self, wanted: bool) {
        self.kvm_run().request_interrupt_window = wanted.into();
    }

    fn cr8(&self) -> u8 {
        self.bare.as_ref().map_or(0, |bare| bare.cr8)
    }

    fn set_cr8(&mut self, value: u8) {
        self.kvm_run().cr8 = value.into();
    }

    fn apic_base(&self) -> u64 {
        self.bare.as_ref().map_or(0, |bare| bare.apic_base)
    }

    fn init(&mut self) -> Result<(), String> {
        self.take_init().map_err(|error| error.to_string())
    }

    fn start_up(&mut self, vector: u8) -> Result<(), String> {
        self.go_to_page(vector).map_err(|error| error.to_string())
    }
}

impl Vcpu {
    fn take_init(&mut self) -> Result<(), Error> {
        const WHAT: &str = "reset a vCPU";
        let now = self.fd().get_sregs().to(WHAT)?;
        let Some(bare) = &mut self.bare else { return Ok(()) };
        bare.ready = false;
        let AfterInit { regs, mut sregs, debug, events } = bare.after_init;
        sregs.apic_base = now.apic_base;
        sregs.cr0 = (sregs.cr0 & !CR0_CACHES) | (now.cr0 & CR0_CACHES);
        let fd = self.fd();
        fd.set_sregs(&sregs).to(WHAT)?;
        fd.set_regs(&regs).to(WHAT)?;
        fd.set_debug_regs(&debug).to(WHAT)?;
        fd.set_vcpu_events(&events).to(WHAT)
    }

    fn go_to_page(&mut self, vector: u8) -> Result<(), Error> {
        const WHAT: &str = "start a vCPU";
        let mut sregs = self.fd().get_sregs().to(WHAT)?;
        sregs.cs.selector = u16::from(vector) << 8;
        sregs.cs.base = u64::from(vector) << 12;
        self.fd().set_sregs(&sregs).to(WHAT)?;
        let mut regs = self.fd().get_regs().to(WHAT)?;
        regs.rip = 0;
        self.fd().set_regs(&regs).to(WHAT)
    }
}
