//! Giving pages up, so that the next fault finds memory free: pages that the source has are dropped, others are
//! stored first, ahead of need.

use std::io;

use transport::buffer::Buffer;

use super::handler::Handler;
use super::ledger::Runs;
use super::pages::{Action, Event, Order, Place};
use super::{PAGE, Page};

/// So many pages are given up at once at most: what is done about them must not keep a fault waiting. More where
/// memory is short.
const AT_ONCE: (u64, u64) = (16, 128);

/// So many runs of pages are looked at, likewise.
const LOOKS: (u32, u32) = (1, 4);

/// For fewer than so many pages it does not begin: what follows each other is given up together.
const PAYS: u64 = 8;

/// After so many rounds without success the search ends until something happens; if somebody waits for memory, it
/// only goes on more slowly, because nothing else may happen.
const IN_VAIN: u32 = 64;

/// So many pages that follow each other are stored at once.
const STORE_AT_ONCE: u64 = 16;

/// So many pages are looked at in a round, at most, for copies that the source may forget.
const RECLAIM_LOOKS: usize = 4 << 10;

/// The most pages that are kept free, or on their way out.
const MOST_FREE: u64 = 16 << 10;

impl Handler {
    /// So many pages should be free, or on their way out.
    pub(super) fn reserve(&self) -> u64 {
        (self.limit / 8).clamp(8, MOST_FREE)
    }

    /// Gives some pages up, if too few are free.
    pub(super) fn make_room(&mut self) -> io::Result<()> {
        self.unfinished = false;
        let reserve = self.reserve();
        let wanted = reserve.saturating_sub(self.free() + self.ledger.census().storing);
        if wanted < PAYS.min(reserve / 4) || self.in_vain >= IN_VAIN && !self.starves() {
            return Ok(());
        }
        let short = self.free() < reserve / 2;
        let (most, looks) = if short { (AT_ONCE.1, LOOKS.1) } else { (AT_ONCE.0, LOOKS.0) };
        let now = wanted.min(most);
        for _ in 0..looks {
            if self.ageing.ready() as u64 >= now {
                break;
            }
            self.look()?;
        }
        let mut victims = std::mem::take(&mut self.victims);
        self.ageing.victims(now as usize, &mut victims);
        self.in_vain = if victims.is_empty() { self.in_vain + 1 } else { 0 };
        self.unfinished = wanted > victims.len() as u64 && self.in_vain < IN_VAIN;
        victims.sort_unstable();
        self.give_up(&victims)?;
        victims.clear();
        self.victims = victims;
        Ok(())
    }

    /// Sees which pages of a run were touched since the last look.
    fn look(&mut self) -> io::Result<()> {
        let Some(run) = self.ageing.look() else { return Ok(()) };
        let mapped = self.frames.look(self.ledger.page(run.start), run.len());
        self.ageing.looked(run.clone(), |index| mapped >> (index - run.start) & 1 != 0);
        for index in self.ageing.wasted() {
            self.tally.ahead_wasted.add(1);
            self.streams.unused(index as usize);
        }
        Ok(())
    }

    /// Has the source forget copies of pages that are here, if it is short of room: some at once, so that no fault has to
    /// wait. Outdated copies or good ones, as they come: those that stay here are as likely to change.
    pub(super) fn reclaim(&mut self) -> io::Result<()> {
        let wanted = self.source.short().min(AT_ONCE.1);
        if wanted == 0 {
            return Ok(());
        }
        let (mut found, mut runs) = (0, Runs::new());
        for _ in 0..self.ledger.len().min(RECLAIM_LOOKS) {
            let index = self.reclaim_at;
            self.reclaim_at = if index + 1 < self.ledger.len() { index + 1 } else { 0 };
            if !self.ledger.state(index).reclaimable() {
                continue;
            }
            self.happen(index, Event::Reclaimed);
            let key = self.ledger.piece(index);
            if let Some((first, count, _)) = runs.add(self.ledger.page(index), key) {
                self.forget(first, count);
            }
            found += 1;
            if found == wanted {
                break;
            }
        }
        if let Some((first, count, _)) = runs.end() {
            self.forget(first, count);
        }
        self.tally.reclaimed.add(found);
        // As long as there are some, it goes on.
        self.reclaimed_none = if found > 0 { 0 } else { self.reclaimed_none.saturating_add(1) };
        let rounds = self.ledger.len().div_ceil(RECLAIM_LOOKS) as u32;
        self.unfinished |= self.reclaimed_none <= rounds;
        Ok(())
    }

    /// Drops what the source has, stores the rest.
    fn give_up(&mut self, victims: &[usize]) -> io::Result<()> {
        let mut runs = Runs::new();
        for index in victims {
            let state = self.ledger.state(*index);
            let drop = state.droppable();
            if !drop && !state.storable() {
                continue;
            }
            // A run lies in one piece.
            let piece = self.ledger.piece(*index);
            if let Some(run) = runs.add(self.ledger.page(*index), (drop, piece)) {
                self.give_up_run(run)?;
            }
        }
        runs.end().map_or(Ok(()), |run| self.give_up_run(run))
    }

    fn give_up_run(&mut self, (first, count, (drop, _)): (Page, u64, (bool, usize))) -> io::Result<()> {
        if drop {
            return self.drop_run(first, count);
        }
        for at in (0..count).step_by(STORE_AT_ONCE as usize) {
            self.store_run(first.plus(at), STORE_AT_ONCE.min(count - at))?;
        }
        Ok(())
    }

    /// Takes pages out of memory that the source has.
    fn drop_run(&mut self, first: Page, count: u64) -> io::Result<()> {
        let mut resident = false;
        for index in self.ledger.indices(first, count as u32).ok_or(io::ErrorKind::InvalidInput)? {
            let step = self.happen(index, Event::Drop);
            if step.order == Order::Forget {
                self.forget(self.ledger.page(index), 1);
            }
            match step.action {
                Action::Unkeep => drop(self.unkeep(index)),
                _ => resident = true,
            }
        }
        self.tally.dropped.add(count);
        if resident { self.frames.punch(first, count) } else { Ok(()) }
    }

    /// Sends copies of pages to the source. Whoever writes to one from now on makes it dirty again, and waits for
    /// nothing.
    fn store_run(&mut self, first: Page, count: u64) -> io::Result<()> {
        self.frames.protect(first, count)?;
        let content = self.frames.read(first, count)?;
        let mut runs = Runs::new();
        let mut stored = Vec::new();
        for (at, bytes) in (0..count).zip(content.chunks(PAGE)) {
            let page = first.plus(at);
            let index = self.ledger.index(page).ok_or(io::ErrorKind::InvalidInput)?;
            let blank = is_zero(bytes);
            let step = self.happen(index, if blank { Event::Blank } else { Event::Saved });
            match step.order {
                Order::Store => stored.extend(runs.add(page, ())),
                Order::Forget => self.forget(page, 1),
                Order::None | Order::Fetch => {}
            }
            if blank {
                self.tally.blanked.add(1);
                self.drop_run(page, 1)?;
            }
        }
        stored.extend(runs.end());
        let content = Buffer::from_vec(content);
        for (page, count, ()) in stored {
            let skip = (page.0 - first.0) as usize * PAGE;
            let part = content.slice(skip, count as usize * PAGE).ok_or(io::ErrorKind::InvalidInput)?;
            self.source.store(page, part);
            self.asked = true;
        }
        Ok(())
    }

    /// Drops pages whose content was stored just now, if memory is short and nobody has written to them since.
    pub(super) fn drop_stored(&mut self, first: Page, count: u32) -> io::Result<()> {
        let mut runs = Runs::new();
        for at in 0..u64::from(count) {
            let page = first.plus(at);
            let index = self.ledger.index(page).ok_or(io::ErrorKind::InvalidInput)?;
            let state = self.ledger.state(index);
            if state.place() == Place::Clean
                && state.droppable()
                && self.free() < self.reserve()
                && let Some((first, count, ())) = runs.add(page, ())
            {
                self.drop_run(first, count)?;
            }
        }
        runs.end().map_or(Ok(()), |(first, count, ())| self.drop_run(first, count))
    }

    /// Drops one page that need not be stored, for a fault that waits; `false` if there is none.
    pub(super) fn drop_one(&mut self) -> io::Result<bool> {
        let census = self.ledger.census();
        let at_most: u64 =
            [Place::Clean, Place::Blank, Place::Parked].map(|place| census.at(place)).iter().sum();
        // Those that are being stored are dropped when they have been.
        if at_most <= census.storing {
            return Ok(false);
        }
        let mut victims = std::mem::take(&mut self.victims);
        self.ageing.victims(16, &mut victims);
        let droppable = |index: &usize| self.ledger.state(*index).droppable();
        let found = victims.drain(..).find(droppable).or_else(|| (0..self.ledger.len()).find(droppable));
        self.victims = victims;
        let Some(index) = found else { return Ok(false) };
        self.drop_run(self.ledger.page(index), 1)?;
        Ok(true)
    }
}

fn is_zero(bytes: &[u8]) -> bool {
    let (before, words, after) = (bytes.first(), bytes.chunks_exact(64), bytes.last());
    before == Some(&0) && after == Some(&0) && words.into_iter().all(|words| words == [0; 64])
}
