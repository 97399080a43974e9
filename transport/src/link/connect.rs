//! Connecting without blocking the ring's thread.

use std::collections::VecDeque;
use std::io;
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, connect, socket};

/// Finds the addresses behind `host:port`.
pub(crate) enum Resolver {
    /// The address is a number.
    Literal(SocketAddr),
    /// A thread of its own asks the system's resolver, which blocks.
    Thread {
        /// Each message starts one look-up.
        questions: Sender<()>,
        /// What came of it.
        answers: Receiver<io::Result<Vec<SocketAddr>>>,
        /// Readable when an answer is there.
        bell: Arc<EventFd>,
    },
}

impl Resolver {
    /// A resolver of `address`.
    ///
    /// # Errors
    /// There is no thread or descriptor to be had.
    pub(crate) fn new(address: &str) -> io::Result<Self> {
        if let Ok(literal) = address.parse() {
            return Ok(Self::Literal(literal));
        }
        let (questions, asked) = channel();
        let (answer, answers) = channel();
        let bell = Arc::new(eventfd()?);
        let (ring, address) = (bell.clone(), address.to_owned());
        std::thread::Builder::new().name("resolver".into()).spawn(move || {
            while asked.recv().is_ok() {
                let found = address.to_socket_addrs().map(Iterator::collect);
                if answer.send(found).is_err() || ring.write(1).is_err() {
                    break;
                }
            }
        })?;
        Ok(Self::Thread { questions, answers, bell })
    }

    /// Starts a look-up. `Some`: the addresses are known already.
    pub(crate) fn ask(&self) -> Option<VecDeque<SocketAddr>> {
        match self {
            Self::Literal(address) => Some(VecDeque::from([*address])),
            Self::Thread { questions, .. } => {
                // A resolver that is gone shows in `answer`.
                let _ = questions.send(());
                None
            }
        }
    }

    /// The answer, if it is there.
    pub(crate) fn answer(&self) -> Option<io::Result<VecDeque<SocketAddr>>> {
        match self {
            Self::Literal(address) => Some(Ok(VecDeque::from([*address]))),
            Self::Thread { answers, bell, .. } => {
                let _ = bell.read();
                match answers.try_recv() {
                    Ok(found) => Some(found.map(VecDeque::from)),
                    Err(TryRecvError::Empty) => None,
                    Err(TryRecvError::Disconnected) => Some(Err(io::Error::other("the resolver is gone"))),
                }
            }
        }
    }

    /// What to wait on for the answer.
    pub(crate) fn bell(&self) -> Option<&EventFd> {
        match self {
            Self::Literal(_) => None,
            Self::Thread { bell, .. } => Some(bell),
        }
    }
}

/// A non-blocking event descriptor.
pub(crate) fn eventfd() -> io::Result<EventFd> {
    Ok(EventFd::from_value_and_flags(0, EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?)
}

/// Starts to connect; the socket is writable when that is over.
///
/// # Errors
/// It fails at once.
pub(crate) fn start(address: SocketAddr) -> io::Result<TcpStream> {
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let fd: OwnedFd = socket(family, SockType::Stream, flags, None)?;
    match connect(fd.as_raw_fd(), &SockaddrStorage::from(address)) {
        Ok(()) | Err(Errno::EINPROGRESS) => Ok(TcpStream::from(fd)),
        Err(e) => Err(e.into()),
    }
}

/// What came of it, once the socket is writable.
///
/// # Errors
/// It failed.
pub(crate) fn finish(socket: &TcpStream) -> io::Result<()> {
    let _ = socket.as_fd();
    socket.take_error()?.map_or(Ok(()), Err)
}
