//! A vCPU of a machine, whoever runs it and has its local APIC.

use devices::GuestMemory;
use serde::{Deserialize, Serialize};

use super::Error;
use crate::cpu::{ApicCpu, ApicState, Core, Kick, Place, Processor};
use crate::kvm::{self, Attached, CpuState};
use crate::loader::Entry;

/// All of a vCPU, as a value.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct VcpuState {
    /// The processor.
    pub(crate) cpu: CpuState,
    /// Its local APIC, where that is not the kernel's.
    pub(crate) apic: Option<ApicState>,
}

impl VcpuState {
    /// Without the time stamp counter, which a reset leaves running.
    pub(super) fn without_clock(self) -> Self {
        Self { cpu: self.cpu.without_clock(), ..self }
    }
}

/// What a machine asks of a vCPU. All but [`attach`](Self::attach) and what [`Processor`] has only while it does not run.
pub(crate) trait Vcpu: Processor + Send {
    /// Makes the calling thread the one that runs it, while the result lives.
    fn attach(&mut self) -> Option<Attached>;
    /// What makes it leave guest code; `None`: the signal of a kick to its thread.
    fn kick(&self) -> Option<Kick>;
    /// Its state.
    fn save(&mut self) -> Result<VcpuState, Error>;
    /// Takes over a state.
    fn restore(&mut self, state: &VcpuState) -> Result<(), Error>;
    /// By how much its time stamp counter is ahead of this PC's, wrapping.
    fn tsc_offset(&self) -> Result<u64, Error> {
        Ok(0)
    }
    /// Makes it so.
    fn set_tsc_offset(&mut self, _offset: u64) -> Result<(), Error> {
        Ok(())
    }
    /// Where others reach its local APIC, if that is not the kernel's.
    fn place(&self) -> Option<Place> {
        None
    }
    /// It runs somewhere else from now on.
    fn leave(&mut self) {}
    /// Sets what firmware sets on every processor.
    fn set_up(&mut self) -> Result<(), Error>;
    /// Puts it at a kernel's entry point.
    fn boot(&mut self, entry: &Entry, memory: &GuestMemory) -> Result<(), Error>;
}

fn mismatch() -> Error {
    Error::Kvm(kvm::Error::State("its local APIC is of the other kind".into()))
}

impl Vcpu for kvm::Vcpu {
    fn attach(&mut self) -> Option<Attached> {
        Some(Core::attach(self))
    }

    fn kick(&self) -> Option<Kick> {
        None
    }

    fn save(&mut self) -> Result<VcpuState, Error> {
        Ok(VcpuState { cpu: kvm::Vcpu::save(self)?, apic: None })
    }

    fn restore(&mut self, state: &VcpuState) -> Result<(), Error> {
        if state.apic.is_some() {
            return Err(mismatch());
        }
        Ok(kvm::Vcpu::restore(self, &state.cpu)?)
    }

    fn set_up(&mut self) -> Result<(), Error> {
        Ok(kvm::Vcpu::set_up(self)?)
    }

    fn boot(&mut self, entry: &Entry, memory: &GuestMemory) -> Result<(), Error> {
        Ok(kvm::Vcpu::boot(self, entry, memory)?)
    }
}

impl Vcpu for ApicCpu<kvm::Vcpu> {
    fn attach(&mut self) -> Option<Attached> {
        Some(ApicCpu::attach(self))
    }

    fn kick(&self) -> Option<Kick> {
        let inbox = std::sync::Arc::clone(self.inbox());
        Some(Box::new(move || inbox.kick()))
    }

    fn tsc_offset(&self) -> Result<u64, Error> {
        Ok(self.core().tsc_offset()?)
    }

    fn set_tsc_offset(&mut self, offset: u64) -> Result<(), Error> {
        Ok(self.core_mut().set_tsc_offset(offset)?)
    }

    fn place(&self) -> Option<Place> {
        Some(Place::Here(std::sync::Arc::clone(self.inbox())))
    }

    fn save(&mut self) -> Result<VcpuState, Error> {
        Ok(VcpuState { apic: Some(self.state()), cpu: self.core().save()? })
    }

    fn restore(&mut self, state: &VcpuState) -> Result<(), Error> {
        let apic = state.apic.as_ref().ok_or_else(mismatch)?;
        self.core_mut().restore(&state.cpu)?;
        ApicCpu::restore(self, apic);
        Ok(())
    }

    fn set_up(&mut self) -> Result<(), Error> {
        self.set_virtual_wire();
        Ok(self.core().set_up()?)
    }

    fn boot(&mut self, entry: &Entry, memory: &GuestMemory) -> Result<(), Error> {
        Ok(self.core().boot(entry, memory)?)
    }
}
