//! What memory on other PCs stands on: userfaultfd, and the map of this process's pages.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::{Line, sys};
use crate::memory::frames::userfault::{Access, agree, feature, open};

/// What is lost without any of it.
const WHY: &str =
    "guests with a part of their memory on other PCs (`[memory] local`) cannot start without it";
/// Feature bits, what they are for, and since which Linux they are there.
const FEATURES: [(u64, &str, &str); 4] = [
    (feature::MISSING_SHARED, "events of missing pages of shared memory", "4.11"),
    (feature::THREAD, "events that name the thread", "4.14"),
    (feature::WRITE_PROTECT, "write protection", "5.7"),
    (feature::WRITE_PROTECT_SHARED, "write protection of shared memory", "5.19"),
];

pub(super) fn lines() -> Vec<Line> {
    vec![userfaultfd(&Found::here()), page_map(mapped_here())]
}

/// What the kernel said.
struct Found {
    /// What a descriptor sees and which features there are; or why there is none.
    opened: io::Result<(Access, u64)>,
    /// `vm.unprivileged_userfaultfd`, where the kernel has it (5.2).
    unprivileged: Option<u64>,
    /// Whether there is `/dev/userfaultfd` (6.1).
    device: bool,
}

impl Found {
    fn here() -> Self {
        let opened = open().and_then(|(descriptor, access)| Ok((access, agree(&descriptor, 0)?)));
        let unprivileged = sys::number("/proc/sys/vm/unprivileged_userfaultfd");
        Self { opened, unprivileged, device: Path::new("/dev/userfaultfd").exists() }
    }

    /// How an ordinary user comes to see the kernel's faults.
    fn allow(&self) -> &'static str {
        match (self.unprivileged, self.device) {
            (_, true) => "sudo setfacl -m u:$USER:rw /dev/userfaultfd",
            (Some(_), false) => "sudo sysctl vm.unprivileged_userfaultfd=1",
            (None, false) => "run omega as root",
        }
    }
}

fn userfaultfd(found: &Found) -> Line {
    let name = "userfaultfd";
    let (access, features) = match &found.opened {
        Ok(opened) => opened,
        Err(why) => return refused(found, why),
    };
    if *access == Access::UserOnly {
        return Line::degraded(name, "for faults of user mode only")
            .why(format!("KVM's faults are the kernel's, and have to be seen: {WHY}"))
            .mend(found.allow());
    }
    let lacking = FEATURES.iter().filter(|(bit, ..)| features & bit == 0);
    let lacking: Vec<String> = lacking.map(|(_, what, since)| format!("{what} (Linux {since})")).collect();
    if lacking.is_empty() {
        return Line::ok(name, "all that memory on other PCs needs");
    }
    Line::missing(name, format!("it lacks {}", lacking.join(", ")))
        .why(WHY)
        .mend("install Linux 5.19 or newer")
}

/// There is no descriptor to be had.
fn refused(found: &Found, why: &io::Error) -> Line {
    let name = "userfaultfd";
    match why.raw_os_error() {
        Some(libc::ENOSYS) => Line::missing(name, "the kernel has none")
            .why(WHY)
            .mend("install a kernel with CONFIG_USERFAULTFD; in a container, allow the call userfaultfd"),
        // Before Linux 5.11 nobody can be given faults of user mode alone.
        Some(libc::EINVAL) | Some(libc::EPERM) if found.unprivileged == Some(0) => {
            Line::missing(name, "this user may not use it (vm.unprivileged_userfaultfd is 0)")
                .why(WHY)
                .mend(found.allow())
        }
        _ => Line::missing(name, format!("it is refused: {why}"))
            .why(format!("a container's or service's system call filter; {WHY}"))
            .mend("allow the call userfaultfd in that filter, or give it /dev/userfaultfd"),
    }
}

/// Whether this process can see of a page of its own that it is mapped.
fn mapped_here() -> io::Result<bool> {
    const PRESENT: u64 = 1 << 63;
    let here = 1u8;
    let page = std::ptr::from_ref(&here) as u64 / crate::memory::fault::PAGE as u64;
    let mut entry = [0; 8];
    File::open("/proc/self/pagemap")?.read_exact_at(&mut entry, page * 8)?;
    Ok(u64::from_le_bytes(entry) & PRESENT != 0 && here == 1)
}

fn page_map(mapped: io::Result<bool>) -> Line {
    let name = "page map";
    let line = match mapped {
        Ok(true) => {
            return Line::ok(name, "readable: pages that a guest uses are told from those that it does not");
        }
        Ok(false) => Line::missing(name, "/proc/self/pagemap does not say which pages are mapped"),
        Err(why) => Line::missing(name, format!("/proc/self/pagemap cannot be read: {why}")),
    };
    line.why(WHY).mend("install a kernel with CONFIG_PROC_PAGE_MONITOR; in a container, let /proc be seen")
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;

    const ALL: u64 =
        feature::MISSING_SHARED | feature::THREAD | feature::WRITE_PROTECT | feature::WRITE_PROTECT_SHARED;

    fn line(opened: Result<(Access, u64), i32>, unprivileged: Option<u64>, device: bool) -> Line {
        let opened = opened.map_err(io::Error::from_raw_os_error);
        userfaultfd(&Found { opened, unprivileged, device })
    }

    fn mend(line: &Line) -> &str {
        line.mend.as_deref().unwrap_or_default()
    }

    #[test]
    fn what_is_asked_of_userfaultfd_is_what_is_looked_for() {
        let looked_for = FEATURES.iter().fold(0, |all, (bit, ..)| all | bit);
        assert_eq!(looked_for, crate::memory::frames::userfault::NEEDED | feature::THREAD);
    }

    #[test]
    fn features_that_an_older_kernel_lacks_are_named_with_the_kernel_that_has_them() {
        assert_eq!(line(Ok((Access::Full, ALL)), Some(0), true).state, State::Ok);
        // Debian 11: Linux 5.10.
        let old = line(Ok((Access::Full, ALL & !feature::WRITE_PROTECT_SHARED)), Some(1), false);
        assert_eq!(old.state, State::Missing);
        assert_eq!(old.what, "it lacks write protection of shared memory (Linux 5.19)");
        assert!(mend(&old).contains("5.19") && old.why.is_some_and(|why| why.contains("[memory] local")));
        let older = line(Ok((Access::Full, feature::MISSING_SHARED | feature::THREAD)), None, false);
        assert!(older.what.contains("write protection (Linux 5.7), write protection of shared"), "{older:?}");
    }

    #[test]
    fn a_user_who_may_not_is_told_what_this_kernel_offers() {
        // Linux 6.1 and newer have the device, 5.2 to 6.0 the switch only.
        let new = line(Ok((Access::UserOnly, ALL)), Some(0), true);
        assert!(new.state == State::Degraded && mend(&new).contains("/dev/userfaultfd"), "{new:?}");
        let middle = line(Ok((Access::UserOnly, ALL)), Some(0), false);
        assert!(mend(&middle).contains("unprivileged_userfaultfd=1"), "{middle:?}");
        let old = line(Err(libc::EINVAL), Some(0), false);
        assert!(old.state == State::Missing && mend(&old).contains("unprivileged_userfaultfd=1"), "{old:?}");
    }

    #[test]
    fn a_kernel_without_it_and_a_filter_are_told_apart() {
        let none = line(Err(libc::ENOSYS), None, false);
        assert!(none.what == "the kernel has none" && mend(&none).contains("CONFIG_USERFAULTFD"), "{none:?}");
        let filter = line(Err(libc::EPERM), Some(1), false);
        assert!(filter.what.contains("refused") && mend(&filter).contains("filter"), "{filter:?}");
    }

    #[test]
    fn a_page_map_that_cannot_be_read_is_named() {
        assert_eq!(page_map(Ok(true)).state, State::Ok);
        let blind = [Ok(false), Err(io::Error::from_raw_os_error(libc::ENOENT))].map(page_map);
        assert!(blind.iter().all(|line| line.state == State::Missing && line.mend.is_some()), "{blind:?}");
    }
}
