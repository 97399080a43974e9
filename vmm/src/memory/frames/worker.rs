//! Threads that answer page faults: a guest must never wait for one that is no more.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::sync_channel;
use std::thread::{Builder, JoinHandle};

use devices::thread::{Role, confine};

/// Starts a thread that does `work` with what it has made; returns when it is confined and about to work. If it fails
/// or panics the whole process ends, with one line on stderr.
///
/// # Errors
/// No thread can be started, it could not `make` what it needs, or it cannot be confined.
pub(in crate::memory) fn start<T>(
    name: String,
    make: impl FnOnce() -> io::Result<T> + Send + 'static,
    work: impl FnOnce(T) -> io::Result<()> + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    let (tell, told) = sync_channel(1);
    let thread = Builder::new().name(name).spawn(move || {
        let worked = catch_unwind(AssertUnwindSafe(|| {
            // A ring opens files when it is made, so this thread confines itself afterwards.
            let made = make().and_then(|made| confine(Role::Memory).map(|()| made));
            let (made, result) = match made {
                Ok(made) => (Some(made), Ok(())),
                Err(why) => (None, Err(why)),
            };
            let _ = tell.send(result); // the starter waits below
            made.map_or(Ok(()), work)
        }));
        let why = match worked {
            Ok(Ok(())) => return,
            Ok(Err(why)) => why.to_string(),
            // The panic has said on stderr what happened and where.
            Err(_) => "it panicked".into(),
        };
        fail(&why);
    })?;
    told.recv().unwrap_or_else(|_| Err(io::Error::other("it ended before it began")))?;
    Ok(thread)
}

/// Ends the process: who touches the guest's RAM would wait for ever, or read what is not true.
pub(in crate::memory) fn fail(why: &str) -> ! {
    eprintln!("The handler of the guest's memory failed: {why}; the guest ends here.");
    std::process::abort();
}
