//! A disk that fails when it is told to. For tests.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use transport::ring::{Completion, Ring};

use super::{Disk, Done, Error, Geometry, Operation, Request};

/// What of a disk fails; shared with the test, which may change it at any time.
#[derive(Debug, Default)]
pub struct Faults {
    /// So many reads fail from now on.
    pub reads: AtomicU64,
    /// So many writes, discards and clearings fail from now on: they are not carried out.
    pub writes: AtomicU64,
    /// So many flushes fail from now on.
    pub flushes: AtomicU64,
}

/// Hands requests on to another disk, except those that are to fail.
pub struct FaultDisk {
    inner: Box<dyn Disk>,
    faults: Arc<Faults>,
}

impl FaultDisk {
    /// `inner`, failing as `faults` says.
    #[must_use]
    pub fn new(inner: Box<dyn Disk>, faults: Arc<Faults>) -> Self {
        Self { inner, faults }
    }
}

impl Disk for FaultDisk {
    fn geometry(&self) -> Geometry {
        self.inner.geometry()
    }

    fn attach(&mut self, ring: &mut Ring) -> Result<(), Error> {
        self.inner.attach(ring)
    }

    fn submit(&mut self, ring: &mut Ring, request: Request, done: &mut Vec<Done>) {
        let left = match request.operation {
            Operation::Read => &self.faults.reads,
            Operation::Flush => &self.faults.flushes,
            Operation::Write | Operation::Discard | Operation::WriteZeroes { .. } => &self.faults.writes,
        };
        if left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1)).is_err() {
            return self.inner.submit(ring, request, done);
        }
        let result = Err(Error::Io(io::Error::from_raw_os_error(libc::EIO)));
        done.push(Done { tag: request.tag, result, buffer: request.buffer });
    }

    fn complete(&mut self, ring: &mut Ring, completion: Completion, done: &mut Vec<Done>) -> bool {
        self.inner.complete(ring, completion, done)
    }

    fn tick(&mut self, ring: &mut Ring, now: Instant, done: &mut Vec<Done>) -> Option<Instant> {
        self.inner.tick(ring, now, done)
    }

    fn abort(&mut self, ring: &mut Ring, done: &mut Vec<Done>) {
        self.inner.abort(ring, done);
    }

    fn close(&mut self, ring: &mut Ring) {
        self.inner.close(ring);
    }

    fn describe(&self) -> String {
        format!("{}, with faults", self.inner.describe())
    }
}

#[cfg(test)]
mod tests {
    use transport::buffer::Buffer;

    use super::*;
    use crate::disk::file::{Direct, FileDisk, Options};

    #[test]
    fn as_many_requests_fail_as_were_asked_for() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        file.as_file().set_len(1 << 20).expect("sparse");
        let options = Options { path: file.path().to_owned(), read_only: false, direct: Direct::Off };
        let faults = Arc::new(Faults::default());
        let inner = Box::new(FileDisk::open(&options).expect("it opens"));
        let mut disk = FaultDisk::new(inner, Arc::clone(&faults));
        let mut ring = Ring::new(8).expect("io_uring works here");
        disk.attach(&mut ring).expect("it attaches");
        faults.flushes.store(1, Ordering::Relaxed);
        let mut results = Vec::new();
        for tag in 0..2 {
            let mut done = Vec::new();
            let buffer = Buffer::empty();
            let flush = Request { tag, operation: Operation::Flush, offset: 0, len: 0, buffer };
            disk.submit(&mut ring, flush, &mut done);
            while done.is_empty() {
                ring.wait(None).expect("it waits");
                while let Some(completion) = ring.reap() {
                    disk.complete(&mut ring, completion, &mut done);
                }
            }
            results.push(done[0].result.is_ok());
        }
        assert_eq!(results, [false, true]);
    }
}
