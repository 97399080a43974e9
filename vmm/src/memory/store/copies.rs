//! Which copies of each page of a piece are good.
//!
//! A piece is kept at up to [`SLOTS`] places at a time; for each page one bit per slot says whether the copy there is
//! what was stored last. A store clears all bits of its pages before it is sent, and each place's answer sets its own
//! bit: so a place that was away while a page changed is never read for it.
//!
//! Another bit per slot says whether the page takes up room there, whatever its content: from when a store is sent until
//! the place has answered that it forgot the page. So nobody is sent more than it has room for.

use std::ops::Range;

use smallvec::SmallVec;

/// A piece is kept at so many places at most, those counted that still have to clear it away.
pub(super) const SLOTS: u8 = 7;
/// The bits that say where a page is good.
const GOOD: u16 = (1 << SLOTS) - 1;
/// The page was stored and not forgotten.
const HELD: u16 = 1 << 7;
/// The bits that say where a page takes up room: those of [`GOOD`], so much further up.
const TAKEN_UP: u32 = 8;
const TAKEN: u16 = GOOD << TAKEN_UP;
/// A store or an orphaned fetch will answer for the page.
const ANSWERED: u16 = 1 << 15;

/// What a place is to a piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// Gets what is stored, as far as it has room.
    Keeping,
    /// Gets what is stored from now on, and the rest bit by bit.
    Filling,
    /// Has some pages that others had no room for.
    Helping,
    /// Is read from, but gets nothing any more.
    Leaving,
    /// Counts for nothing; what it has is worthless and being cleared away.
    Gone,
}

impl Role {
    /// Whether stores go there.
    pub(super) fn stores(self) -> bool {
        matches!(self, Self::Keeping | Self::Filling)
    }

    /// Whether what it has is to stay there.
    pub(super) fn stays(self) -> bool {
        self.stores() || self == Self::Helping
    }
}

/// A piece at one place.
#[derive(Clone, Copy, Debug)]
pub(super) struct Copy {
    pub(super) place: u8,
    pub(super) slot: u8,
    pub(super) role: Role,
}

/// The slots whose copies of a page are good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Good(u16);

impl Good {
    pub(super) fn has(self, slot: u8) -> bool {
        self.0 & 1 << slot != 0
    }

    pub(super) fn none(self) -> bool {
        self.0 == 0
    }
}

/// In how many of some slots a page must be good.
#[derive(Clone, Copy, Debug)]
pub(super) struct Enough {
    slots: u16,
    copies: u32,
}

impl Enough {
    /// In one slot, whatever the others have.
    pub(super) const NEVER: Self = Self { slots: 0, copies: 1 };

    fn of(self, page: u16) -> bool {
        (page & self.slots & GOOD).count_ones() >= self.copies
    }
}

/// A piece's places and pages. Pages are counted within the piece.
#[derive(Debug, Default)]
pub(super) struct Copies {
    pub(super) at: SmallVec<[Copy; 3]>,
    /// Made at the first store.
    pages: Box<[u16]>,
}

impl Copies {
    /// The copy at `place`, whatever its role.
    pub(super) fn find(&self, place: usize) -> Option<Copy> {
        self.at.iter().find(|copy| usize::from(copy.place) == place).copied()
    }

    /// The copies that stores go to.
    pub(super) fn members(&self) -> impl Iterator<Item = Copy> + '_ {
        self.at.iter().filter(|copy| copy.role.stores()).copied()
    }

    pub(super) fn set_role(&mut self, place: usize, role: Role) {
        self.at.iter_mut().filter(|copy| usize::from(copy.place) == place).for_each(|copy| copy.role = role);
    }

    /// The slots whose copies are to stay, and of which a page must be good in so many; `file` is no helper's.
    pub(super) fn enough(&self, copies: usize, file: Option<usize>) -> Enough {
        let stay = self.at.iter().filter(|copy| copy.role.stays() && Some(usize::from(copy.place)) != file);
        Enough { slots: stay.fold(0, |slots, copy| slots | 1 << copy.slot), copies: copies as u32 }
    }

    /// Whether there is room for one more copy.
    pub(super) fn has_slot(&self) -> bool {
        self.at.len() < usize::from(SLOTS)
    }

    /// How many of `pages` take up room in `slot`.
    pub(super) fn taken(&self, pages: Range<u32>, slot: u8) -> u64 {
        let pages = self.pages.get(pages.start as usize..pages.end as usize).unwrap_or_default();
        pages.iter().filter(|page| **page & 1 << (TAKEN_UP + u32::from(slot)) != 0).count() as u64
    }

    /// `pages` take up room in `slot` from now on, or no longer; returns for how many that is new.
    pub(super) fn take(&mut self, pages: Range<u32>, slot: u8, taken: bool) -> u64 {
        let bit = 1 << (TAKEN_UP + u32::from(slot));
        let mut changed = 0;
        for page in self.pages(pages) {
            changed += u64::from((*page & bit != 0) != taken);
            *page = if taken { *page | bit } else { *page & !bit };
        }
        changed
    }

    /// Runs of `pages` that take up room in `slot` for nothing: they are not good there, nor being stored.
    pub(super) fn wasted(&self, pages: Range<u32>, slot: u8) -> Vec<Range<u32>> {
        let (good, taken) = (1 << slot, 1 << (TAKEN_UP + u32::from(slot)));
        let mut runs: Vec<Range<u32>> = Vec::new();
        for index in pages {
            let page = self.pages.get(index as usize).copied().unwrap_or(0);
            if page & (good | taken | ANSWERED) != taken {
                continue;
            }
            match runs.last_mut() {
                Some(run) if run.end == index => run.end += 1,
                _ => runs.push(index..index + 1),
            }
        }
        runs
    }

    /// Up to `most` pages from the start of a run that have more good copies than one among `enough`, and the slot
    /// `of` whose copy of them is one.
    pub(super) fn doubly(&self, of: u8, most: usize, enough: Enough) -> Option<Range<u32>> {
        let doubly = |page: u16| {
            page & (ANSWERED | 1 << of) == 1 << of && (page & enough.slots & GOOD).count_ones() > 1
        };
        let start = self.pages.iter().position(|page| doubly(*page))?;
        let len = self.pages.iter().skip(start).take(most).take_while(|page| doubly(**page)).count();
        Some(start as u32..(start + len) as u32)
    }

    /// Whether one of `pages` is good in too few slots.
    pub(super) fn lacks(&self, pages: Range<u32>, enough: Enough) -> bool {
        let pages = self.pages.get(pages.start as usize..pages.end as usize).unwrap_or_default();
        pages.iter().any(|page| *page & HELD != 0 && !enough.of(*page))
    }

    /// Adds a copy with no good page. `false`: every slot is taken, or the place has one.
    pub(super) fn add(&mut self, place: usize, role: Role) -> bool {
        let free = (0..SLOTS).find(|slot| self.at.iter().all(|copy| copy.slot != *slot));
        let (Some(slot), None, Ok(place)) = (free, self.find(place), u8::try_from(place)) else {
            return false;
        };
        self.at.push(Copy { place, slot, role });
        true
    }

    /// Forgets the copy at `place`: its slot may be used by another. Its bits must be cleared already.
    pub(super) fn remove(&mut self, place: usize) {
        self.at.retain(|copy| usize::from(copy.place) != place);
    }

    /// Whether some page is stored or about to be.
    pub(super) fn is_empty(&self) -> bool {
        self.pages.iter().all(|page| *page == 0)
    }

    fn pages(&mut self, pages: Range<u32>) -> &mut [u16] {
        self.pages.get_mut(pages.start as usize..pages.end as usize).unwrap_or_default()
    }

    /// Where the copies of page `page` are good; `None`: it is not held.
    pub(super) fn good(&self, page: u32) -> Option<Good> {
        let page = self.pages.get(page as usize)?;
        (page & HELD != 0).then_some(Good(page & GOOD))
    }

    /// Where all of `pages` are good.
    pub(super) fn all_good(&self, pages: Range<u32>) -> Good {
        let pages = self.pages.get(pages.start as usize..pages.end as usize).unwrap_or_default();
        Good(pages.iter().fold(GOOD, |all, page| all & page))
    }

    /// Where one of `pages` at least is good.
    pub(super) fn any_good(&self, pages: Range<u32>) -> Good {
        let pages = self.pages.get(pages.start as usize..pages.end as usize).unwrap_or_default();
        Good(pages.iter().fold(0, |any, page| any | page & GOOD))
    }

    /// The first run of `pages` that is held, or not, as a whole and good in the same places.
    pub(super) fn run(&self, pages: Range<u32>) -> Option<(Range<u32>, Option<Good>)> {
        let first = self.good(pages.start);
        let end = pages.clone().find(|page| self.good(*page) != first).unwrap_or(pages.end);
        (!pages.is_empty()).then_some((pages.start..end, first))
    }

    /// A store of `pages` of a piece of `len` begins: no copy of them is good. Calls `lost` with each slot and how
    /// many good pages it loses.
    pub(super) fn begin_store(&mut self, pages: Range<u32>, len: u32, lost: impl FnMut(u8, u64)) {
        if self.pages.is_empty() {
            self.pages = vec![0; len as usize].into_boxed_slice();
        }
        self.clear_bits(pages.clone(), GOOD, lost);
        self.pages(pages).iter_mut().for_each(|page| *page |= ANSWERED);
    }

    /// The store of `pages` is answered.
    pub(super) fn end_store(&mut self, pages: Range<u32>) {
        self.pages(pages).iter_mut().for_each(|page| *page = *page & !ANSWERED | HELD);
    }

    /// Somebody will ask for `pages` again, so their loss need not be told; or no longer.
    pub(super) fn will_ask(&mut self, pages: Range<u32>, will: bool) {
        let to = |page: u16| if will { page | ANSWERED } else { page & !ANSWERED };
        self.pages(pages).iter_mut().for_each(|page| *page = to(*page));
    }

    /// The copies in `slot` of `pages` are good from now on; returns how many were not.
    pub(super) fn set_good(&mut self, pages: Range<u32>, slot: u8) -> u64 {
        let mut more = 0;
        for page in self.pages(pages) {
            more += u64::from(*page & 1 << slot == 0);
            *page |= 1 << slot;
        }
        more
    }

    /// The copies in `slot` of `pages` are not good any more; returns how many were.
    pub(super) fn set_bad(&mut self, pages: Range<u32>, slot: u8) -> u64 {
        let mut less = 0;
        self.clear_bits(pages, 1 << slot, |_, count| less = count);
        less
    }

    /// `pages` are not held any more. `None`: none was.
    pub(super) fn forget(&mut self, pages: Range<u32>, lost: impl FnMut(u8, u64)) -> Option<()> {
        let held = self.pages(pages.clone()).iter().any(|page| *page & HELD != 0);
        self.clear_bits(pages.clone(), GOOD, lost);
        self.pages(pages).iter_mut().for_each(|page| *page &= !HELD);
        held.then_some(())
    }

    fn clear_bits(&mut self, pages: Range<u32>, bits: u16, mut lost: impl FnMut(u8, u64)) {
        let mut counts = [0_u64; SLOTS as usize];
        for page in self.pages(pages) {
            if *page & bits & GOOD != 0 {
                for (slot, count) in counts.iter_mut().enumerate() {
                    *count += u64::from(*page & bits & 1 << slot != 0);
                }
            }
            *page &= !(bits & GOOD);
        }
        for (slot, count) in (0..SLOTS).zip(counts) {
            if count > 0 {
                lost(slot, count);
            }
        }
    }

    /// Runs of pages that are held, good nowhere, and of which nobody else will tell; they are held no more.
    pub(super) fn take_lost(&mut self) -> Vec<Range<u32>> {
        let mut runs: Vec<Range<u32>> = Vec::new();
        for (index, page) in (0..).zip(&mut *self.pages) {
            if *page & (GOOD | HELD | ANSWERED) != HELD {
                continue;
            }
            *page &= TAKEN;
            match runs.last_mut() {
                Some(run) if run.end == index => run.end += 1,
                _ => runs.push(index..index + 1),
            }
        }
        runs
    }

    /// The next run of at most `most` pages from `from` on that are held and not being stored, good in `source`
    /// for some slot that `from_slot` accepts, not good in `to`, and not in enough others either.
    pub(super) fn next_to_copy(
        &self,
        from: u32,
        most: u32,
        to: u8,
        enough: Enough,
        source: impl Fn(Good) -> Option<u8>,
    ) -> Option<(Range<u32>, u8)> {
        let wanted = |page: u16| page & (HELD | ANSWERED | 1 << to) == HELD && !enough.of(page);
        let start = self.pages.iter().skip(from as usize).position(|page| wanted(*page))? as u32 + from;
        // Where the first page has no source now, the piece waits.
        let slot = source(Good(*self.pages.get(start as usize)? & GOOD))?;
        let fits = |page: &u16| wanted(*page) && page & 1 << slot != 0;
        let len =
            self.pages.iter().skip(start as usize).take(most as usize).take_while(|page| fits(page)).count();
        Some((start..start + len as u32, slot))
    }

    /// Whether every page that is held is good in `slot` or in enough others, those aside that are being stored.
    pub(super) fn is_full(&self, slot: u8, enough: Enough) -> bool {
        let lacks = |page: u16| page & (HELD | ANSWERED | 1 << slot) == HELD && !enough.of(page);
        !self.pages.iter().any(|page| lacks(*page))
    }

    /// Whether every page that is good in `slot` is good in one of `others` too, those aside that are being stored.
    pub(super) fn is_spare(&self, slot: u8, others: &[u8]) -> bool {
        let others = others.iter().fold(0, |bits, slot| bits | 1 << slot);
        self.pages.iter().all(|page| page & ANSWERED != 0 || page & 1 << slot == 0 || page & others != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stored(pages: Range<u32>, slots: &[u8]) -> Copies {
        let mut copies = Copies::default();
        copies.begin_store(pages.clone(), 16, |_, _| panic!("nothing was good"));
        slots.iter().for_each(|slot| assert_eq!(copies.set_good(pages.clone(), *slot), pages.len() as u64));
        copies.end_store(pages);
        copies
    }

    #[test]
    fn a_page_that_is_stored_again_is_good_only_where_that_was_answered() {
        let mut copies = stored(2..6, &[0, 1]);
        let mut lost = Vec::new();
        copies.begin_store(4..8, 16, |slot, count| lost.push((slot, count)));
        assert_eq!(lost, [(0, 2), (1, 2)]);
        assert_eq!(copies.set_good(4..8, 1), 4);
        copies.end_store(4..8);
        assert!(copies.all_good(2..4).has(0) && !copies.any_good(4..8).has(0));
        assert!(copies.all_good(2..8).has(1));
        assert_eq!(copies.run(2..8).map(|(run, _)| run), Some(2..4));
        assert_eq!(copies.run(8..10), Some((8..10, None)));
    }

    #[test]
    fn pages_good_nowhere_are_lost_once_unless_a_store_has_their_content() {
        let mut copies = stored(0..6, &[3]);
        copies.begin_store(2..3, 16, |_, _| {});
        assert_eq!(copies.set_bad(0..16, 3), 5);
        assert_eq!(copies.take_lost(), [0..2, 3..6]);
        assert_eq!(copies.take_lost(), []);
        assert!(copies.good(0).is_none());
    }

    #[test]
    fn what_is_copied_is_what_the_target_lacks_and_a_source_has() {
        let mut copies = stored(0..10, &[0]);
        copies.set_good(0..2, 1);
        copies.begin_store(5..6, 16, |_, _| {});
        let source = |good: Good| good.has(0).then_some(0);
        assert_eq!(copies.next_to_copy(0, 8, 1, Enough::NEVER, source), Some((2..5, 0)));
        assert_eq!(copies.next_to_copy(5, 2, 1, Enough::NEVER, source), Some((6..8, 0)));
        assert_eq!(copies.next_to_copy(0, 8, 1, Enough::NEVER, |_| None), None, "no source is here");
        copies.set_good(2..10, 1);
        assert!(copies.is_full(1, Enough::NEVER) && copies.is_spare(0, &[1]) && !copies.is_spare(1, &[2]));
    }

    #[test]
    fn a_place_is_added_once_and_slots_end() {
        let mut copies = Copies::default();
        assert!((0..7).all(|place| copies.add(place, Role::Keeping)));
        assert!(!copies.has_slot() && !copies.add(7, Role::Keeping) && !copies.add(0, Role::Filling));
        copies.remove(2);
        assert!(copies.add(7, Role::Filling));
        assert_eq!(copies.find(7).map(|copy| copy.slot), Some(2));
    }

    #[test]
    fn a_page_takes_up_room_until_it_is_said_to_take_none_whatever_becomes_of_its_content() {
        let mut copies = stored(0..4, &[0]);
        assert_eq!((copies.take(0..6, 0, true), copies.take(4..8, 0, true)), (6, 2));
        copies.begin_store(0..2, 16, |_, _| {});
        copies.forget(2..4, |_, _| {});
        assert_eq!((copies.taken(0..16, 0), copies.taken(0..16, 1)), (8, 0));
        assert!(!copies.is_empty(), "it takes up room");
        assert_eq!(copies.take(0..16, 0, false), 8);
        assert_eq!(copies.taken(0..16, 0), 0);
    }

    #[test]
    fn a_page_that_others_have_often_enough_is_not_copied() {
        let mut copies = stored(0..8, &[0]);
        (0..3).for_each(|place| assert!(copies.add(place, Role::Helping)));
        copies.set_role(0, Role::Keeping);
        copies.set_good(2..4, 1);
        let enough = copies.enough(2, None);
        let source = |good: Good| good.has(0).then_some(0);
        assert_eq!(copies.next_to_copy(0, 8, 2, enough, source), Some((0..2, 0)));
        assert_eq!(copies.next_to_copy(2, 8, 2, enough, source), Some((4..8, 0)));
        assert!(copies.lacks(0..8, enough) && !copies.lacks(2..4, enough));
        assert_eq!(copies.doubly(0, 9, enough), Some(2..4));
        copies.set_good(4..8, 1);
        copies.set_good(0..2, 2);
        assert!(copies.is_full(2, enough) && copies.is_full(1, enough));
        copies.set_role(2, Role::Leaving);
        assert!(!copies.is_full(1, copies.enough(2, None)), "who leaves does not count");
    }
}
