//! TCP over loopback with plain blocking sockets, one thread on each side.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::unistd::{Pid, gettid};

use super::placed;
use crate::stats::{median, micros, rate};

/// Listens, hands the one connection that comes to `serve` on a thread of its own, and connects to it.
/// The thread ends when the connection does.
pub(super) fn connected(serve: impl FnOnce(TcpStream) + Send + 'static) -> Result<TcpStream> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let address = listener.local_addr()?;
    std::thread::Builder::new().name("floor".into()).spawn(move || {
        if let Ok((socket, _)) = listener.accept() {
            let _ = socket.set_nodelay(true);
            serve(socket);
        }
    })?;
    let socket = TcpStream::connect(address)?;
    socket.set_nodelay(true)?;
    Ok(socket)
}

/// So many bytes there, so many back.
///
/// Where the scheduler puts the two threads decides more than all else: on one CPU each wakes the other in place;
/// on two an idle CPU has to be woken, which costs several times as much where CPUs are virtual. A floor that
/// depended on that luck would flatter us, so both are measured and the better one counts.
pub struct PingPong {
    socket: TcpStream,
    server: Pid,
    request: Vec<u8>,
    response: Vec<u8>,
}

impl PingPong {
    /// A connection over which requests of `request` bytes are answered with `response` bytes.
    ///
    /// # Errors
    /// Loopback does not work.
    pub fn new(request: usize, response: usize) -> Result<Self> {
        let (tell, told) = std::sync::mpsc::channel();
        let socket = connected(move |mut socket| {
            let (mut question, answer) = (vec![0; request], vec![0x5a; response]);
            let _ = tell.send(gettid());
            while socket.read_exact(&mut question).is_ok() && socket.write_all(&answer).is_ok() {}
        })?;
        let server = told.recv().context("The server's thread ended")?;
        Ok(Self { socket, server, request: vec![1; request], response: vec![0; response] })
    }

    /// Goes back and forth for `slice`, half of it with both threads on one CPU; the times of the better half in
    /// microseconds.
    ///
    /// # Errors
    /// The connection ends, or threads may not be placed.
    pub fn run(&mut self, slice: Duration) -> Result<Vec<f64>> {
        let free = self.run_placed(slice / 2)?;
        let server = self.server;
        let placed = placed::together(&[server], || self.run_placed(slice / 2))??;
        Ok(if median(&placed) < median(&free) { placed } else { free })
    }

    fn run_placed(&mut self, slice: Duration) -> Result<Vec<f64>> {
        let (start, mut times) = (Instant::now(), Vec::new());
        while start.elapsed() < slice {
            let before = Instant::now();
            self.socket.write_all(&self.request)?;
            self.socket.read_exact(&mut self.response)?;
            times.push(micros(before.elapsed()));
        }
        Ok(times)
    }
}

/// Bytes that flow one way as fast as they can.
pub struct Stream {
    socket: TcpStream,
    buffer: Vec<u8>,
}

impl Stream {
    /// A connection whose other side writes `chunk` bytes again and again.
    ///
    /// # Errors
    /// Loopback does not work.
    pub fn new(chunk: usize) -> Result<Self> {
        let socket = connected(move |mut socket| {
            // It waits to be asked, so that it takes no CPU time from the other side of the comparison.
            let (bytes, mut asked) = (vec![0x5a; chunk], [0; 8]);
            while socket.read_exact(&mut asked).is_ok() {
                for _ in 0..u64::from_le_bytes(asked) {
                    if socket.write_all(&bytes).is_err() {
                        return;
                    }
                }
            }
        })?;
        Ok(Self { socket, buffer: vec![0; chunk] })
    }

    /// Receives for about `slice`; bytes per second.
    ///
    /// # Errors
    /// The connection ends.
    pub fn run(&mut self, slice: Duration) -> Result<f64> {
        const BATCH: u64 = 256;
        let (start, mut bytes) = (Instant::now(), 0);
        self.socket.write_all(&BATCH.to_le_bytes())?;
        loop {
            let go_on = start.elapsed() < slice;
            if go_on {
                self.socket.write_all(&BATCH.to_le_bytes())?; // the next batch, so that the flow never stops
            }
            for _ in 0..BATCH {
                self.socket.read_exact(&mut self.buffer)?;
            }
            bytes += BATCH * self.buffer.len() as u64;
            if !go_on {
                return Ok(rate(bytes, start.elapsed()));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_go_back_and_forth_and_flow() {
        let slice = Duration::from_millis(20);
        let times = PingPong::new(8, 4096).expect("loopback").run(slice).expect("it runs");
        assert!(!times.is_empty() && times.iter().all(|time| *time > 0.0));
        let mut stream = Stream::new(1 << 16).expect("loopback");
        assert!(stream.run(slice).expect("it runs") > 0.0);
        assert!(stream.run(slice).expect("it runs again") > 0.0);
    }
}
