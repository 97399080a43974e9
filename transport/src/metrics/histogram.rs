//! A histogram of latencies with a fixed size and a known error.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// The width of the narrowest buckets: 2⁶ ns.
const UNIT: u32 = 6;

/// Each doubling of the latency is cut into 2⁴ buckets.
const PARTS: u32 = 4;

/// Up to 2³⁷ ns (137 s); the last bucket takes what is longer.
const BUCKETS: usize = 448;

/// The bucket of a latency. A bucket holds what is longer than its lower edge and not longer than its upper one.
fn bucket(ns: u64) -> usize {
    let units = ns.saturating_sub(1) >> UNIT;
    let shift = (u64::BITS - 1 - (units | 1).leading_zeros()).saturating_sub(PARTS);
    let index = (u64::from(shift) << PARTS) + (units >> shift);
    usize::try_from(index).unwrap_or(usize::MAX).min(BUCKETS - 1)
}

/// The upper edge of a bucket in nanoseconds.
fn edge(bucket: usize) -> u64 {
    let bucket = bucket.min(BUCKETS - 1) as u64;
    let parts = 1 << PARTS;
    let (shift, part) = match bucket >> PARTS {
        0 => (0, bucket),
        octave => (octave - 1, bucket % parts + parts),
    };
    (part + 1) << shift << UNIT
}

/// Adds to a number that only one thread writes: two plain moves instead of a locked instruction.
pub(super) fn add(number: &AtomicU64, n: u64) {
    number.store(number.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
}

/// Latencies, counted in buckets that get wider as the latencies grow.
///
/// A bucket is at most 1/16 as wide as its lower edge, or 64 ns below 1,024 ns; so what is read from it
/// ([`Distribution::quantile`]) is never less than the truth and at most 6.25 % (or 64 ns) more. Latencies of
/// more than 137 s are in the last bucket; the longest one is known exactly. One thread writes, any reads.
#[derive(Debug)]
pub struct Histogram {
    buckets: [AtomicU64; BUCKETS],
    sum_ns: AtomicU64,
    max_ns: AtomicU64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { buckets: [const { AtomicU64::new(0) }; BUCKETS], sum_ns: 0.into(), max_ns: 0.into() }
    }
}

impl Histogram {
    /// Counts one latency. Only ever from one thread.
    pub fn note(&self, latency: Duration) {
        let ns = u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX);
        add(&self.buckets[bucket(ns)], 1);
        add(&self.sum_ns, ns);
        if ns > self.max_ns.load(Ordering::Relaxed) {
            self.max_ns.store(ns, Ordering::Relaxed);
        }
    }

    /// What was counted until now.
    #[must_use]
    pub fn snapshot(&self) -> Distribution {
        let counts = self.buckets.iter().map(|count| count.load(Ordering::Relaxed));
        let buckets: Vec<(u16, u64)> =
            counts.enumerate().filter(|(_, n)| *n > 0).map(|(at, n)| (at as u16, n)).collect();
        Distribution {
            count: buckets.iter().map(|(_, n)| n).sum(),
            sum_ns: self.sum_ns.load(Ordering::Relaxed),
            max_ns: self.max_ns.load(Ordering::Relaxed),
            buckets,
        }
    }
}

/// What a [`Histogram`] counted until some moment, or between two.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Distribution {
    /// How many latencies.
    pub count: u64,
    /// All of them together, in nanoseconds.
    pub sum_ns: u64,
    /// The longest one in nanoseconds; between two moments the upper edge of its bucket.
    pub max_ns: u64,
    /// Buckets that are not empty, in order: number and count. [`Distribution::edges`] says where they end.
    pub buckets: Vec<(u16, u64)>,
}

impl Distribution {
    /// The latency that a share `q` (0 to 1) of all did not exceed: at most 6.25 % or 64 ns too much. `None`
    /// if there are none.
    #[must_use]
    pub fn quantile(&self, q: f64) -> Option<Duration> {
        let total: u64 = self.buckets.iter().map(|(_, n)| n).sum();
        // The smallest number of latencies that is at least the share.
        let wanted = ((q.clamp(0.0, 1.0) * total as f64).ceil() as u64).clamp(1, total.max(1));
        let mut seen = 0;
        for (bucket, n) in &self.buckets {
            seen += n;
            if seen >= wanted {
                let last = usize::from(*bucket) >= BUCKETS - 1;
                let ns = if last { self.max_ns } else { edge((*bucket).into()).min(self.max_ns) };
                return Some(Duration::from_nanos(ns));
            }
        }
        None
    }

    /// The longest latency.
    #[must_use]
    pub fn max(&self) -> Option<Duration> {
        (self.count > 0).then(|| Duration::from_nanos(self.max_ns))
    }

    /// The mean.
    #[must_use]
    pub fn mean(&self) -> Option<Duration> {
        self.sum_ns.checked_div(self.count).map(Duration::from_nanos)
    }

    /// How many latencies were `ns` nanoseconds or shorter; exact where `ns` is a power of two from 2¹⁰ to 2³⁶.
    #[must_use]
    pub fn at_most(&self, ns: u64) -> u64 {
        let inside = |bucket: u16| usize::from(bucket) < BUCKETS - 1 && edge(bucket.into()) <= ns;
        self.buckets.iter().filter(|(bucket, _)| inside(*bucket)).map(|(_, n)| n).sum()
    }

    /// Upper edges of the buckets of this distribution and the counts in them, shortest first.
    pub fn edges(&self) -> impl Iterator<Item = (Duration, u64)> + '_ {
        self.buckets.iter().map(|(bucket, n)| (Duration::from_nanos(edge((*bucket).into())), *n))
    }

    /// What came after `earlier`, an older snapshot of the same histogram.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let before = |bucket: u16| {
            let at = earlier.buckets.binary_search_by_key(&bucket, |(bucket, _)| *bucket);
            at.map_or(0, |at| earlier.buckets[at].1)
        };
        let new = self.buckets.iter().map(|(bucket, n)| (*bucket, n.saturating_sub(before(*bucket))));
        let buckets: Vec<(u16, u64)> = new.filter(|(_, n)| *n > 0).collect();
        let longest = match buckets.last() {
            None => 0,
            Some((bucket, _)) if usize::from(*bucket) >= BUCKETS - 1 => self.max_ns,
            Some((bucket, _)) => edge((*bucket).into()).min(self.max_ns),
        };
        Self {
            count: buckets.iter().map(|(_, n)| n).sum(),
            sum_ns: self.sum_ns.wrapping_sub(earlier.sum_ns),
            max_ns: longest,
            buckets,
        }
    }

    /// Adds what another histogram counted.
    pub fn merge(&mut self, other: &Self) {
        self.count += other.count;
        self.sum_ns = self.sum_ns.wrapping_add(other.sum_ns);
        self.max_ns = self.max_ns.max(other.max_ns);
        for (bucket, n) in &other.buckets {
            match self.buckets.binary_search_by_key(bucket, |(bucket, _)| *bucket) {
                Ok(at) => self.buckets[at].1 += n,
                Err(at) => self.buckets.insert(at, (*bucket, *n)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_latency_is_above_its_buckets_lower_edge_and_not_above_its_upper_one() {
        let mut values: Vec<u64> = (0..5000).collect();
        for power in 10..37u32 {
            let at = 1u64 << power;
            values.extend([at - 1, at, at + 1, at + at / 3, at + at / 16, at + at / 16 + 1]);
        }
        for ns in values {
            let b = bucket(ns);
            assert!(ns <= edge(b), "{ns} in {b}");
            assert!(b == 0 || ns > edge(b - 1), "{ns} in {b}");
            let width = edge(b) - if b == 0 { 0 } else { edge(b - 1) };
            assert!(width <= 64 || width * 16 <= edge(b) - width, "the error of {ns} is {width}");
        }
        assert_eq!(edge(BUCKETS - 1), 1 << 37);
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn a_quantile_is_never_too_small_and_at_most_a_sixteenth_too_large() {
        let histogram = Histogram::default();
        let mut truth = Vec::new();
        let mut x = 12345u64;
        for _ in 0..20_000 {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let ns = 2000 + (x >> 40) * (x >> 60);
            truth.push(ns);
            histogram.note(Duration::from_nanos(ns));
        }
        truth.sort_unstable();
        let seen = histogram.snapshot();
        for q in [0.0, 0.5, 0.9, 0.99, 0.999, 1.0] {
            let exact = truth[((q * 20_000f64).ceil() as usize).clamp(1, 20_000) - 1];
            let got = seen.quantile(q).expect("there are some").as_nanos() as u64;
            assert!(got >= exact && got <= exact + exact / 16 + 1, "p{q}: {got} for {exact}");
        }
        assert_eq!(seen.max_ns, truth[19_999]);
        assert_eq!(seen.sum_ns, truth.iter().sum::<u64>());
        assert_eq!(seen.at_most(1 << 20), truth.iter().filter(|ns| **ns <= 1 << 20).count() as u64);
    }

    #[test]
    fn what_came_between_two_moments_is_their_difference() {
        let histogram = Histogram::default();
        histogram.note(Duration::from_secs(1));
        let earlier = histogram.snapshot();
        histogram.note(Duration::from_micros(10));
        histogram.note(Duration::from_micros(10));
        let since = histogram.snapshot().since(&earlier);
        assert_eq!((since.count, since.sum_ns), (2, 20_000));
        assert!((10_000..=10_625).contains(&since.max_ns), "{since:?}");
        let mut both = earlier;
        both.merge(&since);
        assert_eq!(both.buckets, histogram.snapshot().buckets);
        assert_eq!(Distribution::default().quantile(0.5), None);
    }

    #[test]
    fn what_is_longer_than_the_last_edge_is_reported_as_the_longest() {
        let histogram = Histogram::default();
        histogram.note(Duration::from_secs(3600));
        let seen = histogram.snapshot();
        assert_eq!(seen.quantile(0.5), Some(Duration::from_secs(3600)));
        assert_eq!(seen.at_most(1 << 36), 0);
    }
}
