//! The pages that are stored under one lease.
//!
//! A page is at its own number's place in a sparse file. For each there is a byte of state under the lock of its
//! *part* (4096 pages, as the guest's pieces, so that its handlers seldom meet at a lock). Content is copied without
//! a lock. It is sent straight from the file: a page that is on its way out is given back only when it is out, or
//! else reading it would take memory that nobody counts.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use transport::buffer::Buffer;
use vmm::memory::store::protocol::MAX_PAGES;

use super::mapping::Mapping;
use super::record::{self, Head, Layout, Record};
use super::usage::Usage;
use super::{PAGE, Refused};
use crate::volume::lock;

/// Pages under one lock.
const PART: u64 = 4096;

/// Counted in the quota: there may be memory for it.
const COUNTED: u8 = 1;
/// Its content is in place.
const HELD: u8 = 2;
/// Its content is being written.
const STORING: u8 = 4;
/// One answer that is on its way out with it; as many as fit above.
const FETCH: u8 = 8;
/// No further one fits.
const FETCHES: u8 = !(FETCH - 1);

/// The states of the pages of a part; none before the first is stored.
#[derive(Debug, Default)]
struct Part {
    states: Option<Box<[u8; PART as usize]>>,
}

impl Part {
    /// The states of `range`, whose numbers lie in this part.
    fn states(&mut self, range: &Range<u64>) -> &mut [u8] {
        let states = self.states.get_or_insert_with(|| Box::new([0; PART as usize]));
        let from = (range.start % PART) as usize;
        &mut states[from..from + (range.end - range.start) as usize]
    }
}

/// What a lease holds. Any number of threads may use it at once.
#[derive(Debug)]
pub(super) struct Store {
    mapping: Mapping,
    layout: Layout,
    usage: Usage,
    parts: Box<[Mutex<Part>]>,
    /// The lease is over.
    over: AtomicBool,
    /// Pages that were sent and taken in, for what counts them.
    pub(super) fetched: AtomicU64,
    pub(super) stored: AtomicU64,
}

/// An answer with pages of the store, until it is sent.
struct Fetching {
    store: Arc<Store>,
    range: Range<u64>,
}

impl AsRef<Mapping> for Fetching {
    fn as_ref(&self) -> &Mapping {
        &self.store.mapping
    }
}

impl Drop for Fetching {
    fn drop(&mut self) {
        self.store.sent(&self.range);
    }
}

/// `range` cut at the borders of parts.
fn by_part(range: &Range<u64>) -> impl Iterator<Item = Range<u64>> + use<> {
    let (mut at, end) = (range.start, range.end);
    std::iter::from_fn(move || {
        let next = (at / PART + 1).saturating_mul(PART).min(end);
        let part = at..next;
        at = next;
        (!part.is_empty()).then_some(part)
    })
}

/// The bits of `range` in the word in which it begins, and where the next word begins.
fn in_word(range: &Range<u64>) -> (usize, u64, u64) {
    let next = ((range.start / 64 + 1) * 64).min(range.end);
    let mask = (u64::MAX >> (64 - (next - range.start))) << (range.start % 64);
    ((range.start / 64) as usize, mask, next)
}

impl Store {
    /// An empty store.
    ///
    /// # Errors
    /// No memory is left, or it may not be locked.
    pub(super) fn create(record: &Record, quota: u64, locked: bool) -> io::Result<Self> {
        let mapping = record::create(record, quota)?;
        Self::new(mapping, Layout { pages: record.pages }, Usage::new(0, quota), locked)
    }

    fn new(mapping: Mapping, layout: Layout, usage: Usage, locked: bool) -> io::Result<Self> {
        if locked {
            mapping.lock()?;
        }
        let parts = (0..layout.pages.div_ceil(PART)).map(|_| Mutex::default()).collect();
        let (over, fetched, stored) = Default::default();
        Ok(Self { mapping, layout, usage, parts, over, fetched, stored })
    }

    /// The store in a file of an earlier process, with what its bits say. `None`: its lease had ended.
    ///
    /// # Errors
    /// The file is none of a store, or may not be locked.
    pub(super) fn adopt(mapping: Mapping, locked: bool) -> io::Result<Option<(Record, Self)>> {
        let record = record::read(&mapping)?;
        let layout = Layout { pages: record.pages };
        let head = Head::of(&mapping, layout);
        if head.is_over() {
            return Ok(None);
        }
        let bits = mapping.words(layout.bits(), layout.words());
        let used: u64 = bits.iter().map(|word| u64::from(word.load(Ordering::Acquire).count_ones())).sum();
        // The quota was at least this when they were stored.
        let quota = head.quota().max(used).min(record.pages).min(super::usage::MOST);
        let store = Self::new(mapping, layout, Usage::new(used, quota), locked)?;
        store.take_over(locked)?;
        Ok(Some((record, store)))
    }

    /// Knows again what the bits say, and gives back what else the file holds: pages that were being stored or
    /// forgotten when the process ended. `locked`: what is held is locked from here on.
    fn take_over(&self, locked: bool) -> io::Result<()> {
        let counted = self.usage.used() * PAGE + self.layout.len() - self.layout.bits();
        let leaks = self.mapping.taken()? > counted;
        for range in by_part(&(0..self.layout.pages)) {
            let mut part = lock(&self.parts[(range.start / PART) as usize]);
            let mut unheld = range.start;
            for page in range.clone().filter(|page| self.is_set(*page)) {
                part.states(&(page..page + 1))[0] = COUNTED | HELD;
                if leaks && unheld < page {
                    self.punch(&(unheld..page))?;
                }
                unheld = page + 1;
            }
            if leaks && unheld < range.end {
                self.punch(&(unheld..range.end))?;
            }
            if let Some(states) = part.states.as_deref().filter(|_| locked) {
                self.settle_held(range.start, states);
            }
        }
        Ok(())
    }

    /// Enters the pages that are held into the page tables: `states` are those of a part that begins at `start`.
    fn settle_held(&self, start: u64, states: &[u8]) {
        let mut at = start;
        for run in states.chunk_by(|a, b| a & HELD == b & HELD) {
            let len = run.len() as u64;
            if run[0] & HELD != 0 {
                self.mapping.settle(at * PAGE, len * PAGE);
            }
            at += len;
        }
    }

    /// The file, for who is to keep it.
    pub(super) fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    /// Pages of the guest's RAM.
    pub(super) fn pages(&self) -> u64 {
        self.layout.pages
    }

    /// Pages that are stored.
    pub(super) fn used(&self) -> u64 {
        self.usage.used()
    }

    /// Pages that may be.
    pub(super) fn quota(&self) -> u64 {
        self.usage.quota()
    }

    /// Changes that.
    ///
    /// # Errors
    /// So many are stored already.
    pub(super) fn resize(&self, quota: u64) -> Result<(), u64> {
        self.usage.resize(quota)?;
        Head::of(&self.mapping, self.layout).set_quota(quota);
        Ok(())
    }

    /// The content of pages that are all held, for an answer.
    ///
    /// # Errors
    /// One is not.
    pub(super) fn fetch(self: &Arc<Self>, first: u64, count: u32) -> Result<Buffer, Refused> {
        let range = self.range(first, count)?;
        for part in by_part(&range) {
            let begun = self.begin_fetch(&part);
            if let Err(refused) = begun {
                self.sent(&(range.start..part.start));
                return Err(refused);
            }
        }
        self.fetched.fetch_add(count.into(), Ordering::Relaxed);
        let (offset, len) = (range.start * PAGE, u64::from(count) * PAGE);
        Ok(Mapping::buffer(Arc::new(Fetching { store: Arc::clone(self), range }), offset, len))
    }

    fn begin_fetch(&self, range: &Range<u64>) -> Result<(), Refused> {
        let mut part = lock(&self.parts[(range.start / PART) as usize]);
        self.lives()?;
        if part.states.is_none() {
            return Err(Refused::Absent(range.start));
        }
        let states = part.states(range);
        if let Some(at) = states.iter().position(|state| state & HELD == 0) {
            return Err(Refused::Absent(range.start + at as u64));
        }
        if states.iter().any(|state| state & FETCHES == FETCHES) {
            return Err(Refused::Busy("a page is being sent as often as it can be"));
        }
        states.iter_mut().for_each(|state| *state += FETCH);
        Ok(())
    }

    /// An answer with `range` is out.
    fn sent(&self, range: &Range<u64>) {
        for range in by_part(range) {
            let mut part = lock(&self.parts[(range.start / PART) as usize]);
            let states = part.states(&range);
            states.iter_mut().for_each(|state| *state -= FETCH);
            self.give_back(&range, states);
        }
    }

    /// Keeps `content` in place of what was there.
    ///
    /// # Errors
    /// The quota is used up, and then nothing has changed; or no memory is left, and then none of the pages is held
    /// any more.
    pub(super) fn store(&self, first: u64, content: &Buffer) -> Result<(), Refused> {
        let count = u32::try_from(content.len() as u64 / PAGE).unwrap_or(u32::MAX);
        let range = self.range(first, count)?;
        if content.len() as u64 != u64::from(count) * PAGE {
            return Err(self.outside());
        }
        self.begin_store(&range)?;
        let written = self.mapping.write(range.start * PAGE, content);
        if written.is_ok() {
            self.mapping.settle(range.start * PAGE, u64::from(count) * PAGE);
            self.set_bits(&range);
        }
        for range in by_part(&range) {
            let mut part = lock(&self.parts[(range.start / PART) as usize]);
            let held = written.is_ok() && self.lives().is_ok();
            let states = part.states(&range);
            for state in &mut *states {
                *state = *state & !(STORING | HELD) | if held { HELD } else { 0 };
            }
            if !held {
                self.clear_bits(&range);
                self.give_back(&range, states);
            }
        }
        written.map_err(|error| Refused::failed("the pages cannot be stored", &error))?;
        self.lives()?;
        self.stored.fetch_add(count.into(), Ordering::Relaxed);
        Ok(())
    }

    /// Counts the pages that are not yet, all or none.
    fn begin_store(&self, range: &Range<u64>) -> Result<(), Refused> {
        // Which pages were counted here: a request has at most 256.
        let mut fresh = [false; MAX_PAGES as usize];
        let mut done = range.start;
        let mut refused = None;
        for part_range in by_part(range) {
            let mut part = lock(&self.parts[(part_range.start / PART) as usize]);
            if part.states.is_none()
                && let Err(error) = record::reserve_bits(&self.mapping, self.layout, &part_range)
            {
                refused = Some(Refused::failed("no memory is left to note what is stored", &error));
                break;
            }
            let states = part.states(&part_range);
            let new = states.iter().filter(|state| **state & COUNTED == 0).count() as u64;
            refused = self.lives().err();
            if refused.is_none() && states.iter().any(|state| state & STORING != 0) {
                refused = Some(Refused::Busy("a page is being stored by another request"));
            }
            if refused.is_none() && !self.usage.add(new) {
                refused = Some(self.full());
            }
            if refused.is_some() {
                break;
            }
            let fresh = &mut fresh[(part_range.start - range.start) as usize..];
            for (state, fresh) in states.iter_mut().zip(fresh) {
                *fresh = *state & COUNTED == 0;
                *state |= COUNTED | STORING;
            }
            done = part_range.end;
        }
        let Some(refused) = refused else { return Ok(()) };
        for part_range in by_part(&(range.start..done)) {
            let mut part = lock(&self.parts[(part_range.start / PART) as usize]);
            let fresh = &fresh[(part_range.start - range.start) as usize..];
            let mut new = 0;
            for (state, fresh) in part.states(&part_range).iter_mut().zip(fresh) {
                *state &= if *fresh { !(COUNTED | STORING) } else { !STORING };
                new += u64::from(*fresh);
            }
            self.usage.sub(new);
        }
        Err(refused)
    }

    fn full(&self) -> Refused {
        Refused::Full(format!("the lease holds {} pages already, of {}", self.used(), self.quota()))
    }

    /// Gives pages up. One that is being stored by another request stays.
    ///
    /// # Errors
    /// They are not all of the guest's RAM, or more in all than it has.
    pub(super) fn forget(&self, ranges: &[Range<u64>]) -> Result<(), Refused> {
        let fits = |range: &Range<u64>| range.start < range.end && range.end <= self.layout.pages;
        let all =
            ranges.iter().try_fold(0u64, |all, range| all.checked_add(range.end.checked_sub(range.start)?));
        if !ranges.iter().all(fits) || all.is_none_or(|all| all > self.layout.pages) {
            return Err(self.outside());
        }
        self.lives()?;
        ranges.iter().for_each(|range| self.drop_pages(range));
        Ok(())
    }

    fn drop_pages(&self, range: &Range<u64>) {
        for range in by_part(range) {
            let mut part = lock(&self.parts[(range.start / PART) as usize]);
            if part.states.is_none() {
                continue;
            }
            let states = part.states(&range);
            for (page, state) in range.clone().zip(&mut *states) {
                if *state & (HELD | STORING) == HELD {
                    self.clear_bits(&(page..page + 1));
                    *state &= !HELD;
                }
            }
            self.give_back(&range, states);
        }
    }

    /// Ends the lease in the file and for every request.
    pub(super) fn end(&self) {
        self.over.store(true, Ordering::SeqCst);
        Head::of(&self.mapping, self.layout).end();
    }

    /// Gives all pages back after the end, but those that are on their way out: they follow when they are sent.
    pub(super) fn clear(&self) {
        self.drop_pages(&(0..self.layout.pages));
    }

    /// Whether the lease has not ended.
    pub(super) fn lives(&self) -> Result<(), Refused> {
        if self.over.load(Ordering::SeqCst) {
            return Err(Refused::Gone("the lease is over; what was stored under it is gone".to_owned()));
        }
        Ok(())
    }

    /// Gives back the memory of those pages that nobody needs. `states` are theirs, under their lock.
    fn give_back(&self, range: &Range<u64>, states: &mut [u8]) {
        let mut at = 0;
        while let Some(from) = states[at..].iter().position(|state| *state == COUNTED) {
            let from = at + from;
            let len = states[from..].iter().take_while(|state| **state == COUNTED).count();
            at = from + len;
            let pages = range.start + from as u64..range.start + at as u64;
            match self.punch(&pages) {
                Ok(()) => {
                    states[from..at].fill(0);
                    self.usage.sub(len as u64);
                }
                // They stay counted, and their content is nobody's.
                Err(error) => tracing::error!(%error, "Memory of a guest cannot be given back"),
            }
        }
    }

    fn punch(&self, pages: &Range<u64>) -> io::Result<()> {
        self.mapping.punch(pages.start * PAGE, (pages.end - pages.start) * PAGE)
    }

    fn range(&self, first: u64, count: u32) -> Result<Range<u64>, Refused> {
        let end = first.checked_add(count.into()).filter(|end| *end <= self.layout.pages);
        match end {
            Some(end) if (1..=MAX_PAGES).contains(&count) => Ok(first..end),
            _ => Err(self.outside()),
        }
    }

    fn outside(&self) -> Refused {
        Refused::OutOfRange(format!("the lease is of {} pages of RAM", self.layout.pages))
    }

    fn bits(&self) -> &[AtomicU64] {
        self.mapping.words(self.layout.bits(), self.layout.words())
    }

    fn is_set(&self, page: u64) -> bool {
        self.bits()[(page / 64) as usize].load(Ordering::Acquire) & 1 << (page % 64) != 0
    }

    fn set_bits(&self, range: &Range<u64>) {
        let mut range = range.clone();
        while !range.is_empty() {
            let (word, mask, next) = in_word(&range);
            self.bits()[word].fetch_or(mask, Ordering::AcqRel);
            range.start = next;
        }
    }

    fn clear_bits(&self, range: &Range<u64>) {
        let mut range = range.clone();
        while !range.is_empty() {
            let (word, mask, next) = in_word(&range);
            self.bits()[word].fetch_and(!mask, Ordering::AcqRel);
            range.start = next;
        }
    }
}

#[cfg(test)]
#[path = "store_test.rs"]
mod store_test;
