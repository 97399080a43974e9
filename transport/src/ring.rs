//! One io_uring, owned by one thread, shared by everything that thread drives.
//!
//! A disk worker's doorbells, files and sockets all complete on its ring, so one system call submits
//! everything that is ready and waits for whatever comes first. Each user of the ring takes a
//! [`Source`] and recognises its completions by it.
#![allow(unsafe_code)] // io_uring submission is unsafe; callers of the safe methods cannot break it

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use io_uring::{IoUring, cqueue, opcode, squeue, types};

use crate::buffer::Buffer;

/// Names one user of a [`Ring`]; completions carry it back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Source(u16);

impl Source {
    /// The token under which an operation of this source completes. `payload` uses 48 bits.
    #[must_use]
    pub fn token(self, payload: u64) -> Token {
        debug_assert!(payload < 1 << 48, "a token's payload has 48 bits");
        Token(u64::from(self.0) << 48 | payload & ((1 << 48) - 1))
    }
}

/// What an operation is recognised by when it completes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Token(u64);

impl Token {
    /// Who submitted the operation.
    #[must_use]
    pub fn source(self) -> Source {
        Source((self.0 >> 48) as u16)
    }

    /// What the source put into the token.
    #[must_use]
    pub fn payload(self) -> u64 {
        self.0 & ((1 << 48) - 1)
    }
}

/// One finished operation.
#[derive(Clone, Copy, Debug)]
pub struct Completion {
    /// The token the operation was submitted under.
    pub token: Token,
    /// What the system call would have returned: a count, or a negative `errno`.
    pub result: i32,
    /// `IORING_CQE_F_*`, for multishot operations and provided buffers.
    pub flags: u32,
}

impl Completion {
    /// The count, or the error.
    ///
    /// # Errors
    /// The operation's own error.
    pub fn count(&self) -> io::Result<usize> {
        usize::try_from(self.result).map_err(|_| io::Error::from_raw_os_error(-self.result))
    }

    /// Whether a multishot operation goes on after this completion.
    #[must_use]
    pub fn more(&self) -> bool {
        cqueue::more(self.flags)
    }
}

/// An io_uring and the operations that did not fit into it yet.
pub struct Ring {
    uring: IoUring,
    backlog: VecDeque<squeue::Entry>,
    put_back: VecDeque<Completion>,
    haste: Haste,
    sources: u16,
    /// Registered buffers by index; empty until the first is registered.
    registered: Vec<Option<Buffer>>,
    /// Memory of operations whose owner is gone.
    orphans: Vec<(Token, Box<[u8]>)>,
}

/// Entries of the table of registered buffers.
const REGISTERED: u32 = 256;

/// The longest time for which a wait watches the ring instead of sleeping. To sleep and be woken on an idle CPU
/// costs tens of microseconds where CPUs are virtual, which is more than the round trip that is waited for.
const SPIN: Duration = Duration::from_micros(50);

/// A wait that slept for less than this is short: most of it was the waking, twice over if the other side
/// sleeps too.
const SHORT: Duration = Duration::from_micros(120);

/// How long to watch between letting others run that want this CPU. Whoever was woken just now, as by a page that was
/// put in place, often waits for it, and what is watched for comes of its work.
const YIELD: Duration = Duration::from_micros(1);

/// So many short waits in a row make the next one watch.
const SHORT_WAITS: u32 = 8;

/// What others take of a watched wait by keeping the CPU is at most this part of all time: for so many times as long
/// nothing is watched.
const REST: u32 = 32;

/// Decides whether to watch or to sleep, by how long the last waits were.
struct Haste {
    short: u32,
    /// With one CPU, whoever we wait for could not run meanwhile.
    alone: bool,
    /// Others have a lot to do on this CPU; until then nothing is watched.
    rests: Option<Instant>,
}

impl Haste {
    fn new() -> Self {
        let alone = std::thread::available_parallelism().is_ok_and(|cpus| cpus.get() == 1);
        Self { short: 0, alone, rests: None }
    }

    fn pays(&mut self) -> bool {
        if self.short < SHORT_WAITS || self.alone {
            return false;
        }
        self.rests = self.rests.filter(|until| Instant::now() < *until);
        self.rests.is_none()
    }

    /// A wait that slept took so long.
    fn note(&mut self, took: Duration) {
        self.short = if took < SHORT { SHORT_WAITS.min(self.short + 1) } else { 0 };
    }

    /// Somebody else has run on this CPU for so long. Who has a lot to do keeps it for long, and does not give it
    /// back to who watches when something comes, but does to who sleeps.
    /// `true`: watch no longer.
    fn yielded(&mut self, took: Duration) -> bool {
        let busy = took >= SHORT;
        if busy {
            self.rests = Some(Instant::now() + took * REST);
        }
        busy
    }

    /// It was watched in vain.
    fn missed(&mut self) {
        // A few misses among many hits are well spent.
        self.short = self.short.saturating_sub(SHORT_WAITS / 4);
    }
}

/// Source 0: the ring's own operations, whose completions nobody waits for.
const OWN: Source = Source(0);

impl Ring {
    /// A ring that takes `entries` operations at once; more wait in memory. It belongs to the thread
    /// that makes it: the kernel refuses operations from another one.
    ///
    /// # Errors
    /// The kernel refuses io_uring (`kernel.io_uring_disabled`, seccomp, locked-memory limit).
    pub fn new(entries: u32) -> io::Result<Self> {
        // The best mode first: completions are made only when this thread enters the kernel for them; the
        // flag tells `submit` that there are some to make.
        let best = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .setup_cqsize(entries * 4)
            .dontfork()
            .build(entries);
        let uring = match best {
            Ok(uring) => uring,
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => IoUring::new(entries)?,
            Err(e) => return Err(e),
        };
        let (backlog, put_back) = (VecDeque::new(), VecDeque::new());
        let haste = Haste::new();
        let (registered, orphans) = (Vec::new(), Vec::new());
        Ok(Self { uring, backlog, put_back, haste, sources: OWN.0, registered, orphans })
    }

    /// A new source.
    ///
    /// # Panics
    /// After 65,535 of them, which is a leak in the caller.
    pub fn source(&mut self) -> Source {
        self.sources = self.sources.checked_add(1).expect("a ring has at most 65,535 sources");
        Source(self.sources)
    }

    /// Queues an operation; it reaches the kernel at the next [`submit`](Self::submit) or
    /// [`wait`](Self::wait).
    ///
    /// # Safety
    /// Memory and descriptors that `entry` names must stay valid until its (last) completion.
    pub unsafe fn push(&mut self, entry: squeue::Entry, token: Token) {
        let entry = entry.user_data(token.0);
        // SAFETY: the caller keeps what the entry names alive.
        if !self.backlog.is_empty() || unsafe { self.uring.submission().push(&entry) }.is_err() {
            self.backlog.push_back(entry);
        }
    }

    /// Polls `fd` for input once (`multishot`: again and again, until cancelled).
    pub fn poll_readable(&mut self, fd: RawFd, multishot: bool, token: Token) {
        let entry = opcode::PollAdd::new(types::Fd(fd), libc::POLLIN as u32).multi(multishot).build();
        // SAFETY: the operation names no memory; a closed descriptor only makes it fail.
        unsafe { self.push(entry, token) };
    }

    /// Completes under `token` at once.
    pub(crate) fn wake(&mut self, token: Token) {
        // SAFETY: a no-op names no memory.
        unsafe { self.push(opcode::Nop::new().build(), token) };
    }

    /// Polls `fd` once for room to write.
    pub fn poll_writable(&mut self, fd: RawFd, token: Token) {
        let entry = opcode::PollAdd::new(types::Fd(fd), libc::POLLOUT as u32).build();
        // SAFETY: the operation names no memory; a closed descriptor only makes it fail.
        unsafe { self.push(entry, token) };
    }

    /// Receives from the socket `fd` into the first `len` bytes of `memory`, once.
    ///
    /// # Safety
    /// `memory` must not be freed or touched before the operation completes; see [`adopt`](Self::adopt).
    pub(crate) unsafe fn receive(&mut self, fd: RawFd, memory: &mut [u8], len: usize, token: Token) {
        let len = memory.len().min(len) as u32;
        let entry = opcode::Recv::new(types::Fd(fd), memory.as_mut_ptr(), len).build();
        // SAFETY: the caller keeps the memory.
        unsafe { self.push(entry, token) };
    }

    /// Keeps the memory of the operation under `token` until it completes; its owner does not want to wait.
    pub(crate) fn adopt(&mut self, token: Token, memory: Box<[u8]>) {
        self.orphans.push((token, memory));
    }

    /// Registers the memory of `buffer` (one segment) for `READ_FIXED` and `WRITE_FIXED`, keeps it alive
    /// and returns its index; `None` if the kernel refuses (locked-memory limit) or the table is full.
    pub fn register(&mut self, buffer: Buffer) -> Option<u16> {
        let [iovec] = buffer.iovecs() else { return None };
        if self.registered.is_empty() {
            self.uring.submitter().register_buffers_sparse(REGISTERED).ok()?;
            self.registered.resize_with(REGISTERED as usize, || None);
        }
        let index = self.registered.iter().position(Option::is_none)?;
        // SAFETY: the memory stays mapped: the table keeps the buffer.
        unsafe { self.uring.submitter().register_buffers_update(index as u32, &[*iovec], None) }.ok()?;
        self.registered[index] = Some(buffer);
        u16::try_from(index).ok()
    }

    /// Gives the index up, and the buffer that was registered under it.
    pub fn unregister(&mut self, index: u16) {
        let Some(slot) = self.registered.get_mut(usize::from(index)) else { return };
        if slot.is_none() {
            return;
        }
        let none = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
        // SAFETY: an empty range names no memory.
        if unsafe { self.uring.submitter().register_buffers_update(u32::from(index), &[none], None) }.is_ok()
        {
            *slot = None;
        }
    }

    /// Asks the kernel to cancel everything submitted under `token`. The operation still completes, as a
    /// rule with `ECANCELED`.
    pub fn cancel(&mut self, token: Token) {
        let entry = opcode::AsyncCancel::new(token.0).build();
        // SAFETY: the operation names no memory.
        unsafe { self.push(entry, OWN.token(0)) };
    }

    /// Hands all queued operations to the kernel without waiting.
    ///
    /// # Errors
    /// `io_uring_enter` fails for another reason than an interruption or a full completion queue.
    pub fn submit(&mut self) -> io::Result<()> {
        self.enter(0, None)
    }

    /// Hands all queued operations to the kernel and waits until a completion is there, `timeout` has
    /// passed or a signal arrived. Returns at once if a completion is there already.
    ///
    /// # Errors
    /// As [`submit`](Self::submit).
    pub fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        let ready = !self.put_back.is_empty() || !self.uring.completion().is_empty();
        if ready || timeout.is_some_and(|timeout| timeout.is_zero()) {
            return self.enter(0, None);
        }
        if !self.haste.pays() {
            let began = Instant::now();
            let result = self.enter(1, timeout);
            self.haste.note(began.elapsed());
            return result;
        }
        self.enter(0, None)?;
        if !self.watch(timeout.unwrap_or(SPIN).min(SPIN)) {
            self.haste.missed();
        }
        self.enter(1, timeout)
    }

    /// Watches the ring for so long at most; says whether something came.
    fn watch(&mut self, at_most: Duration) -> bool {
        let began = Instant::now();
        let mut yields = Duration::ZERO;
        while !self.stirs() {
            let watched = began.elapsed();
            if watched >= at_most {
                return false;
            }
            if watched >= yields {
                std::thread::yield_now();
                let now = began.elapsed();
                if self.haste.yielded(now.saturating_sub(watched)) {
                    return self.stirs();
                }
                yields = now + YIELD;
            }
            std::hint::spin_loop();
        }
        true
    }

    /// Whether a wait would end at once.
    fn stirs(&mut self) -> bool {
        !self.uring.completion().is_empty() || self.uring.submission().taskrun()
    }

    fn enter(&mut self, want: usize, timeout: Option<Duration>) -> io::Result<()> {
        loop {
            self.refill();
            let more = !self.backlog.is_empty();
            let want = if more { 0 } else { want };
            let result = match timeout {
                Some(timeout) if want > 0 => {
                    let timespec = types::Timespec::from(timeout);
                    let args = types::SubmitArgs::new().timespec(&timespec);
                    self.uring.submitter().submit_with_args(want, &args)
                }
                _ => self.uring.submitter().submit_and_wait(want),
            };
            match result {
                Ok(_) if more => continue,
                Ok(_) => return Ok(()),
                Err(e) => match e.raw_os_error() {
                    Some(libc::ETIME | libc::EINTR | libc::EBUSY | libc::EAGAIN) => return Ok(()),
                    _ => return Err(e),
                },
            }
        }
    }

    fn refill(&mut self) {
        let mut queue = self.uring.submission();
        while let Some(entry) = self.backlog.front() {
            // SAFETY: `push`'s caller keeps what the entry names alive.
            if unsafe { queue.push(entry) }.is_err() {
                break;
            }
            self.backlog.pop_front();
        }
    }

    /// The next finished operation, if there is one.
    pub fn reap(&mut self) -> Option<Completion> {
        if let Some(completion) = self.put_back.pop_front() {
            return Some(completion);
        }
        loop {
            let entry = self.uring.completion().next()?;
            let token = Token(entry.user_data());
            if !self.orphans.is_empty() {
                self.orphans.retain(|(orphan, _)| *orphan != token);
            }
            if token.source() != OWN {
                return Some(Completion { token, result: entry.result(), flags: entry.flags() });
            }
        }
    }

    /// Gives back completions of other sources that a caller reaped while it waited for its own.
    pub fn put_back(&mut self, completions: impl IntoIterator<Item = Completion>) {
        self.put_back.extend(completions);
    }

    /// The io_uring itself, to register buffers or files with it.
    #[must_use]
    pub fn submitter(&self) -> io_uring::Submitter<'_> {
        self.uring.submitter()
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // The kernel ends what is in flight some time after the ring is closed, so the memory is given up.
        self.orphans.drain(..).for_each(|(_, memory)| std::mem::forget(memory));
    }
}

impl AsRawFd for Ring {
    fn as_raw_fd(&self) -> RawFd {
        self.uring.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use nix::sys::eventfd::EventFd;

    use super::*;

    #[test]
    fn more_operations_than_entries_all_complete() {
        let mut ring = Ring::new(4).expect("io_uring works here");
        let source = ring.source();
        for i in 0..100 {
            // SAFETY: a no-op names no memory.
            unsafe { ring.push(opcode::Nop::new().build(), source.token(i)) };
        }
        let mut seen = Vec::new();
        while seen.len() < 100 {
            ring.wait(None).expect("it waits");
            while let Some(done) = ring.reap() {
                seen.push(done.token.payload());
            }
        }
        seen.sort_unstable();
        assert_eq!(seen, (0..100).collect::<Vec<_>>());
    }

    #[test]
    fn completions_come_to_a_thread_that_only_submits_and_never_waits() {
        use std::io::Write;
        let (here, mut there) = std::os::unix::net::UnixStream::pair().expect("a pair");
        let mut ring = Ring::new(4).expect("io_uring works here");
        let source = ring.source();
        ring.poll_readable(here.as_raw_fd(), false, source.token(7));
        ring.submit().expect("it submits");
        assert!(ring.reap().is_none());
        there.write_all(b"x").expect("it writes");
        let deadline = Instant::now() + Duration::from_secs(5);
        let completion = loop {
            ring.submit().expect("it submits");
            if let Some(completion) = ring.reap() {
                break completion;
            }
            assert!(Instant::now() < deadline, "the poll completes");
        };
        assert_eq!(completion.token, source.token(7));
    }

    #[test]
    fn a_ring_in_haste_sees_what_comes_sleeps_in_the_end_and_calms_down() {
        let mut ring = Ring::new(4).expect("io_uring works here");
        ring.haste = Haste { short: SHORT_WAITS, alone: false, rests: None };
        let start = Instant::now();
        ring.wait(Some(Duration::from_millis(20))).expect("it waits");
        assert!(start.elapsed() >= Duration::from_millis(20) && ring.reap().is_none());
        assert!(!ring.haste.pays(), "it was in vain");
        let event = EventFd::new().expect("an event");
        let source = ring.source();
        for late in [0, 5] {
            ring.haste = Haste { short: SHORT_WAITS, alone: false, rests: None };
            ring.poll_readable(event.as_fd().as_raw_fd(), false, source.token(late));
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    std::thread::sleep(Duration::from_millis(late));
                    event.write(1).expect("it counts");
                });
                ring.wait(Some(Duration::from_secs(10))).expect("it waits");
                assert_eq!(ring.reap().map(|done| done.token.payload()), Some(late));
            });
            event.read().expect("it was rung");
        }
    }

    #[test]
    fn who_lost_the_cpu_for_long_while_it_watched_sleeps_for_much_longer() {
        let mut haste = Haste { short: SHORT_WAITS, alone: false, rests: None };
        assert!(!haste.yielded(SHORT / 2) && haste.pays(), "somebody has run for a moment");
        let lost = Duration::from_secs(10);
        assert!(haste.yielded(lost) && !haste.pays());
        let until = haste.rests.expect("it rests");
        assert!(until.duration_since(Instant::now()) > lost * (REST - 1));
        haste.rests = Some(Instant::now());
        assert!(haste.pays(), "it has rested");
    }

    #[test]
    fn a_wait_ends_at_its_timeout() {
        let mut ring = Ring::new(4).expect("io_uring works here");
        let start = Instant::now();
        ring.wait(Some(Duration::from_millis(20))).expect("it waits");
        assert!(start.elapsed() >= Duration::from_millis(20));
        assert!(ring.reap().is_none());
    }
}
