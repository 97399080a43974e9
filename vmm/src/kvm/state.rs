//! The state of a vCPU and of a partition as values.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_debugregs,
    kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_pit_state2, kvm_regs, kvm_sregs, kvm_vcpu_events,
    kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

use super::{Context, Controllers, Error, msr};

/// Everything that a vCPU is, except its CPUID, which follows from the machine's configuration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CpuState {
    pub(super) regs: kvm_regs,
    pub(super) sregs: kvm_sregs,
    /// The extended state, as 1024 words.
    xsave: Vec<u32>,
    xcrs: kvm_xcrs,
    debug: kvm_debugregs,
    pub(super) events: kvm_vcpu_events,
    mp: kvm_mp_state,
    /// The local APIC's register page, where it is the kernel's.
    lapic: Option<Vec<u8>>,
    msrs: Vec<(u32, u64)>,
}

impl CpuState {
    /// Without the time stamp counter, which a reset leaves running.
    #[must_use]
    pub fn without_clock(mut self) -> Self {
        self.msrs.retain(|(index, _)| !msr::is_clock(*index));
        self
    }

    /// A model-specific register's value, where the vCPU has it.
    #[must_use]
    pub fn msr(&self, index: u32) -> Option<u64> {
        self.msrs.iter().find(|(found, _)| *found == index).map(|(_, value)| *value)
    }

    pub(super) fn save(fd: &VcpuFd, msrs: &[u32], controllers: Controllers) -> Result<Self, Error> {
        const WHAT: &str = "save a vCPU";
        // KVM settles pending events and INIT in this call, so it goes first.
        let mp = fd.get_mp_state().to(WHAT)?;
        let lapic = match controllers {
            Controllers::Kernel => Some(fd.get_lapic().to(WHAT)?),
            Controllers::Userspace => None,
        };
        Ok(Self {
            mp,
            regs: fd.get_regs().to(WHAT)?,
            sregs: fd.get_sregs().to(WHAT)?,
            xsave: fd.get_xsave().to(WHAT)?.region.to_vec(),
            xcrs: fd.get_xcrs().to(WHAT)?,
            debug: fd.get_debug_regs().to(WHAT)?,
            lapic: lapic.map(|lapic| lapic.regs.iter().map(|byte| *byte as u8).collect()),
            msrs: msr::read(fd, msrs)?,
            events: fd.get_vcpu_events().to(WHAT)?,
        })
    }

    pub(super) fn restore(&self, fd: &VcpuFd) -> Result<(), Error> {
        const WHAT: &str = "restore a vCPU";
        let mut xsave = kvm_xsave::default();
        if self.xsave.len() != xsave.region.len() {
            return Err(Error::State(format!("its extended state has {} words", self.xsave.len())));
        }
        xsave.region.copy_from_slice(&self.xsave);
        let lapic = self.lapic.as_deref().map(lapic).transpose()?;
        fd.set_mp_state(self.mp).to(WHAT)?;
        fd.set_regs(&self.regs).to(WHAT)?;
        fd.set_sregs(&self.sregs).to(WHAT)?;
        super::vcpu::set_xsave(fd, &xsave).to(WHAT)?;
        fd.set_xcrs(&self.xcrs).to(WHAT)?;
        fd.set_debug_regs(&self.debug).to(WHAT)?;
        // The APIC's base and mode came with `sregs`; its timer's deadline comes with the MSRs.
        if let Some(lapic) = lapic {
            fd.set_lapic(&lapic).to(WHAT)?;
        }
        msr::write(fd, &self.msrs)?;
        fd.set_vcpu_events(&self.events).to(WHAT)
    }
}

/// The kernel's form of a local APIC's page.
fn lapic(bytes: &[u8]) -> Result<kvm_lapic_state, Error> {
    let mut lapic = kvm_lapic_state::default();
    if bytes.len() != lapic.regs.len() {
        return Err(Error::State(format!("its local APIC has {} bytes", bytes.len())));
    }
    for (to, from) in lapic.regs.iter_mut().zip(bytes) {
        *to = *from as libc::c_char;
    }
    Ok(lapic)
}

/// What of a machine lives in KVM beside its vCPUs.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PartitionState {
    /// Of the kernel's interrupt controllers; none where they are Omega's own.
    chips: Vec<kvm_irqchip>,
    pit: Option<kvm_pit_state2>,
    clock: Option<kvm_clock_data>,
}

impl PartitionState {
    /// Without the clock, which a reset leaves running.
    #[must_use]
    pub fn without_clock(mut self) -> Self {
        self.clock = None;
        self
    }

    pub(super) fn save(vm: &VmFd, controllers: Controllers) -> Result<Self, Error> {
        const WHAT: &str = "save the interrupt controllers";
        let mut clock = vm.get_clock().to("save the clock")?;
        // The host's time stamps and flags mean nothing elsewhere.
        clock.flags = 0;
        let clock = Some(clock);
        if controllers == Controllers::Userspace {
            return Ok(Self { chips: Vec::new(), pit: None, clock });
        }
        let chips = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC]
            .map(|chip_id| {
                let mut chip = kvm_irqchip { chip_id, ..Default::default() };
                vm.get_irqchip(&mut chip).to(WHAT).map(|()| chip)
            })
            .into_iter()
            .collect::<Result<_, _>>()?;
        Ok(Self { chips, pit: Some(vm.get_pit2().to("save the timer")?), clock })
    }

    pub(super) fn restore(&self, vm: &VmFd) -> Result<(), Error> {
        for chip in &self.chips {
            vm.set_irqchip(chip).to("restore the interrupt controllers")?;
        }
        if let Some(pit) = &self.pit {
            vm.set_pit2(pit).to("restore the timer")?;
        }
        match &self.clock {
            Some(clock) => vm.set_clock(clock).to("restore the clock"),
            None => Ok(()),
        }
    }
}
