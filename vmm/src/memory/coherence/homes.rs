//! Which member is the home of which pages: all members have to agree, so it follows from what all of them are told.

use super::message::Member;
use crate::memory::frames::{Page, Pieces};

/// The home of every page, by pieces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Homes {
    pieces: Pieces,
    /// Of each piece.
    homes: Vec<Member>,
}

impl Homes {
    /// `pieces` dealt to `members` in turn; `None` if those are none.
    #[must_use]
    pub fn spread(pieces: Pieces, members: &[Member]) -> Option<Self> {
        let dealt = members.iter().copied().cycle().take(pieces.count() as usize);
        (!members.is_empty()).then(|| Self { pieces, homes: dealt.collect() })
    }

    /// Each of `parts`, in order along the RAM file, is at home at its member, to the piece in which its last page is: so
    /// what the guest's own scheduler keeps near a member is found there without a message. What is left over is the
    /// last one's. `None` if those are none.
    #[must_use]
    pub fn sliced(pieces: Pieces, parts: &[(Member, u64)]) -> Option<Self> {
        let mut homes = Vec::with_capacity(pieces.count() as usize);
        let mut pages = 0_u64;
        for (member, count) in parts {
            pages = pages.saturating_add(*count);
            let until = pages.min(pieces.pages()).div_ceil(u64::from(pieces.each())) as usize;
            homes.resize(homes.len().max(until), *member);
        }
        let (last, _) = parts.last()?;
        homes.resize(pieces.count() as usize, *last);
        Some(Self { pieces, homes })
    }

    /// The pieces that have a home.
    #[must_use]
    pub fn pieces(&self) -> &Pieces {
        &self.pieces
    }

    /// Who is home to something.
    pub fn all(&self) -> impl Iterator<Item = Member> {
        self.homes.iter().copied()
    }

    /// Where `page` is at home; `None` if it is not in RAM.
    #[must_use]
    pub fn of(&self, page: Page) -> Option<Member> {
        self.homes.get(self.pieces.of(page)?.0 as usize).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::Bytes;

    #[test]
    fn every_page_has_a_home_and_they_are_spread_or_sliced() {
        let [a, b, c] = [0, 1, 2].map(|number| Member::new(number).expect("small"));
        let pieces = Pieces::new(Bytes(5 * (16 << 20) - 4096));
        let at = |homes: &Homes, piece: u64| homes.of(Page(piece * 4096 + 17)).expect("it is in RAM");
        let spread = Homes::spread(pieces, &[a, b]).expect("there are some");
        assert_eq!([0, 1, 2, 3, 4].map(|piece| at(&spread, piece)), [a, b, a, b, a]);
        let sliced = Homes::sliced(pieces, &[(a, 2 * 4096), (b, 4097), (c, 10)]).expect("there are some");
        assert_eq!([0, 1, 2, 3, 4].map(|piece| at(&sliced, piece)), [a, a, b, b, c]);
        assert_eq!(spread.of(Page(5 * 4096 - 1)), None, "beyond RAM");
        assert_eq!(Homes::spread(pieces, &[]), None);
    }
}
