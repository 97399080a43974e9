//! What a guest does with a disk, counted by the disk's worker alone and read by anybody.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use serde::Serialize;

/// Latency classes: class `i` counts requests that took at least `2^i` and less than `2^(i+1)` µs; the
/// first also those below 1 µs, the last also all longer ones (half an hour and more).
const CLASSES: usize = 32;

/// Counters of one kind of request.
#[derive(Debug, Default)]
pub struct OperationCounters {
    requests: AtomicU64,
    bytes: AtomicU64,
    errors: AtomicU64,
    latency: [AtomicU64; CLASSES],
}

/// One kind of request at one moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Snapshot {
    /// Requests that were answered.
    pub requests: u64,
    /// Bytes of those that succeeded.
    pub bytes: u64,
    /// How many of them failed.
    pub errors: u64,
    /// How many took `2^i` to `2^(i+1)` µs, for each `i`, up to the last that is not 0.
    pub latency: Vec<u64>,
}

impl OperationCounters {
    pub(super) fn count(&self, bytes: u64, ok: bool, took: Duration) {
        let class = took.as_micros().max(1).ilog2() as usize;
        // There is one writer, so a plain load and store would do; this compiles to about the same.
        self.requests.fetch_add(1, Relaxed);
        self.latency[class.min(CLASSES - 1)].fetch_add(1, Relaxed);
        if ok {
            self.bytes.fetch_add(bytes, Relaxed);
        } else {
            self.errors.fetch_add(1, Relaxed);
        }
    }

    /// The counters now.
    pub fn snapshot(&self) -> Snapshot {
        let mut latency: Vec<u64> = self.latency.iter().map(|class| class.load(Relaxed)).collect();
        latency.truncate(latency.iter().rposition(|&n| n != 0).map_or(0, |last| last + 1));
        Snapshot {
            requests: self.requests.load(Relaxed),
            bytes: self.bytes.load(Relaxed),
            errors: self.errors.load(Relaxed),
            latency,
        }
    }
}

/// Counters of one disk.
#[derive(Debug, Default)]
pub struct Counters {
    /// Reads.
    pub reads: OperationCounters,
    /// Writes.
    pub writes: OperationCounters,
    /// Flushes.
    pub flushes: OperationCounters,
    /// Discards and write zeroes.
    pub discards: OperationCounters,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_latency_is_counted_in_its_power_of_two() {
        let counters = OperationCounters::default();
        for micros in [0, 1, 2, 3, 4, 1000, u64::MAX] {
            counters.count(512, micros != 3, Duration::from_micros(micros));
        }
        let now = counters.snapshot();
        assert_eq!((now.requests, now.bytes, now.errors), (7, 6 * 512, 1));
        assert_eq!((now.latency[0], now.latency[1], now.latency[2], now.latency[9]), (2, 2, 1, 1));
        assert_eq!(now.latency.len(), CLASSES);
    }
}
