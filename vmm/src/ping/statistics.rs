//! What a list of round trips comes to.

use std::time::Duration;

use serde::Serialize;

/// Round trips of one class, in microseconds. Without an answer there are no times, without two no jitter.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct RoundTrips {
    /// Requests that were sent.
    pub sent: u32,
    /// Those that were answered in time.
    pub answered: u32,
    /// The shortest.
    pub min_us: Option<f64>,
    /// Half of them took no longer.
    pub p50_us: Option<f64>,
    /// 99 of 100 took no longer.
    pub p99_us: Option<f64>,
    /// The longest.
    pub max_us: Option<f64>,
    /// The mean difference between one and the next, without its sign (RFC 5481, section 4.1).
    pub jitter_us: Option<f64>,
}

impl RoundTrips {
    /// Of `sent` requests those that were answered took `times`, in this order.
    #[must_use]
    pub fn of(sent: u32, times: &[Duration]) -> Self {
        let micros = |time: Duration| time.as_nanos() as f64 / 1000.0;
        let mut sorted = times.to_vec();
        sorted.sort_unstable();
        let share = |q: f64| {
            let at = (q * sorted.len() as f64).ceil() as usize;
            sorted.get(at.saturating_sub(1)).copied().map(micros)
        };
        let steps: f64 = times.windows(2).map(|two| micros(two[0].abs_diff(two[1]))).sum();
        Self {
            sent,
            answered: u32::try_from(times.len()).unwrap_or(u32::MAX),
            min_us: sorted.first().copied().map(micros),
            p50_us: share(0.5),
            p99_us: share(0.99),
            max_us: sorted.last().copied().map(micros),
            jitter_us: (times.len() > 1).then(|| steps / (times.len() - 1) as f64),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_and_jitter_are_those_of_the_list() {
        let times: Vec<Duration> = [5, 1, 4, 2, 3].map(Duration::from_micros).into();
        let trips = RoundTrips::of(6, &times);
        assert_eq!((trips.sent, trips.answered), (6, 5));
        assert_eq!((trips.min_us, trips.p50_us, trips.max_us), (Some(1.0), Some(3.0), Some(5.0)));
        assert_eq!(trips.p99_us, Some(5.0));
        assert_eq!(trips.jitter_us, Some((4.0 + 3.0 + 2.0 + 1.0) / 4.0));
        assert_eq!(RoundTrips::of(3, &[]), RoundTrips { sent: 3, ..RoundTrips::default() });
        assert_eq!(RoundTrips::of(1, &times[..1]).jitter_us, None, "one has no next");
    }
}
