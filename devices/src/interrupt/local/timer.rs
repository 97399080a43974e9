//! The local APIC's timer (Intel SDM vol. 3A, "APIC Timer").
//!
//! It counts a clock of 1 GHz, so that one count at a divisor of 1 is a nanosecond of the guest's time. A guest
//! finds that out by measuring, as with every APIC, or reads it in CPUID 15H, which is the wiring's to fill.

use serde::{Deserialize, Serialize};

use crate::interrupt::time::{Deadline, Nanos, Now, Tsc};

/// A periodic timer fires no more often than this, whatever period a guest asks for: it would keep its host busy
/// with nothing else. Periods missed meanwhile are one interrupt, as with an interrupt that is still pending.
pub const SHORTEST_PERIOD: u64 = 200_000;

/// LVT timer register, bits 18:17.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    OneShot,
    Periodic,
    TscDeadline,
    Reserved,
}

impl Mode {
    /// The mode in an LVT timer register.
    pub(super) fn of(lvt: u32) -> Self {
        match (lvt >> 17) & 3 {
            0 => Self::OneShot,
            1 => Self::Periodic,
            2 => Self::TscDeadline,
            _ => Self::Reserved,
        }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
enum Run {
    #[default]
    Stopped,
    /// `count` counts were left at `since`.
    Counting {
        since: Nanos,
        count: u32,
    },
    Until(Tsc),
}

/// The registers initial count and divide configuration, and what is under way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Timer {
    initial: u32,
    divide: u32,
    run: Run,
}

impl Timer {
    pub(super) fn initial(&self) -> u32 {
        self.initial
    }

    pub(super) fn divide(&self) -> u32 {
        self.divide
    }

    /// The divide configuration register: bits 3, 1 and 0 (SDM, "Divide Configuration Register").
    fn divisor(&self) -> u64 {
        let value = ((self.divide >> 1) & 4) | (self.divide & 3);
        1 << ((value + 1) & 7)
    }

    /// The register current count.
    pub(super) fn current(&self, mode: Mode, now: Now) -> u32 {
        let Run::Counting { since, count } = self.run else { return 0 };
        let elapsed = now.nanos.since(since) / self.divisor();
        let left = u64::from(count).checked_sub(elapsed).filter(|left| *left != 0);
        match (left, mode) {
            (Some(left), _) => left as u32,
            // Held back by the shortest period, but counting.
            (None, Mode::Periodic) if self.initial != 0 => {
                self.initial - ((elapsed - u64::from(count)) % u64::from(self.initial)) as u32
            }
            (None, _) => 0,
        }
    }

    /// Starts to count from `count`; 0 stops. Ignored in TSC-deadline mode.
    pub(super) fn set_initial(&mut self, count: u32, mode: Mode, now: Now) {
        match mode {
            Mode::TscDeadline => {}
            Mode::OneShot | Mode::Periodic => {
                self.initial = count;
                self.run = if count == 0 { Run::Stopped } else { Run::Counting { since: now.nanos, count } };
            }
            Mode::Reserved => self.initial = count,
        }
    }

    /// Counts on at another speed from the count that the timer is at.
    pub(super) fn set_divide(&mut self, value: u32, mode: Mode, now: Now) {
        if let Run::Counting { .. } = self.run {
            self.run = match self.current(mode, now) {
                0 => Run::Stopped,
                count => Run::Counting { since: now.nanos, count },
            };
        }
        self.divide = value & 0xb;
    }

    /// A change of the LVT's mode disarms (SDM, "TSC-Deadline Mode").
    pub(super) fn change_mode(&mut self, from: Mode, to: Mode) {
        if from != to {
            self.run = Run::Stopped;
        }
    }

    /// IA32_TSC_DEADLINE: 0 when disarmed and in the other modes.
    pub(super) fn tsc_deadline(&self) -> Tsc {
        if let Run::Until(tsc) = self.run { tsc } else { Tsc(0) }
    }

    /// Arms for `tsc`, at once if it is past; 0 disarms. Ignored in the other modes.
    pub(super) fn set_tsc_deadline(&mut self, tsc: Tsc, mode: Mode) {
        if mode == Mode::TscDeadline {
            self.run = if tsc.0 == 0 { Run::Stopped } else { Run::Until(tsc) };
        }
    }

    fn ends(&self, since: Nanos, count: u32) -> Nanos {
        since.after(u64::from(count) * self.divisor())
    }

    /// When it fires next.
    pub(super) fn deadline(&self, mode: Mode) -> Option<Deadline> {
        match self.run {
            Run::Stopped => None,
            Run::Until(tsc) => Some(Deadline::Tsc(tsc)),
            Run::Counting { since, count } => {
                let held = if mode == Mode::Periodic { since.after(SHORTEST_PERIOD) } else { since };
                Some(Deadline::Nanos(self.ends(since, count).max(held)))
            }
        }
    }

    /// Whether it fires now; if so it stops, or counts on from the last end of a period.
    pub(super) fn expire(&mut self, mode: Mode, now: Now) -> bool {
        let due = match self.deadline(mode) {
            None => false,
            Some(Deadline::Nanos(at)) => now.nanos >= at,
            Some(Deadline::Tsc(at)) => now.tsc >= at,
        };
        if !due {
            return false;
        }
        self.run = match self.run {
            Run::Counting { since, count } if mode == Mode::Periodic && self.initial != 0 => {
                let first = self.ends(since, count);
                let period = u64::from(self.initial) * self.divisor();
                let since = first.after(now.nanos.since(first) / period * period);
                Run::Counting { since, count: self.initial }
            }
            _ => Run::Stopped,
        };
        true
    }
}
