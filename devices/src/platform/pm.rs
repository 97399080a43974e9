//! ACPI power management: the fixed event and control registers and the PM timer (ACPI 6.5, section 4.8.3).

use std::io;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::{lock, ports};
use crate::bus::{Action, BusDevice, Outcome};
use crate::irq::InterruptLine;
use crate::lifecycle::{DeviceState, Error, Lifecycle};

const KIND: &str = "acpi-pm";
const VERSION: u32 = 1;

/// How fast the PM timer counts (4.8.3.3).
pub const TIMER_HZ: u32 = 3_579_545;

/// `TMR_STS`, `TMR_EN`: the timer's top bit changed.
const TMR: u16 = 1 << 0;
/// `GBL_STS`, `GBL_EN`.
const GBL: u16 = 1 << 5;
/// `PWRBTN_STS`, `PWRBTN_EN`.
const PWRBTN: u16 = 1 << 8;
/// `SLPBTN_EN`.
const SLPBTN: u16 = 1 << 9;
/// `RTC_EN`.
const RTC: u16 = 1 << 10;
/// The enable bits that exist.
const ENABLES: u16 = TMR | GBL | PWRBTN | SLPBTN | RTC;

/// `PM1_CNT.SCI_EN`: always set, the machine has no other mode and no SMI command port.
const SCI_EN: u16 = 1 << 0;
/// `PM1_CNT`: `BM_RLD` and `SLP_TYP` read as written.
const CONTROL_KEPT: u16 = 1 << 1 | 0b111 << SLP_TYP_SHIFT;
const SLP_TYP_SHIFT: u32 = 10;
/// `PM1_CNT.SLP_EN`: enter the sleeping state of `SLP_TYP`; reads as 0.
const SLP_EN: u16 = 1 << 13;

// Offsets of the registers in the device's range.
const STATUS: u64 = ports::PM1A_EVENT.base - ports::PM.base;
const ENABLE: u64 = STATUS + 2;
const CONTROL: u64 = ports::PM1A_CONTROL.base - ports::PM.base;
const TIMER: u64 = ports::PM_TIMER.base - ports::PM.base;

/// The power-management device at [`ports::PM`].
pub struct Pm {
    sci: Arc<dyn InterruptLine>,
    state: Mutex<State>,
}

struct State {
    status: u16,
    enable: u16,
    control: u16,
    clock: Clock,
    /// The timer's top bit when `TMR_STS` was last brought up to date.
    top: bool,
    /// The level of the SCI line.
    raised: bool,
    stopped: bool,
}

/// Machine time, which stands still while the machine is stopped.
#[derive(Clone, Copy)]
enum Clock {
    /// It read zero at this moment.
    Running(Instant),
    /// It stands at this reading.
    Stopped(Duration),
}

impl Clock {
    fn reading(self, now: Instant) -> Duration {
        match self {
            Self::Running(zero) => now.saturating_duration_since(zero),
            Self::Stopped(reading) => reading,
        }
    }

    fn running(self, now: Instant) -> Self {
        // An age that the host's clock cannot express only costs the timer a jump.
        Self::Running(now.checked_sub(self.reading(now)).unwrap_or(now))
    }

    fn ticks(self, now: Instant) -> u32 {
        (self.reading(now).as_nanos() * u128::from(TIMER_HZ) / 1_000_000_000) as u32
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    status: u16,
    enable: u16,
    control: u16,
    timer_ns: u64,
}

impl State {
    fn initial(now: Instant) -> Self {
        Self {
            status: 0,
            enable: 0,
            control: SCI_EN,
            clock: Clock::Running(now),
            top: false,
            raised: false,
            stopped: false,
        }
    }

    /// Sets `TMR_STS` if the timer's top bit changed since the last look. (No interrupt comes at the
    /// change itself: guests use all 32 bits, which wrap after 20 minutes, and need none.)
    fn note_timer(&mut self, now: Instant) {
        let top = self.clock.ticks(now) >> 31 != 0;
        if top != self.top {
            self.top = top;
            self.status |= TMR;
        }
    }

    fn bytes(&mut self, now: Instant) -> [u8; ports::PM.len as usize] {
        self.note_timer(now);
        let mut bytes = [0; ports::PM.len as usize];
        let mut put = |at: u64, value: &[u8]| bytes[at as usize..][..value.len()].copy_from_slice(value);
        put(STATUS, &self.status.to_le_bytes());
        put(ENABLE, &self.enable.to_le_bytes());
        put(CONTROL, &self.control.to_le_bytes());
        put(TIMER, &self.clock.ticks(now).to_le_bytes());
        bytes
    }
}

impl Pm {
    /// A power-management device that raises `sci` (level-triggered).
    #[must_use]
    pub fn new(sci: Arc<dyn InterruptLine>) -> Self {
        Self { sci, state: Mutex::new(State::initial(Instant::now())) }
    }

    /// Presses the power button. `false`: the guest does not listen to it (its kernel has no ACPI, or is
    /// not that far yet) and will not notice.
    ///
    /// # Errors
    /// The interrupt cannot be raised.
    pub fn press_power_button(&self) -> io::Result<bool> {
        let mut state = lock(&self.state);
        state.status |= PWRBTN;
        self.update(&mut state)?;
        Ok(state.enable & PWRBTN != 0)
    }

    /// Brings the SCI line to the level that status and enable ask for.
    fn update(&self, state: &mut State) -> io::Result<()> {
        let high = state.status & state.enable & ENABLES != 0;
        if !state.stopped && high != state.raised {
            self.sci.set(high)?;
            state.raised = high;
        }
        Ok(())
    }

    fn write_byte(state: &mut State, offset: u64, byte: u8) -> Outcome {
        let set = |old: u16, high: u64| {
            let mut bytes = old.to_le_bytes();
            bytes[high as usize] = byte;
            u16::from_le_bytes(bytes)
        };
        match offset {
            STATUS | 1 => state.status &= !set(0, offset - STATUS), // written ones clear
            ENABLE | 3 => state.enable = set(state.enable, offset - ENABLE) & ENABLES,
            CONTROL | 5 => {
                let value = set(state.control, offset - CONTROL);
                state.control = value & CONTROL_KEPT | SCI_EN;
                let typ = value >> SLP_TYP_SHIFT & 0b111;
                if value & SLP_EN != 0 && typ == u16::from(ports::SLEEP_TYPE_S5) {
                    return Outcome::Act(Action::PowerOff);
                }
            }
            _ => {}
        }
        Outcome::Done
    }
}

impl BusDevice for Pm {
    fn read(&self, offset: u64, data: &mut [u8]) -> Outcome {
        let bytes = lock(&self.state).bytes(Instant::now());
        for (i, byte) in data.iter_mut().enumerate() {
            let at = usize::try_from(offset).ok().and_then(|offset| offset.checked_add(i));
            *byte = at.and_then(|at| bytes.get(at)).copied().unwrap_or(0xff);
        }
        Outcome::Done
    }

    fn write(&self, offset: u64, data: &[u8]) -> Outcome {
        let mut state = lock(&self.state);
        state.note_timer(Instant::now());
        let mut outcome = Outcome::Done;
        for (offset, byte) in (offset..ports::PM.len).zip(data) {
            if let act @ Outcome::Act(_) = Self::write_byte(&mut state, offset, *byte) {
                outcome = act;
            }
        }
        if let Err(error) = self.update(&mut state) {
            tracing::error!(%error, "The ACPI interrupt cannot be raised");
        }
        outcome
    }
}

impl Lifecycle for Pm {
    fn kind(&self) -> &'static str {
        KIND
    }

    fn start(&self) -> Result<(), Error> {
        let mut state = lock(&self.state);
        state.clock = state.clock.running(Instant::now());
        state.stopped = false;
        self.update(&mut state).map_err(|source| Error::Device {
            kind: KIND,
            what: "raise its interrupt",
            source,
        })
    }

    fn stop(&self) -> Result<(), Error> {
        let mut state = lock(&self.state);
        state.clock = Clock::Stopped(state.clock.reading(Instant::now()));
        state.stopped = true;
        Ok(())
    }

    fn save(&self) -> Result<DeviceState, Error> {
        let mut state = lock(&self.state);
        let now = Instant::now();
        state.note_timer(now);
        let timer_ns = u64::try_from(state.clock.reading(now).as_nanos()).unwrap_or(u64::MAX);
        let (status, enable, control) = (state.status, state.enable, state.control);
        DeviceState::of(KIND, VERSION, &Saved { status, enable, control, timer_ns })
    }

    fn restore(&self, state: &DeviceState) -> Result<(), Error> {
        let saved: Saved = state.value(KIND, VERSION)?;
        let mut state = lock(&self.state);
        state.status = saved.status;
        state.enable = saved.enable & ENABLES;
        state.control = saved.control & CONTROL_KEPT | SCI_EN;
        let now = Instant::now();
        state.clock = Clock::Stopped(Duration::from_nanos(saved.timer_ns));
        state.top = state.clock.ticks(now) >> 31 != 0;
        if !state.stopped {
            state.clock = state.clock.running(now);
        }
        // Where the line stands at the new place is unknown: `update` sets it whatever it was.
        state.raised = state.status & state.enable & ENABLES == 0;
        self.update(&mut state).map_err(|source| Error::Device {
            kind: KIND,
            what: "raise its interrupt",
            source,
        })
    }

    fn reset(&self) -> Result<(), Error> {
        let mut state = lock(&self.state);
        if state.raised {
            self.sci.set(false).map_err(|source| Error::Device {
                kind: KIND,
                what: "lower its interrupt",
                source,
            })?;
        }
        let stopped = state.stopped;
        *state = State { stopped, ..State::initial(Instant::now()) };
        if stopped {
            state.clock = Clock::Stopped(Duration::ZERO);
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "pm_test.rs"]
mod tests;
