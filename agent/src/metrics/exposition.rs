//! The text format of Prometheus, version 0.0.4. What each metric means is in `docs/metrics.md`.

use std::fmt::Write as _;
use std::time::Duration;

use transport::metrics::{Series, Snapshot};

use crate::memory::Sight;

/// Upper edges of the latency buckets, as powers of two of a nanosecond: there they are exact.
const EDGES: [u32; 16] = [14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 26, 28, 30, 32, 34];

/// What is said of the agent itself.
pub(crate) struct Facts {
    /// Its name.
    pub(crate) name: String,
    /// When it started, since 1970.
    pub(crate) started: Duration,
    /// Connections that are served now.
    pub(crate) connections: usize,
    /// Memory in bytes: lent, leased, stored.
    pub(crate) memory: [u64; 3],
    /// Its leases.
    pub(crate) leases: Vec<Sight>,
}

#[derive(Clone, Copy)]
enum Type {
    Counter,
    Gauge,
    Histogram,
}

struct Text(String);

impl Text {
    /// Begins the family `omega_agent_NAME`.
    fn family(&mut self, name: &str, kind: Type, help: &str) {
        let kind = match kind {
            Type::Counter => "counter",
            Type::Gauge => "gauge",
            Type::Histogram => "histogram",
        };
        // Writing to a text cannot fail.
        let _ = write!(self.0, "# HELP omega_agent_{name} {help}\n# TYPE omega_agent_{name} {kind}\n");
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: impl std::fmt::Display) {
        let _ = write!(self.0, "omega_agent_{name}");
        for (index, (label, value)) in labels.iter().enumerate() {
            let _ = write!(self.0, "{}{label}=\"", if index == 0 { '{' } else { ',' });
            escape(&mut self.0, value);
            self.0.push('"');
        }
        let _ = writeln!(self.0, "{} {value}", if labels.is_empty() { "" } else { "}" });
    }

    /// A family with one sample for each peer.
    fn peers(&mut self, peers: &[Snapshot], name: &str, kind: Type, help: &str, value: fn(&Snapshot) -> u64) {
        self.family(name, kind, help);
        for peer in peers {
            self.sample(name, &[("peer", &peer.peer)], value(peer));
        }
    }

    /// A family with one sample for each peer, class and operation.
    fn series(&mut self, peers: &[Snapshot], name: &str, kind: Type, help: &str, value: fn(&Series) -> u64) {
        self.family(name, kind, help);
        for (peer, series) in each(peers) {
            self.sample(name, &labels(peer, series), value(series));
        }
    }
}

fn each(peers: &[Snapshot]) -> impl Iterator<Item = (&Snapshot, &Series)> {
    peers.iter().flat_map(|peer| peer.series.iter().map(move |series| (peer, series)))
}

fn labels<'a>(peer: &'a Snapshot, series: &'a Series) -> [(&'static str, &'a str); 3] {
    [("peer", &peer.peer), ("class", series.class.name()), ("operation", &series.operation)]
}

/// A label's value: what would end it is escaped.
fn escape(text: &mut String, value: &str) {
    for c in value.chars() {
        match c {
            '\\' => text.push_str("\\\\"),
            '"' => text.push_str("\\\""),
            '\n' => text.push_str("\\n"),
            c => text.push(c),
        }
    }
}

/// Nanoseconds as seconds, exactly.
fn seconds(ns: u64) -> String {
    let text = format!("{}.{:09}", ns / 1_000_000_000, ns % 1_000_000_000);
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// Everything that is known, as text.
pub(crate) fn text(facts: &Facts, peers: &[Snapshot]) -> String {
    use Type::{Counter, Gauge};
    let mut text = Text(String::new());
    text.family("info", Gauge, "The agent's version and name.");
    text.sample("info", &[("version", env!("CARGO_PKG_VERSION")), ("name", &facts.name)], 1);
    text.family("start_time_seconds", Gauge, "When the agent started, in seconds since 1970.");
    text.sample("start_time_seconds", &[], facts.started.as_millis() as f64 / 1000.0);
    text.family("connections", Gauge, "Connections that are served now, of peers whose hello came.");
    text.sample("connections", &[], facts.connections);

    memory(&mut text, facts);
    text.peers(peers, "peer_connections", Gauge, "Connections of the peer that are open.", |p| p.connections);
    let help = "Connections of the peer whose hello was done.";
    text.peers(peers, "peer_connects_total", Counter, help, |p| p.connects);
    let help = "Connections that went on with an earlier one's session.";
    text.peers(peers, "peer_resumptions_total", Counter, help, |p| p.resumptions);
    let help = "Connections that ended without a goodbye of the peer.";
    text.peers(peers, "peer_losses_total", Counter, help, |p| p.losses);
    let help = "Bytes of frames that came from the peer.";
    text.peers(peers, "peer_received_bytes_total", Counter, help, |p| p.received_bytes);
    let help = "Bytes of frames that were sent to the peer.";
    text.peers(peers, "peer_sent_bytes_total", Counter, help, |p| p.sent_bytes);
    let help = "Requests that came again and were answered without being carried out again.";
    text.peers(peers, "peer_replays_total", Counter, help, |p| p.replays);
    let help = "Requests of the peer whose answers are not on the network yet.";
    text.peers(peers, "peer_credit_requests", Gauge, help, |p| p.credit.requests);
    let help = "How many requests the peer may have so.";
    text.peers(peers, "peer_credit_granted_requests", Gauge, help, |p| p.credit.requests_granted);
    let help = "Bytes of such requests and their answers.";
    text.peers(peers, "peer_credit_bytes", Gauge, help, |p| p.credit.bytes);
    let help = "How many bytes the peer may have so.";
    text.peers(peers, "peer_credit_granted_bytes", Gauge, help, |p| p.credit.bytes_granted);
    text.family("peer_carrier", Gauge, "What carries the peer's connection, or carried the last one.");
    for peer in peers {
        if let Some(carrier) = &peer.carrier {
            text.sample("peer_carrier", &[("peer", &peer.peer), ("carrier", carrier)], 1);
        }
    }

    text.series(peers, "requests_in_flight", Gauge, "Requests that have no answer yet.", |s| s.in_flight);
    let help = "Requests whose answer was not success.";
    text.series(peers, "request_failures_total", Counter, help, |s| s.failed);
    let help = "Payload bytes of answered requests.";
    text.series(peers, "request_bytes_total", Counter, help, |s| s.request_bytes);
    text.series(peers, "answer_bytes_total", Counter, "Payload bytes of answers.", |s| s.answer_bytes);
    durations(&mut text, peers);
    text.0
}

/// A metric of leases: its name, type, help and value.
type Family = (&'static str, Type, &'static str, fn(&Sight) -> u64);

fn memory(text: &mut Text, facts: &Facts) {
    use Type::{Counter, Gauge};
    let [size, leased, stored] = facts.memory;
    for (name, help, value) in [
        ("memory_size_bytes", "Memory that may be leased.", size),
        ("memory_leased_bytes", "Memory that is leased.", leased),
        ("memory_stored_bytes", "Guests' memory that is stored.", stored),
    ] {
        text.family(name, Gauge, help);
        text.sample(name, &[], value);
    }
    let families: [Family; 5] = [
        ("memory_lease_quota_bytes", Gauge, "What the lease may hold.", |s| s.lent.quota),
        ("memory_lease_stored_bytes", Gauge, "What the lease holds.", |s| s.lent.used),
        ("memory_lease_connections", Gauge, "Connections that use the lease.", |s| s.lent.connections.into()),
        ("memory_lease_fetched_pages_total", Counter, "Pages that the guest got.", |s| s.fetched),
        ("memory_lease_stored_pages_total", Counter, "Pages that the guest had stored.", |s| s.stored),
    ];
    for (name, kind, help, value) in families {
        text.family(name, kind, help);
        for sight in &facts.leases {
            let (node, epoch) =
                (sight.lent.node.as_deref().unwrap_or_default(), sight.lent.epoch.to_string());
            let labels = [("guest", sight.lent.guest.as_str()), ("node", node), ("lease", epoch.as_str())];
            text.sample(name, &labels, value(sight));
        }
    }
}

fn durations(text: &mut Text, peers: &[Snapshot]) {
    let help = "From a request's last byte to its answer.";
    text.family("request_duration_seconds", Type::Histogram, help);
    for (peer, series) in each(peers) {
        let labels = labels(peer, series);
        let latency = &series.latency;
        for power in EDGES {
            let edge = seconds(1 << power);
            let [a, b, c] = labels;
            text.sample(
                "request_duration_seconds_bucket",
                &[a, b, c, ("le", &edge)],
                latency.at_most(1 << power),
            );
        }
        let [a, b, c] = labels;
        text.sample("request_duration_seconds_bucket", &[a, b, c, ("le", "+Inf")], latency.count);
        text.sample("request_duration_seconds_sum", &labels, seconds(latency.sum_ns));
        text.sample("request_duration_seconds_count", &labels, latency.count);
    }
}

#[cfg(test)]
mod tests {
    use transport::metrics::Histogram;
    use transport::wire::Class;
    use vmm::memory::store::protocol::Lent;

    use super::*;

    fn facts() -> Facts {
        let (name, leases) = ("b".to_owned(), Vec::new());
        Facts { name, started: Duration::ZERO, connections: 0, memory: [0; 3], leases }
    }

    #[test]
    fn each_lease_of_memory_is_told_by_guest_and_node() {
        let lent = |guest: &str, node: Option<&str>, epoch| Lent {
            guest: guest.into(),
            node: node.map(str::to_owned),
            epoch,
            ram: 8 << 30,
            quota: 4 << 30,
            used: 3 << 30,
            connections: 2,
            idle: 0,
        };
        let leases = vec![
            Sight { lent: lent("a\" b", Some("desk"), 7), fetched: 11, stored: 12 },
            Sight { lent: lent("c", None, 8), fetched: 0, stored: 1 },
        ];
        let facts = Facts { memory: [24 << 30, 8 << 30, 6 << 30], leases, ..facts() };
        let text = text(&facts, &[]);
        for line in [
            "omega_agent_memory_size_bytes 25769803776",
            "omega_agent_memory_leased_bytes 8589934592",
            "omega_agent_memory_stored_bytes 6442450944",
            r#"omega_agent_memory_lease_quota_bytes{guest="a\" b",node="desk",lease="7"} 4294967296"#,
            r#"omega_agent_memory_lease_stored_bytes{guest="a\" b",node="desk",lease="7"} 3221225472"#,
            r#"omega_agent_memory_lease_connections{guest="c",node="",lease="8"} 2"#,
            r#"omega_agent_memory_lease_fetched_pages_total{guest="a\" b",node="desk",lease="7"} 11"#,
            r#"omega_agent_memory_lease_stored_pages_total{guest="c",node="",lease="8"} 1"#,
        ] {
            assert!(text.lines().any(|l| l == line), "{line} in {text}");
        }
    }

    #[test]
    fn seconds_are_exact_and_short() {
        for (ns, text) in [
            (0, "0"),
            (1, "0.000000001"),
            (16_384, "0.000016384"),
            (1 << 30, "1.073741824"),
            (5e9 as u64, "5"),
        ] {
            assert_eq!(seconds(ns), text);
        }
    }

    #[test]
    fn a_hostile_name_stays_inside_its_label() {
        let peer = Snapshot { peer: "a\"} 1\nomega_agent_evil{x=\"\\".into(), ..Snapshot::default() };
        let facts = Facts { started: Duration::from_millis(1500), connections: 1, ..facts() };
        let text = text(&facts, &[peer]);
        let expected = r#"omega_agent_peer_connects_total{peer="a\"} 1\nomega_agent_evil{x=\"\\"} 0"#;
        assert!(text.lines().any(|line| line == expected), "{text}");
        assert!(text.contains("omega_agent_start_time_seconds 1.5\n"), "{text}");
    }

    #[test]
    fn buckets_are_cumulative_and_exact_at_their_edges() {
        let histogram = Histogram::default();
        for ns in [1 << 14, (1 << 14) + 1, 1 << 20, 40_000_000_000] {
            histogram.note(Duration::from_nanos(ns));
        }
        let series = Series {
            class: Class::Normal,
            operation: "read".into(),
            in_flight: 0,
            failed: 0,
            expired: 0,
            request_bytes: 0,
            answer_bytes: 0,
            latency: histogram.snapshot(),
            queueing: Default::default(),
        };
        let peer = Snapshot { peer: "p".into(), series: vec![series], ..Snapshot::default() };
        let text = text(&facts(), &[peer]);
        for (edge, count) in
            [("0.000016384", 1), ("0.000032768", 2), ("0.001048576", 3), ("17.179869184", 3), ("+Inf", 4)]
        {
            let line = format!(
                "omega_agent_request_duration_seconds_bucket{{peer=\"p\",class=\"normal\",operation=\"read\",\
                 le=\"{edge}\"}} {count}\n"
            );
            assert!(text.contains(&line), "{line} in {text}");
        }
    }
}
