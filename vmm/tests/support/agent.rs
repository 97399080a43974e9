//! An agent as guests and tools see it, in the test's own process.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use devices::disk::Geometry;
use devices::disk::volume::{Acquired, Opened, opcode};
use transport::identity::Security;
use transport::ring::Ring;
use transport::server::{Connection, Event, Limits, Sessions};
use transport::wire::Status;

/// An agent with a volume that nobody reads: it gives the lease and has it renewed often.
pub fn start() -> SocketAddr {
    start_counting(Arc::default())
}

/// The same, and counts echoes.
pub fn start_counting(echoes: Arc<AtomicU64>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address");
    let sessions = Sessions::new("attic", Limits::default());
    std::thread::spawn(move || {
        for socket in listener.incoming().map_while(Result::ok) {
            let (sessions, echoes) = (Arc::clone(&sessions), Arc::clone(&echoes));
            std::thread::spawn(move || serve(socket, sessions, &echoes));
        }
    });
    address
}

fn serve(socket: TcpStream, sessions: Arc<Sessions>, echoes: &AtomicU64) {
    let mut ring = Ring::new(16).expect("io_uring works here");
    let mut connection = Connection::new(socket, sessions, &Security::Plain, &mut ring);
    let mut events = Vec::new();
    while !connection.is_finished() {
        let now = Instant::now();
        let due = connection.tick(&mut ring, now, &mut events);
        if events.is_empty() {
            ring.wait(due.map(|due| due.saturating_duration_since(now))).expect("it waits");
        }
        while let Some(completion) = ring.reap() {
            connection.complete(&mut ring, completion, &mut events);
        }
        for event in events.drain(..) {
            let Event::Request(request) = event else { continue };
            let ttl = Duration::from_millis(60);
            let geometry = Geometry {
                size: 1 << 20,
                block_size: 512,
                read_only: false,
                discard: false,
                write_zeroes: false,
            };
            let body = match request.opcode {
                opcode::ACQUIRE => Acquired { epoch: 1, ttl }.encode(),
                opcode::OPEN => Opened { geometry, identity: 7 }.encode(),
                _ => Default::default(),
            };
            let payload = match request.opcode {
                opcode::ECHO => {
                    echoes.fetch_add(1, Ordering::Relaxed);
                    request.payload.slice(0, request.answer_len)
                }
                _ => None,
            };
            let payload = payload.unwrap_or_else(|| connection.buffer(request.answer_len));
            connection.answer(request.id, Status::OK, &body, payload);
        }
    }
}
