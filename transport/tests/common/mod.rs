//! A server for tests, on real sockets, and a client that pumps its ring.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)] // each test binary uses its own part

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use transport::Carrier;
use transport::buffer::Buffer;
use transport::channel::{Answer, Call, Channel, Config, Event, Names};
use transport::identity::{Peer, Security};
use transport::metrics::{Metrics, Operations, Recorder, Registration, Registry};
use transport::ring::Ring;
use transport::server::{self, Connection, Limits, Request, Sessions};
use transport::wire::{Body, Class, Status};

/// Answers with the request's body, and `answer_len` bytes of the request's first body byte.
pub const ECHO: u16 = 256;
/// Counts that it was carried out, by the number in its body.
pub const COUNT: u16 = 257;
/// As `COUNT`, answered a little later.
pub const SLOW: u16 = 258;
/// Never answered until the connection is closed.
pub const NEVER: u16 = 259;

/// Their names.
pub const OPERATIONS: Operations =
    Operations(&[(ECHO, "echo"), (COUNT, "count"), (SLOW, "slow"), (NEVER, "never")]);

/// Who proved to be connected, and by what.
pub type Met = (Option<Peer>, Carrier);

/// A server and its threads.
pub struct Server {
    pub address: SocketAddr,
    pub sessions: Arc<Sessions>,
    /// How often each number was carried out.
    pub counts: Arc<Mutex<std::collections::HashMap<u64, u32>>>,
    /// Sockets of all connections, to cut them.
    pub sockets: Arc<Mutex<Vec<TcpStream>>>,
    /// Why connections ended.
    pub closed: Arc<Mutex<Vec<String>>>,
    /// Who proved to be connected, and by what.
    pub opened: Arc<Mutex<Vec<Met>>>,
    pub stop: Arc<AtomicBool>,
    pub most_in_flight: Arc<AtomicU64>,
    /// What its connections count.
    pub registry: Arc<Registry>,
    accept: Option<JoinHandle<()>>,
}

impl Server {
    pub fn start(limits: Limits) -> Self {
        Self::at("127.0.0.1:0", limits)
    }

    /// With TLS, as the identity says.
    pub fn secured(limits: Limits, security: Security) -> Self {
        Self::with("127.0.0.1:0", limits, security)
    }

    /// With TLS, at this address.
    pub fn secured_at(address: &str, security: Security) -> Self {
        Self::with(address, Limits::default(), security)
    }

    pub fn at(address: &str, limits: Limits) -> Self {
        Self::with(address, limits, Security::Plain)
    }

    fn with(address: &str, limits: Limits, security: Security) -> Self {
        let deadline = Instant::now() + Duration::from_secs(5);
        let listener = loop {
            match TcpListener::bind(address) {
                Ok(listener) => break listener,
                Err(e) if Instant::now() > deadline => panic!("cannot listen at {address}: {e}"),
                Err(_) => std::thread::sleep(Duration::from_millis(10)),
            }
        };
        let address = listener.local_addr().expect("it is bound");
        let mut server = Self {
            address,
            sessions: Sessions::new("test server", limits),
            counts: Arc::default(),
            sockets: Arc::default(),
            closed: Arc::default(),
            opened: Arc::default(),
            stop: Arc::default(),
            most_in_flight: Arc::default(),
            registry: Registry::new(4),
            accept: None,
        };
        let (registry, sessions, counts, sockets, closed, opened, stop, most) = (
            server.registry.clone(),
            server.sessions.clone(),
            server.counts.clone(),
            server.sockets.clone(),
            server.closed.clone(),
            server.opened.clone(),
            server.stop.clone(),
            server.most_in_flight.clone(),
        );
        server.accept = Some(std::thread::spawn(move || {
            let mut threads = Vec::new();
            while let Ok((socket, _)) = listener.accept() {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                sockets.lock().unwrap().push(socket.try_clone().unwrap());
                let (registry, sessions, counts, closed, stop, most) = (
                    registry.clone(),
                    sessions.clone(),
                    counts.clone(),
                    closed.clone(),
                    stop.clone(),
                    most.clone(),
                );
                let (security, opened) = (security.clone(), opened.clone());
                threads.push(std::thread::spawn(move || {
                    serve(socket, &registry, sessions, &security, &counts, &closed, &opened, &stop, &most);
                }));
            }
            for thread in threads {
                thread.join().expect("a connection's thread does not panic");
            }
        }));
        server
    }

    pub fn cut_all(&self) {
        for socket in self.sockets.lock().unwrap().drain(..) {
            let _ = socket.shutdown(std::net::Shutdown::Both);
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.cut_all();
        let _ = TcpStream::connect(self.address);
        if let Some(accept) = self.accept.take() {
            let result = accept.join();
            if !std::thread::panicking() {
                result.expect("the server's threads do not panic");
            }
        }
    }
}

#[allow(clippy::too_many_arguments)] // one for each thing that a test looks at
fn serve(
    socket: TcpStream,
    registry: &Arc<Registry>,
    sessions: Arc<Sessions>,
    security: &Security,
    counts: &Mutex<std::collections::HashMap<u64, u32>>,
    closed: &Mutex<Vec<String>>,
    opened: &Mutex<Vec<Met>>,
    stop: &AtomicBool,
    most: &AtomicU64,
) {
    let mut ring = Ring::new(64).expect("io_uring works here");
    let mut connection = Connection::new(socket, sessions, security, &mut ring);
    let recorder = Recorder::new(OPERATIONS);
    let metrics = recorder.metrics();
    connection.record(recorder);
    let mut registered: Option<Registration> = None;
    let mut events = Vec::new();
    let mut later: Vec<(Instant, Request)> = Vec::new();
    let mut never: Vec<Request> = Vec::new();
    let mut over = false;
    loop {
        let now = Instant::now();
        while later.first().is_some_and(|(at, _)| *at <= now) {
            let (_, request) = later.remove(0);
            *counts.lock().unwrap().entry(number(&request.body)).or_default() += 1;
            connection.answer(request.id, Status::OK, &request.body, Buffer::empty());
        }
        let due = connection.tick(&mut ring, now, &mut events);
        if events.is_empty() {
            if connection.is_finished() {
                break;
            }
            let due = due.into_iter().chain(later.first().map(|(at, _)| *at)).min();
            let wait = due.map_or(Duration::from_millis(100), |due| due.saturating_duration_since(now));
            ring.wait(Some(wait.min(Duration::from_millis(100)))).expect("it waits");
        }
        while let Some(completion) = ring.reap() {
            assert!(connection.complete(&mut ring, completion, &mut events));
        }
        if stop.load(Ordering::Relaxed) && !over {
            connection.stop("the test is over");
        }
        for event in events.drain(..) {
            match event {
                server::Event::Opened { name, peer, carrier, .. } => {
                    registered = Some(registry.add(&name, metrics.clone()));
                    opened.lock().unwrap().push((peer, carrier));
                }
                server::Event::Carrier(_) | server::Event::Cancel { .. } => {}
                server::Event::Closed { reason } => {
                    closed.lock().unwrap().push(reason);
                    over = true;
                }
                server::Event::Request(request) => match request.opcode {
                    ECHO => {
                        let answer = if request.payload.is_empty() {
                            let answer = connection.buffer(request.answer_len);
                            answer.fill(request.body.first().copied().unwrap_or(0));
                            answer
                        } else {
                            request.payload.slice(0, request.answer_len.min(request.payload.len())).unwrap()
                        };
                        connection.answer(request.id, Status::OK, &request.body, answer);
                    }
                    COUNT => {
                        *counts.lock().unwrap().entry(number(&request.body)).or_default() += 1;
                        connection.answer(request.id, Status::OK, &request.body, Buffer::empty());
                    }
                    SLOW => later.push((Instant::now() + Duration::from_millis(5), request)),
                    NEVER => never.push(request),
                    _ => connection.answer(request.id, Status::UNKNOWN_OPERATION, &[], Buffer::empty()),
                },
            }
        }
        if over {
            for request in never.drain(..) {
                connection.answer(request.id, Status::CANCELLED, &[], Buffer::empty());
            }
        }
        most.fetch_max(connection.in_flight() as u64, Ordering::Relaxed);
    }
    drop(registered);
}

pub fn number(body: &[u8]) -> u64 {
    body.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

/// A channel, its ring and what happened to it.
pub struct Client {
    pub ring: Ring,
    pub channel: Channel,
    pub answers: Vec<Answer>,
    pub opened: u32,
    pub resumed: u32,
    pub met: Option<Met>,
    pub lost: Vec<String>,
    /// A new session is ready after so many answers.
    pub setup_first: usize,
    /// What its channel counts.
    pub metrics: Arc<Metrics>,
}

impl Client {
    pub fn new(address: SocketAddr) -> Self {
        Self::named(&address.to_string(), Duration::from_secs(2))
    }

    /// With TLS, as the identity says; the server must be `node`.
    pub fn secured(address: SocketAddr, security: Security, node: Option<&str>) -> Self {
        Self::with(&address.to_string(), Duration::from_secs(2), security, node)
    }

    pub fn named(address: &str, dead_after: Duration) -> Self {
        Self::with(address, dead_after, Security::Plain, None)
    }

    fn with(address: &str, dead_after: Duration, security: Security, node: Option<&str>) -> Self {
        let mut ring = Ring::new(64).expect("io_uring works here");
        let config = Config {
            address: address.to_owned(),
            name: "test client".to_owned(),
            security,
            node: node.map(str::to_owned),
            dead_after,
            retry_first: Duration::from_millis(2),
            retry_most: Duration::from_millis(50),
            transport: Default::default(),
        };
        let names = Names::of(address).expect("a thread");
        let mut channel = Channel::new(config, names, &mut ring);
        let recorder = Recorder::new(OPERATIONS);
        let metrics = recorder.metrics();
        channel.record(recorder);
        let (answers, lost) = (Vec::new(), Vec::new());
        Self { ring, channel, answers, opened: 0, resumed: 0, met: None, lost, setup_first: 0, metrics }
    }

    /// One round of the ring, of at most `most`.
    pub fn pump(&mut self, most: Duration) {
        let mut events = Vec::new();
        let now = Instant::now();
        let due = self.channel.tick(&mut self.ring, now, &mut events);
        if events.is_empty() {
            let wait = due.map_or(most, |due| due.saturating_duration_since(now).min(most));
            self.ring.wait(Some(wait)).expect("it waits");
        }
        while let Some(completion) = self.ring.reap() {
            assert!(self.channel.complete(&mut self.ring, completion, &mut events));
        }
        for event in events {
            match event {
                Event::Opened { peer, carrier, .. } => {
                    self.met = Some((peer, carrier));
                    self.opened += 1;
                    if self.setup_first == 0 {
                        self.channel.ready();
                    }
                }
                Event::Carrier { .. } => {}
                Event::Resumed { .. } => self.resumed += 1,
                Event::Lost { reason } => self.lost.push(reason),
                Event::Answer(answer) => {
                    self.answers.push(answer);
                    if self.setup_first == self.answers.len() {
                        self.channel.ready();
                    }
                }
            }
        }
    }

    /// Pumps until `done`, at most ten seconds.
    pub fn until(&mut self, what: &str, mut done: impl FnMut(&Self) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while !done(self) {
            assert!(Instant::now() < deadline, "{what} did not happen; lost: {:?}", self.lost);
            self.pump(Duration::from_millis(20));
        }
    }
}

pub fn call(tag: u64, opcode: u16, body: &[u8], payload: Buffer, answer_len: usize) -> Call {
    Call {
        payload,
        answer: Buffer::zeroed(answer_len),
        ..Call::new(tag, opcode, Class::Normal, Body::from_slice(body))
    }
}

/// What `look` finds, at most ten seconds later.
pub fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "{what} did not come");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Asks for payloads of all `sizes` again and again, each once sent along and once made there, and checks that each
/// answer holds what it should. Returns how many were asked for, tagged from 0 on.
pub fn ask_for_sizes(client: &mut Client, sizes: &[usize]) -> u64 {
    let mut asked = 0;
    for round in 0..10 {
        for (i, size) in sizes.iter().copied().enumerate() {
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
    asked
}
