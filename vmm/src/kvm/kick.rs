//! Making a vCPU's thread leave guest code: a signal whose handler sets `immediate_exit`, so that a kick
//! between the check for one and `KVM_RUN` is not lost either.
#![allow(unsafe_code)] // A signal handler that reaches `kvm_run` through a thread-local pointer.

use std::cell::Cell;
use std::io;
use std::marker::PhantomData;
use std::ptr;

use kvm_bindings::kvm_run;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use crate::cpu::Kick;

/// The signal of a kick.
#[must_use]
pub fn kick_signal() -> i32 {
    SIGRTMIN()
}

thread_local! {
    /// `immediate_exit` of the vCPU that this thread runs. Const-initialized and without a destructor, so
    /// that a signal handler may read it at any time.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let target = IMMEDIATE_EXIT.get();
    if !target.is_null() {
        // SAFETY: the pointer is set only while the vCPU's mapping lives ([`Attached`]), and this handler
        // runs on the thread that owns the vCPU.
        unsafe { target.write_volatile(1) };
    }
}

/// Installs the handler of the kick's signal for this process.
///
/// # Errors
/// The kernel refuses.
pub fn install_kick_handler() -> io::Result<()> {
    register_signal_handler(kick_signal(), on_kick)
        .map_err(|error| io::Error::from_raw_os_error(error.errno()))
}

/// Kicks the thread that called this: for ever, also when that has ended.
pub(super) fn of_this_thread() -> Kick {
    // SAFETY: these take nothing and cannot fail.
    let (process, thread) = unsafe { (libc::getpid(), libc::gettid()) };
    let signal = kick_signal();
    Box::new(move || {
        // SAFETY: sends a signal that this process handles, to a thread of its own; a number that none has any more
        // is an error that means nothing, and to one that got it anew a kick does nothing.
        unsafe { libc::syscall(libc::SYS_tgkill, process, thread, signal) };
    })
}

/// Lets the calling thread sleep to the nanosecond: a halted vCPU's timer is not to be late by the 50 us that the
/// kernel allows itself for others.
pub(super) fn sleep_exactly() {
    // SAFETY: takes a number, and changes nothing but when this thread's waits end.
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1_u64) };
}

/// While it lives, kicks of this thread reach the vCPU.
pub struct Attached(PhantomData<*mut u8>);

/// Directs kicks of the calling thread to `run`, which must be mapped as long as the result lives.
pub(super) fn attach(run: &mut kvm_run) -> Attached {
    IMMEDIATE_EXIT.set(&raw mut run.immediate_exit);
    Attached(PhantomData)
}

impl Drop for Attached {
    fn drop(&mut self) {
        IMMEDIATE_EXIT.set(ptr::null_mut());
    }
}
