//! The threads that read the faults of shards. Other connections may ride along on their rings: then between a fault and
//! the message that it leads to, or a message and the page that came with it, no thread has to wake another.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use transport::line::Asking;
use transport::ring::{Completion, Ring, Source};

use super::engine::{Ear, Inner};
use crate::memory::frames::{Fault, worker};

/// Somebody else who is driven on a shard's ring, as the asking end of a line is.
pub trait Rider {
    /// Looks at a completion; `false`: it is not for this one.
    fn complete(&mut self, ring: &mut Ring, completion: Completion) -> bool;

    /// Does what is due, and says when it wants to be called next at the latest. Called before every wait.
    fn tick(&mut self, ring: &mut Ring, now: Instant) -> Option<Instant>;

    /// The ring ends.
    fn close(&mut self, ring: &mut Ring);
}

impl Rider for Asking {
    fn complete(&mut self, ring: &mut Ring, completion: Completion) -> bool {
        Self::complete(self, ring, completion)
    }

    fn tick(&mut self, ring: &mut Ring, now: Instant) -> Option<Instant> {
        Self::tick(self, ring, now)
    }

    fn close(&mut self, ring: &mut Ring) {
        Self::close(self, ring);
    }
}

/// Makes a rider on the ring's own thread, before that is confined. What it hears is to be told to the [`Ear`].
pub type Board = Box<dyn FnOnce(&mut Ring, Ear) -> io::Result<Box<dyn Rider>> + Send>;

/// Operations that the ring takes at once.
const ENTRIES: u32 = 128;

const FAULTS: u64 = 0;
const HOLDS: u64 = 1;
const BELL: u64 = 2;

/// Reads one shard's faults.
struct Attendant {
    ring: Ring,
    own: Source,
    inner: Arc<Inner>,
    shard: usize,
    riders: Vec<Box<dyn Rider>>,
    /// There may be faults to read.
    readable: bool,
    expired: bool,
    // Kept for its memory: nothing is allocated for a fault.
    faults: Vec<Fault>,
}

/// Starts the thread of a shard; returns when it is confined and ready for faults.
pub(super) fn start(inner: &Arc<Inner>, shard: usize, boards: Vec<Board>) -> io::Result<JoinHandle<()>> {
    let inner = inner.clone();
    let make = move || Attendant::new(inner, shard, boards);
    worker::start(format!("coherence{shard}"), make, |mut attendant| attendant.run())
}

impl Attendant {
    fn new(inner: Arc<Inner>, shard: usize, boards: Vec<Board>) -> io::Result<Self> {
        let mut ring = Ring::new(ENTRIES)?;
        let own = ring.source();
        let riders = boards
            .into_iter()
            .map(|board| board(&mut ring, Ear::riding(&inner)))
            .collect::<io::Result<_>>()?;
        let mut attendant = Self {
            ring,
            own,
            inner,
            shard,
            riders,
            readable: true,
            expired: false,
            faults: Vec::with_capacity(16),
        };
        [FAULTS, HOLDS, BELL].into_iter().for_each(|what| attendant.poll(what));
        Ok(attendant)
    }

    fn poll(&mut self, what: u64) {
        let descriptor = self.inner.descriptor(self.shard, what == FAULTS, what == HOLDS);
        self.ring.poll_readable(descriptor, true, self.own.token(what));
    }

    fn run(&mut self) -> io::Result<()> {
        while !self.inner.is_closed() {
            self.read_faults()?;
            if std::mem::take(&mut self.expired) {
                self.inner.expired(self.shard);
            }
            let now = Instant::now();
            let later = self.inner.send_later(now);
            let due = self.riders.iter_mut().filter_map(|rider| rider.tick(&mut self.ring, now)).min();
            let timeout = later.into_iter().chain(due.map(|due| due.saturating_duration_since(now))).min();
            self.ring.wait(if self.works() { Some(Duration::ZERO) } else { timeout })?;
            while let Some(completion) = self.ring.reap() {
                self.complete(completion)?;
            }
        }
        self.riders.iter_mut().for_each(|rider| rider.close(&mut self.ring));
        self.ring.submit()
    }

    /// Whether something is left to do.
    fn works(&self) -> bool {
        self.expired || self.readable && self.inner.attends(self.shard)
    }

    fn complete(&mut self, completion: Completion) -> io::Result<()> {
        if completion.token.source() != self.own {
            let _ = self.riders.iter_mut().any(|rider| rider.complete(&mut self.ring, completion));
            return Ok(());
        }
        let what = completion.token.payload();
        match what {
            FAULTS => self.readable = true,
            HOLDS => {
                self.inner.silence(self.shard, true);
                self.expired = true;
            }
            _ => {
                self.inner.silence(self.shard, false);
                // Somebody rests, whose holds may be over.
                self.expired = true;
            }
        }
        if !completion.more() {
            completion.count()?;
            self.poll(what);
        }
        Ok(())
    }

    fn read_faults(&mut self) -> io::Result<()> {
        while self.readable && self.inner.attends(self.shard) {
            self.readable = self.inner.read_faults(self.shard, &mut self.faults)?;
            self.inner.faults(self.shard, &self.faults);
            self.faults.clear();
        }
        Ok(())
    }
}
