//! The terminal in raw mode, and its way back whatever happens: end, panic, `exit`, fatal signals, stops.
//! (Only SIGKILL leaves it raw: nothing can be done in the process that is killed. `reset` mends it.)

// Signal handlers, `atexit` and the window size's ioctl have no safe form.
#![allow(unsafe_code)]

use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Once, OnceLock};

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, raise, sigaction};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use nix::unistd::{getpgrp, tcgetpgrp};

/// Signals that end the process by its own fault.
const FATAL: [Signal; 7] = [
    Signal::SIGSEGV,
    Signal::SIGBUS,
    Signal::SIGILL,
    Signal::SIGFPE,
    Signal::SIGABRT,
    Signal::SIGSYS,
    Signal::SIGTRAP,
];

/// The terminal's settings from before, once they were changed.
static COOKED: OnceLock<libc::termios> = OnceLock::new();
/// Whether the terminal is raw now.
static RAW: AtomicBool = AtomicBool::new(false);
/// Whether it should be, when this process is in the foreground.
static WANTED: AtomicBool = AtomicBool::new(false);
/// Whether the other screen is shown.
static SCREEN: AtomicBool = AtomicBool::new(false);
/// Whether it should be, when this process is in the foreground.
static SCREEN_WANTED: AtomicBool = AtomicBool::new(false);
/// Shows the terminal's other screen, without a cursor.
const ENTER_SCREEN: &[u8] = b"\x1b[?1049h\x1b[?25l\x1b[2J";
/// Back to what was shown before.
const LEAVE_SCREEN: &[u8] = b"\x1b[?25h\x1b[?1049l";
/// What fatal signals did before, in the order of [`FATAL`].
static BEFORE: OnceLock<[Option<SigAction>; FATAL.len()]> = OnceLock::new();

/// Keeps the terminal raw until it is dropped. One at a time is enough; they do not nest.
#[derive(Debug)]
pub struct Raw(());

impl Raw {
    /// Makes standard input's terminal raw, so that every key goes to the guest. None when it is not a
    /// terminal. When this process is in the background nothing is changed until [`continued`].
    ///
    /// # Errors
    /// The terminal refuses.
    pub fn enter() -> io::Result<Option<Self>> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Ok(None);
        }
        let settings = tcgetattr(stdin.as_fd())?;
        COOKED.get_or_init(|| settings.into());
        restore_whatever_happens();
        WANTED.store(true, Ordering::SeqCst);
        make_raw()?;
        Ok(Some(Self(())))
    }
}

impl Raw {
    /// As [`enter`](Self::enter), and shows the terminal's other screen, so that what was shown before is there
    /// again afterwards.
    ///
    /// # Errors
    /// The terminal refuses.
    pub fn enter_screen() -> io::Result<Option<Self>> {
        if !io::stdout().is_terminal() {
            return Ok(None);
        }
        SCREEN_WANTED.store(true, Ordering::SeqCst);
        Self::enter().inspect(|raw| {
            if raw.is_none() {
                SCREEN_WANTED.store(false, Ordering::SeqCst);
            }
        })
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        WANTED.store(false, Ordering::SeqCst);
        SCREEN_WANTED.store(false, Ordering::SeqCst);
        restore();
    }
}

/// Whether the terminal is raw now: a line then ends in carriage return and line feed.
#[must_use]
pub fn is_raw() -> bool {
    RAW.load(Ordering::SeqCst)
}

/// Whether keys that are typed are this process's to read.
#[must_use]
pub fn in_foreground() -> bool {
    tcgetpgrp(io::stdin()).is_ok_and(|group| group == getpgrp())
}

/// Puts the terminal back as it was. Can be called at any time, from any thread and from a signal handler.
pub fn restore() {
    if SCREEN.swap(false, Ordering::SeqCst) {
        // `write` alone may be called in a signal handler; there is nowhere to tell a failure.
        let _ = nix::unistd::write(io::stdout(), LEAVE_SCREEN);
    }
    if RAW.swap(false, Ordering::SeqCst)
        && let Some(cooked) = COOKED.get()
    {
        // There is nowhere to tell a failure.
        let _ = tcsetattr(io::stdin().as_fd(), SetArg::TCSANOW, &Termios::from(*cooked));
    }
}

/// After the process was stopped and goes on, perhaps in the foreground now: raw again, if it was.
pub fn continued() {
    RAW.store(false, Ordering::SeqCst);
    if WANTED.load(Ordering::SeqCst) {
        // A terminal that is gone is noticed when it is read.
        let _ = make_raw();
    }
}

/// Columns and rows of the terminal at standard output.
#[must_use]
pub fn size() -> Option<(u16, u16)> {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCGWINSZ writes one winsize, and `size` is one that lives over the call.
    let result = unsafe { libc::ioctl(io::stdout().as_raw_fd(), libc::TIOCGWINSZ, &raw mut size) };
    (result == 0 && size.ws_col > 0 && size.ws_row > 0).then_some((size.ws_col, size.ws_row))
}

fn make_raw() -> io::Result<()> {
    let Some(cooked) = COOKED.get() else { return Ok(()) };
    if !in_foreground() {
        return Ok(());
    }
    let mut raw = Termios::from(*cooked);
    cfmakeraw(&mut raw);
    RAW.store(true, Ordering::SeqCst);
    tcsetattr(io::stdin().as_fd(), SetArg::TCSANOW, &raw)?;
    if SCREEN_WANTED.load(Ordering::SeqCst) {
        SCREEN.store(true, Ordering::SeqCst);
        nix::unistd::write(io::stdout(), ENTER_SCREEN)?;
    }
    Ok(())
}

fn restore_whatever_happens() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            restore();
            before(panic);
        }));
        // SAFETY: `at_exit` is a plain function that stays loaded; it only calls tcsetattr.
        unsafe { libc::atexit(at_exit) };
        let action = SigAction::new(
            SigHandler::SigAction(fatal),
            SaFlags::SA_SIGINFO | SaFlags::SA_ONSTACK | SaFlags::SA_RESTART,
            SigSet::empty(),
        );
        // SAFETY: `fatal` calls only what may be called in a signal handler: atomics, tcsetattr, sigaction
        // and raise.
        BEFORE.get_or_init(|| FATAL.map(|signal| unsafe { sigaction(signal, &action) }.ok()));
    });
}

extern "C" fn at_exit() {
    restore();
}

/// Restores the terminal, then lets happen what would have happened without it.
extern "C" fn fatal(number: libc::c_int, about: *mut libc::siginfo_t, context: *mut libc::c_void) {
    restore();
    let Some(at) = FATAL.iter().position(|signal| *signal as libc::c_int == number) else { return };
    // SAFETY: the kernel hands a valid siginfo_t to a handler with SA_SIGINFO.
    let fault = unsafe { (*about).si_code } > 0;
    let before = BEFORE.get().and_then(|all| all[at]).map(|action| action.handler());
    match before {
        // A fault happens again when this returns, unless the handler from before ended the process.
        Some(SigHandler::SigAction(handler)) if fault => handler(number, about, context),
        Some(SigHandler::Handler(handler)) if fault => handler(number),
        // Somebody sent it, or nobody else cares.
        _ => {
            let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
            // SAFETY: the default action runs no code of ours.
            let _ = unsafe { sigaction(FATAL[at], &default) };
            // Delivered when this returns.
            let _ = raise(FATAL[at]);
        }
    }
}
