//! What the handler asks, and what the places answer.

use std::ops::Range;
use std::sync::atomic::Ordering;
use std::time::Instant;

use smallvec::SmallVec;
use transport::buffer::Buffer;

use super::ask::{Outcome, What};
use super::copies::{Good, Role};
use super::core::{AGAIN, Asked, Core, Flight, Kind, Op, tag};
use super::{Done, Urgency};
use crate::memory::fault::{PAGE, Page};

impl Core {
    /// Asks for pages.
    pub(super) fn fetch(&mut self, first: Page, count: u32, urgency: Urgency, now: Instant) {
        match self.locate(first, count) {
            Some((piece, pages)) => self.fetch_pages(piece, pages, urgency, "it was never stored", now),
            None => {
                let why = "it is not this handler's".to_owned();
                self.done.push(Done::Lost { first, count, why });
            }
        }
    }

    /// Asks for pages of a piece, of the best copies; tells which have none, and `why`.
    fn fetch_pages(&mut self, piece: usize, pages: Range<u32>, urgency: Urgency, why: &str, now: Instant) {
        let mut left = pages;
        while let Some((run, good)) = self.pieces[piece].run(left.clone()) {
            left.start = run.end;
            match good.and_then(|good| self.best(piece, good, &[])) {
                Some(place) => {
                    let (kind, flights) = (Kind::Fetch(urgency), SmallVec::new());
                    let op = self.ops.insert(Op { piece, pages: run, kind, flights, begun: now });
                    self.ask_fetch(op, place, urgency, now);
                }
                None => {
                    self.outdate(piece, &run);
                    let held = self.pieces[piece].forget(run.clone(), |_, _| {}).is_some();
                    self.release(piece, &run, &[], now);
                    let (first, count) = (self.page(piece, run.start), run.len() as u32);
                    if held {
                        self.say_lost(count.into(), why);
                    }
                    self.done.push(Done::Lost { first, count, why: why.to_owned() });
                }
            }
        }
    }

    pub(super) fn ask_fetch(&mut self, op: usize, place: usize, urgency: Urgency, now: Instant) {
        let Op { piece, pages, .. } = &self.ops[op];
        let (first, count) = (self.page(*piece, pages.start).0, pages.len() as u32);
        self.ask(place, Some(op), Asked::Fetch, What::Fetch { first, count, urgency }, now);
    }

    /// Who is to be read from: one that is here, no file, the fastest; none of `but`.
    pub(super) fn best(&self, piece: usize, good: Good, but: &[usize]) -> Option<usize> {
        let copies = self.pieces[piece].at.iter().filter(|copy| good.has(copy.slot));
        let places = copies.map(|copy| usize::from(copy.place)).filter(|place| !but.contains(place));
        places.min_by_key(|place| {
            let at = &self.places[*place];
            (!at.serving, at.file, at.latency)
        })
    }

    /// Keeps pages.
    pub(super) fn store(&mut self, first: Page, content: Buffer, now: Instant) {
        let count = u32::try_from(content.len() / PAGE).unwrap_or(u32::MAX);
        let Some((piece, pages)) = self.locate(first, count) else {
            let why = "it is not this handler's".to_owned();
            self.done.push(Done::Lost { first, count, why });
            return;
        };
        self.outdate(piece, &pages);
        let (copies, places) = (&mut self.pieces[piece], &self.places);
        let at = copies.at.clone();
        copies.begin_store(pages.clone(), self.shards.pieces().each(), |slot, less| {
            for copy in at.iter().filter(|copy| copy.slot == slot) {
                places[usize::from(copy.place)].counters.pages.fetch_sub(less, Ordering::Relaxed);
            }
        });
        let (kind, flights) = (Kind::Store(content), SmallVec::new());
        let op = self.ops.insert(Op { piece, pages, kind, flights, begun: now });
        self.send_store(op, now);
    }

    /// Sends a store to everybody who keeps the piece and has room, or finds somebody; or has it wait.
    pub(super) fn send_store(&mut self, op: usize, now: Instant) {
        let piece = self.ops[op].piece;
        if self.pieces[piece].members().next().is_none() {
            self.find_member(piece, now);
        }
        let pages = self.ops[op].pages.clone();
        match self.targets(op, now) {
            None if pages.len() > 1 => {
                self.split_store(op).into_iter().for_each(|op| self.send_store(op, now));
            }
            None => self.cramped.push(op),
            Some(targets) if targets.is_empty() => self.homeless.push(op),
            Some(targets) => {
                targets.iter().for_each(|place| self.help(piece, *place));
                self.release(piece, &pages, &targets, now);
                targets.into_iter().for_each(|place| self.ask_store(op, place, now));
            }
        }
    }

    /// Sends what a store, or a copying that has read, has to write.
    pub(super) fn ask_store(&mut self, op: usize, place: usize, now: Instant) {
        let Some(what) = self.to_write(op) else { return };
        let Op { piece, pages, .. } = &self.ops[op];
        self.take_room(*piece, pages.clone(), place);
        self.ask(place, Some(op), Asked::Store, what, now);
    }

    fn to_write(&self, op: usize) -> Option<What> {
        let Op { piece, pages, kind, .. } = &self.ops[op];
        let (Kind::Store(content) | Kind::Copy { content, .. }) = kind else { return None };
        let content = content.slice(0, content.len())?;
        Some(What::Store { first: self.page(*piece, pages.start).0, content })
    }

    /// Keeps pages no more.
    pub(super) fn forget(&mut self, first: Page, count: u32, now: Instant) {
        let Some((piece, pages)) = self.locate(first, count) else { return };
        self.outdate(piece, &pages);
        let (copies, places) = (&mut self.pieces[piece], &self.places);
        let at = copies.at.clone();
        copies.forget(pages.clone(), |slot, less| {
            for copy in at.iter().filter(|copy| copy.slot == slot) {
                places[usize::from(copy.place)].counters.pages.fetch_sub(less, Ordering::Relaxed);
            }
        });
        self.release(piece, &pages, &[], now);
    }

    /// What is being copied of `pages` is not their content any more.
    pub(super) fn outdate(&mut self, piece: usize, pages: &Range<u32>) {
        if self.copying == 0 {
            return;
        }
        for (_, op) in &mut self.ops {
            if let Kind::Copy { outdated, .. } = &mut op.kind
                && op.piece == piece
                && op.pages.start < pages.end
                && pages.start < op.pages.end
            {
                *outdated = true;
            }
        }
    }

    /// A place answered.
    pub(super) fn answered(&mut self, place: usize, tag: u64, outcome: Outcome, now: Instant) {
        let Some(index) = self.flight(place, tag) else { return };
        let flight = &self.flights[index];
        let op = flight.op;
        match (&flight.what, outcome) {
            (Asked::Fetch, Outcome::Fetched(content)) => {
                let took = now.saturating_duration_since(flight.begun);
                self.land(index, now);
                if let Some(op) = op {
                    let pages = self.ops[op].pages.len();
                    if content.len() != pages * PAGE {
                        return self.bereft(op, "an answer was too short", now);
                    }
                    let at = &mut self.places[place];
                    at.counters.fetched.fetch_add(pages as u64, Ordering::Relaxed);
                    let took = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
                    if matches!(self.ops[op].kind, Kind::Fetch(Urgency::Fault)) {
                        at.latency = at.latency / 8 * 7 + took / 8;
                    }
                    self.fetched(op, content, now);
                }
            }
            (Asked::Fetch, Outcome::Absent(page)) => {
                self.land(index, now);
                if let Some(op) = op {
                    self.absent(op, place, page, now);
                }
            }
            (Asked::Store, Outcome::Done) => {
                self.land(index, now);
                if let Some(op) = op {
                    self.stored(op, place, now);
                }
            }
            (Asked::Cleanup(_), Outcome::Done) => {
                if let Asked::Cleanup(pieces) = self.land(index, now).what {
                    pieces.into_iter().for_each(|piece| self.cleaned(piece, place));
                }
            }
            (Asked::Forget, Outcome::Done) => {
                let Flight { ranges, frees, .. } = self.land(index, now);
                self.places[place].to_free -= frees.min(self.places[place].to_free);
                self.freed(place, &ranges);
            }
            (_, outcome) => {
                if op.is_none() && !matches!(flight.what, Asked::Cleanup(_) | Asked::Forget) {
                    return drop(self.land(index, now));
                }
                if let Outcome::Refused(why) = outcome {
                    tracing::debug!(helper = %self.places[place].name, why, "A place refuses; it is asked again");
                }
                let serial = flight.serial;
                self.later.push_back((now + AGAIN, index, serial));
                self.reroute(now);
            }
        }
    }

    /// A flight is over; what waited for it at its place goes out.
    fn land(&mut self, index: usize, now: Instant) -> Flight {
        let flight = self.flights.remove(index);
        if let Some(op) = flight.op {
            self.ops[op].flights.retain(|other| *other != index);
        }
        if !flight.ranges.is_empty() {
            self.places[flight.place].writes.retain(|other| *other != index);
            self.send_waiting(flight.place, now);
        }
        flight
    }

    /// A fetch, or the reading half of a copying, has its content.
    fn fetched(&mut self, op: usize, content: Buffer, now: Instant) {
        match &mut self.ops[op].kind {
            Kind::Fetch(_) => {
                let op = self.end(op);
                let (first, count) = (self.page(op.piece, op.pages.start), op.pages.len() as u32);
                self.done.push(Done::Fetched { first, count, content });
            }
            Kind::Copy { outdated: true, .. } => self.end_copy(op),
            Kind::Copy { to, content: read, .. } => {
                let to = *to;
                *read = content;
                let Op { piece, pages, .. } = &self.ops[op];
                if self.fits(*piece, pages, to) {
                    self.ask_store(op, to, now);
                } else {
                    self.end_copy(op);
                }
            }
            Kind::Store(_) => {}
        }
    }

    /// A place has what it was sent.
    fn stored(&mut self, op: usize, place: usize, now: Instant) {
        let Op { piece, pages, kind, flights, .. } = &self.ops[op];
        let (piece, pages, copying) = (*piece, pages.clone(), matches!(kind, Kind::Copy { .. }));
        let outdated = matches!(kind, Kind::Copy { outdated: true, .. });
        let over = flights.is_empty();
        let copy = self.pieces[piece].find(place).filter(|copy| copy.role != Role::Gone);
        if let Some(copy) = copy.filter(|_| !outdated) {
            let counters = &self.places[place].counters;
            counters.stored.fetch_add(pages.len() as u64, Ordering::Relaxed);
            if copying {
                counters.copied.fetch_add(pages.len() as u64, Ordering::Relaxed);
            }
            let more = self.pieces[piece].set_good(pages, copy.slot);
            counters.pages.fetch_add(more, Ordering::Relaxed);
        } else if copying {
            self.release_wasted(piece, pages, place, now);
        }
        if copying {
            self.end_copy(op);
        } else if over {
            self.finish_store(op, now);
        }
    }

    /// Everybody who keeps the piece has the pages; or nobody any more, and they are sent to others.
    fn finish_store(&mut self, op: usize, now: Instant) {
        let Op { piece, pages, .. } = &self.ops[op];
        let (piece, pages) = (*piece, pages.clone());
        if self.pieces[piece].all_good(pages.clone()).none() {
            return self.send_store(op, now);
        }
        self.end(op);
        self.pieces[piece].end_store(pages.clone());
        self.fill_up(piece, &pages);
        let (first, count) = (self.page(piece, pages.start), pages.len() as u32);
        self.done.push(Done::Stored { first, count });
    }

    /// A place does not have a page that it should have.
    fn absent(&mut self, op: usize, place: usize, page: u64, now: Instant) {
        let Op { piece, pages, .. } = &self.ops[op];
        let (piece, pages) = (*piece, pages.clone());
        let at = page.checked_sub(self.range(piece).start).and_then(|page| u32::try_from(page).ok());
        let bad = at.filter(|at| pages.contains(at)).map_or(pages, |at| at..at + 1);
        if !self.is_current(op) {
            // It was forgotten meanwhile, and may have been stored again since.
            if self.ops[op].flights.is_empty() {
                self.end_copy(op);
            }
            return;
        }
        if let Some(copy) = self.pieces[piece].find(place) {
            let less = self.pieces[piece].set_bad(bad, copy.slot);
            if less > 0 && !std::mem::replace(&mut self.places[place].lacks, true) {
                tracing::error!(helper = %self.places[place].name, page, "A helper lacks a page that it was given");
            }
            self.places[place].counters.pages.fetch_sub(less, Ordering::Relaxed);
            self.places[place].counters.lost.fetch_add(less, Ordering::Relaxed);
            match copy.role {
                Role::Keeping => self.refill(piece, place),
                Role::Helping => self.refill_members(piece),
                Role::Filling | Role::Leaving | Role::Gone => {}
            }
        }
        let why = "the helper says that it does not have it";
        let copying = matches!(self.ops[op].kind, Kind::Copy { .. });
        if self.ops[op].flights.is_empty() {
            self.bereft(op, why, now);
        }
        if copying {
            self.tell_lost(piece, why);
        }
        self.repair = true;
    }

    /// Nobody will answer what an operation waits for.
    pub(super) fn bereft(&mut self, op: usize, why: &str, now: Instant) {
        if !self.ops.get(op).is_some_and(|op| op.flights.is_empty()) {
            return;
        }
        match self.ops[op].kind {
            Kind::Fetch(urgency) => {
                let Op { piece, pages, .. } = self.end(op);
                self.fetch_pages(piece, pages, urgency, why, now);
            }
            Kind::Store(_) if self.homeless.contains(&op) || self.cramped.contains(&op) => {}
            Kind::Store(_) => self.finish_store(op, now),
            Kind::Copy { .. } => self.end_copy(op),
        }
    }

    /// An operation is over; what is still in flight for it is for nobody.
    pub(super) fn end(&mut self, op: usize) -> Op {
        let over = self.ops.remove(op);
        for index in &over.flights {
            if let Some(flight) = self.flights.get_mut(*index) {
                flight.op = None;
            }
        }
        over
    }

    /// Asks others for what only places have been asked for that are away.
    pub(super) fn reroute(&mut self, now: Instant) {
        let fetches = self.ops.iter().filter(|(_, op)| matches!(op.kind, Kind::Fetch(_)));
        let waiting: Vec<usize> =
            fetches.filter(|(_, op)| !self.served(op)).map(|(index, _)| index).collect();
        waiting.into_iter().for_each(|op| self.ask_another(op, now));
    }

    /// Whether somebody who is here was asked.
    pub(super) fn served(&self, op: &Op) -> bool {
        op.flights.iter().any(|flight| self.places[self.flights[*flight].place].serving)
    }

    /// Asks one who is here and was not asked yet for a fetch's pages.
    pub(super) fn ask_another(&mut self, op: usize, now: Instant) {
        let Op { piece, pages, kind: Kind::Fetch(urgency), flights, .. } = &self.ops[op] else { return };
        let (piece, pages, urgency) = (*piece, pages.clone(), *urgency);
        let asked: SmallVec<[usize; 3]> = flights.iter().map(|f| self.flights[*f].place).collect();
        let here = |place: &usize| self.places[*place].serving;
        let all = self.best(piece, self.pieces[piece].all_good(pages.clone()), &asked).filter(here);
        let some = self.best(piece, self.pieces[piece].any_good(pages.clone()), &asked).filter(here);
        match (all, some) {
            (Some(place), _) => self.ask_fetch(op, place, urgency, now),
            // Different ones have different parts.
            (None, Some(_)) if !self.served(&self.ops[op]) => {
                self.end(op);
                self.fetch_pages(piece, pages, urgency, "no copy is left", now);
            }
            _ => {}
        }
    }

    /// Asks again what was refused.
    pub(super) fn ask_again(&mut self, index: usize, serial: u32, now: Instant) {
        match self.flights.get_mut(index) {
            Some(flight) if flight.serial == serial => flight.begun = now,
            _ => return,
        }
        let flight = &self.flights[index];
        let place = flight.place;
        let what = match (&flight.what, flight.op) {
            (Asked::Forget | Asked::Cleanup(_), _) => Some(What::Forget { ranges: flight.ranges.clone() }),
            (Asked::Fetch, Some(op)) => {
                let Op { piece, pages, kind, .. } = &self.ops[op];
                let (first, count) = (self.page(*piece, pages.start).0, pages.len() as u32);
                let urgency = if let Kind::Fetch(urgency) = kind { *urgency } else { Urgency::Ahead };
                Some(What::Fetch { first, count, urgency })
            }
            (Asked::Store, Some(op)) if self.is_current(op) => self.to_write(op),
            _ => None,
        };
        match what {
            Some(what) => self.places[place].asks.push(super::ask::Ask { tag: tag(index, serial), what }),
            None => {
                let op = self.flights[index].op;
                self.land(index, now);
                if let Some(op) = op {
                    self.bereft(op, "it was outdated", now);
                }
            }
        }
    }

    fn is_current(&self, op: usize) -> bool {
        !matches!(self.ops[op].kind, Kind::Copy { outdated: true, .. })
    }
}
