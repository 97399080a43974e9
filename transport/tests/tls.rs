//! Channels and connections over real sockets with TLS.

#![allow(clippy::unwrap_used)]

mod common;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::{COUNT, Client, ECHO, SLOW, Server, ask_for_sizes, call, wait_for};
use transport::buffer::Buffer;
use transport::channel::Call;
use transport::identity::testing::{Household, security};
use transport::identity::{Reloading, Role, Security};
use transport::ring::Ring;
use transport::server::{self, Connection, Limits, Sessions};
use transport::wire::Status;

/// An agent and a console of one household that trust each other.
fn pair() -> (Household, Server, Security) {
    let house = Household::new();
    let server = Server::secured(Limits::default(), security(&house.agent("attic")));
    let console = security(&house.console("desk"));
    (house, server, console)
}

/// Asks for one answer, which shows that a connection works.
fn works(client: &mut Client) {
    let before = client.answers.len();
    client.channel.submit(call(1, ECHO, b"x", Buffer::empty(), 10));
    client.until("the answer", |c| c.answers.len() > before);
    assert_eq!(client.answers[before].status, Status::OK);
}

#[test]
fn both_sides_prove_who_they_are_and_bytes_of_any_size_come_back() {
    let (_house, server, console) = pair();
    let mut client = Client::secured(server.address, console, Some("attic"));
    ask_for_sizes(&mut client, &[0, 1, 511, 4096, 5000, 16_384, 65_536, 100_001, 1 << 20]);
    assert_eq!((client.opened, client.resumed), (1, 0));
    let (peer, carrier) = client.met.clone().unwrap();
    assert_eq!(peer.unwrap().name, "attic");
    let opened = server.opened.lock().unwrap().clone();
    let (peer, theirs) = &opened[0];
    assert_eq!((peer.as_ref().unwrap().name.as_str(), *theirs), ("desk", carrier));
    eprintln!("carried by {carrier}");
}

/// The reasons that the server and the client give when they meet.
fn refusal(server: Security, client: Security, node: Option<&str>) -> (String, String) {
    let server = Server::secured(Limits::default(), server);
    let mut client = Client::secured(server.address, client, node);
    client.until("the refusal", |c| !c.lost.is_empty());
    let closed = wait_for("the server's reason", || server.closed.lock().unwrap().first().cloned());
    assert_eq!(client.opened, 0);
    assert_eq!(server.opened.lock().unwrap().len(), 0, "nobody was let in");
    (closed, client.lost[0].clone())
}

#[track_caller]
fn refused(what: &str, reasons: &(String, String), server: &str, client: &str) {
    assert!(reasons.0.contains(server), "{what}, the server: {}", reasons.0);
    assert!(reasons.1.contains(client), "{what}, the client: {}", reasons.1);
}

#[test]
fn whoever_connects_with_a_certificate_that_is_not_good_is_refused_and_both_sides_say_why() {
    let (mut house, other) = (Household::new(), Household::new());
    let console = Role::Console.into();
    let revoked = house.console("desk");
    house.revoke(revoked.serial());
    let agent = security(&house.agent("attic"));
    for (what, identity, server, client) in [
        ("another CA", house.stranger(&other, "desk", console), "not of this household's CA", "CA"),
        ("expired", house.expired("desk", console), "has expired", "certificate expired"),
        ("not yet valid", house.not_yet_valid("desk", console), "not valid yet", "certificate expired"),
        ("self-signed", house.self_signed("desk", console), "certificate", "The peer refused"),
        ("revoked", revoked, "was revoked", "certificate was revoked"),
    ] {
        refused(what, &refusal(agent.clone(), security(&identity), None), server, client);
    }
}

#[test]
fn an_agent_with_a_certificate_that_is_not_good_is_not_believed_and_both_sides_say_why() {
    let (mut house, other) = (Household::new(), Household::new());
    let agent = Role::Agent.into();
    let revoked = house.agent("attic");
    house.revoke(revoked.serial());
    let console = security(&house.console("desk"));
    for (what, identity, node, server, client) in [
        ("another CA", house.stranger(&other, "attic", agent), None, "CA", "not of this household's CA"),
        ("expired", house.expired("attic", agent), None, "certificate expired", "has expired"),
        ("not yet valid", house.not_yet_valid("attic", agent), None, "certificate expired", "not valid yet"),
        ("self-signed", house.self_signed("attic", agent), None, "The peer refused", "certificate"),
        ("revoked", revoked, None, "certificate was revoked", "was revoked"),
        ("wrong name", house.agent("cellar"), Some("attic"), "name or role", "attic.node.omega.internal"),
        ("wrong role", house.console("attic"), None, "name or role", "agent.role.omega.internal"),
    ] {
        refused(what, &refusal(security(&identity), console.clone(), node), server, client);
    }
}

#[test]
fn without_tls_on_one_side_both_sides_say_so() {
    let house = Household::new();
    let (agent, console) = (security(&house.agent("attic")), security(&house.console("desk")));
    refused(
        "a plain client",
        &refusal(agent, Security::Plain, None),
        "speaks without TLS, and this side demands it",
        "speaks TLS, and this side has no identity",
    );
    refused(
        "a plain server",
        &refusal(Security::Plain, console, None),
        "speaks TLS, and this side has no identity",
        "speaks without TLS, and this side demands it",
    );
}

/// The configuration of a stock TLS client of `security`'s identity.
fn stock(security: &Security) -> rustls::ClientConfig {
    let Security::Tls(identity) = security else { panic!("it has an identity") };
    (*identity.current().client_config()).clone()
}

/// A stock TLS client.
fn dial(
    address: SocketAddr,
    config: rustls::ClientConfig,
) -> rustls::StreamOwned<rustls::ClientConnection, TcpStream> {
    let socket = TcpStream::connect(address).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(15))).unwrap();
    let name = "agent.role.omega.internal".try_into().unwrap();
    rustls::StreamOwned::new(rustls::ClientConnection::new(Arc::new(config), name).unwrap(), socket)
}

/// Shows no certificate, whoever asks.
#[derive(Debug)]
struct NoCertificate;

impl rustls::client::ResolvesClientCert for NoCertificate {
    fn resolve(
        &self,
        _hints: &[&[u8]],
        _schemes: &[rustls::SignatureScheme],
    ) -> Option<Arc<rustls::sign::CertifiedKey>> {
        None
    }

    fn has_certs(&self) -> bool {
        false
    }
}

#[test]
fn a_client_without_a_certificate_or_with_another_protocol_is_refused() {
    let (_house, server, console) = pair();
    let mut config = stock(&console);
    config.client_auth_cert_resolver = Arc::new(NoCertificate);
    let error = dial(server.address, config).read(&mut [0; 1]).unwrap_err();
    assert!(error.to_string().contains("CertificateRequired"), "{error}");
    let mut config = stock(&console);
    config.alpn_protocols = vec![b"h2".to_vec()];
    let error = dial(server.address, config).read(&mut [0; 1]).unwrap_err();
    assert!(error.to_string().contains("NoApplicationProtocol"), "{error}");
    let mut config = stock(&console);
    config.alpn_protocols = Vec::new();
    assert!(!dial(server.address, config).read(&mut [0; 1]).is_ok_and(|n| n > 0));
    let closed = wait_for("three reasons", || {
        let closed = server.closed.lock().unwrap().clone();
        (closed.len() == 3).then_some(closed)
    });
    assert!(closed[0].contains("showed no certificate"), "{closed:?}");
    assert!(closed[1..].iter().all(|reason| reason.contains("not Omega's protocol")), "{closed:?}");
    assert!(server.opened.lock().unwrap().is_empty());
}

/// A hello of TLS 1.2: no version but in the field that 1.3 froze, one suite, curve and signature.
fn hello_of_1_2() -> Vec<u8> {
    let extensions = [0u8, 10, 0, 4, 0, 2, 0, 23, 0, 13, 0, 4, 0, 2, 4, 3];
    let mut body = vec![3, 3];
    body.extend([7; 32]);
    body.extend([0, 0, 2, 0xc0, 0x2b, 1, 0, 0, extensions.len() as u8]);
    body.extend(extensions);
    record(&handshake(1, &body))
}

fn handshake(kind: u8, body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![kind, 0];
    bytes.extend((body.len() as u16).to_be_bytes());
    bytes.extend(body);
    bytes
}

fn record(bytes: &[u8]) -> Vec<u8> {
    let mut record = vec![22, 3, 3];
    record.extend((bytes.len() as u16).to_be_bytes());
    record.extend(bytes);
    record
}

/// What the server sends until it ends the connection.
fn answer_to(address: SocketAddr, bytes: &[u8]) -> Vec<u8> {
    let mut socket = TcpStream::connect(address).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    // It may end before it has read all.
    let _ = socket.write_all(bytes);
    let mut got = Vec::new();
    match socket.read_to_end(&mut got) {
        Err(e) if e.kind() != std::io::ErrorKind::ConnectionReset => panic!("the server does not end: {e}"),
        _ => got,
    }
}

#[test]
fn a_side_that_speaks_only_tls_1_2_is_refused_with_the_version() {
    let (house, server, _) = pair();
    let got = answer_to(server.address, &hello_of_1_2());
    assert_eq!(got, [21, 3, 3, 0, 2, 2, 70], "a fatal alert, protocol_version");
    let closed = wait_for("the reason", || server.closed.lock().unwrap().first().cloned());
    assert_eq!(closed, "The peer does not speak TLS 1.3");
    // A server that takes 1.2, without the extension that says 1.3.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut client = Client::secured(listener.local_addr().unwrap(), security(&house.console("desk")), None);
    let thread = std::thread::spawn(move || {
        let (mut socket, _) = listener.accept().unwrap();
        let mut hello = [0; 44 + 32];
        socket.read_exact(&mut hello).unwrap();
        let mut body = vec![3, 3];
        body.extend([9; 32]);
        body.push(32);
        body.extend(&hello[44..]); // the session that the client named
        body.extend([0xc0, 0x2b, 0]);
        socket.write_all(&record(&handshake(2, &body))).unwrap();
        let _ = socket.read_to_end(&mut Vec::new());
    });
    client.until("the refusal", |c| !c.lost.is_empty());
    assert!(client.lost[0].contains("does not speak TLS 1.3"), "{:?}", client.lost);
    drop(client);
    thread.join().unwrap();
}

#[test]
fn garbage_and_handshakes_without_end_are_cut_off_and_cost_little() {
    let (_house, server, console) = pair();
    let first = answer_to(server.address, b"GET / HTTP/1.1\r\nHost: omega\r\n\r\n");
    assert_eq!(first, [21, 3, 3, 0, 2, 2, 70], "an alert, and the end");
    let mut noise = vec![0u8; 100_000];
    noise.iter_mut().enumerate().for_each(|(i, byte)| *byte = ((i * 7919) >> 3) as u8);
    answer_to(server.address, &noise);
    // A handshake message of 16 MiB, in full records.
    let mut endless = record(&[&[1, 0xff, 0xff, 0xff][..], &[0; 16_000]].concat());
    for _ in 0..100 {
        endless.extend(record(&[0; 16_384]));
    }
    answer_to(server.address, &endless);
    // A good beginning, and then garbage.
    let mut client =
        rustls::ClientConnection::new(Arc::new(stock(&console)), "a.b".try_into().unwrap()).unwrap();
    let mut bytes = Vec::new();
    client.write_tls(&mut bytes).unwrap();
    bytes.extend([23, 3, 3, 0, 100]);
    bytes.extend([5; 100]);
    answer_to(server.address, &bytes);
    let closed = wait_for("four reasons", || {
        let closed = server.closed.lock().unwrap().clone();
        (closed.len() == 4).then_some(closed)
    });
    assert!(closed[..2].iter().all(|reason| reason.contains("does not speak TLS")), "{closed:?}");
    works(&mut Client::secured(server.address, console, None));
}

#[test]
fn a_handshake_whose_records_are_of_full_length_is_taken_whole() {
    let (_house, server, console) = pair();
    let mut config = stock(&console);
    let others = (0..60).map(|i| vec![b'a' + i % 26; 250]);
    config.alpn_protocols = others.chain([b"omega/1".to_vec()]).collect();
    let mut first = dial(server.address, config);
    first.write_all(&hello(0)).unwrap();
    first.read_exact(&mut [0; 16 + 88]).unwrap();
    assert_eq!(server.opened.lock().unwrap()[0].0.as_ref().unwrap().name, "desk");
}

#[test]
fn a_handshake_that_trickles_is_ended_in_time() {
    let (_house, server, console) = pair();
    let mut client =
        rustls::ClientConnection::new(Arc::new(stock(&console)), "a.b".try_into().unwrap()).unwrap();
    let mut bytes = Vec::new();
    client.write_tls(&mut bytes).unwrap();
    let (mut socket, start) = (TcpStream::connect(server.address).unwrap(), Instant::now());
    for byte in bytes {
        if socket.write_all(&[byte]).is_err() || !server.closed.lock().unwrap().is_empty() {
            break;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    let closed = wait_for("the reason", || server.closed.lock().unwrap().first().cloned());
    assert!(closed.contains("in time"), "{closed}");
    assert!((9..15).contains(&start.elapsed().as_secs()), "after ten seconds: {:?}", start.elapsed());
}

#[test]
fn an_agent_whose_handshake_trickles_is_left_in_time() {
    let house = Household::new();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let done = Arc::new(AtomicBool::new(false));
    let trickle = std::thread::spawn({
        let done = done.clone();
        move || {
            let (mut socket, _) = listener.accept().unwrap();
            let record = [&[22, 3, 3, 0x3f, 0xff][..], &[2; 1000]].concat();
            for byte in record {
                if done.load(Ordering::Relaxed) || socket.write_all(&[byte]).is_err() {
                    break;
                }
                std::thread::sleep(Duration::from_millis(50));
            }
        }
    });
    let mut client = Client::secured(address, security(&house.console("desk")), None);
    let start = Instant::now();
    while client.lost.is_empty() && start.elapsed() < Duration::from_secs(20) {
        client.pump(Duration::from_millis(100));
    }
    done.store(true, Ordering::Relaxed);
    trickle.join().unwrap();
    assert_eq!(client.lost, ["The peer did not finish its TLS handshake in time"]);
    assert!((9..15).contains(&start.elapsed().as_secs()), "after ten seconds: {:?}", start.elapsed());
}

#[test]
fn a_handshake_that_is_cut_anywhere_leaves_nothing_behind() {
    let (_house, server, console) = pair();
    let config = Arc::new(stock(&console));
    let (mut cut, mut done) = (0, false);
    while !done {
        let mut socket = TcpStream::connect(server.address).unwrap();
        let name = "agent.role.omega.internal".try_into().unwrap();
        let mut client = rustls::ClientConnection::new(config.clone(), name).unwrap();
        let mut left = cut;
        loop {
            let mut bytes = Vec::new();
            while client.wants_write() {
                client.write_tls(&mut bytes).unwrap();
            }
            let now = left.min(bytes.len());
            socket.write_all(&bytes[..now]).unwrap();
            left -= now;
            done = now == bytes.len() && !client.is_handshaking();
            if now < bytes.len() || done {
                break;
            }
            client.read_tls(&mut socket).unwrap();
            client.process_new_packets().unwrap();
        }
        drop(socket);
        cut += 1;
    }
    assert!(cut > 800, "a handshake has more bytes than {cut}");
    let closed = wait_for("all ends", || {
        let closed = server.closed.lock().unwrap().clone();
        (closed.len() == cut).then_some(closed)
    });
    let ends = ["closed the connection", "reset", "was cut", "Broken pipe"];
    let odd = closed.iter().find(|reason| !ends.iter().any(|end| reason.contains(end)));
    assert_eq!(odd, None, "the end is what ended them");
    assert!(server.opened.lock().unwrap().is_empty());
    works(&mut Client::secured(server.address, console, None));
}

/// Carries bytes between a client and a server, in pieces as `change` leaves them.
struct Proxy {
    address: SocketAddr,
    stop: Arc<AtomicBool>,
    target: SocketAddr,
}

impl Proxy {
    /// `change` gets each piece with the number of the connection, whether the client sent it, and how many
    /// bytes came before it that way.
    fn new(
        target: SocketAddr,
        size: usize,
        change: impl Fn(usize, bool, usize, Vec<u8>) -> Vec<u8> + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (address, change) = (listener.local_addr().unwrap(), Arc::new(change));
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        std::thread::spawn(move || {
            for (number, client) in listener.incoming().enumerate() {
                if stopped.load(Ordering::Relaxed) {
                    break;
                }
                let client = client.unwrap();
                let server = TcpStream::connect(target).unwrap();
                client.set_nodelay(true).unwrap();
                server.set_nodelay(true).unwrap();
                for (up, mut from, mut to) in [
                    (true, client.try_clone().unwrap(), server.try_clone().unwrap()),
                    (false, server, client),
                ] {
                    let change = change.clone();
                    std::thread::spawn(move || {
                        let (mut piece, mut before) = (vec![0; size], 0);
                        while let Ok(n) = from.read(&mut piece) {
                            if n == 0
                                || to.write_all(&change(number, up, before, piece[..n].to_vec())).is_err()
                            {
                                break;
                            }
                            before += n;
                        }
                        let _ = to.shutdown(std::net::Shutdown::Both);
                        let _ = from.shutdown(std::net::Shutdown::Both);
                    });
                }
            }
        });
        Self { address, stop, target }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = TcpStream::connect(self.address);
        let _ = self.target;
    }
}

#[test]
fn a_connection_works_byte_by_byte() {
    let (_house, server, console) = pair();
    let proxy = Proxy::new(server.address, 1, |_, _, _, piece| piece);
    let mut client = Client::secured(proxy.address, console, None);
    for _ in 0..20 {
        works(&mut client);
    }
    assert_eq!((client.opened, client.lost.len()), (1, 0), "{:?}", client.lost);
}

#[test]
fn a_byte_that_is_changed_or_repeated_on_the_way_ends_the_connection_and_harms_nothing() {
    let (_house, server, console) = pair();
    // Far enough to be behind the handshake, which has its own checks.
    let proxy = Proxy::new(server.address, 64 << 10, |number, up, before, mut piece| {
        let hit = (before..before + piece.len()).contains(&20_000);
        if hit && up == (number % 2 == 0) && number < 6 {
            if number < 4 {
                piece[20_000 - before] ^= 1 << (number % 8);
            } else {
                piece.extend_from_within(..);
            }
        }
        piece
    });
    let mut client = Client::secured(proxy.address, console, None);
    let total = 600u64;
    for number in 0..total {
        let once = call(number, COUNT, &number.to_le_bytes(), Buffer::zeroed(1000), 0);
        client.channel.submit(Call { once: true, ..once });
        client.channel.submit(call(total + number, ECHO, &[1], Buffer::empty(), 1000));
    }
    client.until("all answers", |c| c.answers.len() as u64 == 2 * total);
    assert_eq!(client.opened, 1);
    let lost = client.lost.len() + server.closed.lock().unwrap().len();
    assert!(lost >= 3, "the changes were seen: {:?}", client.lost);
    let said: Vec<String> = server.closed.lock().unwrap().iter().chain(&client.lost).cloned().collect();
    assert!(said.iter().any(|reason| reason.contains("changed on the way")), "{said:?}");
    let counts = server.counts.lock().unwrap();
    assert!((0..total).all(|number| counts.get(&number) == Some(&1)), "each took effect once");
}

#[test]
fn once_requests_take_effect_once_however_often_the_connection_is_cut() {
    let (_house, server, console) = pair();
    let mut client = Client::secured(server.address, console, Some("attic"));
    let (mut asked, mut cuts) = (0u64, 0);
    let mut next_cut = Instant::now() + Duration::from_millis(30);
    while (client.answers.len() as u64) < asked || client.resumed < 8 {
        while client.resumed < 8 && client.channel.in_flight() < 100 {
            let payload = Buffer::zeroed((asked % 7 * 3000) as usize);
            let opcode = if asked % 5 == 0 { SLOW } else { COUNT };
            let once = call(asked, opcode, &asked.to_le_bytes(), payload, 0);
            client.channel.submit(Call { once: true, ..once });
            asked += 1;
        }
        client.pump(Duration::from_millis(5));
        if Instant::now() > next_cut && client.resumed < 8 {
            server.cut_all();
            cuts += 1;
            next_cut = Instant::now() + Duration::from_millis(30 + cuts % 7);
        }
    }
    assert_eq!(client.opened, 1, "{:?}", client.lost);
    let counts = server.counts.lock().unwrap();
    assert!((0..asked).all(|number| counts.get(&number) == Some(&1)), "each took effect once");
}

#[test]
fn a_connection_whose_keys_wore_out_is_replaced_and_the_session_goes_on() {
    let (_house, server, console) = pair();
    let mut client = Client::secured(server.address, console, None);
    client.channel.replace_after(100);
    let total = 1000u64;
    for number in 0..total {
        let once = call(number, COUNT, &number.to_le_bytes(), Buffer::zeroed(9000), 0);
        client.channel.submit(Call { once: true, ..once });
    }
    client.until("all answers", |c| c.answers.len() as u64 == total);
    assert!(client.resumed >= 3, "{} times", client.resumed);
    assert_eq!(client.opened, 1);
    assert!(client.lost.iter().all(|reason| reason.contains("keys are used up")), "{:?}", client.lost);
    let counts = server.counts.lock().unwrap();
    assert!((0..total).all(|number| counts.get(&number) == Some(&1)), "each took effect once");
}

#[test]
fn a_revoked_node_loses_its_live_connection_and_gets_no_other() {
    let mut house = Household::new();
    let (desk, shed) = (house.console("desk"), house.console("shed"));
    let identity = Reloading::in_memory(house.agent("attic"));
    let server = Server::secured(Limits::default(), Security::Tls(identity.clone()));
    let mut revoked = Client::secured(server.address, security(&desk), None);
    let mut other = Client::secured(server.address, security(&shed), None);
    works(&mut revoked);
    works(&mut other);
    house.revoke(desk.serial());
    assert!(identity.take_crl(&house.crl()).unwrap().newer);
    assert_eq!(server.sessions.revoke(|peer| identity.revokes(peer)), ["desk"]);
    revoked.until("the end and the refusal", |c| c.lost.len() >= 2);
    assert!(revoked.lost[0].contains("The certificate of desk was revoked"), "{:?}", revoked.lost);
    assert!(revoked.lost[1].contains("certificate was revoked"), "{:?}", revoked.lost);
    let closed = server.closed.lock().unwrap().clone();
    assert_eq!(closed[0], "The certificate of desk was revoked, has ended, or is of another household");
    works(&mut other);
    assert_eq!((other.opened, other.lost.len()), (1, 0), "{:?}", other.lost);
    assert_eq!(server.sessions.revoke(|_| true), ["shed"], "only who is there is found");
}

#[test]
fn an_answer_that_is_not_out_when_its_asker_is_revoked_stays_here() {
    let mut house = Household::new();
    let desk = house.console("desk");
    let identity = Reloading::in_memory(house.agent("attic"));
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut client = Client::secured(listener.local_addr().unwrap(), security(&desk), None);
    client.channel.submit(call(1, ECHO, b"x", Buffer::empty(), 10));
    // Both sides by this one thread, so that it is known what is out.
    let mut accepted = None;
    listener.set_nonblocking(true).unwrap();
    client.until("the connection", |_| {
        accepted = listener.accept().ok();
        accepted.is_some()
    });
    let (mut ring, mut events) = (Ring::new(64).unwrap(), Vec::new());
    let sessions = Sessions::new("test server", Limits::default());
    let (socket, _) = accepted.unwrap();
    let secured = Security::Tls(identity.clone());
    let mut connection = Connection::new(socket, sessions.clone(), &secured, &mut ring);
    let mut serve = |client: &mut Client, connection: &mut Connection| {
        connection.tick(&mut ring, Instant::now(), &mut events);
        client.pump(Duration::from_millis(1));
        ring.wait(Some(Duration::from_millis(1))).unwrap();
        while let Some(completion) = ring.reap() {
            connection.complete(&mut ring, completion, &mut events);
        }
        std::mem::take(&mut events)
    };
    let request = wait_for("the request", || {
        serve(&mut client, &mut connection).into_iter().find_map(|event| match event {
            server::Event::Request(request) => Some(request),
            _ => None,
        })
    });
    house.revoke(desk.serial());
    identity.take_crl(&house.crl()).unwrap();
    connection.answer(request.id, Status::OK, b"for nobody who was revoked", Buffer::empty());
    assert_eq!(sessions.revoke(|peer| identity.revokes(peer)), ["desk"]);
    wait_for("the end", || {
        serve(&mut client, &mut connection);
        (!client.lost.is_empty()).then_some(())
    });
    assert!(client.lost[0].contains("The certificate of desk was revoked"), "{:?}", client.lost);
    assert!(client.answers.is_empty(), "{:?}", client.answers);
}

#[test]
fn a_connection_does_not_outlive_the_certificate_by_which_it_was_made() {
    let house = Household::new();
    let life = Duration::from_secs(6);
    let attic = house.short_lived("attic", Role::Agent.into(), life);
    let server = Server::secured(Limits::default(), security(&attic));
    let mut client = Client::secured(server.address, security(&house.console("desk")), None);
    works(&mut client);
    client.until("the end", |c| !c.lost.is_empty());
    assert!(client.lost[0].contains("The certificate of attic"), "{:?}", client.lost);
    assert!(std::time::SystemTime::now() >= attic.expires(), "not before its time");

    let identity = Reloading::in_memory(house.agent("attic"));
    let server = Server::secured(Limits::default(), Security::Tls(identity.clone()));
    let desk = house.short_lived("desk", Role::Console.into(), life);
    let mut client = Client::secured(server.address, security(&desk), None);
    works(&mut client);
    wait_for("the end", || (server.sessions.revoke(|peer| identity.revokes(peer)) == ["desk"]).then_some(()));
    client.until("the end and the refusal", |c| c.lost.len() >= 2);
    assert!(client.lost[0].contains("The certificate of desk"), "{:?}", client.lost);
}

#[test]
fn who_goes_to_another_household_keeps_no_connection_of_the_old_one() {
    let (old, new) = (Household::new(), Household::new());
    let folder = old.folder(&old.agent("attic"));
    let identity = Reloading::load(&folder).unwrap();
    let server = Server::secured(Limits::default(), Security::Tls(identity.clone()));
    let mut client = Client::secured(server.address, security(&old.console("desk")), None);
    works(&mut client);
    let joined = new.folder(&new.agent("attic"));
    for name in ["ca.pem", "node.pem", "node.key", "crl.pem"] {
        std::fs::copy(joined.join(name), folder.join(name)).unwrap();
    }
    assert!(identity.reload().unwrap());
    assert_eq!(server.sessions.revoke(|peer| identity.revokes(peer)), ["desk"]);
    client.until("the end", |c| !c.lost.is_empty());
    assert!(client.lost[0].contains("of another household"), "{:?}", client.lost);
}

#[test]
fn an_agent_that_is_revoked_is_left_by_who_learns_it() {
    let mut house = Household::new();
    let attic = house.agent("attic");
    let server = Server::secured(Limits::default(), security(&attic));
    let identity = Reloading::in_memory(house.console("desk"));
    let mut client = Client::secured(server.address, Security::Tls(identity.clone()), None);
    works(&mut client);
    house.revoke(attic.serial());
    identity.take_crl(&house.crl()).unwrap();
    client.until("the end and the refusal", |c| c.lost.len() >= 2);
    assert!(client.lost[0].contains("The certificate of attic was revoked"), "{:?}", client.lost);
    assert!(client.lost[1].contains("was revoked"), "{:?}", client.lost);
}

#[test]
fn an_address_that_leads_to_another_agent_than_at_first_is_left_alone_even_by_a_new_session() {
    let (house, server, console) = pair();
    let (address, mut client) = (server.address, Client::secured(server.address, console, None));
    works(&mut client);
    drop(server);
    let thief = Server::secured_at(&address.to_string(), security(&house.agent("cellar")));
    let found_out =
        |client: &Client| client.lost.iter().any(|reason| reason.contains("The node here is cellar"));
    client.until("the refusal", found_out);
    client.channel.close(&mut client.ring);
    client.lost.clear();
    client.channel.reopen();
    client.until("the refusal", found_out);
    assert_eq!((client.opened, client.resumed), (1, 0));
    drop(thief);
    let _back = Server::secured_at(&address.to_string(), security(&house.agent("attic")));
    works(&mut client);
}

#[test]
fn a_node_of_the_expected_name_that_is_no_agent_is_not_believed() {
    let house = Household::new();
    let server = Server::secured(Limits::default(), security(&house.console("attic")));
    let mut client = Client::secured(server.address, security(&house.console("desk")), Some("attic"));
    client.until("the refusal", |c| !c.lost.is_empty());
    assert_eq!(
        (client.lost[0].as_str(), client.opened),
        ("The node attic is no agent by its certificate", 0)
    );
}

/// A hello of version 1 that asks for session 77 in its life `serial`.
fn hello(serial: u64) -> Vec<u8> {
    let mut bytes = b"omega\r\n\x1a".to_vec();
    bytes.extend([1, 0, 1, 0, 92, 0, 0, 0, 1, 0, 4, 0]);
    bytes.extend([0; 16]); // requests, bytes, window
    bytes.extend(1000u32.to_le_bytes());
    bytes.extend(serial.to_le_bytes());
    bytes.extend([0; 8]);
    bytes.extend(77u128.to_le_bytes());
    bytes.extend([1; 32]); // instance, boot
    bytes.extend(b"desk");
    bytes
}

#[test]
fn another_nodes_session_cannot_be_resumed_cut_or_read() {
    let (house, server, console) = pair();
    // Stock TLS, so that the records are also those of somebody else's program.
    let mut first = dial(server.address, stock(&console));
    first.write_all(&hello(0)).unwrap();
    let mut theirs = vec![0; 16 + 88];
    first.read_exact(&mut theirs).unwrap();
    let serial = u64::from_le_bytes(theirs[16 + 24..16 + 32].try_into().unwrap());
    assert_ne!(serial, 0);
    let mut thief = dial(server.address, stock(&security(&house.console("shed"))));
    thief.write_all(&hello(serial)).unwrap();
    let mut said = Vec::new();
    thief.read_to_end(&mut said).expect("it ends with a close of TLS");
    let text = b"The session belongs to another node";
    assert!(said.windows(text.len()).any(|window| window == text), "{said:?}");
    assert_eq!(&said[16 + 4..16 + 8], [0; 4], "it may ask nothing");
    // The owner's connection is still there, and its session goes on over another one.
    first.get_ref().set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    let mut rest = vec![0; 100];
    loop {
        match first.read(&mut rest) {
            Err(e) if matches!(e.kind(), std::io::ErrorKind::WouldBlock) => break,
            Ok(n) if n > 0 => {}
            other => panic!("the owner's connection is cut: {other:?}"),
        }
    }
    let mut again = dial(server.address, stock(&console));
    again.write_all(&hello(serial)).unwrap();
    again.read_exact(&mut theirs).unwrap();
    assert_eq!(theirs[16 + 1], 1, "resumed");
}
