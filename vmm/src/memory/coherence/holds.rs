//! How long a page stays after it came, so that whoever needed it can use it before the next one gets it.
//!
//! Each page has a *heat*. Who needs a page again soon after it had to give it up finds it hotter, who needs it later,
//! colder. A hot page is held longer: it travels less often, and more is done with it each time. What was asked for
//! only to be read is held briefly in any case, since a writer waits and a reader has read.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::message::Right;

/// How hot a page is: an index of [`TIMES`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Heat(u8);

/// How long pages are held, by heat. The first is about what a thread needs to be woken and to touch a page.
const TIMES: [Duration; 6] = [micros(25), micros(50), micros(100), micros(200), micros(400), micros(800)];

const fn micros(micros: u64) -> Duration {
    Duration::from_micros(micros)
}

/// The hottest that a page is held to be read.
const READ: usize = 2;

/// A page that is needed again within this time, or twice what it was held, was taken too early.
const SOON: Duration = Duration::from_micros(500);

/// So many pages that were given up last are remembered.
const REMEMBERED: usize = 1024;

impl Heat {
    /// From three bits.
    pub(super) fn from_bits(bits: u8) -> Self {
        Self(bits.min(TIMES.len() as u8 - 1))
    }

    /// As three bits.
    pub(super) fn bits(self) -> u8 {
        self.0
    }

    fn level(self, right: Right) -> usize {
        let level = usize::from(self.0).min(TIMES.len() - 1);
        if right == Right::Read { level.min(READ) } else { level }
    }
}

/// The holds of a shard's pages, which are numbered.
pub(super) struct Holds {
    /// By level, each in the order of their ends.
    queues: [VecDeque<(Instant, u32)>; TIMES.len()],
    /// Which page was given up when, by its number's low bits.
    lost: Vec<Option<(u32, Instant)>>,
}

impl Holds {
    pub(super) fn new() -> Self {
        Self { queues: Default::default(), lost: vec![None; REMEMBERED] }
    }

    /// Forgets all of them.
    pub(super) fn clear(&mut self) {
        *self = Self::new();
    }

    fn remembered(&mut self, page: u32) -> Option<&mut Option<(u32, Instant)>> {
        self.lost.get_mut(page as usize % REMEMBERED)
    }

    /// `page` had to be given up, or may not be written to any longer.
    pub(super) fn lost(&mut self, page: u32, now: Instant) {
        if let Some(slot) = self.remembered(page) {
            *slot = Some((page, now));
        }
    }

    /// How hot `page` is now that it is needed again; `true`: it was given up only just now.
    pub(super) fn heat(&mut self, page: u32, heat: Heat, needed: Instant) -> (Heat, bool) {
        let soon = SOON.max(TIMES[heat.level(Right::Write)] * 2);
        let lost = self.remembered(page).and_then(|slot| slot.take_if(|(other, _)| *other == page));
        let again = lost.is_some_and(|(_, when)| needed.saturating_duration_since(when) < soon);
        let next = if again { heat.0 + 1 } else { heat.0.saturating_sub(1) };
        (Heat::from_bits(next), again)
    }

    /// `page` came; returns until when it is held.
    pub(super) fn begin(&mut self, page: u32, heat: Heat, right: Right, now: Instant) -> Instant {
        let level = heat.level(right);
        let until = now + TIMES[level];
        self.queues[level].push_back((until, page));
        until
    }

    /// A page whose hold is over, unless it is held again since. Ask until there is none.
    pub(super) fn due(&mut self, now: Instant) -> Option<u32> {
        let queue =
            self.queues.iter_mut().find(|queue| queue.front().is_some_and(|(until, _)| *until <= now))?;
        queue.pop_front().map(|(_, page)| page)
    }

    /// When the next hold is over.
    pub(super) fn next(&self) -> Option<Instant> {
        self.queues.iter().filter_map(|queue| queue.front()).map(|(until, _)| *until).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_that_goes_to_and_fro_is_held_longer_within_bounds_and_less_again_when_it_rests() {
        let mut holds = Holds::new();
        let (mut now, mut heat) = (Instant::now(), Heat::default());
        let mut held = Vec::new();
        for _ in 0..10 {
            held.push(holds.begin(7, heat, Right::Write, now) - now);
            now += Duration::from_millis(2);
            holds.lost(7, now);
            let (next, again) = holds.heat(7, heat, now + Duration::from_micros(100));
            assert!(again);
            heat = next;
        }
        assert!(held.is_sorted() && held[0] == TIMES[0] && held[9] == TIMES[5], "{held:?}");
        assert_eq!(holds.begin(7, heat, Right::Read, now) - now, TIMES[2], "who reads holds it briefly");
        for _ in 0..10 {
            holds.lost(7, now);
            now += Duration::from_secs(1);
            let (next, again) = holds.heat(7, heat, now);
            assert!(!again);
            heat = next;
        }
        assert_eq!(heat, Heat::default());
    }

    #[test]
    fn holds_end_when_their_time_is_over_whatever_their_lengths() {
        let mut holds = Holds::new();
        let now = Instant::now();
        holds.begin(1, Heat(3), Right::Write, now);
        holds.begin(2, Heat(0), Right::Write, now);
        assert_eq!(holds.next(), Some(now + TIMES[0]));
        assert_eq!(holds.due(now), None);
        assert_eq!(holds.due(now + TIMES[0]), Some(2));
        assert_eq!(holds.due(now + TIMES[1]), None);
        assert_eq!(holds.due(now + TIMES[3]), Some(1));
        assert_eq!(holds.next(), None);
    }
}
