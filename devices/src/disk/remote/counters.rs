//! What a remote disk counts.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use serde::Serialize;
use transport::channel::Carrier;

/// Latencies by powers of two of a microsecond: the last one takes all that is longer.
const BUCKETS: usize = 24;

/// Latencies of one kind of request.
#[derive(Debug, Default)]
pub(super) struct Histogram {
    buckets: [AtomicU64; BUCKETS],
}

impl Histogram {
    pub(super) fn note(&self, latency: Duration) {
        let micros = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX);
        let bucket = (u64::BITS - micros.leading_zeros()) as usize;
        self.buckets[bucket.min(BUCKETS - 1)].fetch_add(1, Ordering::Relaxed);
    }

    fn snapshot(&self) -> Latencies {
        let counts: Vec<u64> = self.buckets.iter().map(|b| b.load(Ordering::Relaxed)).collect();
        let used = counts.iter().rposition(|c| *c > 0).map_or(0, |last| last + 1);
        Latencies { count: counts.iter().sum(), below_power_of_two_us: counts[..used].to_vec() }
    }
}

/// Counters of one remote disk, shared with whoever reports them.
#[derive(Debug, Default)]
pub struct Counters {
    pub(super) reads: Histogram,
    pub(super) writes: Histogram,
    pub(super) flushes: Histogram,
    pub(super) sessions: AtomicU64,
    pub(super) resumptions: AtomicU64,
    pub(super) cuts: AtomicU64,
    pub(super) rewritten: AtomicU64,
    pub(super) background_flushes: AtomicU64,
    pub(super) log_bytes: AtomicU64,
    pub(super) conflicts: AtomicU64,
    pub(super) full: AtomicU64,
    pub(super) errors: AtomicU64,
    /// Whether RDMA carries the connection.
    pub(super) over_rdma: AtomicBool,
    pub(super) rdma_switches: AtomicU64,
}

/// How long requests took.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Latencies {
    /// How many requests.
    pub count: u64,
    /// The number at place `n` took less than 2ⁿ µs and not less than half of that.
    pub below_power_of_two_us: Vec<u64>,
}

/// The counters at one moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Snapshot {
    /// Reads that were answered.
    pub reads: Latencies,
    /// Writes, discards and clearings that were acknowledged.
    pub writes: Latencies,
    /// Flushes that were acknowledged.
    pub flushes: Latencies,
    /// Sessions that were set up: one at first, one more for each restart of the agent.
    pub sessions: u64,
    /// Reconnections within a session.
    pub resumptions: u64,
    /// Connections that were lost.
    pub cuts: u64,
    /// Ranges that were written again because a new session was set up.
    pub rewritten: u64,
    /// Flushes that the disk sent by itself to keep its log short.
    pub background_flushes: u64,
    /// Bytes in the log of writes that no flush covers yet.
    pub log_bytes: u64,
    /// Writes that waited because one in flight overlapped them.
    pub conflicts: u64,
    /// Answers that the agent's storage is full.
    pub full: u64,
    /// Requests that ended in an error.
    pub errors: u64,
    /// Whether RDMA carries the connection now.
    pub over_rdma: bool,
    /// How often RDMA took over from TCP.
    pub rdma_switches: u64,
}

impl Counters {
    /// The counters now.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Snapshot {
            reads: self.reads.snapshot(),
            writes: self.writes.snapshot(),
            flushes: self.flushes.snapshot(),
            sessions: get(&self.sessions),
            resumptions: get(&self.resumptions),
            cuts: get(&self.cuts),
            rewritten: get(&self.rewritten),
            background_flushes: get(&self.background_flushes),
            log_bytes: get(&self.log_bytes),
            conflicts: get(&self.conflicts),
            full: get(&self.full),
            errors: get(&self.errors),
            over_rdma: self.over_rdma.load(Ordering::Relaxed),
            rdma_switches: get(&self.rdma_switches),
        }
    }

    pub(super) fn carried_by(&self, carrier: Carrier) {
        let rdma = carrier == Carrier::Rdma;
        self.over_rdma.store(rdma, Ordering::Relaxed);
        if rdma {
            Self::add(&self.rdma_switches);
        }
    }

    pub(super) fn add(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_latency_is_counted_below_the_next_power_of_two() {
        let counters = Counters::default();
        for micros in [0, 1, 3, 4, u64::MAX] {
            counters.reads.note(Duration::from_micros(micros));
        }
        let reads = counters.snapshot().reads;
        assert_eq!((reads.count, &reads.below_power_of_two_us[..4]), (5, &[1, 1, 1, 1][..]));
        assert_eq!(reads.below_power_of_two_us.len(), BUCKETS);
    }
}
