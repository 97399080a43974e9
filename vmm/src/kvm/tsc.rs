//! The time stamp counter of a vCPU: its rate and its offset to this PC's.
//!
//! ```text
//! what RDTSC returns in the guest  =  this PC's counter × guest's rate ÷ this PC's rate  +  offset
//! ```
//!
//! KVM keeps one offset for each vCPU and lets it be set to the tick (`KVM_VCPU_TSC_OFFSET`, Linux 5.16). Older kernels
//! only take a value for the counter (`IA32_TSC`), which they replace by one of their own if it comes within a second of
//! what another vCPU was given: good for setting up a machine, not for steering a clock, so it is not used.
#![allow(unsafe_code)] // Reads the processor's counter, and a device attribute of a vCPU, which has no safe call.

use std::io;

use devices::interrupt::Tsc;
use kvm_bindings::{KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, kvm_device_attr};
use kvm_ioctls::{Cap, VcpuFd};
use vmm_sys_util::ioctl::ioctl_with_ref;

use super::{Context, Error, Vcpu, partition};

/// `_IOW(KVMIO, number, struct kvm_device_attr)`.
const fn request(number: u32) -> libc::c_ulong {
    (1 << 30 | (size_of::<kvm_device_attr>() as u32) << 16 | KVMIO << 8 | number) as libc::c_ulong
}

const KVM_SET_DEVICE_ATTR: libc::c_ulong = request(0xe1);
const KVM_GET_DEVICE_ATTR: libc::c_ulong = request(0xe2);
const KVM_HAS_DEVICE_ATTR: libc::c_ulong = request(0xe3);

/// How far two rates may be apart, in parts per million, for KVM to call them the same and leave the counter unscaled.
/// Such a difference is left to the guest's clock, as that of two crystals is.
const SAME_PPM: u64 = 250;

/// This PC's time stamp counter.
#[must_use]
pub fn now() -> Tsc {
    // SAFETY: every x86-64 processor has the counter, and Linux lets user space read it.
    Tsc(unsafe { core::arch::x86_64::_rdtsc() })
}

/// How this PC's time stamp counter is turned into a guest's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// This PC's, in kHz.
    pub host_khz: u32,
    /// The guest's, in kHz.
    pub guest_khz: u32,
}

impl Rate {
    /// Whether KVM scales the counter; otherwise a guest's counter runs exactly as fast as this PC's.
    #[must_use]
    pub fn scales(self) -> bool {
        let difference = u64::from(self.host_khz.abs_diff(self.guest_khz));
        difference * 1_000_000 > u64::from(self.host_khz) * SAME_PPM
    }

    /// What a guest's counter without offset reads when this PC's reads `host`. Where it is scaled, KVM's own
    /// arithmetic has fewer bits, so its counter runs away from this by less than a tick in four billion.
    #[must_use]
    pub fn to_guest(self, host: Tsc) -> Tsc {
        if !self.scales() || self.host_khz == 0 {
            return host;
        }
        Tsc((u128::from(host.0) * u128::from(self.guest_khz) / u128::from(self.host_khz)) as u64)
    }
}

/// What this PC's KVM can do with time stamp counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Abilities {
    /// This PC's rate in kHz.
    pub khz: u32,
    /// Whether guests may have another rate.
    pub scaling: bool,
    /// Whether a vCPU's offset can be set.
    pub offsets: bool,
}

impl Abilities {
    /// Of this PC.
    ///
    /// # Errors
    /// [`Error::Open`], or KVM refuses a trial vCPU.
    pub fn of_this_pc() -> Result<Self, Error> {
        let kvm = partition::open()?;
        let vm = kvm.create_vm().to("create a virtual machine")?;
        let fd = vm.create_vcpu(0).to("create a vCPU")?;
        let khz = fd.get_tsc_khz().to("tell the rate of its time stamp counter")?;
        Ok(Self { khz, scaling: kvm.check_extension(Cap::TscControl), offsets: has_offset(&fd) })
    }

    /// Why this PC, called `node`, cannot run vCPUs of a guest whose counter has `guest_khz`; `None`: it can.
    #[must_use]
    pub fn refusal(&self, node: &str, guest_khz: u32) -> Option<String> {
        let rate = Rate { host_khz: self.khz, guest_khz };
        if !self.offsets {
            let what = "KVM cannot set the offset of a time stamp counter; Linux 5.16 or newer can";
            return Some(format!("{node}'s {what}"));
        }
        (rate.scales() && !self.scaling).then(|| {
            format!(
                "{node}'s time stamp counter runs at {} kHz and the guest's at {guest_khz} kHz, and its processor cannot \
                 scale it; choose a PC of the same rate, or a processor with TSC scaling",
                self.khz
            )
        })
    }
}

/// Has the vCPU's counter run at `khz`.
pub(super) fn set_rate(fd: &VcpuFd, khz: u32) -> Result<(), Error> {
    if fd.get_tsc_khz().is_ok_and(|now| !Rate { host_khz: now, guest_khz: khz }.scales()) {
        return Ok(());
    }
    fd.set_tsc_khz(khz).to("scale the time stamp counter")
}

impl Vcpu {
    /// What is added to this PC's counter, scaled, to make the guest's; wrapping.
    ///
    /// # Errors
    /// KVM refuses: it is older than Linux 5.16.
    pub fn tsc_offset(&self) -> Result<u64, Error> {
        let mut offset = 0;
        attribute(self.fd(), KVM_GET_DEVICE_ATTR, &raw mut offset)
            .to("tell a time stamp counter's offset")?;
        Ok(offset)
    }

    /// Sets what is added to this PC's counter, from the next entry on. A jump that the guest must not see is the
    /// caller's to avoid.
    ///
    /// # Errors
    /// As [`Vcpu::tsc_offset`].
    pub fn set_tsc_offset(&mut self, mut offset: u64) -> Result<(), Error> {
        attribute(self.fd(), KVM_SET_DEVICE_ATTR, &raw mut offset).to("set a time stamp counter's offset")
    }

    /// Has the guest's counter read `guest` when this PC's reads `host`.
    ///
    /// # Errors
    /// As [`Vcpu::tsc_offset`].
    pub fn set_tsc(&mut self, guest: Tsc, host: Tsc, rate: Rate) -> Result<(), Error> {
        self.set_tsc_offset(guest.0.wrapping_sub(rate.to_guest(host).0))
    }
}

fn has_offset(fd: &VcpuFd) -> bool {
    attribute(fd, KVM_HAS_DEVICE_ATTR, std::ptr::null_mut()).is_ok()
}

/// Calls for the offset's attribute with the number at `value`.
fn attribute(fd: &VcpuFd, call: libc::c_ulong, value: *mut u64) -> Result<(), kvm_ioctls::Error> {
    let attribute = kvm_device_attr {
        group: KVM_VCPU_TSC_CTRL,
        attr: KVM_VCPU_TSC_OFFSET.into(),
        addr: value as u64,
        flags: 0,
    };
    // SAFETY: the kernel reads `attribute`, and reads or writes the eight bytes at `value`, which the callers own;
    // to ask whether there is such an attribute, it touches none.
    match unsafe { ioctl_with_ref(fd, call, &attribute) } {
        0 => Ok(()),
        _ => Err(kvm_ioctls::Error::new(io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_a_crystal_apart_are_left_alone_and_others_are_scaled() {
        assert!(!Rate { host_khz: 2_600_000, guest_khz: 2_600_500 }.scales());
        let rate = Rate { host_khz: 2_000_000, guest_khz: 3_000_000 };
        assert!(rate.scales());
        assert_eq!(rate.to_guest(Tsc(1 << 62)), Tsc(3 << 61));
        assert_eq!(Rate { host_khz: 0, guest_khz: 0 }.to_guest(Tsc(5)), Tsc(5));
    }

    #[test]
    fn a_pc_that_cannot_keep_the_guests_time_is_refused_with_the_reason() {
        let able = Abilities { khz: 2_000_000, scaling: true, offsets: true };
        assert_eq!(able.refusal("attic", 3_000_000), None);
        let fixed = Abilities { scaling: false, ..able };
        assert_eq!(fixed.refusal("attic", 2_000_100), None);
        let why = fixed.refusal("attic", 3_000_000).expect("it cannot scale");
        assert!(
            why.starts_with("attic's time stamp counter runs at 2000000 kHz and the guest's at 3000000 kHz"),
            "{why}"
        );
        let old = Abilities { offsets: false, ..able }.refusal("attic", 2_000_000).expect("it is too old");
        assert!(old.contains("Linux 5.16"), "{old}");
    }
}
