//! The hub's thread: moves output to everybody who reads and input to the guest.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::escape::{Command, Escape};
use super::hub::{LAST_WORDS, Shared, lock};
use super::sink::{Scrollback, Sink};
use super::terminal;
use crate::control::socket::Listener;

/// Attached clients at most; more are turned away.
const MOST_CLIENTS: usize = 8;
/// Input that waits for the guest; nothing more is read meanwhile.
const PENDING_INPUT: usize = 16 << 10;
/// After output came, how long to gather more of it before looking again, in milliseconds. A guest writes
/// byte by byte, and a wake-up for each would cost more than the byte.
const GATHER: u16 = 2;
/// How soon input that the guest did not take is offered again, in milliseconds.
const OFFER_AGAIN: u16 = 10;
/// What is written to standard output at a time where it cannot be made non-blocking: what a pipe that polls
/// writable has room for.
const PIECE: usize = 4096;

/// The process's own terminal, or whatever standard input and output are.
pub(super) struct Terminal {
    /// Whether a person types, and may type the escape key.
    person: bool,
    /// Standard output, opened again so that it does not block; none where that cannot be.
    out: Option<File>,
    sink: Sink,
    escape: Escape,
    command: Option<Box<dyn Fn(Command) + Send + Sync>>,
    readable: bool,
    writable: bool,
}

impl Terminal {
    pub(super) fn open(command: Option<Box<dyn Fn(Command) + Send + Sync>>) -> Self {
        let mut out = None;
        if io::stdout().is_terminal() {
            // The description behind descriptor 1 is shared with the shell: it must stay blocking.
            let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
            out = OpenOptions::new().write(true).custom_flags(flags).open("/proc/self/fd/1").ok();
        }
        let (person, escape) = (io::stdin().is_terminal(), Escape::default());
        Self { person, out, sink: Sink::default(), escape, command, readable: true, writable: true }
    }

    /// Where keys come from, when they are this process's to read.
    fn source(&self) -> Option<BorrowedFd<'static>> {
        // A terminal stops whoever reads it from the background.
        let ours = self.readable && (!self.person || terminal::is_raw());
        ours.then(borrow_stdin)
    }

    fn read(&mut self, input: &mut VecDeque<u8>) {
        let mut keys = [0; 1024];
        match nix::unistd::read(borrow_stdin(), &mut keys) {
            Ok(0) => self.readable = false,
            Ok(taken) if self.person => {
                let mut typed = Vec::new();
                for command in self.escape.feed(&keys[..taken], &mut typed) {
                    self.obey(command);
                }
                input.extend(typed);
            }
            Ok(taken) => input.extend(&keys[..taken]),
            Err(nix::Error::EINTR | nix::Error::EAGAIN) => {}
            Err(_) => self.readable = false,
        }
    }

    fn obey(&mut self, command: Command) {
        if command == Command::Help {
            self.sink.push(
                b"\r\n[omega: Ctrl-] and then  q  power off, again to end   k  end at once   p  pause or resume\
                   \r\n        Ctrl-]  send Ctrl-] to the guest]\r\n",
            );
        } else if let Some(obey) = &self.command {
            obey(command);
        }
    }

    fn write(&mut self) {
        let Self { out, sink, .. } = self;
        let result = match out {
            Some(out) => sink.drain(|bytes| out.write(bytes)),
            None => sink.drain(|bytes| {
                if !ready(borrow_stdout(), PollFlags::POLLOUT) {
                    return Err(io::ErrorKind::WouldBlock.into());
                }
                let piece = &bytes[..bytes.len().min(PIECE)];
                nix::unistd::write(borrow_stdout(), piece).map_err(io::Error::from)
            }),
        };
        self.writable &= result.is_ok();
    }
}

fn borrow_stdin() -> BorrowedFd<'static> {
    static STDIN: std::sync::LazyLock<io::Stdin> = std::sync::LazyLock::new(io::stdin);
    STDIN.as_fd()
}

fn borrow_stdout() -> BorrowedFd<'static> {
    static STDOUT: std::sync::LazyLock<io::Stdout> = std::sync::LazyLock::new(io::stdout);
    STDOUT.as_fd()
}

fn ready(fd: BorrowedFd<'_>, what: PollFlags) -> bool {
    let mut fds = [PollFd::new(fd, what)];
    matches!(poll(&mut fds, PollTimeout::ZERO), Ok(1..))
}

struct Client {
    stream: UnixStream,
    sink: Sink,
    gone: bool,
}

impl Client {
    fn read(&mut self, input: &mut VecDeque<u8>) {
        let mut bytes = [0; 1024];
        match self.stream.read(&mut bytes) {
            Ok(0) => self.gone = true,
            Ok(taken) => input.extend(&bytes[..taken]),
            Err(why) => self.gone |= !passes(&why),
        }
    }

    fn write(&mut self) {
        let Self { stream, sink, gone } = self;
        *gone |= sink.drain(|bytes| stream.write(bytes)).is_err();
    }
}

fn passes(why: &io::Error) -> bool {
    matches!(why.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

/// Who a descriptor of the poll set belongs to.
#[derive(Clone, Copy)]
enum Who {
    Wake,
    Room,
    Listener,
    Stdin,
    Stdout,
    Client(usize),
}

pub(super) struct Pump {
    shared: Arc<Shared>,
    listener: Option<Listener>,
    file: Option<File>,
    terminal: Option<Terminal>,
    clients: Vec<Client>,
    scrollback: Scrollback,
    input: VecDeque<u8>,
    /// Output came a moment ago: gather for a while instead of being woken for each byte.
    gathering: bool,
}

impl Pump {
    pub(super) fn new(
        shared: Arc<Shared>,
        listener: Option<Listener>,
        file: Option<File>,
        terminal: Option<Terminal>,
    ) -> Self {
        let (clients, scrollback, input) = (Vec::new(), Scrollback::default(), VecDeque::new());
        Self { shared, listener, file, terminal, clients, scrollback, input, gathering: false }
    }

    pub(super) fn run(mut self) {
        let mut deadline = None;
        loop {
            self.take_output();
            self.write();
            self.offer_input();
            if self.shared.finish.load(Ordering::SeqCst) {
                let deadline = *deadline.get_or_insert_with(|| Instant::now() + LAST_WORDS);
                if (!self.gathering && self.all_written()) || Instant::now() >= deadline {
                    break;
                }
            }
            self.wait(deadline.is_some());
        }
        let shared = Arc::clone(&self.shared);
        drop(self);
        shared.ended();
    }

    fn take_output(&mut self) {
        let mut output = self.shared.output();
        self.gathering = !output.bytes.is_empty() || output.dropped > 0;
        if !self.gathering {
            output.signalled = false;
            return;
        }
        let bytes = std::mem::take(&mut output.bytes);
        let dropped = std::mem::take(&mut output.dropped);
        drop(output);
        let (first, second) = bytes.as_slices();
        for piece in [first, second] {
            self.scrollback.push(piece);
            for sink in self.sinks() {
                sink.push(piece);
            }
            if let Some(file) = &mut self.file
                && let Err(why) = file.write_all(piece)
            {
                tracing::error!("The console's file cannot be written any more: {why}");
                self.file = None;
            }
        }
        for sink in self.sinks() {
            sink.drop_more(dropped);
        }
    }

    fn sinks(&mut self) -> impl Iterator<Item = &mut Sink> {
        let terminal = self.terminal.as_mut().filter(|terminal| terminal.writable);
        let terminal = terminal.map(|terminal| &mut terminal.sink);
        terminal.into_iter().chain(self.clients.iter_mut().map(|client| &mut client.sink))
    }

    fn all_written(&mut self) -> bool {
        self.sinks().all(|sink| sink.is_empty())
    }

    fn write(&mut self) {
        if let Some(terminal) = &mut self.terminal {
            terminal.write();
        }
        self.clients.iter_mut().for_each(Client::write);
        self.clients.retain(|client| !client.gone);
    }

    fn offer_input(&mut self) {
        let Some(offer) = &*lock(&self.shared.input) else { return };
        while !self.input.is_empty() {
            let (first, _) = self.input.as_slices();
            let taken = offer(first).min(first.len());
            if taken == 0 {
                return;
            }
            self.input.drain(..taken);
        }
    }

    fn wait(&mut self, finishing: bool) {
        let ready = self.poll(finishing);
        for who in ready {
            match who {
                Who::Wake => drop(self.shared.wake.0.read()),
                Who::Room => drop(lock(&self.shared.room).as_ref().map(|room| room.0.read())),
                Who::Listener => self.accept(),
                Who::Stdin => {
                    if let Some(terminal) = &mut self.terminal {
                        terminal.read(&mut self.input);
                    }
                }
                Who::Client(index) => {
                    if let Some(client) = self.clients.get_mut(index) {
                        client.read(&mut self.input);
                    }
                }
                Who::Stdout => {}
            }
        }
    }

    /// Waits until something is ready, and says what.
    fn poll(&self, finishing: bool) -> Vec<Who> {
        let hungry = self.input.len() < PENDING_INPUT;
        let live = self.shared.live.load(Ordering::SeqCst);
        let room = lock(&self.shared.room).clone();
        let mut set = vec![(Who::Wake, PollFd::new(self.shared.wake.as_fd(), PollFlags::POLLIN))];
        if let Some(room) = &room {
            set.push((Who::Room, PollFd::new(room.as_fd(), PollFlags::POLLIN)));
        }
        if let Some(listener) = &self.listener {
            set.push((Who::Listener, PollFd::new(listener.as_fd(), PollFlags::POLLIN)));
        }
        if let Some(terminal) = &self.terminal {
            if let Some(source) = terminal.source().filter(|_| hungry && live) {
                set.push((Who::Stdin, PollFd::new(source, PollFlags::POLLIN)));
            }
            if terminal.writable && !terminal.sink.is_empty() {
                let out = terminal.out.as_ref().map_or(borrow_stdout(), AsFd::as_fd);
                set.push((Who::Stdout, PollFd::new(out, PollFlags::POLLOUT)));
            }
        }
        for (index, client) in self.clients.iter().enumerate() {
            let mut events = PollFlags::empty();
            events.set(PollFlags::POLLIN, hungry);
            events.set(PollFlags::POLLOUT, !client.sink.is_empty());
            set.push((Who::Client(index), PollFd::new(client.stream.as_fd(), events)));
        }
        let connected = lock(&self.shared.input).is_some();
        let timeout = if self.gathering || finishing {
            PollTimeout::from(GATHER)
        } else if connected && !self.input.is_empty() {
            PollTimeout::from(OFFER_AGAIN)
        } else {
            PollTimeout::NONE
        };
        let (who, mut fds): (Vec<_>, Vec<_>) = set.into_iter().unzip();
        // An interruption is as good as a time-out: everything is looked at again.
        let _ = poll(&mut fds, timeout);
        let input = PollFlags::POLLIN | PollFlags::POLLHUP | PollFlags::POLLERR;
        who.into_iter()
            .zip(&fds)
            .filter(|(_, fd)| fd.revents().is_some_and(|events| events.intersects(input)))
            .map(|(who, _)| who)
            .collect()
    }

    fn accept(&mut self) {
        let Some(mut stream) = self.listener.as_ref().and_then(Listener::accept) else { return };
        if self.clients.len() >= MOST_CLIENTS {
            // They see why, or that the connection ends.
            let _ = stream.write(b"\r\n[omega: too many consoles are attached to this guest]\r\n");
            return;
        }
        let mut sink = Sink::default();
        sink.push(&self.scrollback.replay());
        self.clients.push(Client { stream, sink, gone: false });
    }
}
