//! A disk that is slower than the one behind it. For tests and experiments.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use transport::ring::{Completion, Ring};

use super::{Disk, Done, Error, Geometry, Request};

/// Hands requests on to another disk at once and their results back after a delay.
pub struct DelayDisk {
    inner: Box<dyn Disk>,
    delay: Duration,
    late: VecDeque<(Instant, Done)>,
    fresh: Vec<Done>,
}

impl DelayDisk {
    /// `inner`, whose every result comes `delay` later.
    #[must_use]
    pub fn new(inner: Box<dyn Disk>, delay: Duration) -> Self {
        Self { inner, delay, late: VecDeque::new(), fresh: Vec::new() }
    }

    fn put_off(&mut self) {
        let due = Instant::now() + self.delay;
        self.late.extend(self.fresh.drain(..).map(|done| (due, done)));
    }
}

impl Disk for DelayDisk {
    fn geometry(&self) -> Geometry {
        self.inner.geometry()
    }

    fn attach(&mut self, ring: &mut Ring) -> Result<(), Error> {
        self.inner.attach(ring)
    }

    fn submit(&mut self, ring: &mut Ring, request: Request, _done: &mut Vec<Done>) {
        self.inner.submit(ring, request, &mut self.fresh);
        self.put_off();
    }

    fn complete(&mut self, ring: &mut Ring, completion: Completion, _done: &mut Vec<Done>) -> bool {
        let ours = self.inner.complete(ring, completion, &mut self.fresh);
        self.put_off();
        ours
    }

    fn tick(&mut self, ring: &mut Ring, now: Instant, done: &mut Vec<Done>) -> Option<Instant> {
        let next = self.inner.tick(ring, now, &mut self.fresh);
        self.put_off();
        while self.late.front().is_some_and(|(due, _)| *due <= now) {
            done.extend(self.late.pop_front().map(|(_, late)| late));
        }
        self.late.front().map(|(due, _)| *due).into_iter().chain(next).min()
    }

    fn abort(&mut self, ring: &mut Ring, done: &mut Vec<Done>) {
        done.extend(self.late.drain(..).map(|(_, late)| late));
        self.inner.abort(ring, done);
    }

    fn close(&mut self, ring: &mut Ring) {
        self.inner.close(ring);
    }

    fn describe(&self) -> String {
        format!("{}, delayed by {:?}", self.inner.describe(), self.delay)
    }
}

#[cfg(test)]
mod tests {
    use transport::buffer::Buffer;

    use super::*;
    use crate::disk::Operation;
    use crate::disk::file::{Direct, FileDisk, Options};

    #[test]
    fn a_result_comes_no_earlier_than_the_delay() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        file.as_file().set_len(1 << 20).expect("sparse");
        let options = Options { path: file.path().to_owned(), read_only: false, direct: Direct::Off };
        let inner = FileDisk::open(&options).expect("it opens");
        let mut disk = DelayDisk::new(Box::new(inner), Duration::from_millis(30));
        let mut ring = Ring::new(8).expect("io_uring works here");
        disk.attach(&mut ring).expect("it attaches");
        let mut done = Vec::new();
        let start = Instant::now();
        let buffer = Buffer::zeroed(512);
        let request = Request { tag: 1, operation: Operation::Read, offset: 0, len: 512, buffer };
        disk.submit(&mut ring, request, &mut done);
        while done.is_empty() {
            let next = disk.tick(&mut ring, Instant::now(), &mut done);
            if !done.is_empty() {
                break;
            }
            ring.wait(next.map(|n| n.saturating_duration_since(Instant::now()))).expect("it waits");
            while let Some(completion) = ring.reap() {
                disk.complete(&mut ring, completion, &mut done);
            }
        }
        assert!(start.elapsed() >= Duration::from_millis(30), "{:?}", start.elapsed());
        assert!(done[0].result.is_ok());
    }
}
