//! Signals, on a thread of their own: what ends the program, stops it, or tells of a new window.

use std::io;

use devices::thread::{Role, spawn};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::getpid;

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

/// Holds the signals back. To be called before any other thread is started.
///
/// # Errors
/// The kernel refuses.
pub(super) fn hold() -> io::Result<Held> {
    let set: SigSet = TAKEN.into_iter().collect();
    set.thread_block()?;
    Ok(Held(set))
}

impl Held {
    /// Takes signals from now on, those that came meanwhile first. `event` is called on the signals' thread.
    ///
    /// # Errors
    /// No thread can be started.
    pub(super) fn watch(self, event: impl Fn(Event) + Send + 'static) -> io::Result<()> {
        spawn(Role::Console, "signals", move || {
            loop {
                // Only a set that is not valid is refused, and this one is.
                let Ok(signal) = self.0.wait() else { continue };
                match signal {
                    Signal::SIGTERM | Signal::SIGINT | Signal::SIGHUP => event(Event::End),
                    Signal::SIGQUIT => event(Event::EndNow),
                    Signal::SIGWINCH => event(Event::Window),
                    Signal::SIGTSTP => {
                        terminal::restore();
                        // Unlike SIGTSTP this is not held back.
                        let _ = kill(getpid(), Signal::SIGSTOP);
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
