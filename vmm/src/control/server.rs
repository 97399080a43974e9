//! Serves a guest's control socket: one thread for all connections and one for the commands that may wait,
//! so that `status` and `kill` are always answered.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use devices::thread::{Role, spawn};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::protocol::{Answer, Command, Console, LONGEST_REQUEST, read_request};
use super::socket::Listener;
use super::{Controlled, Error};

/// Connections at most; more are told so and hung up on.
const MOST_CLIENTS: usize = 16;
/// Commands of one connection that wait at most.
const MOST_WAITING: usize = 4;
/// Answers that one connection has not taken; nothing more is read from it meanwhile.
const BACKLOG: usize = 64 << 10;
/// How long [`Server::finish`] waits for clients to take their last answers.
const LAST_WORDS: Duration = Duration::from_millis(200);

/// What is done with the size of a window.
pub type Resize = Box<dyn Fn(Console, u16, u16) + Send + Sync>;

/// Serves one guest's control socket until it is [finished](Server::finish).
pub struct Server {
    shared: Arc<Shared>,
}

struct Shared {
    wake: EventFd,
    finish: AtomicBool,
    finished: (Mutex<bool>, Condvar),
}

/// A command that may wait, on its way to the worker.
struct Job {
    client: u64,
    id: u64,
    command: Command,
}

impl Server {
    /// Begins to serve `machine` at `path`.
    ///
    /// # Errors
    /// The socket cannot be made, or no thread or descriptor is left.
    pub fn start(path: &Path, machine: Arc<dyn Controlled>, resize: Resize) -> io::Result<Self> {
        let listener = Listener::at(path)?;
        let wake = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
        let finish = AtomicBool::new(false);
        let shared = Arc::new(Shared { wake, finish, finished: (Mutex::new(false), Condvar::new()) });
        let (jobs, todo) = channel();
        let (done, answers) = channel();
        let (worker, wake) = (Arc::clone(&machine), Arc::clone(&shared));
        spawn(Role::Control, "control-wait", move || {
            // Ends when the serving thread drops its end.
            for Job { client, id, command } in todo {
                let answer = Answer::new(Some(id), wait(&*worker, &command));
                if done.send((client, answer)).is_err() {
                    break;
                }
                let _ = wake.wake.write(1);
            }
        })?;
        let server = Serving {
            shared: Arc::clone(&shared),
            listener,
            machine,
            resize,
            jobs,
            answers,
            clients: HashMap::new(),
            next: 0,
        };
        spawn(Role::Control, "control", move || server.run())?;
        Ok(Self { shared })
    }

    /// Sends the answers that are due and hangs up; the socket's name stays. Returns within half a second.
    pub fn finish(&self) {
        self.shared.finish.store(true, Ordering::SeqCst);
        let _ = self.shared.wake.write(1);
        let (ended, changed) = &self.shared.finished;
        let ended = ended.lock().unwrap_or_else(PoisonError::into_inner);
        drop(changed.wait_timeout_while(ended, 2 * LAST_WORDS, |ended| !*ended));
    }
}

/// Carries out a command that may wait.
fn wait(machine: &dyn Controlled, command: &Command) -> Result<serde_json::Value, Error> {
    let nothing = |()| serde_json::Value::Null;
    match command {
        Command::Pause => machine.pause().map(nothing),
        Command::Resume => machine.resume().map(nothing),
        Command::SaveState => machine.save_state(),
        Command::Balloon { target } => machine.set_balloon(*target).map(nothing),
        Command::MemoryAdd { helper } => machine.add_helper(helper).map(nothing),
        Command::CpuMove { vcpu, node } => machine.move_vcpu(*vcpu, node).map(nothing),
        Command::CpuDrain { node } => machine.drain_vcpus(node).map(Into::into),
        other => Err(Error::Invalid(format!("{other:?} does not wait"))),
    }
}

struct Client {
    stream: UnixStream,
    /// The beginning of a request.
    partial: Vec<u8>,
    /// Answers that were not taken yet.
    backlog: Vec<u8>,
    waiting: usize,
    /// Nothing more is read; it goes when its answers are sent.
    closing: bool,
    gone: bool,
}

impl Client {
    fn new(stream: UnixStream) -> Self {
        Self { stream, partial: Vec::new(), backlog: Vec::new(), waiting: 0, closing: false, gone: false }
    }

    fn answer(&mut self, answer: &Answer) {
        self.backlog.extend(answer.line());
    }

    fn hungry(&self) -> bool {
        !self.closing && self.backlog.len() < BACKLOG
    }

    /// Reads what is there, and returns the whole lines in it.
    fn read(&mut self) -> Vec<Vec<u8>> {
        let mut bytes = [0; 4096];
        match self.stream.read(&mut bytes) {
            // Whoever shuts down the writing side still wants the answers.
            Ok(0) => self.closing = true,
            Ok(taken) => self.partial.extend_from_slice(&bytes[..taken]),
            Err(why) if passes(&why) => {}
            Err(_) => self.gone = true,
        }
        let mut lines = Vec::new();
        while let Some(end) = self.partial.iter().position(|byte| *byte == b'\n') {
            let mut line: Vec<u8> = self.partial.drain(..=end).collect();
            line.pop();
            lines.push(line);
        }
        if self.partial.len() > LONGEST_REQUEST {
            // Where the next request begins cannot be known.
            lines.push(std::mem::take(&mut self.partial));
            self.closing = true;
        }
        lines
    }

    fn write(&mut self) {
        while !self.backlog.is_empty() && !self.gone {
            match self.stream.write(&self.backlog) {
                Ok(taken @ 1..) => drop(self.backlog.drain(..taken.min(self.backlog.len()))),
                Err(why) if why.kind() == io::ErrorKind::Interrupted => {}
                Err(why) if passes(&why) => break,
                Ok(_) | Err(_) => self.gone = true,
            }
        }
        self.gone |= self.closing && self.backlog.is_empty() && self.waiting == 0;
    }
}

fn passes(why: &io::Error) -> bool {
    matches!(why.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

struct Serving {
    shared: Arc<Shared>,
    listener: Listener,
    machine: Arc<dyn Controlled>,
    resize: Resize,
    jobs: Sender<Job>,
    answers: Receiver<(u64, Answer)>,
    clients: HashMap<u64, Client>,
    next: u64,
}

impl Serving {
    fn run(mut self) {
        let mut deadline = None;
        loop {
            self.take_answers();
            self.clients.values_mut().for_each(Client::write);
            self.clients.retain(|_, client| !client.gone);
            if self.shared.finish.load(Ordering::SeqCst) {
                let deadline = *deadline.get_or_insert_with(|| Instant::now() + LAST_WORDS);
                let sent = self.clients.values().all(|client| client.backlog.is_empty());
                if sent || Instant::now() >= deadline {
                    break;
                }
            }
            let timeout = deadline.map_or(PollTimeout::NONE, |_| PollTimeout::from(10u8));
            self.serve(timeout);
        }
        let shared = Arc::clone(&self.shared);
        drop(self);
        *shared.finished.0.lock().unwrap_or_else(PoisonError::into_inner) = true;
        shared.finished.1.notify_all();
    }

    fn take_answers(&mut self) {
        while let Ok((client, answer)) = self.answers.try_recv() {
            if let Some(client) = self.clients.get_mut(&client) {
                client.waiting = client.waiting.saturating_sub(1);
                client.answer(&answer);
            }
        }
    }

    /// Waits until something is ready, and does it.
    fn serve(&mut self, timeout: PollTimeout) {
        let order: Vec<u64> = self.clients.keys().copied().collect();
        let mut fds = vec![
            PollFd::new(self.shared.wake.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.listener.as_fd(), PollFlags::POLLIN),
        ];
        for client in order.iter().filter_map(|id| self.clients.get(id)) {
            let mut events = PollFlags::empty();
            events.set(PollFlags::POLLIN, client.hungry());
            events.set(PollFlags::POLLOUT, !client.backlog.is_empty());
            fds.push(PollFd::new(client.stream.as_fd(), events));
        }
        // An interruption is as good as a time-out: everything is looked at again.
        let _ = poll(&mut fds, timeout);
        let events: Vec<PollFlags> =
            fds.iter().map(|fd| fd.revents().unwrap_or(PollFlags::empty())).collect();
        if events[0].contains(PollFlags::POLLIN) {
            let _ = self.shared.wake.read();
        }
        for (id, events) in order.iter().zip(&events[2..]) {
            if events.intersects(PollFlags::POLLIN) {
                self.read(*id);
            } else if events.intersects(PollFlags::POLLHUP | PollFlags::POLLERR)
                && let Some(client) = self.clients.get_mut(id)
            {
                client.gone = true;
            }
        }
        if events[1].contains(PollFlags::POLLIN) {
            self.accept();
        }
    }

    fn accept(&mut self) {
        let Some(mut stream) = self.listener.accept() else { return };
        if self.clients.len() >= MOST_CLIENTS {
            let busy = Error::Busy(format!("{MOST_CLIENTS} connections are open; close one"));
            // A new connection has room for a line.
            let _ = stream.write(&Answer::new(None, Err(busy)).line());
            return;
        }
        self.clients.insert(self.next, Client::new(stream));
        self.next += 1;
    }

    fn read(&mut self, id: u64) {
        let Some(client) = self.clients.get_mut(&id) else { return };
        for line in client.read() {
            if line.iter().all(u8::is_ascii_whitespace) {
                continue;
            }
            let answer = match read_request(&line) {
                Err(answer) => Some(answer),
                Ok(request) if request.command.may_wait() => {
                    let (machine_id, command) = (request.id, request.command);
                    if client.waiting >= MOST_WAITING {
                        let busy = Error::Busy(format!("{MOST_WAITING} commands wait already"));
                        Some(Answer::new(Some(machine_id), Err(busy)))
                    } else {
                        client.waiting += 1;
                        // The worker ends only after this thread.
                        let _ = self.jobs.send(Job { client: id, id: machine_id, command });
                        None
                    }
                }
                Ok(request) => Some(Answer::new(
                    Some(request.id),
                    at_once(&*self.machine, &self.resize, &request.command),
                )),
            };
            if let Some(answer) = answer {
                client.answer(&answer);
            }
        }
    }
}

/// Carries out a command that never waits.
fn at_once(machine: &dyn Controlled, resize: &Resize, command: &Command) -> Result<serde_json::Value, Error> {
    let value = |result: serde_json::Result<serde_json::Value>| {
        result.map_err(|why| Error::Failed(format!("The answer cannot be written: {why}")))
    };
    match command {
        Command::Status => value(serde_json::to_value(machine.status())),
        Command::Counters => value(serde_json::to_value(machine.counters())),
        Command::Peers => value(serde_json::to_value(machine.peers())),
        Command::Memory => machine.memory().and_then(|memory| value(serde_json::to_value(memory))),
        Command::Coherence => machine.coherence().and_then(|counters| value(serde_json::to_value(counters))),
        Command::MemoryHelpers => machine.helpers().and_then(|helpers| value(serde_json::to_value(helpers))),
        Command::MemoryDrain { helper } => machine.drain_helper(helper).map(serde_json::Value::String),
        Command::PowerOff => machine.power_off().map(|()| serde_json::Value::Null),
        Command::Kill => {
            machine.kill();
            Ok(serde_json::Value::Null)
        }
        Command::Resize { console, columns, rows } => {
            resize(*console, *columns, *rows);
            Ok(serde_json::Value::Null)
        }
        other => Err(Error::Invalid(format!("{other:?} waits"))),
    }
}

#[cfg(test)]
#[path = "server_test.rs"]
mod tests;
