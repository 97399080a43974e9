//! A VM: its memory, its clock and, unless they are Omega's own, its interrupt controllers in the kernel.
#![allow(unsafe_code)] // Handing guest memory to KVM.

use std::io;
use std::sync::Arc;

use devices::GuestMemory;
use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VmFd};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use super::bare::Bare;
use super::{Context, Doorbells, Error, Interrupts, PartitionState, Vcpu, cpuid, msr, tsc};
use crate::span::features::Features;

/// Where KVM keeps three pages for VMX's real mode, below the local APICs and off all RAM (`KVM_SET_TSS_ADDR`).
const TSS: usize = 0xfffb_d000;

const LIST_CPUID: &str = "list its CPUID leaves";

const NEEDED: [(Cap, &str); 10] = [
    (Cap::UserMemory, "user memory"),
    (Cap::Irqchip, "the in-kernel interrupt controllers"),
    (Cap::Pit2, "the in-kernel timer"),
    (Cap::Irqfd, "irqfd"),
    (Cap::Ioeventfd, "ioeventfd"),
    (Cap::IrqRouting, "interrupt routing"),
    (Cap::SignalMsi, "message-signalled interrupts"),
    (Cap::ImmediateExit, "immediate exit"),
    (Cap::ExtCpuid, "CPUID filtering"),
    (Cap::VcpuEvents, "vCPU events"),
];

/// Whose interrupt controllers a VM has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Controllers {
    /// The kernel's, which know the vCPUs of one VM and nobody else. They are fast.
    Kernel,
    /// Omega's own, outside of KVM: vCPUs are to be run as [`ApicCpu`](crate::cpu::ApicCpu)s, on as many PCs as one
    /// likes.
    Userspace,
}

/// A VM on KVM.
pub struct Partition {
    // Dropped after the VM: KVM reads guest memory until then.
    vm: Arc<VmFd>,
    memory: GuestMemory,
    supported: CpuId,
    msrs: Vec<u32>,
    tsc_deadline: bool,
    topology: cpuid::Topology,
    /// The rate of the guest's time stamp counter, where it is not this PC's.
    tsc_khz: Option<u32>,
    controllers: Controllers,
}

impl Partition {
    /// Creates a VM with `memory` mapped at its addresses, for vCPUs of a guest that has `cpus` of them; if its
    /// `controllers` are the kernel's, with them and a PIT.
    ///
    /// # Errors
    /// [`Error::Open`], [`Error::Missing`], or KVM refuses a step.
    pub fn new(memory: GuestMemory, cpus: u8, controllers: Controllers) -> Result<Self, Error> {
        let kvm = open()?;
        if let Some((_, name)) = NEEDED.iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
            return Err(Error::Missing(name));
        }
        let vm = kvm.create_vm().to("create a virtual machine")?;
        map(&vm, &memory)?;
        vm.set_tss_address(TSS).to("set the task state segment's address")?;
        if controllers == Controllers::Kernel {
            vm.create_irq_chip().to("create the interrupt controllers")?;
            let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
            vm.create_pit2(pit).to("create the interval timer")?;
        }
        let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).to(LIST_CPUID)?;
        let msrs = msr::saved(&kvm)?;
        let tsc_deadline = controllers == Controllers::Kernel && kvm.check_extension(Cap::TscDeadlineTimer);
        let topology = cpuid::Topology::on_one_pc(cpus);
        let vm = Arc::new(vm);
        Ok(Self { vm, memory, supported, msrs, tsc_deadline, topology, tsc_khz: None, controllers })
    }

    /// Creates a member's part of a guest on several PCs: a VM with `memory`, without controllers in the kernel, whose
    /// vCPUs see `shown` (see [`intersection()`](crate::span::features::intersection())) and a time stamp counter of
    /// `tsc_khz`. The members run `counts` vCPUs each, in order.
    ///
    /// # Errors
    /// As [`Partition::new`], or there are too many leaves.
    pub fn spanning(
        memory: GuestMemory,
        shown: &Features,
        counts: &[u8],
        tsc_khz: u32,
    ) -> Result<Self, Error> {
        let topology = cpuid::Topology::across(counts);
        let mut partition = Self::new(memory, topology.count, Controllers::Userspace)?;
        (partition.topology, partition.tsc_khz) = (topology, Some(tsc_khz));
        partition.supported = cpuid::of_features(shown)?;
        partition.msrs.clone_from(&shown.msrs);
        Ok(partition)
    }

    /// What this PC's KVM can show a vCPU.
    ///
    /// # Errors
    /// [`Error::Open`], or KVM refuses.
    pub fn host_features() -> Result<Features, Error> {
        let kvm = open()?;
        let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).to(LIST_CPUID)?;
        let mut msrs = msr::saved(&kvm)?;
        msrs.sort_unstable();
        msrs.dedup();
        let arch_capabilities = msr::arch_capabilities(&kvm);
        Ok(Features { leaves: cpuid::leaves(&supported).collect(), msrs, arch_capabilities })
    }

    /// The guest's memory.
    #[must_use]
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// How many bits a guest-physical address has on this PC.
    ///
    /// # Errors
    /// [`Error::Open`], or KVM refuses.
    pub fn host_address_bits() -> Result<u8, Error> {
        let supported = open()?.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).to(LIST_CPUID)?;
        Ok(cpuid::address_bits(&supported))
    }

    /// Registers `KVM_IOEVENTFD`s.
    #[must_use]
    pub fn doorbells(&self) -> Doorbells {
        Doorbells::new(Arc::clone(&self.vm))
    }

    /// The in-kernel interrupt controllers as devices see them.
    ///
    /// # Errors
    /// There are none, or KVM refuses the routing of the wired interrupts.
    pub fn interrupts(&self) -> Result<Interrupts, Error> {
        Interrupts::new(Arc::clone(&self.vm))
    }

    /// Creates vCPU `index`, in the state of power-on.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn vcpu(&self, index: u8) -> Result<Vcpu, Error> {
        let fd = self.vm.create_vcpu(index.into()).to("create a vCPU")?;
        if let Some(khz) = self.tsc_khz {
            tsc::set_rate(&fd, khz)?;
        }
        let tsc_khz = self.tsc_khz.or_else(|| fd.get_tsc_khz().ok());
        let mut cpuid = cpuid::of_vcpu(&self.supported, index, self.topology, tsc_khz, self.tsc_deadline)?;
        if self.controllers == Controllers::Userspace {
            cpuid::hide_kernel_apic(&mut cpuid);
        }
        fd.set_cpuid2(&cpuid).to("set a vCPU's CPUID leaves")?;
        let bare = match self.controllers {
            Controllers::Kernel => None,
            Controllers::Userspace => Some(Bare::new(&fd, index == 0)?),
        };
        Ok(Vcpu::new(fd, index, self.msrs.clone(), bare))
    }

    /// The state of the clock, and of the kernel's interrupt controllers and timer if there are any. Only while no vCPU runs.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn save(&self) -> Result<PartitionState, Error> {
        PartitionState::save(&self.vm, self.controllers)
    }

    /// Takes over a saved state. Only while no vCPU runs.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn restore(&self, state: &PartitionState) -> Result<(), Error> {
        state.restore(&self.vm)
    }
}

pub(super) fn open() -> Result<Kvm, Error> {
    Kvm::new().map_err(|error| Error::Open { source: io::Error::from_raw_os_error(error.errno()) })
}

/// The capabilities that Omega needs and this KVM lacks.
///
/// # Errors
/// [`Error::Open`].
pub fn missing_capabilities() -> Result<Vec<&'static str>, Error> {
    let kvm = open()?;
    Ok(NEEDED.iter().filter(|(cap, _)| !kvm.check_extension(*cap)).map(|(_, name)| *name).collect())
}

/// Maps guest memory; `memory` must live as long as the VM.
pub(super) fn map(vm: &VmFd, memory: &GuestMemory) -> Result<(), Error> {
    for (slot, region) in memory.iter().enumerate() {
        let host = region.get_host_address(MemoryRegionAddress(0)).map_err(|_| Error::Call {
            what: "map guest memory",
            source: io::ErrorKind::InvalidInput.into(),
        })?;
        let region = kvm_userspace_memory_region {
            slot: slot as u32,
            flags: 0,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: host as u64,
        };
        // SAFETY: the region is a mapping of exactly this size, the caller keeps it as long as the VM, and
        // regions of one `GuestMemory` do not overlap.
        unsafe { vm.set_user_memory_region(region) }.to("map guest memory")?;
    }
    Ok(())
}
