//! What is known of a shard's pages: a byte of each, more only of those that something happens to.

use std::collections::HashMap;
use std::time::Instant;

use transport::buffer::Buffer;

use super::holds::Hold;
use super::member::Copy;
use super::{Line, Page};

/// A page that something happens to.
#[derive(Debug, Default)]
pub(super) struct Busy {
    pub(super) page: Page,
    /// Content that came and waits to be installed.
    pub(super) staged: Option<Buffer>,
    /// Since when somebody stands still for it.
    pub(super) since: Option<Instant>,
    /// Somebody's hold had to be over first.
    pub(super) late: bool,
    /// How it is held, if it is.
    pub(super) hold: Option<Hold>,
}

/// All pages of a shard by their place, and the lines of those that are at home here.
pub(super) struct Table {
    /// The copy; what is in `busy` counts.
    states: Vec<u8>,
    busy: HashMap<u32, Busy>,
    /// By pieces, once one of their pages was asked for.
    lines: Vec<Option<Box<[Line]>>>,
    /// Pages in a piece.
    each: usize,
}

const COPIES: [Copy; 4] = [Copy::None, Copy::Shared, Copy::Owned, Copy::Modified];

impl Table {
    /// Of so many pages, `each` in a piece.
    pub(super) fn new(pages: usize, each: usize) -> Self {
        let lines = std::iter::repeat_with(|| None).take(pages.div_ceil(each)).collect();
        Self { states: vec![0; pages], busy: HashMap::new(), lines, each }
    }

    /// Forgets everything.
    pub(super) fn clear(&mut self) {
        *self = Self::new(self.states.len(), self.each);
    }

    fn state(&self, place: u32) -> u8 {
        self.states.get(place as usize).copied().unwrap_or(0)
    }

    /// Takes out what is known of a page; it is to be [put back](Self::put).
    pub(super) fn take(&mut self, place: u32) -> Busy {
        let copy = self.copy(place);
        self.busy.remove(&place).unwrap_or_else(|| Busy { page: Page::resting(copy), ..Busy::default() })
    }

    /// Puts back what is known of a page.
    pub(super) fn put(&mut self, place: u32, busy: Busy) {
        if let Some(state) = self.states.get_mut(place as usize) {
            let copy = COPIES.iter().position(|copy| *copy == busy.page.copy()).unwrap_or(0);
            *state = copy as u8;
        }
        if !busy.page.idle() || busy.staged.is_some() {
            self.busy.insert(place, busy);
        }
    }

    /// What this member has of a page.
    pub(super) fn copy(&self, place: u32) -> Copy {
        COPIES[usize::from(self.state(place) & 3)]
    }

    /// How the page is held; `None`: it is not.
    pub(super) fn held(&self, place: u32) -> Option<Hold> {
        self.busy.get(&place).filter(|busy| busy.page.held())?.hold
    }

    /// The page, if it is held, is held like this.
    pub(super) fn hold(&mut self, place: u32, hold: Hold) {
        if let Some(busy) = self.busy.get_mut(&place).filter(|busy| busy.page.held()) {
            busy.hold = Some(hold);
        }
    }

    /// Whether the page was asked for and has not come yet.
    pub(super) fn asks(&self, place: u32) -> bool {
        self.busy.get(&place).is_some_and(|busy| busy.page.asks())
    }

    /// What the home of a page, which this member is, knows of it.
    pub(super) fn line(&mut self, place: u32) -> Option<&mut Line> {
        let (piece, inside) = (place as usize / self.each, place as usize % self.each);
        let count = self.each.min(self.states.len().saturating_sub(piece * self.each));
        let lines = self.lines.get_mut(piece)?;
        lines.get_or_insert_with(|| vec![Line::default(); count].into_boxed_slice()).get_mut(inside)
    }
}

#[cfg(test)]
mod tests {
    use super::super::member::Event;
    use super::super::message::Right;
    use super::*;

    #[test]
    fn a_page_at_rest_is_a_byte_and_one_with_something_under_way_is_kept_whole() {
        let mut table = Table::new(10, 4);
        assert_eq!(table.copy(9), Copy::None);
        let mut busy = table.take(9);
        (busy.page, _) = busy.page.step(Event::Fault(Right::Write)).expect("a fault is always possible");
        let asking = busy.page;
        table.put(9, busy);
        assert!(table.busy.contains_key(&9));
        assert_eq!(table.take(9).page, asking);
        table.put(9, Busy { page: Page::resting(Copy::Owned), ..Busy::default() });
        assert_eq!((table.copy(9), table.busy.contains_key(&9)), (Copy::Owned, false));
        assert_eq!(table.take(9).page, Page::resting(Copy::Owned));
        assert!(table.line(9).is_some() && table.line(12).is_none(), "only pages have lines");
        table.clear();
        assert_eq!(table.copy(9), Copy::None);
    }
}
