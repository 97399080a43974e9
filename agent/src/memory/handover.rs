//! Leases' files outlive the agent's process in systemd's file descriptor store: each is handed over when it is made
//! and comes back, named, to the next process. Without systemd, content is lost with the process, which the new
//! instances' names say.
#![allow(unsafe_code)] // takes over descriptors that the service manager opened

use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::pipe2;
use sd_notify::NotifyState;

/// What the descriptors' names begin with; the lease's epoch follows.
const NAME: &str = "omega-memory-";

fn name(epoch: u64) -> String {
    format!("{NAME}{epoch}")
}

/// Whether there is somebody to keep files.
pub(super) fn is_possible() -> bool {
    // Newer versions of systemd say how many they would keep.
    let keeps = std::env::var("FDSTORE").map_or(true, |most| most.trim() != "0");
    std::env::var_os("NOTIFY_SOCKET").is_some() && keeps
}

/// So long systemd may take to look at what it is told, in milliseconds.
const PATIENCE: u16 = 3000;

/// Has the file of lease `epoch` kept, and waits until it is: systemd does not listen to a process that is dead by
/// the time it looks.
pub(super) fn keep(epoch: u64, file: BorrowedFd<'_>) {
    if !is_possible() {
        return;
    }
    let name = name(epoch);
    let told = sd_notify::notify_with_fds(&[NotifyState::FdStore, NotifyState::FdName(&name)], &[file]);
    if let Err(error) = told.and_then(|()| barrier()) {
        tracing::warn!(%error, epoch, "A guest's memory may not survive a restart of the agent: systemd did not take it");
    }
}

/// Waits until everything that systemd was told is done.
fn barrier() -> io::Result<()> {
    let (ours, theirs) = pipe2(OFlag::O_CLOEXEC)?;
    sd_notify::notify_with_fds(&[NotifyState::Custom("BARRIER=1")], &[theirs.as_fd()])?;
    drop(theirs);
    // It closes its end when it comes to it.
    match poll(&mut [PollFd::new(ours.as_fd(), PollFlags::empty())], PollTimeout::from(PATIENCE))? {
        0 => Err(io::ErrorKind::TimedOut.into()),
        _ => Ok(()),
    }
}

/// Has it kept no longer.
pub(super) fn drop_kept(epoch: u64) {
    drop_named(&name(epoch));
}

fn drop_named(name: &str) {
    if let Err(error) = sd_notify::notify(&[NotifyState::FdStoreRemove, NotifyState::FdName(name)]) {
        tracing::warn!(%error, name, "systemd keeps memory of a guest that has ended");
    }
}

/// The files that were kept. To be asked once, when the process starts.
pub(super) fn kept() -> Vec<Kept> {
    let listed = match sd_notify::listen_fds_with_names() {
        Ok(listed) => listed,
        Err(error) => {
            tracing::error!(%error, "What systemd kept for the agent cannot be taken over");
            return Vec::new();
        }
    };
    let ours = listed.filter(|(_, name)| name.starts_with(NAME));
    ours.map(|(fd, name)| {
        // SAFETY: systemd opened it for this process, which takes it over once, here.
        let file = unsafe { OwnedFd::from_raw_fd(fd) };
        Kept { file, name }
    })
    .collect()
}

/// A file that was kept.
pub(super) struct Kept {
    pub(super) file: OwnedFd,
    name: String,
}

impl Kept {
    /// It is of no use any more. Whatever it holds is given back when the last descriptor is closed.
    pub(super) fn discard(self) {
        drop_named(&self.name);
    }

    /// The lease that it was kept for, by its name.
    pub(super) fn epoch(&self) -> Option<u64> {
        self.name.strip_prefix(NAME)?.parse().ok()
    }
}
