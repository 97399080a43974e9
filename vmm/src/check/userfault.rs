//! userfaultfd: what remote memory will stand on.

// The descriptor is had by a system call and asked by ioctls, for which there is no safe form.
#![allow(unsafe_code)]

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use super::{Line, sys};

/// `struct uffdio_api`.
#[repr(C)]
#[derive(Default)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

const UFFD_API: u64 = 0xaa;
/// `_IOWR(0xaa, 0x3f, struct uffdio_api)`.
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
/// `_IO(0xaa, 0x00)`, of `/dev/userfaultfd`.
const USERFAULTFD_IOC_NEW: libc::c_ulong = 0xaa00;
const UFFD_USER_MODE_ONLY: libc::c_int = 1;

/// Feature bits, what they are for, and since which kernel they are there.
const FEATURES: [(u64, &str, &str); 8] = [
    (1 << 0, "write protection", "5.7"),
    (1 << 5, "missing faults of shared memory", "4.11"),
    (1 << 10, "minor faults of shared memory", "5.14"),
    (1 << 11, "exact addresses", "5.18"),
    (1 << 12, "write protection of shared memory", "5.19"),
    (1 << 13, "write protection of unpopulated pages", "6.4"),
    (1 << 14, "poison", "6.6"),
    (1 << 16, "move", "6.8"),
];
/// How many of [`FEATURES`], from the first on, remote memory cannot do without.
const NEEDED: usize = 5;

enum Access {
    /// Faults of the kernel are seen too, as KVM's are.
    Full,
    /// Only those of user mode are: no use for guests.
    UserOnly,
}

pub(super) fn line() -> Line {
    let name = "userfaultfd";
    let (descriptor, access) = match open() {
        Ok(opened) => opened,
        Err(why) => {
            return Line::missing(name, format!("userfaultfd is refused: {why}"))
                .why("memory on other PCs (not in this version) needs it")
                .mend(
                    "install a kernel with CONFIG_USERFAULTFD, or allow the call in the container's filter",
                );
        }
    };
    let features = match features(&descriptor) {
        Ok(features) => features,
        Err(why) => return Line::missing(name, "userfaultfd does not answer").why(why.to_string()),
    };
    let lacking: Vec<&(u64, &str, &str)> = FEATURES.iter().filter(|(bit, ..)| features & bit == 0).collect();
    let needed = FEATURES[..NEEDED].iter().all(|(bit, ..)| features & bit != 0);
    let said: Vec<String> =
        lacking.iter().map(|(_, what, since)| format!("{what} (Linux {since})")).collect();
    if let Access::UserOnly = access {
        return Line::degraded(name, "for faults of user mode only")
            .why("a guest's faults are the kernel's; memory on other PCs (not in this version) must see them")
            .mend(if sys::number("/proc/sys/vm/unprivileged_userfaultfd") == Some(0) {
                "sudo sysctl vm.unprivileged_userfaultfd=1, or sudo setfacl -m u:$USER:rw /dev/userfaultfd"
            } else {
                "sudo setfacl -m u:$USER:rw /dev/userfaultfd"
            });
    }
    if !needed {
        return Line::degraded(name, format!("without {}", said.join(", ")))
            .why("memory on other PCs (not in this version) needs it")
            .mend("install Linux 5.19 or newer");
    }
    if said.is_empty() {
        return Line::ok(name, "with all features");
    }
    Line::ok(name, format!("all that is needed; without {}", said.join(", ")))
}

fn open() -> io::Result<(OwnedFd, Access)> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    match call(flags) {
        Ok(descriptor) => return Ok((descriptor, Access::Full)),
        Err(why) if why.kind() == io::ErrorKind::PermissionDenied => {}
        Err(why) => return Err(why),
    }
    if let Ok(device) = OpenOptions::new().read(true).write(true).open("/dev/userfaultfd") {
        // SAFETY: this ioctl takes flags by value and returns a new descriptor or an error.
        let descriptor = unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, flags) };
        if descriptor >= 0 {
            // SAFETY: it is new, so nobody else owns it.
            return Ok((unsafe { OwnedFd::from_raw_fd(descriptor) }, Access::Full));
        }
    }
    Ok((call(flags | UFFD_USER_MODE_ONLY)?, Access::UserOnly))
}

fn call(flags: libc::c_int) -> io::Result<OwnedFd> {
    // SAFETY: the call takes flags by value and returns a new descriptor or an error.
    let descriptor = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    let Some(descriptor) = i32::try_from(descriptor).ok().filter(|descriptor| *descriptor >= 0) else {
        return Err(io::Error::last_os_error());
    };
    // SAFETY: it is new, so nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// Every feature that the kernel has, whether asked for or not.
fn features(descriptor: &OwnedFd) -> io::Result<u64> {
    let mut api = UffdioApi { api: UFFD_API, ..UffdioApi::default() };
    // SAFETY: the ioctl reads and writes one uffdio_api, which `api` is, laid out as the kernel's.
    let result = unsafe { libc::ioctl(descriptor.as_raw_fd(), UFFDIO_API, &raw mut api) };
    if result == 0 { Ok(api.features) } else { Err(io::Error::last_os_error()) }
}
