//! vCPUs on several PCs: where they are, and what it costs them to share memory.

use serde::Serialize;

use super::super::human::{latency, mebibytes, short};
use super::sample::micros;
use crate::control::VcpuPlace;
use crate::memory::coherence::Counters;

/// The heading of the faults' line; everything fits 80 columns.
const FAULTS: &str = "    READ/S  WRITE/S   UPGR/S   LATE/S     P50     P99     MAX  AHEAD/S  WAITING";
/// The heading of the line of what came and went.
const TRAFFIC: &str = "   TAKEN/S  GIVEN/S  INVAL/S  DOWNG/S   MSGS/S   MIB/S";

/// A guest's vCPUs and the memory that they share in an interval, as this PC's part of it sees it.
#[derive(Debug, Serialize)]
pub(super) struct Span {
    pub(super) places: Vec<VcpuPlace>,
    /// Faults of readers and writers on pages that were elsewhere; of writers on pages that others could read too; on pages
    /// that were on their way or had come meanwhile.
    pub(super) read_faults_per_s: f64,
    pub(super) write_faults_per_s: f64,
    pub(super) upgrades_per_s: f64,
    pub(super) late_faults_per_s: f64,
    /// How long threads stood still for a page; none without such a fault in the interval.
    pub(super) p50_us: Option<f64>,
    pub(super) p99_us: Option<f64>,
    pub(super) max_us: Option<f64>,
    /// Pages that were asked for before anybody stood still for them.
    pub(super) ahead_per_s: f64,
    /// Pages that came from other PCs, and went there.
    pub(super) fetched_per_s: f64,
    pub(super) sent_per_s: f64,
    /// Copies that were given up because another PC writes; pages that are only to be read because another PC reads.
    pub(super) invalidated_per_s: f64,
    pub(super) downgraded_per_s: f64,
    pub(super) messages_per_s: f64,
    pub(super) bytes_per_s: f64,
    /// How many threads of this PC stood still for a page, on average.
    pub(super) waiting: f64,
}

impl Span {
    /// Of a guest that counted `before` and `now`, `seconds` apart.
    pub(super) fn new(places: Vec<VcpuPlace>, before: &Counters, now: &Counters, seconds: f64) -> Self {
        let new = now.since(before);
        // At first there is no interval.
        let rate = |n: u64| if seconds > 0.0 { n as f64 / seconds } else { 0.0 };
        Self {
            places,
            read_faults_per_s: rate(new.read_faults),
            write_faults_per_s: rate(new.write_faults),
            upgrades_per_s: rate(new.upgrades),
            late_faults_per_s: rate(new.late_faults),
            p50_us: micros(new.latency.quantile(0.5)),
            p99_us: micros(new.latency.quantile(0.99)),
            max_us: micros(new.latency.max()),
            ahead_per_s: rate(new.ahead),
            fetched_per_s: rate(new.fetched),
            sent_per_s: rate(new.sent),
            invalidated_per_s: rate(new.invalidated),
            downgraded_per_s: rate(new.downgraded),
            messages_per_s: rate(new.messages),
            bytes_per_s: rate(new.bytes),
            waiting: rate(new.waited_us) / 1e6,
        }
    }

    pub(super) fn lines(&self) -> Vec<String> {
        let place = |place: &VcpuPlace| {
            let vcpus: Vec<_> = place.vcpus.iter().map(u8::to_string).collect();
            let vcpus = if vcpus.is_empty() { "none".to_owned() } else { vcpus.join(",") };
            format!("{vcpus} on {}", place.node)
        };
        let places: Vec<_> = self.places.iter().map(place).collect();
        let [p50, p99, max] = [self.p50_us, self.p99_us, self.max_us].map(latency);
        vec![
            format!("  vCPUs {}", places.join("; ")),
            FAULTS.to_owned(),
            format!(
                "{:>10}{:>9}{:>9}{:>9}{p50:>8}{p99:>8}{max:>8}{:>9}{:>9.2}",
                short(self.read_faults_per_s),
                short(self.write_faults_per_s),
                short(self.upgrades_per_s),
                short(self.late_faults_per_s),
                short(self.ahead_per_s),
                self.waiting
            ),
            TRAFFIC.to_owned(),
            format!(
                "{:>10}{:>9}{:>9}{:>9}{:>9}{:>8}",
                short(self.fetched_per_s),
                short(self.sent_per_s),
                short(self.invalidated_per_s),
                short(self.downgraded_per_s),
                short(self.messages_per_s),
                mebibytes(self.bytes_per_s)
            ),
        ]
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use transport::metrics::Histogram;

    use super::*;

    fn place(node: &str, vcpus: &[u8]) -> VcpuPlace {
        VcpuPlace { node: node.into(), vcpus: vcpus.to_vec(), room: None, clock: None }
    }

    /// What was counted by two moments; only in the second one did pages take longer than 10 us.
    fn counted() -> (Counters, Counters) {
        let histogram = Histogram::default();
        let note = |all: &[u64]| {
            all.iter().for_each(|us| histogram.note(Duration::from_micros(*us)));
            histogram.snapshot()
        };
        let [early, late] = [note(&[10, 10]), note(&[100, 100, 100, 3000])];
        let counters = |scale: u64, latency| Counters {
            read_faults: 10 * scale,
            write_faults: 20 * scale,
            upgrades: 30 * scale,
            late_faults: scale,
            ahead: 4000 * scale,
            fetched: 50 * scale,
            sent: 60 * scale,
            invalidated: 5 * scale,
            downgraded: 7 * scale,
            messages: 123_456 * scale,
            bytes: scale << 20,
            waited_us: 250_000 * scale,
            latency,
            ..Counters::default()
        };
        (counters(1, early), counters(5, late))
    }

    #[test]
    fn what_vcpus_share_reads_in_80_columns() {
        let (before, now) = counted();
        let places = vec![place("console", &[0, 1]), place("attic", &[2]), place("loft", &[])];
        let lines = Span::new(places, &before, &now, 2.0).lines();
        let expected = "  vCPUs 0,1 on console; 2 on attic; none on loft
    READ/S  WRITE/S   UPGR/S   LATE/S     P50     P99     MAX  AHEAD/S  WAITING
      20.0     40.0     60.0      2.0   102us   3.0ms   3.0ms     8000     0.50
   TAKEN/S  GIVEN/S  INVAL/S  DOWNG/S   MSGS/S   MIB/S
       100      120     10.0     14.0   246.9k     2.0";
        assert_eq!(lines.join("\n"), expected);
        assert!(lines.iter().all(|line| line.len() <= 80));
    }

    #[test]
    fn a_guest_that_is_seen_for_the_first_time_has_no_rates_yet() {
        let (_, now) = counted();
        let span = Span::new(Vec::new(), &now, &now, 0.0);
        let rates = [span.read_faults_per_s, span.invalidated_per_s, span.bytes_per_s, span.waiting];
        assert_eq!(rates.map(f64::to_bits), [0; 4]);
        assert_eq!((span.p50_us, span.p99_us, span.max_us), (None, None, None));
    }

    #[test]
    fn the_json_has_the_rates_and_the_latencies_of_the_interval() {
        let (before, now) = counted();
        let json =
            serde_json::to_value(Span::new(vec![place("attic", &[2])], &before, &now, 2.0)).expect("JSON");
        assert_eq!(json["places"][0]["node"], "attic");
        let rates = [("read_faults_per_s", 20.0), ("upgrades_per_s", 60.0), ("ahead_per_s", 8000.0)];
        let given_up = [("invalidated_per_s", 10.0), ("downgraded_per_s", 14.0), ("late_faults_per_s", 2.0)];
        for (name, rate) in rates.into_iter().chain(given_up) {
            assert_eq!(json[name], rate, "{name}");
        }
        let micros = |name: &str| json[name].as_f64().expect("a latency");
        assert!((100.0..107.0).contains(&micros("p50_us")), "{json}");
        assert!((3000.0..3200.0).contains(&micros("p99_us")), "{json}");
    }
}
