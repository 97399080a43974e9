//! Processes that cannot outlive the lab.
#![allow(unsafe_code)] // PR_SET_PDEATHSIG has to be asked for between fork and exec; an ioctl without a wrapper

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread;

type Request = (Command, Sender<io::Result<Child>>);

/// Starts a process that is killed when this one ends, however it ends, and that a Ctrl-C on the terminal
/// does not reach directly.
///
/// The kernel ties the death signal to the *thread* that forks, so one thread that never ends starts them all.
pub fn spawn(command: Command) -> io::Result<Child> {
    static SPAWNER: OnceLock<Mutex<Sender<Request>>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (requests, queue) = channel::<Request>();
        thread::spawn(move || {
            for (mut command, answer) in queue {
                let _ = answer.send(tied(&mut command).spawn());
            }
        });
        Mutex::new(requests)
    });
    let (answer, child) = channel();
    spawner
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .send((command, answer))
        .map_err(|_| io::Error::other("The thread that starts processes is gone"))?;
    child.recv().map_err(|_| io::Error::other("The thread that starts processes is gone"))?
}

fn tied(command: &mut Command) -> &mut Command {
    command.process_group(0);
    // SAFETY: prctl is async-signal-safe and touches no memory of the parent.
    unsafe {
        command.pre_exec(|| {
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) == 0 {
                Ok(())
            } else {
                Err(io::Error::last_os_error())
            }
        })
    }
}

/// Makes the kernel draw its random numbers from what was mixed into its pool just now.
pub fn reseed(urandom: &File) -> io::Result<()> {
    const RNDRESEEDCRNG: libc::c_ulong = 0x5207;
    // SAFETY: this ioctl takes no argument.
    let result = unsafe { libc::ioctl(urandom.as_raw_fd(), RNDRESEEDCRNG) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
