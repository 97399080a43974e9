//! Model-specific registers: which are saved, and which are set for a boot.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};

use super::{Context, Error};

/// The time stamp counter, which keeps running over a reset.
pub(super) const IA32_TSC: u32 = 0x10;
const IA32_TSC_ADJUST: u32 = 0x3b;
const IA32_ARCH_CAPABILITIES: u32 = 0x10a;
const IA32_MISC_ENABLE: u32 = 0x1a0;
/// Fast string operations (Intel SDM volume 4, table 2-2).
const FAST_STRINGS: u64 = 1;
const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs on, default type write-back (Intel SDM volume 3, section 12.11.2.1).
const MTRR_WRITE_BACK: u64 = 1 << 11 | 6;

/// The registers that make up a vCPU's state on this kernel.
pub(super) fn saved(kvm: &Kvm) -> Result<Vec<u32>, Error> {
    let list = kvm.get_msr_index_list().to("list the model-specific registers")?;
    Ok(list.as_slice().to_vec())
}

/// `IA32_ARCH_CAPABILITIES` as KVM gives it to a vCPU; 0 where there is none.
pub(super) fn arch_capabilities(kvm: &Kvm) -> u64 {
    let entry = kvm_msr_entry { index: IA32_ARCH_CAPABILITIES, ..Default::default() };
    let read = Msrs::from_entries(&[entry]).ok().and_then(|mut msrs| {
        let count = kvm.get_msrs(&mut msrs).ok()?;
        (count == 1).then(|| msrs.as_slice().first().map(|entry| entry.data))?
    });
    read.unwrap_or(0)
}

/// Whether a register is one of the machine's clock rather than of the processor.
pub(super) fn is_clock(index: u32) -> bool {
    matches!(index, IA32_TSC | IA32_TSC_ADJUST)
}

/// Reads registers, leaving out those that this vCPU does not have.
pub(super) fn read(fd: &VcpuFd, indices: &[u32]) -> Result<Vec<(u32, u64)>, Error> {
    const WHAT: &str = "read the model-specific registers";
    let mut values = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let entries: Vec<_> =
            rest.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
        let mut msrs = Msrs::from_entries(&entries)
            .map_err(|_| Error::State("there are too many model-specific registers".into()))?;
        let count = fd.get_msrs(&mut msrs).to(WHAT)?;
        values.extend(msrs.as_slice().iter().take(count).map(|entry| (entry.index, entry.data)));
        // The one after the last that was read is what this vCPU lacks.
        rest = rest.get(count + 1..).unwrap_or_default();
    }
    Ok(values)
}

/// Writes registers. One that KVM lists, reads as zero and refuses to write as zero is left alone.
pub(super) fn write(fd: &VcpuFd, values: &[(u32, u64)]) -> Result<(), Error> {
    const WHAT: &str = "write the model-specific registers";
    let mut rest = values;
    while !rest.is_empty() {
        let entries: Vec<_> =
            rest.iter().map(|&(index, data)| kvm_msr_entry { index, data, ..Default::default() }).collect();
        let msrs = Msrs::from_entries(&entries)
            .map_err(|_| Error::State("there are too many model-specific registers".into()))?;
        let count = fd.set_msrs(&msrs).to(WHAT)?;
        match rest.get(count) {
            Some((index, data)) if *data != 0 => {
                return Err(Error::State(format!("register {index:#x} does not take {data:#x}")));
            }
            _ => rest = rest.get(count + 1..).unwrap_or_default(),
        }
    }
    Ok(())
}

/// What firmware leaves in the registers when it starts an operating system.
pub(super) fn set_for_boot(fd: &VcpuFd) -> Result<(), Error> {
    let entries = [(IA32_MISC_ENABLE, FAST_STRINGS), (IA32_MTRR_DEF_TYPE, MTRR_WRITE_BACK)]
        .map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() });
    for entry in entries {
        let msrs = Msrs::from_entries(&[entry])
            .map_err(|_| Error::State("there are too many model-specific registers".into()))?;
        // Either may be missing from a vCPU of another maker; Linux does without.
        fd.set_msrs(&msrs).to("write the model-specific registers")?;
    }
    Ok(())
}
