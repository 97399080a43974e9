//! The interval timer of a PC, as a value: an 8254, its gate and the speaker's data in port 0x61.
//!
//! Counter 0 is the system timer, on IRQ 0. Counter 1 once refreshed memory. Counter 2 makes sound, and guests
//! measure other clocks by it. Only counter 0 interrupts, and only by counting: that a control word makes its output
//! rise is no interrupt here.

mod channel;

use serde::{Deserialize, Serialize};

use super::time::Nanos;
use channel::{Channel, Tick};

/// The clock's frequency in Hz: a twelfth of 14.31818 MHz.
pub const FREQUENCY: u64 = 1_193_182;

/// Ticks between two interrupts at least, as for the local APIC's timer: 200 µs. Those between are one.
const SHORTEST_PERIOD: Tick = 239;

/// Port 0x61: the gate of counter 2, and whether its output is heard.
const GATE_2: u8 = 1;
/// What port 0x61 remembers: the two above, and the enables of two checks that find nothing.
const SPEAKER_WRITABLE: u8 = 0x0f;

const NANOS: u128 = 1_000_000_000;

fn tick(now: Nanos) -> Tick {
    (u128::from(now.0) * u128::from(FREQUENCY) / NANOS) as Tick
}

/// The first nanosecond of `tick`.
fn begins(tick: Tick) -> Nanos {
    let nanos = (u128::from(tick) * NANOS).div_ceil(FREQUENCY.into());
    Nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}

/// The timer's registers on the port bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Port {
    /// 0x40 to 0x42.
    Counter(u8),
    /// 0x43.
    Control,
    /// 0x61.
    Speaker,
}

impl Port {
    /// The register at an address of the port bus.
    #[must_use]
    pub fn at(address: u64) -> Option<Self> {
        match address {
            0x40..=0x42 => Some(Self::Counter((address - 0x40) as u8)),
            0x43 => Some(Self::Control),
            0x61 => Some(Self::Speaker),
            _ => None,
        }
    }
}

/// The timer. After each access its caller asks [`Pit::advance`] and [`Pit::deadline`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pit {
    channels: [Channel; 3],
    speaker: u8,
    /// Up to where counter 0's output was looked at.
    seen: Tick,
    /// It rose, which nobody was told yet.
    rose: bool,
}

impl Default for Pit {
    /// No counter counts, and the speaker is silent.
    fn default() -> Self {
        Self { channels: [true, true, false].map(Channel::new), speaker: 0, seen: 0, rose: false }
    }
}

impl Pit {
    /// The state of power-up.
    pub fn reset(&mut self) {
        *self = Self::default();
    }

    fn due(&self) -> Option<Tick> {
        let timer = &self.channels[0];
        let rise = timer.next_rise(self.seen)?;
        Some(if timer.repeats() { rise.max(self.seen.saturating_add(SHORTEST_PERIOD)) } else { rise })
    }

    /// When counter 0 interrupts next.
    #[must_use]
    pub fn deadline(&self) -> Option<Nanos> {
        self.due().map(begins)
    }

    /// Whether counter 0's output rose, which is an edge of IRQ 0. Several since the last call are one.
    #[must_use]
    pub fn advance(&mut self, now: Nanos) -> bool {
        self.count_to(tick(now));
        std::mem::take(&mut self.rose)
    }

    fn count_to(&mut self, now: Tick) {
        if self.due().is_some_and(|due| now >= due) {
            (self.seen, self.rose) = (now, true);
        }
        self.channels.iter_mut().for_each(|channel| channel.settle(now));
    }

    /// A read of a register.
    pub fn read(&mut self, port: Port, now: Nanos) -> u8 {
        let now = tick(now);
        self.count_to(now);
        match port {
            Port::Counter(which) => self.channels.get_mut(usize::from(which)).map_or(0xff, |c| c.read(now)),
            Port::Control => 0xff, // write-only
            Port::Speaker => {
                // Memory is refreshed every 18 ticks, which toggles bit 4.
                let refresh = u8::from(now / 18 % 2 == 1);
                let output = u8::from(self.channels[2].output(now));
                self.speaker & SPEAKER_WRITABLE | refresh << 4 | output << 5
            }
        }
    }

    /// A write of a register.
    pub fn write(&mut self, port: Port, value: u8, now: Nanos) {
        let now = tick(now);
        self.count_to(now);
        match port {
            Port::Counter(which) => {
                if let Some(channel) = self.channels.get_mut(usize::from(which)) {
                    channel.write(value, now);
                }
            }
            Port::Control => self.control(value, now),
            Port::Speaker => {
                self.speaker = value & SPEAKER_WRITABLE;
                self.channels[2].set_gate(value & GATE_2 != 0, now);
            }
        }
    }

    /// A control word: counter latch, read-back, or a mode (8254 data sheet, "Programming the 8254").
    fn control(&mut self, word: u8, now: Tick) {
        match (self.channels.get_mut(usize::from(word >> 6)), word & 0x30) {
            (Some(channel), 0) => channel.latch_count(now),
            (Some(channel), _) => channel.control(word),
            (None, _) => {
                let chosen = |which: usize| word & (2 << which) != 0;
                for (_, channel) in self.channels.iter_mut().enumerate().filter(|(which, _)| chosen(*which)) {
                    if word & 0x20 == 0 {
                        channel.latch_count(now);
                    }
                    if word & 0x10 == 0 {
                        channel.latch_status(now);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
#[path = "pit_test.rs"]
mod tests;
