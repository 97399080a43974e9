//! Says which system call of which thread was forbidden, before the process ends.
#![allow(unsafe_code)] // a signal handler: it may do little, and reads the kernel's record of the call

use std::io;

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

/// Exit code of a process that is ended here: 128 + `SIGSYS`, as a shell shows a death by that signal.
const EXIT_CODE: i32 = 128 + libc::SIGSYS;

/// Where `si_syscall` is in `siginfo_t` on x86-64, counted in `int`s: after three `int`s, padding and the
/// calling address.
const SI_SYSCALL: usize = 6;

pub(super) fn handle_sigsys() -> io::Result<()> {
    let action = SigAction::new(SigHandler::SigAction(on_sigsys), SaFlags::SA_SIGINFO, SigSet::empty());
    // SAFETY: the handler makes async-signal-safe calls only and does not return.
    unsafe { sigaction(Signal::SIGSYS, &action) }?;
    Ok(())
}

extern "C" fn on_sigsys(_: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel hands a whole siginfo_t, in which SIGSYS has `si_syscall` at this place.
    let number = unsafe { *info.cast::<i32>().add(SI_SYSCALL) };
    let mut name = [0u8; 16];
    // SAFETY: PR_GET_NAME writes at most 16 bytes, which `name` has; prctl is allowed to every thread.
    unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
    let mut line = Line { bytes: [0; 160], len: 0 };
    line.push(b"omega: the thread `");
    line.push(name.split(|byte| *byte == 0).next().unwrap_or_default());
    line.push(b"` made system call ");
    line.push_number(number.unsigned_abs());
    line.push(b", which its filter forbids; `omega run --seccomp off` runs without\n");
    // SAFETY: the bytes are on this stack frame. Neither call returns an error that could be handled.
    unsafe {
        libc::write(libc::STDERR_FILENO, line.bytes.as_ptr().cast(), line.len);
        libc::_exit(EXIT_CODE);
    }
}

/// Text put together without allocating.
struct Line {
    bytes: [u8; 160],
    len: usize,
}

impl Line {
    fn push(&mut self, text: &[u8]) {
        let room = &mut self.bytes[self.len..];
        let len = text.len().min(room.len());
        room[..len].copy_from_slice(&text[..len]);
        self.len += len;
    }

    fn push_number(&mut self, number: u32) {
        let mut scale = 1_000_000_000;
        while scale > 1 && number < scale {
            scale /= 10;
        }
        while scale > 0 {
            self.push(&[b'0' + (number / scale % 10) as u8]);
            scale /= 10;
        }
    }
}
