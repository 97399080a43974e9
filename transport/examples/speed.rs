//! How fast the transport is beside bare TCP, on loopback in one process. `cargo run --release -p
//! omega-transport --example speed`.
#![allow(missing_docs)]

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use transport::buffer::Buffer;
use transport::channel::{Call, Channel, Config, Event, Names};
use transport::identity::Security;
use transport::ring::Ring;
use transport::server::{self, Connection, Limits, Sessions};
use transport::wire::{Body, Class, Status};

const ROUND: Duration = Duration::from_millis(60);

fn main() {
    let best = |what: &dyn Fn() -> f64| (0..40).map(|_| what()).fold(0.0f64, f64::max);
    for (name, size) in [("0 B", 0), ("4 KiB", 4096)] {
        // Interleaved, best of forty: other work on the machine disturbs both alike.
        let (mut bare, mut ours) = (0.0f64, 0.0f64);
        for _ in 0..40 {
            bare = bare.max(ping_pong(size));
            ours = ours.max(channel(size, 1));
        }
        println!(
            "{name} depth 1: bare {:.1} us, ours {:.1} us, ratio {:.3}",
            1e6 / bare,
            1e6 / ours,
            bare / ours
        );
        let deep = best(&|| channel(size, 64));
        println!("{name} depth 64: {deep:.0}/s, {:.2} x depth 1", deep / ours);
    }
    for (name, size, depth) in [("64 KiB", 64 << 10, 16), ("1 MiB", 1 << 20, 4)] {
        let (mut bare, mut ours) = (0.0f64, 0.0f64);
        for _ in 0..40 {
            bare = bare.max(stream(size));
            ours = ours.max(channel(size, depth) * size as f64);
        }
        println!(
            "{name} bulk: bare {:.2} GB/s, ours {:.2} GB/s, ratio {:.3}",
            bare / 1e9,
            ours / 1e9,
            ours / bare
        );
    }
}

fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    let client = TcpStream::connect(listener.local_addr().expect("address")).expect("connect");
    let (server, _) = listener.accept().expect("accept");
    client.set_nodelay(true).expect("nodelay");
    server.set_nodelay(true).expect("nodelay");
    (client, server)
}

/// Round trips per second of a blocking request of 48 bytes and a reply of 48 + `size`.
fn ping_pong(size: usize) -> f64 {
    let (mut client, mut server) = pair();
    let thread = std::thread::spawn(move || {
        let (mut ask, reply) = ([0; 48], vec![1; 48 + size]);
        while server.read_exact(&mut ask).is_ok() {
            server.write_all(&reply).expect("write");
        }
    });
    let (ask, mut reply) = ([0; 48], vec![0; 48 + size]);
    let start = Instant::now();
    let mut count = 0;
    while start.elapsed() < ROUND {
        client.write_all(&ask).expect("write");
        client.read_exact(&mut reply).expect("read");
        count += 1;
    }
    let rate = f64::from(count) / start.elapsed().as_secs_f64();
    drop(client);
    thread.join().expect("join");
    rate
}

/// Bytes per second of writes of `size` in one direction.
fn stream(size: usize) -> f64 {
    let (mut client, mut server) = pair();
    let thread = std::thread::spawn(move || {
        let data = vec![1; size];
        while server.write_all(&data).is_ok() {}
    });
    let mut buffer = vec![0; size];
    let start = Instant::now();
    let mut bytes = 0usize;
    while start.elapsed() < ROUND {
        client.read_exact(&mut buffer).expect("read");
        bytes += size;
    }
    let rate = bytes as f64 / start.elapsed().as_secs_f64();
    drop(client);
    thread.join().expect("join");
    rate
}

/// Requests per second at `depth`, each answered with `size` bytes.
fn channel(size: usize, depth: u64) -> f64 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    let address = listener.local_addr().expect("address").to_string();
    let thread = std::thread::spawn(move || serve(listener.accept().expect("accept").0));
    let mut ring = Ring::new(64).expect("ring");
    let config = Config {
        address,
        name: "speed".into(),
        security: Security::Plain,
        node: None,
        dead_after: Duration::from_secs(5),
        retry_first: Duration::from_millis(10),
        retry_most: Duration::from_secs(1),
        transport: Default::default(),
    };
    let names = Names::of(&config.address).expect("a thread");
    let mut channel = Channel::new(config, names, &mut ring);
    let call =
        |tag, answer| Call { answer, ..Call::new(tag, 256, Class::Normal, Body::from_slice(&[0; 16])) };
    for tag in 0..depth {
        channel.submit(call(tag, Buffer::zeroed(size)));
    }
    let mut events = Vec::new();
    let (mut start, mut count) = (Instant::now(), 0u32);
    loop {
        let now = Instant::now();
        let due = channel.tick(&mut ring, now, &mut events);
        if events.is_empty() {
            ring.wait(due.map(|due| due.saturating_duration_since(now))).expect("wait");
        }
        while let Some(completion) = ring.reap() {
            channel.complete(&mut ring, completion, &mut events);
        }
        for event in events.drain(..) {
            match event {
                Event::Opened { .. } => {
                    channel.ready();
                    (start, count) = (Instant::now(), 0);
                }
                Event::Answer(answer) => {
                    count += 1;
                    channel.submit(call(answer.tag, answer.answer));
                }
                other => panic!("{other:?}"),
            }
        }
        if now.saturating_duration_since(start) >= ROUND && count > 0 {
            break;
        }
    }
    let rate = f64::from(count) / start.elapsed().as_secs_f64();
    channel.close(&mut ring);
    thread.join().expect("join");
    rate
}

fn serve(socket: TcpStream) {
    let mut ring = Ring::new(64).expect("ring");
    let sessions = Sessions::new(
        "speed",
        Limits { requests: 64, bytes: 32 << 20, sessions: 4, rdma: false, ..Limits::default() },
    );
    let mut connection = Connection::new(socket, sessions, &Security::Plain, &mut ring);
    let mut events = Vec::new();
    while !connection.is_finished() {
        let now = Instant::now();
        let due = connection.tick(&mut ring, now, &mut events);
        if events.is_empty() && !connection.is_finished() {
            ring.wait(due.map(|due| due.saturating_duration_since(now))).expect("wait");
        }
        while let Some(completion) = ring.reap() {
            connection.complete(&mut ring, completion, &mut events);
        }
        for event in events.drain(..) {
            if let server::Event::Request(request) = event {
                let answer = connection.buffer(request.answer_len);
                connection.answer(request.id, Status::OK, &[0; 16], answer);
            }
        }
    }
}
