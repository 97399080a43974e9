//! A report as text: a table for pipes, a screen for people.

use std::time::Duration;

use super::super::args::Order;
use super::super::guests::{state, uptime, waits};
use super::super::human::{harmless, latency, mebibytes, short};
use super::memory::Memory;
use super::sample::{Guest, Peer, Rates, Report};
use super::span::Span;

/// The heading of the classes' lines; everything fits 80 columns.
const CLASSES: &str = "    CLASS       REQ/S    MIB/S      P50      P99      MAX   QUEUED  IN FLIGHT";

/// The report as a table, every line whole.
pub(super) fn plain(report: &Report, order: Order) -> String {
    let mut lines = body(report, order);
    if lines.is_empty() {
        lines.push("No guest runs here".to_owned());
    }
    lines.join("\n") + "\n"
}

/// The report as at most `rows` lines of at most `columns` characters.
pub(super) fn screen(
    report: &Report,
    order: Order,
    interval: Duration,
    columns: usize,
    rows: usize,
) -> Vec<String> {
    let order_name = if order == Order::Name { "by name" } else { "by traffic" };
    let count = report.guests.len();
    let guests = if count == 1 { "guest" } else { "guests" };
    let every = crate::units::Span(interval);
    let left = format!("omega top: {count} {guests}, {order_name}, every {every}");
    let right = "s sorts  q quits";
    let gap = columns.saturating_sub(left.chars().count() + right.len()).max(1);
    let mut lines = vec![format!("{left}{:gap$}{right}", ""), String::new()];
    lines.extend(body(report, order));
    if count == 0 {
        lines.push("No guest runs here; `omega run GUEST.TOML` starts one.".to_owned());
    }
    if lines.len() > rows {
        let more = lines.len() - rows.saturating_sub(1);
        lines.truncate(rows.saturating_sub(1));
        lines.push(format!("… {more} more lines: enlarge the window"));
    }
    lines.truncate(rows.max(1));
    lines.iter().map(|line| clip(line, columns)).collect()
}

/// The first `columns` characters. Texts of peers may hold anything: what would move the cursor is replaced.
fn clip(line: &str, columns: usize) -> String {
    harmless(line).chars().take(columns).collect()
}

fn body(report: &Report, order: Order) -> Vec<String> {
    let mut guests: Vec<&Guest> = report.guests.iter().collect();
    if order == Order::Traffic {
        let rate = |guest: &Guest| guest.peers.iter().map(Peer::rate).sum::<f64>();
        // Stable: equals stay in the order of their names.
        guests.sort_by(|a, b| rate(b).total_cmp(&rate(a)));
    }
    let mut lines = Vec::new();
    for guest in guests {
        if !lines.is_empty() {
            lines.push(String::new());
        }
        lines.push(headline(guest));
        lines.extend(guest.waits_for.as_ref().map(|waiting| format!("  waits for {}", waits(waiting))));
        lines.extend(guest.memory.iter().flat_map(Memory::lines));
        lines.extend(guest.span.iter().flat_map(Span::lines));
        // A helper has one line there for all of its connections.
        let shown = |peer: &&Peer| guest.memory.is_none() || !peer.device.starts_with("helper");
        let mut peers: Vec<&Peer> = guest.peers.iter().filter(shown).collect();
        if order == Order::Traffic {
            peers.sort_by(|a, b| b.rate().total_cmp(&a.rate()));
        }
        for peer in peers {
            lines.extend(peer_lines(peer));
        }
    }
    lines.iter().map(|line| harmless(line)).collect()
}

fn headline(guest: &Guest) -> String {
    let Guest { name, state: now, vcpus, uptime_ms, peers, .. } = guest;
    let Some(now) = now else { return format!("{name}  does not answer") };
    let cpus = if *vcpus == 1 { "vCPU" } else { "vCPUs" };
    let alone = if peers.is_empty() { "  no remote device" } else { "" };
    format!("{name}  {}  {vcpus} {cpus}  up {}{alone}", state(*now), uptime(*uptime_ms))
}

fn peer_lines(peer: &Peer) -> Vec<String> {
    let Peer { device, name, connected, carrier, reconnects, last_loss, credit, .. } = peer;
    let name = if name.is_empty() { "?" } else { name };
    let how = match (connected, carrier) {
        (true, Some(carrier)) => carrier.clone(),
        (true, None) => "connected".to_owned(),
        (false, _) => "AWAY".to_owned(),
    };
    let (out, into) = (mebibytes(peer.sent_bytes_per_s), mebibytes(peer.received_bytes_per_s));
    let mut lines = vec![format!(
        "  {device} on {name}  {how}  out {out} in {into} MiB/s  credit {}/{}  reconnects {reconnects}",
        credit.requests, credit.requests_granted
    )];
    if let (false, Some(why)) = (connected, last_loss) {
        lines.push(format!("    {why}"));
    }
    if !peer.classes.is_empty() {
        lines.push(CLASSES.to_owned());
    }
    lines.extend(peer.classes.iter().map(class_line));
    lines
}

fn class_line(rates: &Rates) -> String {
    let [p50, p99, max, queued] =
        [rates.p50_us, rates.p99_us, rates.max_us, rates.queued_p99_us].map(latency);
    let (requests, bytes) = (short(rates.requests_per_s), mebibytes(rates.bytes_per_s));
    format!(
        "    {:<8}{requests:>9}{bytes:>9}{p50:>9}{p99:>9}{max:>9}{queued:>9}{:>11}",
        rates.class.name(),
        rates.in_flight
    )
}

#[cfg(test)]
mod tests {
    use transport::metrics::Credit;
    use transport::wire::Class;

    use super::*;
    use crate::control::State;

    fn rates(requests: f64) -> Rates {
        Rates {
            class: Class::Normal,
            operation: "all".into(),
            requests_per_s: requests,
            bytes_per_s: 5e9,
            in_flight: 256,
            failed: 0,
            expired: 0,
            p50_us: Some(212.0),
            p99_us: Some(1312.0),
            max_us: Some(99_949.0),
            queued_p99_us: Some(1.06),
        }
    }

    fn guest(name: &str, requests: f64) -> Guest {
        let peer = Peer {
            device: "disk0".into(),
            name: "attic\x1b[2J".into(),
            connected: false,
            carrier: Some("kernel-tls".into()),
            reconnects: 2,
            last_loss: Some("the cable\r\nwas cut".into()),
            sent_bytes_per_s: 1e6,
            received_bytes_per_s: 2e9,
            replays: 0,
            credit: Credit { requests: 3, requests_granted: 256, ..Credit::default() },
            classes: vec![rates(requests)],
            operations: Vec::new(),
        };
        let (state, peers) = (Some(State::Running), vec![peer]);
        let (waits_for, memory, span) = (None, None, None);
        Guest {
            name: name.into(),
            pid: 1,
            state,
            vcpus: 4,
            uptime_ms: 61_000,
            waits_for,
            memory,
            span,
            peers,
        }
    }

    fn report(guests: Vec<Guest>) -> Report {
        Report { version: 1, interval_ms: 1000, guests }
    }

    #[test]
    fn a_class_reads_in_80_columns() {
        let text = plain(&report(vec![guest("desk", 123_456.0)]), Order::Name);
        let expected = "\
desk  running  4 vCPUs  up 00:01:01
  disk0 on attic?[2J  AWAY  out 1.0 in 1907 MiB/s  credit 3/256  reconnects 2
    the cable??was cut
    CLASS       REQ/S    MIB/S      P50      P99      MAX   QUEUED  IN FLIGHT
    normal     123.5k     4768    212us    1.3ms   99.9ms    1.1us        256
";
        assert_eq!(text, expected);
        assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
    }

    #[test]
    fn a_screen_has_no_more_lines_and_columns_than_the_window() {
        let guests = (0..20).map(|n| guest(&format!("guest{n:02}"), f64::from(n))).collect();
        let report = report(guests);
        for (columns, rows) in [(80, 24), (20, 3), (1, 1), (200, 500)] {
            let lines = screen(&report, Order::Name, Duration::from_secs(1), columns, rows);
            assert!(lines.len() <= rows && !lines.is_empty(), "{columns} x {rows}");
            assert!(lines.iter().all(|line| line.chars().count() <= columns), "{columns} x {rows}");
            assert!(lines.iter().all(|line| !line.chars().any(char::is_control)), "{lines:?}");
        }
        let whole = screen(&report, Order::Name, Duration::from_secs(1), 80, 24);
        assert!(whole[0].ends_with("q quits"), "{}", whole[0]);
        assert!(whole[23].contains("more lines"), "{}", whole[23]);
    }

    #[test]
    fn who_asks_most_comes_first_if_that_is_wanted() {
        let report = report(vec![guest("a", 1.0), guest("b", 5.0), guest("c", 1.0)]);
        let names = |order| -> String {
            let text = plain(&report, order);
            text.lines().filter(|line| line.contains("running")).filter_map(|l| l.chars().next()).collect()
        };
        assert_eq!((names(Order::Name), names(Order::Traffic)), ("abc".to_owned(), "bac".to_owned()));
    }
}
