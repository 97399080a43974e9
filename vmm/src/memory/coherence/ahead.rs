//! Which pages a thread will need next, learnt from what it stood still for.
//!
//! *Companions* are pages that it needs together. A vCPU that was interrupted, or whose pages went to another member, needs them again when it goes on: its stack, its
//! run queue, on some processors the page tables. One by one each would cost a round trip. So when it stands still for a
//! page that it needed lately, the others of its last ones that are gone are fetched with it. And a page that it read and
//! then wrote to is fetched to be written to ("migratory sharing": Cox and Fowler, ISCA 1993).
//!
//! Nobody sees whether a page that came along was used. So each may come along a few times only; then the thread has to
//! stand still for it again.
//!
//! A *stream* is one page after the other. The further it goes, the more of the pages that follow are asked for at once.

use std::ops::Range;

use smallvec::SmallVec;

use super::message::Right;

/// So many pages of a thread are known, those that it stood still for last. A kernel that handles an interrupt needs
/// about thirty of those that its processors share.
pub(super) const MOST: usize = 36;

/// So often a page comes along, or comes to be written to, after it was seen to be needed.
const TRUST: u8 = 8;

/// A page that a thread stood still for.
#[derive(Clone, Copy, Debug)]
struct Known {
    page: u32,
    right: Right,
    /// It was read, and then written to.
    migrates: bool,
    trust: u8,
}

/// What one thread stood still for, the latest last.
#[derive(Debug, Default)]
pub(super) struct Companions(SmallVec<[Known; MOST]>);

impl Companions {
    /// The thread stands still for `page`, to use it with `right`; `here`: it may be read already. Says with which right to
    /// ask for it, and whether it was known.
    pub(super) fn needed(&mut self, page: u32, right: Right, here: bool) -> (Right, bool) {
        let before = self.0.iter().position(|known| known.page == page).map(|at| self.0.remove(at));
        let mut known = before.unwrap_or(Known { page, right, migrates: false, trust: TRUST });
        known.migrates |= here && right == Right::Write;
        if right == Right::Read && known.migrates {
            known.trust = known.trust.saturating_sub(1);
        } else {
            known.trust = TRUST;
        }
        if known.trust == 0 {
            (known.migrates, known.trust) = (false, TRUST);
        }
        known.right = if known.migrates { Right::Write } else { right };
        if self.0.len() == MOST {
            self.0.remove(0);
        }
        self.0.push(known);
        (known.right, before.is_some())
    }

    /// Whether `page` is one of them.
    pub(super) fn has(&self, page: u32) -> bool {
        self.0.iter().any(|known| known.page == page)
    }

    /// All of them.
    pub(super) fn all(&self) -> impl Iterator<Item = u32> {
        self.0.iter().map(|known| known.page)
    }

    /// Those that may come along with `page`, and with which right.
    pub(super) fn of(&self, page: u32) -> SmallVec<[(u32, Right); MOST]> {
        self.0.iter().filter(|known| known.page != page).map(|known| (known.page, known.right)).collect()
    }

    /// `page` comes along.
    pub(super) fn comes(&mut self, page: u32) {
        for known in self.0.iter_mut().filter(|known| known.page == page) {
            known.trust = known.trust.saturating_sub(1);
        }
        self.0.retain(|known| known.trust > 0);
    }
}

/// So many streams of a thread are followed.
const STREAMS: usize = 4;

/// So many pages one after the other make a stream.
const STEPS: u32 = 3;

/// So many pages are asked for at most before a stream comes to them.
const FURTHEST: u32 = 32;

/// One page after the other.
#[derive(Clone, Copy, Debug)]
struct Stream {
    last: u32,
    /// The first page that was not asked for.
    end: u32,
    steps: u32,
}

/// The streams of one thread, the latest last.
#[derive(Debug, Default)]
pub(super) struct Streams(SmallVec<[Stream; STREAMS]>);

impl Streams {
    /// The thread stands still for `page`: what to ask for besides. There may not be as many pages.
    pub(super) fn needed(&mut self, page: u32) -> Range<u32> {
        let next = page.saturating_add(1);
        let at = self.0.iter().position(|stream| (stream.last..=stream.end).contains(&page));
        let before = at.map(|at| self.0.remove(at));
        if let Some(same) = before.filter(|before| before.last == page) {
            self.0.push(same);
            return next..next;
        }
        let steps = before.map_or(0, |before| before.steps).saturating_add(1);
        let far = if steps < STEPS { 0 } else { FURTHEST.min(2_u32.saturating_pow(steps - STEPS + 1)) };
        let end = next.saturating_add(far).max(before.map_or(0, |before| before.end));
        if self.0.len() == STREAMS {
            self.0.remove(0);
        }
        self.0.push(Stream { last: page, end, steps });
        next..next.saturating_add(far)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_that_were_needed_come_along_with_one_that_is_needed_again() {
        let mut companions = Companions::default();
        assert_eq!(companions.needed(1, Right::Read, false), (Right::Read, false));
        assert_eq!(companions.needed(2, Right::Write, false), (Right::Write, false));
        assert_eq!(companions.needed(1, Right::Read, false), (Right::Read, true));
        assert_eq!(companions.of(1).as_slice(), [(2, Right::Write)]);
        assert_eq!(companions.of(7).len(), 2);
    }

    #[test]
    fn a_page_that_is_read_and_then_written_to_is_asked_for_to_be_written_to() {
        let mut companions = Companions::default();
        companions.needed(1, Right::Write, false);
        assert_eq!(
            companions.needed(1, Right::Read, false),
            (Right::Read, true),
            "it was written to, not read before"
        );
        companions.needed(1, Right::Write, true);
        for _ in 1..TRUST {
            assert_eq!(companions.needed(1, Right::Read, false), (Right::Write, true));
        }
        assert_eq!(
            companions.needed(1, Right::Read, false),
            (Right::Read, true),
            "nobody saw it written to for long"
        );
    }

    #[test]
    fn a_page_that_came_along_often_has_to_be_needed_again_first() {
        let mut companions = Companions::default();
        companions.needed(1, Right::Write, false);
        for _ in 1..TRUST {
            companions.comes(1);
            assert_eq!(companions.of(2).as_slice(), [(1, Right::Write)]);
        }
        companions.comes(1);
        assert!(companions.of(2).is_empty());
    }

    #[test]
    fn only_the_last_pages_are_known() {
        let mut companions = Companions::default();
        for page in 0..MOST as u32 + 5 {
            companions.needed(page, Right::Read, false);
        }
        assert_eq!(companions.of(u32::MAX).len(), MOST);
        assert_eq!(companions.of(u32::MAX)[0], (5, Right::Read));
    }

    #[test]
    fn the_further_a_stream_goes_the_more_is_asked_for_at_once() {
        let mut streams = Streams::default();
        let (mut page, mut asked) = (100, Vec::new());
        for _ in 0..10 {
            let ahead = streams.needed(page);
            asked.push(ahead.len() as u32);
            page = ahead.end;
            assert!(streams.needed(page * 1000).is_empty(), "another one does not disturb it");
        }
        assert_eq!(asked, [0, 0, 2, 4, 8, 16, 32, FURTHEST, FURTHEST, FURTHEST]);
    }

    #[test]
    fn what_goes_to_and_fro_is_no_stream() {
        let mut streams = Streams::default();
        for page in [5, 9, 5, 5, 5, 5, 1, 7, 100, 50, 20, 5, 9, 3, 60] {
            assert!(streams.needed(page).is_empty(), "{page}");
        }
        assert_eq!(streams.needed(u32::MAX).len(), 0);
    }
}
