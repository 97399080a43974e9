//! What systemd is to an agent whose descriptors it keeps: a socket that it is told on, and the descriptors handed to
//! the next process.
#![allow(unsafe_code)] // takes over descriptors that come through a socket

use std::collections::BTreeMap;
use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};

use nix::sys::socket::{ControlMessageOwned, MsgFlags, RecvMsg, UnixAddr, recvmsg};

type Kept = Arc<Mutex<BTreeMap<String, OwnedFd>>>;

pub struct Systemd {
    socket: PathBuf,
    kept: Kept,
}

impl Systemd {
    pub fn start(folder: &Path) -> Self {
        let socket = folder.join("notify");
        let listener = UnixDatagram::bind(&socket).expect("a socket");
        let kept = Kept::default();
        let keeps = Arc::clone(&kept);
        std::thread::spawn(move || {
            while let Some((text, fds)) = receive(&listener) {
                heed(&text, fds, &keeps);
            }
        });
        Self { socket, kept }
    }

    /// The names of what is kept.
    pub fn names(&self) -> Vec<String> {
        self.kept.lock().expect("the list").keys().cloned().collect()
    }

    /// Loses everything, as a reboot does.
    pub fn forget(&self) {
        self.kept.lock().expect("the list").clear();
    }

    /// `program` as systemd starts it: with what it kept from descriptor 3 on.
    pub fn command(&self, program: &str) -> Command {
        let kept = self.kept.lock().expect("the list");
        let mut script = String::new();
        let me = std::process::id();
        for (at, fd) in kept.values().enumerate() {
            assert!(at < 6, "a shell opens descriptors up to 9");
            script += &format!("exec {}<>/proc/{me}/fd/{}; ", 3 + at, fd.as_raw_fd());
        }
        script += "LISTEN_PID=$$; export LISTEN_PID; exec \"$0\" \"$@\"";
        let mut command = Command::new("sh");
        let names: Vec<&str> = kept.keys().map(String::as_str).collect();
        command.args(["-c", &script, program]);
        command.env("NOTIFY_SOCKET", &self.socket).env("LISTEN_FDS", names.len().to_string());
        command.env("LISTEN_FDNAMES", names.join(":"));
        command
    }
}

fn receive(listener: &UnixDatagram) -> Option<(String, Vec<OwnedFd>)> {
    let mut bytes = [0; 4096];
    let mut space = nix::cmsg_space!([i32; 4]);
    let mut parts = [IoSliceMut::new(&mut bytes)];
    let got: RecvMsg<'_, '_, UnixAddr> =
        recvmsg(listener.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC).ok()?;
    let mut fds = Vec::new();
    for message in got.cmsgs().ok()? {
        if let ControlMessageOwned::ScmRights(raw) = message {
            // SAFETY: the kernel has just made them for this process.
            fds.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    let len = got.bytes;
    Some((String::from_utf8_lossy(&bytes[..len]).into_owned(), fds))
}

/// Does what a message says. A barrier's descriptor is dropped, and that is its answer.
fn heed(text: &str, fds: Vec<OwnedFd>, kept: &Kept) {
    let said = |line: &str| text.lines().any(|l| l == line);
    let name = text.lines().find_map(|line| line.strip_prefix("FDNAME=")).unwrap_or("stored").to_owned();
    let mut kept = kept.lock().expect("the list");
    if said("FDSTORE=1") {
        kept.extend(fds.into_iter().map(|fd| (name.clone(), fd)));
    } else if said("FDSTOREREMOVE=1") {
        kept.remove(&name);
    }
}
