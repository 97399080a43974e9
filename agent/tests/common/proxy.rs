//! A way to an agent that can be cut.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

/// A way to the agent that can be cut.
pub struct Proxy {
    pub address: String,
    open: Arc<Mutex<Vec<TcpStream>>>,
    passing: Arc<AtomicBool>,
}

impl Proxy {
    pub fn new(to: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("bound").to_string();
        let open: Arc<Mutex<Vec<TcpStream>>> = Arc::default();
        let passing = Arc::new(AtomicBool::new(true));
        let (to, list, passes) = (to.to_owned(), Arc::clone(&open), Arc::clone(&passing));
        std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let Ok(server) = TcpStream::connect(&to) else { continue };
                if !passes.load(Ordering::SeqCst) {
                    continue;
                }
                for (from, to) in [(&client, &server), (&server, &client)] {
                    let (from, to) = (from.try_clone().expect("a copy"), to.try_clone().expect("a copy"));
                    list.lock().expect("the list").push(from.try_clone().expect("a copy"));
                    std::thread::spawn(move || pass(&from, &to));
                }
            }
        });
        Self { address, open, passing }
    }

    pub fn cut(&self) {
        self.passing.store(false, Ordering::SeqCst);
        for stream in self.open.lock().expect("the list").drain(..) {
            stream.shutdown(Shutdown::Both).ok();
        }
    }

    pub fn heal(&self) {
        self.passing.store(true, Ordering::SeqCst);
    }
}

fn pass(mut from: &TcpStream, mut to: &TcpStream) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        if to.write_all(&buffer[..count]).is_err() {
            break;
        }
    }
    from.shutdown(Shutdown::Both).ok();
    to.shutdown(Shutdown::Both).ok();
}
