//! Signals, on a thread of their own: what ends the program, stops it, or tells of a new window.

use std::io;

use devices::thread::{Role, spawn};
use nix::sys::signal::{SigSet, Signal, raise};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::console::terminal;

/// The signals that are taken.
const TAKEN: [Signal; 8] = [
    Signal::SIGTERM,
    Signal::SIGINT,
    Signal::SIGHUP,
    Signal::SIGQUIT,
    Signal::SIGTSTP,
    Signal::SIGCONT,
    Signal::SIGWINCH,
    Signal::SIGTTOU,
];

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// SIGTERM, SIGINT or SIGHUP: the program is asked to end.
    End,
    /// SIGQUIT: it shall end at once.
    EndNow,
    /// The process was stopped and goes on; the terminal is as it was before.
    Continued,
    /// The window has another size.
    Window,
}

/// Signals are held back in this thread and those that it starts later, until [`Held::watch`].
#[derive(Debug)]
pub(super) struct Held(SigSet);

/// Holds the signals back. To be called before any other thread is started. Those that whoever started this
/// process had it ignore, as `nohup` does with SIGHUP, stay ignored.
///
/// # Errors
/// The kernel refuses.
pub(super) fn hold() -> io::Result<Held> {
    let ignored = ignored();
    let set: SigSet = TAKEN.into_iter().filter(|signal| ignored >> (*signal as u32 - 1) & 1 == 0).collect();
    set.thread_block()?;
    Ok(Held(set))
}

/// The signals that are ignored, as bits from signal 1 on. SIGTERM is never: it is how a service is ended.
fn ignored() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    mask & !(1 << (Signal::SIGTERM as u32 - 1))
}

impl Held {
    /// Takes signals from now on, those that came meanwhile first. `event` is called on the signals' thread.
    ///
    /// # Errors
    /// No thread can be started.
    pub(super) fn watch(self, event: impl Fn(Event) + Send + 'static) -> io::Result<()> {
        let signals = SignalFd::with_flags(&self.0, SfdFlags::SFD_CLOEXEC)?;
        spawn(Role::Console, "signals", move || {
            loop {
                // Interrupted, for example by a stop.
                let Ok(Some(signal)) = signals.read_signal() else { continue };
                match Signal::try_from(signal.ssi_signo as i32).unwrap_or(Signal::SIGTTOU) {
                    Signal::SIGTERM | Signal::SIGINT | Signal::SIGHUP => event(Event::End),
                    Signal::SIGQUIT => event(Event::EndNow),
                    Signal::SIGWINCH => event(Event::Window),
                    Signal::SIGTSTP => {
                        terminal::restore();
                        // Unlike SIGTSTP this is not held back, and stops all threads.
                        let _ = raise(Signal::SIGSTOP);
                    }
                    Signal::SIGCONT => {
                        terminal::continued();
                        event(Event::Continued);
                    }
                    _ => {}
                }
            }
        })?;
        Ok(())
    }
}
