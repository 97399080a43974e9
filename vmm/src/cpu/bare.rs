//! What a processor has to be able to do whose interrupt controller is not the hypervisor's.

use std::time::Duration;

use devices::interrupt::Nanos;

use super::{Kick, Processor};

/// A processor without a local APIC, as a hypervisor has it. [`ApicCpu`](super::ApicCpu) gives it one.
///
/// [`enter`](Processor::enter) returns [`VmExit::Interrupted`](super::VmExit::Interrupted) when it was kicked, when the
/// alarm went off, when the window opened that was asked for, and when the guest lowered CR8; and
/// [`VmExit::Halted`](super::VmExit::Halted) after a HLT, behind which the next `enter` goes on.
pub trait Core: Processor {
    /// While it lives, kicks and the alarm reach the calling thread.
    type Attached;

    /// Directs kicks and alarms to the calling thread, which is to run this processor.
    fn attach(&mut self) -> Self::Attached;
    /// Makes the calling thread leave guest code, if it is there or about to enter it. Callable from any thread, for
    /// ever.
    fn kick(&self) -> Kick;
    /// Makes [`enter`](Processor::enter) return after `after` at the latest; `None`: no more. It may return for an alarm
    /// that was taken back.
    fn set_alarm(&mut self, after: Option<Duration>);

    /// Whether the next instruction can be interrupted: RFLAGS.IF is set, nothing shields it, and no other event is
    /// about to be delivered. As of the last exit; `false` where that is not known.
    fn ready(&self) -> bool;
    /// Makes it take the interrupt `vector` before its next instruction. Only when [`ready`](Self::ready), which is
    /// false afterwards.
    ///
    /// # Errors
    /// The hypervisor refuses; in words.
    fn inject(&mut self, vector: u8) -> Result<(), String>;
    /// Makes it take an NMI, as soon as it takes any.
    ///
    /// # Errors
    /// The hypervisor refuses; in words.
    fn inject_nmi(&mut self) -> Result<(), String>;
    /// Makes it exit when it becomes ready, or no more.
    fn request_window(&mut self, wanted: bool);

    /// CR8, as of the last exit.
    fn cr8(&self) -> u8;
    /// Sets CR8 for the next entry.
    fn set_cr8(&mut self, value: u8);
    /// IA32_APIC_BASE, as of the last exit.
    fn apic_base(&self) -> u64;

    /// Takes the state that a processor has after INIT (Intel SDM vol. 3A, table "IA-32 and Intel 64 Processor States
    /// Following Power-up, Reset, or INIT"). Only while no access is unfinished.
    ///
    /// # Errors
    /// The hypervisor refuses; in words.
    fn init(&mut self) -> Result<(), String>;
    /// Goes to where the SIPI `vector` says: real mode, the beginning of page `vector`.
    ///
    /// # Errors
    /// The hypervisor refuses; in words.
    fn start_up(&mut self, vector: u8) -> Result<(), String>;
}

/// How long it is from `now` until `deadline`; nothing if that is past.
pub(super) fn until(deadline: Nanos, now: Nanos) -> Duration {
    Duration::from_nanos(deadline.since(now))
}
