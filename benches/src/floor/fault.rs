//! The plainest program that has its memory elsewhere: one thread reads an event of userfaultfd, asks for the page
//! over a blocking socket, and puts it into place.
#![allow(unsafe_code)] // userfaultfd has no safe interface, and the memory that faults is a mapping.

use std::ffi::c_void;
use std::fs::File;
use std::io::{Read, Write};
use std::num::NonZero;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::unistd::{Pid, gettid};

use super::placed;
use super::tcp::connected;
use crate::random::Random;
use crate::region::{PAGE, Region};
use crate::stats::{median, micros, rate};

const UFFD_API: u64 = 0xaa;
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
const UFFDIO_COPY: libc::c_ulong = 0xc028_aa03;
const UFFDIO_WRITEPROTECT: libc::c_ulong = 0xc018_aa06;
/// Missing pages of shared memory.
const MISSING_SHARED: u64 = 1 << 5;
/// Write protection of shared memory.
const PROTECTED_SHARED: u64 = 1 << 0 | 1 << 12;
const REGISTER_MISSING: u64 = 1;
const REGISTER_PROTECTED: u64 = 2;

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Register {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct Copy {
    to: u64,
    from: u64,
    len: u64,
    mode: u64,
    copied: i64,
}

#[repr(C)]
struct Protect {
    start: u64,
    len: u64,
    mode: u64,
}

#[repr(C)]
#[derive(Default)]
struct Message {
    event: u64,
    flags: u64,
    address: u64,
    thread: u64,
}

/// Memory whose pages are fetched from a thread behind a socket, one by one. Dropping it ends its threads.
pub struct Plain {
    memory: NonNull<c_void>,
    region: Region,
    file: File,
    stop: Arc<AtomicBool>,
    handler: Option<std::thread::JoinHandle<()>>,
    threads: [Pid; 2],
    /// The order in which pages are touched: all, once, by steps of a large number that has no divisor in common
    /// with their count.
    at: u64,
    touched: u64,
}

impl Plain {
    /// Memory of so many pages, a power of two.
    ///
    /// # Errors
    /// The kernel lacks or refuses userfaultfd, or loopback does not work.
    pub fn new(pages: u64) -> Result<Self> {
        let len = pages as usize * PAGE;
        let file = File::from(memfd_create(c"plain", MFdFlags::MFD_CLOEXEC)?);
        file.set_len(len as u64)?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let length = NonZero::new(len).context("no pages")?;
        // SAFETY: a new mapping at an address of the kernel's choice takes nothing away from anybody.
        let memory = unsafe { mmap(None, length, protection, MapFlags::MAP_SHARED, &file, 0) }?;
        let events = File::from(userfault(memory, len).context("userfaultfd is refused")?);

        let (tell, told) = std::sync::mpsc::channel();
        let tell_too = tell.clone();
        let mut socket = connected(move |mut socket| {
            let (mut question, answer) = ([0; 8], [0x5a; PAGE]);
            let _ = tell_too.send(gettid());
            while socket.read_exact(&mut question).is_ok() && socket.write_all(&answer).is_ok() {}
        })?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let handler = std::thread::Builder::new().name("plain".into()).spawn(move || {
            let _ = tell.send(gettid());
            let mut page = [0; PAGE];
            while !stopped.load(Ordering::Relaxed) {
                serve(&events, &mut socket, &mut page).expect("the plain program works");
            }
        })?;
        let threads = [told.recv()?, told.recv()?];
        // SAFETY: it was mapped just now for nothing else, and stays until this is dropped.
        let region = unsafe { Region::new(memory.cast(), pages) };
        Ok(Self { memory, region, file, stop, handler: Some(handler), threads, at: 0, touched: 0 })
    }

    /// Touches missing pages for `slice`, half of it with all threads on one CPU; how long each touch took, in
    /// microseconds, of the half with the lower median.
    ///
    /// # Errors
    /// Threads may not be placed, or memory not be given back.
    pub fn run(&mut self, slice: Duration) -> Result<Vec<f64>> {
        let free = self.touch(slice / 2)?;
        let threads = self.threads;
        let together = placed::together(&threads, || self.touch(slice / 2))??;
        Ok(if median(&together) < median(&free) { together } else { free })
    }

    /// Touches missing pages for `slice`, wherever the scheduler puts the threads; how long each touch took, in
    /// microseconds.
    ///
    /// # Errors
    /// Memory cannot be given back.
    pub fn touch(&mut self, slice: Duration) -> Result<Vec<f64>> {
        let (start, mut times) = (Instant::now(), Vec::new());
        while start.elapsed() < slice {
            if self.touched == self.region.pages() {
                self.give_back()?;
            }
            self.at = (self.at + 2_654_435_761) % self.region.pages();
            self.touched += 1;
            times.push(micros(self.touch_one(self.at)));
        }
        Ok(times)
    }

    fn touch_one(&self, page: u64) -> Duration {
        let before = Instant::now();
        let word = self.region.read(page);
        let time = before.elapsed();
        assert_eq!(word, 0x5a5a_5a5a_5a5a_5a5a, "the page that was sent");
        time
    }

    /// Makes all pages missing again.
    fn give_back(&mut self) -> Result<()> {
        punch(&self.file, self.region.pages() as usize * PAGE)?;
        self.touched = 0;
        Ok(())
    }
}

impl Drop for Plain {
    fn drop(&mut self) {
        // The handler ends after the next page.
        self.stop.store(true, Ordering::Relaxed);
        if self.give_back().is_ok() {
            // Zeros, if it had not begun to wait for that.
            let _ = self.region.read(0);
            if let Some(handler) = self.handler.take() {
                let _ = handler.join();
            }
            // SAFETY: nobody has an address inside the mapping any more.
            let _ = unsafe { munmap(self.memory, self.region.pages() as usize * PAGE) };
        }
    }
}

/// Puts pages into place, `together` at a time by one thread and from memory that is warm: what the kernel itself
/// takes for that, without a network. Bytes per second.
///
/// # Errors
/// The kernel lacks or refuses userfaultfd.
pub fn placing(together: usize, slice: Duration) -> Result<f64> {
    const PAGES: usize = 16_384;
    let len = PAGES * PAGE;
    let file = File::from(memfd_create(c"placing", MFdFlags::MFD_CLOEXEC)?);
    file.set_len(len as u64)?;
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    let length = NonZero::new(len).context("no pages")?;
    // SAFETY: a new mapping at an address of the kernel's choice takes nothing away from anybody.
    let memory = unsafe { mmap(None, length, protection, MapFlags::MAP_SHARED, &file, 0) }?;
    let events = userfault(memory, len).context("userfaultfd is refused")?;
    let content = vec![0x5a_u8; together * PAGE];
    let (mut took, mut bytes) = (Duration::ZERO, 0);
    while took < slice {
        let start = Instant::now();
        for at in (0..=PAGES - together).step_by(together) {
            let (to, len) = ((memory.as_ptr() as usize + at * PAGE) as u64, content.len() as u64);
            let mut copy = Copy { to, from: content.as_ptr() as u64, len, mode: 0, copied: 0 };
            ask(&events, UFFDIO_COPY, &mut copy)?;
            bytes += len;
        }
        took += start.elapsed();
        punch(&file, len)?;
    }
    // SAFETY: it was mapped above, and nobody has an address inside of it.
    unsafe { munmap(memory, len) }?;
    Ok(rate(bytes, took))
}

/// Writes to protected pages, for each of which a thread reads the event and lets the writer go on: what that takes
/// without a network, in microseconds.
///
/// # Errors
/// The kernel lacks or refuses userfaultfd.
pub fn protected(slice: Duration) -> Result<Vec<f64>> {
    const PAGES: u64 = 1024;
    let len = PAGES as usize * PAGE;
    let file = File::from(memfd_create(c"protected", MFdFlags::MFD_CLOEXEC)?);
    file.set_len(len as u64)?;
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    let length = NonZero::new(len).context("no pages")?;
    // SAFETY: a new mapping at an address of the kernel's choice takes nothing away from anybody.
    let memory = unsafe { mmap(None, length, protection, MapFlags::MAP_SHARED, &file, 0) }?;
    // SAFETY: it was mapped just now for nothing else, and stays until the end.
    let region = unsafe { Region::new(memory.cast(), PAGES) };
    (0..PAGES).for_each(|page| region.write(page, page));
    let events = File::from(watched(memory, len, PROTECTED_SHARED, REGISTER_PROTECTED)?);
    let start = memory.as_ptr() as u64;
    let (began, mut times) = (Instant::now(), Vec::new());
    std::thread::scope(|scope| -> Result<()> {
        let handler = scope.spawn(|| -> Result<()> {
            loop {
                let to = event(&events)?;
                ask(&events, UFFDIO_WRITEPROTECT, &mut Protect { start: to, len: PAGE as u64, mode: 0 })?;
                if to == start {
                    return Ok(());
                }
            }
        });
        while began.elapsed() < slice {
            ask(&events, UFFDIO_WRITEPROTECT, &mut Protect { start, len: len as u64, mode: 1 })?;
            for page in 1..PAGES {
                let before = Instant::now();
                region.write(page, page + 1);
                times.push(micros(before.elapsed()));
            }
        }
        // The first page is the last one that the handler answers for.
        region.write(0, 1);
        handler.join().expect("it does not panic")
    })?;
    // SAFETY: it was mapped above, and nobody has an address inside of it.
    unsafe { munmap(memory, len) }?;
    Ok(times)
}

/// Gives the first `len` bytes of a file in memory back.
fn punch(file: &File, len: usize) -> Result<()> {
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    Ok(fallocate(file, flags, 0, len as libc::off_t)?)
}

// SAFETY: the mapping is its own, wherever the value is; it is reached through `Region`, which any thread may use.
unsafe impl Send for Plain {}

/// A descriptor that has an event for each touch of a missing page.
fn userfault(memory: NonNull<c_void>, len: usize) -> std::io::Result<OwnedFd> {
    watched(memory, len, MISSING_SHARED, REGISTER_MISSING)
}

/// A descriptor that has an event for each fault of a kind.
fn watched(memory: NonNull<c_void>, len: usize, features: u64, mode: u64) -> std::io::Result<OwnedFd> {
    // SAFETY: the call takes flags by value and returns a new descriptor or an error.
    let descriptor = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) };
    if descriptor < 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: it is new, so nobody else owns it.
    let descriptor = unsafe { OwnedFd::from_raw_fd(descriptor as i32) };
    ask(&descriptor, UFFDIO_API, &mut Api { api: UFFD_API, features, ioctls: 0 })?;
    let start = memory.as_ptr() as u64;
    let mut register = Register { start, len: len as u64, mode, ioctls: 0 };
    ask(&descriptor, UFFDIO_REGISTER, &mut register)?;
    Ok(descriptor)
}

fn ask<T>(descriptor: &impl AsRawFd, request: libc::c_ulong, argument: &mut T) -> std::io::Result<()> {
    // SAFETY: called with the structure that belongs to the request; what it does to memory is within `Plain`'s.
    let result = unsafe { libc::ioctl(descriptor.as_raw_fd(), request, std::ptr::from_mut(argument)) };
    if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

/// The page of the next event.
fn event(events: &File) -> Result<u64> {
    let mut message = Message::default();
    let size = size_of::<Message>();
    // SAFETY: the kernel writes whole messages, for whose fields every bit pattern is valid.
    let got = unsafe { libc::read(events.as_raw_fd(), std::ptr::from_mut(&mut message).cast(), size) };
    if usize::try_from(got) != Ok(size) {
        bail!("an event cannot be read: {}", std::io::Error::last_os_error());
    }
    Ok(message.address & !(PAGE as u64 - 1))
}

/// One fault.
fn serve(events: &File, socket: &mut std::net::TcpStream, page: &mut [u8; PAGE]) -> Result<()> {
    let to = event(events)?;
    socket.write_all(&to.to_le_bytes())?;
    socket.read_exact(page)?;
    let mut copy = Copy { to, from: page.as_ptr() as u64, len: PAGE as u64, mode: 0, copied: 0 };
    while let Err(why) = ask(events, UFFDIO_COPY, &mut copy) {
        if why.kind() != std::io::ErrorKind::WouldBlock {
            return Err(why.into());
        }
    }
    Ok(())
}

/// Pages below `count` in an order in which none follows its neighbour.
#[must_use]
pub fn scattered(count: u64, seed: u64) -> Vec<u64> {
    let mut random = Random::new(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let mut pages: Vec<u64> = (0..count).collect();
    for at in (1..pages.len()).rev() {
        pages.swap(at, random.below(at as u64 + 1) as usize);
    }
    pages
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_come_over_the_socket_again_and_again() {
        match Plain::new(64) {
            Ok(mut plain) => {
                let times = plain.run(Duration::from_millis(60)).expect("it runs");
                assert!(times.len() > 64, "{} touches", times.len());
            }
            Err(why) => eprintln!("cannot run: {why:#}"),
        }
    }

    #[test]
    fn pages_are_put_into_place_again_and_again() {
        match placing(64, Duration::from_millis(20)) {
            Ok(rate) => assert!(rate > 0.0),
            Err(why) => eprintln!("cannot run: {why:#}"),
        }
    }

    #[test]
    fn protected_pages_are_written_to_again_and_again() {
        match protected(Duration::from_millis(20)) {
            Ok(times) => assert!(times.len() >= 1023, "{} writes", times.len()),
            Err(why) => eprintln!("cannot run: {why:#}"),
        }
    }

    #[test]
    fn scattered_pages_are_all_pages_once() {
        let mut pages = scattered(1000, 3);
        assert_ne!(pages[..10], (0..10).collect::<Vec<_>>());
        pages.sort_unstable();
        assert_eq!(pages, (0..1000).collect::<Vec<_>>());
    }
}
