//! Whether `/dev/kvm` can run stock kernels.
//!
//! Some machines without VT-x or SVM have a `/dev/kvm` all the same: it creates VMs and interprets simple
//! instructions, at well under a thousandth of a processor's speed, but cannot run a kernel. A processor
//! that shows VT-x or SVM is proof enough of the opposite; where neither shows, a guest of a few
//! instructions decides, one of which no instruction interpreter knows.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use devices::GuestMemory;
use kvm_bindings::{KVM_EXIT_HLT, KVM_EXIT_INTERNAL_ERROR, kvm_regs};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::signal::Killable;

use super::{Context, Error, install_kick_handler, kick, kick_signal, partition};

/// What this PC's KVM is good for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fitness {
    /// It runs stock kernels.
    Fit,
    /// It runs only guests of simple instructions; why we think so.
    Unfit(String),
    /// There is none that we may use; why.
    Absent(String),
}

impl fmt::Display for Fitness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fit => write!(f, "KVM can run stock kernels"),
            Self::Unfit(why) => write!(f, "This PC's /dev/kvm cannot run stock kernels: {why}"),
            Self::Absent(why) => write!(f, "{why}"),
        }
    }
}

/// Looks at the processor and, only where that leaves a doubt, tries a guest of a few instructions.
#[must_use]
pub fn fitness() -> Fitness {
    if let Err(error) = partition::open() {
        return Fitness::Absent(error.to_string());
    }
    match hardware() {
        Ok(true) => Fitness::Fit,
        Ok(false) => match probe() {
            Ok(Probe::Ran) => Fitness::Fit,
            Ok(Probe::Failed(how)) => Fitness::Unfit(format!(
                "the processor shows neither VT-x nor SVM, and {how}; switch virtualization on in the \
                 firmware, or (in a virtual machine) let its host pass it on"
            )),
            Err(error) => Fitness::Unfit(format!("{error}, and the processor shows neither VT-x nor SVM")),
        },
        Err(error) => Fitness::Unfit(format!("the processor's features cannot be read: {error}")),
    }
}

/// Whether the first processor shows VT-x or SVM.
fn hardware() -> io::Result<bool> {
    // One processor's lines are enough, and the file is slow to read on large machines.
    let mut head = String::new();
    File::open("/proc/cpuinfo")?.take(16 << 10).read_to_string(&mut head)?;
    let flags = head.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    Ok(flags.split_whitespace().any(|flag| matches!(flag, "vmx" | "svm")))
}

enum Probe {
    Ran,
    Failed(String),
}

/// An addition of vectors, which every x86-64 processor has and KVM's interpreter has not; then a halt.
const GUEST: [u8; 5] = [0x66, 0x0f, 0xfe, 0xc1, 0xf4];
const SIZE: usize = 0x1000;
const CR4_OSFXSR: u64 = 1 << 9;
/// A guest of two instructions that takes this long does not run on a processor.
const PATIENCE: Duration = Duration::from_secs(2);

fn probe() -> Result<Probe, Error> {
    let kvm = partition::open()?;
    let vm = kvm.create_vm().to("create a virtual machine")?;
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), SIZE)])
        .map_err(|_| Error::Missing("memory for a trial guest"))?;
    memory.write_slice(&GUEST, GuestAddress(0)).map_err(|_| Error::Missing("memory for a trial guest"))?;
    partition::map(&vm, &memory)?;
    let vcpu = vm.create_vcpu(0).to("create a vCPU")?;
    let mut sregs = vcpu.get_sregs().to("read a vCPU's registers")?;
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    sregs.cr4 |= CR4_OSFXSR;
    vcpu.set_sregs(&sregs).to("set a vCPU's registers")?;
    let regs = kvm_regs { rflags: 2, ..Default::default() };
    vcpu.set_regs(&regs).to("set a vCPU's registers")?;
    Ok(match run(vcpu) {
        Some(Ok(KVM_EXIT_HLT)) => Probe::Ran,
        Some(Ok(KVM_EXIT_INTERNAL_ERROR)) => {
            Probe::Failed("its KVM interprets instructions in software and does not know all".into())
        }
        Some(Ok(reason)) => Probe::Failed(format!("a trial guest ended with exit reason {reason}")),
        Some(Err(error)) => Probe::Failed(format!("a trial guest did not run ({error})")),
        None => Probe::Failed("a trial guest of two instructions did not end".into()),
    })
}

/// Runs until the first exit and returns its reason; `None` if there was none in time.
fn run(mut vcpu: VcpuFd) -> Option<io::Result<u32>> {
    install_kick_handler().ok()?;
    let (sender, receiver) = mpsc::channel();
    let thread = thread::Builder::new().name("kvm-probe".into()).spawn(move || {
        let _attached = kick::attach(vcpu.get_kvm_run());
        let result = vcpu.run().map(drop).map_err(|error| io::Error::from_raw_os_error(error.errno()));
        let result = result.map(|()| vcpu.get_kvm_run().exit_reason);
        let _ = sender.send(result);
    });
    let thread = thread.ok()?;
    let result = receiver.recv_timeout(PATIENCE).ok();
    if result.is_none() {
        thread.kill(kick_signal()).ok()?;
    }
    thread.join().ok()?;
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kvm_without_hardware_is_unfit_and_one_with_it_is_fit() {
        match (fitness(), hardware()) {
            (Fitness::Absent(why), _) => eprintln!("cannot run: {why}"),
            (fitness, Ok(true)) => assert_eq!(fitness, Fitness::Fit),
            (fitness, _) => assert!(matches!(fitness, Fitness::Unfit(_)), "{fitness:?}"),
        }
    }

    #[test]
    fn a_trial_guest_agrees_with_what_the_processor_shows() {
        match (probe(), hardware()) {
            (Err(error @ Error::Open { .. }), _) => eprintln!("cannot run: {error}"),
            (Err(error), _) => panic!("the trial guest cannot be built: {error}"),
            (Ok(Probe::Ran), hardware) => assert!(hardware.expect("cpuinfo"), "it ran without hardware"),
            (Ok(Probe::Failed(how)), hardware) => assert!(!hardware.expect("cpuinfo"), "{how}"),
        }
    }
}
