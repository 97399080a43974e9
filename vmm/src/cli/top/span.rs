//! vCPUs on several PCs: where they are, and what it costs them to share memory.

use std::collections::BTreeMap;

use serde::Serialize;

use super::super::human::{mebibytes, short};
use crate::control::VcpuPlace;

/// The heading of the numbers; everything fits 80 columns.
const SHARING: &str = "    READ/S  WRITE/S  UPGR/S  AHEAD/S  TAKEN/S  GIVEN/S   MSGS/S   MIB/S  WAITING";

/// What was counted, by name.
pub(super) type Counted = BTreeMap<String, u64>;

/// A guest's vCPUs and the memory that they share in an interval, as this PC's part of it sees it.
#[derive(Debug, Serialize)]
pub(super) struct Span {
    pub(super) places: Vec<VcpuPlace>,
    /// Faults on pages that were elsewhere; on pages that others could read too.
    pub(super) read_faults_per_s: f64,
    pub(super) write_faults_per_s: f64,
    pub(super) upgrades_per_s: f64,
    /// Pages that were asked for before anybody stood still for them.
    pub(super) ahead_per_s: f64,
    /// Pages that came from other PCs, and went there.
    pub(super) fetched_per_s: f64,
    pub(super) sent_per_s: f64,
    pub(super) messages_per_s: f64,
    pub(super) bytes_per_s: f64,
    /// How many threads of this PC stood still for a page, on average.
    pub(super) waiting: f64,
}

impl Span {
    /// Of a guest that counted `before` and `now`, `seconds` apart.
    pub(super) fn new(places: Vec<VcpuPlace>, before: &Counted, now: &Counted, seconds: f64) -> Self {
        let rate = |name: &str| {
            let value = |counted: &Counted| counted.get(name).copied().unwrap_or(0);
            // At first there is no interval.
            let new = value(now).saturating_sub(value(before)) as f64;
            if seconds > 0.0 { new / seconds } else { 0.0 }
        };
        Self {
            places,
            read_faults_per_s: rate("read_faults"),
            write_faults_per_s: rate("write_faults"),
            upgrades_per_s: rate("upgrades"),
            ahead_per_s: rate("ahead"),
            fetched_per_s: rate("fetched"),
            sent_per_s: rate("sent"),
            messages_per_s: rate("messages"),
            bytes_per_s: rate("bytes"),
            waiting: rate("waited_us") / 1e6,
        }
    }

    pub(super) fn lines(&self) -> Vec<String> {
        let place = |place: &VcpuPlace| {
            let vcpus: Vec<_> = place.vcpus.iter().map(u8::to_string).collect();
            let vcpus = if vcpus.is_empty() { "none".to_owned() } else { vcpus.join(",") };
            format!("{vcpus} on {}", place.node)
        };
        let places: Vec<_> = self.places.iter().map(place).collect();
        let [read, write, upgrades, ahead, taken, given, messages] = [
            self.read_faults_per_s,
            self.write_faults_per_s,
            self.upgrades_per_s,
            self.ahead_per_s,
            self.fetched_per_s,
            self.sent_per_s,
            self.messages_per_s,
        ]
        .map(short);
        vec![
            format!("  vCPUs {}", places.join("; ")),
            SHARING.to_owned(),
            format!(
                "  {read:>8}{write:>9}{upgrades:>8}{ahead:>9}{taken:>9}{given:>9}{messages:>9}{:>8}{:>9.2}",
                mebibytes(self.bytes_per_s),
                self.waiting
            ),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_vcpus_share_reads_in_80_columns() {
        let counted = |scale: u64| -> Counted {
            let numbers = [
                ("read_faults", 10),
                ("write_faults", 20),
                ("upgrades", 30),
                ("ahead", 4000),
                ("fetched", 50),
                ("sent", 60),
                ("messages", 123_456),
                ("bytes", 1 << 20),
                ("waited_us", 250_000),
            ];
            numbers.map(|(name, number)| (name.to_owned(), number * scale)).into()
        };
        let place = |node: &str, vcpus: &[u8]| VcpuPlace {
            node: node.into(),
            vcpus: vcpus.to_vec(),
            room: None,
            clock: None,
        };
        let places = vec![place("console", &[0, 1]), place("attic", &[2]), place("loft", &[])];
        let span = Span::new(places, &counted(1), &counted(5), 2.0);
        let expected = "  vCPUs 0,1 on console; 2 on attic; none on loft
    READ/S  WRITE/S  UPGR/S  AHEAD/S  TAKEN/S  GIVEN/S   MSGS/S   MIB/S  WAITING
      20.0     40.0    60.0     8000      100      120   246.9k     2.0     0.50";
        assert_eq!(span.lines().join("\n"), expected);
        assert!(span.lines().iter().all(|line| line.len() <= 80));
        assert_eq!(
            Span::new(Vec::new(), &counted(1), &counted(5), 0.0).waiting.to_bits(),
            0,
            "no interval yet"
        );
    }
}
