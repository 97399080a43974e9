//! Giving pages up, so that the next fault finds memory free: pages that the source has are dropped, others are
//! stored first, ahead of need.

use std::io;

use transport::buffer::Buffer;

use super::handler::Handler;
use super::ledger::Runs;
use super::pages::{Event, Order, Place};
use super::{PAGE, Page};

/// So many pages at most are chosen at once: what is done about them must not keep a fault waiting.
const AT_ONCE: u64 = 32;

/// So many pages that follow each other are stored at once.
const STORE_AT_ONCE: u64 = 16;

/// The most pages that are kept free, or on their way out.
const MOST_FREE: u64 = 16 << 10;

impl Handler {
    /// So many pages should be free, or on their way out.
    fn reserve(&self) -> u64 {
        (self.limit / 8).clamp(8, MOST_FREE)
    }

    /// Chooses pages to give up, as long as too few are free.
    pub(super) fn make_room(&mut self) -> io::Result<()> {
        let reserve = self.reserve();
        let soon = self.free() + self.ledger.census().storing;
        let wanted = reserve.saturating_sub(soon);
        // Few at a time are not worth the calls, unless few are all there are.
        if wanted < AT_ONCE.min(reserve / 4) {
            return Ok(());
        }
        let mut victims = self.choose(wanted.min(AT_ONCE));
        victims.sort_unstable();
        self.give_up(&victims)
    }

    /// Pages to give up, at most so many.
    fn choose(&mut self, wanted: u64) -> Vec<usize> {
        let mut victims = Vec::with_capacity(wanted as usize);
        for _ in 0..self.ledger.len() {
            if victims.len() as u64 == wanted {
                break;
            }
            let state = self.ledger.state(self.hand);
            if state.droppable() || state.storable() {
                victims.push(self.hand);
            }
            self.hand = (self.hand + 1) % self.ledger.len().max(1);
        }
        victims
    }

    /// Drops what the source has, stores the rest.
    fn give_up(&mut self, victims: &[usize]) -> io::Result<()> {
        let mut runs = Runs::new();
        for index in victims {
            let drop = self.ledger.state(*index).droppable();
            if let Some(run) = runs.add(self.ledger.page(*index), drop) {
                self.give_up_run(run)?;
            }
        }
        runs.end().map_or(Ok(()), |run| self.give_up_run(run))
    }

    fn give_up_run(&mut self, (first, count, drop): (Page, u64, bool)) -> io::Result<()> {
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
        for index in self.ledger.indices(first, count as u32).ok_or(io::ErrorKind::InvalidInput)? {
            if self.ledger.apply(index, Event::Drop).order == Order::Forget {
                self.forget(self.ledger.page(index), 1);
            }
        }
        self.tally.dropped.add(count);
        self.frames.punch(first, count)
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
            let step = self.ledger.apply(index, if blank { Event::Blank } else { Event::Saved });
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
        let len = self.ledger.len();
        let found =
            (0..len).map(|at| (self.hand + at) % len).find(|index| self.ledger.state(*index).droppable());
        let Some(index) = found else { return Ok(false) };
        self.drop_run(self.ledger.page(index), 1)?;
        Ok(true)
    }
}

fn is_zero(bytes: &[u8]) -> bool {
    let (before, words, after) = (bytes.first(), bytes.chunks_exact(64), bytes.last());
    before == Some(&0) && after == Some(&0) && words.into_iter().all(|words| words == [0; 64])
}
