//! A slower clock for a whole program: in `LAB_CLOCK` seconds, one passes for it.
//!
//! An emulated processor is ten to a hundred times slower than a real one, but its clocks run as fast as ours. So by its
//! own clock such a PC takes a millisecond to answer a packet, and half of what it can do goes into its own timer ticks. A
//! program with this library in `LD_PRELOAD` sees a clock that is slower by as much ("time dilation": Gupta et al., NSDI
//! 2006), and with it everything that QEMU emulates: timers, the time stamp counter, the kernel in the PC and its guests.
//! All programs with the same `LAB_CLOCK` agree on the time. The calendar (`CLOCK_REALTIME`) stays as it is.
//!
//! Replaced are the functions of libc that tell the monotonic time or wait for some of it, and the instruction RDTSC: the
//! kernel is asked to make it a fault (`PR_SET_TSC`), which is answered here.
#![allow(unsafe_code)] // functions of libc are replaced, and the registers of an interrupted instruction set

use std::ffi::{CStr, c_int, c_long, c_void};
use std::ptr;
use std::sync::atomic::{AtomicI64, Ordering::Relaxed};

use libc::{clockid_t, nfds_t, pollfd, sigset_t, time_t, timespec, timeval};

const BILLION: i64 = 1_000_000_000;

/// The time stamp counter's ticks in a nanosecond of the program's time.
const TICKS: i64 = 2;

/// A second of the program takes so many; 0: not asked yet.
static SLOWER: AtomicI64 = AtomicI64::new(0);

fn slower() -> i64 {
    match SLOWER.load(Relaxed) {
        0 => {
            // SAFETY: the name is a C string; nobody changes the environment while the program starts.
            let value = unsafe { libc::getenv(c"LAB_CLOCK".as_ptr()) };
            let text = if value.is_null() {
                None
            } else {
                // SAFETY: getenv returns a C string that stays.
                unsafe { CStr::from_ptr(value) }.to_str().ok()
            };
            let slower = text.and_then(|text| text.parse().ok()).unwrap_or(1).clamp(1, 1000);
            SLOWER.store(slower, Relaxed);
            slower
        }
        slower => slower,
    }
}

/// What the kernel says. Not by way of the vDSO, which reads the time stamp counter itself.
fn kernel(clock: clockid_t, time: &mut timespec) -> c_int {
    // SAFETY: `time` can be written to.
    unsafe { libc::syscall(libc::SYS_clock_gettime, clock, ptr::from_mut(time)) as c_int }
}

const ZERO: timespec = timespec { tv_sec: 0, tv_nsec: 0 };

fn nanos(time: &timespec) -> i64 {
    time.tv_sec * BILLION + time.tv_nsec
}

fn timespec_of(nanos: i64) -> timespec {
    timespec { tv_sec: nanos / BILLION, tv_nsec: nanos % BILLION }
}

/// `clock_gettime(2)`.
///
/// # Safety
/// As libc says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn clock_gettime(clock: clockid_t, time: *mut timespec) -> c_int {
    let mut now = ZERO;
    let result = kernel(clock, &mut now);
    if result == 0 {
        let slowed = matches!(
            clock,
            libc::CLOCK_MONOTONIC
                | libc::CLOCK_MONOTONIC_RAW
                | libc::CLOCK_MONOTONIC_COARSE
                | libc::CLOCK_BOOTTIME
        );
        let now = if slowed { timespec_of(nanos(&now) / slower()) } else { now };
        // SAFETY: the caller's to be written to.
        unsafe { time.write(now) };
    }
    result
}

/// `gettimeofday(2)`, as it is; that of libc would read the time stamp counter.
///
/// # Safety
/// As libc says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gettimeofday(time: *mut timeval, _zone: *mut c_void) -> c_int {
    let mut now = ZERO;
    let result = kernel(libc::CLOCK_REALTIME, &mut now);
    // SAFETY: the caller's to be written to.
    unsafe { time.write(timeval { tv_sec: now.tv_sec, tv_usec: now.tv_nsec / 1000 }) };
    result
}

/// `time(2)`, as it is.
///
/// # Safety
/// As libc says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn time(to: *mut time_t) -> time_t {
    let mut now = ZERO;
    kernel(libc::CLOCK_REALTIME, &mut now);
    if !to.is_null() {
        // SAFETY: the caller's to be written to.
        unsafe { to.write(now.tv_sec) };
    }
    now.tv_sec
}

/// `ppoll(2)`.
///
/// # Safety
/// As libc says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ppoll(
    descriptors: *mut pollfd,
    count: nfds_t,
    timeout: *const timespec,
    mask: *const sigset_t,
) -> c_int {
    // SAFETY: null or the caller's, for the kernel and for this.
    let waits = unsafe { timeout.as_ref() };
    let mut slowed = waits.map(|time| timespec_of(nanos(time).saturating_mul(slower())));
    let timeout = slowed.as_mut().map_or(ptr::null_mut(), ptr::from_mut);
    // SAFETY: the caller's; the kernel may write what is left to `slowed`. Its signal sets have 8 bytes.
    unsafe { libc::syscall(libc::SYS_ppoll, descriptors, count, timeout, mask, 8_usize) as c_int }
}

/// `poll(2)`.
///
/// # Safety
/// As libc says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn poll(descriptors: *mut pollfd, count: nfds_t, timeout: c_int) -> c_int {
    let timeout = i64::from(timeout).saturating_mul(slower()).clamp(-1, i64::from(c_int::MAX)) as c_int;
    // SAFETY: the caller's.
    unsafe { libc::syscall(libc::SYS_poll, descriptors, count, c_long::from(timeout)) as c_int }
}

/// Answers RDTSC and RDTSCP; any other fault at this place ends the program when the instruction is tried again.
extern "C" fn faulted(_signal: c_int, _info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel gives a handler with SA_SIGINFO a context, which is this handler's until it returns.
    let registers = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let at = registers[libc::REG_RIP as usize] as *const u8;
    // SAFETY: an instruction that has just been fetched; RDTSC has two bytes, and what follows is code as well.
    let bytes = unsafe { [at.read(), at.add(1).read(), at.add(2).read()] };
    let length = match bytes {
        [0x0f, 0x31, _] => 2,
        [0x0f, 0x01, 0xf9] => {
            registers[libc::REG_RCX as usize] = 0;
            3
        }
        _ => {
            // SAFETY: may be called by a handler.
            unsafe { libc::signal(libc::SIGSEGV, libc::SIG_DFL) };
            return;
        }
    };
    let mut now = ZERO;
    kernel(libc::CLOCK_MONOTONIC, &mut now);
    let ticks = nanos(&now) * TICKS / slower();
    registers[libc::REG_RAX as usize] = ticks & 0xffff_ffff;
    registers[libc::REG_RDX as usize] = ticks >> 32 & 0xffff_ffff;
    registers[libc::REG_RIP as usize] += length;
}

extern "C" fn start() {
    if slower() == 1 {
        return;
    }
    // SAFETY: all zeros is a valid sigaction; the handler keeps to what handlers may do. Threads inherit both.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = faulted as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER | libc::SA_ONSTACK;
        libc::sigaction(libc::SIGSEGV, &raw const action, ptr::null_mut());
        libc::prctl(libc::PR_SET_TSC, libc::PR_TSC_SIGSEGV);
    }
}

/// Runs [`start`] before the program's main function.
#[used]
#[unsafe(link_section = ".init_array")]
static START: extern "C" fn() = start;
