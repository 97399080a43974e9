//! One counter of an 8254, as a function of the ticks of its clock.

use serde::{Deserialize, Serialize};

/// A tick of the PIT's clock, counted since the guest's power-on.
pub(super) type Tick = u64;

/// The control word's RW bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Access {
    Low,
    High,
    #[default]
    Both,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
enum Run {
    /// No count was written since the control word.
    #[default]
    Unloaded,
    /// Modes 1 and 5: a count was written, and the gate has not risen since.
    Armed,
    /// `count` was loaded at `start`, which may be the next tick; by the end of a period, if it `rolled` over.
    Counting { start: Tick, count: u16, rolled: bool },
    /// The gate is low after `elapsed` ticks.
    Held { elapsed: u64, count: u16 },
}

/// A counter (Intel 8254 data sheet, "Mode Definitions").
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Channel {
    mode: u8,
    bcd: bool,
    access: Access,
    /// The count as written; what is loaded next.
    reload: u16,
    /// It was written, but not loaded yet.
    null: bool,
    run: Run,
    gate: bool,
    /// The low byte of a count of which the high byte is to come.
    low: Option<u8>,
    /// The next read gives the high byte.
    high_next: bool,
    latched: Option<u16>,
    status: Option<u8>,
}

impl Channel {
    /// A counter whose gate is at `gate`, with no mode chosen.
    pub(super) fn new(gate: bool) -> Self {
        Self {
            mode: 0,
            bcd: false,
            access: Access::default(),
            reload: 0,
            null: true,
            run: Run::Unloaded,
            gate,
            low: None,
            high_next: false,
            latched: None,
            status: None,
        }
    }

    fn is_periodic(&self) -> bool {
        matches!(self.mode, 2 | 3)
    }

    /// How many different counts there are: what 0 stands for.
    fn modulus(&self) -> u64 {
        if self.bcd { 10_000 } else { 0x1_0000 }
    }

    /// What the register's content `raw` counts. A digit above 9 counts as what it is; a period is never below
    /// 2, which the data sheet calls illegal.
    fn length(&self, raw: u16) -> u64 {
        let digit = |shift: u32| u64::from(raw >> shift & 0xf);
        let value =
            if self.bcd { digit(12) * 1000 + digit(8) * 100 + digit(4) * 10 + digit(0) } else { raw.into() };
        let value = if value == 0 { self.modulus() } else { value };
        if self.is_periodic() { value.max(2) } else { value }
    }

    fn encode(&self, count: u64) -> u16 {
        let count = count % self.modulus();
        if !self.bcd {
            return count as u16;
        }
        let digit = |unit: u64| (count / unit % 10) as u16;
        digit(1000) << 12 | digit(100) << 8 | digit(10) << 4 | digit(1)
    }

    /// How long the count is under way and what it is; `None` before it is loaded.
    fn progress(&self, now: Tick) -> Option<(u64, u64)> {
        match self.run {
            Run::Unloaded | Run::Armed => None,
            Run::Counting { start, count, .. } => Some((now.checked_sub(start)?, self.length(count))),
            Run::Held { elapsed, count } => Some((elapsed, self.length(count))),
        }
    }

    /// The OUT pin.
    pub(super) fn output(&self, now: Tick) -> bool {
        let Some((elapsed, length)) = self.progress(now) else { return self.mode != 0 };
        match self.mode {
            0 | 1 => elapsed >= length,
            2 => elapsed % length != length - 1 || !self.gate,
            3 => elapsed % length < length.div_ceil(2) || !self.gate,
            _ => elapsed != length,
        }
    }

    fn count(&self, now: Tick) -> u16 {
        let Some((elapsed, length)) = self.progress(now) else { return self.reload };
        let phase = elapsed % length;
        self.encode(match self.mode {
            2 => length - phase,
            // Down by two, twice over in each period.
            3 => (length & !1) - 2 * (phase % length.div_ceil(2)),
            _ => self.modulus() + length - elapsed % self.modulus(),
        })
    }

    /// The first tick after `after` at which OUT rises by counting.
    pub(super) fn next_rise(&self, after: Tick) -> Option<Tick> {
        let Run::Counting { start, count, rolled } = self.run else { return None };
        if rolled && start > after {
            return Some(start);
        }
        let length = self.length(count);
        let first = start.saturating_add(if self.mode >= 4 { length + 1 } else { length });
        if first > after {
            return Some(first);
        }
        let more = (after - first) / length + 1;
        self.is_periodic().then(|| first.saturating_add(more.saturating_mul(length)))
    }

    /// Whether OUT rises again and again.
    pub(super) fn repeats(&self) -> bool {
        self.is_periodic()
    }

    /// Takes the count that was written into use once a period of the old one is over, which the data sheet has
    /// mode 3 do after half of one.
    pub(super) fn settle(&mut self, now: Tick) {
        let Run::Counting { start, count, .. } = self.run else { return };
        if !self.is_periodic() {
            self.null &= now < start;
            return;
        }
        let ended = start.saturating_add(self.length(count));
        if now >= ended {
            let length = self.length(self.reload);
            let start = ended.saturating_add((now - ended) / length * length);
            self.run = Run::Counting { start, count: self.reload, rolled: true };
            self.null = false;
        } else if now >= start && count == self.reload {
            self.null = false;
        }
    }

    /// A control word with this counter's mode and access.
    pub(super) fn control(&mut self, word: u8) {
        let access = match (word >> 4) & 3 {
            1 => Access::Low,
            2 => Access::High,
            _ => Access::Both,
        };
        let mode = (word >> 1) & 7;
        *self = Self {
            mode: if mode > 5 { mode - 4 } else { mode },
            bcd: word & 1 != 0,
            access,
            reload: self.reload,
            ..Self::new(self.gate)
        };
    }

    pub(super) fn latch_count(&mut self, now: Tick) {
        if self.latched.is_none() {
            self.latched = Some(self.count(now));
            self.high_next = false;
        }
    }

    pub(super) fn latch_status(&mut self, now: Tick) {
        let access = match self.access {
            Access::Low => 1,
            Access::High => 2,
            Access::Both => 3,
        };
        let status = u8::from(self.output(now)) << 7
            | u8::from(self.null) << 6
            | access << 4
            | (self.mode & 7) << 1
            | u8::from(self.bcd);
        self.status.get_or_insert(status);
    }

    pub(super) fn read(&mut self, now: Tick) -> u8 {
        if let Some(status) = self.status.take() {
            return status;
        }
        let [low, high] = self.latched.unwrap_or_else(|| self.count(now)).to_le_bytes();
        let gives_high = match self.access {
            Access::Low => false,
            Access::High => true,
            Access::Both => self.high_next,
        };
        self.high_next = self.access == Access::Both && !gives_high;
        if !self.high_next {
            self.latched = None;
        }
        if gives_high { high } else { low }
    }

    pub(super) fn write(&mut self, value: u8, now: Tick) {
        let count = match (self.access, self.low.take()) {
            (Access::Low, _) => u16::from(value),
            (Access::High, _) => u16::from(value) << 8,
            (Access::Both, Some(low)) => u16::from_le_bytes([low, value]),
            (Access::Both, None) => {
                self.low = Some(value);
                if self.mode == 0 {
                    self.run = Run::Unloaded;
                }
                return;
            }
        };
        self.load(count, now);
    }

    fn load(&mut self, count: u16, now: Tick) {
        self.reload = count;
        self.null = true;
        let under_way = matches!(self.run, Run::Counting { .. } | Run::Held { .. });
        match self.mode {
            1 | 5 if under_way => {}
            1 | 5 => self.run = Run::Armed,
            2 | 3 if under_way => {}
            _ if self.gate => self.run = Run::Counting { start: now.saturating_add(1), count, rolled: false },
            _ => self.run = Run::Held { elapsed: 0, count },
        }
    }

    /// The gate: a level that lets count, or an edge that starts, by the mode (data sheet, "Gate Pin Operations
    /// Summary").
    pub(super) fn set_gate(&mut self, high: bool, now: Tick) {
        let rose = high && !self.gate;
        self.gate = high;
        let restart = Run::Counting { start: now.saturating_add(1), count: self.reload, rolled: false };
        self.run = match (self.mode, self.run) {
            (_, Run::Unloaded) => Run::Unloaded,
            (1 | 5, run) => {
                if rose {
                    restart
                } else {
                    run
                }
            }
            (2 | 3, _) if rose => restart,
            (_, Run::Counting { start, count, .. }) if !high => {
                Run::Held { elapsed: now.saturating_sub(start), count }
            }
            (_, Run::Held { elapsed, count }) if high => {
                Run::Counting { start: now.saturating_sub(elapsed), count, rolled: false }
            }
            (_, run) => run,
        };
    }
}
