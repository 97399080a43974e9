//! What the kernel offers beside KVM.

use io_uring::{IoUring, Probe, opcode};
use nix::sys::resource::{Resource, getrlimit};
use nix::sys::utsname::uname;

use super::{Line, sys};

/// The oldest kernel that Omega is made for.
const OLDEST: (u32, u32) = (5, 19);
/// Files that a guest with many disks, queues and clients holds open.
const FILES: u64 = 1024;
/// Memory that io_uring's buffers are locked in, before Linux 5.12 and for users without the privilege.
const LOCKED: u64 = 64 << 20;

/// What the rings of disks and connections ask for.
const OPERATIONS: [(u8, &str); 16] = [
    (opcode::Nop::CODE, "nop"),
    (opcode::Read::CODE, "read"),
    (opcode::Readv::CODE, "readv"),
    (opcode::ReadFixed::CODE, "read_fixed"),
    (opcode::Write::CODE, "write"),
    (opcode::Writev::CODE, "writev"),
    (opcode::WriteFixed::CODE, "write_fixed"),
    (opcode::Fsync::CODE, "fsync"),
    (opcode::Fallocate::CODE, "fallocate"),
    (opcode::PollAdd::CODE, "poll_add"),
    (opcode::AsyncCancel::CODE, "async_cancel"),
    (opcode::SendMsg::CODE, "sendmsg"),
    (opcode::RecvMsg::CODE, "recvmsg"),
    (opcode::Accept::CODE, "accept"),
    (opcode::Connect::CODE, "connect"),
    (opcode::Recv::CODE, "recv"),
];

pub(super) fn version() -> Line {
    let name = "kernel";
    let Ok(system) = uname() else {
        return Line::degraded(name, "unknown").why("the kernel does not say its version");
    };
    let release = system.release().to_string_lossy().into_owned();
    match parse_release(&release) {
        Some(version) if version >= OLDEST => Line::ok(name, format!("Linux {release}")),
        _ => Line::degraded(name, format!("Linux {release}"))
            .why(format!("Omega is made for {}.{} and newer", OLDEST.0, OLDEST.1))
            .mend("install the distribution's newest kernel"),
    }
}

fn parse_release(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

pub(super) fn io_uring() -> Line {
    let name = "io_uring";
    let line = match IoUring::new(8) {
        Ok(ring) => {
            let mut probe = Probe::new();
            let lacking: Vec<&str> = match ring.submitter().register_probe(&mut probe) {
                Ok(()) => {
                    let lacking = OPERATIONS.iter().filter(|(code, _)| !probe.is_supported(*code));
                    lacking.map(|(_, name)| *name).collect()
                }
                Err(_) => vec!["a way to ask for its operations"],
            };
            let modes: std::io::Result<IoUring> =
                IoUring::builder().setup_single_issuer().setup_defer_taskrun().build(8);
            match (lacking.as_slice(), modes) {
                ([], Ok(_)) => Line::ok(name, "all that Omega needs"),
                ([], Err(_)) => Line::degraded(name, "works, without deferred completions")
                    .why("Linux 6.1 has them; disks and connections are a little faster with them")
                    .mend("install Linux 6.1 or newer"),
                (lacking, _) => Line::missing(name, format!("io_uring lacks {}", lacking.join(", ")))
                    .why("disks and connections work by it")
                    .mend("install Linux 5.19 or newer"),
            }
        }
        Err(why) => {
            let sysctl = sys::number("/proc/sys/kernel/io_uring_disabled").unwrap_or(0);
            let line = Line::missing(name, format!("io_uring is refused: {why}"));
            if sysctl > 0 {
                line.why(format!("kernel.io_uring_disabled is {sysctl}"))
                    .mend("sudo sysctl kernel.io_uring_disabled=0")
            } else {
                line.why("a container's or service's system call filter, or a kernel without it")
                    .mend("allow io_uring_setup, io_uring_enter and io_uring_register in that filter")
            }
        }
    };
    line.required()
}

pub(super) fn seccomp() -> Line {
    let actions = sys::read("/proc/sys/kernel/seccomp/actions_avail").unwrap_or_default();
    if actions.split_whitespace().any(|action| action == "kill_process") {
        return Line::ok("seccomp", "filters of system calls");
    }
    Line::missing("seccomp", "no filters of system calls")
        .why("each of a guest's threads is confined to the calls that it needs")
        .mend("install a kernel with CONFIG_SECCOMP_FILTER; `omega run --seccomp off` does without")
}

pub(super) fn ktls() -> Line {
    let layers = sys::read("/proc/sys/net/ipv4/tcp_available_ulp").unwrap_or_default();
    if layers.split_whitespace().any(|layer| layer == "tls") {
        return Line::ok("kernel TLS", "there");
    }
    Line::degraded("kernel TLS", "the module tls is not loaded")
        .why("encrypted connections to agents cost less with it")
        .mend("sudo modprobe tls; echo tls | sudo tee /etc/modules-load.d/tls.conf")
}

pub(super) fn memory() -> Vec<Line> {
    let folder = "/sys/kernel/mm/hugepages";
    let mut pools = Vec::new();
    let mut reserved = 0;
    for pool in sys::names(folder) {
        let count = sys::number(format!("{folder}/{pool}/nr_hugepages")).unwrap_or(0);
        reserved += count;
        let size = pool.trim_start_matches("hugepages-");
        pools.push(format!("{count} × {size}"));
    }
    let huge = if pools.is_empty() {
        Line::missing("huge pages", "the kernel has none").why("large guests are a little faster on them")
    } else if reserved == 0 {
        Line::degraded("huge pages", format!("none reserved ({})", pools.join(", ")))
            .why("guests do not need them; large ones are a little faster on them")
            .mend("sudo sysctl vm.nr_hugepages=512 (for 1 GiB)")
    } else {
        Line::ok("huge pages", format!("reserved: {}", pools.join(", ")))
    };
    let text = sys::read("/sys/kernel/mm/transparent_hugepage/enabled").unwrap_or_default();
    let chosen = text.split_whitespace().find_map(|word| word.strip_prefix('[')?.strip_suffix(']'));
    let transparent = match chosen {
        Some(mode @ ("always" | "madvise")) => Line::ok("transparent huge", mode),
        Some(mode) => Line::degraded("transparent huge", format!("shared memory: {mode}"))
            .why("a guest's RAM is shared memory, and is faster in large pages")
            .mend("echo advise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled"),
        None => Line::missing("transparent huge", "the kernel has none")
            .why("a guest's RAM is a little faster in large pages"),
    };
    vec![huge, transparent]
}

pub(super) fn limits() -> Vec<Line> {
    let files = limit("open files", Resource::RLIMIT_NOFILE, FILES, "nofile", |number| number.to_string());
    let files = told(files, "many disks and connections may find no room");
    let locked = limit("locked memory", Resource::RLIMIT_MEMLOCK, LOCKED, "memlock", |number| {
        crate::units::Bytes(number).to_string()
    });
    let why = "buffers of disks and connections, and of fault handlers with memory on other PCs, may not be registered \
               and are slower";
    let locked = told(locked, why);
    vec![files, locked]
}

/// Says what a limit that is too low means.
fn told(line: Line, why: &str) -> Line {
    if line.state == super::State::Degraded && line.why.is_none() { line.why(why) } else { line }
}

fn limit(name: &'static str, which: Resource, least: u64, item: &str, say: impl Fn(u64) -> String) -> Line {
    match getrlimit(which) {
        Ok((soft, _)) if soft == nix::sys::resource::RLIM_INFINITY => Line::ok(name, "no limit"),
        Ok((soft, _)) if soft >= least => Line::ok(name, format!("at most {}", say(soft))),
        Ok((soft, hard)) => {
            let line = Line::degraded(name, format!("at most {}; {} is better", say(soft), say(least)));
            // Limits of memory count in KiB there.
            let number = if item == "memlock" { least >> 10 } else { least };
            if hard >= least && item == "nofile" {
                line.mend(format!("ulimit -n {number}"))
            } else {
                let file = "/etc/security/limits.d/omega.conf";
                line.mend(format!("echo \"$USER - {item} {number}\" | sudo tee -a {file}, then log in again"))
            }
        }
        Err(why) => Line::degraded(name, "unknown").why(format!("the kernel does not say: {why}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_are_compared_by_their_first_two_numbers() {
        assert_eq!(parse_release("6.1.0-18-amd64"), Some((6, 1)));
        assert_eq!(parse_release("5.10"), Some((5, 10)));
        assert_eq!(parse_release("custom"), None);
        assert!((5, 9) < OLDEST && (6, 1) > OLDEST);
    }
}
