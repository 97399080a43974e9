//! The Unix sockets of a guest: who may connect, and how they are made.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use nix::unistd::geteuid;

/// Listens at `path`, for its owner only. A socket that is left there from before is replaced: whoever calls
/// holds the guest's lock, so nobody serves it.
///
/// # Errors
/// Something else is at `path`, or the folder cannot be written.
pub(crate) fn listen(path: &Path) -> io::Result<UnixListener> {
    if let Ok(about) = fs::symlink_metadata(path)
        && about.file_type().is_socket()
    {
        fs::remove_file(path)?;
    }
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, Permissions::from_mode(0o600))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Whether who connected may: the user that runs the guest, or root.
pub(crate) fn allowed(stream: &UnixStream) -> bool {
    getsockopt(stream, PeerCredentials).is_ok_and(|peer| peer.uid() == 0 || peer.uid() == geteuid().as_raw())
}
