//! The hub: one console of one guest.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::Error;
use crate::config::Serial;

/// Output that waits for the hub's thread; more is dropped, and a notice says so.
const PENDING_OUTPUT: usize = 256 << 10;

/// How a hub is set up, beside the guest's configuration.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Where `omega console` connects; none: nowhere.
    pub socket: Option<PathBuf>,
}

type Input = Box<dyn Fn(&[u8]) -> usize + Send + Sync>;
type Resize = Box<dyn Fn(u16, u16) + Send + Sync>;

#[derive(Default)]
struct Output {
    bytes: VecDeque<u8>,
    dropped: u64,
    signalled: bool,
}

struct Shared {
    /// Whether anybody can ever read what is written.
    on: bool,
    output: Mutex<Output>,
    input: Mutex<Option<Input>>,
    resize: Mutex<Option<Resize>>,
    wake: EventFd,
}

/// One console of one guest. Cheap to clone; all clones are the same console.
#[derive(Clone)]
pub struct Hub {
    shared: Arc<Shared>,
}

impl Hub {
    /// Sets the console up as `serial` says.
    ///
    /// # Errors
    /// The socket or file cannot be made.
    pub fn open(serial: &Serial, options: Options) -> Result<Self, Error> {
        drop(options);
        let shared = Shared {
            on: !matches!(serial, Serial::Off),
            output: Mutex::default(),
            input: Mutex::default(),
            resize: Mutex::default(),
            wake: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Where the guest's output goes. Writing never blocks and never fails; what nobody takes in time is
    /// dropped.
    #[must_use]
    pub fn writer(&self) -> Box<dyn Write + Send> {
        Box::new(Writer { shared: Arc::clone(&self.shared) })
    }

    /// Where input goes. `input` takes bytes and says how many it took; the rest is offered again a little
    /// later, or at once after [`Hub::input_ready`]. Called on the hub's thread; must not block. Input
    /// from before the call waits (bounded).
    pub fn connect_input(&self, input: impl Fn(&[u8]) -> usize + Send + Sync + 'static) {
        *self.shared.input.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(input));
        self.input_ready();
    }

    /// The input's consumer can take more.
    pub fn input_ready(&self) {
        // An eventfd that is full is readable already.
        let _ = self.shared.wake.write(1);
    }

    /// `resize` is told the terminal's columns and rows, at once where they are known and after each
    /// change. Called on the hub's thread; must not block.
    pub fn connect_resize(&self, resize: impl Fn(u16, u16) + Send + Sync + 'static) {
        *self.shared.resize.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(resize));
        self.input_ready();
    }
}

/// The guest's end of the output.
struct Writer {
    shared: Arc<Shared>,
}

impl Write for Writer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if !self.shared.on {
            return Ok(bytes.len());
        }
        let mut output = self.shared.output.lock().unwrap_or_else(PoisonError::into_inner);
        let room = PENDING_OUTPUT.saturating_sub(output.bytes.len()).min(bytes.len());
        output.bytes.extend(&bytes[..room]);
        output.dropped += (bytes.len() - room) as u64;
        if !std::mem::replace(&mut output.signalled, true) {
            drop(output);
            let _ = self.shared.wake.write(1);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
