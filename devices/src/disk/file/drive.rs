//! Requests on an image, carried out by a ring.
#![allow(unsafe_code)] // operations name memory by pointer; a flight owns that memory until its completion

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Instant;

use io_uring::{opcode, squeue, types};
use transport::buffer::Buffer;
use transport::ring::{Completion, Ring, Source};

use super::aligned;
use super::image::{Image, OpenError, Options};
use crate::disk::{Disk, Done, Error, Geometry, Operation, Request, check};

/// How much of zeros one operation writes where the kernel cannot clear a range by itself.
const ZEROS: usize = 64 << 10;
/// As many segments as `readv(2)` takes.
const MOST_SEGMENTS: usize = 1024;

/// A raw image or block device, driven by one ring.
pub struct FileDisk {
    image: Arc<Image>,
    source: Option<Source>,
    flights: Vec<Flight>,
    free: Vec<u32>,
    zeros: Buffer,
    /// Whether the file system can say that a read would wait.
    at_once: bool,
    /// See [`FileDisk::for_memory_that_moves`].
    moves: bool,
    /// Flushes: the first is with the kernel, the others wait for it. The kernel reports what it could not
    /// write to one of several flushes only, and the others must not succeed before that is known.
    flushes: VecDeque<u32>,
}

/// One request on its way.
#[derive(Default)]
struct Flight {
    request: Option<Request>,
    /// What the kernel reads or writes instead of the request's own, badly aligned memory.
    bounce: Option<Buffer>,
    /// The kernel reads this list where it lies on the heap, whatever happens to the flight itself.
    segments: Vec<libc::iovec>,
    /// How many bytes are done.
    done: u64,
    /// Zeros are written because the kernel cannot clear the range.
    by_hand: bool,
    /// The buffer's registration ended before the kernel took the operation, as it does with the connection
    /// that the buffer is from.
    unregistered: bool,
}

// SAFETY: the segment lists point into buffers that the same flight owns, and those may be sent.
unsafe impl Send for FileDisk {}

impl FileDisk {
    /// Opens an image for this disk alone.
    ///
    /// # Errors
    /// As [`Image::open`].
    pub fn open(options: &Options) -> Result<Self, OpenError> {
        Ok(Self::new(Arc::new(Image::open(options)?)))
    }

    /// A disk on an image that others may drive too.
    #[must_use]
    pub fn new(image: Arc<Image>) -> Self {
        Self {
            image,
            source: None,
            flights: Vec::new(),
            free: Vec::new(),
            zeros: Buffer::empty(),
            at_once: true,
            moves: false,
            flushes: VecDeque::new(),
        }
    }

    /// For memory of a guest whose pages come and go: past the page cache, the device would write into the pages that
    /// were there when a read began, while the guest has others by the time it ends. So such reads go into memory of
    /// our own and are copied, as those into badly aligned memory are. Writes only read the pages, which hold what the
    /// guest wrote even when they are not its own any more.
    #[must_use]
    pub fn for_memory_that_moves(mut self) -> Self {
        self.moves = true;
        self
    }

    /// How many requests are in flight.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.flights.len() - self.free.len()
    }

    fn slot(&mut self) -> u32 {
        self.free.pop().unwrap_or_else(|| {
            self.flights.push(Flight::default());
            (self.flights.len() - 1) as u32
        })
    }

    /// Reads what the page cache holds without a round through the ring; `false` if it would have to wait.
    fn read_at_once(&mut self, request: &Request) -> bool {
        let segments = request.buffer.iovecs();
        if request.operation != Operation::Read
            || !self.at_once
            || self.image.direct.is_some()
            || segments.len() > MOST_SEGMENTS
        {
            return false;
        }
        let (fd, offset) = (self.image.file.as_raw_fd(), request.offset as libc::off_t);
        // SAFETY: the descriptor is open, the segments are mapped while the request's buffer lives, and there
        // are as many as said.
        let count = unsafe {
            libc::preadv2(fd, segments.as_ptr(), segments.len() as libc::c_int, offset, libc::RWF_NOWAIT)
        };
        if count < 0 && io::Error::last_os_error().raw_os_error() == Some(libc::EOPNOTSUPP) {
            self.at_once = false;
        }
        usize::try_from(count).is_ok_and(|count| count == request.buffer.len())
    }

    /// Submits what is left of the flight in `slot`.
    fn go_on(&mut self, ring: &mut Ring, slot: u32) {
        let Some(source) = self.source else { return };
        let flight = &mut self.flights[slot as usize];
        let Some(request) = &flight.request else { return };
        let entry = match request.operation {
            Operation::Read | Operation::Write => transfer(&self.image, flight),
            Operation::WriteZeroes { .. } if flight.by_hand => {
                if self.zeros.is_empty() {
                    self.zeros = aligned::zeroed(ZEROS, self.image.direct.unwrap_or(1).max(512));
                }
                write_zeros(&self.image, flight, &self.zeros)
            }
            operation => whole(&self.image, operation, request),
        };
        // SAFETY: the image's descriptor lives as long as operations are in flight, see `drop`. The
        // flight owns the buffers, and the segment list's heap memory is not touched until
        // the operation completes; `zeros` is never replaced once it is made.
        unsafe { ring.push(entry, source.token(u64::from(slot))) };
    }

    /// What a completion means for its flight: `None` if it goes on.
    fn judge(&mut self, slot: u32, completion: Completion) -> Option<Result<(), Error>> {
        let flight = &mut self.flights[slot as usize];
        let request = flight.request.as_ref()?;
        let moves = match request.operation {
            Operation::Read | Operation::Write => true,
            Operation::WriteZeroes { .. } => flight.by_hand,
            Operation::Flush | Operation::Discard => false,
        };
        match completion.count() {
            Ok(0) if moves => Some(Err(io::Error::from(io::ErrorKind::UnexpectedEof).into())),
            Ok(count) if moves => {
                flight.done += count as u64;
                (flight.done >= request.len).then_some(Ok(()))
            }
            Ok(_) => Some(Ok(())),
            Err(e) => match (e.raw_os_error(), request.operation) {
                (Some(libc::EINTR | libc::EAGAIN), _) => None,
                (Some(libc::EFAULT), _) if !flight.unregistered && request.buffer.registered().is_some() => {
                    flight.unregistered = true;
                    None
                }
                (Some(libc::ENOSPC | libc::EDQUOT), operation) if operation != Operation::Flush => {
                    Some(Err(Error::Full))
                }
                (Some(libc::EOPNOTSUPP), Operation::Discard) => Some(Err(Error::Unsupported)),
                (Some(libc::EOPNOTSUPP), Operation::WriteZeroes { .. }) if !flight.by_hand => {
                    flight.by_hand = true;
                    None
                }
                (_, operation) => {
                    if operation == Operation::Flush {
                        self.image.flush_has_failed();
                    }
                    Some(Err(e.into()))
                }
            },
        }
    }

    /// After a flush ended: submits the next one, or fails all that waited if it failed.
    fn flush_next(&mut self, ring: &mut Ring, ended: u32, done: &mut Vec<Done>) {
        if self.flushes.front() != Some(&ended) {
            return;
        }
        self.flushes.pop_front();
        while let Some(&next) = self.flushes.front() {
            match self.image.flush_allowed() {
                Ok(()) => return self.go_on(ring, next),
                Err(failed) => {
                    done.extend(self.finish(next, Err(failed.into())));
                    self.flushes.pop_front();
                }
            }
        }
    }

    fn finish(&mut self, slot: u32, result: Result<(), Error>) -> Option<Done> {
        let flight = &mut self.flights[slot as usize];
        let request = flight.request.take()?;
        if let (Some(bounce), Operation::Read, true) = (&flight.bounce, request.operation, result.is_ok()) {
            aligned::copy(bounce, &request.buffer);
        }
        flight.bounce = None;
        flight.done = 0;
        flight.by_hand = false;
        flight.unregistered = false;
        self.free.push(slot);
        Some(Done { tag: request.tag, result, buffer: request.buffer })
    }
}

/// A read or write of what is left of the flight's buffer.
fn transfer(image: &Image, flight: &mut Flight) -> squeue::Entry {
    let fd = types::Fd(image.file.as_raw_fd());
    let Flight { request, bounce, segments, done, unregistered, .. } = flight;
    let Some(request) = request else { return opcode::Nop::new().build() };
    let buffer = bounce.as_ref().unwrap_or(&request.buffer);
    let offset = request.offset + *done;
    let read = request.operation == Operation::Read;
    if let [only] = buffer.iovecs() {
        let base = only.iov_base.cast::<u8>().wrapping_add(*done as usize);
        let len = u32::try_from(only.iov_len - *done as usize).unwrap_or(1 << 30);
        return match (read, buffer.registered().filter(|_| !*unregistered)) {
            (true, Some(index)) => opcode::ReadFixed::new(fd, base, len, index).offset(offset).build(),
            (true, None) => opcode::Read::new(fd, base, len).offset(offset).build(),
            (false, Some(index)) => opcode::WriteFixed::new(fd, base, len, index).offset(offset).build(),
            (false, None) => opcode::Write::new(fd, base, len).offset(offset).build(),
        };
    }
    let left = buffer.slice(*done as usize, buffer.len() - *done as usize).unwrap_or_default();
    segments.clear();
    segments.extend(left.iovecs().iter().take(MOST_SEGMENTS));
    if read {
        opcode::Readv::new(fd, segments.as_ptr(), segments.len() as u32).offset(offset).build()
    } else {
        opcode::Writev::new(fd, segments.as_ptr(), segments.len() as u32).offset(offset).build()
    }
}

/// Writes zeros over as much of what is left as one operation takes.
fn write_zeros(image: &Image, flight: &mut Flight, zeros: &Buffer) -> squeue::Entry {
    let Flight { request, segments, done, .. } = flight;
    let (Some(request), [zeros]) = (request, zeros.iovecs()) else { return opcode::Nop::new().build() };
    let mut left = request.len - *done;
    segments.clear();
    while left > 0 && segments.len() < MOST_SEGMENTS {
        let take = left.min(zeros.iov_len as u64);
        segments.push(libc::iovec { iov_base: zeros.iov_base, iov_len: take as usize });
        left -= take;
    }
    let fd = types::Fd(image.file.as_raw_fd());
    opcode::Writev::new(fd, segments.as_ptr(), segments.len() as u32).offset(request.offset + *done).build()
}

/// An operation that the kernel does in one step. On block devices `fallocate(2)` becomes the device's
/// own unmap and write-zeroes commands, off this thread.
fn whole(image: &Image, operation: Operation, request: &Request) -> squeue::Entry {
    let fd = types::Fd(image.file.as_raw_fd());
    let mode = match operation {
        Operation::Discard | Operation::WriteZeroes { unmap: true } => {
            libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE
        }
        Operation::WriteZeroes { unmap: false } => libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE,
        Operation::Flush | Operation::Read | Operation::Write => {
            return opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build();
        }
    };
    opcode::Fallocate::new(fd, request.len).offset(request.offset).mode(mode).build()
}

impl Drop for FileDisk {
    /// A disk that goes with operations in flight leaves their memory to the kernel for ever.
    fn drop(&mut self) {
        if self.in_flight() > 0 {
            tracing::error!(disk = %self.describe(), "A disk was dropped with requests in flight");
            std::mem::forget(std::mem::take(&mut self.flights));
            std::mem::forget((Arc::clone(&self.image), std::mem::take(&mut self.zeros)));
        }
    }
}

impl Disk for FileDisk {
    fn geometry(&self) -> Geometry {
        self.image.geometry()
    }

    fn attach(&mut self, ring: &mut Ring) -> Result<(), Error> {
        self.source = Some(ring.source());
        Ok(())
    }

    fn submit(&mut self, ring: &mut Ring, request: Request, done: &mut Vec<Done>) {
        let checked = check(&self.geometry(), &request).and_then(|()| match request.operation {
            _ if self.source.is_none() => Err(io::Error::other("The disk is not attached").into()),
            Operation::Flush => self.image.flush_allowed().map_err(Error::from),
            _ => Ok(()),
        });
        let nothing = request.len == 0 && request.operation != Operation::Flush;
        if checked.is_err() || nothing || self.read_at_once(&request) {
            done.push(Done { tag: request.tag, result: checked, buffer: request.buffer });
            return;
        }
        let bounce = self
            .image
            .direct
            .filter(|&align| {
                let pinned = self.moves && request.operation == Operation::Read;
                pinned || !aligned::is_aligned(&request.buffer, align)
            })
            .map(|align| aligned::zeroed(request.buffer.len(), align.max(512)));
        if let (Some(bounce), Operation::Write) = (&bounce, request.operation) {
            aligned::copy(&request.buffer, bounce);
        }
        let flush = request.operation == Operation::Flush;
        let slot = self.slot();
        let flight = &mut self.flights[slot as usize];
        flight.request = Some(request);
        flight.bounce = bounce;
        if flush {
            self.flushes.push_back(slot);
        }
        if !flush || self.flushes.len() == 1 {
            self.go_on(ring, slot);
        }
    }

    fn complete(&mut self, ring: &mut Ring, completion: Completion, done: &mut Vec<Done>) -> bool {
        if Some(completion.token.source()) != self.source {
            return false;
        }
        let slot = completion.token.payload() as u32;
        if self.flights.get(slot as usize).is_none_or(|f| f.request.is_none()) {
            return true;
        }
        match self.judge(slot, completion) {
            None => self.go_on(ring, slot),
            Some(result) => {
                done.extend(self.finish(slot, result));
                self.flush_next(ring, slot, done);
            }
        }
        true
    }

    fn tick(&mut self, _ring: &mut Ring, _now: Instant, _done: &mut Vec<Done>) -> Option<Instant> {
        None
    }

    fn abort(&mut self, ring: &mut Ring, done: &mut Vec<Done>) {
        let Some(source) = self.source else { return };
        let cancelled = || io::Error::from_raw_os_error(libc::ECANCELED);
        // Flushes that wait for another are not with the kernel: nothing would complete them.
        for slot in self.flushes.drain(..).skip(1).collect::<Vec<_>>() {
            done.extend(self.finish(slot, Err(cancelled().into())));
        }
        let busy: Vec<u32> =
            (0..self.flights.len() as u32).filter(|&i| self.flights[i as usize].request.is_some()).collect();
        for slot in busy {
            ring.cancel(source.token(u64::from(slot)));
        }
        let mut others = Vec::new();
        while self.in_flight() > 0 {
            if ring.wait(None).is_err() {
                // The ring is broken: dropping it ends its operations, but the memory must outlive them.
                std::process::abort();
            }
            while let Some(completion) = ring.reap() {
                if completion.token.source() != source {
                    others.push(completion);
                    continue;
                }
                let slot = completion.token.payload() as u32;
                // A flush that failed just now must be remembered all the same.
                let result = match completion.result == -libc::ECANCELED {
                    true => None,
                    false => self.judge(slot, completion),
                };
                let result = result.unwrap_or_else(|| Err(cancelled().into()));
                done.extend(self.finish(slot, result));
            }
        }
        ring.put_back(others);
    }

    fn describe(&self) -> String {
        let how = match (self.geometry().read_only, self.image.is_direct()) {
            (true, true) => ", read-only, past the page cache",
            (true, false) => ", read-only",
            (false, true) => ", past the page cache",
            (false, false) => "",
        };
        format!("{}, {} bytes{how}", self.image.path().display(), self.geometry().size)
    }
}
