//! Which copies of each page of a piece are good.
//!
//! A piece is kept at up to [`SLOTS`] places at a time; for each page one bit per slot says whether the copy there is
//! what was stored last. A store clears all bits of its pages before it is sent, and each place's answer sets its own
//! bit: so a place that was away while a page changed is never read for it.

use std::ops::Range;

use smallvec::SmallVec;

/// A piece is kept at so many places at most, those counted that still have to clear it away.
pub(super) const SLOTS: u8 = 6;
/// The bits that say where a page is good.
const GOOD: u8 = (1 << SLOTS) - 1;
/// The page was stored and not forgotten.
const HELD: u8 = 1 << 6;
/// A store or an orphaned fetch will answer for the page.
const ANSWERED: u8 = 1 << 7;

/// What a place is to a piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// Has every page that is stored.
    Keeping,
    /// Gets what is stored from now on, and the rest bit by bit.
    Filling,
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
pub(super) struct Good(u8);

impl Good {
    pub(super) fn has(self, slot: u8) -> bool {
        self.0 & 1 << slot != 0
    }

    pub(super) fn none(self) -> bool {
        self.0 == 0
    }
}

/// A piece's places and pages. Pages are counted within the piece.
#[derive(Debug, Default)]
pub(super) struct Copies {
    pub(super) at: SmallVec<[Copy; 3]>,
    /// Made at the first store.
    pages: Box<[u8]>,
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

    fn pages(&mut self, pages: Range<u32>) -> &mut [u8] {
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
        let to = |page: u8| if will { page | ANSWERED } else { page & !ANSWERED };
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

    fn clear_bits(&mut self, pages: Range<u32>, bits: u8, mut lost: impl FnMut(u8, u64)) {
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
            *page = 0;
            match runs.last_mut() {
                Some(run) if run.end == index => run.end += 1,
                _ => runs.push(index..index + 1),
            }
        }
        runs
    }

    /// The next run of at most `most` pages from `from` on that are held and not being stored, good in `source`
    /// for some slot that `from_slot` accepts, and not good in `to`.
    pub(super) fn next_to_copy(
        &self,
        from: u32,
        most: u32,
        to: u8,
        source: impl Fn(Good) -> Option<u8>,
    ) -> Option<(Range<u32>, u8)> {
        let wanted = |page: u8| page & (HELD | ANSWERED | 1 << to) == HELD;
        let start = self.pages.iter().skip(from as usize).position(|page| wanted(*page))? as u32 + from;
        // Where the first page has no source now, the piece waits.
        let slot = source(Good(*self.pages.get(start as usize)? & GOOD))?;
        let fits = |page: &u8| wanted(*page) && page & 1 << slot != 0;
        let len =
            self.pages.iter().skip(start as usize).take(most as usize).take_while(|page| fits(page)).count();
        Some((start..start + len as u32, slot))
    }

    /// Whether every page that is held is good in `slot`, those aside that are being stored.
    pub(super) fn is_full(&self, slot: u8) -> bool {
        self.pages.iter().all(|page| page & (HELD | ANSWERED | 1 << slot) != HELD)
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
        assert_eq!(copies.next_to_copy(0, 8, 1, source), Some((2..5, 0)));
        assert_eq!(copies.next_to_copy(5, 2, 1, source), Some((6..8, 0)));
        assert_eq!(copies.next_to_copy(0, 8, 1, |_| None), None, "no source is here");
        copies.set_good(2..10, 1);
        assert!(copies.is_full(1) && copies.is_spare(0, &[1]) && !copies.is_spare(1, &[2]));
    }

    #[test]
    fn a_place_is_added_once_and_slots_end() {
        let mut copies = Copies::default();
        assert!((0..6).all(|place| copies.add(place, Role::Keeping)));
        assert!(!copies.add(6, Role::Keeping) && !copies.add(0, Role::Filling));
        copies.remove(2);
        assert!(copies.add(6, Role::Filling));
        assert_eq!(copies.find(6).map(|copy| copy.slot), Some(2));
    }
}
