//! One pair of queues on one descriptor of the TAP interface. Frames go between guest memory and the
//! kernel without a copy in between; every read and write is done at once, so nothing is ever in flight.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};

use serde::Serialize;
use smallvec::SmallVec;
use transport::ring::{Completion, Ring, Source};

use super::tap::{HEADER, Tap};
use super::{control, feature};
use crate::virtio::memory::{buffer, readv, writev};
use crate::virtio::worker::{Backend, Queues};
use crate::virtio::{Broken, Chain, Segment};

/// The largest frame with its header: 64 KiB of segments to be cut, or a jumbo frame.
const FRAME_MAX: u64 = 65_535 + 18 + HEADER as u64;
const FRAME_PLAIN: u64 = 9_000 + 18 + HEADER as u64;
const FRAME_MIN: u64 = 14 + HEADER as u64;
/// Frames in each direction before the other gets its turn.
const BUDGET: usize = 256;
/// Where the header says over how many chains a received frame was spread.
const NUM_BUFFERS: usize = 10;

/// What went through a card. Every worker adds to it.
#[derive(Debug, Default)]
pub struct Counters {
    received: AtomicU64,
    received_bytes: AtomicU64,
    sent: AtomicU64,
    sent_bytes: AtomicU64,
    dropped: AtomicU64,
    /// Pairs of queues in use, beyond the first.
    pairs: AtomicU16,
}

/// The counters at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Snapshot {
    /// Frames to the guest.
    pub received: u64,
    /// Their bytes.
    pub received_bytes: u64,
    /// Frames from the guest.
    pub sent: u64,
    /// Their bytes.
    pub sent_bytes: u64,
    /// Frames that were malformed, or that the kernel did not take.
    pub dropped: u64,
}

impl Counters {
    /// The counters now.
    pub fn snapshot(&self) -> Snapshot {
        Snapshot {
            received: self.received.load(Ordering::Relaxed),
            received_bytes: self.received_bytes.load(Ordering::Relaxed),
            sent: self.sent.load(Ordering::Relaxed),
            sent_bytes: self.sent_bytes.load(Ordering::Relaxed),
            dropped: self.dropped.load(Ordering::Relaxed),
        }
    }

    /// How many pairs the driver asked for; 0 if it did not.
    pub(super) fn pairs(&self) -> u16 {
        self.pairs.load(Ordering::Acquire)
    }

    pub(super) fn set_pairs(&self, pairs: u16) {
        self.pairs.store(pairs, Ordering::Release);
    }
}

/// A chain of the receive queue that waits for a frame.
struct Posted {
    head: u16,
    segments: SmallVec<[Segment; 8]>,
    len: u64,
}

pub(super) struct NetBackend {
    taps: Arc<[Tap]>,
    pair: usize,
    counters: Arc<Counters>,
    source: Option<Source>,
    posted: VecDeque<Posted>,
    posted_len: u64,
    /// Whether the interface may have a frame: until a read says otherwise.
    readable: bool,
    chain: Chain,
}

enum Got {
    Frame,
    /// Nothing to read, or nowhere to put it.
    Nothing,
}

impl NetBackend {
    pub(super) fn new(taps: Arc<[Tap]>, pair: usize, counters: Arc<Counters>) -> Self {
        Self {
            taps,
            pair,
            counters,
            source: None,
            posted: VecDeque::new(),
            posted_len: 0,
            readable: true,
            chain: Chain::default(),
        }
    }

    fn receive_queue(&self) -> u16 {
        2 * self.pair as u16
    }

    /// Takes chains until a frame of any size fits. `false`: the driver has not posted enough.
    fn post(&mut self, queues: &mut Queues) -> Result<bool, Broken> {
        let merge = queues.features & feature::MRG_RXBUF != 0;
        let large = queues.features & (feature::GUEST_TSO4 | feature::GUEST_TSO6) != 0;
        let needed = match (merge, large) {
            (false, _) => 1,
            (true, false) => FRAME_PLAIN,
            (true, true) => FRAME_MAX,
        };
        let index = self.receive_queue();
        let Some(queue) = queues.get(index) else { return Ok(false) };
        while self.posted_len < needed {
            if !queue.pop(&mut self.chain)? {
                if queue.enable_doorbell()? {
                    continue;
                }
                // A driver that gave all it has gets what fits.
                return Ok(!self.posted.is_empty() && queue.outstanding() == queue.size());
            }
            let len = self.chain.writable_len();
            if len < HEADER as u64 || buffer(queue.memory(), &self.chain.writable).is_none() {
                queue.push_used(self.chain.head, 0)?;
                continue;
            }
            let segments = std::mem::take(&mut self.chain.writable);
            self.posted.push_back(Posted { head: self.chain.head, segments, len });
            self.posted_len += len;
        }
        queue.disable_doorbell()?;
        Ok(true)
    }

    /// Reads one frame into posted chains and answers those that it fills.
    fn receive(&mut self, queues: &mut Queues) -> Result<Got, Broken> {
        if !self.post(queues)? {
            return Ok(Got::Nothing);
        }
        let merge = queues.features & feature::MRG_RXBUF != 0;
        let index = self.receive_queue();
        let Some(queue) = queues.get(index) else { return Ok(Got::Nothing) };
        let mut segments: SmallVec<[Segment; 32]> = SmallVec::new();
        let mut room = 0;
        for posted in self.posted.iter().take(if merge { usize::MAX } else { 1 }) {
            segments.extend_from_slice(&posted.segments);
            room += posted.len;
            if room >= FRAME_MAX {
                break;
            }
        }
        // Each chain was found to be RAM when it was posted.
        let Some(place) = buffer(queue.memory(), &segments) else { return Err(Broken::Chain) };
        let len = match readv(self.taps[self.pair].as_fd(), &place) {
            Ok(0) => return Ok(self.exhausted()),
            Ok(len) => len as u64,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(self.exhausted()),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => return Ok(Got::Frame),
            Err(error) => {
                // As when the interface goes down; a poll tells when it is back.
                tracing::debug!(%error, "the interface gave no frame");
                return Ok(self.exhausted());
            }
        };
        let mut left = len;
        let mut used: SmallVec<[(u16, u32); 32]> = SmallVec::new();
        while left > 0 {
            let Some(posted) = self.posted.pop_front() else { break };
            self.posted_len -= posted.len;
            let here = left.min(posted.len);
            used.push((posted.head, here as u32));
            left -= here;
        }
        place.write_at(NUM_BUFFERS, &(used.len() as u16).to_le_bytes());
        for (head, len) in used {
            queue.push_used(head, len)?;
        }
        self.counters.received.fetch_add(1, Ordering::Relaxed);
        self.counters.received_bytes.fetch_add(len.saturating_sub(HEADER as u64), Ordering::Relaxed);
        Ok(Got::Frame)
    }

    fn exhausted(&mut self) -> Got {
        self.readable = false;
        Got::Nothing
    }

    fn receive_all(&mut self, queues: &mut Queues) -> Result<bool, Broken> {
        for _ in 0..BUDGET {
            if !self.readable {
                return Ok(false);
            }
            if matches!(self.receive(queues)?, Got::Nothing) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn transmit_all(&mut self, queues: &mut Queues, index: u16) -> Result<bool, Broken> {
        let Some(queue) = queues.get(index) else { return Ok(false) };
        queue.disable_doorbell()?;
        for _ in 0..BUDGET {
            if !queue.pop(&mut self.chain)? {
                return queue.enable_doorbell();
            }
            let len = self.chain.readable_len();
            let sound = (FRAME_MIN..=FRAME_MAX).contains(&len);
            let frame = buffer(queue.memory(), &self.chain.readable).filter(|_| sound);
            // The kernel checks the header. A frame that it does not take now is lost, as on a wire.
            match frame.map(|frame| writev(self.taps[self.pair].as_fd(), &frame)) {
                Some(Ok(_)) => {
                    self.counters.sent.fetch_add(1, Ordering::Relaxed);
                    self.counters.sent_bytes.fetch_add(len - HEADER as u64, Ordering::Relaxed);
                }
                Some(Err(_)) | None => {
                    self.counters.dropped.fetch_add(1, Ordering::Relaxed);
                }
            }
            queue.push_used(self.chain.head, 0)?;
        }
        Ok(true)
    }

    fn control(&mut self, queues: &mut Queues, index: u16) -> Result<bool, Broken> {
        let features = queues.features;
        let Some(queue) = queues.get(index) else { return Ok(false) };
        queue.disable_doorbell()?;
        for _ in 0..queue.size() {
            if !queue.pop(&mut self.chain)? {
                return queue.enable_doorbell();
            }
            let most = self.taps.len() as u16;
            let wanted = control::pairs_wanted(&mut self.chain, queue.memory(), features, most);
            let ok = wanted.is_some_and(|pairs| self.use_pairs(pairs));
            let len = control::acknowledge(&self.chain, queue.memory(), ok);
            queue.push_used(self.chain.head, len)?;
        }
        Ok(true)
    }

    /// Has the interface spread frames over the first `pairs` descriptors.
    fn use_pairs(&self, pairs: u16) -> bool {
        self.counters.set_pairs(pairs);
        (1..).zip(&self.taps[1..]).all(|(at, tap)| match tap.set_attached(at < pairs) {
            Ok(()) => true,
            Err(error) => {
                tracing::warn!(%error, "a queue of the interface could not be switched");
                false
            }
        })
    }
}

impl Backend for NetBackend {
    fn attach(&mut self, ring: &mut Ring) -> io::Result<()> {
        let source = ring.source();
        self.source = Some(source);
        ring.poll_readable(self.taps[self.pair].as_raw_fd(), true, source.token(0));
        Ok(())
    }

    fn activate(&mut self, _ring: &mut Ring, queues: &mut Queues) {
        let takes = |feature, offload| if queues.features & feature != 0 { offload } else { 0 };
        let offloads = takes(feature::GUEST_CSUM, libc::TUN_F_CSUM)
            | takes(feature::GUEST_TSO4, libc::TUN_F_TSO4)
            | takes(feature::GUEST_TSO6, libc::TUN_F_TSO6);
        if let Err(error) = self.taps[self.pair].set_offloads(offloads) {
            tracing::warn!(%error, "the interface's offloads could not be set");
        }
        if self.pair == 0 && self.taps.len() > 1 {
            self.use_pairs(self.counters.pairs().max(1));
        }
        self.readable = true;
    }

    fn serve(&mut self, _ring: &mut Ring, queues: &mut Queues, index: u16) -> Result<bool, Broken> {
        if Some(index) == control::queue(queues.features, self.taps.len() as u16) {
            self.control(queues, index)
        } else if index.is_multiple_of(2) {
            self.receive_all(queues)
        } else {
            self.transmit_all(queues, index)
        }
    }

    fn complete(
        &mut self,
        ring: &mut Ring,
        queues: Option<&mut Queues>,
        completion: Completion,
    ) -> Result<(), Broken> {
        self.readable = true;
        if !completion.more() && completion.result >= 0 {
            ring.poll_readable(self.taps[self.pair].as_raw_fd(), true, completion.token);
        }
        if let Some(queues) = queues {
            queues.ring(self.receive_queue());
        }
        Ok(())
    }

    /// Posted chains touch nothing by themselves, but they are the queue's again.
    fn let_go(&mut self, queues: &mut Queues) {
        let index = self.receive_queue();
        self.posted_len = 0;
        for posted in self.posted.drain(..) {
            if let Some(queue) = queues.get(index) {
                queue.put_back(posted.head);
            }
        }
    }
}
