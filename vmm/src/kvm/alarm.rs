//! A timer that makes a vCPU's thread leave guest code: a POSIX timer whose signal is the kick's.
#![allow(unsafe_code)] // POSIX timers, which no safe wrapper directs to one thread.

use std::io;
use std::ptr;
use std::time::Duration;

use super::kick_signal;

/// A timer of one thread. Only that thread may use it.
#[derive(Debug)]
pub(super) struct Alarm {
    timer: libc::timer_t,
    thread: libc::pid_t,
}

// SAFETY: a `timer_t` is the process's, whichever thread asks the kernel about it.
unsafe impl Send for Alarm {}

impl Alarm {
    /// A timer that kicks the calling thread. It is not set.
    ///
    /// # Errors
    /// The kernel has no more timers.
    pub(super) fn of_this_thread() -> io::Result<Self> {
        let thread = this_thread();
        // SAFETY: all zeros is a valid `sigevent`.
        let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = kick_signal();
        event.sigev_notify_thread_id = thread;
        let mut timer = ptr::null_mut();
        // SAFETY: both pointers are to live variables of their types.
        if unsafe { libc::timer_create(libc::CLOCK_MONOTONIC, &raw mut event, &raw mut timer) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { timer, thread })
    }

    /// Whether it kicks the calling thread.
    pub(super) fn is_of_this_thread(&self) -> bool {
        self.thread == this_thread()
    }

    /// Kicks after `after`; `None`: no more.
    pub(super) fn set(&self, after: Option<Duration>) {
        // A value of zero would switch it off.
        let after = after.map_or(Duration::ZERO, |after| after.max(Duration::from_nanos(1)));
        let never = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        let seconds = libc::time_t::try_from(after.as_secs()).unwrap_or(libc::time_t::MAX);
        let value = libc::timespec { tv_sec: seconds, tv_nsec: after.subsec_nanos().into() };
        let value = libc::itimerspec { it_interval: never, it_value: value };
        // SAFETY: the timer lives, and the kernel only reads `value`. The call fails only for a foreign timer or a
        // malformed time.
        unsafe { libc::timer_settime(self.timer, 0, &raw const value, ptr::null_mut()) };
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        // SAFETY: the timer is this value's own, and nobody uses it afterwards.
        unsafe { libc::timer_delete(self.timer) };
    }
}

fn this_thread() -> libc::pid_t {
    // SAFETY: the call takes nothing and cannot fail.
    unsafe { libc::gettid() }
}
