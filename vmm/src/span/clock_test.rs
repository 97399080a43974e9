use proptest::prelude::*;

use super::*;

/// Ticks in a microsecond.
const MICRO: f64 = 2500.0;
/// Where the counters are at the beginning: the console node's is about to pass a round number.
const HERE: u64 = u64::MAX - 1_000_000_000;

/// Two PCs and what is between them. Time is the console node's, in ticks from the beginning.
struct Pair {
    ppm: f64,
    /// Added to the counter there.
    there: u64,
    /// The shortest ways there and back, in ticks.
    ways: [f64; 2],
    jitter: f64,
    seed: u64,
}

impl Pair {
    fn roll(&mut self) -> f64 {
        self.seed ^= self.seed << 13;
        self.seed ^= self.seed >> 7;
        self.seed ^= self.seed << 17;
        (self.seed >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// How long something takes one way: mostly a little more than the shortest, now and then far more.
    fn takes(&mut self, way: usize) -> f64 {
        let usual = -self.roll().max(1e-9).ln() * self.jitter;
        let spike = if self.roll() < 0.1 { self.roll() * 2000.0 * MICRO } else { 0.0 };
        self.ways[way] + usual + spike
    }

    fn here(time: f64) -> Tsc {
        Tsc(HERE.wrapping_add(time as u64))
    }

    fn there(&self, time: f64) -> Tsc {
        Tsc(self.there.wrapping_add((time * (1.0 + self.ppm * 1e-6)) as u64))
    }

    fn probe(&mut self, time: f64) -> Probe {
        let at = time + self.takes(0);
        let back = at + self.takes(1);
        Probe { sent: Self::here(time), there: self.there(at), received: Self::here(back) }
    }

    /// The guest's counter at the member.
    fn guest(&self, time: f64, keeper: &Keeper) -> u64 {
        self.there(time).0.wrapping_add(keeper.applied)
    }
}

/// By how much `later` is after `earlier`, on a counter that may pass zero.
fn after(later: u64, earlier: u64) -> i64 {
    later.wrapping_sub(earlier) as i64
}

const STEP: f64 = 20_000.0 * MICRO;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]
    #[test]
    fn no_message_is_received_before_it_was_sent_by_the_guests_counter(
        ppm in -80.0..80.0, there in any::<u64>(), to in 10.0..200.0, back in 10.0..200.0, jitter in 0.1..3.0,
        seed in 1..u64::MAX
    ) {
        let mut pair = Pair { ppm, there, ways: [to * MICRO, back * MICRO], jitter: jitter * MICRO, seed };
        let mut estimator = Estimator::default();
        let mut keeper: Option<Keeper> = None;
        let (mut settled, mut kept) = (0, 0);
        for tick in 0..600 {
            let time = f64::from(tick) * STEP;
            // Often at first, then four times a second.
            if tick < 100 || tick % 12 == 0 {
                let probe = pair.probe(time);
                prop_assert_ne!(estimator.probe(&probe), Told::Jumped);
            }
            let Some(estimate) = estimator.estimate(Pair::here(time)) else { continue };
            let Some(keeper) = &mut keeper else {
                keeper = Some(Keeper::new(estimate.offset));
                continue;
            };
            let before = pair.guest(time, keeper);
            if let Some(step) = keeper.step(&estimate) {
                // It was out of guest mode for as long as the step demands, by its own counter.
                let out = (step.out_for as f64 + 2.0) / (1.0 + ppm * 1e-6);
                let resumed = pair.guest(time + out, keeper);
                prop_assert!(after(resumed, before) >= 0, "the member's own counter went back");
            }
            settled += u32::from(tick >= 350);
            if !keeper.in_order(&estimate) {
                continue;
            }
            kept += u32::from(tick >= 350);
            // The fastest there is, either way.
            let there = after(pair.guest(time + pair.ways[0], keeper), Pair::here(time).0);
            let back = after(Pair::here(time + pair.ways[1]).0, pair.guest(time, keeper));
            prop_assert!(there >= 0 && back >= 0, "there {} and back {} by {:?}", there, back, estimate);
        }
        prop_assert!(kept * 100 >= settled * 95, "in order {kept} times of {settled}");
    }
}

#[test]
fn rates_and_bounds_are_what_the_clocks_really_do() {
    let mut pair = Pair { ppm: 40.0, there: 77, ways: [20.0 * MICRO, 20.0 * MICRO], jitter: MICRO, seed: 9 };
    let mut estimator = Estimator::default();
    assert_eq!(estimator.estimate(Tsc(0)), None);
    for tick in 0..200 {
        let probe = pair.probe(f64::from(tick) * STEP);
        assert_eq!(estimator.probe(&probe), Told::Taken);
    }
    let time = 200.0 * STEP;
    let estimate = estimator.estimate(Pair::here(time)).expect("there were probes");
    assert!((estimate.rate_ppm + 40.0).abs() < 10.0, "{estimate:?}");
    let truth = Pair::here(time).0.wrapping_sub(pair.there(time).0);
    let off = after(estimate.offset, truth).unsigned_abs();
    assert!(off <= estimate.error && estimate.error < estimate.latency, "{off}: {estimate:?}");
    assert!(estimate.absolute >= estimate.latency, "the ways themselves cannot be told apart: {estimate:?}");
}

#[test]
fn a_path_that_is_faster_than_the_probes_narrows_what_the_order_leaves() {
    let mut pair = Pair { ppm: 0.0, there: 0, ways: [50.0 * MICRO, 50.0 * MICRO], jitter: 1.0, seed: 5 };
    let mut estimator = Estimator::default();
    for tick in 0..100 {
        let probe = pair.probe(f64::from(tick) * STEP);
        estimator.probe(&probe);
    }
    let now = Pair::here(100.0 * STEP);
    assert!(estimator.estimate(now).expect("some").in_order(0));
    estimator.round_trip((30.0 * MICRO) as u64);
    let estimate = estimator.estimate(now).expect("some");
    assert!(
        !estimate.in_order(0),
        "probes take more than twice as long as what they are to bound: {estimate:?}"
    );
}

#[test]
fn a_clock_that_jumped_is_noticed_and_found_again_and_one_strange_probe_is_not_believed() {
    let mut pair =
        Pair { ppm: 10.0, there: 1 << 40, ways: [30.0 * MICRO, 30.0 * MICRO], jitter: MICRO, seed: 3 };
    let mut estimator = Estimator::default();
    let mut time = 0.0;
    let mut next = |pair: &mut Pair, estimator: &mut Estimator| {
        time += STEP;
        let probe = pair.probe(time);
        (estimator.probe(&probe), time)
    };
    for _ in 0..50 {
        assert_eq!(next(&mut pair, &mut estimator).0, Told::Taken);
    }
    pair.there += 1 << 30;
    assert_eq!(next(&mut pair, &mut estimator).0, Told::Refused);
    pair.there -= 1 << 30;
    assert_eq!(next(&mut pair, &mut estimator).0, Told::Taken, "it was one stray answer");
    // The PC was suspended: its counter begins anew.
    pair.there = 0;
    assert_eq!(
        [(); 3].map(|()| next(&mut pair, &mut estimator).0),
        [Told::Refused, Told::Refused, Told::Jumped]
    );
    assert_eq!(estimator.estimate(Tsc(0)), None);
    for _ in 0..50 {
        assert_eq!(next(&mut pair, &mut estimator).0, Told::Taken);
    }
    let (_, time) = next(&mut pair, &mut estimator);
    let estimate = estimator.estimate(Pair::here(time)).expect("it was found again");
    let truth = Pair::here(time).0.wrapping_sub(pair.there(time).0);
    assert!(
        after(estimate.offset, truth).unsigned_abs() <= estimate.error && estimate.in_order(0),
        "{estimate:?}"
    );
}

#[test]
fn stamps_in_no_order_are_refused_and_no_stamps_do_harm() {
    let mut estimator = Estimator::default();
    let probe = |sent, there, received| Probe { sent: Tsc(sent), there: Tsc(there), received: Tsc(received) };
    assert_eq!(estimator.probe(&probe(10, 5, 9)), Told::Refused);
    assert_eq!(estimator.probe(&probe(0, 5, u64::MAX)), Told::Refused);
    for there in [0, 1, u64::MAX, 1 << 63, 12345] {
        for sent in [0, 7, 1 << 63, u64::MAX - 3] {
            estimator.probe(&probe(sent, there, sent + 3));
            let estimate = estimator.estimate(Tsc(there));
            assert!(estimate.is_none_or(|estimate| estimate.rate_ppm.abs() <= 1000.0));
        }
    }
}
