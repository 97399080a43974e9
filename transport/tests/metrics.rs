//! What both sides count of requests over real sockets.

#![allow(clippy::unwrap_used)]

mod common;

use std::time::{Duration, Instant};

use common::{COUNT, Client, ECHO, NEVER, SLOW, Server, call};
use transport::buffer::Buffer;
use transport::channel::Call;
use transport::metrics::{Credit, Series, Snapshot};
use transport::server::Limits;
use transport::wire::{Class, Status};

fn sum(snapshot: &Snapshot, number: impl Fn(&Series) -> u64) -> u64 {
    snapshot.series.iter().map(number).sum()
}

/// What the server counted of its one peer, once that is as `done` says.
fn counted(server: &Server, done: impl Fn(&Snapshot) -> bool) -> Snapshot {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let all = server.registry.snapshot();
        if let [one] = &all[..]
            && done(one)
        {
            return one.clone();
        }
        assert!(Instant::now() < deadline, "{all:#?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn without_a_cut_both_sides_count_the_same() {
    let server = Server::start(Limits::default());
    let mut client = Client::new(server.address);
    let (mut bytes, total) = (0, 300);
    for tag in 0..total {
        let size = (tag as usize * 7919) % 70_000;
        bytes += size as u64;
        let class = Class::ALL[tag as usize % 4];
        client.channel.submit(Call { class, ..call(tag, ECHO, b"x", Buffer::zeroed(size), size) });
    }
    client.channel.submit(call(total, 999, b"", Buffer::empty(), 0));
    client.until("all answers", |c| c.answers.len() as u64 == total + 1);
    client.pump(Duration::ZERO);
    let asker = client.metrics.snapshot();
    let answerer = counted(&server, |s| s.sent_bytes == asker.received_bytes);
    assert_eq!((answerer.received_bytes, answerer.peer.as_str()), (asker.sent_bytes, "test client"));
    assert_eq!((asker.peer.as_str(), asker.carrier.as_deref()), ("test server", Some("tcp")));
    assert!(asker.sent_bytes > bytes && asker.received_bytes > bytes);
    for seen in [&asker, &answerer] {
        assert_eq!((seen.connects, seen.connections, seen.losses, seen.replays), (1, 1, 0, 0), "{seen:#?}");
        assert_eq!((seen.in_flight(), seen.expired()), (0, 0), "{seen:#?}");
        assert_eq!(sum(seen, |s| s.latency.count), total + 1, "{seen:#?}");
        assert_eq!((sum(seen, |s| s.request_bytes), sum(seen, |s| s.answer_bytes)), (bytes, bytes));
        let other: Vec<_> = seen.series.iter().filter(|s| s.operation == "other").collect();
        assert_eq!((other.len(), other[0].failed, other[0].latency.count), (1, 1, 1), "an unknown operation");
        for class in seen.by_class() {
            let expected = total / 4 + u64::from(class.class == Class::Normal);
            assert_eq!(class.latency.count, expected, "{:?}", class.class);
        }
    }
    assert_eq!(sum(&asker, |s| s.queueing.count), total + 1);
    for series in &asker.series {
        let (queued, took) = (series.queueing.sum_ns, series.latency.sum_ns);
        assert!(queued <= took, "a request waits no longer than it takes: {series:#?}");
    }
    assert_eq!(asker.credit.requests, 0);
    assert_eq!(asker.credit.requests_granted, 256);
}

#[test]
fn counts_add_up_however_often_the_connection_is_cut() {
    let server = Server::start(Limits::default());
    let mut client = Client::new(server.address);
    let (total, mut asked, mut bytes, mut cuts) = (1500u64, 0, 0, 0);
    let mut next_cut = 150;
    while (client.answers.len() as u64) < total {
        while asked < total && client.channel.in_flight() < 100 {
            let payload = Buffer::zeroed((asked % 7 * 3000) as usize);
            bytes += payload.len() as u64;
            let opcode = if asked % 5 == 0 { SLOW } else { COUNT };
            let once = call(asked, opcode, &asked.to_le_bytes(), payload, 0);
            client.channel.submit(Call { once: true, ..once });
            asked += 1;
        }
        client.pump(Duration::from_millis(5));
        let seen = client.metrics.snapshot();
        assert_eq!(seen.in_flight(), client.channel.in_flight() as u64, "in every moment");
        assert_eq!(sum(&seen, |s| s.latency.count), asked - seen.in_flight());
        if client.answers.len() as u64 >= next_cut {
            server.cut_all();
            cuts += 1;
            next_cut += 150 + cuts % 7 * 10;
        }
    }
    let asker = client.metrics.snapshot();
    assert_eq!((asker.connects, asker.resumptions), (u64::from(client.resumed) + 1, client.resumed.into()));
    assert_eq!(asker.losses + asker.failed_attempts, client.lost.len() as u64, "{:?}", client.lost);
    assert!(asker.losses > 3 && asker.replays > 0, "{asker:#?}");
    assert_eq!(asker.last_loss.as_ref(), client.lost.last());
    assert_eq!(sum(&asker, |s| s.queueing.count), total, "the first sending counts");
    assert_eq!(sum(&asker, |s| s.request_bytes), bytes);

    drop(client.channel.close(&mut client.ring));
    let answerer = counted(&server, |s| s.connections == 0 && s.connects >= asker.connects);
    assert_eq!(sum(&answerer, |s| s.latency.count), total, "each was carried out once: {answerer:#?}");
    assert_eq!(sum(&answerer, |s| s.request_bytes), bytes);
    assert_eq!(answerer.in_flight(), 0);
    assert!(answerer.replays <= asker.replays);
    assert!(answerer.received_bytes <= asker.sent_bytes, "what was cut off did not arrive");
    assert_eq!(client.metrics.snapshot().credit, Credit::default(), "a closed channel holds no credit");
}

#[test]
fn a_deadline_that_passes_is_counted_and_no_latency() {
    let server = Server::start(Limits::default());
    let mut client = Client::new(server.address);
    client.channel.submit(call(1, ECHO, b"x", Buffer::empty(), 10));
    client.until("the connection", |c| c.answers.len() == 1);
    let deadline = Some(Instant::now() + Duration::from_millis(20));
    client.channel.submit(Call { deadline, ..call(2, NEVER, b"", Buffer::empty(), 4096) });
    client.channel.submit(call(3, NEVER, b"", Buffer::empty(), 4096));
    client.until("the deadline", |c| c.answers.len() == 2);
    assert_eq!(client.answers[1].status, Status::DEADLINE);
    client.pump(Duration::ZERO);
    let seen = client.metrics.snapshot();
    let never = seen.series.iter().find(|s| s.operation == "never").unwrap();
    assert_eq!((never.expired, never.in_flight, never.latency.count), (1, 1, 0));
    assert_eq!((seen.credit.requests, seen.credit.bytes), (2, 8192), "the peer still holds its credit");
    let answerer = counted(&server, |s| s.in_flight() == 2);
    assert_eq!(answerer.credit.requests, 2);
    assert_eq!(client.channel.close(&mut client.ring).len(), 1);
    assert_eq!(client.metrics.snapshot().in_flight(), 0, "a request that was taken back is not in flight");
}
