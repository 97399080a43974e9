//! The memory that a guest has on other PCs: what is said of it, what that means for an interval, and its lines.

use serde::Serialize;
use transport::metrics::{Distribution, Snapshot};
use transport::wire::Class;

use super::super::human::{latency, mebibytes, short};
use super::sample::micros;
use crate::control::{HelperStatus, MemoryStatus, Peers};
use crate::memory::coherence;
use crate::memory::fault::{Counters, PAGE};

/// The heading of the faults' line; everything fits 80 columns.
const FAULTS: &str = "    REMOTE/S   ZERO/S  WRITE/S   LATE/S     P50     P99     MAX  AHEAD/S   USED";
/// The heading of the helpers' lines.
const HELPERS: &str = "    HELPER             STATE       KEEPS  IN M/S OUT M/S     P50     P99  PACKED";

/// A guest's memory in an interval.
#[derive(Debug, Serialize)]
pub(super) struct Memory {
    /// Its RAM, and how much of that may be on this PC.
    pub(super) size_bytes: u64,
    pub(super) local_bytes: u64,
    /// How much of it is where now. Dirty is a part of resident.
    pub(super) resident_bytes: u64,
    pub(super) dirty_bytes: u64,
    pub(super) remote_bytes: u64,
    pub(super) fetching_bytes: u64,
    pub(super) storing_bytes: u64,
    pub(super) lost_bytes: u64,
    /// Faults that waited for the network; first touches; first writes to what was protected; faults on pages that
    /// were on their way or had come ahead already.
    pub(super) remote_faults_per_s: f64,
    pub(super) zero_faults_per_s: f64,
    pub(super) write_faults_per_s: f64,
    pub(super) late_faults_per_s: f64,
    pub(super) parked_faults_per_s: f64,
    /// Since the start; should be 0.
    pub(super) faults_that_waited_for_write: u64,
    /// How long threads stood still for a page; none without such a fault in the interval.
    pub(super) p50_us: Option<f64>,
    pub(super) p99_us: Option<f64>,
    pub(super) max_us: Option<f64>,
    pub(super) fetched_pages_per_s: f64,
    pub(super) ahead_pages_per_s: f64,
    pub(super) stored_pages_per_s: f64,
    pub(super) dropped_pages_per_s: f64,
    /// Of the pages fetched ahead on which that was found out in the interval, the share that was used.
    pub(super) ahead_accuracy: Option<f64>,
    pub(super) degraded_pieces: u64,
    pub(super) helpers: Vec<Helper>,
}

/// A helper in an interval.
#[derive(Debug, Serialize)]
pub(super) struct Helper {
    /// The agent, as in the configuration; the swap file's path.
    pub(super) name: String,
    /// How the agent calls itself.
    pub(super) node: String,
    /// `here`, `away` or `left`.
    pub(super) standing: String,
    pub(super) why: Option<String>,
    pub(super) draining: bool,
    /// Pieces that are still to move away.
    pub(super) leaving_pieces: u64,
    pub(super) kept_bytes: u64,
    /// Pages, whatever crossed the network for them.
    pub(super) fetched_bytes_per_s: f64,
    pub(super) stored_bytes_per_s: f64,
    /// Of fetches that somebody stood still for.
    pub(super) p50_us: Option<f64>,
    pub(super) p99_us: Option<f64>,
    /// Connections whose pages are compressed now.
    pub(super) packing_connections: u64,
    /// What crossed of each byte of pages that were compressed in the interval.
    pub(super) packed_ratio: Option<f64>,
    /// The slowest connection's link as it was measured, in bytes per second.
    pub(super) link_bytes_per_s: Option<u64>,
}

/// What a guest said of its memory at one moment.
#[derive(Clone, Debug, Default)]
pub(super) struct Said {
    pub(super) memory: MemoryStatus,
    /// None of a guest whose vCPUs are all on this PC.
    pub(super) coherence: Option<coherence::Counters>,
    pub(super) peers: Peers,
}

fn bytes(pages: u64) -> u64 {
    pages.saturating_mul(PAGE as u64)
}

fn share(part: u64, whole: u64) -> Option<f64> {
    (whole > 0).then(|| part as f64 / whole as f64)
}

impl Memory {
    /// What happened in `seconds`, from what was said before and now.
    pub(super) fn new(before: &Said, now: &Said, seconds: f64) -> Self {
        let rate = |n: u64| if seconds > 0.0 { n as f64 / seconds } else { 0.0 };
        let all = &now.memory.counters;
        let Counters { ref latency, .. } = *all;
        let new = all.since(&before.memory.counters);
        let latency = latency.since(&before.memory.counters.latency);
        let helpers = now.memory.helpers.iter().enumerate();
        let helper = |(index, helper): (usize, &HelperStatus)| {
            let earlier = before.memory.helpers.get(index).filter(|earlier| earlier.name == helper.name);
            let took = fetches(index, &now.peers).since(&fetches(index, &before.peers));
            Helper::new(earlier.unwrap_or(&empty(helper)), helper, &took, &rate)
        };
        Self {
            size_bytes: bytes(all.pages),
            local_bytes: bytes(all.limit),
            resident_bytes: bytes(all.resident),
            dirty_bytes: bytes(all.dirty),
            remote_bytes: bytes(all.remote),
            fetching_bytes: bytes(all.fetching),
            storing_bytes: bytes(all.storing),
            lost_bytes: bytes(all.lost),
            remote_faults_per_s: rate(new.remote_faults),
            zero_faults_per_s: rate(new.zero_faults),
            write_faults_per_s: rate(new.write_faults),
            late_faults_per_s: rate(new.late_faults),
            parked_faults_per_s: rate(new.parked_faults),
            faults_that_waited_for_write: all.faults_that_waited_for_write,
            p50_us: micros(latency.quantile(0.5)),
            p99_us: micros(latency.quantile(0.99)),
            max_us: micros(latency.max()),
            fetched_pages_per_s: rate(new.fetched),
            ahead_pages_per_s: rate(new.fetched_ahead),
            stored_pages_per_s: rate(new.stored),
            dropped_pages_per_s: rate(new.dropped),
            ahead_accuracy: share(new.ahead_used, new.ahead_used.saturating_add(new.ahead_unused)),
            degraded_pieces: now.memory.degraded_pieces,
            helpers: helpers.map(helper).collect(),
        }
    }

    /// Its lines.
    pub(super) fn lines(&self) -> Vec<String> {
        let size = |bytes: u64| format!("{}M", mebibytes(bytes as f64));
        let mut lines = vec![format!(
            "  memory {}: here {} of {} (dirty {}), elsewhere {}",
            size(self.size_bytes),
            size(self.resident_bytes),
            size(self.local_bytes),
            size(self.dirty_bytes),
            size(self.remote_bytes)
        )];
        let said = [
            (self.lost_bytes > 0, format!("{} are lost: nobody has them", size(self.lost_bytes))),
            (self.degraded_pieces > 0, format!("{} pieces lack a copy", self.degraded_pieces)),
            (
                self.faults_that_waited_for_write > 0,
                format!(
                    "{} faults waited for a page to be written, since the start",
                    self.faults_that_waited_for_write
                ),
            ),
        ];
        lines.extend(said.into_iter().filter(|(is_so, _)| *is_so).map(|(_, line)| format!("    {line}")));
        lines.push(FAULTS.to_owned());
        let late = short(self.late_faults_per_s + self.parked_faults_per_s);
        let [p50, p99, max] = [self.p50_us, self.p99_us, self.max_us].map(latency);
        lines.push(format!(
            "    {:>8}{:>9}{:>9}{late:>9}{p50:>8}{p99:>8}{max:>8}{:>9}{:>7}",
            short(self.remote_faults_per_s),
            short(self.zero_faults_per_s),
            short(self.write_faults_per_s),
            short(self.ahead_pages_per_s),
            percent(self.ahead_accuracy),
        ));
        if !self.helpers.is_empty() {
            lines.push(HELPERS.to_owned());
        }
        self.helpers.iter().for_each(|helper| helper.lines(&mut lines));
        lines
    }
}

fn percent(share: Option<f64>) -> String {
    share.map_or_else(|| "-".to_owned(), |share| format!("{:.0}%", share * 100.0))
}

/// The urgent fetches of a helper, over all handlers' connections to it.
fn fetches(index: usize, peers: &Peers) -> Distribution {
    let mut all = Distribution::default();
    let prefix = format!("helper{index}.");
    let connections = peers.iter().filter(|(device, _)| device.starts_with(&prefix));
    for series in connections.flat_map(|(_, Snapshot { series, .. })| series) {
        if series.class == Class::Urgent && series.operation == "fetch" {
            all.merge(&series.latency);
        }
    }
    all
}

/// A helper of which nothing was known.
fn empty(helper: &HelperStatus) -> HelperStatus {
    HelperStatus { fetched: 0, stored: 0, compression: Default::default(), ..helper.clone() }
}

impl Helper {
    fn new(
        before: &HelperStatus,
        now: &HelperStatus,
        took: &Distribution,
        rate: &impl Fn(u64) -> f64,
    ) -> Self {
        let pages = |get: fn(&HelperStatus) -> u64| rate(bytes(get(now).saturating_sub(get(before))));
        let (then, packing) = (before.compression, now.compression);
        let raw = packing.raw_bytes.saturating_sub(then.raw_bytes);
        Self {
            name: now.name.clone(),
            node: now.node.clone(),
            standing: now.standing.clone(),
            why: now.why.clone(),
            draining: now.draining,
            leaving_pieces: now.leaving,
            kept_bytes: bytes(now.pages),
            fetched_bytes_per_s: pages(|helper| helper.fetched),
            stored_bytes_per_s: pages(|helper| helper.stored),
            p50_us: micros(took.quantile(0.5)),
            p99_us: micros(took.quantile(0.99)),
            packing_connections: packing.connections,
            packed_ratio: share(packing.packed_bytes.saturating_sub(then.packed_bytes), raw),
            link_bytes_per_s: Some(packing.link).filter(|link| *link > 0),
        }
    }

    fn lines(&self, lines: &mut Vec<String>) {
        let state = match (self.standing.as_str(), self.draining) {
            // Its connection is closed on purpose: it is not missed.
            ("left", true) => "drained",
            ("away", _) => "AWAY",
            ("here", true) => "draining",
            (standing, _) => standing,
        };
        let name: String = self.name.chars().take(18).collect();
        let [p50, p99] = [self.p50_us, self.p99_us].map(latency);
        lines.push(format!(
            "    {name:<18} {state:<8}{:>8}M{:>8}{:>8}{p50:>8}{p99:>8}{:>8}",
            mebibytes(self.kept_bytes as f64),
            mebibytes(self.fetched_bytes_per_s),
            mebibytes(self.stored_bytes_per_s),
            percent(self.packed_ratio),
        ));
        if let (Some(why), "away") = (&self.why, self.standing.as_str()) {
            lines.push(format!("      {why}"));
        }
        if self.draining && self.standing != "left" {
            lines.push(format!("      {} pieces are still to move away", self.leaving_pieces));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use transport::metrics::{Histogram, Series};

    use super::*;
    use crate::memory::store::Compression;

    fn helper(name: &str, standing: &str) -> HelperStatus {
        HelperStatus {
            name: name.to_owned(),
            node: "pc2".to_owned(),
            standing: standing.to_owned(),
            why: (standing != "here").then(|| "the cable was cut".to_owned()),
            draining: false,
            pages: 1 << 18,
            fetched: 5000,
            stored: 100,
            copied: 0,
            lost: 0,
            pieces: 9,
            room: 10,
            leaving: 0,
            compression: Compression { raw_bytes: 1000, packed_bytes: 900, ..Compression::default() },
        }
    }

    fn latencies(all: &[u64]) -> Distribution {
        let histogram = Histogram::default();
        all.iter().for_each(|us| histogram.note(Duration::from_micros(*us)));
        histogram.snapshot()
    }

    fn fetches_of(class: Class, all: &[u64]) -> Snapshot {
        let series = serde_json::json!({
            "class": class, "operation": "fetch", "in_flight": 0, "failed": 0, "expired": 0, "request_bytes": 0,
            "answer_bytes": 0, "latency": latencies(all), "queueing": Distribution::default(),
        });
        let series: Series = serde_json::from_value(series).expect("a series");
        Snapshot { series: vec![series], ..Snapshot::default() }
    }

    /// Two moments, two seconds apart.
    fn said() -> (Said, Said) {
        let mut before = Said::default();
        before.memory.helpers = vec![helper("10.0.0.2:7420", "here"), helper("pc3", "here")];
        before.memory.counters = Counters {
            pages: 1 << 20,
            limit: 1 << 18,
            remote_faults: 1000,
            ahead_used: 50,
            ahead_unused: 50,
            latency: latencies(&[10, 10]),
            ..Counters::default()
        };
        before.peers = [("helper0.0".to_owned(), fetches_of(Class::Urgent, &[5]))].into();
        let mut now = before.clone();
        now.memory.counters = Counters {
            resident: 200_000,
            dirty: 1000,
            remote: 800_000,
            remote_faults: 5000,
            zero_faults: 10,
            write_faults: 3,
            late_faults: 4,
            parked_faults: 2,
            fetched_ahead: 30_000,
            ahead_used: 140,
            ahead_unused: 60,
            latency: latencies(&[10, 10, 100, 100, 100, 3000]),
            ..before.memory.counters.clone()
        };
        let packed = Compression {
            raw_bytes: 2000,
            packed_bytes: 1300,
            connections: 1,
            link: 5,
            ..Default::default()
        };
        now.memory.helpers[0].fetched += 1024;
        now.memory.helpers[0].compression = packed;
        now.peers = [
            ("helper0.0".to_owned(), fetches_of(Class::Urgent, &[5, 200])),
            ("helper0.1".to_owned(), fetches_of(Class::Urgent, &[400])),
            ("helper0.2".to_owned(), fetches_of(Class::Bulk, &[90_000])),
            ("helper1.0".to_owned(), fetches_of(Class::Urgent, &[7])),
        ]
        .into();
        (before, now)
    }

    #[test]
    fn memory_reads_in_80_columns() {
        let (before, mut now) = said();
        now.memory.helpers[1] = helper("pc3", "away");
        now.memory.degraded_pieces = 2;
        let lines = Memory::new(&before, &now, 2.0).lines();
        let expected = "  memory 4096M: here 781.2M of 1024M (dirty 3.9M), elsewhere 3125M
    2 pieces lack a copy
    REMOTE/S   ZERO/S  WRITE/S   LATE/S     P50     P99     MAX  AHEAD/S   USED
        2000      5.0      1.5      3.0   102us   3.0ms   3.0ms    15.0k    90%
    HELPER             STATE       KEEPS  IN M/S OUT M/S     P50     P99  PACKED
    10.0.0.2:7420      here        1024M     2.0     0.0   205us   400us     40%
    pc3                AWAY        1024M     0.0     0.0   7.0us   7.0us       -
      the cable was cut";
        assert_eq!(lines.join("\n"), expected);
        assert!(lines.iter().all(|line| line.chars().count() <= 80));
    }

    #[test]
    fn a_helper_that_was_drained_is_not_away() {
        let (before, mut now) = said();
        now.memory.helpers[0].draining = true;
        now.memory.helpers[0].leaving = 4;
        now.memory.helpers[1] = HelperStatus { draining: true, ..helper("pc3", "left") };
        let lines = Memory::new(&before, &now, 1.0).lines().join("\n");
        assert!(
            lines.contains("10.0.0.2:7420      draining") && lines.contains("4 pieces are still"),
            "{lines}"
        );
        assert!(lines.contains("pc3                drained ") && !lines.contains("AWAY"), "{lines}");
        assert!(!lines.contains("cable"), "{lines}");
    }

    #[test]
    fn nothing_is_divided_by_an_interval_of_nothing() {
        let (before, now) = said();
        let memory = Memory::new(&before, &now, 0.0);
        assert_eq!((memory.remote_faults_per_s, memory.helpers[0].fetched_bytes_per_s), (0.0, 0.0));
    }
}
