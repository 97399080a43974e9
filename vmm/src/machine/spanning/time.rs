//! What is known of a helper's clocks, and what the counters of its vCPUs are set to. Drawn in `docs/time.md`.

use std::time::{Duration, Instant};

use devices::interrupt::Tsc;

use crate::control::ClockStatus;
use crate::kvm::tsc::Rate;
use crate::span::clock::{Estimate, Estimator, Keeper, Probe, Told};
use crate::span::protocol::Moment;

/// How often the log is told at most of clocks that are not known well enough.
const SAID_AGAIN: Duration = Duration::from_secs(60);

/// See the [module](self).
#[derive(Default)]
pub(super) struct Clocks {
    /// By how much the guest's time stamp counter is ahead of this PC's, and how the helper's is turned into the guest's:
    /// once that is known.
    aim: Option<(u64, Rate)>,
    estimator: Estimator,
    keeper: Option<Keeper>,
    estimate: Option<Estimate>,
    /// The shortest round trip so far, in nanoseconds.
    shortest: Option<u64>,
    /// By how much the guest's clock is ahead of the helper's.
    nanos: Option<u64>,
    in_order: bool,
    /// When the log was told last that it is not.
    warned: Option<Instant>,
}

/// What is to be added to a helper's clock and counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ahead {
    pub(super) nanos: u64,
    pub(super) tsc: u64,
}

impl Clocks {
    /// The guest's counter is `offset` ticks ahead of this PC's.
    pub(super) fn aim(&mut self, offset: u64, rate: Rate) {
        self.aim = Some((offset, rate));
    }

    /// Whether enough is known to begin.
    pub(super) fn measured(&self) -> bool {
        self.keeper.is_some() && self.nanos.is_some()
    }

    /// The shortest round trip so far.
    pub(super) fn shortest(&self) -> Option<Duration> {
        self.shortest.map(Duration::from_nanos)
    }

    /// Takes in the answer to a probe: what the clocks `there` said, and the guest's clock halfway. What to set there.
    pub(super) fn answered(
        &mut self,
        sent: Moment,
        there: Moment,
        now: Moment,
        halfway: u64,
    ) -> Option<Ahead> {
        let trip = now.monotonic.since(sent.monotonic);
        if self.shortest.is_none_or(|shortest| trip <= shortest + shortest / 4) {
            // It may get slower for good: what was shortest is believed less and less.
            self.shortest = Some(self.shortest.map_or(trip, |shortest| trip.min(shortest + shortest / 64)));
            // The answer was made in the middle of the trip, give or take half of it.
            self.nanos = Some(halfway.wrapping_sub(there.monotonic.0));
        }
        let (offset, rate) = self.aim?;
        let here = |tsc: Tsc| Tsc(tsc.0.wrapping_add(offset));
        let received = here(now.tsc);
        let probe = Probe { sent: here(sent.tsc), there: rate.to_guest(there.tsc), received };
        if self.estimator.probe(&probe) == Told::Jumped {
            tracing::warn!("A helper's time stamp counter jumped; it is measured anew");
            self.keeper = None;
        }
        let estimate = self.estimator.estimate(received)?;
        let keeper = self.keeper.get_or_insert_with(|| Keeper::new(estimate.offset));
        // The helper itself sees to it that nobody sees a step back.
        keeper.step(&estimate);
        let in_order = keeper.in_order(&estimate);
        let said = self.warned.is_some_and(|at| at.elapsed() < SAID_AGAIN);
        if self.in_order && !in_order && !said {
            self.warned = Some(Instant::now());
            tracing::warn!(?estimate, "A helper's clock is known less well than messages are fast");
        }
        (self.in_order, self.estimate) = (in_order, Some(estimate));
        Some(Ahead { nanos: self.nanos?, tsc: keeper.applied() })
    }

    /// How well its counters are known.
    pub(super) fn status(&self) -> Option<ClockStatus> {
        let (estimate, keeper) = self.estimate.zip(self.keeper.as_ref())?;
        let (_, rate) = self.aim?;
        let nanoseconds =
            |ticks: u64| (u128::from(ticks) * 1_000_000 / u128::from(rate.guest_khz.max(1))) as u64;
        Some(ClockStatus {
            error_ns: nanoseconds(estimate.error.saturating_add(keeper.off(&estimate))),
            latency_ns: nanoseconds(estimate.latency),
            in_order: keeper.in_order(&estimate),
        })
    }
}

#[cfg(test)]
mod tests {
    use devices::interrupt::Nanos;

    use super::*;

    const KHZ: u32 = 2_000_000;

    /// What both PCs' clocks say at `nanos` of ours: theirs began a second later and is 50 ppm slower.
    fn at(nanos: u64) -> (Moment, Moment) {
        let theirs = nanos - nanos / 20_000 + 1_000_000_000;
        let moment = |nanos: u64| Moment { tsc: Tsc(2 * nanos), monotonic: Nanos(nanos) };
        (moment(nanos), moment(theirs))
    }

    #[test]
    fn a_helper_is_kept_within_less_than_a_message_takes_though_its_crystal_is_slower() {
        let mut clocks = Clocks::default();
        let mut now = 5_000_000_000;
        let mut probe = |clocks: &mut Clocks| {
            now += 100_000_000;
            // 20 us there, and 20 to 25 back.
            let (there, back) = (now + 20_000, now + 40_000 + now / 100_000_000 % 5 * 1000);
            let ahead = clocks.answered(at(now).0, at(there).1, at(back).0, at(there).0.monotonic.0);
            (back, ahead)
        };
        assert_eq!(probe(&mut clocks).1, None, "it is not known what to aim at");
        clocks.aim(7, Rate { host_khz: KHZ, guest_khz: KHZ });
        while !clocks.measured() {
            probe(&mut clocks);
        }
        for _ in 0..200 {
            let (back, ahead) = probe(&mut clocks);
            let (ours, theirs) = at(back);
            let said = theirs.tsc.0.wrapping_add(ahead.expect("it is known").tsc);
            let off = (ours.tsc.0 + 7).wrapping_sub(said);
            assert!((off as i64).unsigned_abs() < 2 * 20_000, "{off} ticks apart");
        }
        let status = clocks.status().expect("it is known");
        assert!(status.in_order && status.error_ns < status.latency_ns, "{status:?}");
        assert!((18_000..=22_500).contains(&status.latency_ns), "{status:?}");
    }
}
