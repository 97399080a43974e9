//! A timer that a ring can wait for and any thread can set.

use std::io;
use std::os::fd::{AsFd as _, AsRawFd, RawFd};
use std::time::Duration;

use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

/// See the [module](self).
pub(super) struct Timer(TimerFd);

impl Timer {
    pub(super) fn new() -> io::Result<Self> {
        let flags = TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK;
        Ok(Self(TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?))
    }

    /// It expires after `time`, and not when it was set for before.
    pub(super) fn set(&self, time: Duration) -> io::Result<()> {
        // Zero would stop it.
        let time = TimeSpec::from_duration(time.max(Duration::from_nanos(1)));
        Ok(self.0.set(Expiration::OneShot(time), TimerSetTimeFlags::empty())?)
    }

    /// Makes it unreadable until it expires again.
    pub(super) fn read(&self) {
        let mut count = [0; 8];
        // It fails only if it has been set anew.
        let _ = nix::unistd::read(self.0.as_fd(), &mut count);
    }
}

impl AsRawFd for Timer {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}
