//! The numbers of one channel or connection, and the one who writes them.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use super::histogram::{Histogram, add};
use super::{Credit, Operations, Series, Snapshot};
use crate::carrier::Carrier;
use crate::wire::{Class, Status};

/// A class and an operation: where a request is counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Kind(u16);

/// How a request ended that was answered.
pub(crate) struct Ended {
    pub(crate) status: Status,
    pub(crate) took: Duration,
    /// Payload bytes of the request and of the answer.
    pub(crate) request_bytes: usize,
    pub(crate) answer_bytes: usize,
}

/// Numbers of one class and operation.
#[derive(Default)]
struct Numbers {
    in_flight: AtomicU64,
    failed: AtomicU64,
    expired: AtomicU64,
    request_bytes: AtomicU64,
    answer_bytes: AtomicU64,
    latency: Histogram,
    /// The asking side's.
    queueing: OnceLock<Box<Histogram>>,
}

/// What changes only with a connection.
#[derive(Default)]
struct Texts {
    peer: String,
    last_loss: Option<String>,
}

/// What one channel or connection counts: written by its [`Recorder`], read by anybody.
pub struct Metrics {
    operations: Operations,
    /// By class and operation. Made at the first request of the kind: most kinds are never used.
    numbers: Box<[OnceLock<Box<Numbers>>]>,
    texts: Mutex<Texts>,
    /// [`Carrier`] and 1; 0 before there was one.
    carrier: AtomicU8,
    connections: AtomicU64,
    connects: AtomicU64,
    resumptions: AtomicU64,
    losses: AtomicU64,
    failed_attempts: AtomicU64,
    sent_bytes: AtomicU64,
    received_bytes: AtomicU64,
    replays: AtomicU64,
    /// Requests and bytes: used, granted.
    credit: [AtomicU64; 4],
}

impl Metrics {
    fn new(operations: Operations) -> Self {
        let kinds = Class::ALL.len() * (operations.0.len() + 1);
        Self {
            operations,
            numbers: std::iter::repeat_with(OnceLock::new).take(kinds).collect(),
            texts: Mutex::default(),
            carrier: 0.into(),
            connections: 0.into(),
            connects: 0.into(),
            resumptions: 0.into(),
            losses: 0.into(),
            failed_attempts: 0.into(),
            sent_bytes: 0.into(),
            received_bytes: 0.into(),
            replays: 0.into(),
            credit: Default::default(),
        }
    }

    fn texts(&self) -> MutexGuard<'_, Texts> {
        self.texts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What was counted until now.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        let get = |number: &AtomicU64| number.load(Ordering::Relaxed);
        let (peer, last_loss) = {
            let texts = self.texts();
            (texts.peer.clone(), texts.last_loss.clone())
        };
        let carrier = self.carrier.load(Ordering::Relaxed).checked_sub(1).map(usize::from);
        let carrier = carrier.and_then(|at| Carrier::ALL.get(at)).map(ToString::to_string);
        let [requests, requests_granted, bytes, bytes_granted] = &self.credit;
        Snapshot {
            peer,
            carrier,
            connections: get(&self.connections),
            connects: get(&self.connects),
            resumptions: get(&self.resumptions),
            losses: get(&self.losses),
            failed_attempts: get(&self.failed_attempts),
            last_loss,
            sent_bytes: get(&self.sent_bytes),
            received_bytes: get(&self.received_bytes),
            replays: get(&self.replays),
            credit: Credit {
                requests: get(requests),
                requests_granted: get(requests_granted),
                bytes: get(bytes),
                bytes_granted: get(bytes_granted),
            },
            series: self.series(),
        }
    }

    fn series(&self) -> Vec<Series> {
        let get = |number: &AtomicU64| number.load(Ordering::Relaxed);
        let used = self.numbers.iter().enumerate().filter_map(|(at, numbers)| Some((at, numbers.get()?)));
        used.map(|(at, numbers)| {
            let (class, operation) = (at % Class::ALL.len(), at / Class::ALL.len());
            Series {
                in_flight: get(&numbers.in_flight),
                failed: get(&numbers.failed),
                expired: get(&numbers.expired),
                request_bytes: get(&numbers.request_bytes),
                answer_bytes: get(&numbers.answer_bytes),
                latency: numbers.latency.snapshot(),
                queueing: numbers.queueing.get().map(|queueing| queueing.snapshot()).unwrap_or_default(),
                ..Series::new(Class::ALL[class], self.operations.at(operation))
            }
        })
        .collect()
    }
}

/// Writes the numbers of one channel or connection. There is one for each, and it cannot be copied: that
/// nobody else writes is what makes writing cheap.
pub struct Recorder(Arc<Metrics>);

impl Recorder {
    /// For requests with these operations.
    #[must_use]
    pub fn new(operations: Operations) -> Self {
        Self(Arc::new(Metrics::new(operations)))
    }

    /// What is written, for readers.
    #[must_use]
    pub fn metrics(&self) -> Arc<Metrics> {
        Arc::clone(&self.0)
    }

    /// The operations' names.
    pub(crate) fn operations(&self) -> Operations {
        self.0.operations
    }

    /// Where requests of `class` with `opcode` are counted.
    pub(crate) fn kind(&self, class: Class, opcode: u16) -> Kind {
        let at = self.0.operations.place(opcode) * Class::ALL.len() + class as usize;
        Kind(u16::try_from(at).unwrap_or(u16::MAX))
    }

    fn numbers(&self, Kind(at): Kind) -> Option<&Numbers> {
        Some(self.0.numbers.get(usize::from(at))?.get_or_init(Box::default))
    }

    /// A request was submitted, or came in.
    pub(crate) fn begun(&mut self, kind: Kind) {
        if let Some(numbers) = self.numbers(kind) {
            add(&numbers.in_flight, 1);
        }
    }

    /// A request goes out for the first time.
    pub(crate) fn sent(&mut self, kind: Kind, queued: Duration) {
        if let Some(numbers) = self.numbers(kind) {
            numbers.queueing.get_or_init(Box::default).note(queued);
        }
    }

    /// A request goes out again, or is answered from the record.
    pub(crate) fn replayed(&mut self) {
        add(&self.0.replays, 1);
    }

    /// A request was answered.
    pub(crate) fn ended(&mut self, kind: Kind, ended: &Ended) {
        let Some(numbers) = self.numbers(kind) else { return };
        let Ended { status, took, request_bytes, answer_bytes } = *ended;
        add(&numbers.in_flight, u64::MAX);
        add(&numbers.failed, u64::from(status != Status::OK));
        add(&numbers.request_bytes, request_bytes as u64);
        add(&numbers.answer_bytes, answer_bytes as u64);
        numbers.latency.note(took);
    }

    /// A request's deadline passed.
    pub(crate) fn expired(&mut self, kind: Kind) {
        if let Some(numbers) = self.numbers(kind) {
            add(&numbers.in_flight, u64::MAX);
            add(&numbers.expired, 1);
        }
    }

    /// A request is over that nobody answered: its owner took it back, or its session ended.
    pub(crate) fn dropped(&mut self, kind: Kind) {
        if let Some(numbers) = self.numbers(kind) {
            add(&numbers.in_flight, u64::MAX);
        }
    }

    /// The hello with `peer` is done.
    pub(crate) fn connected(&mut self, peer: &str, resumed: bool, granted: (u32, u64)) {
        add(&self.0.connects, 1);
        add(&self.0.resumptions, u64::from(resumed));
        self.0.connections.store(1, Ordering::Relaxed);
        self.0.credit[1].store(granted.0.into(), Ordering::Relaxed);
        self.0.credit[3].store(granted.1, Ordering::Relaxed);
        peer.clone_into(&mut self.0.texts().peer);
    }

    /// A connection carries frames this way.
    pub(crate) fn carried_by(&mut self, carrier: Carrier) {
        self.0.carrier.store(carrier as u8 + 1, Ordering::Relaxed);
    }

    /// The connection, or an attempt at one, is over.
    pub(crate) fn lost(&mut self, reason: &str) {
        let open = self.0.connections.load(Ordering::Relaxed) != 0;
        add(if open { &self.0.losses } else { &self.0.failed_attempts }, 1);
        self.closed();
        self.0.texts().last_loss = Some(reason.to_owned());
    }

    /// The connection is over in good order.
    pub(crate) fn closed(&mut self) {
        self.0.connections.store(0, Ordering::Relaxed);
        self.0.credit.iter().for_each(|number| number.store(0, Ordering::Relaxed));
    }

    /// Credit in use.
    pub(crate) fn used(&mut self, requests: u32, bytes: u64) {
        self.0.credit[0].store(requests.into(), Ordering::Relaxed);
        self.0.credit[2].store(bytes, Ordering::Relaxed);
    }

    /// A frame or hello of so many bytes was handed to the network.
    pub(crate) fn sent_frame(&mut self, bytes: usize) {
        add(&self.0.sent_bytes, bytes as u64);
    }

    /// A frame or hello of so many bytes came.
    pub(crate) fn received_frame(&mut self, bytes: usize) {
        add(&self.0.received_bytes, bytes as u64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPERATIONS: Operations = Operations(&[(7, "read"), (9, "write")]);

    #[test]
    fn requests_are_counted_by_class_and_operation_and_unknown_ones_together() {
        let mut recorder = Recorder::new(OPERATIONS);
        let metrics = recorder.metrics();
        assert_eq!(metrics.snapshot().series, [], "what was never used is not shown");
        let kinds = [(Class::Urgent, 7), (Class::Bulk, 9), (Class::Bulk, 1), (Class::Bulk, 2)];
        for (class, opcode) in kinds {
            let kind = recorder.kind(class, opcode);
            recorder.begun(kind);
            recorder.sent(kind, Duration::from_micros(1));
            let status = if opcode == 2 { Status::MALFORMED } else { Status::OK };
            let took = Duration::from_micros(5);
            recorder.ended(kind, &Ended { status, took, request_bytes: 10, answer_bytes: 20 });
        }
        let open = recorder.kind(Class::Urgent, 7);
        recorder.begun(open);
        recorder.begun(open);
        recorder.expired(open);
        let seen = metrics.snapshot();
        let shown: Vec<_> = seen.series.iter().map(|s| (s.class, s.operation.as_str())).collect();
        assert_eq!(shown, [(Class::Urgent, "read"), (Class::Bulk, "write"), (Class::Bulk, "other")]);
        assert_eq!((seen.in_flight(), seen.expired()), (1, 1));
        let other = &seen.series[2];
        assert_eq!(
            (other.latency.count, other.failed, other.request_bytes, other.answer_bytes),
            (2, 1, 20, 40)
        );
        assert_eq!(other.queueing.count, 2);
        assert_eq!(seen.by_class().iter().map(|s| s.latency.count).collect::<Vec<_>>(), [1, 3]);
    }

    #[test]
    fn a_connection_that_is_over_holds_no_credit() {
        let mut recorder = Recorder::new(OPERATIONS);
        recorder.carried_by(Carrier::Tcp);
        recorder.connected("pc2", false, (256, 1 << 20));
        recorder.used(3, 4096);
        let seen = recorder.metrics().snapshot();
        let credit = Credit { requests: 3, requests_granted: 256, bytes: 4096, bytes_granted: 1 << 20 };
        assert_eq!((seen.credit, seen.connections, seen.peer.as_str()), (credit, 1, "pc2"));
        assert_eq!(seen.carrier.as_deref(), Some("tcp"));
        recorder.lost("the cable");
        let seen = recorder.metrics().snapshot();
        assert_eq!((seen.credit, seen.connections, seen.losses), (Credit::default(), 0, 1));
        assert_eq!(seen.last_loss.as_deref(), Some("the cable"));
        recorder.lost("nobody there");
        let seen = recorder.metrics().snapshot();
        assert_eq!((seen.losses, seen.failed_attempts), (1, 1), "an attempt is no connection");
    }
}
