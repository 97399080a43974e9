//! One time stamp counter for a guest on several PCs: how a helper's counter is found against the console node's, how
//! well, and whether that is well enough. Drawn in `docs/time.md`. Nothing here has an effect or reads a clock.

use std::collections::VecDeque;

use devices::interrupt::Tsc;

/// So many probes the fit looks at.
const WINDOW: usize = 32;
/// Probes whose round trip is longer than the shortest one by more than this, in parts of it, only count for want of
/// better ones.
const GOOD: f64 = 0.5;
/// Before so many probes nothing is said: the shortest round trip may be far from it.
const SETTLED: usize = 8;
/// How far two rates may be apart before anything is measured, in parts per million: two crystals, and the kernels'
/// notions of their rates.
const ANY_PPM: f64 = 300.0;
/// How far a rate strays from what was fitted, in parts per million: crystals warm and cool.
const WANDER_PPM: f64 = 0.5;
/// Probes that contradict everything before them, one after the other, until the clock is taken to have jumped.
const CONTRADICTIONS: u8 = 3;

/// One question and its answer. All stamps count ticks at the guest's rate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probe {
    /// When it was sent, here.
    pub sent: Tsc,
    /// When it was answered, there.
    pub there: Tsc,
    /// When the answer came, here.
    pub received: Tsc,
}

impl Probe {
    /// The round trip in ticks; `None`: its stamps are in no order, so it is none.
    #[must_use]
    pub fn round_trip(&self) -> Option<u64> {
        Some(self.received.0.wrapping_sub(self.sent.0)).filter(|ticks| *ticks < 1 << 40)
    }

    /// How far the counter here is ahead of the one there, if the answer was given halfway. Wrapping.
    fn ahead(&self, round_trip: u64) -> u64 {
        self.sent.0.wrapping_add(round_trip / 2).wrapping_sub(self.there.0)
    }
}

/// What is known of a helper's counter at some moment.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Estimate {
    /// How far the counter here is ahead of the one there, wrapping: what is added to the one there.
    pub offset: u64,
    /// How much faster the counter here runs, in parts per million.
    pub rate_ppm: f64,
    /// How far the offset may be, in ticks, from the one that makes the shortest ways there and back equally long.
    pub error: u64,
    /// The smallest one-way latency in ticks: half of the shortest round trip of anything between the two.
    pub latency: u64,
    /// How far the offset may be from the true one, if nothing is known of the ways but their sum.
    pub absolute: u64,
}

impl Estimate {
    /// Whether a member that is set to within `off` ticks of the offset is always later, when something reaches it,
    /// than its sender was when it left.
    #[must_use]
    pub fn in_order(&self, off: u64) -> bool {
        // A quarter is left for what is faster than everything so far.
        self.error.saturating_add(off) < self.latency / 4 * 3
    }
}

/// What a probe told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    /// It was taken in.
    Taken,
    /// Its stamps are in no order, or it contradicts those before it.
    Refused,
    /// The counter there is not where it was: its PC slept, or was paused with its counter. What was known is forgotten,
    /// and the member's vCPUs must not run until it is found again.
    Jumped,
}

#[derive(Clone, Copy, Debug)]
struct Sample {
    /// When, on the clock here: halfway.
    at: u64,
    /// The offset, less that of the first sample; wrapping ones are far from it only for strangers.
    ahead: f64,
    round_trip: u64,
}

/// Finds a helper's counter against the one here.
#[derive(Clone, Debug, Default)]
pub struct Estimator {
    samples: VecDeque<Sample>,
    /// The first sample's offset, which the others are measured from.
    origin: u64,
    /// The shortest round trip of all, in ticks.
    shortest: Option<u64>,
    contradictions: u8,
}

impl Estimator {
    /// Takes in a probe.
    pub fn probe(&mut self, probe: &Probe) -> Told {
        let Some(round_trip) = probe.round_trip() else { return Told::Refused };
        let ahead = probe.ahead(round_trip);
        let at = probe.sent.0.wrapping_add(round_trip / 2);
        if self.samples.is_empty() {
            self.origin = ahead;
        }
        let sample = Sample { at, ahead: ahead.wrapping_sub(self.origin) as i64 as f64, round_trip };
        if let Some((offset, error)) = self.predict(at) {
            // Both are certain to hold the true offset, so they overlap unless a counter jumped.
            if (sample.ahead - offset).abs() > error + round_trip as f64 / 2.0 + 1.0 {
                self.contradictions += 1;
                if self.contradictions < CONTRADICTIONS {
                    return Told::Refused;
                }
                *self = Self { shortest: self.shortest, ..Self::default() };
                return Told::Jumped;
            }
        }
        self.contradictions = 0;
        self.round_trip(round_trip);
        if self.samples.len() == WINDOW {
            self.forget();
        }
        self.samples.push_back(sample);
        Told::Taken
    }

    /// Something else went to the helper and back in so many ticks: nothing may be faster than what the order counts on.
    pub fn round_trip(&mut self, ticks: u64) {
        self.shortest = Some(self.shortest.map_or(ticks, |shortest| shortest.min(ticks)));
    }

    /// What is known when the counter here reads `now`; `None`: not enough yet.
    #[must_use]
    pub fn estimate(&self, now: Tsc) -> Option<Estimate> {
        let shortest = self.shortest.filter(|_| self.samples.len() >= SETTLED)?;
        let (rate, uncertain) = self.rate();
        let aged = |sample: &Sample| age(now.0, sample.at) * uncertain;
        let excess = |sample: &Sample| sample.round_trip.saturating_sub(shortest) as f64 / 2.0 + aged(sample);
        let best = self.samples.iter().min_by(|a, b| excess(a).total_cmp(&excess(b)))?;
        let offset = best.ahead + rate * signed_age(now.0, best.at);
        Some(Estimate {
            offset: self.origin.wrapping_add(offset.round() as i64 as u64),
            rate_ppm: rate * 1e6,
            error: excess(best).ceil() as u64 + 1,
            latency: shortest / 2,
            absolute: (best.round_trip as f64 / 2.0 + aged(best)).ceil() as u64 + 1,
        })
    }

    /// The offset at `at` by what is known, and a bound of its error, from any asymmetry.
    fn predict(&self, at: u64) -> Option<(f64, f64)> {
        let (rate, uncertain) = self.rate();
        let bound = |sample: &Sample| sample.round_trip as f64 / 2.0 + age(at, sample.at) * uncertain;
        let best = self.samples.iter().min_by(|a, b| bound(a).total_cmp(&bound(b)))?;
        Some((best.ahead + rate * signed_age(at, best.at), bound(best)))
    }

    /// How fast the offset grows, and how uncertain that is, both in ticks per tick: the median of the slopes between good
    /// samples (Theil and Sen), which a few bad ones do not move; no slope can be off by more than its ends are.
    fn rate(&self) -> (f64, f64) {
        let shortest = self.shortest.unwrap_or(0) as f64;
        let good: Vec<&Sample> = self
            .samples
            .iter()
            .filter(|sample| sample.round_trip as f64 <= shortest * (1.0 + GOOD))
            .collect();
        let mut slopes = Vec::new();
        let (mut surest, mut least) = (0.0, ANY_PPM * 1e-6);
        for (index, early) in good.iter().enumerate() {
            for late in &good[index + 1..] {
                let apart = signed_age(late.at, early.at);
                if apart > 0.0 {
                    let slope = (late.ahead - early.ahead) / apart;
                    slopes.push(slope);
                    // Either end is off its place by half of its round trip at most.
                    let off = (late.round_trip + early.round_trip) as f64 / 2.0;
                    let bound = (off + 2.0) / apart;
                    if bound < least {
                        (surest, least) = (slope, bound);
                    }
                }
            }
        }
        if slopes.is_empty() {
            return (0.0, ANY_PPM * 1e-6);
        }
        slopes.sort_by(f64::total_cmp);
        // Within what the surest slope leaves, so that the median's error is bounded too.
        let median = slopes[slopes.len() / 2].clamp(surest - least, surest + least);
        (median, 2.0 * least + WANDER_PPM * 1e-6)
    }

    /// Makes room: bad samples go first, then the oldest.
    fn forget(&mut self) {
        let shortest = self.shortest.unwrap_or(0) as f64;
        let bad = self.samples.iter().position(|sample| sample.round_trip as f64 > shortest * (1.0 + GOOD));
        self.samples.remove(bad.unwrap_or(0));
    }
}

fn signed_age(now: u64, then: u64) -> f64 {
    now.wrapping_sub(then) as i64 as f64
}

fn age(now: u64, then: u64) -> f64 {
    signed_age(now, then).abs()
}

/// A change of a member's offset, to be carried out while none of its vCPUs is in guest mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// The new offset.
    pub offset: u64,
    /// For at least so many ticks of its own counter none of its vCPUs may have been in guest mode: a step back by no more than the time
    /// that passed meanwhile is none that the guest sees.
    pub out_for: u64,
}

/// Keeps a member's offset where the estimate is: decides when it is changed, and how.
#[derive(Clone, Debug)]
pub struct Keeper {
    applied: u64,
}

impl Keeper {
    /// A member with this offset.
    #[must_use]
    pub fn new(applied: u64) -> Self {
        Self { applied }
    }

    /// The member's offset.
    #[must_use]
    pub fn applied(&self) -> u64 {
        self.applied
    }

    /// How far the member is from the estimate, in ticks.
    #[must_use]
    pub fn off(&self, estimate: &Estimate) -> u64 {
        (estimate.offset.wrapping_sub(self.applied) as i64).unsigned_abs()
    }

    /// Whether whatever one member sends is never received before it was sent, by the guest's counter.
    #[must_use]
    pub fn in_order(&self, estimate: &Estimate) -> bool {
        estimate.in_order(self.off(estimate))
    }

    /// The step to take, if one is due: when a quarter of what the order leaves is used up. It counts as taken.
    pub fn step(&mut self, estimate: &Estimate) -> Option<Step> {
        let leeway = estimate.latency.saturating_sub(estimate.error);
        let ahead = estimate.offset.wrapping_sub(self.applied) as i64;
        if ahead == 0 || ahead.unsigned_abs() < leeway / 4 {
            return None;
        }
        self.applied = estimate.offset;
        Some(Step { offset: estimate.offset, out_for: if ahead < 0 { ahead.unsigned_abs() } else { 0 } })
    }
}

#[cfg(test)]
#[path = "clock_test.rs"]
mod tests;
