//! Lines over real sockets.
#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use transport::buffer::Buffer;
use transport::channel::Config;
use transport::identity::Security;
use transport::line::{Answering, HELD, Hear, Sender, Serving, protocol, thread};
use transport::ring::Ring;
use transport::server::{Connection, Event, Limits, Sessions};
use transport::wire::{Body, Status};

type At = Box<dyn FnMut(u64) + Send>;

/// What an end heard.
struct Ear {
    sender: Sender,
    /// Numbers that came in messages, in order.
    heard: Mutex<Vec<u64>>,
    news: Mutex<Vec<String>>,
    /// Each message is answered with another.
    answers: bool,
    /// What to do at so many messages.
    at: Mutex<Option<At>>,
    count: AtomicU64,
}

impl Ear {
    fn new(answers: bool) -> Arc<Self> {
        let sender = Sender::new().unwrap();
        let (heard, news, at) = (Mutex::default(), Mutex::default(), Mutex::default());
        Arc::new(Self { sender, heard, news, answers, at, count: AtomicU64::new(0) })
    }

    fn until(&self, what: &str, done: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !done(self) {
            let news = self.news.lock().unwrap();
            assert!(Instant::now() < deadline, "{what} did not happen; {:?}", news.last());
            drop(news);
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn count(&self) -> u64 {
        self.count.load(Ordering::SeqCst)
    }
}

impl Hear for Ear {
    fn hear(&self, body: &[u8], payload: Option<Buffer>) {
        let number = u64::from_le_bytes(*body.first_chunk().unwrap());
        let len = number as usize % 5 * 3000;
        let payload = payload.unwrap_or_default().to_vec();
        assert_eq!(payload.len(), len);
        assert!(payload.iter().all(|byte| *byte == number as u8));
        self.heard.lock().unwrap().push(number);
        if let Some(at) = &mut *self.at.lock().unwrap() {
            at(number);
        }
        if self.answers {
            self.sender.send(body, Some(self.sender.payload(&payload)));
        }
        self.count.fetch_add(1, Ordering::SeqCst);
    }

    fn away(&self, why: &str) {
        self.news.lock().unwrap().push(format!("away: {why}"));
    }

    fn back(&self) {
        self.news.lock().unwrap().push("back".to_owned());
    }

    fn over(&self, why: &str) {
        self.news.lock().unwrap().push(format!("over: {why}"));
    }
}

type Lines = Arc<Mutex<HashMap<u128, Arc<Answering>>>>;

/// Serves lines whose messages `ear` hears.
struct Server {
    address: SocketAddr,
    sockets: Arc<Mutex<Vec<TcpStream>>>,
    stop: Arc<AtomicBool>,
    accept: Option<JoinHandle<()>>,
}

impl Server {
    fn start(address: &str, ear: &Arc<Ear>) -> Self {
        let listener = TcpListener::bind(address).unwrap();
        let address = listener.local_addr().unwrap();
        let sessions = Sessions::new("test server", Limits::default());
        let (sockets, stop, lines) =
            (Arc::<Mutex<Vec<TcpStream>>>::default(), Arc::default(), Lines::default());
        let (all, stopped, ear) = (Arc::clone(&sockets), Arc::clone(&stop), Arc::clone(ear));
        let accept = std::thread::spawn(move || {
            let mut threads = Vec::new();
            while let Ok((socket, _)) = listener.accept() {
                if AtomicBool::load(&stopped, Ordering::SeqCst) {
                    break;
                }
                all.lock().unwrap().push(socket.try_clone().unwrap());
                let (sessions, lines, ear) = (Arc::clone(&sessions), Arc::clone(&lines), Arc::clone(&ear));
                threads.push(std::thread::spawn(move || serve(socket, sessions, &lines, &ear)));
            }
            threads.into_iter().for_each(|thread| thread.join().unwrap());
        });
        Self { address, sockets, stop, accept: Some(accept) }
    }

    fn cut_all(sockets: &Mutex<Vec<TcpStream>>) {
        for socket in sockets.lock().unwrap().drain(..) {
            let _ = socket.shutdown(std::net::Shutdown::Both);
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        Self::cut_all(&self.sockets);
        let _ = TcpStream::connect(self.address);
        let result = self.accept.take().unwrap().join();
        if !std::thread::panicking() {
            result.unwrap();
        }
    }
}

fn serve(socket: TcpStream, sessions: Arc<Sessions>, lines: &Lines, ear: &Arc<Ear>) {
    let mut ring = Ring::new(64).unwrap();
    let mut connection = Connection::new(socket, sessions, &Security::Plain, &mut ring);
    let (mut events, mut session, mut serving) = (Vec::new(), 0, None::<Serving>);
    loop {
        let now = Instant::now();
        if let Some(serving) = &mut serving {
            serving.tick(&mut ring, &mut connection);
        }
        let due = connection.tick(&mut ring, now, &mut events);
        if events.is_empty() {
            if connection.is_finished() {
                break;
            }
            ring.wait(due.map(|due| due.saturating_duration_since(now))).unwrap();
        }
        while let Some(completion) = ring.reap() {
            let ours = serving.as_mut().is_some_and(|serving| serving.complete(completion));
            let _ = ours || connection.complete(&mut ring, completion, &mut events);
        }
        for event in events.drain(..) {
            match event {
                Event::Opened { session: number, .. } => session = number,
                Event::Closed { reason } => {
                    if let Some(serving) = serving.take() {
                        serving.closed(&mut ring, &mut connection, &reason);
                    }
                }
                Event::Request(request) if request.opcode == protocol::opcode::OPEN => {
                    if request.body.as_slice() == b"nothing" {
                        let why = protocol::reason("there is nothing here");
                        connection.answer(request.id, protocol::status::ENDED, &why, Buffer::empty());
                        continue;
                    }
                    let line = Answering::new(ear.sender.clone(), Arc::clone(ear) as Arc<dyn Hear>);
                    lines.lock().unwrap().entry(session).or_insert(line);
                    connection.answer(request.id, Status::OK, &protocol::welcome(HELD), Buffer::empty());
                }
                Event::Request(request) => {
                    if serving.is_none() {
                        let line = Arc::clone(lines.lock().unwrap().get(&session).unwrap());
                        serving = Some(Serving::new(line, &mut ring));
                    }
                    serving.as_mut().unwrap().request(&mut connection, &request);
                }
                Event::Carrier(_) | Event::Cancel { .. } => {}
            }
        }
    }
}

fn config(address: SocketAddr) -> Config {
    Config {
        address: address.to_string(),
        name: "test".to_owned(),
        security: Security::Plain,
        node: None,
        dead_after: Duration::from_secs(5),
        retry_first: Duration::from_millis(1),
        retry_most: Duration::from_millis(20),
        transport: Default::default(),
    }
}

fn dial(address: SocketAddr, ear: &Arc<Ear>, purpose: &[u8]) -> thread::Driven {
    let hear = Arc::clone(ear) as Arc<dyn Hear>;
    thread::start("line", config(address), Body::from_slice(purpose), ear.sender.clone(), hear, || ())
        .unwrap()
}

fn send(ear: &Ear, number: u64) {
    let payload = vec![number as u8; number as usize % 5 * 3000];
    ear.sender.send(&number.to_le_bytes(), Some(ear.sender.payload(&payload)));
}

#[test]
fn all_messages_come_once_and_in_order_both_ways_however_often_the_connection_is_cut() {
    const COUNT: u64 = 6000;
    let (here, there) = (Ear::new(false), Ear::new(false));
    let server = Server::start("127.0.0.1:0", &there);
    let cuts = Arc::new(AtomicU64::new(0));
    // By what came, not by the clock: a quick machine would be done before.
    for (ear, every) in [(&here, 701), (&there, 433)] {
        let (sockets, cuts) = (Arc::clone(&server.sockets), Arc::clone(&cuts));
        *ear.at.lock().unwrap() = Some(Box::new(move |number| {
            if number % every == every - 1 {
                cuts.fetch_add(1, Ordering::SeqCst);
                Server::cut_all(&sockets);
            }
        }));
    }
    let line = dial(server.address, &here, b"test");
    std::thread::scope(|scope| {
        for ear in [&here, &there] {
            scope.spawn(move || {
                for number in 0..COUNT {
                    ear.until("room", |ear| ear.sender.waiting() < 300);
                    send(ear, number);
                }
            });
        }
    });
    here.until("all there", |_| here.count() == COUNT && there.count() == COUNT);
    for ear in [&here, &there] {
        assert_eq!(*ear.heard.lock().unwrap(), (0..COUNT).collect::<Vec<_>>());
    }
    assert!(cuts.load(Ordering::SeqCst) > 10);
    let news = here.news.lock().unwrap();
    assert!(news.iter().filter(|news| *news == "back").count() > 5, "{news:?}");
    assert!(!news.iter().any(|news| news.starts_with("over")), "{news:?}");
    drop(news);
    drop(line);
}

#[test]
fn a_line_is_over_when_the_other_side_was_started_anew_when_it_is_refused_and_when_it_is_ended() {
    let (here, there) = (Ear::new(false), Ear::new(true));
    let server = Server::start("127.0.0.1:0", &there);
    let address = server.address;
    let line = dial(address, &here, b"test");
    send(&here, 7);
    here.until("an answer", |ear| ear.count() == 1);
    drop(server);
    let server = Server::start(&address.to_string(), &Ear::new(true));
    let said = |ear: &Ear, what: &str| ear.news.lock().unwrap().iter().any(|news| news == what);
    here.until("the end", |ear| said(ear, "over: the other side was started anew"));
    assert!(here.sender.is_over());
    drop(line);

    let refused = Ear::new(false);
    let line = dial(address, &refused, b"nothing");
    refused.until("the refusal", |ear| said(ear, "over: there is nothing here"));
    drop(line);
    drop(server);

    let (here, there) = (Ear::new(false), Ear::new(false));
    let server = Server::start("127.0.0.1:0", &there);
    let line = dial(server.address, &here, b"test");
    send(&here, 3);
    there.until("a message", |ear| ear.count() == 1);
    send(&there, 5);
    there.sender.end("the node is drained");
    here.until("the end", |ear| said(ear, "over: the node is drained"));
    assert_eq!(*here.heard.lock().unwrap(), [5], "what was sent before the end came before it");
    drop(line);
}
