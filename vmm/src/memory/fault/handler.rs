//! A handler of page faults: one thread with a userfaultfd, a ring, a source, and a share of the guest's pages, which
//! nobody else knows anything of.
//!
//! It never touches the guest's mapping, never waits for anything but its ring, and what becomes of a page is decided
//! in [`pages`](super::pages).

use std::io;
use std::ops::{ControlFlow, Range};
use std::os::fd::AsRawFd;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use transport::buffer::Buffer;
use transport::ring::{Ring, Source as RingSource};

use super::ageing::{Ageing, Arrival};
use super::counters::Tally;
use super::ledger::{Ledger, Runs};
use super::mailbox::{Mailbox, Message};
use super::pages::{Action, Event, Order, Place, Step};
use super::streams::Streams;
use super::{PAGE, Page, Shards};
use crate::memory::frames::Fault;
use crate::memory::frames::Frames;
use crate::memory::store::{Done, Source, Urgency};

/// What a handler is given.
pub(super) struct Post {
    pub(super) shard: u32,
    pub(super) shards: Shards,
    pub(super) frames: Frames,
    pub(super) source: Box<dyn Source>,
    pub(super) mailbox: Arc<Mailbox>,
    pub(super) tally: Arc<Tally>,
    /// How many pages may be in memory.
    pub(super) limit: u64,
}

/// Operations that the ring takes at once.
const ENTRIES: u32 = 256;

/// While somebody waits for memory, pages to give up are looked for so often.
const SEARCH_EVERY: Duration = Duration::from_millis(1);

/// What completes on the ring besides what the source waits for.
const FAULTS: u64 = 0;
const MAIL: u64 = 1;

/// A thread that stands still for the network.
struct Waiting {
    index: usize,
    since: Instant,
}

/// See the [module](self).
pub(super) struct Handler {
    ring: Ring,
    own: RingSource,
    mailbox: Arc<Mailbox>,
    pub(super) source: Box<dyn Source>,
    pub(super) ledger: Ledger,
    pub(super) frames: Frames,
    pub(super) tally: Arc<Tally>,
    /// How many pages may be in memory.
    pub(super) limit: u64,
    pub(super) ageing: Ageing,
    pub(super) streams: Streams,
    /// Pages to give up.
    pub(super) victims: Vec<usize>,
    /// Rounds in which no page was found to give up, since something happened.
    pub(super) in_vain: u32,
    /// Where the search for copies begins that the source may forget, and how many rounds found none.
    pub(super) reclaim_at: usize,
    pub(super) reclaimed_none: u32,
    /// Pages fetched ahead that are to wait for their fault once they are here.
    to_park: Vec<usize>,
    /// The page of an answer that is not mapped when it is installed, so that it will show whether it was used.
    watched: Option<usize>,
    /// Pages that do.
    parked: Vec<(usize, Buffer)>,
    /// Something was asked of the source that its next tick should send.
    pub(super) asked: bool,
    /// There are more pages to give up.
    pub(super) unfinished: bool,
    /// There are faults to read.
    readable: bool,
    /// There is mail to take.
    mail: bool,
    now: Instant,
    // Kept for their memory: nothing is allocated for a fault.
    faults: Vec<Fault>,
    done: Vec<Done>,
    waiting: Vec<Waiting>,
    /// Faults for which there is no memory yet: page, and whether to write.
    starved: Vec<(usize, bool)>,
    /// After this page that was never touched, the next one is likely to be touched too: so many at once.
    zeros: (usize, usize),
}

/// At most so many pages wait for their fault.
const PARKED: usize = 64;

/// So many pages at most are fetched ahead in one request: the first of them should not wait for the last.
const AHEAD_AT_ONCE: u64 = 64;

/// At most so many pages of zeros are installed at once.
const ZEROS_AT_ONCE: usize = 16;

impl Handler {
    /// A handler for the thread that calls this.
    pub(super) fn new(post: Post) -> io::Result<Self> {
        let Post { shard, shards, frames, mut source, mailbox, tally, limit } = post;
        let mut ring = Ring::new(ENTRIES)?;
        source.attach(&mut ring)?;
        let own = ring.source();
        let ledger = Ledger::new(shards, shard);
        let ageing = Ageing::new(ledger.len());
        let streams = Streams::new(ledger.len(), shards.pieces().each());
        tally.pages.set(ledger.len() as u64);
        tally.limit.set(limit);
        let mut handler = Self {
            ring,
            own,
            mailbox,
            source,
            ledger,
            frames,
            tally,
            limit,
            ageing,
            streams,
            victims: Vec::with_capacity(256),
            in_vain: 0,
            reclaim_at: 0,
            reclaimed_none: 0,
            to_park: Vec::with_capacity(PARKED),
            watched: None,
            parked: Vec::with_capacity(PARKED),
            asked: false,
            unfinished: false,
            readable: true,
            mail: true,
            now: Instant::now(),
            faults: Vec::with_capacity(64),
            done: Vec::with_capacity(64),
            waiting: Vec::with_capacity(64),
            starved: Vec::with_capacity(64),
            zeros: (0, 1),
        };
        handler.poll(FAULTS);
        handler.poll(MAIL);
        Ok(handler)
    }

    fn poll(&mut self, what: u64) {
        let descriptor = if what == FAULTS { self.frames.as_raw_fd() } else { self.mailbox.as_raw_fd() };
        self.ring.poll_readable(descriptor, true, self.own.token(what));
    }

    /// Handles faults until it is told to stop.
    ///
    /// # Errors
    /// The kernel refuses what the guest's life depends on, or the source breaks its promises.
    pub(super) fn run(&mut self) -> io::Result<()> {
        loop {
            self.read_faults()?;
            if self.mail && self.read_mail()?.is_break() {
                break;
            }
            let mut due = self.tick()?;
            self.make_room()?;
            self.reclaim()?;
            if self.asked {
                due = self.tick()?;
            }
            self.ledger.census().show(&self.tally);
            let accuracy = self.streams.accuracy();
            self.tally.ahead_used.set(accuracy.used);
            self.tally.ahead_unused.set(accuracy.unused);
            self.wait(due)?;
        }
        self.mailbox.close();
        self.source.close(&mut self.ring);
        self.ring.submit()
    }

    /// Sends what was asked of the source and takes what it has.
    fn tick(&mut self) -> io::Result<Option<Instant>> {
        self.asked = false;
        self.now = Instant::now();
        let due = self.source.tick(&mut self.ring, self.now, &mut self.done);
        self.finish()?;
        Ok(due)
    }

    /// Waits for whatever comes first.
    fn wait(&mut self, due: Option<Instant>) -> io::Result<()> {
        let at_once = self.asked || self.readable || self.mail || self.unfinished;
        let mut timeout = due.map(|due| due.saturating_duration_since(Instant::now()));
        if at_once {
            timeout = Some(Duration::ZERO);
        } else if self.starves() {
            timeout = Some(timeout.map_or(SEARCH_EVERY, |timeout| timeout.min(SEARCH_EVERY)));
        }
        self.ring.wait(timeout)?;
        while let Some(completion) = self.ring.reap() {
            (self.in_vain, self.reclaimed_none) = (0, 0);
            if completion.token.source() != self.own {
                self.source.complete(&mut self.ring, completion, &mut self.done);
                continue;
            }
            let what = completion.token.payload();
            if what == FAULTS {
                self.readable = true;
            } else {
                self.mail = true;
            }
            if !completion.more() {
                completion.count()?;
                self.poll(what);
            }
        }
        if self.done.is_empty() { Ok(()) } else { self.finish() }
    }

    fn read_faults(&mut self) -> io::Result<()> {
        while self.readable {
            let mut faults = std::mem::take(&mut self.faults);
            self.readable = self.frames.faults(&mut faults)?;
            self.now = Instant::now();
            for fault in faults.drain(..) {
                let page = self.frames.page(fault.address);
                let index = page.and_then(|page| self.ledger.index(page));
                let index = index.ok_or_else(|| io::Error::other("a fault came from somewhere else"))?;
                self.fault(index, fault.write || fault.protected, fault.thread)?;
            }
            self.faults = faults;
        }
        Ok(())
    }

    /// Whether somebody waits for memory.
    pub(super) fn starves(&self) -> bool {
        !self.starved.is_empty()
    }

    /// How many pages more may be in memory.
    pub(super) fn free(&self) -> u64 {
        self.limit.saturating_sub(self.ledger.census().here())
    }

    /// What follows from `event` happening to the page at `index`.
    pub(super) fn happen(&mut self, index: usize, event: Event) -> Step {
        let before = self.ledger.state(index);
        let step = self.ledger.apply(index, event);
        let holds = |place: Place| place.resident() || place == Place::Parked;
        match (holds(before.place()), holds(step.state.place())) {
            (false, true) => {
                let arrival = match before.place() {
                    Place::Fetching if before.awaited() => Arrival::Fault,
                    Place::Fetching if step.state.place() == Place::Parked || self.watched == Some(index) => {
                        Arrival::Watched
                    }
                    Place::Fetching => Arrival::Ahead,
                    _ => Arrival::Fault,
                };
                self.ageing.installed(index, arrival);
            }
            (true, false) => self.ageing.gone(index),
            (true, true) if matches!(event, Event::Fault { .. }) => self.ageing.accessed(index),
            _ => {}
        }
        step
    }

    /// `thread` stands still for the page at `index`.
    fn fault(&mut self, index: usize, write: bool, thread: u32) -> io::Result<()> {
        let before = self.ledger.state(index);
        if matches!(before.place(), Place::Zero | Place::Remote) && self.free() == 0 && !self.drop_one()? {
            self.tally.faults_that_waited_for_write.add(1);
            self.starved.push((index, write));
            return Ok(());
        }
        let page = self.ledger.page(index);
        let step = self.happen(index, Event::Fault { write });
        match step.action {
            Action::Zero { protected } => {
                self.tally.zero_faults.add(1);
                let count = if protected { 1 } else { self.more_zeros(index) };
                return self.frames.zero(page, count, protected);
            }
            Action::Unprotect => {
                self.tally.write_faults.add(1);
                return self.frames.unprotect(page, 1);
            }
            Action::Wake => {
                self.tally.stale_faults.add(1);
                return self.frames.wake(page, 1);
            }
            Action::Unpark { protected } => {
                self.tally.parked_faults.add(1);
                self.unpark(index, protected)?;
            }
            _ => {}
        }
        if before.place() == Place::Fetching && !before.awaited() {
            self.tally.late_faults.add(1);
            self.waiting.push(Waiting { index, since: self.now });
        }
        if step.order == Order::Fetch {
            self.tally.remote_faults.add(1);
            self.tally.fetched.add(1);
            self.waiting.push(Waiting { index, since: self.now });
            self.source.fetch(page, 1, Urgency::Fault);
            self.asked = true;
        }
        if before.place() != Place::Lost {
            self.fetch_ahead(index, thread, step.order == Order::Fetch);
        }
        Ok(())
    }

    /// After a fault at `index`, fetches what will probably be needed next. `missed`: nobody had asked for the page.
    fn fetch_ahead(&mut self, index: usize, thread: u32, missed: bool) {
        // The next faults find some memory free in any case.
        let room = u32::try_from(self.free().saturating_sub(self.reserve() / 4)).unwrap_or(u32::MAX);
        let ledger = &self.ledger;
        let away = |other| if other == index { missed } else { ledger.state(other).place() == Place::Remote };
        let ahead = self.streams.fault(index, thread, room, away);
        for run in ahead.iter() {
            let first = self.ledger.page(run.first);
            for index in run.first..run.first + run.count as usize {
                self.happen(index, Event::Ahead);
            }
            for at in (0..u64::from(run.count)).step_by(AHEAD_AT_ONCE as usize) {
                let count = AHEAD_AT_ONCE.min(u64::from(run.count) - at) as u32;
                self.source.fetch(first.plus(at), count, Urgency::Ahead);
            }
            self.tally.fetched_ahead.add(run.count.into());
            self.asked = true;
        }
        // Of pages that come in time nobody would ever hear, and the stream would stop where they end. So the first
        // one is to tell.
        if let Some(run) = ahead.first()
            && self.to_park.len() + self.parked.len() < PARKED
        {
            let backwards = run.first < index;
            self.to_park.push(if backwards { run.first + run.count as usize - 1 } else { run.first });
        }
    }

    /// Installs a page that was fetched ahead and is wanted now.
    fn unpark(&mut self, index: usize, protected: bool) -> io::Result<()> {
        let content = self.unkeep(index).ok_or_else(|| io::Error::other("a parked page is gone"))?;
        self.frames.install(self.ledger.page(index), 1, &content, protected)
    }

    /// Takes back the content of a page that was parked.
    pub(super) fn unkeep(&mut self, index: usize) -> Option<Buffer> {
        let at = self.parked.iter().position(|(parked, _)| *parked == index)?;
        Some(self.parked.swap_remove(at).1)
    }

    /// How many pages of zeros to install at `index`, which is dirty already: several where they are written to one
    /// after the other, as long as that costs no other page its place.
    fn more_zeros(&mut self, index: usize) -> u64 {
        let (next, window) = self.zeros;
        let window = if index == next { (window * 2).min(ZEROS_AT_ONCE) } else { 1 };
        let spare = usize::try_from(self.free() / 4).unwrap_or(usize::MAX);
        let most = self.ledger.run(index, window.min(spare.max(1)));
        let mut count = 1;
        while count < most && self.ledger.state(index + count).untouched() {
            self.happen(index + count, Event::Fault { write: true });
            count += 1;
        }
        self.zeros = (index + count, window);
        count as u64
    }

    /// Does what follows from what the source has finished.
    fn finish(&mut self) -> io::Result<()> {
        let mut done = std::mem::take(&mut self.done);
        for done in done.drain(..) {
            match done {
                Done::Fetched { first, count, content } => self.fetched(first, count, &content)?,
                Done::Stored { first, count } => self.stored(first, count)?,
                Done::Lost { first, count, why } => self.lost(first, count, why)?,
            }
        }
        self.done = done;
        self.feed_starved()
    }

    fn indices(&self, first: Page, count: u32) -> io::Result<Range<usize>> {
        let foreign = || io::Error::other(format!("the source speaks of {count} pages from {first:?} on"));
        self.ledger.indices(first, count).ok_or_else(foreign)
    }

    fn fetched(&mut self, first: Page, count: u32, content: &Buffer) -> io::Result<()> {
        if content.len() != count as usize * PAGE {
            return Err(io::Error::other("the source brought parts of pages"));
        }
        let mut runs = Runs::new();
        let indices = self.indices(first, count)?;
        self.watched =
            indices.clone().next_back().filter(|last| count > 1 && self.ledger.state(*last).ahead());
        for index in indices {
            let page = self.ledger.page(index);
            let park = self.to_park.iter().position(|other| *other == index);
            let park = park.map(|at| self.to_park.swap_remove(at)).is_some();
            let step = self.happen(index, Event::Fetched { park });
            if step.action == Action::Park {
                let skip = (page.0 - first.0) as usize * PAGE;
                let part = content.slice(skip, PAGE).ok_or(io::ErrorKind::InvalidData)?;
                // A copy, so that one page does not keep the memory of many.
                self.parked.push((index, Buffer::from_vec(part.to_vec())));
            }
            if step.order == Order::Forget {
                self.forget(page, 1);
            }
            if let Some(run) = runs.add(page, step.action) {
                self.install(first, content, run)?;
            }
            if !self.waiting.is_empty() {
                self.arrived(index);
            }
        }
        if let Some(run) = runs.end() {
            self.install(first, content, run)?;
        }
        if let Some(index) = self.watched.take()
            && self.ledger.state(index).place().resident()
        {
            self.frames.look(self.ledger.page(index), 1);
        }
        Ok(())
    }

    /// Installs a part of what was fetched.
    fn install(&self, first: Page, content: &Buffer, run: (Page, u64, Action)) -> io::Result<()> {
        let (page, count, action) = run;
        let Action::Install { protected } = action else { return Ok(()) };
        let skip = (page.0 - first.0) as usize * PAGE;
        let part = content.slice(skip, count as usize * PAGE).ok_or(io::ErrorKind::InvalidData)?;
        self.frames.install(page, count, &part, protected)
    }

    /// Nobody waits for the page at `index` any more.
    fn arrived(&mut self, index: usize) {
        let now = Instant::now();
        let tally = &self.tally;
        self.waiting.retain(|waiting| {
            let here = waiting.index == index;
            if here {
                tally.latency.note(now.saturating_duration_since(waiting.since));
            }
            !here
        });
    }

    fn stored(&mut self, first: Page, count: u32) -> io::Result<()> {
        let mut runs = Runs::new();
        for index in self.indices(first, count)? {
            let page = self.ledger.page(index);
            if self.happen(index, Event::Stored).order == Order::Forget
                && let Some((first, count, ())) = runs.add(page, ())
            {
                self.forget(first, count);
            }
        }
        if let Some((first, count, ())) = runs.end() {
            self.forget(first, count);
        }
        self.tally.stored.add(count.into());
        self.drop_stored(first, count)
    }

    fn lost(&mut self, first: Page, count: u32, why: String) -> io::Result<()> {
        let mut guest_ends = false;
        for index in self.indices(first, count)? {
            let step = self.happen(index, Event::Lost);
            guest_ends |= step.action == Action::Report;
            if let Action::Unpark { protected } = step.action {
                self.unpark(index, protected)?;
            }
        }
        if guest_ends {
            self.tally.lost_why.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(why);
        }
        Ok(())
    }

    pub(super) fn forget(&mut self, first: Page, count: u64) {
        self.source.forget(first, count as u32);
        self.asked = true;
    }

    /// Looks after faults that found no memory free, now that there may be some.
    fn feed_starved(&mut self) -> io::Result<()> {
        while !self.starved.is_empty() && (self.free() > 0 || self.drop_one()?) {
            let (index, write) = self.starved.swap_remove(0);
            self.fault(index, write, 0)?;
        }
        Ok(())
    }

    fn read_mail(&mut self) -> io::Result<ControlFlow<()>> {
        self.mail = false;
        for message in self.mailbox.take() {
            match message {
                Message::Stop => return Ok(ControlFlow::Break(())),
                // Whoever asked may have given up.
                Message::Discard(pages, tell) => drop(tell.send(self.discard(&pages)?)),
                Message::Clear(tell) => drop(tell.send(self.clear()?)),
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    fn clear(&mut self) -> io::Result<u64> {
        let (mut index, mut freed) = (0, 0);
        while index < self.ledger.len() {
            let count = self.ledger.run(index, self.ledger.len() - index);
            let first = self.ledger.page(index);
            freed += self.discard(&(first.0..first.0 + count as u64))?;
            index += count.max(1);
        }
        Ok(freed)
    }

    /// Makes pages of one piece zeros; returns how many took up memory.
    fn discard(&mut self, pages: &Range<u64>) -> io::Result<u64> {
        let (first, count) = (Page(pages.start), (pages.end - pages.start) as u32);
        let (mut punched, mut wake, mut freed) = (None, false, 0);
        let mut forgotten = Runs::new();
        for index in self.indices(first, count)? {
            let page = self.ledger.page(index);
            let step = self.happen(index, Event::Discard);
            match step.action {
                Action::Unkeep => drop(self.unkeep(index)),
                Action::Punch => {
                    freed += 1;
                    punched = Some((punched.map_or(page, |(first, _)| first), page));
                }
                Action::Wake => wake = true,
                _ => {}
            }
            if step.order == Order::Forget
                && let Some((first, count, ())) = forgotten.add(page, ())
            {
                self.forget(first, count);
            }
        }
        if let Some((first, count, ())) = forgotten.end() {
            self.forget(first, count);
        }
        // What lies between has nothing in memory.
        if let Some((first, last)) = punched {
            self.frames.punch(first, last.0 - first.0 + 1)?;
        }
        if wake {
            self.frames.wake(first, count.into())?;
            let range = self.indices(first, count)?;
            self.waiting.retain(|waiting| !range.contains(&waiting.index));
        }
        self.tally.discarded.add(freed);
        Ok(freed)
    }
}
