//! How long a page stays after it came, so that whoever needed it can use it before the next one gets it.
//!
//! A vCPU needs several pages at once for one instruction: code, stack, data, and on some processors its page tables to
//! write to. If each went before the last one came, and the other member's vCPU needs the same ones, neither would ever
//! run. So holds are measured in *units*, which follow what it takes to get a page here, and grow until all that an
//! instruction needs is here together.
//!
//! Each page has a *heat*. Who needs a page again soon after it had to give it up finds it hotter, who needs it later,
//! colder. With each degree a page is held twice as long: it travels less often, and more is done with it each time. Half
//! of each hold is left to chance, so that members which take pages from each other do not do so in step. What was asked
//! for only to be read is held briefly in any case, since a writer waits and a reader has read.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::{Duration, Instant};

use super::message::Right;

/// How hot a page is: it is held for two to the power of this many units.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Heat(u8);

/// The hottest.
const HOTTEST: u8 = 7;
/// The hottest that a page is held to be read.
const READ: u8 = 2;

/// The least unit: about what a thread needs to be woken and to touch a page.
const LEAST: Duration = Duration::from_micros(25);
/// The greatest: a page is held for a second or so at most, whatever the network.
const MOST: Duration = Duration::from_millis(8);

/// A page that is needed again within so many units, or twice what it was held, was taken too early.
const SOON: u32 = 20;

/// So many pages that were given up last are remembered.
const REMEMBERED: usize = 1024;

impl Heat {
    /// From three bits.
    pub(super) fn from_bits(bits: u8) -> Self {
        Self(bits.min(HOTTEST))
    }

    /// As three bits.
    pub(super) fn bits(self) -> u8 {
        self.0
    }

    fn units(self, right: Right) -> u32 {
        1 << if right == Right::Read { self.0.min(READ) } else { self.0.min(HOTTEST) }
    }
}

/// The holds of a shard's pages, which are numbered.
pub(super) struct Holds {
    /// In the order of their ends.
    queue: BinaryHeap<Reverse<(Instant, u32)>>,
    /// Which page was given up when, by its number's low bits.
    lost: Vec<Option<(u32, Instant)>>,
    /// The least that it took of late to get a page.
    pace: Duration,
    /// Of chance.
    seed: u64,
}

impl Holds {
    pub(super) fn new() -> Self {
        let mut seed = [1; 8];
        // Without randomness chance is the same at each start, which does no harm.
        let _ = getrandom::fill(&mut seed);
        let seed = u64::from_le_bytes(seed) | 1;
        Self { queue: BinaryHeap::new(), lost: vec![None; REMEMBERED], pace: MOST, seed }
    }

    /// Forgets all of them.
    pub(super) fn clear(&mut self) {
        self.queue.clear();
        self.lost.fill(None);
    }

    fn remembered(&mut self, page: u32) -> Option<&mut Option<(u32, Instant)>> {
        self.lost.get_mut(page as usize % REMEMBERED)
    }

    fn unit(&self) -> Duration {
        (self.pace / 2).clamp(LEAST, MOST)
    }

    /// A page came, which was so hot and took so long. One that goes to and fro waits for the other's hold, which tells
    /// nothing: would it count, each member's holds would lengthen the other's without end. Some of the cold ones wait
    /// too, so the shortest of late counts.
    pub(super) fn took(&mut self, heat: Heat, time: Duration) {
        if heat == Heat::default() {
            self.pace = (self.pace + self.pace / 64).min(time);
        }
    }

    /// `page` had to be given up, or may not be written to any longer.
    pub(super) fn lost(&mut self, page: u32, now: Instant) {
        if let Some(slot) = self.remembered(page) {
            *slot = Some((page, now));
        }
    }

    /// How hot `page` is now that it is needed again; `true`: it was given up only just now.
    pub(super) fn heat(&mut self, page: u32, heat: Heat, needed: Instant) -> (Heat, bool) {
        let soon = self.unit() * SOON.max(heat.units(Right::Write) * 2);
        let lost = self.remembered(page).and_then(|slot| slot.take_if(|(other, _)| *other == page));
        let again = lost.is_some_and(|(_, when)| needed.saturating_duration_since(when) < soon);
        let next = if again { heat.0 + 1 } else { heat.0.saturating_sub(1) };
        (Heat::from_bits(next), again)
    }

    /// `page` came; returns until when it is held.
    pub(super) fn begin(&mut self, page: u32, heat: Heat, right: Right, now: Instant) -> Instant {
        let time = self.unit() * heat.units(right);
        let until = now + time + time.mul_f64(self.chance());
        self.queue.push(Reverse((until, page)));
        until
    }

    /// From 0 to 1 (xorshift64, Marsaglia 2003).
    fn chance(&mut self) -> f64 {
        self.seed ^= self.seed << 13;
        self.seed ^= self.seed >> 7;
        self.seed ^= self.seed << 17;
        (self.seed >> 32) as f64 / f64::from(u32::MAX)
    }

    /// A page whose hold is over, unless it is held again since. Ask until there is none.
    pub(super) fn due(&mut self, now: Instant) -> Option<u32> {
        self.queue.peek().filter(|Reverse((until, _))| *until <= now)?;
        self.queue.pop().map(|Reverse((_, page))| page)
    }

    /// When the next hold is over.
    pub(super) fn next(&self) -> Option<Instant> {
        self.queue.peek().map(|Reverse((until, _))| *until)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_that_goes_to_and_fro_is_held_longer_within_bounds_and_less_again_when_it_rests() {
        let mut holds = Holds::new();
        holds.took(Heat::default(), LEAST);
        let (mut now, mut heat) = (Instant::now(), Heat::default());
        let mut held = Vec::new();
        for _ in 0..10 {
            held.push(holds.begin(7, heat, Right::Write, now) - now);
            now += Duration::from_millis(10);
            holds.lost(7, now);
            let (next, again) = holds.heat(7, heat, now + Duration::from_micros(100));
            assert!(again);
            heat = next;
        }
        assert!(held[0] >= LEAST && held[0] <= LEAST * 2, "{held:?}");
        assert!(held[9] >= LEAST * 128 && held[9] <= LEAST * 256, "{held:?}");
        assert!(holds.begin(7, heat, Right::Read, now) - now <= LEAST * 8, "who reads holds it briefly");
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
    fn holds_follow_what_it_takes_to_get_a_page() {
        let mut holds = Holds::new();
        let now = Instant::now();
        holds.took(Heat::default(), Duration::from_millis(5));
        let held = holds.begin(7, Heat::default(), Right::Write, now) - now;
        assert!(held >= Duration::from_micros(2500) && held <= Duration::from_millis(5), "{held:?}");
        // What had to wait for somebody else's hold tells nothing.
        holds.took(Heat::default(), Duration::from_millis(500));
        assert!(holds.unit() < Duration::from_millis(3));
        holds.lost(7, now);
        assert!(
            holds.heat(7, Heat::default(), now + Duration::from_millis(40)).1,
            "soon, as things are here"
        );
    }

    #[test]
    fn members_that_wait_for_each_others_holds_do_not_lengthen_them() {
        let mut holds = Holds::new();
        holds.took(Heat::default(), LEAST * 2);
        let unit = holds.unit();
        for heat in (1..=HOTTEST).cycle().take(1000) {
            holds.took(Heat(heat), unit * 256);
        }
        assert_eq!(holds.unit(), unit);
    }

    #[test]
    fn holds_end_when_their_time_is_over_whatever_their_lengths() {
        let mut holds = Holds::new();
        holds.took(Heat::default(), LEAST);
        let now = Instant::now();
        let long = holds.begin(1, Heat(3), Right::Write, now);
        let short = holds.begin(2, Heat(0), Right::Write, now);
        assert_eq!(holds.next(), Some(short));
        assert_eq!(holds.due(now), None);
        assert_eq!(holds.due(short), Some(2));
        assert_eq!(holds.due(short), None);
        assert_eq!(holds.due(long), Some(1));
        assert_eq!(holds.next(), None);
    }
}
