//! The MC146818 clock with its CMOS RAM, as PCs have it.

use std::sync::Mutex;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::lock;
use crate::bus::{BusDevice, Outcome};
use crate::lifecycle::{DeviceState, Error, Lifecycle};

use calendar::DateTime;

mod calendar;

const KIND: &str = "rtc";
const VERSION: u32 = 1;

// CMOS RAM addresses (Motorola MC146818A data sheet, figure 13; IBM PC AT beyond 0x0d).
const SECONDS: u8 = 0x00;
const MINUTES: u8 = 0x02;
const HOURS: u8 = 0x04;
const DAY_OF_WEEK: u8 = 0x06;
const DAY_OF_MONTH: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const REGISTER_A: u8 = 0x0a;
const REGISTER_B: u8 = 0x0b;
const REGISTER_C: u8 = 0x0c;
const REGISTER_D: u8 = 0x0d;
/// The century's two digits; ACPI's `FADT.CENTURY` names this address.
pub const CENTURY: u8 = 0x32;

/// Register A: an update is about to happen.
const UIP: u8 = 1 << 7;
/// Register B: no updates, the guest sets the clock.
const SET: u8 = 1 << 7;
/// Register B: binary instead of BCD.
const DM: u8 = 1 << 2;
/// Register B: 24 hours instead of 12.
const H24: u8 = 1 << 1;
/// Register D: RAM and time are valid.
const VRT: u8 = 1 << 7;
/// Hours in 12-hour mode: afternoon.
const PM: u8 = 1 << 7;

/// How long before the update `UIP` is set (data sheet, table 5).
const UPDATE_WARNING: Duration = Duration::from_micros(244);

/// How much RAM the guest has, as a BIOS leaves it in CMOS.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RamSize {
    /// Bytes below 4 GiB.
    pub below_4g: u64,
    /// Bytes above 4 GiB.
    pub above_4g: u64,
}

/// The clock and CMOS RAM at [`ports::RTC`](super::ports::RTC): UTC, in BCD and 24 hours unless the guest
/// chooses otherwise. Setting it changes the guest's distance from the host's clock. Alarms are stored;
/// no interrupt is raised.
pub struct Rtc {
    now: fn() -> Duration,
    ram: RamSize,
    state: Mutex<State>,
}

struct State {
    index: u8,
    cmos: [u8; 128],
    /// The guest's clock minus the host's, in seconds.
    offset: i64,
    /// The time while the guest sets it ([`SET`]).
    held: Option<DateTime>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    index: u8,
    cmos: Vec<u8>,
    offset_s: i64,
    held: Option<DateTime>,
}

impl Rtc {
    /// A clock that runs with the host's, and CMOS RAM that tells of `ram`.
    #[must_use]
    pub fn new(ram: RamSize) -> Self {
        Self::with_clock(ram, || SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default())
    }

    fn with_clock(ram: RamSize, now: fn() -> Duration) -> Self {
        Self { now, ram, state: Mutex::new(State::initial(ram)) }
    }
}

impl State {
    fn initial(ram: RamSize) -> Self {
        let mut cmos = [0; 128];
        cmos[usize::from(REGISTER_A)] = 0x26; // 32,768 Hz time base, 1024 Hz periodic rate
        cmos[usize::from(REGISTER_B)] = H24;
        let mut put = |at: usize, bytes: &[u8]| cmos[at..at + bytes.len()].copy_from_slice(bytes);
        let extended = ram.below_4g.saturating_sub(1 << 20) >> 10;
        let beyond_16m = ram.below_4g.saturating_sub(16 << 20) >> 16;
        let short = |value: u64| u16::try_from(value).unwrap_or(u16::MAX).to_le_bytes();
        put(0x15, &short(640.min(ram.below_4g >> 10))); // KiB of base memory
        put(0x17, &short(extended)); // KiB above 1 MiB, as set up
        put(0x30, &short(extended)); // the same, as found
        put(0x34, &short(beyond_16m)); // 64 KiB units above 16 MiB
        put(0x5b, &(ram.above_4g >> 16).to_le_bytes()[..3]); // 64 KiB units above 4 GiB
        Self { index: 0, cmos, offset: 0, held: None }
    }

    fn register(&self, address: u8) -> u8 {
        self.cmos[usize::from(address & 0x7f)]
    }

    fn time(&self, now: Duration) -> DateTime {
        self.held.unwrap_or_else(|| {
            let seconds = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
            DateTime::from_unix(seconds.saturating_add(self.offset))
        })
    }

    fn encode(&self, value: u8) -> u8 {
        if self.register(REGISTER_B) & DM != 0 { value } else { ((value / 10) << 4) | (value % 10) }
    }

    fn decode(&self, value: u8) -> u8 {
        if self.register(REGISTER_B) & DM != 0 { value } else { (value >> 4) * 10 + (value & 0xf) }
    }

    fn encode_hour(&self, hour: u8) -> u8 {
        if self.register(REGISTER_B) & H24 != 0 {
            return self.encode(hour);
        }
        let half = if hour >= 12 { PM } else { 0 };
        half | self.encode(if hour.is_multiple_of(12) { 12 } else { hour % 12 })
    }

    fn decode_hour(&self, value: u8) -> u8 {
        if self.register(REGISTER_B) & H24 != 0 {
            return self.decode(value);
        }
        self.decode(value & !PM) % 12 + if value & PM != 0 { 12 } else { 0 }
    }

    fn read(&mut self, now: Duration) -> u8 {
        let time = self.time(now);
        match self.index {
            SECONDS => self.encode(time.second),
            MINUTES => self.encode(time.minute),
            HOURS => self.encode_hour(time.hour),
            DAY_OF_WEEK => self.encode(time.day_of_week()),
            DAY_OF_MONTH => self.encode(time.day),
            MONTH => self.encode(time.month),
            YEAR => self.encode((time.year % 100) as u8),
            CENTURY => self.encode((time.year / 100) as u8),
            REGISTER_A => {
                let left = Duration::from_secs(1) - Duration::from_nanos(now.subsec_nanos().into());
                let soon = self.held.is_none() && left <= UPDATE_WARNING;
                self.register(REGISTER_A) | if soon { UIP } else { 0 }
            }
            REGISTER_C => 0, // no interrupt is ever pending
            REGISTER_D => VRT,
            other => self.register(other),
        }
    }

    fn write(&mut self, value: u8, now: Duration) {
        let mut time = self.time(now);
        match self.index {
            SECONDS => time.second = self.decode(value),
            MINUTES => time.minute = self.decode(value),
            HOURS => time.hour = self.decode_hour(value),
            DAY_OF_MONTH => time.day = self.decode(value),
            MONTH => time.month = self.decode(value),
            YEAR => time.year = time.year / 100 * 100 + u16::from(self.decode(value) % 100),
            CENTURY => time.year = u16::from(self.decode(value) % 100) * 100 + time.year % 100,
            REGISTER_A => return self.cmos[usize::from(REGISTER_A)] = value & !UIP,
            REGISTER_B => return self.write_register_b(value, now),
            DAY_OF_WEEK | REGISTER_C | REGISTER_D => return,
            other => return self.cmos[usize::from(other & 0x7f)] = value,
        }
        if self.held.is_some() {
            self.held = Some(time);
        } else {
            self.set(time, now);
        }
    }

    fn write_register_b(&mut self, value: u8, now: Duration) {
        if value & SET != 0 && self.held.is_none() {
            self.held = Some(self.time(now));
        }
        self.cmos[usize::from(REGISTER_B)] = value;
        if value & SET == 0
            && let Some(time) = self.held.take()
        {
            self.set(time, now);
        }
    }

    fn set(&mut self, time: DateTime, now: Duration) {
        let now = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
        self.offset = time.to_unix().saturating_sub(now);
    }
}

impl BusDevice for Rtc {
    fn read(&self, offset: u64, data: &mut [u8]) -> Outcome {
        data.fill(0xff);
        // The index port is write-only on a PC.
        if let (1, [byte, ..]) = (offset, data) {
            *byte = lock(&self.state).read((self.now)());
        }
        Outcome::Done
    }

    fn write(&self, offset: u64, data: &[u8]) -> Outcome {
        let mut state = lock(&self.state);
        for (offset, byte) in (offset..2).zip(data) {
            match offset {
                0 => state.index = byte & 0x7f, // bit 7 masks NMIs, of which there are none
                _ => state.write(*byte, (self.now)()),
            }
        }
        Outcome::Done
    }
}

impl Lifecycle for Rtc {
    fn kind(&self) -> &'static str {
        KIND
    }

    fn start(&self) -> Result<(), Error> {
        Ok(())
    }

    fn stop(&self) -> Result<(), Error> {
        Ok(())
    }

    fn save(&self) -> Result<DeviceState, Error> {
        let state = lock(&self.state);
        let saved =
            Saved { index: state.index, cmos: state.cmos.to_vec(), offset_s: state.offset, held: state.held };
        DeviceState::of(KIND, VERSION, &saved)
    }

    fn restore(&self, state: &DeviceState) -> Result<(), Error> {
        let saved: Saved = state.value(KIND, VERSION)?;
        let invalid = |why: &str| Error::Invalid { kind: KIND, why: why.to_owned() };
        let cmos = saved.cmos.try_into().map_err(|_| invalid("CMOS RAM has 128 bytes"))?;
        if saved.held.is_some_and(|time| time.year > 9999) {
            return Err(invalid("the year is beyond 9999"));
        }
        let (index, offset) = (saved.index & 0x7f, saved.offset_s);
        *lock(&self.state) = State { index, cmos, offset, held: saved.held };
        Ok(())
    }

    /// CMOS RAM and clock are fed by the battery: only the index and the interrupt enables are lost.
    fn reset(&self) -> Result<(), Error> {
        let mut state = lock(&self.state);
        let now = (self.now)();
        if let Some(time) = state.held.take() {
            state.set(time, now);
        }
        let (offset, shutdown) = (state.offset, state.register(0x0f));
        *state = State::initial(self.ram);
        state.offset = offset;
        state.cmos[0x0f] = shutdown;
        Ok(())
    }
}

#[cfg(test)]
#[path = "rtc_test.rs"]
mod tests;
