//! The states of one handler's pages.

use super::counters::Census;
use super::pages::{Event, Place, State, Step, step};
use super::{Page, Shards};

/// One byte for each page of a shard, and how many there are of each kind.
pub(super) struct Ledger {
    shards: Shards,
    shard: u32,
    states: Vec<State>,
    census: Census,
}

impl Ledger {
    pub(super) fn new(shards: Shards, shard: u32) -> Self {
        let states = vec![State::FIRST; shards.pages(shard)];
        let mut census = Census::default();
        census.add(Place::Zero, states.len() as u64);
        Self { shards, shard, states, census }
    }

    /// How many pages there are.
    pub(super) fn len(&self) -> usize {
        self.states.len()
    }

    /// The place of `page` among the shard's; `None` if it is another handler's.
    pub(super) fn index(&self, page: Page) -> Option<usize> {
        self.shards.place(page).and_then(|(shard, index)| (shard == self.shard).then_some(index))
    }

    /// The page at `index`.
    pub(super) fn page(&self, index: usize) -> Page {
        self.shards.page(self.shard, index)
    }

    /// The state of the page at `index`; that of an untouched one beyond the end.
    pub(super) fn state(&self, index: usize) -> State {
        self.states.get(index).copied().unwrap_or(State::FIRST)
    }

    /// How many pages are where.
    pub(super) fn census(&self) -> &Census {
        &self.census
    }

    /// What follows from `event` happening to the page at `index`. The caller does it.
    pub(super) fn apply(&mut self, index: usize, event: Event) -> Step {
        let before = self.state(index);
        let step = step(before, event);
        if let Some(state) = self.states.get_mut(index) {
            *state = step.state;
            self.census.moved(before.place(), step.state.place());
            self.census.storing += u64::from(step.state.storing());
            self.census.storing -= u64::from(before.storing());
        }
        step
    }

    /// Which of the shard's pieces the page at `index` is in.
    pub(super) fn piece(&self, index: usize) -> usize {
        index / self.shards.pieces().each() as usize
    }

    /// The indices of `count` pages from `first` on, which must all be this handler's and of one piece.
    pub(super) fn indices(&self, first: Page, count: u32) -> Option<std::ops::Range<usize>> {
        let whole = self.shards.pieces().run(first, count.into()) == u64::from(count);
        let start = self.index(first).filter(|_| whole)?;
        Some(start..start + count as usize)
    }

    /// How many of `most` indices from `index` on are of its piece.
    pub(super) fn run(&self, index: usize, most: usize) -> usize {
        self.shards.pieces().run(self.page(index), most as u64) as usize
    }
}

/// Collects neighbours to which the same is to be done, so that it is done to all of them at once.
pub(super) struct Runs<K> {
    run: Option<(Page, u64, K)>,
}

impl<K: PartialEq + Copy> Runs<K> {
    pub(super) fn new() -> Self {
        Self { run: None }
    }

    /// Adds `page`; returns the run before it if the page does not continue it.
    pub(super) fn add(&mut self, page: Page, key: K) -> Option<(Page, u64, K)> {
        if let Some((first, count, of)) = &mut self.run
            && *of == key
            && first.plus(*count) == page
        {
            *count += 1;
            return None;
        }
        self.run.replace((page, 1, key))
    }

    /// The last run.
    pub(super) fn end(&mut self) -> Option<(Page, u64, K)> {
        self.run.take()
    }
}
