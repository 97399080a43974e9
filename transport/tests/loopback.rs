//! Channels and connections over real sockets.

#![allow(clippy::unwrap_used)]

mod common;

use std::time::{Duration, Instant};

use common::{COUNT, Client, ECHO, SLOW, Server, ask_for_sizes, call};
use transport::blocking;
use transport::buffer::Buffer;
use transport::channel::Call;
use transport::identity::Security;
use transport::server::Limits;
use transport::wire::{Class, Status};

#[test]
fn answers_come_back_with_their_bytes_whatever_their_size() {
    let server = Server::start(Limits::default());
    let mut client = Client::new(server.address);
    let asked = ask_for_sizes(&mut client, &[0, 1, 511, 4096, 5000, 65_536, 100_001, 1 << 20]);
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
    let mut next_cut = 150;
    while (client.answers.len() as u64) < total {
        while asked < total && client.channel.in_flight() < 100 {
            let payload = Buffer::zeroed((asked % 7 * 3000) as usize);
            let opcode = if asked % 5 == 0 { SLOW } else { COUNT };
            let once = call(asked, opcode, &asked.to_le_bytes(), payload, 0);
            client.channel.submit(Call { once: true, ..once });
            asked += 1;
        }
        client.pump(Duration::from_millis(5));
        // By what was answered, not by the clock: a quick machine would be done before.
        if client.answers.len() as u64 >= next_cut {
            server.cut_all();
            cuts += 1;
            next_cut += 150 + cuts % 7 * 10;
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
    let mut client = blocking::Client::new(&server.address.to_string(), "test", &Security::Plain, None)
        .expect("io_uring works here");
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
    let mut client = blocking::Client::new(&port.to_string(), "test", &Security::Plain, None)
        .expect("io_uring works here");
    let error = client
        .call(Class::Control, ECHO, &[], Vec::new(), 0, Duration::from_millis(200))
        .expect_err("nobody listens");
    assert!(error.to_string().contains("Connection refused"), "{error}");
}

#[test]
fn a_server_that_stops_answers_what_it_took_and_takes_nothing_more() {
    let server = Server::start(Limits { requests: 16, ..Limits::default() });
    let mut client = Client::new(server.address);
    for number in 0..200u64 {
        let once = call(number, SLOW, &number.to_le_bytes(), Buffer::empty(), 0);
        client.channel.submit(Call { once: true, ..once });
    }
    client.until("some answers", |c| c.answers.len() > 20);
    server.stop.store(true, std::sync::atomic::Ordering::Relaxed);
    client.until("the goodbye", |c| !c.lost.is_empty());
    assert!(client.lost[0].contains("The peer said: the test is over"), "{:?}", client.lost);
    let counts = server.counts.lock().unwrap();
    assert!(counts.len() < 200, "it stopped before everything was asked");
    assert_eq!(counts.len(), client.answers.len(), "whatever was carried out was answered");
    let mut back: Vec<u64> = client.channel.close(&mut client.ring).iter().map(|call| call.tag).collect();
    assert_eq!(back.len() + client.answers.len(), 200, "and everything else is given back");
    back.retain(|tag| counts.contains_key(tag));
    assert_eq!(back, [] as [u64; 0]);
}

#[test]
fn a_name_is_looked_up_and_each_of_its_addresses_is_tried() {
    let server = Server::start(Limits::default());
    let address = format!("localhost:{}", server.address.port());
    let mut client = Client::named(&address, Duration::from_secs(2));
    client.channel.submit(call(1, ECHO, b"x", Buffer::empty(), 10));
    client.until("the answer", |c| c.answers.len() == 1);
    let mut nowhere = Client::named("no-such-host.invalid:1", Duration::from_secs(2));
    nowhere.until("the failure", |c| !c.lost.is_empty());
    assert!(nowhere.lost[0].starts_with("Cannot connect to no-such-host.invalid:1"), "{:?}", nowhere.lost);
}

#[test]
fn buffers_of_the_pool_are_registered_with_the_ring() {
    use transport::ring::Ring;
    use transport::server::{Connection, Sessions};
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let _client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let mut ring = Ring::new(8).expect("io_uring works here");
    let sessions = Sessions::new("test", Limits::default());
    let mut connection = Connection::new(listener.accept().unwrap().0, sessions, &Security::Plain, &mut ring);
    drop(connection.buffer(10_000));
    connection.tick(&mut ring, Instant::now(), &mut Vec::new());
    let Some(index) = connection.buffer(10_000).registered() else {
        eprintln!("cannot run: the kernel does not let us lock memory");
        return;
    };
    let buffer = connection.buffer(10_000);
    assert_eq!(buffer.registered(), Some(index), "one megabyte serves several buffers");
    let file = tempfile();
    let entry = io_uring::opcode::ReadFixed::new(
        io_uring::types::Fd(std::os::fd::AsRawFd::as_raw_fd(&file)),
        buffer.iovecs()[0].iov_base.cast(),
        10_000,
        index,
    );
    let source = ring.source();
    // SAFETY: `buffer` and `file` live until the completion below.
    #[allow(unsafe_code)]
    unsafe {
        ring.push(entry.build(), source.token(1));
    };
    let count = loop {
        ring.wait(Some(Duration::from_secs(5))).unwrap();
        let completion = std::iter::from_fn(|| ring.reap()).find(|c| c.token == source.token(1));
        if let Some(completion) = completion {
            break completion.count().unwrap();
        }
    };
    assert_eq!(count, 10_000);
    assert!(buffer.to_vec().iter().all(|byte| *byte == 7));
}

fn tempfile() -> std::fs::File {
    use std::io::Write;
    let path = std::env::temp_dir().join(format!("omega-transport-{}", std::process::id()));
    let mut file = std::fs::OpenOptions::new()
        .create(true)
        .truncate(true)
        .read(true)
        .write(true)
        .open(&path)
        .expect("a file");
    file.write_all(&[7; 10_000]).expect("it writes");
    let _ = std::fs::remove_file(path);
    file
}
