//! What was counted, at one moment.

use serde::{Deserialize, Serialize};

use super::Distribution;
use crate::wire::Class;

/// What was counted with one peer until some moment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Who the peer is: the name that it proved or, without TLS, calls itself. Empty before the first hello.
    pub peer: String,
    /// What carries the connection (`tcp`, `kernel-tls`, `tls-records`, `rdma`), or carried it last.
    pub carrier: Option<String>,
    /// Connections that are open now.
    pub connections: u64,
    /// Connections whose hello was done.
    pub connects: u64,
    /// Those of them that went on with an earlier connection's session.
    pub resumptions: u64,
    /// Connections that were lost.
    pub losses: u64,
    /// Attempts to connect that failed before the hello was done.
    pub failed_attempts: u64,
    /// Why the last connection or attempt was lost.
    pub last_loss: Option<String>,
    /// Bytes of frames and hellos that were handed to the network.
    pub sent_bytes: u64,
    /// Bytes of frames and hellos that came.
    pub received_bytes: u64,
    /// The asking side: requests that were sent again over a new connection. The answering side: those that
    /// were answered from the session's record because they had been carried out before.
    pub replays: u64,
    /// Credit in use and granted.
    pub credit: Credit,
    /// For each class and operation that was used.
    pub series: Vec<Series>,
}

/// Credit, of the connections that are open.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credit {
    /// Requests without an answer.
    pub requests: u64,
    /// How many there may be.
    pub requests_granted: u64,
    /// Their payload and answers in bytes.
    pub bytes: u64,
    /// How many there may be.
    pub bytes_granted: u64,
}

/// What was counted of one class's requests with one operation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Series {
    /// The class.
    pub class: Class,
    /// The operation, by the name that the transport's user gave it.
    pub operation: String,
    /// Requests that have no answer yet.
    pub in_flight: u64,
    /// Requests whose answer's status was not success.
    pub failed: u64,
    /// Requests whose deadline passed. They have no latency.
    pub expired: u64,
    /// Payload bytes from the asking to the answering side, of answered requests.
    pub request_bytes: u64,
    /// Payload bytes of answers.
    pub answer_bytes: u64,
    /// The asking side: from the submission to the answer. The answering side: from the request's last byte
    /// to the answer. Its count is the number of answered requests.
    pub latency: Distribution,
    /// The asking side: how much of that the request waited before it was handed to the network for the first
    /// time. Empty on the answering side.
    pub queueing: Distribution,
}

impl Series {
    pub(super) fn new(class: Class, operation: &str) -> Self {
        Self {
            class,
            operation: operation.to_owned(),
            in_flight: 0,
            failed: 0,
            expired: 0,
            request_bytes: 0,
            answer_bytes: 0,
            latency: Distribution::default(),
            queueing: Distribution::default(),
        }
    }

    fn is_like(&self, other: &Self) -> bool {
        self.class == other.class && self.operation == other.operation
    }

    fn merge(&mut self, other: &Self) {
        self.in_flight += other.in_flight;
        self.failed += other.failed;
        self.expired += other.expired;
        self.request_bytes += other.request_bytes;
        self.answer_bytes += other.answer_bytes;
        self.latency.merge(&other.latency);
        self.queueing.merge(&other.queueing);
    }

    fn since(&self, earlier: &Self) -> Self {
        Self {
            class: self.class,
            operation: self.operation.clone(),
            in_flight: self.in_flight,
            failed: self.failed.saturating_sub(earlier.failed),
            expired: self.expired.saturating_sub(earlier.expired),
            request_bytes: self.request_bytes.saturating_sub(earlier.request_bytes),
            answer_bytes: self.answer_bytes.saturating_sub(earlier.answer_bytes),
            latency: self.latency.since(&earlier.latency),
            queueing: self.queueing.since(&earlier.queueing),
        }
    }
}

impl Snapshot {
    /// Adds what was counted over another connection with the same peer. What there is only one of (name,
    /// carrier, last loss) is taken from `other` where it has it.
    pub fn merge(&mut self, other: &Self) {
        if !other.peer.is_empty() {
            self.peer.clone_from(&other.peer);
        }
        self.carrier = other.carrier.clone().or(self.carrier.take());
        self.last_loss = other.last_loss.clone().or(self.last_loss.take());
        self.connections += other.connections;
        self.connects += other.connects;
        self.resumptions += other.resumptions;
        self.losses += other.losses;
        self.failed_attempts += other.failed_attempts;
        self.sent_bytes += other.sent_bytes;
        self.received_bytes += other.received_bytes;
        self.replays += other.replays;
        let (ours, theirs) = (&mut self.credit, &other.credit);
        ours.requests += theirs.requests;
        ours.requests_granted += theirs.requests_granted;
        ours.bytes += theirs.bytes;
        ours.bytes_granted += theirs.bytes_granted;
        for series in &other.series {
            match self.series.iter_mut().find(|known| known.is_like(series)) {
                Some(known) => known.merge(series),
                None => self.series.push(series.clone()),
            }
        }
    }

    /// What came after `earlier`, an older snapshot of the same connection; numbers of now (in flight, credit,
    /// connections) stay as they are.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let series = |now: &Series| match earlier.series.iter().find(|then| then.is_like(now)) {
            Some(then) => now.since(then),
            None => now.clone(),
        };
        Self {
            connects: self.connects.saturating_sub(earlier.connects),
            resumptions: self.resumptions.saturating_sub(earlier.resumptions),
            losses: self.losses.saturating_sub(earlier.losses),
            failed_attempts: self.failed_attempts.saturating_sub(earlier.failed_attempts),
            sent_bytes: self.sent_bytes.saturating_sub(earlier.sent_bytes),
            received_bytes: self.received_bytes.saturating_sub(earlier.received_bytes),
            replays: self.replays.saturating_sub(earlier.replays),
            series: self.series.iter().map(series).collect(),
            ..self.clone()
        }
    }

    /// Requests without an answer.
    #[must_use]
    pub fn in_flight(&self) -> u64 {
        self.series.iter().map(|series| series.in_flight).sum()
    }

    /// Requests whose deadline passed.
    #[must_use]
    pub fn expired(&self) -> u64 {
        self.series.iter().map(|series| series.expired).sum()
    }

    /// One series for each class: all its operations together, in the order of urgency.
    #[must_use]
    pub fn by_class(&self) -> Vec<Series> {
        let mut classes: Vec<Series> = Vec::new();
        for series in &self.series {
            match classes.iter_mut().find(|class| class.class == series.class) {
                Some(class) => class.merge(series),
                None => classes.push(Series { operation: "all".to_owned(), ..series.clone() }),
            }
        }
        classes.sort_by_key(|series| series.class);
        classes
    }
}
