//! The hub: one console of one guest.

use std::collections::VecDeque;
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use devices::thread::{Role, spawn};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::Error;
use super::escape::Command;
use super::event::Event;
use super::pump::{Pump, Terminal};
use super::terminal;
use crate::config::Serial;
use crate::control::socket::Listener;

/// Output that waits for the hub's thread; more is dropped, and a notice says so.
const PENDING_OUTPUT: usize = 128 << 10;
/// How long [`Hub::finish`] waits for readers to take the last output.
pub(super) const LAST_WORDS: Duration = Duration::from_secs(1);

/// How a hub is set up, beside the guest's configuration.
#[derive(Default)]
pub struct Options {
    /// Where `omega console` connects; none: nowhere.
    pub socket: Option<PathBuf>,
    /// What is done with what the person at the terminal asks behind the escape key. Called on the hub's
    /// thread; must not block.
    pub command: Option<Box<dyn Fn(Command) + Send + Sync>>,
}

type Input = Box<dyn Fn(&[u8]) -> usize + Send + Sync>;
type Resize = Box<dyn Fn(u16, u16) + Send + Sync>;

#[derive(Default)]
pub(super) struct Output {
    pub(super) bytes: VecDeque<u8>,
    pub(super) dropped: u64,
    /// The hub's thread knows that there is something, or will look soon.
    pub(super) signalled: bool,
}

pub(super) struct Shared {
    /// Whether anybody can ever read what is written.
    on: bool,
    output: Mutex<Output>,
    pub(super) input: Mutex<Option<Input>>,
    pub(super) room: Mutex<Option<Event>>,
    resize: Mutex<Option<Resize>>,
    size: Mutex<Option<(u16, u16)>>,
    pub(super) wake: Event,
    pub(super) finish: AtomicBool,
    /// Whether the terminal is this console's: before that its keys are signals to the process.
    pub(super) live: AtomicBool,
    raw: Mutex<Option<terminal::Raw>>,
    /// Whether the hub's thread ended.
    finished: (Mutex<bool>, Condvar),
}

impl Shared {
    pub(super) fn output(&self) -> MutexGuard<'_, Output> {
        lock(&self.output)
    }

    pub(super) fn wake(&self) {
        // An eventfd that is full is readable already.
        let _ = self.wake.0.write(1);
    }

    pub(super) fn ended(&self) {
        *lock(&self.finished.0) = true;
        self.finished.1.notify_all();
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One console of one guest. Cheap to clone; all clones are the same console.
#[derive(Clone)]
pub struct Hub {
    shared: Arc<Shared>,
}

impl Hub {
    /// Sets the console up as `serial` says, and starts its thread.
    ///
    /// # Errors
    /// The socket or file cannot be made, or no thread is left.
    pub fn open(serial: &Serial, options: Options) -> Result<Self, Error> {
        let on = !matches!(serial, Serial::Off);
        let shared = Arc::new(Shared {
            on,
            output: Mutex::default(),
            input: Mutex::default(),
            room: Mutex::default(),
            resize: Mutex::default(),
            size: Mutex::default(),
            wake: Event(Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?)),
            finish: AtomicBool::new(false),
            live: AtomicBool::new(false),
            raw: Mutex::default(),
            finished: (Mutex::new(!on), Condvar::new()),
        });
        let hub = Self { shared: Arc::clone(&shared) };
        if !on {
            return Ok(hub);
        }
        let Options { socket, command } = options;
        let listener = match socket {
            Some(path) => match Listener::at(&path) {
                Ok(listener) => Some(listener),
                Err(source) => return Err(Error::Socket { path, source }),
            },
            None => None,
        };
        let file = match serial {
            Serial::File(path) => match OpenOptions::new().append(true).create(true).open(path) {
                Ok(file) => Some(file),
                Err(source) => return Err(Error::File { path: path.clone(), source }),
            },
            _ => None,
        };
        let terminal = match serial {
            Serial::Terminal => {
                hub.window_changed();
                Some(Terminal::open(command))
            }
            _ => None,
        };
        let pump = Pump::new(shared, listener, file, terminal);
        spawn(Role::Console, "console", || pump.run())?;
        Ok(hub)
    }

    /// With [`Serial::Terminal`]: from now on keys go to the guest, and the terminal is raw until
    /// [`Hub::finish`]. `true` when a person is there. Before this Ctrl-C still ends the process.
    ///
    /// # Errors
    /// The terminal cannot be made raw.
    pub fn take_terminal(&self, serial: &Serial) -> io::Result<bool> {
        if !matches!(serial, Serial::Terminal) {
            return Ok(false);
        }
        let raw = terminal::Raw::enter()?;
        let person = raw.is_some();
        *lock(&self.shared.raw) = raw;
        self.shared.live.store(true, Ordering::SeqCst);
        self.shared.wake();
        Ok(person)
    }

    /// Where the guest's output goes. Writing never blocks and never fails; what nobody takes in time is
    /// dropped.
    #[must_use]
    pub fn writer(&self) -> Box<dyn Write + Send> {
        Box::new(Writer { shared: Arc::clone(&self.shared) })
    }

    /// Where input goes. `input` takes bytes and says how many it took; the rest is offered again a little
    /// later, or at once after [`Hub::input_ready`] or when [`Hub::watch_room`]'s event comes. Called on
    /// the hub's thread; must not block. Input from before the call waits (bounded).
    pub fn connect_input(&self, input: impl Fn(&[u8]) -> usize + Send + Sync + 'static) {
        *lock(&self.shared.input) = Some(Box::new(input));
        self.shared.wake();
    }

    /// The input's consumer can take more.
    pub fn input_ready(&self) {
        self.shared.wake();
    }

    /// The input's consumer can take more whenever `room` is readable. The hub reads it to clear it.
    pub fn watch_room(&self, room: EventFd) {
        *lock(&self.shared.room) = Some(Event(Arc::new(room)));
        self.shared.wake();
    }

    /// `resize` is told the terminal's columns and rows, at once where they are known and after each
    /// change. Called on whichever thread notices; must not block.
    pub fn connect_resize(&self, resize: impl Fn(u16, u16) + Send + Sync + 'static) {
        if let Some((columns, rows)) = *lock(&self.shared.size) {
            resize(columns, rows);
        }
        *lock(&self.shared.resize) = Some(Box::new(resize));
    }

    /// The window of somebody who looks at this console has `columns` and `rows` now.
    pub fn resize(&self, columns: u16, rows: u16) {
        *lock(&self.shared.size) = Some((columns, rows));
        if let Some(resize) = &*lock(&self.shared.resize) {
            resize(columns, rows);
        }
    }

    /// The process's own terminal may have another size now.
    pub fn window_changed(&self) {
        if let Some((columns, rows)) = terminal::size() {
            self.resize(columns, rows);
        }
    }

    /// Gives readers a moment to take the last output, detaches them and puts the terminal back. Output that is written afterwards goes nowhere. Returns within about two seconds
    /// whatever the readers do.
    pub fn finish(&self) {
        self.shared.finish.store(true, Ordering::SeqCst);
        self.shared.wake();
        let (ended, changed) = &self.shared.finished;
        let waited = changed.wait_timeout_while(lock(ended), 2 * LAST_WORDS, |ended| !*ended);
        drop(waited);
        drop(lock(&self.shared.raw).take());
    }
}

/// The guest's end of the output.
struct Writer {
    shared: Arc<Shared>,
}

impl Write for Writer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if !self.shared.on || self.shared.finish.load(Ordering::Relaxed) {
            return Ok(bytes.len());
        }
        let mut output = self.shared.output();
        let room = PENDING_OUTPUT.saturating_sub(output.bytes.len()).min(bytes.len());
        output.bytes.extend(&bytes[..room]);
        output.dropped += (bytes.len() - room) as u64;
        if !std::mem::replace(&mut output.signalled, true) {
            drop(output);
            self.shared.wake();
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
#[path = "hub_test.rs"]
mod tests;
