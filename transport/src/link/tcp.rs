//! TCP, driven by an io_uring. The ring receives into the link's own buffer while nothing is there, together
//! with everything else that its thread waits for; whole batches of frames, and the rest of large payloads,
//! are then moved with one system call each. The kernel so never holds a pointer to a request's memory
//! between two calls: taking a request back needs no waiting.
#![allow(unsafe_code)] // scattered sends and receives, and one socket option, are raw system calls

use std::io;
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Instant;

use nix::sys::socket::{setsockopt, sockopt};

use super::Link;
use crate::carrier::Carrier;
use crate::core::stream::{Decoder, Outqueue, Peer};
use crate::ring::{Ring, Source};
use crate::wire::Fault;

/// Bytes of the buffer that small frames are received into.
const INPUT: usize = 64 << 10;

/// Payload bytes that are worth a system call of their own straight into their place.
const DIRECT: usize = 8 << 10;

/// Bytes received behind a large payload: enough for the next frame's head, little to copy.
const TAIL: usize = 4 << 10;

/// Bytes received before others on the ring have their turn.
const TURN: usize = 4 << 20;

/// Bytes sent before that. A network that is faster than the sender never blocks it, so without a bound an
/// urgent request would be read only after all bulk was sent.
const SEND_TURN: usize = 1 << 20;

/// Unsent bytes that the kernel keeps for a socket: what lies there cannot be overtaken.
const KERNEL_AHEAD: libc::c_int = 256 << 10;

/// Bytes that the other side may have under way: 25 Gbit/s over 160 us. What lies in the kernel cannot be
/// overtaken either, and more of it falls out of the processor's cache.
const WINDOW: libc::c_int = 512 << 10;

/// See the [module](self).
pub(crate) struct TcpLink {
    socket: Arc<TcpStream>,
    decoder: Decoder,
    out: Outqueue,
    input: Box<[u8]>,
    segments: Segments,
    source: Source,
    generation: u64,
    reading: Reading,
    polls_write: bool,
    blocked: Option<Instant>,
    /// More is to be sent, after the others' turn.
    rests: bool,
    /// The last payload was large: receive little at once, so that the next one is not copied either.
    large: bool,
}

/// What the ring does for us about incoming bytes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Reading {
    /// Nothing.
    No,
    /// It says when there are some: they go straight to their place.
    Polls,
    /// It receives so many at most into the input buffer.
    Receives(usize),
}

/// Segments of one system call; empty outside of it.
#[derive(Default)]
struct Segments(Vec<libc::iovec>);

// SAFETY: the list is filled and used within one call; between calls it holds no pointer that is used.
unsafe impl Send for Segments {}

impl TcpLink {
    /// A connected socket. `generation` tells its completions from those of earlier links of `source`.
    ///
    /// # Errors
    /// The socket refuses its options.
    pub(crate) fn new(socket: Arc<TcpStream>, source: Source, generation: u64) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        socket.set_nodelay(true)?;
        setsockopt(&socket, sockopt::KeepAlive, &true)?;
        setsockopt(&socket, sockopt::TcpKeepIdle, &30)?;
        setsockopt(&socket, sockopt::TcpKeepInterval, &10)?;
        setsockopt(&socket, sockopt::TcpKeepCount, &3)?;
        set_option(&socket, libc::TCP_NOTSENT_LOWAT, KERNEL_AHEAD)?;
        set_option(&socket, libc::TCP_WINDOW_CLAMP, WINDOW)?;
        Ok(Self {
            socket,
            decoder: Decoder::new(),
            out: Outqueue::default(),
            input: vec![0; INPUT].into_boxed_slice(),
            segments: Segments::default(),
            source,
            generation,
            reading: Reading::No,
            polls_write: false,
            blocked: None,
            rests: false,
            large: false,
        })
    }

    fn fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    fn token(&self, write: bool) -> u64 {
        self.generation << 1 & ((1 << 48) - 1) | u64::from(write)
    }

    /// How much to receive behind the payload that is coming in.
    fn room(&self) -> usize {
        if self.large { TAIL } else { INPUT }
    }

    /// Receives what is there, in turns.
    fn receive(&mut self, peer: &mut dyn Peer) -> Result<bool, Fault> {
        let mut total = 0;
        while total < TURN {
            match self.receive_once(peer)? {
                None => break,
                Some((n, drained)) => {
                    total += n;
                    if drained {
                        break;
                    }
                }
            }
        }
        Ok(total > 0)
    }

    /// Receives into the segments.
    fn receive_segments(&mut self) -> io::Result<usize> {
        let mut message = message(&mut self.segments.0);
        // SAFETY: the segments name memory that this link's decoder and input keep alive through the call.
        count(unsafe { libc::recvmsg(self.socket.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) })
    }

    /// Sends the segments.
    fn send_segments(&mut self) -> io::Result<usize> {
        let message = message(&mut self.segments.0);
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: the segments name memory that the queue keeps alive through the call.
        count(unsafe { libc::sendmsg(self.socket.as_raw_fd(), &raw const message, flags) })
    }

    /// One system call's worth. `None`: nothing is there now.
    fn receive_once(&mut self, peer: &mut dyn Peer) -> Result<Option<(usize, bool)>, Fault> {
        let direct = self.decoder.direct().filter(|rest| rest.len() >= DIRECT);
        let straight = direct.as_ref().map_or(0, crate::buffer::Buffer::len);
        let room = if straight > 0 { TAIL } else { self.room() };
        self.segments.0.clear();
        if let Some(direct) = &direct {
            self.segments.0.extend_from_slice(direct.iovecs());
        }
        if self.segments.0.len() < 1024 {
            let base = self.input.as_mut_ptr().cast();
            self.segments.0.push(libc::iovec { iov_base: base, iov_len: room });
        }
        self.segments.0.truncate(1024);
        let asked: usize = self.segments.0.iter().map(|v| v.iov_len).sum();
        let received = self.receive_segments();
        self.segments.0.clear();
        let received = match received {
            Ok(0) => return Err(Fault::Closed),
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(e) => return Err(e.into()),
        };
        let placed = received.min(straight);
        if placed > 0 {
            self.decoder.filled(placed, peer);
        }
        self.decoder.feed(&self.input[..received - placed], peer)?;
        self.large = self.decoder.payload_len() >= 2 * DIRECT;
        Ok(Some((received, received < asked)))
    }
}

impl Link for TcpLink {
    fn send(&mut self, peer: &mut dyn Peer) -> Result<(), Fault> {
        let mut total = 0;
        while !self.polls_write {
            self.rests = total >= SEND_TURN;
            if self.rests {
                break;
            }
            self.out.fill(peer);
            if self.out.is_empty() {
                self.blocked = None;
                break;
            }
            self.out.gather(&mut self.segments.0);
            let sent = self.send_segments();
            self.segments.0.clear();
            match sent {
                Ok(n) => {
                    self.blocked = None;
                    self.out.wrote(n, peer);
                    total += n;
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    self.blocked.get_or_insert_with(Instant::now);
                    break;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    fn arm(&mut self, ring: &mut Ring) {
        if self.reading == Reading::No {
            let token = self.source.token(self.token(false));
            if self.decoder.direct().is_some_and(|rest| rest.len() >= DIRECT) {
                ring.poll_readable(self.fd(), false, token);
                self.reading = Reading::Polls;
            } else {
                let (fd, room) = (self.fd(), self.room());
                // SAFETY: nobody touches `input` before the completion, and it goes to the ring or is leaked
                // if the link goes first.
                unsafe { ring.receive(fd, &mut self.input, room, token) };
                self.reading = Reading::Receives(room);
            }
        }
        if (self.blocked.is_some() || self.rests) && !self.polls_write {
            ring.poll_writable(self.fd(), self.source.token(self.token(true)));
            self.polls_write = true;
        }
    }

    fn completed(&mut self, token: u64, result: i32, peer: &mut dyn Peer) -> Result<bool, Fault> {
        if token == self.token(true) {
            self.polls_write = false;
        }
        if token != self.token(false) {
            return Ok(false);
        }
        match std::mem::replace(&mut self.reading, Reading::No) {
            Reading::No => Ok(false),
            Reading::Polls => self.receive(peer),
            Reading::Receives(room) => {
                let received = match usize::try_from(result) {
                    Ok(0) => return Err(Fault::Closed),
                    Ok(n) => n.min(room),
                    Err(_) if matches!(-result, libc::EAGAIN | libc::EINTR | libc::ECANCELED) => {
                        return Ok(false);
                    }
                    Err(_) => return Err(io::Error::from_raw_os_error(-result).into()),
                };
                self.decoder.feed(&self.input[..received], peer)?;
                self.large = self.decoder.payload_len() >= 2 * DIRECT;
                if received == room || self.decoder.direct().is_some_and(|rest| rest.len() >= DIRECT) {
                    self.receive(peer)?;
                }
                Ok(true)
            }
        }
    }

    fn is_flushed(&self) -> bool {
        self.out.is_empty()
    }

    fn blocked_since(&self) -> Option<Instant> {
        self.blocked
    }

    fn let_go(&mut self, id: u64, receiving: bool) {
        self.out.detach(id);
        if receiving {
            self.decoder.discard();
        }
    }

    fn greeted(&self) -> bool {
        self.decoder.greeted()
    }

    fn carrier(&self) -> Carrier {
        Carrier::Tcp
    }

    fn finish(&mut self) {
        // It fails only on a socket that is closed already.
        let _ = self.socket.shutdown(Shutdown::Write);
    }

    fn close(&mut self, ring: &mut Ring) {
        let _ = self.socket.shutdown(Shutdown::Both);
        if self.polls_write {
            ring.cancel(self.source.token(self.token(true)));
        }
        let token = self.source.token(self.token(false));
        match std::mem::replace(&mut self.reading, Reading::No) {
            Reading::No => {}
            Reading::Polls => ring.cancel(token),
            Reading::Receives(_) => {
                ring.cancel(token);
                ring.adopt(token, std::mem::take(&mut self.input));
            }
        }
    }
}

impl Drop for TcpLink {
    fn drop(&mut self) {
        if matches!(self.reading, Reading::Receives(_)) {
            // Dropped without `close`: the kernel may still write there for a moment.
            std::mem::forget(std::mem::take(&mut self.input));
        }
        let _ = self.socket.shutdown(Shutdown::Both);
    }
}

fn set_option(socket: &TcpStream, option: libc::c_int, value: libc::c_int) -> io::Result<()> {
    let len = size_of::<libc::c_int>() as libc::socklen_t;
    let value = std::ptr::from_ref(&value).cast();
    // SAFETY: the value is an int, which lives through the call.
    let result = unsafe { libc::setsockopt(socket.as_raw_fd(), libc::IPPROTO_TCP, option, value, len) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn message(segments: &mut [libc::iovec]) -> libc::msghdr {
    // SAFETY: all zeros is a message without address, segments and control data.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = segments.as_mut_ptr();
    message.msg_iovlen = segments.len();
    message
}

fn count(result: libc::ssize_t) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}
