//! TCP, with or without TLS, driven by an io_uring. The ring receives into the link's own buffer while nothing is there, together
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
use super::tls::handshake::Handshake;
use super::tls::kernel::{self, Kernel};
use super::tls::records::Records;
use super::tls::{CLOSE_NOTIFY, Content};
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
    layer: Layer,
    /// Records of TLS after which the connection is worn out, and whether the peer's count too.
    wears_out_at: (u64, bool),
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
    /// Nothing can be sent any more.
    broken: Option<Fault>,
    /// Bytes at the front of `input`: a record of TLS that is not all there.
    have: usize,
}

/// What lies between the frames and TCP.
enum Layer {
    /// Nothing.
    Plain,
    /// No frame goes out or comes in yet.
    Handshake(Box<Handshake>),
    /// The kernel's TLS: nothing either, but it is told apart what is data.
    Kernel(Kernel),
    /// Records that are made here.
    Records(Box<Records>),
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
    /// A connected socket. `generation` tells its completions from those of earlier links of `source`. With a
    /// `handshake` nothing goes out before that is over.
    ///
    /// # Errors
    /// The socket refuses its options.
    pub(crate) fn new(
        socket: Arc<TcpStream>,
        source: Source,
        generation: u64,
        handshake: Option<Handshake>,
    ) -> io::Result<Self> {
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
            layer: handshake.map_or(Layer::Plain, |handshake| Layer::Handshake(Box::new(handshake))),
            wears_out_at: (u64::MAX, false),
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
            broken: None,
            have: 0,
        })
    }

    /// It ends with [`Fault::KeysUsed`] after so many records of TLS under its own key, or, if `either`, under
    /// that of the peer.
    pub(crate) fn wears_out(&mut self, records: u64, either: bool) {
        self.wears_out_at = (records, either);
    }

    /// Takes the handshake further.
    fn shake(&mut self, peer: &mut dyn Peer) -> Result<bool, Fault> {
        let Layer::Handshake(handshake) = &mut self.layer else { return Ok(true) };
        if !handshake.step(&self.socket)? {
            self.blocked = handshake.is_blocked().then(|| self.blocked.unwrap_or_else(Instant::now));
            return Ok(false);
        }
        self.blocked = None;
        let Layer::Handshake(handshake) = std::mem::replace(&mut self.layer, Layer::Plain) else {
            return Ok(true);
        };
        let secured = handshake.finish()?;
        let (layer, carrier) = match kernel::take_over(&self.socket, &secured.secrets)? {
            Some(kernel) => (Layer::Kernel(kernel), Carrier::KernelTls),
            None => (Layer::Records(Box::new(Records::new(&secured.secrets)?)), Carrier::TlsRecords),
        };
        self.layer = layer;
        peer.secured(carrier, secured.proven)?;
        Ok(true)
    }

    /// Whether a frame may go out under the keys that there are.
    fn wear(&self) -> Result<(), Fault> {
        let (ours, theirs) = match &self.layer {
            Layer::Plain | Layer::Handshake(_) => (0, 0),
            Layer::Kernel(kernel) => kernel.count(),
            Layer::Records(records) => records.count(),
        };
        let (most, either) = self.wears_out_at;
        if ours >= most || either && theirs >= most { Err(Fault::KeysUsed) } else { Ok(()) }
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

    /// Receives into the segments: how many bytes, and of which type the kernel's TLS says that they are.
    fn receive_segments(&mut self) -> io::Result<(usize, u8)> {
        let mut message = message(&mut self.segments.0);
        let mut content = kernel::Type::default();
        let secured = matches!(self.layer, Layer::Kernel(_));
        if secured {
            content.ask(&mut message);
        }
        // SAFETY: the segments name memory that this link's decoder and input keep alive through the call, as
        // does the control buffer.
        let received = unsafe { libc::recvmsg(self.fd(), &raw mut message, libc::MSG_DONTWAIT) };
        let received = count(received)?;
        Ok((received, if secured { content.said(&message) } else { Content::Data as u8 }))
    }

    /// Sends the segments.
    fn send_segments(&mut self) -> io::Result<usize> {
        let message = message(&mut self.segments.0);
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: the segments name memory that the queue keeps alive through the call.
        count(unsafe { libc::sendmsg(self.socket.as_raw_fd(), &raw const message, flags) })
    }

    /// One system call's worth. `None`: nothing is there now. `true`: nothing is left.
    fn receive_once(&mut self, peer: &mut dyn Peer) -> Result<Option<(usize, bool)>, Fault> {
        let records = matches!(self.layer, Layer::Records(_));
        let direct = self.decoder.direct().filter(|rest| !records && rest.len() >= DIRECT);
        let straight = direct.as_ref().map_or(0, crate::buffer::Buffer::len);
        self.segments.0.clear();
        if let Some(direct) = &direct {
            self.segments.0.extend_from_slice(direct.iovecs());
        }
        let room = match (records, straight) {
            (true, _) => INPUT - self.have,
            (false, 0) => self.room(),
            (false, _) => TAIL,
        };
        if self.segments.0.len() < 1024 {
            let base = self.input[self.have..].as_mut_ptr().cast();
            self.segments.0.push(libc::iovec { iov_base: base, iov_len: room });
        }
        self.segments.0.truncate(1024);
        let asked: usize = self.segments.0.iter().map(|v| v.iov_len).sum();
        let received = self.receive_segments();
        self.segments.0.clear();
        let (received, content) = match received {
            Ok((0, content)) if content == Content::Data as u8 => return Err(self.ended()),
            Ok(received) => received,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(e) => return Err(refine(e)),
        };
        if let Layer::Kernel(kernel) = &mut self.layer {
            kernel.received(received);
            if content != Content::Data as u8 {
                let mut start = [0; 2];
                match &direct {
                    Some(direct) => drop(direct.read_at(0, &mut start)),
                    None => start.copy_from_slice(&self.input[..2]),
                }
                kernel.control(content, &start[..received.min(2)])?;
                return Ok(Some((received, false)));
            }
        }
        let placed = received.min(straight);
        if placed > 0 {
            self.decoder.filled(placed, peer);
        }
        self.take_in(received - placed, peer)?;
        Ok(Some((received, received < asked)))
    }

    /// `received` bytes came behind those that the input buffer had already.
    fn take_in(&mut self, received: usize, peer: &mut dyn Peer) -> Result<(), Fault> {
        let end = (self.have + received).min(self.input.len());
        let (decoder, input) = (&mut self.decoder, &mut self.input[..end]);
        match &mut self.layer {
            Layer::Records(records) => self.have = records.open(input, |data| decoder.feed(data, peer))?,
            _ => decoder.feed(input, peer)?,
        }
        self.large = self.decoder.payload_len() >= 2 * DIRECT;
        Ok(())
    }

    /// The end of the stream: under TLS nobody but the peer can have said that it is over, and it did not.
    fn ended(&self) -> Fault {
        match (&self.broken, &self.layer) {
            (Some(fault), _) => fault.clone(),
            (None, Layer::Kernel(_) | Layer::Records(_)) => Fault::Cut,
            (None, _) => Fault::Closed,
        }
    }

    /// Sending failed. What the peer said last may still be there and is the better reason, so if it is gone
    /// the receiving side ends the connection.
    fn send_failed(&mut self, error: io::Error) -> Result<(), Fault> {
        let gone = matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset);
        let fault = refine(error);
        if !gone {
            return Err(fault);
        }
        self.blocked = None;
        self.broken = Some(fault);
        Ok(())
    }

    /// Whether there is nothing that the network did not take yet.
    fn flush_records(&mut self) -> io::Result<bool> {
        let Layer::Records(records) = &mut self.layer else { return Ok(true) };
        loop {
            let rest = records.unsent();
            if rest.is_empty() {
                return Ok(true);
            }
            let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
            // SAFETY: `rest` lives through the call.
            let sent =
                unsafe { libc::send(self.socket.as_raw_fd(), rest.as_ptr().cast(), rest.len(), flags) };
            match count(sent) {
                Ok(n) => records.sent(n),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// Encrypts frames and sends the records; `None`: the network takes no more now.
    fn send_records(&mut self, peer: &mut dyn Peer) -> Result<Option<usize>, Fault> {
        match self.flush_records() {
            Ok(true) => {}
            Ok(false) => return Ok(None),
            Err(e) => return self.send_failed(e).map(|()| None),
        }
        let Layer::Records(records) = &mut self.layer else { return Ok(None) };
        let mut total = 0;
        loop {
            let out = &self.out;
            let n = records.seal(out.len(), |plain| out.read(plain))?;
            if n == 0 {
                break;
            }
            self.out.wrote(n, peer);
            total += n;
        }
        match self.flush_records() {
            Ok(true) => Ok(Some(total)),
            Ok(false) => Ok(None),
            Err(e) => self.send_failed(e).map(|()| None),
        }
    }

    /// Sends the frames as they are; `None`: the network takes no more now.
    fn send_frames(&mut self, peer: &mut dyn Peer) -> Result<Option<usize>, Fault> {
        self.out.gather(&mut self.segments.0);
        let sent = self.send_segments();
        self.segments.0.clear();
        match sent {
            Ok(n) => {
                if let Layer::Kernel(kernel) = &mut self.layer {
                    kernel.sent(n);
                }
                self.out.wrote(n, peer);
                Ok(Some(n))
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => Ok(Some(0)),
            Err(e) => self.send_failed(e).map(|()| None),
        }
    }

    /// Tells the other side that nothing more comes, if TLS is there to say so.
    fn close_notify(&mut self) {
        if self.broken.is_some() {
            return;
        }
        match &mut self.layer {
            Layer::Plain | Layer::Handshake(_) => {}
            Layer::Kernel(_) => kernel::close_notify(&self.socket),
            Layer::Records(records) => {
                if records.seal_alert(CLOSE_NOTIFY).is_ok() {
                    // As far as the network takes it now; the peer sees the end in any case.
                    let _ = self.flush_records();
                }
            }
        }
    }
}

impl Link for TcpLink {
    fn send(&mut self, peer: &mut dyn Peer) -> Result<(), Fault> {
        if matches!(self.layer, Layer::Handshake(_)) && !self.shake(peer)? {
            return Ok(());
        }
        self.wear()?;
        let mut total = 0;
        while !self.polls_write && self.broken.is_none() {
            self.rests = total >= SEND_TURN;
            if self.rests {
                break;
            }
            self.out.fill(peer);
            if self.is_flushed() {
                self.blocked = None;
                break;
            }
            let sent = match self.layer {
                Layer::Records(_) => self.send_records(peer)?,
                _ => self.send_frames(peer)?,
            };
            let Some(sent) = sent else {
                if self.broken.is_some() {
                    break;
                }
                self.blocked.get_or_insert_with(Instant::now);
                break;
            };
            self.blocked = None;
            total += sent;
        }
        Ok(())
    }

    fn arm(&mut self, ring: &mut Ring) {
        if self.reading == Reading::No {
            let token = self.source.token(self.token(false));
            let in_place = match self.layer {
                Layer::Handshake(_) => true,
                Layer::Records(_) => self.have > 0,
                _ => self.decoder.direct().is_some_and(|rest| rest.len() >= DIRECT),
            };
            if in_place {
                ring.poll_readable(self.fd(), false, token);
                self.reading = Reading::Polls;
            } else {
                let room = if matches!(self.layer, Layer::Records(_)) { INPUT } else { self.room() };
                let fd = self.fd();
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
            // `send`, which always comes next, takes the handshake further.
            Reading::Polls if matches!(self.layer, Layer::Handshake(_)) => Ok(true),
            Reading::Polls => self.receive(peer),
            Reading::Receives(room) => {
                let received = match usize::try_from(result) {
                    Ok(0) => return Err(self.ended()),
                    Ok(n) => n.min(room),
                    // The kernel's TLS gives what is no data only to who asks for its type.
                    Err(_) if -result == libc::EIO && matches!(self.layer, Layer::Kernel(_)) => {
                        return self.receive(peer);
                    }
                    Err(_) if matches!(-result, libc::EAGAIN | libc::EINTR | libc::ECANCELED) => {
                        return Ok(false);
                    }
                    Err(_) => return Err(refine(io::Error::from_raw_os_error(-result))),
                };
                if let Layer::Kernel(kernel) = &mut self.layer {
                    kernel.received(received);
                }
                self.take_in(received, peer)?;
                if received == room
                    || self.have > 0
                    || self.decoder.direct().is_some_and(|rest| rest.len() >= DIRECT)
                {
                    self.receive(peer)?;
                }
                Ok(true)
            }
        }
    }

    fn is_flushed(&self) -> bool {
        let sealed = match &self.layer {
            Layer::Records(records) => records.unsent().is_empty(),
            _ => true,
        };
        self.out.is_empty() && sealed
    }

    fn due(&self) -> Option<Instant> {
        match &self.layer {
            Layer::Handshake(handshake) => Some(handshake.deadline()),
            _ => None,
        }
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
        match self.layer {
            Layer::Plain | Layer::Handshake(_) => Carrier::Tcp,
            Layer::Kernel(_) => Carrier::KernelTls,
            Layer::Records(_) => Carrier::TlsRecords,
        }
    }

    fn drop_queued(&mut self) -> bool {
        let whole = self.out.clear();
        let sealed = match &self.layer {
            Layer::Plain | Layer::Kernel(_) => true,
            Layer::Handshake(_) => false,
            // What is encrypted has its place in the sequence: nothing can follow if it is left out.
            Layer::Records(records) => records.unsent().is_empty(),
        };
        if !(whole && sealed) {
            self.broken = Some(Fault::Closed);
        }
        self.broken.is_none()
    }

    fn finish(&mut self) {
        self.close_notify();
        // It fails only on a socket that is closed already.
        let _ = self.socket.shutdown(Shutdown::Write);
    }

    fn close(&mut self, ring: &mut Ring) {
        self.close_notify();
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

/// An error of the socket; the kernel's TLS says in one of them that a record was changed on the way.
fn refine(error: io::Error) -> Fault {
    match error.raw_os_error() {
        Some(libc::EBADMSG) => {
            Fault::Tls("A record is not as the peer sent it: it was changed on the way".to_owned())
        }
        _ => error.into(),
    }
}

fn count(result: libc::ssize_t) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}
