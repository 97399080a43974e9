//! The 16550A serial port, on `vm_superio`.

use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use vm_superio::serial::{Error as UartError, SerialEvents, SerialState};
use vm_superio::{Serial as Uart, Trigger};
use vmm_sys_util::eventfd::EventFd;

use super::lock;
use crate::bus::{BusDevice, Outcome};
use crate::irq::InterruptLine;
use crate::lifecycle::{DeviceState, Error, Lifecycle};

const KIND: &str = "serial";
const VERSION: u32 = 1;
/// What the receiver holds at most: the crate's FIFO.
const FIFO: usize = 64;

/// A 16550A (National Semiconductor PC16550D) whose line runs at any speed.
///
/// Output goes to a writer, byte by byte, on the vCPU's thread: the writer must not block, and its
/// errors only lose the byte. Input comes by [`enqueue`](Self::enqueue).
pub struct Serial {
    uart: Mutex<Uart<Irq, Arc<Room>, Output>>,
    irq: Arc<dyn InterruptLine>,
    out: Output,
    room: Arc<Room>,
    stopped: AtomicBool,
}

impl Serial {
    /// A serial port that raises `irq` (edge-triggered) and writes what the guest sends to `out`.
    ///
    /// # Errors
    /// No eventfd is left.
    pub fn new(irq: Arc<dyn InterruptLine>, out: Box<dyn Write + Send>) -> io::Result<Self> {
        let out = Output(Arc::new(Mutex::new(out)));
        let room =
            Arc::new(Room { refused: AtomicBool::new(false), event: EventFd::new(libc::EFD_NONBLOCK)? });
        let uart = Mutex::new(Uart::with_events(Irq(Arc::clone(&irq)), Arc::clone(&room), out.clone()));
        Ok(Self { uart, irq, out, room, stopped: AtomicBool::new(false) })
    }

    /// Hands `input` to the guest's receiver and returns how many bytes fitted; none while the device is
    /// stopped. The rest is the caller's to keep and offer again when [`room`](Self::room) is signalled.
    pub fn enqueue(&self, input: &[u8]) -> usize {
        let mut uart = lock(&self.uart);
        let taken = match uart.fifo_capacity().min(input.len()) {
            _ if self.stopped.load(Ordering::Relaxed) => 0,
            0 => 0,
            // In loop-back mode the line is cut off, and what arrives on it is lost as on a real UART.
            fits => match uart.enqueue_raw_bytes(&input[..fits]) {
                Err(UartError::FullFifo) => 0,
                Ok(_) | Err(_) => fits,
            },
        };
        if taken < input.len() {
            self.room.refused.store(true, Ordering::Relaxed);
        }
        taken
    }

    /// Readable when [`enqueue`](Self::enqueue) left something over and there is room again. The
    /// waiter reads it to clear it.
    #[must_use]
    pub fn room(&self) -> &EventFd {
        &self.room.event
    }

    fn replace(&self, state: &SerialState) -> Result<(), Error> {
        let fresh =
            Uart::from_state(state, Irq(Arc::clone(&self.irq)), Arc::clone(&self.room), self.out.clone())
                .map_err(|e| Error::Invalid { kind: KIND, why: e.to_string() })?;
        *lock(&self.uart) = fresh;
        self.room.offer();
        Ok(())
    }
}

impl BusDevice for Serial {
    fn read(&self, offset: u64, data: &mut [u8]) -> Outcome {
        data.fill(0xff);
        // The registers are a byte each; a wider access reads consecutive ones, as the ISA bus does.
        let mut uart = lock(&self.uart);
        for (offset, byte) in (offset..8).zip(data) {
            *byte = uart.read(offset as u8);
        }
        Outcome::Done
    }

    fn write(&self, offset: u64, data: &[u8]) -> Outcome {
        let mut uart = lock(&self.uart);
        for (offset, byte) in (offset..8).zip(data) {
            // A failure means that the writer lost the byte or an interrupt could not be raised: a
            // UART has no way to tell the guest of either.
            let _ = uart.write(offset as u8, *byte);
        }
        Outcome::Done
    }
}

impl Lifecycle for Serial {
    fn kind(&self) -> &'static str {
        KIND
    }

    fn start(&self) -> Result<(), Error> {
        self.stopped.store(false, Ordering::Relaxed);
        self.room.offer();
        Ok(())
    }

    fn stop(&self) -> Result<(), Error> {
        let _uart = lock(&self.uart); // an `enqueue` that began before is finished
        self.stopped.store(true, Ordering::Relaxed);
        Ok(())
    }

    fn save(&self) -> Result<DeviceState, Error> {
        DeviceState::of(KIND, VERSION, &State::from(lock(&self.uart).state()))
    }

    fn restore(&self, state: &DeviceState) -> Result<(), Error> {
        let state: State = state.value(KIND, VERSION)?;
        if state.received.len() > FIFO {
            return Err(Error::Invalid { kind: KIND, why: format!("more than {FIFO} received bytes") });
        }
        self.replace(&state.into())
    }

    fn reset(&self) -> Result<(), Error> {
        self.replace(&SerialState::default())
    }
}

/// The state as it is saved: the registers by their names in the data sheet.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    dll: u8,
    dlm: u8,
    ier: u8,
    iir: u8,
    lcr: u8,
    lsr: u8,
    mcr: u8,
    msr: u8,
    scr: u8,
    received: Vec<u8>,
}

impl From<SerialState> for State {
    fn from(s: SerialState) -> Self {
        Self {
            dll: s.baud_divisor_low,
            dlm: s.baud_divisor_high,
            ier: s.interrupt_enable,
            iir: s.interrupt_identification,
            lcr: s.line_control,
            lsr: s.line_status,
            mcr: s.modem_control,
            msr: s.modem_status,
            scr: s.scratch,
            received: s.in_buffer,
        }
    }
}

impl From<State> for SerialState {
    fn from(s: State) -> Self {
        Self {
            baud_divisor_low: s.dll,
            baud_divisor_high: s.dlm,
            interrupt_enable: s.ier,
            interrupt_identification: s.iir,
            line_control: s.lcr,
            line_status: s.lsr,
            modem_control: s.mcr,
            modem_status: s.msr,
            scratch: s.scr,
            in_buffer: s.received,
        }
    }
}

struct Irq(Arc<dyn InterruptLine>);

impl Trigger for Irq {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.set(true)
    }
}

/// Shared with the UART, so that a restored one writes to the same place.
#[derive(Clone)]
struct Output(Arc<Mutex<Box<dyn Write + Send>>>);

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        lock(&self.0).write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        lock(&self.0).flush()
    }
}

/// Tells whoever was refused that the guest has read its input.
struct Room {
    refused: AtomicBool,
    event: EventFd,
}

impl Room {
    fn offer(&self) {
        if self.refused.swap(false, Ordering::Relaxed) {
            let _ = self.event.write(1); // it fails only if it is signalled already
        }
    }
}

impl SerialEvents for Room {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        self.offer();
    }
}

#[cfg(test)]
#[path = "serial_test.rs"]
mod tests;
