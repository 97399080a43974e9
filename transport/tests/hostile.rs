//! Peers that do what they should not, and networks that do what they can.
#![allow(clippy::unwrap_used)]

mod common;

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use common::{COUNT, Client, ECHO, NEVER, SLOW, Server, call};
use transport::buffer::Buffer;
use transport::channel::Call;
use transport::server::Limits;
use transport::wire::{Class, Status};

/// A hello of the asking side in version 1, byte by byte as drawn in docs/wire.md.
fn hello(oldest: u16, newest: u16) -> Vec<u8> {
    let mut bytes = b"omega\r\n\x1a".to_vec();
    bytes.extend(oldest.to_le_bytes());
    bytes.extend(newest.to_le_bytes());
    bytes.extend(92u16.to_le_bytes());
    bytes.extend([0, 0]);
    bytes.extend([1, 0]); // asking, nothing
    bytes.extend(4u16.to_le_bytes()); // length of the name
    bytes.extend(0u32.to_le_bytes()); // requests
    bytes.extend(0u64.to_le_bytes()); // bytes
    bytes.extend(0u32.to_le_bytes()); // window
    bytes.extend(1000u32.to_le_bytes()); // keepalive
    bytes.extend(0u64.to_le_bytes()); // serial
    bytes.extend([0; 8]);
    bytes.extend(77u128.to_le_bytes()); // session
    bytes.extend(1u128.to_le_bytes()); // instance
    bytes.extend(2u128.to_le_bytes()); // boot
    bytes.extend(b"test");
    bytes
}

fn request(id: u64, opcode: u16, payload: u32, answer: u32) -> Vec<u8> {
    let mut bytes = vec![1, 1];
    bytes.extend(opcode.to_le_bytes());
    bytes.extend([0; 4]); // flags, body length
    bytes.extend(payload.to_le_bytes());
    bytes.extend(answer.to_le_bytes());
    bytes.extend(id.to_le_bytes());
    bytes.extend(0u64.to_le_bytes());
    bytes
}

fn ends(socket: &mut TcpStream) -> Vec<u8> {
    socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let mut got = Vec::new();
    match socket.read_to_end(&mut got) {
        Ok(_) => {}
        Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => {}
        Err(e) => panic!("the server does not end the connection: {e}"),
    }
    got
}

/// Why connections ended, once so many have.
fn closed(server: &Server, count: usize) -> Vec<String> {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let closed = server.closed.lock().unwrap().clone();
        if closed.len() >= count {
            return closed;
        }
        assert!(Instant::now() < deadline, "{count} connections end: {closed:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn contains(bytes: &[u8], text: &str) -> bool {
    bytes.windows(text.len()).any(|window| window == text.as_bytes())
}

#[test]
fn garbage_ends_the_connection_and_nothing_else() {
    let server = Server::start(Limits::default());
    let mut socket = TcpStream::connect(server.address).unwrap();
    socket.write_all(b"GET / HTTP/1.1\r\nHost: omega\r\n\r\n").unwrap();
    ends(&mut socket);
    let mut client = Client::new(server.address);
    client.channel.submit(call(1, ECHO, b"x", Buffer::empty(), 10));
    client.until("the answer", |c| c.answers.len() == 1);
}

#[test]
fn a_peer_of_another_version_is_told_which_versions_there_are() {
    let server = Server::start(Limits::default());
    let mut socket = TcpStream::connect(server.address).unwrap();
    socket.write_all(&hello(3, 9)).unwrap();
    let got = ends(&mut socket);
    assert_eq!(&got[..12], b"omega\r\n\x1a\x01\x00\x02\x00", "the server's own versions, 1 to 2");
    assert_eq!(got.len(), 16);
    let closed = closed(&server, 1);
    assert!(closed[0].contains("versions 3 to 9"), "{closed:?}");
}

#[test]
fn a_server_of_another_version_is_one_clear_reason() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut client = Client::new(listener.local_addr().unwrap());
    let thread = std::thread::spawn(move || {
        let (mut socket, _) = listener.accept().unwrap();
        socket.write_all(b"omega\r\n\x1a\x07\x00\x08\x00\x00\x00\x00\x00").unwrap();
        std::thread::sleep(Duration::from_millis(200));
    });
    client.until("the refusal", |c| !c.lost.is_empty());
    assert!(client.lost[0].contains("speaks versions 7 to 8"), "{:?}", client.lost);
    thread.join().unwrap();
}

#[test]
fn a_peer_that_asks_for_more_than_it_was_granted_is_cut_off_with_the_reason() {
    let server = Server::start(Limits { requests: 4, bytes: 4 << 20, sessions: 4, ..Limits::default() });
    let mut socket = TcpStream::connect(server.address).unwrap();
    socket.write_all(&hello(1, 1)).unwrap();
    for id in 1..=5 {
        socket.write_all(&request(id, NEVER, 0, 10)).unwrap();
    }
    assert!(contains(&ends(&mut socket), "asked for more at once than it was granted"));
    // The same by bytes, in another session.
    let mut socket = TcpStream::connect(server.address).unwrap();
    let mut other = hello(1, 1);
    other[56] = 78;
    socket.write_all(&other).unwrap();
    for id in 1..=3 {
        socket.write_all(&request(id, NEVER, 0, 1 << 20)).unwrap();
        socket.write_all(&request(id + 10, NEVER, 1 << 20, 0)[..32]).unwrap();
        if socket.write_all(&vec![0; 1 << 20]).is_err() {
            break;
        }
    }
    ends(&mut socket);
    let closed = closed(&server, 2);
    assert!(closed.iter().all(|reason| reason.contains("granted")), "{closed:?}");
}

#[test]
fn a_peer_that_sends_without_end_and_never_reads_stays_bounded() {
    let server = Server::start(Limits { requests: 8, bytes: 8 << 20, sessions: 4, ..Limits::default() });
    let mut socket = TcpStream::connect(server.address).unwrap();
    socket.write_all(&hello(1, 1)).unwrap();
    // Eight answers of a megabyte wait; the ninth request breaks the limit, whatever the kernel buffers.
    let mut sent = 0;
    socket.set_write_timeout(Some(Duration::from_secs(5))).unwrap();
    for id in 1..=64 {
        if socket.write_all(&request(id, ECHO, 0, 1 << 20)).is_err() {
            break;
        }
        sent = id;
    }
    let closed = closed(&server, 1);
    assert!(closed[0].contains("granted"), "cut off after {sent} requests: {closed:?}");
    assert!(server.most_in_flight.load(std::sync::atomic::Ordering::Relaxed) <= 8);
}

#[test]
fn a_hello_that_never_comes_holds_no_connection() {
    let server = Server::start(Limits::default());
    let mut socket = TcpStream::connect(server.address).unwrap();
    let start = Instant::now();
    socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let _ = socket.read(&mut [0; 10]);
    assert!(start.elapsed() < Duration::from_secs(15));
    let closed = closed(&server, 1);
    assert!(closed[0].contains("hello in time"), "{closed:?}");
}

/// Carries bytes between a client and the server, until told to freeze or cut.
struct Proxy {
    address: std::net::SocketAddr,
    command: std::sync::Arc<std::sync::atomic::AtomicU64>,
}

const FLOW: u64 = 0;
const FREEZE: u64 = 1;

impl Proxy {
    /// Every connection is cut after `cut_after` bytes from the server, counted anew for each.
    fn start(to: std::net::SocketAddr, cut_after: usize) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let command = std::sync::Arc::new(std::sync::atomic::AtomicU64::new(FLOW));
        let commands = command.clone();
        std::thread::spawn(move || {
            while let Ok((client, _)) = listener.accept() {
                let Ok(server) = TcpStream::connect(to) else { break };
                for (mut from, mut into, limit) in [
                    (client.try_clone().unwrap(), server.try_clone().unwrap(), usize::MAX),
                    (server, client, cut_after),
                ] {
                    let command = commands.clone();
                    std::thread::spawn(move || {
                        let (mut buffer, mut total) = (vec![0; 3000], 0);
                        while let Ok(n @ 1..) = from.read(&mut buffer) {
                            while command.load(std::sync::atomic::Ordering::Relaxed) == FREEZE {
                                std::thread::sleep(Duration::from_millis(5));
                            }
                            let n = n.min(limit - total);
                            total += n;
                            if into.write_all(&buffer[..n]).is_err() || total == limit {
                                break;
                            }
                        }
                        let _ = (from.shutdown(Shutdown::Both), into.shutdown(Shutdown::Both));
                    });
                }
            }
        });
        Self { address, command }
    }
}

#[test]
fn a_cut_in_the_middle_of_a_payload_repeats_the_read_and_no_write() {
    let server = Server::start(Limits::default());
    let proxy = Proxy::start(server.address, 700_000);
    let mut client = Client::new(proxy.address);
    let mut asked = 0;
    for number in 0..30u64 {
        let payload = Buffer::zeroed(100_000);
        client.channel.submit(Call { once: true, ..call(asked, COUNT, &number.to_le_bytes(), payload, 0) });
        client.channel.submit(call(asked + 1, ECHO, &[number as u8], Buffer::empty(), 200_000));
        asked += 2;
    }
    client.until("all answers", |c| c.answers.len() as u64 == asked);
    assert!(client.resumed >= 8, "six megabytes need nine connections, there were {}", client.resumed);
    for answer in client.answers.iter().filter(|a| a.tag % 2 == 1) {
        assert_eq!(answer.received, 200_000);
        assert!(answer.answer.to_vec().iter().all(|byte| *byte == answer.body[0]), "call {}", answer.tag);
    }
    assert!(server.counts.lock().unwrap().values().all(|times| *times == 1));
}

#[test]
fn a_frozen_peer_is_noticed_and_a_thawed_one_is_used_again() {
    let server = Server::start(Limits::default());
    let proxy = Proxy::start(server.address, usize::MAX);
    let mut client = Client::named(&proxy.address.to_string(), Duration::from_millis(600));
    client.channel.submit(call(1, ECHO, b"a", Buffer::empty(), 100));
    client.until("the first answer", |c| c.answers.len() == 1);
    proxy.command.store(FREEZE, std::sync::atomic::Ordering::Relaxed);
    let frozen = Instant::now();
    client.channel.submit(call(2, ECHO, b"b", Buffer::empty(), 100));
    client.until("the loss", |c| !c.lost.is_empty());
    let noticed = frozen.elapsed();
    assert!(noticed >= Duration::from_millis(500), "not before its time: {noticed:?}");
    assert!(noticed < Duration::from_millis(4000), "soon after: {noticed:?}");
    assert!(client.lost[0].contains("Nothing was heard"), "{:?}", client.lost);
    proxy.command.store(FLOW, std::sync::atomic::Ordering::Relaxed);
    client.until("the second answer", |c| c.answers.len() == 2);
}

#[test]
fn a_peer_that_is_only_slow_is_not_dead() {
    let server = Server::start(Limits::default());
    let mut client = Client::named(&server.address.to_string(), Duration::from_millis(700));
    client.channel.submit(call(1, NEVER, b"", Buffer::empty(), 0));
    let end = Instant::now() + Duration::from_millis(2500);
    while Instant::now() < end {
        client.pump(Duration::from_millis(20));
    }
    assert_eq!((client.lost.len(), client.opened), (0, 1), "{:?}", client.lost);
}

#[test]
fn a_deadline_gives_the_call_back_and_leaves_the_others_alone() {
    let server = Server::start(Limits::default());
    let mut client = Client::new(server.address);
    let deadline = Some(Instant::now() + Duration::from_millis(100));
    client.channel.submit(Call { deadline, ..call(1, NEVER, b"", Buffer::zeroed(5000), 100) });
    client.channel.submit(call(2, ECHO, b"x", Buffer::empty(), 100));
    client.until("both answers", |c| c.answers.len() == 2);
    assert_eq!(client.answers[0].status, Status::OK);
    assert_eq!((client.answers[1].tag, client.answers[1].status), (1, Status::DEADLINE));
    assert!(client.lost.is_empty());
}

#[test]
fn an_urgent_call_overtakes_bulk_that_waits() {
    const BULK: u64 = 200;
    let server = Server::start(Limits { requests: 256, bytes: 256 << 20, sessions: 4, ..Limits::default() });
    let mut client = Client::new(server.address);
    for tag in 0..BULK {
        let bulk = call(tag, ECHO, b"b", Buffer::empty(), 1 << 20);
        client.channel.submit(Call { class: Class::Bulk, ..bulk });
    }
    client.until("the first bulk answers", |c| c.answers.len() >= 2);
    let before = client.answers.len();
    client
        .channel
        .submit(Call { class: Class::Urgent, ..call(100 + BULK, ECHO, b"u", Buffer::empty(), 100) });
    client.until("all answers", |c| c.answers.len() as u64 == BULK + 1);
    let at = client.answers.iter().position(|answer| answer.tag == 100 + BULK).unwrap();
    // What the kernels hold, one turn of receiving and one or two of sending may be ahead of it.
    assert!(at < before + 16, "the urgent answer came after {} others", at - before);
    assert!(at < BULK as usize - 16, "the bulk was over too soon: {before} answers before the urgent call");
}

#[test]
fn a_restarted_server_opens_a_new_session_and_gets_everything_again() {
    let server = Server::start(Limits::default());
    let address = server.address.to_string();
    let mut client = Client::new(server.address);
    client.channel.submit(call(1, ECHO, b"a", Buffer::empty(), 10));
    client.until("the answer", |c| c.answers.len() == 1);
    for number in 0..50u64 {
        let once = call(10 + number, SLOW, &number.to_le_bytes(), Buffer::empty(), 0);
        client.channel.submit(Call { once: true, ..once });
    }
    client.pump(Duration::from_millis(1));
    drop(server);
    let server = Server::at(&address, Limits::default());
    client.until("all answers", |c| c.answers.len() == 51);
    assert_eq!(client.opened, 2, "{:?}", client.lost);
    assert!(server.counts.lock().unwrap().values().all(|times| *times == 1));
}

#[test]
fn more_peers_than_there_is_room_for_are_refused_with_the_reason() {
    let server = Server::start(Limits { requests: 4, bytes: 4 << 20, sessions: 1, ..Limits::default() });
    let mut first = Client::new(server.address);
    first.channel.submit(call(1, ECHO, b"a", Buffer::empty(), 10));
    first.until("the answer", |c| c.answers.len() == 1);
    let mut second = Client::new(server.address);
    second.until("the refusal", |c| !c.lost.is_empty());
    assert!(second.lost[0].contains("as many sessions as it can"), "{:?}", second.lost);
}

#[test]
fn a_call_beyond_the_limits_is_refused_at_once() {
    let server = Server::start(Limits::default());
    let mut client = Client::new(server.address);
    client.channel.submit(call(1, ECHO, &[0; 4097], Buffer::empty(), 0));
    client.channel.submit(call(2, ECHO, b"", Buffer::zeroed((1 << 20) + 1), 0));
    client.channel.submit(Call { once: true, ..call(3, ECHO, b"", Buffer::empty(), 1) });
    client.until("the refusals", |c| c.answers.len() == 3);
    assert!(client.answers.iter().all(|answer| answer.status == Status::MALFORMED));
}

#[test]
fn a_long_replay_as_setup_of_a_new_session_fits_whatever_is_held_back() {
    let server = Server::start(Limits { requests: 8, bytes: 4 << 20, sessions: 4, ..Limits::default() });
    let mut client = Client::new(server.address);
    client.setup_first = 1000;
    let once = |tag: u64, setup| Call {
        once: true,
        setup,
        ..call(tag, COUNT, &tag.to_le_bytes(), Buffer::zeroed(100), 0)
    };
    for tag in 0..500 {
        client.channel.submit(once(tag, false));
    }
    client.until("the opening", |c| c.opened == 1);
    for tag in 1000..2000 {
        client.channel.submit(once(tag, true));
    }
    client.until("all answers", |c| c.answers.len() == 1500);
    assert!(client.lost.is_empty(), "{:?}", client.lost);
    assert!(client.answers[..1000].iter().all(|answer| answer.tag >= 1000), "the set-up came first");
    let tags: Vec<u64> = client.answers[1000..].iter().map(|answer| answer.tag).collect();
    assert_eq!(tags, (0..500).collect::<Vec<_>>(), "then the rest in its order");
}
