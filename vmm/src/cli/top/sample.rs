//! What guests say of themselves, and what that means for the time between two times of asking.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde::Serialize;
use transport::metrics::{Credit, Series, Snapshot};
use transport::wire::Class;

use super::super::Failure;
use super::super::runtime::{self, Folder};
use super::memory::{Memory, Said};
use super::span::Span;
use crate::control::{Client, State, Status, Waiting};

/// How long a guest may take to answer; one that does not must not hold up the others for long.
const PATIENCE: Duration = Duration::from_millis(500);

/// The version of the JSON.
const VERSION: u32 = 1;

/// One interval of all guests.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) version: u32,
    /// How long the interval was; 0 at first.
    pub(super) interval_ms: u64,
    pub(super) guests: Vec<Guest>,
}

/// One guest in an interval.
#[derive(Debug, Serialize)]
pub(super) struct Guest {
    pub(super) name: String,
    pub(super) pid: u32,
    /// None of a guest that does not answer: it starts, or ends.
    pub(super) state: Option<State>,
    pub(super) vcpus: u8,
    pub(super) uptime_ms: u64,
    /// The helper that it stands still for, if it does.
    pub(super) waits_for: Option<Waiting>,
    /// None of a guest whose memory is all on this PC.
    pub(super) memory: Option<Memory>,
    /// None of a guest whose vCPUs are all on this PC.
    pub(super) span: Option<Span>,
    pub(super) peers: Vec<Peer>,
}

/// One device's peer in an interval.
#[derive(Debug, Serialize)]
pub(super) struct Peer {
    pub(super) device: String,
    /// How the peer calls itself.
    pub(super) name: String,
    pub(super) connected: bool,
    pub(super) carrier: Option<String>,
    /// Since the guest's start.
    pub(super) reconnects: u64,
    pub(super) last_loss: Option<String>,
    pub(super) sent_bytes_per_s: f64,
    pub(super) received_bytes_per_s: f64,
    /// Requests that were sent again in the interval.
    pub(super) replays: u64,
    pub(super) credit: Credit,
    pub(super) classes: Vec<Rates>,
    pub(super) operations: Vec<Rates>,
}

/// What was asked of a peer in an interval.
#[derive(Debug, Serialize)]
pub(super) struct Rates {
    pub(super) class: Class,
    /// `all` for a class.
    pub(super) operation: String,
    pub(super) requests_per_s: f64,
    /// Payload, both ways.
    pub(super) bytes_per_s: f64,
    pub(super) in_flight: u64,
    pub(super) failed: u64,
    pub(super) expired: u64,
    /// Latencies of the interval, in microseconds; none without an answer in it.
    pub(super) p50_us: Option<f64>,
    pub(super) p99_us: Option<f64>,
    pub(super) max_us: Option<f64>,
    /// How much of them requests waited on this PC.
    pub(super) queued_p99_us: Option<f64>,
}

impl Peer {
    /// Requests per second of all classes.
    pub(super) fn rate(&self) -> f64 {
        self.classes.iter().map(|rates| rates.requests_per_s).sum()
    }

    fn new(device: &str, all: &Snapshot, interval: &Snapshot, seconds: f64) -> Self {
        let rate = |n: u64| if seconds > 0.0 { n as f64 / seconds } else { 0.0 };
        let rates = |series: &Series| Rates::new(series, seconds);
        let mut operations: Vec<Rates> = interval.series.iter().map(rates).collect();
        operations.sort_by(|a, b| (a.class, &a.operation).cmp(&(b.class, &b.operation)));
        Self {
            device: device.to_owned(),
            name: all.peer.clone(),
            connected: all.connections > 0,
            carrier: all.carrier.clone(),
            reconnects: all.connects.saturating_sub(1),
            last_loss: all.last_loss.clone(),
            sent_bytes_per_s: rate(interval.sent_bytes),
            received_bytes_per_s: rate(interval.received_bytes),
            replays: interval.replays,
            credit: all.credit,
            classes: interval.by_class().iter().map(rates).collect(),
            operations,
        }
    }
}

pub(super) fn micros(latency: Option<Duration>) -> Option<f64> {
    latency.map(|latency| latency.as_nanos() as f64 / 1000.0)
}

impl Rates {
    fn new(series: &Series, seconds: f64) -> Self {
        let rate = |n: u64| if seconds > 0.0 { n as f64 / seconds } else { 0.0 };
        Self {
            class: series.class,
            operation: series.operation.clone(),
            requests_per_s: rate(series.latency.count),
            bytes_per_s: rate(series.request_bytes.saturating_add(series.answer_bytes)),
            in_flight: series.in_flight,
            failed: series.failed,
            expired: series.expired,
            p50_us: micros(series.latency.quantile(0.5)),
            p99_us: micros(series.latency.quantile(0.99)),
            max_us: micros(series.latency.max()),
            queued_p99_us: micros(series.queueing.quantile(0.99)),
        }
    }
}

/// A guest as it was last.
struct Known {
    client: Client,
    pid: u32,
    said: Said,
    at: Instant,
}

/// Asks all guests of this user.
#[derive(Default)]
pub(super) struct Sampler {
    guests: BTreeMap<String, Known>,
    last: Option<Instant>,
}

impl Sampler {
    /// Asks every guest; the report is of the time since the last call.
    pub(super) fn sample(&mut self) -> Result<Report, Failure> {
        let folders = runtime::running()?;
        let now = Instant::now();
        let interval = self.last.replace(now).map_or(Duration::ZERO, |last| now.duration_since(last));
        let mut before = std::mem::take(&mut self.guests);
        let mut guests = Vec::new();
        for folder in folders {
            let known = before.remove(folder.name());
            if let Some(guest) = self.guest(&folder, known) {
                guests.push(guest);
            }
        }
        let interval_ms = u64::try_from(interval.as_millis()).unwrap_or(u64::MAX);
        Ok(Report { version: VERSION, interval_ms, guests })
    }

    fn guest(&mut self, folder: &Folder, known: Option<Known>) -> Option<Guest> {
        let pid = folder.process()?;
        let known = known.filter(|known| known.pid == pid);
        let (client, earlier) = match known {
            Some(known) => (Ok(known.client), Some((known.said, known.at))),
            None => (Client::connect(&folder.control(), Some(PATIENCE)), None),
        };
        let answers = client.and_then(|mut client| {
            let status = client.status()?;
            // A guest of an older version knows no peers, and one whose memory is all here has none elsewhere.
            let (peers, memory) = (client.peers().unwrap_or_default(), client.memory().ok());
            let coherence = client.coherence().ok();
            Ok((client, status, peers, memory, coherence))
        });
        let name = folder.name().to_owned();
        let Ok((client, status, peers, memory, coherence)) = answers else {
            let (state, waits_for, memory, span, peers) = (None, None, None, None, Vec::new());
            return Some(Guest { name, pid, state, vcpus: 0, uptime_ms: 0, waits_for, memory, span, peers });
        };
        let at = Instant::now();
        let seconds = earlier.as_ref().map_or(0.0, |(_, then)| at.duration_since(*then).as_secs_f64());
        let nothing = Snapshot::default();
        let shown = peers.iter().map(|(device, now)| {
            let then = match &earlier {
                Some((then, _)) => then.peers.get(device).unwrap_or(&nothing),
                // Nothing is known of an interval yet.
                None => now,
            };
            Peer::new(device, now, &now.since(then), seconds)
        });
        let shown = shown.collect();
        let lends = memory.is_some();
        let said = Said { memory: memory.unwrap_or_default(), coherence, peers };
        let before = earlier.as_ref().map_or(&said, |(then, _)| then);
        let memory = lends.then(|| Memory::new(before, &said, seconds));
        let Status { state, vcpus, uptime_ms, waits_for, places, .. } = status;
        let shared = said.coherence.as_ref();
        let span =
            shared.map(|now| Span::new(places, before.coherence.as_ref().unwrap_or(now), now, seconds));
        self.guests.insert(name.clone(), Known { client, pid, said, at });
        Some(Guest { name, pid, state: Some(state), vcpus, uptime_ms, waits_for, memory, span, peers: shown })
    }
}
