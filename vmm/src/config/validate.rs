//! What the schema of `guest.toml` cannot say: values that must fit each other, and names that must be well
//! formed.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use super::toml_file::{Checker, KeyPath, beside};
use super::{Disk, Guest, Net, RemoteDisk, Serial, cpu, memory, peer};

/// The longest kernel command line: x86's `COMMAND_LINE_SIZE` with its final NUL.
pub const LONGEST_CMDLINE: usize = 2047;
/// The longest serial number of a disk (virtio 1.2, 5.2.6.1: `VIRTIO_BLK_ID_BYTES`).
pub const LONGEST_SERIAL: usize = 20;
/// The longest name of a network interface: Linux's `IFNAMSIZ` with its final NUL.
const LONGEST_TAP: usize = 15;
/// Devices that fit on the guest's PCI bus beside the host bridge.
pub const MOST_DEVICES: usize = 30;

/// Finds everything in `guest` that contradicts itself.
pub(super) fn check(guest: &Guest, checker: &mut Checker<'_>) {
    let root = KeyPath::root();
    if let Some(why) = name_mistake(&guest.name) {
        checker.wrong(&root.key("name"), why);
    }
    cpu::check(guest, checker);
    kernel(guest, checker);
    memory::check(&guest.memory, guest.cpu.count, checker);
    disks(&guest.disk, checker);
    nets(&guest.net, checker);
    devices(guest, checker);
    if matches!(&guest.serial, Serial::File(path) if path.as_os_str().is_empty()) {
        checker.wrong(&root.key("serial").key("file"), "is empty");
    }
    if let Some(balloon) = &guest.balloon
        && balloon.size > guest.memory.size
    {
        let most = guest.memory.size;
        checker.wrong(&root.key("balloon").key("size"), format!("is more than the guest's memory, {most}"));
    }
}

/// Finds the files that `guest` names and this PC lacks. `config` is the file that it was read from.
pub(super) fn check_files(guest: &Guest, config: &Path, checker: &mut Checker<'_>) {
    let root = KeyPath::root();
    let mut named: Vec<(KeyPath, &Path)> = vec![(root.key("kernel").key("image"), &guest.kernel.image)];
    if let Some(initrd) = &guest.kernel.initrd {
        named.push((root.key("kernel").key("initrd"), initrd));
    }
    for (index, disk) in guest.disk.iter().enumerate() {
        if let Some(path) = &disk.path {
            named.push((root.key("disk").index(index).key("path"), path));
        }
    }
    for (key, path) in named {
        let path = beside(config, path);
        match std::fs::File::open(&path).and_then(|file| file.metadata()) {
            Ok(about) if about.is_dir() => {
                checker.wrong(&key, format!("{} is a folder, not a file", path.display()));
            }
            Ok(_) => {}
            Err(why) => checker.wrong(&key, format!("{} cannot be read: {why}", path.display())),
        }
    }
}

/// Why `name` cannot be a guest's or volume's name; none when it can.
#[must_use]
pub fn name_mistake(name: &str) -> Option<String> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if name.is_empty() || name.len() > 64 {
        return Some(format!("must be 1 to 64 characters long, not {}", name.len()));
    }
    if let Some(wrong) = name.chars().find(|c| !allowed(*c)) {
        return Some(format!("may hold letters, digits, `-`, `_` and `.` only, not {wrong:?}"));
    }
    (!name.starts_with(|c: char| c.is_ascii_alphanumeric()))
        .then(|| "must begin with a letter or digit".to_owned())
}

fn kernel(guest: &Guest, checker: &mut Checker<'_>) {
    let key = KeyPath::root().key("kernel");
    if guest.kernel.image.as_os_str().is_empty() {
        checker.wrong(&key.key("image"), "is empty");
    }
    if guest.kernel.initrd.as_ref().is_some_and(|path| path.as_os_str().is_empty()) {
        checker.wrong(&key.key("initrd"), "is empty; leave the key out for a guest without one");
    }
    let cmdline = &guest.kernel.cmdline;
    if cmdline.len() > LONGEST_CMDLINE {
        let long = cmdline.len();
        let what = format!("is {long} bytes long; a kernel takes at most {LONGEST_CMDLINE}");
        checker.wrong(&key.key("cmdline"), what);
    } else if let Some(wrong) = cmdline.chars().find(|c| c.is_control()) {
        checker.wrong(&key.key("cmdline"), format!("holds the control character {wrong:?}"));
    }
}

fn disks(disks: &[Disk], checker: &mut Checker<'_>) {
    let mut serials = HashMap::new();
    let mut places: HashMap<Place<'_>, (usize, bool)> = HashMap::new();
    for (index, disk) in disks.iter().enumerate() {
        let key = KeyPath::root().key("disk").index(index);
        let place = match (&disk.path, &disk.remote) {
            (Some(_), Some(_)) => {
                checker.wrong(&key.key("remote"), "a disk has either `path` or `remote`, not both");
                None
            }
            (None, None) => {
                checker.wrong(&key, "needs `path` (an image on this PC) or `remote` (a volume on another)");
                None
            }
            (Some(path), None) => Some(Place::Here(path)),
            (None, Some(remote)) => Some(Place::There(&remote.agent, &remote.volume)),
        };
        if disk.path.as_ref().is_some_and(|path| path.as_os_str().is_empty()) {
            checker.wrong(&key.key("path"), "is empty");
        }
        if let Some(remote) = &disk.remote {
            remote_disk(remote, &key.key("remote"), checker);
            if disk.direct {
                checker.wrong(&key.key("direct"), "is for local disks; the agent decides it for its volumes");
            }
        }
        if let Some(place) = place
            && let Some((before, writable)) = places.insert(place, (index, !disk.read_only))
            && (writable || !disk.read_only)
        {
            checker.wrong(&key, format!("is the same as `disk[{before}]`; only read-only disks may share"));
        }
        let Some(serial) = &disk.serial else { continue };
        let key = key.key("serial");
        if serial.is_empty() || serial.len() > LONGEST_SERIAL {
            let what = format!("must be 1 to {LONGEST_SERIAL} bytes long, not {}", serial.len());
            checker.wrong(&key, what);
        } else if let Some(wrong) = serial.chars().find(|c| !c.is_ascii_graphic()) {
            checker.wrong(&key, format!("may hold visible ASCII characters only, not {wrong:?}"));
        } else if let Some(before) = serials.insert(serial, index) {
            checker.wrong(&key, format!("`{serial}` is the serial number of `disk[{before}]` already"));
        }
    }
}

#[derive(PartialEq, Eq, Hash)]
enum Place<'a> {
    Here(&'a PathBuf),
    There(&'a str, &'a str),
}

fn remote_disk(remote: &RemoteDisk, key: &KeyPath, checker: &mut Checker<'_>) {
    peer::check(&remote.into(), key, checker);
    if let Some(why) = name_mistake(&remote.volume) {
        checker.wrong(&key.key("volume"), why);
    }
    if remote.patience.is_some_and(|patience| patience.0.is_zero()) {
        checker.wrong(&key.key("patience"), "must be longer than nothing; leave it out to wait for ever");
    }
}

fn nets(nets: &[Net], checker: &mut Checker<'_>) {
    let mut taps = HashMap::new();
    let mut macs = HashMap::new();
    for (index, net) in nets.iter().enumerate() {
        let key = KeyPath::root().key("net").index(index);
        let tap = &net.tap;
        if tap.is_empty() || tap.len() > LONGEST_TAP {
            let what = format!("an interface's name is 1 to {LONGEST_TAP} bytes long, not {}", tap.len());
            checker.wrong(&key.key("tap"), what);
        } else if let Some(wrong) =
            tap.chars().find(|c| !c.is_ascii_graphic() || matches!(c, '/' | ':' | '%'))
        {
            checker.wrong(&key.key("tap"), format!("an interface's name cannot hold {wrong:?}"));
        } else if let Some(before) = taps.insert(tap, index) {
            checker.wrong(&key.key("tap"), format!("`{tap}` is used by `net[{before}]` already"));
        }
        let Some(text) = &net.mac else { continue };
        match parse_mac(text) {
            Err(why) => checker.wrong(&key.key("mac"), why),
            Ok(mac) => {
                if let Some(before) = macs.insert(mac, index) {
                    checker.wrong(&key.key("mac"), format!("{text} is used by `net[{before}]` already"));
                }
            }
        }
    }
}

/// Reads a unicast MAC address, `52:54:00:12:34:56`.
///
/// # Errors
/// What is wrong with it, as a sentence.
pub fn parse_mac(text: &str) -> Result<[u8; 6], String> {
    let wrong = || format!("`{text}` is not a MAC address; write for example `52:54:00:12:34:56`");
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts.next().filter(|part| part.len() == 2).ok_or_else(wrong)?;
        if !part.bytes().all(|c| c.is_ascii_hexdigit()) {
            return Err(wrong());
        }
        *byte = u8::from_str_radix(part, 16).map_err(|_| wrong())?;
    }
    if parts.next().is_some() {
        return Err(wrong());
    }
    if mac[0] & 1 != 0 {
        return Err(format!("`{text}` is a group's address; the first byte of a card's own is even"));
    }
    if mac == [0; 6] {
        return Err("all zeros is nobody's address".to_owned());
    }
    Ok(mac)
}

fn devices(guest: &Guest, checker: &mut Checker<'_>) {
    let optional = [guest.rng.enabled, guest.balloon.is_some(), guest.console.is_some()];
    let count = guest.disk.len() + guest.net.len() + optional.iter().filter(|there| **there).count();
    if count > MOST_DEVICES {
        let key = if guest.disk.len() >= guest.net.len() { "disk" } else { "net" };
        let what = format!("the guest has {count} devices with this; at most {MOST_DEVICES} fit");
        checker.wrong(&KeyPath::root().key(key), what);
    }
}
