//! The machine on KVM: the partition (VM), its vCPUs, doorbells and interrupts.
//!
//! Everything above this folder is free of KVM's types and of `unsafe` ioctl handling.

mod alarm;
mod bare;
mod boot;
mod cpuid;
mod doorbell;
pub mod fitness;
mod interrupt;
mod kick;
mod msr;
mod partition;
mod state;
pub mod tsc;
mod vcpu;

use std::io;

pub use doorbell::Doorbells;
pub use fitness::{Fitness, fitness};
pub use interrupt::Interrupts;
pub use kick::{Attached, install_kick_handler, kick_signal};
pub use partition::{Controllers, Partition, missing_capabilities};
pub use state::{CpuState, PartitionState};
pub use vcpu::Vcpu;

/// KVM refused something.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `/dev/kvm` cannot be opened.
    #[error("Cannot open /dev/kvm ({source}): {}", mend(.source))]
    Open {
        /// Why not.
        source: io::Error,
    },
    /// A capability that Omega needs is missing.
    #[error("This kernel's KVM lacks {0}; Linux 5.10 or newer has it")]
    Missing(&'static str),
    /// A call failed.
    #[error("KVM refused to {what}: {source}")]
    Call {
        /// What was asked.
        what: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// A vCPU state does not fit this machine.
    #[error("The saved processor state does not fit: {0}")]
    State(String),
}

fn mend(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::NotFound => {
            "load the module (`modprobe kvm_intel` or `kvm_amd`) and switch VT-x or SVM on in the firmware"
        }
        io::ErrorKind::PermissionDenied => "add yourself to the group `kvm` and log in again",
        _ => "run `omega check` to see what is missing",
    }
}

/// Says what was asked of KVM when it refuses.
trait Context<T> {
    fn to(self, what: &'static str) -> Result<T, Error>;
}

impl<T> Context<T> for Result<T, kvm_ioctls::Error> {
    fn to(self, what: &'static str) -> Result<T, Error> {
        self.map_err(|error| Error::Call { what, source: io::Error::from_raw_os_error(error.errno()) })
    }
}

#[cfg(test)]
#[path = "micro_test.rs"]
mod micro;
