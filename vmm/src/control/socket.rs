//! The Unix sockets of a guest: how they are made, and who may connect.

use std::fs::{self, Permissions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use nix::unistd::{Uid, geteuid};

/// A socket that only its owner and root may use.
pub(crate) struct Listener {
    socket: UnixListener,
    owner: Uid,
}

impl Listener {
    /// Listens at `path`. A socket that is left there from before is replaced: whoever calls holds the
    /// guest's lock, so nobody serves it. The socket stays where it is when this is dropped; whoever holds
    /// the lock clears the folder.
    ///
    /// # Errors
    /// Something else is at `path`, or the folder cannot be written.
    pub(crate) fn at(path: &Path) -> io::Result<Self> {
        if let Ok(about) = fs::symlink_metadata(path)
            && about.file_type().is_socket()
        {
            fs::remove_file(path)?;
        }
        let socket = UnixListener::bind(path)?;
        fs::set_permissions(path, Permissions::from_mode(0o600))?;
        socket.set_nonblocking(true)?;
        Ok(Self { socket, owner: geteuid() })
    }

    /// The next client, which may be here and whose stream does not block; none when there is none or it may
    /// not.
    pub(crate) fn accept(&self) -> Option<UnixStream> {
        let (stream, _) = self.socket.accept().ok()?;
        let peer = getsockopt(&stream, PeerCredentials).ok()?;
        let allowed = peer.uid() == 0 || peer.uid() == self.owner.as_raw();
        // The standard library would ask by an ioctl, to which the thread has no right.
        fcntl(&stream, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).ok()?;
        allowed.then_some(stream)
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
