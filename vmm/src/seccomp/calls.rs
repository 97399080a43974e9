//! The table: which system calls each kind of thread makes once it runs, and what for.

use devices::thread::Role;
use libc::{
    SYS_accept4, SYS_brk, SYS_clock_gettime, SYS_clock_nanosleep, SYS_clone, SYS_clone3, SYS_close,
    SYS_connect, SYS_eventfd2, SYS_exit, SYS_exit_group, SYS_fallocate, SYS_fcntl, SYS_fdatasync, SYS_flock,
    SYS_fstat, SYS_fsync, SYS_futex, SYS_getpeername, SYS_getpgrp, SYS_getpid, SYS_getrandom,
    SYS_getsockname, SYS_getsockopt, SYS_gettid, SYS_io_uring_enter, SYS_io_uring_register,
    SYS_io_uring_setup, SYS_ioctl, SYS_lseek, SYS_madvise, SYS_mmap, SYS_mprotect, SYS_mremap, SYS_munmap,
    SYS_nanosleep, SYS_newfstatat, SYS_openat, SYS_poll, SYS_ppoll, SYS_prctl, SYS_pread64, SYS_preadv,
    SYS_preadv2, SYS_pwrite64, SYS_pwritev, SYS_read, SYS_readv, SYS_recvfrom, SYS_recvmsg,
    SYS_restart_syscall, SYS_rmdir, SYS_rseq, SYS_rt_sigaction, SYS_rt_sigprocmask, SYS_rt_sigreturn,
    SYS_sched_getaffinity, SYS_sched_yield, SYS_seccomp, SYS_sendmsg, SYS_sendto, SYS_set_robust_list,
    SYS_setsockopt, SYS_shutdown, SYS_sigaltstack, SYS_socket, SYS_statx, SYS_tgkill, SYS_timer_create,
    SYS_timer_delete, SYS_timer_settime, SYS_timerfd_settime, SYS_unlink, SYS_unlinkat, SYS_write,
    SYS_writev,
};

/// A permitted system call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    /// Its number.
    pub number: i64,
    /// With which arguments.
    pub check: Check,
}

/// What must hold for one of a call's arguments, an `int` (0 is the first).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Check {
    /// Anything goes.
    None,
    /// It is `value`.
    Equal {
        /// Which argument.
        argument: u8,
        /// What it is.
        value: u64,
    },
    /// Under `mask` it is `value`.
    Masked {
        /// Which argument.
        argument: u8,
        /// The bits that count.
        mask: u64,
        /// What they are.
        value: u64,
    },
}

const fn any(number: i64) -> Call {
    Call { number, check: Check::None }
}

const fn equal(number: i64, argument: u8, value: i32) -> Call {
    Call { number, check: Check::Equal { argument, value: value as u64 } }
}

const fn masked(number: i64, argument: u8, mask: i32, value: i32) -> Call {
    Call { number, check: Check::Masked { argument, mask: mask as u64, value: value as u64 } }
}

/// `ioctl`s whose type byte is `kind` (`_IOC_TYPE`).
const fn ioctls(kind: u8) -> Call {
    masked(SYS_ioctl, 1, 0xff00, (kind as i32) << 8)
}

const KVM_IOCTLS: Call = ioctls(0xae);
/// Terminals and TAP interfaces both.
const TTY_AND_TUN_IOCTLS: Call = ioctls(b'T');
/// Sizes, discards and zeroing of block devices.
const BLOCK_IOCTLS: Call = ioctls(0x12);

/// Every thread.
const EVERY: &[Call] = &[
    // Memory: the allocator, and stacks of threads that end. Nothing becomes executable.
    any(SYS_brk),
    any(SYS_madvise),
    masked(SYS_mmap, 2, libc::PROT_EXEC, 0),
    masked(SYS_mprotect, 2, libc::PROT_EXEC, 0),
    any(SYS_mremap),
    any(SYS_munmap),
    // Waiting for each other, and time where the vDSO has none.
    any(SYS_clock_gettime),
    any(SYS_clock_nanosleep),
    any(SYS_nanosleep),
    any(SYS_futex),
    any(SYS_sched_yield),
    any(SYS_restart_syscall),
    // Eventfds, consoles, the log on stderr.
    any(SYS_read),
    any(SYS_readv),
    any(SYS_write),
    any(SYS_writev),
    any(SYS_close),
    equal(SYS_fcntl, 1, libc::F_GETFD), // the standard library looks before it closes, in debug builds
    // Signals, and kicking a vCPU out of the guest. `abort` and a panic need these too.
    any(SYS_rt_sigaction),
    any(SYS_rt_sigprocmask),
    any(SYS_rt_sigreturn),
    any(SYS_sigaltstack),
    any(SYS_tgkill),
    any(SYS_getpid),
    any(SYS_gettid),
    // The seeds of hash maps.
    any(SYS_getrandom),
    // The start and the end of a thread.
    equal(SYS_prctl, 0, libc::PR_SET_NAME),
    equal(SYS_prctl, 0, libc::PR_GET_NAME),
    any(SYS_rseq),
    any(SYS_sched_getaffinity),
    any(SYS_set_robust_list),
    any(SYS_exit),
    any(SYS_exit_group),
];

/// Runs the guest, answers its exits: routes interrupts, moves doorbells when BARs move.
const VCPU: &[Call] = &[
    KVM_IOCTLS,
    any(SYS_eventfd2),
    // A local APIC of Omega's own: its timer kicks the vCPU's thread, and wakes it on time.
    any(SYS_timer_create),
    any(SYS_timer_settime),
    any(SYS_timer_delete),
    equal(SYS_prctl, 0, libc::PR_SET_TIMERSLACK),
];

/// An io_uring, and what is done outside of it.
const URING: &[Call] = &[
    any(SYS_io_uring_enter),
    any(SYS_io_uring_register),
    any(SYS_io_uring_setup),
    any(SYS_eventfd2),
    any(SYS_poll),
    any(SYS_ppoll),
];

/// The one `ioctl` of libibverbs: it registers staging memory and takes queue pairs down. Devices are opened,
/// and queue pairs made and connected, by another thread; messages go through mapped memory and `write`.
const VERBS_IOCTL: Call = equal(SYS_ioctl, 1, 0xc018_1b01_u32 as i32);

/// The disk's file, or its agent.
const DISK: &[Call] = &[
    BLOCK_IOCTLS,
    VERBS_IOCTL,
    any(SYS_fallocate),
    any(SYS_fdatasync),
    any(SYS_fsync),
    any(SYS_pread64),
    any(SYS_preadv),
    any(SYS_preadv2),
    any(SYS_pwrite64),
    any(SYS_pwritev),
    // The connection to the agent, made anew after a cut.
    equal(SYS_socket, 0, libc::AF_INET),
    equal(SYS_socket, 0, libc::AF_INET6),
    any(SYS_connect),
    any(SYS_fcntl),
    equal(SYS_ioctl, 1, libc::FIONBIO as i32), // how the standard library makes a socket non-blocking
    any(SYS_getpeername),
    any(SYS_getsockname),
    any(SYS_getsockopt),
    any(SYS_recvfrom), // the handshake of TLS, and records that are made here
    any(SYS_recvmsg),
    any(SYS_sendmsg),
    any(SYS_sendto),
    any(SYS_setsockopt),
    any(SYS_shutdown),
];

/// Page faults of the guest: pages are installed and protected, read from the memory's file when they are written
/// back, and taken out of it.
const MEMORY: &[Call] = &[
    ioctls(0xaa),
    any(SYS_fallocate),
    any(SYS_pread64),
    any(SYS_timerfd_settime), // the end of a page's hold, where another PC waits for it
];

/// The TAP interface: offloads and queues change while it runs.
const NET: &[Call] = &[TTY_AND_TUN_IOCTLS];

/// The entropy device needs nothing beyond [`EVERY`]; the balloon punches holes; RAM is cleared at a reset.
const DEVICE: &[Call] = &[any(SYS_fallocate)];

/// Waiting for several things at once.
const EVENTS: &[Call] = &[any(SYS_eventfd2), any(SYS_poll), any(SYS_ppoll)];

/// Clients of a Unix socket.
const SERVE: &[Call] = &[
    any(SYS_accept4),
    any(SYS_fcntl),
    any(SYS_getsockopt),
    any(SYS_recvfrom),
    any(SYS_recvmsg),
    any(SYS_sendmsg),
    any(SYS_sendto),
    any(SYS_setsockopt),
    any(SYS_shutdown),
];

/// Threads that start threads.
const SPAWN: &[Call] = &[
    masked(SYS_clone, 0, libc::CLONE_THREAD, libc::CLONE_THREAD),
    any(SYS_clone3), // its flags are in memory, where a filter cannot look; `execve` is forbidden to all
    equal(SYS_prctl, 0, libc::PR_SET_NO_NEW_PRIVS),
    any(SYS_seccomp),
];

/// `KVM_IRQ_LINE`: what is typed raises the serial port's interrupt.
const KVM_IRQ_LINE: Call = equal(SYS_ioctl, 1, 0x4008_ae61);

/// The terminal's modes and size, whether it is this process's, and the guest's serial port.
const CONSOLE: &[Call] = &[TTY_AND_TUN_IOCTLS, KVM_IRQ_LINE, any(SYS_fdatasync), any(SYS_getpgrp)];

/// Pausing, saving state, pressing the power button.
const CONTROL: &[Call] = &[KVM_IOCTLS, any(SYS_fallocate)];

/// Starts threads, loads the kernel again at a reset, takes sockets away at the end.
const MAIN: &[Call] = &[
    masked(SYS_openat, 2, libc::O_ACCMODE, libc::O_RDONLY),
    any(SYS_fstat),
    any(SYS_lseek),
    any(SYS_newfstatat),
    any(SYS_statx),
    equal(SYS_flock, 1, libc::LOCK_UN),
    any(SYS_rmdir),
    any(SYS_unlink),
    any(SYS_unlinkat),
];

/// The groups that make up a role's rights. A thread inherits the filter of the one that started it, so the
/// main thread's covers all.
fn groups(role: Role) -> &'static [&'static [Call]] {
    match role {
        Role::Main => {
            &[EVERY, VCPU, URING, DISK, MEMORY, NET, DEVICE, EVENTS, SERVE, SPAWN, CONSOLE, CONTROL, MAIN]
        }
        Role::Vcpu => &[EVERY, VCPU],
        Role::Disk => &[EVERY, URING, DISK],
        Role::Memory => &[EVERY, URING, DISK, MEMORY],
        Role::Net => &[EVERY, URING, NET],
        Role::Device => &[EVERY, URING, DEVICE],
        Role::Console => &[EVERY, EVENTS, SERVE, SPAWN, CONSOLE],
        Role::Control => &[EVERY, EVENTS, SERVE, SPAWN, CONTROL],
    }
}

/// What threads of `role` may do.
pub fn of(role: Role) -> impl Iterator<Item = Call> {
    groups(role).iter().copied().flatten().copied()
}
