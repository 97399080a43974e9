//! Channels and connections over real sockets.

mod common;

use std::time::{Duration, Instant};

use common::{COUNT, Client, ECHO, SLOW, Server, call};
use transport::blocking;
use transport::buffer::Buffer;
use transport::channel::Call;
use transport::server::Limits;
use transport::wire::{Class, Status};

#[test]
fn answers_come_back_with_their_bytes_whatever_their_size() {
    let server = Server::start(Limits::default());
    let mut client = Client::new(server.address);
    let sizes = [0, 1, 511, 4096, 5000, 65_536, 100_001, 1 << 20];
    let mut asked = 0;
    for round in 0..10 {
        for (i, size) in sizes.into_iter().enumerate() {
            let fill = (round * 16 + i) as u8;
            let payload = Buffer::zeroed(size);
            payload.fill(fill);
            client.channel.submit(call(asked, ECHO, &[fill], payload, size));
            client.channel.submit(call(asked + 1, ECHO, &[fill], Buffer::empty(), size));
            asked += 2;
        }
    }
    client.until("all answers", |c| c.answers.len() as u64 == asked);
    for answer in &client.answers {
        assert_eq!(answer.status, Status::OK);
        assert_eq!(answer.received, answer.answer.len());
        assert!(answer.answer.to_vec().iter().all(|byte| *byte == answer.body[0]));
    }
    let mut tags: Vec<u64> = client.answers.iter().map(|a| a.tag).collect();
    tags.sort_unstable();
    assert_eq!(tags, (0..asked).collect::<Vec<_>>(), "each call is answered once");
    assert_eq!((client.opened, client.resumed), (1, 0));
}

#[test]
fn once_requests_take_effect_once_however_often_the_connection_is_cut() {
    let server = Server::start(Limits::default());
    let mut client = Client::new(server.address);
    let (total, mut asked, mut cuts) = (2000u64, 0, 0);
    let mut next_cut = Instant::now() + Duration::from_millis(20);
    while (client.answers.len() as u64) < total {
        while asked < total && client.channel.in_flight() < 100 {
            let payload = Buffer::zeroed((asked % 7 * 3000) as usize);
            let opcode = if asked % 5 == 0 { SLOW } else { COUNT };
            let once = call(asked, opcode, &asked.to_le_bytes(), payload, 0);
            client.channel.submit(Call { once: true, ..once });
            asked += 1;
        }
        client.pump(Duration::from_millis(5));
        if Instant::now() > next_cut {
            server.cut_all();
            cuts += 1;
            next_cut = Instant::now() + Duration::from_millis(10 + cuts % 7);
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    assert!(client.resumed > 3, "the session went on: {} times", client.resumed);
    assert_eq!(client.opened, 1, "{:?}", client.lost);
    let counts = server.counts.lock().unwrap();
    for number in 0..total {
        assert_eq!(counts.get(&number), Some(&1), "request {number} took effect once");
    }
}

#[test]
fn a_control_call_waits_for_its_answer() {
    let server = Server::start(Limits::default());
    let mut client = blocking::Client::new(&server.address.to_string(), "test").expect("io_uring works here");
    for i in 0..20u8 {
        let reply = client
            .call(Class::Control, ECHO, &[i], Vec::new(), 100, Duration::from_secs(5))
            .expect("it answers");
        assert_eq!((reply.status, reply.body.as_slice()), (Status::OK, &[i][..]));
        assert_eq!(reply.payload, [i; 100]);
    }
    assert_eq!(client.peer(), Some("test server"));
}

#[test]
fn a_control_call_to_nobody_says_why_it_failed() {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut client = blocking::Client::new(&port.to_string(), "test").expect("io_uring works here");
    let error = client
        .call(Class::Control, ECHO, &[], Vec::new(), 0, Duration::from_millis(200))
        .expect_err("nobody listens");
    assert!(error.to_string().contains("Connection refused"), "{error}");
}
