//! A source in memory, for tests of the fault engine.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use transport::buffer::Buffer;
use transport::ring::{Completion, Ring};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{Done, Source, Urgency};
use crate::memory::fault::{PAGE, Page};

/// What was asked of an [`InMemory`] and has no answer yet.
#[derive(Debug)]
pub(crate) enum Asked {
    Fetch { first: Page, count: u32, urgency: Urgency },
    Store { first: Page, content: Buffer },
}

/// When an [`InMemory`] answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pace {
    /// At the next tick.
    AtOnce,
    /// Out of order, in parts, and now and then a few ticks late; by dice with this seed.
    Shuffled(u64),
    /// Not until told.
    Held,
}

/// What a test sees of an [`InMemory`] and changes in it while it runs.
pub(crate) struct State {
    pub(crate) pages: BTreeMap<u64, Vec<u8>>,
    pub(crate) asked: Vec<Asked>,
    pub(crate) pace: Pace,
    /// Fetches are answered so from now on, if set.
    pub(crate) lost: Option<String>,
    pub(crate) fetched: u64,
    pub(crate) stored: u64,
    /// Promises of [`Source`] that its user broke.
    pub(crate) broken: Vec<String>,
}

/// A test's hold on an [`InMemory`].
#[derive(Clone)]
pub(crate) struct Handle {
    state: Arc<Mutex<State>>,
    bell: Arc<EventFd>,
}

impl Handle {
    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets the pace and has the source look at it.
    pub(crate) fn pace(&self, pace: Pace) {
        self.lock().pace = pace;
        self.ring();
    }

    /// Has the source's thread look again.
    pub(crate) fn ring(&self) {
        self.bell.write(1).expect("an eventfd counts far");
    }
}

/// Holds pages in a map.
pub(crate) struct InMemory {
    handle: Handle,
    source: Option<transport::ring::Source>,
    armed: bool,
}

impl InMemory {
    pub(crate) fn new(pace: Pace) -> (Self, Handle) {
        let (pages, asked, broken) = (BTreeMap::new(), Vec::new(), Vec::new());
        let state = State { pages, asked, pace, lost: None, fetched: 0, stored: 0, broken };
        let bell = Arc::new(EventFd::new(EFD_NONBLOCK).expect("an eventfd"));
        let handle = Handle { state: Arc::new(Mutex::new(state)), bell };
        (Self { handle: handle.clone(), source: None, armed: false }, handle)
    }
}

impl State {
    fn check(&mut self, what: &str, first: Page, count: u32, held: bool) {
        let pages = first.0..first.0 + u64::from(count);
        for page in pages.clone() {
            if held && !self.pages.contains_key(&page) {
                self.broken.push(format!("{what} of page {page}, which is not stored"));
            }
        }
        for asked in &self.asked {
            let (kind, other, len) = match asked {
                Asked::Fetch { first, count, .. } => ("fetch", first.0, u64::from(*count)),
                Asked::Store { first, content } => ("store", first.0, (content.len() / PAGE) as u64),
            };
            if other < pages.end && pages.start < other + len {
                self.broken.push(format!("{what} of {pages:?} during a {kind} of {other}+{len}"));
            }
        }
    }

    fn answer(&mut self, asked: Asked, done: &mut Vec<Done>) {
        match asked {
            Asked::Fetch { first, count, .. } => {
                if let Some(why) = self.lost.clone() {
                    done.push(Done::Lost { first, count, why });
                    return;
                }
                let mut content = Vec::with_capacity(count as usize * PAGE);
                for page in first.0..first.0 + u64::from(count) {
                    match self.pages.get(&page) {
                        Some(bytes) => content.extend_from_slice(bytes),
                        // `broken` says so already; nobody should take it for the page.
                        None => content.resize(content.len() + PAGE, 0xee),
                    }
                }
                self.fetched += u64::from(count);
                done.push(Done::Fetched { first, count, content: Buffer::from_vec(content) });
            }
            Asked::Store { first, content } => {
                let bytes = content.to_vec();
                let count = (bytes.len() / PAGE) as u32;
                for (page, bytes) in (first.0..).zip(bytes.chunks(PAGE)) {
                    self.pages.insert(page, bytes.to_vec());
                }
                self.stored += u64::from(count);
                done.push(Done::Stored { first, count });
            }
        }
    }

    /// Answers by dice; `true` if something is left to answer later.
    fn shuffled(&mut self, mut seed: u64, done: &mut Vec<Done>) -> bool {
        let mut roll = |of: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) % of
        };
        for _ in 0..self.asked.len() {
            let at = roll(self.asked.len() as u64) as usize;
            match self.asked.swap_remove(at) {
                later if roll(4) == 0 => self.asked.push(later),
                Asked::Fetch { first, count, urgency } if count > 1 && roll(2) == 0 => {
                    let part = 1 + roll(u64::from(count) - 1) as u32;
                    let (rest, count) = (first.plus(part.into()), count - part);
                    self.asked.push(Asked::Fetch { first: rest, count, urgency });
                    self.answer(Asked::Fetch { first, count: part, urgency }, done);
                }
                now => self.answer(now, done),
            }
        }
        self.pace = Pace::Shuffled(seed);
        !self.asked.is_empty()
    }
}

impl Source for InMemory {
    fn attach(&mut self, ring: &mut Ring) -> io::Result<()> {
        self.source = Some(ring.source());
        Ok(())
    }

    fn fetch(&mut self, first: Page, count: u32, urgency: Urgency) {
        let mut state = self.handle.lock();
        state.check("a fetch", first, count, true);
        state.asked.push(Asked::Fetch { first, count, urgency });
    }

    fn store(&mut self, first: Page, content: Buffer) {
        let mut state = self.handle.lock();
        if content.is_empty() || !content.len().is_multiple_of(PAGE) {
            state.broken.push(format!("a store of {} bytes", content.len()));
        }
        state.check("a store", first, (content.len() / PAGE) as u32, false);
        state.asked.push(Asked::Store { first, content });
    }

    fn forget(&mut self, first: Page, count: u32) {
        let mut state = self.handle.lock();
        state.check("a forget", first, count, false);
        (first.0..first.0 + u64::from(count)).for_each(|page| drop(state.pages.remove(&page)));
    }

    fn complete(&mut self, _ring: &mut Ring, completion: Completion, _done: &mut Vec<Done>) -> bool {
        if self.source != Some(completion.token.source()) {
            return false;
        }
        let _ = self.handle.bell.read();
        self.armed = false;
        true
    }

    fn tick(&mut self, ring: &mut Ring, now: Instant, done: &mut Vec<Done>) -> Option<Instant> {
        use std::os::fd::AsRawFd;
        if let Some(source) = self.source
            && !std::mem::replace(&mut self.armed, true)
        {
            ring.poll_readable(self.handle.bell.as_raw_fd(), false, source.token(0));
        }
        let mut state = self.handle.lock();
        match state.pace {
            Pace::Held => None,
            Pace::AtOnce => {
                for asked in std::mem::take(&mut state.asked) {
                    state.answer(asked, done);
                }
                None
            }
            Pace::Shuffled(seed) => state.shuffled(seed, done).then_some(now),
        }
    }

    fn close(&mut self, _ring: &mut Ring) {
        self.handle.lock().pages.clear();
    }
}
