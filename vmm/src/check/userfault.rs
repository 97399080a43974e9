//! userfaultfd: what memory on other PCs stands on.

use super::{Line, sys};
use crate::memory::fault::userfault::{Access, NEEDED, agree, feature, open};

/// Feature bits, what they are for, and since which kernel they are there.
const FEATURES: [(u64, &str, &str); 8] = [
    (feature::WRITE_PROTECT, "write protection", "5.7"),
    (feature::MISSING_SHARED, "missing faults of shared memory", "4.11"),
    (feature::MINOR_SHARED, "minor faults of shared memory", "5.14"),
    (feature::EXACT_ADDRESS, "exact addresses", "5.18"),
    (feature::WRITE_PROTECT_SHARED, "write protection of shared memory", "5.19"),
    (feature::WRITE_PROTECT_UNPOPULATED, "write protection of unpopulated pages", "6.4"),
    (feature::POISON, "poison", "6.6"),
    (feature::MOVE, "move", "6.8"),
];
pub(super) fn line() -> Line {
    let name = "userfaultfd";
    let (descriptor, access) = match open() {
        Ok(opened) => opened,
        Err(why) => {
            return Line::missing(name, format!("userfaultfd is refused: {why}"))
                .why("memory on other PCs needs it")
                .mend(
                    "install a kernel with CONFIG_USERFAULTFD, or allow the call in the container's filter",
                );
        }
    };
    let features = match agree(&descriptor, 0) {
        Ok(features) => features,
        Err(why) => return Line::missing(name, "userfaultfd does not answer").why(why.to_string()),
    };
    let lacking: Vec<&(u64, &str, &str)> = FEATURES.iter().filter(|(bit, ..)| features & bit == 0).collect();
    let needed = features & NEEDED == NEEDED;
    let said: Vec<String> =
        lacking.iter().map(|(_, what, since)| format!("{what} (Linux {since})")).collect();
    if let Access::UserOnly = access {
        return Line::degraded(name, "for faults of user mode only")
            .why("a guest's faults are the kernel's; memory on other PCs must see them")
            .mend(if sys::number("/proc/sys/vm/unprivileged_userfaultfd") == Some(0) {
                "sudo sysctl vm.unprivileged_userfaultfd=1, or sudo setfacl -m u:$USER:rw /dev/userfaultfd"
            } else {
                "sudo setfacl -m u:$USER:rw /dev/userfaultfd"
            });
    }
    if !needed {
        return Line::degraded(name, format!("without {}", said.join(", ")))
            .why("memory on other PCs needs it")
            .mend("install Linux 5.19 or newer");
    }
    if said.is_empty() {
        return Line::ok(name, "with all features");
    }
    Line::ok(name, format!("all that is needed; without {}", said.join(", ")))
}
