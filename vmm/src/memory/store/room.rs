//! Room on helpers: who has some for which pages, what is kept where for lack of it, and what is given up for it.
//!
//! A helper keeps so many pages, whichever they are; the agent refuses more. All helpers together need not have room for
//! all of the guest's RAM: what is in this PC's memory need not be kept by any of them. So a place counts what it keeps,
//! stale content included until the place has answered that it forgot it, and nothing is sent to a place that is full:
//! another one *helps*, page by page. When room gets short everywhere, the handler is asked to give back the copies of
//! pages that it has itself ([`Core::short`]).

use std::ops::Range;
use std::time::{Duration, Instant};

use smallvec::SmallVec;

use super::copies::Role;
use super::core::{Core, Flight, Kind, Op, Place};
use crate::memory::fault::{PAGE, Page, Shards};

/// So much of `local` may be on helpers too at most,
const MOST_SLACK: u64 = 512 << 20;
/// or this part of it: copies of pages that are here, and those on their way.
const SLACK: u64 = 4;

/// A page whose second copy finds no room for so long is kept with fewer copies.
const CRAMPED: Duration = Duration::from_secs(2);

/// How many pages all helpers together must be able to keep, for one copy of each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Need {
    /// So many have to be kept somewhere else than in this PC's memory,
    pub(super) pages: u64,
    /// those among them that are here too.
    pub(super) slack: u64,
}

/// How many bytes the helpers must lend a guest with `size` bytes of RAM, of which `local` may be on this PC, for one
/// copy of each page: what is not here, and a quarter of `local` or 512 MiB more, for pages that are on their way or
/// have not changed since they came.
#[must_use]
pub fn least(size: u64, local: u64) -> u64 {
    let slack = (local / SLACK).min(MOST_SLACK);
    size.saturating_sub(local).saturating_add(slack).min(size)
}

/// Whether places with room for so many pages each suffice for `need` pages, each in `copies` different ones, whatever
/// is stored and forgotten in which order, and nothing ever moved. Units of any kind.
#[must_use]
pub fn suffices(rooms: impl Iterator<Item = u64>, copies: usize, need: u64) -> bool {
    let (mut all, mut largest, mut second) = (0_u64, 0, 0);
    for room in rooms {
        all = all.saturating_add(room);
        (largest, second) = if room > largest { (room, largest) } else { (largest, second.max(room)) };
    }
    match copies {
        0 | 1 => all >= need,
        // Either two places are never full, or all but one are never full at once.
        _ => second >= need || all - largest >= need.saturating_mul(2),
    }
}

/// How much more room that takes, at the least.
pub(super) fn missing(rooms: &[u64], copies: usize, need: u64) -> u64 {
    if suffices(rooms.iter().copied(), copies, need) {
        return 0;
    }
    let mut rooms = rooms.to_vec();
    rooms.sort_unstable_by_key(|room| std::cmp::Reverse(*room));
    let all = rooms.iter().fold(0_u64, |all, room| all.saturating_add(*room));
    if copies <= 1 {
        return need.saturating_sub(all);
    }
    let [largest, second] = [0, 1].map(|at| rooms.get(at).copied().unwrap_or(0));
    let two = need.saturating_sub(largest) + need.saturating_sub(second);
    // It goes to those that are smaller.
    let rest = need.saturating_mul(2).saturating_sub(all - largest);
    if rooms.len() > 2 { two.min(rest) } else { two }
}

/// What handler `shard` needs, if so many pages may be in this PC's memory for all handlers.
pub(super) fn need(shards: &Shards, shard: u32, local: u64) -> Need {
    let pages = shards.pages(shard) as u64;
    let here = shards.limit(shard, local).min(pages);
    let most = MOST_SLACK / PAGE as u64 / u64::from(shards.count());
    let slack = (here / SLACK).min(most);
    if local == 0 { Need { pages, slack: 0 } } else { Need { pages: pages - here + slack, slack } }
}

impl Place {
    /// How many pages more it has room for.
    pub(super) fn free(&self) -> u64 {
        self.quota.saturating_sub(self.held)
    }

    /// Whether its room counts: it is a helper that stays.
    fn counts(&self) -> bool {
        !self.file && !self.left && !self.draining && !self.dropped
    }
}

impl Core {
    /// How many pages of `pages` more `place` would have to keep.
    fn extra(&self, piece: usize, pages: &Range<u32>, place: usize) -> u64 {
        let taken =
            self.pieces[piece].find(place).map(|copy| self.pieces[piece].taken(pages.clone(), copy.slot));
        pages.len() as u64 - taken.unwrap_or(0)
    }

    /// Whether `place` has room for `pages`.
    pub(super) fn fits(&self, piece: usize, pages: &Range<u32>, place: usize) -> bool {
        self.places[place].file || self.extra(piece, pages, place) <= self.places[place].free()
    }

    /// `pages` take up room at `place` from now on.
    pub(super) fn take_room(&mut self, piece: usize, pages: Range<u32>, place: usize) {
        if let Some(copy) = self.pieces[piece].find(place) {
            self.places[place].held += self.pieces[piece].take(pages, copy.slot, true);
        }
    }

    /// What lies at places `but` not is worthless: it is forgotten there, so that its room can be used.
    pub(super) fn release(&mut self, piece: usize, pages: &Range<u32>, but: &[usize], now: Instant) {
        let copies = &self.pieces[piece];
        let other = |place: usize| !but.contains(&place);
        let taken: SmallVec<[(usize, u64); 3]> = copies
            .at
            .iter()
            .filter(|copy| copy.role != Role::Gone && other(copy.place.into()))
            .map(|copy| (usize::from(copy.place), copies.taken(pages.clone(), copy.slot)))
            .filter(|(_, taken)| *taken > 0)
            .collect();
        let start = self.range(piece).start;
        let range = start + u64::from(pages.start)..start + u64::from(pages.end);
        for (place, taken) in taken {
            self.places[place].to_free += taken;
            self.places[place].unsent += taken;
            self.queue_forget(place, range.clone(), now);
        }
    }

    /// A place has forgotten `ranges`, along the RAM file: they take up no room there, but what was sent meanwhile.
    pub(super) fn freed(&mut self, place: usize, ranges: &[Range<u64>]) {
        let at = &self.places[place];
        let mut sent: SmallVec<[Range<u64>; 8]> = SmallVec::new();
        for flight in at.writes.iter().filter_map(|flight| self.flights.get(*flight)) {
            if flight.stores() {
                sent.extend(flight.ranges.iter().cloned());
            }
        }
        sent.sort_unstable_by_key(|range| range.start);
        for range in ranges {
            let mut from = range.start;
            for other in sent.iter().filter(|other| other.start < range.end && range.start < other.end) {
                self.free_range(place, from..other.start);
                from = from.max(other.end);
            }
            self.free_range(place, from..range.end);
        }
        self.room_came = true;
    }

    /// They may be of several pieces.
    fn free_range(&mut self, place: usize, mut range: Range<u64>) {
        while !range.is_empty() {
            let count = self.shards.pieces().run(Page(range.start), range.end - range.start);
            let Some((piece, pages)) = self.locate(Page(range.start), count as u32) else { return };
            if let Some(copy) = self.pieces[piece].find(place) {
                let freed = self.pieces[piece].take(pages, copy.slot, false);
                self.places[place].held = self.places[place].held.saturating_sub(freed);
            }
            range.start += count;
        }
    }

    /// A copying was overtaken for some of its pages: the others take up room for nothing, unless they are being sent
    /// once more.
    pub(super) fn release_wasted(&mut self, piece: usize, pages: Range<u32>, place: usize, now: Instant) {
        let Some(copy) = self.pieces[piece].find(place).filter(|copy| copy.role != Role::Gone) else {
            return;
        };
        let start = self.range(piece).start;
        for page in self.pieces[piece].wasted(pages, copy.slot).into_iter().flatten() {
            let page = start + u64::from(page);
            let sent = |flight: &Flight| flight.stores() && flight.ranges.iter().any(|of| of.contains(&page));
            let mut flights = self.places[place].writes.iter().filter_map(|flight| self.flights.get(*flight));
            if !flights.any(sent) {
                self.places[place].to_free += 1;
                self.places[place].unsent += 1;
                self.queue_forget(place, page..page + 1, now);
            }
        }
    }

    /// Who has room for `pages`, if `place` has not: one that has copies of the piece, else any.
    pub(super) fn helping(&self, piece: usize, pages: &Range<u32>, but: &[usize]) -> Option<usize> {
        let copies = &self.pieces[piece];
        let may = |place: &usize| {
            let at = &self.places[*place];
            let role = copies.find(*place).map(|copy| copy.role);
            let known = role.map_or(copies.has_slot(), Role::stays);
            at.serving && at.counts() && known && !but.contains(place) && self.fits(piece, pages, *place)
        };
        let worth = |place: &usize| {
            let at = &self.places[*place];
            let free = at.free().saturating_mul(1 << 20) / at.quota.max(1);
            (copies.find(*place).is_some(), free, std::cmp::Reverse(*place))
        };
        (0..self.places.len()).filter(may).max_by_key(worth)
    }

    /// Has `place` keep pages of a piece that it is not given as a whole.
    pub(super) fn help(&mut self, piece: usize, place: usize) {
        if self.pieces[piece].find(place).is_none() && self.pieces[piece].add(place, Role::Helping) {
            self.places[place].used += 1;
        }
    }

    /// Where a store is to go, if there is room. `None`: it has to wait for some.
    pub(super) fn targets(&self, op: usize, now: Instant) -> Option<SmallVec<[usize; 3]>> {
        let Op { piece, pages, begun, .. } = &self.ops[op];
        let members = || self.pieces[*piece].members().map(|copy| usize::from(copy.place));
        let mut targets: SmallVec<[usize; 3]> =
            members().filter(|place| self.fits(*piece, pages, *place)).collect();
        if targets.len() == members().count() {
            return Some(targets);
        }
        let files = targets.iter().filter(|place| self.places[**place].file).count();
        while targets.len() - files < self.settings.copies {
            let Some(place) = self.helping(*piece, pages, &targets) else { break };
            targets.push(place);
        }
        let found = targets.len() - files;
        let cramped = || *begun + CRAMPED <= now || !self.enough();
        let may = found >= self.settings.copies || files > 0 || found > 0 && cramped();
        may.then_some(targets)
    }

    fn rooms(&self) -> impl Iterator<Item = u64> + '_ {
        self.places.iter().filter(|at| at.counts()).map(|at| at.quota)
    }

    /// Whether those who stay have room for everything, as often as it should be kept.
    fn enough(&self) -> bool {
        suffices(self.rooms(), self.settings.copies, self.settings.need.pages - self.settings.need.slack / 2)
    }

    /// Whether there is room for one copy of everything, at those that leave too.
    pub(super) fn enough_for_one(&self) -> bool {
        let rooms = self.places.iter().filter(|at| !at.file && !at.left && !at.dropped).map(|at| at.quota);
        suffices(rooms, 1, self.settings.need.pages - self.settings.need.slack / 2)
    }

    /// How many helpers stay.
    fn stay(&self) -> usize {
        self.rooms().count()
    }

    /// How many pages more can be kept, as often as they should; those counted that are being forgotten.
    fn free(&self) -> u64 {
        let frees = self.places.iter().filter(|at| at.counts()).map(|at| at.free() + at.to_free.min(at.held));
        let (mut all, mut largest) = (0_u64, 0);
        for free in frees {
            all = all.saturating_add(free);
            largest = largest.max(free);
        }
        if self.settings.copies.min(self.stay()) > 1 { all - largest } else { all }
    }

    /// How many pages the handler should have forgotten that it has itself.
    pub(super) fn short(&self) -> u64 {
        let water = self.settings.need.slack / 4;
        let free = self.free();
        let waiting = self.cramped.len() as u64;
        let wanted = if free < 2 * water && self.stay() > 0 { 3 * water - free } else { 0 };
        wanted.max(waiting.saturating_sub(free))
    }

    /// Whether something more may be copied to others in the background: stores go first.
    pub(super) fn may_copy(&self) -> bool {
        let scarce = self.free() <= self.settings.need.slack / 4;
        self.cramped.is_empty() && (self.stay() < self.settings.copies || !scarce)
    }

    /// Sends what waited for room, if some came.
    pub(super) fn uncramp(&mut self, now: Instant) -> Option<Instant> {
        if self.room_came && !self.homeless.is_empty() {
            self.repair = true;
        }
        if self.cramped.is_empty() {
            self.room_came = false;
            return None;
        }
        let over = |core: &Self, op: &usize| core.ops[*op].begun + CRAMPED;
        let due = self.cramped.iter().map(|op| over(self, op)).min();
        if self.room_came || due.is_some_and(|due| due <= now) {
            self.room_came = false;
            let waiting = std::mem::take(&mut self.cramped);
            waiting.into_iter().for_each(|op| self.send_store(op, now));
            let late = self.cramped.iter().any(|op| over(self, op) <= now);
            if late && self.settings.copies > 1 {
                self.give_up_second(now);
            }
        }
        (!self.cramped.is_empty()).then_some(now + CRAMPED / 8)
    }

    /// For pages that no copy would be kept of otherwise, some are kept once that are kept twice.
    fn give_up_second(&mut self, now: Instant) {
        let mut wanted = self.cramped.len();
        for piece in 0..self.pieces.len() {
            let enough = self.pieces[piece].enough(2, self.file());
            let file = self.file();
            let mut at = self.pieces[piece].at.clone();
            at.retain(|copy| copy.role.stays() && Some(usize::from(copy.place)) != file);
            for copy in at {
                let Some(pages) = self.pieces[piece].doubly(copy.slot, wanted, enough) else { continue };
                wanted -= pages.len();
                self.drop_copy(piece, &pages, copy.place.into(), now);
                if wanted == 0 {
                    return;
                }
            }
        }
    }

    /// A place keeps `pages` no more, which others have.
    fn drop_copy(&mut self, piece: usize, pages: &Range<u32>, place: usize, now: Instant) {
        let Some(copy) = self.pieces[piece].find(place) else { return };
        self.outdate(piece, pages);
        let less = self.pieces[piece].set_bad(pages.clone(), copy.slot);
        self.places[place].counters.pages.fetch_sub(less, std::sync::atomic::Ordering::Relaxed);
        let others: SmallVec<[usize; 6]> = (0..self.places.len()).filter(|other| *other != place).collect();
        self.release(piece, pages, &others, now);
        // Once there is room again.
        match copy.role {
            Role::Keeping => self.refill(piece, place),
            Role::Helping => self.refill_members(piece),
            Role::Filling | Role::Leaving | Role::Gone => {}
        }
    }

    /// The local file's number.
    pub(super) fn file(&self) -> Option<usize> {
        self.places.iter().position(|at| at.file)
    }

    /// A store, split into its pages: each finds room by itself.
    pub(super) fn split_store(&mut self, op: usize) -> Vec<usize> {
        let Op { piece, pages, kind, begun, .. } = self.end(op);
        let Kind::Store(content) = kind else { return Vec::new() };
        let part = |at: u32| content.slice((at - pages.start) as usize * PAGE, PAGE).unwrap_or_default();
        let mut ops = Vec::with_capacity(pages.len());
        for at in pages.clone() {
            let (kind, flights) = (Kind::Store(part(at)), SmallVec::new());
            ops.push(self.ops.insert(Op { piece, pages: at..at + 1, kind, flights, begun }));
        }
        ops
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn helpers_lend_what_is_not_here_and_a_little_more() {
        let gib = 1_u64 << 30;
        assert_eq!(least(32 * gib, 8 * gib), 24 * gib + (512 << 20));
        assert_eq!(least(gib, 64 << 20), gib - (48 << 20));
        assert_eq!(least(gib, gib - 4096), (gib / 4 - 1024) + 4096);
    }

    #[test]
    fn two_copies_need_two_that_are_never_full_or_all_but_one_never_full_at_once() {
        let enough = |rooms: &[u64], copies| suffices(rooms.iter().copied(), copies, 10);
        assert!(enough(&[4, 6], 1) && !enough(&[4, 5], 1));
        assert!(enough(&[10, 10], 2) && enough(&[10, 100, 1], 2) && !enough(&[100, 9], 2));
        assert!(enough(&[9, 9, 11, 1], 2) == (30 - 11 >= 20) && enough(&[9, 9, 9, 2], 2));
        assert!(!enough(&[7, 7, 7], 2), "one may be empty while the others are full");
        assert_eq!((missing(&[4, 5], 1, 10), missing(&[4, 6], 1, 10)), (1, 0));
        assert_eq!(
            (missing(&[100, 9], 2, 10), missing(&[7, 7, 7], 2, 10), missing(&[10], 2, 10)),
            (1, 6, 10)
        );
    }
}
