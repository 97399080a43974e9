//! Threads by what they do, so that whoever owns the process can confine each kind before it works.
//!
//! A thread inherits the confinement of the thread that starts it: devices start their threads when they
//! are built or [started](crate::lifecycle::Lifecycle::start), never in answer to a guest's access, which
//! runs on a confined vCPU thread that may not start any.

use std::io;
use std::sync::{OnceLock, mpsc};
use std::thread::{Builder, JoinHandle};

/// What a thread does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    /// Assembles the machine, waits for its end.
    Main,
    /// Runs a vCPU and answers its exits.
    Vcpu,
    /// Drives a disk: files, io_uring, connections to agents.
    Disk,
    /// Handles the guest's page faults: its memory, io_uring, connections to agents.
    Memory,
    /// Drives a network card: its TAP interface.
    Net,
    /// Drives one of the small devices: entropy, balloon, virtio console.
    Device,
    /// Carries console bytes between terminal, sockets and serial port.
    Console,
    /// Answers the control socket.
    Control,
}

impl Role {
    /// Every role.
    pub const ALL: [Self; 8] = [
        Self::Main,
        Self::Vcpu,
        Self::Disk,
        Self::Memory,
        Self::Net,
        Self::Device,
        Self::Console,
        Self::Control,
    ];
}

/// What a new thread does first.
type Hook = Box<dyn Fn(Role) -> io::Result<()> + Send + Sync>;

static HOOK: OnceLock<Hook> = OnceLock::new();

/// From now on every thread that [`spawn`] starts calls `hook` first, and does its work only if that
/// succeeds. The first call counts; `false` for later ones.
pub fn set_hook(hook: impl Fn(Role) -> io::Result<()> + Send + Sync + 'static) -> bool {
    HOOK.set(Box::new(hook)).is_ok()
}

/// Calls the hook on this thread, for one that [`spawn`] did not start or that has to prepare itself before
/// it is confined.
///
/// # Errors
/// The hook fails.
pub fn confine(role: Role) -> io::Result<()> {
    HOOK.get().map_or(Ok(()), |hook| hook(role))
}

/// Starts a thread; returns when it is confined and about to run `body`. The kernel shows the first 15
/// bytes of `name`.
///
/// # Errors
/// No thread can be started, or the hook fails.
pub fn spawn<T: Send + 'static>(
    role: Role,
    name: &str,
    body: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    let Some(hook) = HOOK.get() else {
        return Builder::new().name(name.to_owned()).spawn(body);
    };
    let (tell, told) = mpsc::sync_channel(1);
    let thread = Builder::new().name(name.to_owned()).spawn(move || {
        let confined = hook(role);
        let go_on = confined.is_ok();
        let _ = tell.send(confined); // the spawner waits below
        if !go_on {
            // Nobody gets this thread's handle, so nobody misses its result.
            std::panic::resume_unwind(Box::new("not confined"));
        }
        body()
    })?;
    match told.recv() {
        Ok(Ok(())) => {}
        Ok(Err(error)) => return Err(error),
        Err(_) => return Err(io::Error::other("the new thread ended before it began")),
    }
    Ok(thread)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};

    #[test]
    fn a_thread_works_only_after_its_hook_succeeded() {
        static RAN: AtomicBool = AtomicBool::new(false);
        // The hook is the process's, which runs other tests too: it refuses by the thread's name.
        let name = || std::thread::current().name().map(ToOwned::to_owned);
        assert!(set_hook(move |_| match name().as_deref() {
            Some("refused") => Err(io::Error::other("refused")),
            _ => Ok(()),
        }));
        assert!(!set_hook(|_| Ok(())), "the first hook stays");
        let worker = spawn(Role::Disk, "disk0", name).expect("it starts");
        assert_eq!(worker.join().expect("it ends"), Some("disk0".to_owned()));
        let error = spawn(Role::Net, "refused", || RAN.store(true, Ordering::Relaxed)).expect_err("refused");
        assert_eq!(error.to_string(), "refused");
        assert!(!RAN.load(Ordering::Relaxed));
    }
}
