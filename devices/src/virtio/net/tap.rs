//! TAP interfaces of this PC, one descriptor for each pair of queues.
#![allow(unsafe_code)] // the TUN driver is configured by ioctls that take raw pointers

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

/// Bytes of the header before each frame: `virtio_net_hdr_v1`.
pub(super) const HEADER: usize = 12;

const DEVICE: &str = "/dev/net/tun";
const NAME_MAX: usize = libc::IFNAMSIZ - 1;

/// A TAP interface could not be opened. Each says what to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The name is not one of an interface.
    #[error("`{0}` is not the name of an interface: it has 1 to 15 bytes, without `/` and spaces")]
    Name(String),
    /// There is no TUN driver, or the user may not open it.
    #[error("{DEVICE} cannot be opened; load the driver with `modprobe tun`, and let this user open it")]
    Driver(#[source] io::Error),
    /// The interface does not exist, and this user may not create it.
    #[error(
        "The interface {name} does not exist or does not belong to this user; create it with `ip tuntap add {name} \
         mode tap user $USER{multi}`"
    )]
    Permission {
        /// The interface.
        name: String,
        /// What the command needs for several queues.
        multi: &'static str,
    },
    /// Something else has the interface open.
    #[error("The interface {0} is in use by another process")]
    Busy(String),
    /// The interface exists and is of another kind.
    #[error(
        "The interface {name} is of another kind: create it with `ip tuntap add {name} mode tap user \
         $USER{multi}`, and set `queues` to fit"
    )]
    Kind {
        /// The interface.
        name: String,
        /// What the command needs for several queues.
        multi: &'static str,
    },
    /// The kernel refuses something that the device needs.
    #[error("The interface {name} cannot be set up ({what})")]
    Setup {
        /// The interface.
        name: String,
        /// What was asked for.
        what: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// One descriptor of a TAP interface: frames in and out, each behind a virtio header.
pub struct Tap {
    fd: OwnedFd,
    /// Whether it is a real TAP interface, which has offloads and queues that can be switched.
    real: bool,
}

impl Tap {
    /// Opens the interface `name` `queues` times.
    ///
    /// # Errors
    /// [`Error`].
    pub fn open(name: &str, queues: u16) -> Result<Vec<Self>, Error> {
        let valid = (1..=NAME_MAX).contains(&name.len())
            && !name.bytes().any(|b| b == b'/' || b == 0 || b.is_ascii_whitespace());
        if !valid {
            return Err(Error::Name(name.to_owned()));
        }
        (0..queues.max(1)).map(|_| Self::open_one(name, queues > 1)).collect()
    }

    fn open_one(name: &str, several: bool) -> Result<Self, Error> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open(DEVICE)
            .map_err(Error::Driver)?;
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        let flags = flags | if several { libc::IFF_MULTI_QUEUE } else { 0 };
        set_interface(&file, name, flags).map_err(|source| {
            let (name, multi) = (name.to_owned(), if several { " multi_queue" } else { "" });
            match source.raw_os_error() {
                Some(libc::EPERM) => Error::Permission { name, multi },
                Some(libc::EBUSY) => Error::Busy(name),
                Some(libc::EINVAL) => Error::Kind { name, multi },
                _ => Error::Setup { name, what: "TUNSETIFF", source },
            }
        })?;
        let tap = Self { fd: file.into(), real: true };
        let setup = |what| move |source| Error::Setup { name: name.to_owned(), what, source };
        tap.set_header_size().map_err(setup("TUNSETVNETHDRSZ"))?;
        tap.set_offloads(0).map_err(setup("TUNSETOFFLOAD"))?;
        Ok(tap)
    }

    /// Anything that keeps the borders of packets, as a datagram socket does; each packet is a header
    /// and a frame. It must not block.
    #[must_use]
    pub fn from_socket(fd: OwnedFd) -> Self {
        Self { fd, real: false }
    }

    fn set_header_size(&self) -> io::Result<()> {
        let size = HEADER as libc::c_int;
        // SAFETY: the kernel reads one int, which lives during the call.
        check(unsafe { libc::ioctl(self.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const size) })
    }

    /// Which packets the reader can take: `TUN_F_*`.
    pub(super) fn set_offloads(&self, offloads: libc::c_uint) -> io::Result<()> {
        if !self.real {
            return Ok(());
        }
        // SAFETY: this call takes a plain number.
        check(unsafe { libc::ioctl(self.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(offloads)) })
    }

    /// Whether this descriptor takes part; only for interfaces with several.
    pub(super) fn set_attached(&self, attached: bool) -> io::Result<()> {
        if !self.real {
            return Ok(());
        }
        let flag = if attached { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
        let request = request("", flag);
        // SAFETY: the kernel reads one `ifreq`, which lives during the call.
        let result = check(unsafe { libc::ioctl(self.as_raw_fd(), libc::TUNSETQUEUE, &raw const request) });
        match result {
            // It is what it should be already.
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            other => other,
        }
    }
}

fn request(name: &str, flags: libc::c_int) -> libc::ifreq {
    // SAFETY: an `ifreq` of zeros is valid: it has only arrays and numbers.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    request
}

fn set_interface(file: &File, name: &str, flags: libc::c_int) -> io::Result<()> {
    let mut request = request(name, flags);
    // SAFETY: the kernel reads and writes one `ifreq`, which lives during the call.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_no_interface_has_is_refused_before_anything_is_opened() {
        for bad in ["", "a/b", "a b", "sixteen-bytes-xx", "tap\0"] {
            assert!(matches!(Tap::open(bad, 1), Err(Error::Name(_))), "{bad:?}");
        }
    }

    #[test]
    fn an_interface_opens_with_one_queue_or_several() {
        for (name, queues) in [("omegatest0", 1), ("omegatest1", 3)] {
            match Tap::open(name, queues) {
                Ok(taps) => {
                    assert_eq!(taps.len(), usize::from(queues));
                    taps[0].set_offloads(libc::TUN_F_CSUM | libc::TUN_F_TSO4).expect("offloads");
                    let again = Tap::open(name, queues);
                    if queues == 1 {
                        assert!(matches!(again, Err(Error::Busy(_))));
                    } else {
                        taps[2].set_attached(false).expect("detach");
                        taps[2].set_attached(true).expect("attach");
                    }
                }
                Err(error @ (Error::Driver(_) | Error::Permission { .. })) => {
                    eprintln!("cannot run: no TAP interface may be made here: {error}");
                }
                Err(error) => panic!("{error}"),
            }
        }
    }
}
