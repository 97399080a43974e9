//! How guest RAM is cut into pages, pieces and shards.
//!
//! ```text
//! RAM file   | piece 0 | piece 1 | piece 2 | piece 3 | piece 4 | rest |      a piece: 4096 pages or more
//! shard of 3     0         1         2         0         1        2
//! ```

use std::ops::Range;

use crate::units::Bytes;

/// Bytes in a page.
pub const PAGE: usize = 4096;

/// Pages in the smallest piece: 16 MiB.
const PIECE: u32 = 4096;

/// The least that a handler needs of this PC's memory, in pages, to have a page free for the next fault.
pub(in crate::memory) const LEAST: u64 = 32;

/// Each piece is a mapping of its own to the kernel, of which a process has at most 65,530.
const MOST_PIECES: u64 = 2048;

/// A page of guest RAM: its index along the RAM file, which is not its guest-physical page number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Page(pub u64);

impl Page {
    /// The page that holds byte `offset` of the RAM file.
    #[must_use]
    pub fn at(offset: u64) -> Self {
        Self(offset / PAGE as u64)
    }

    /// Its first byte in the RAM file.
    #[must_use]
    pub fn offset(self) -> u64 {
        self.0 * PAGE as u64
    }

    /// The page `count` further on.
    #[must_use]
    pub fn plus(self, count: u64) -> Self {
        Self(self.0 + count)
    }
}

/// The unit of sharding and of placement: runs of pages of a fixed length, along the RAM file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Piece(pub u32);

/// All pieces of a guest's RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pieces {
    pages: u64,
    /// Pages in a piece, a power of two.
    each: u32,
}

impl Pieces {
    /// The pieces of `ram` bytes of RAM; bytes beyond the last whole page are none of them.
    #[must_use]
    pub fn new(ram: Bytes) -> Self {
        let pages = ram.0 / PAGE as u64;
        let mut each = PIECE;
        while pages.div_ceil(u64::from(each)) > MOST_PIECES && each < 1 << 31 {
            each *= 2;
        }
        Self { pages, each }
    }

    /// Pages of RAM.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Pages in a piece; the last one may be shorter.
    #[must_use]
    pub fn each(&self) -> u32 {
        self.each
    }

    /// How many pieces there are.
    #[must_use]
    pub fn count(&self) -> u32 {
        self.pages.div_ceil(u64::from(self.each)) as u32
    }

    /// The piece that `page` is in; `None` if it is not in RAM.
    #[must_use]
    pub fn of(&self, page: Page) -> Option<Piece> {
        (page.0 < self.pages).then(|| Piece((page.0 / u64::from(self.each)) as u32))
    }

    /// The pages of `piece`; empty if there is no such piece.
    #[must_use]
    pub fn range(&self, piece: Piece) -> Range<u64> {
        let start = (u64::from(piece.0) * u64::from(self.each)).min(self.pages);
        start..(start + u64::from(self.each)).min(self.pages)
    }

    /// How many pages from `page` on, at most `count`, are in its piece.
    #[must_use]
    pub fn run(&self, page: Page, count: u64) -> u64 {
        self.of(page).map_or(0, |piece| count.min(self.range(piece).end - page.0))
    }
}

/// Which handler owns which pieces: they are dealt out in turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shards {
    pieces: Pieces,
    count: u32,
}

impl Shards {
    /// `pieces` dealt to `count` handlers, at least one.
    #[must_use]
    pub fn new(pieces: Pieces, count: u32) -> Self {
        Self { pieces, count: count.max(1) }
    }

    /// The pieces that are dealt.
    #[must_use]
    pub fn pieces(&self) -> &Pieces {
        &self.pieces
    }

    /// How many handlers there are.
    #[must_use]
    pub fn count(&self) -> u32 {
        self.count
    }

    /// The pieces of handler `shard`.
    pub fn of(&self, shard: u32) -> impl Iterator<Item = Piece> + use<> {
        (shard..self.pieces.count()).step_by(self.count as usize).map(Piece)
    }

    /// How many pages handler `shard` owns.
    #[must_use]
    pub fn pages(&self, shard: u32) -> usize {
        let whole = self.of(shard).map(|piece| self.pieces.range(piece));
        whole.map(|range| range.end - range.start).sum::<u64>() as usize
    }

    /// How many pages of handler `shard` may be in this PC's memory, if `local` may of all: who owns more gets more room,
    /// and nobody less than a few.
    #[must_use]
    pub fn limit(&self, shard: u32, local: u64) -> u64 {
        let pages = self.pages(shard) as u64;
        let spare = local.saturating_sub(LEAST * u64::from(self.count));
        let spare = u128::from(spare) * u128::from(pages) / u128::from(self.pieces.pages().max(1));
        (LEAST + spare as u64).min(pages.max(LEAST))
    }

    /// Who owns `page`, and its place among the pages of its owner, counted without gaps; `None` if it is not in
    /// RAM. Pages that follow each other in a piece do so here too.
    #[must_use]
    pub fn place(&self, page: Page) -> Option<(u32, usize)> {
        let piece = self.pieces.of(page)?;
        let before = u64::from(piece.0 / self.count) * u64::from(self.pieces.each);
        let inside = page.0 % u64::from(self.pieces.each);
        Some((piece.0 % self.count, (before + inside) as usize))
    }

    /// The page at a place among those of handler `shard`: what [`place`](Self::place) undoes.
    #[must_use]
    pub fn page(&self, shard: u32, place: usize) -> Page {
        let each = u64::from(self.pieces.each);
        let (turn, inside) = (place as u64 / each, place as u64 % each);
        Page((turn * u64::from(self.count) + u64::from(shard)) * each + inside)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_sixteen_megabytes_until_there_would_be_too_many() {
        let small = Pieces::new(Bytes((1 << 30) + 8192));
        assert_eq!((small.each(), small.count()), (4096, 65));
        assert_eq!(small.range(Piece(64)), 64 * 4096..64 * 4096 + 2, "the last one is short");
        assert_eq!(small.range(Piece(65)), small.pages()..small.pages());
        assert_eq!(small.of(Page(64 * 4096 + 2)), None);
        assert_eq!(small.run(Page(4090), 100), 6);
        assert_eq!(small.run(Page(64 * 4096), 100), 2);
        let large = Pieces::new(Bytes(100 << 30));
        assert_eq!((large.each(), large.count()), (16384, 1600));
    }

    #[test]
    fn every_page_has_one_owner_and_one_place() {
        for (size, count) in [(1 << 24, 1), (5 << 24, 2), ((7 << 24) + 4096 * 9, 3), (1 << 24, 4)] {
            let shards = Shards::new(Pieces::new(Bytes(size)), count);
            let mut seen: Vec<Vec<bool>> = (0..count).map(|shard| vec![false; shards.pages(shard)]).collect();
            for page in (0..shards.pieces().pages()).map(Page) {
                let (shard, place) = shards.place(page).expect("it is in RAM");
                assert!(
                    !std::mem::replace(&mut seen[shard as usize][place], true),
                    "{page:?} has a place of its own"
                );
                assert_eq!(shards.page(shard, place), page);
            }
            assert!(seen.iter().flatten().all(|seen| *seen), "no gaps");
            assert_eq!(shards.place(Page(shards.pieces().pages())), None);
        }
    }
}
