//! Where the pages of one handler's shard are, without a connection: what to ask of whom, when, and what the answers
//! mean. Driven by events, so that tests can put any history of failures before it. Why no page is ever stale is
//! argued in `docs/memory-stores.md`.
//!
//! [`requests`](super::requests) has what the handler asks and what comes back, [`moves`](super::moves) what is done
//! in the background so that every piece is where it should be.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use slab::Slab;
use smallvec::SmallVec;
use transport::buffer::Buffer;

use super::ask::{Ask, News, What};
use super::copies::{Copies, Role};
use super::health::{Counters, Health, Standing};
use super::moves::Fill;
use super::placement::Keepers;
use super::protocol::MAX_RANGES;
use super::room::Need;
use super::{Done, Urgency};
use crate::memory::fault::{PAGE, Page, Piece, Shards};

/// How long to wait before a place that refused is asked again.
pub(super) const AGAIN: Duration = Duration::from_millis(200);
/// A helper's first latency, before it is known.
const FIRST_LATENCY: u64 = 1_000_000;

/// What the copies must be.
#[derive(Clone, Copy, Debug)]
pub(super) struct Settings {
    /// So many helpers keep each piece.
    pub(super) copies: usize,
    /// The local file is a copy too.
    pub(super) local: bool,
    /// A helper that is away for longer does not count any more, where what it has is elsewhere too.
    pub(super) patience: Duration,
    /// A fetch that takes longer is asked of another copy too.
    pub(super) hedge: Duration,
    /// How much room is needed.
    pub(super) need: Need,
}

/// A helper, or the local file.
pub(super) struct Place {
    /// For people.
    pub(super) name: String,
    pub(super) counters: Arc<Counters>,
    pub(super) serving: bool,
    /// Since when it is not.
    pub(super) away: Instant,
    pub(super) draining: bool,
    pub(super) left: bool,
    pub(super) file: bool,
    /// Pages that it has room for, and that take it up.
    pub(super) quota: u64,
    pub(super) held: u64,
    /// Of these, so many are to be forgotten, once or more often.
    pub(super) to_free: u64,
    /// and of those it was not told of so many yet.
    pub(super) unsent: u64,
    /// Pieces that it has something of.
    pub(super) used: u32,
    /// A mean of what urgent fetches took lately, in nanoseconds.
    pub(super) latency: u64,
    /// What it is asked next, in this order.
    pub(super) asks: Vec<Ask>,
    /// The flights that change something there, in the order in which they must: one that overlaps an earlier one is
    /// not sent before that is answered. So nothing old is carried out late, even if it is sent again.
    pub(super) writes: Vec<usize>,
    pub(super) forgets: SmallVec<[Range<u64>; 4]>,
    /// Pieces whose content it is to forget before it may have them again.
    pub(super) cleanups: Vec<usize>,
    /// Its memory is to be given back, at once.
    pub(super) leave: bool,
    /// It was said that it is given up on.
    pub(super) dropped: bool,
    /// It was said that it lacks pages.
    pub(super) lacks: bool,
}

/// A request of the handler, or a copying from one place to another.
pub(super) struct Op {
    pub(super) piece: usize,
    pub(super) pages: Range<u32>,
    pub(super) kind: Kind,
    /// What it waits for.
    pub(super) flights: SmallVec<[usize; 2]>,
    pub(super) begun: Instant,
}

pub(super) enum Kind {
    Fetch(Urgency),
    Store(Buffer),
    /// To a place. The content is there once it was read. Outdated: a page changed meanwhile.
    Copy {
        to: usize,
        /// The place that is being filled, which may have no room itself.
        fill: usize,
        content: Buffer,
        outdated: bool,
    },
}

/// Something that a place was asked and has not answered.
pub(super) struct Flight {
    /// Whom the answer is for; `None`: nobody any more.
    pub(super) op: Option<usize>,
    pub(super) place: usize,
    pub(super) serial: u32,
    pub(super) what: Asked,
    pub(super) begun: Instant,
    /// What it changes at the place, along the RAM file; nothing if it reads.
    pub(super) ranges: SmallVec<[Range<u64>; 4]>,
    /// When it is answered, so many pages less are to be forgotten there.
    pub(super) frees: u64,
    /// Not sent yet: something that it overlaps was asked earlier and has no answer.
    waits: Option<What>,
}

impl Flight {
    pub(super) fn stores(&self) -> bool {
        matches!(self.what, Asked::Store)
    }
}

pub(super) enum Asked {
    Fetch,
    Store,
    Forget,
    /// To forget all of some pieces, so that it may have them again.
    Cleanup(Vec<usize>),
}

pub(super) struct Core {
    pub(super) shards: Shards,
    pub(super) shard: u32,
    pub(super) settings: Settings,
    pub(super) health: Arc<Health>,
    /// Of this shard, in order.
    pub(super) pieces: Vec<Copies>,
    pub(super) places: Vec<Place>,
    pub(super) ops: Slab<Op>,
    pub(super) flights: Slab<Flight>,
    serial: u32,
    /// Stores that nobody can take,
    pub(super) homeless: Vec<usize>,
    /// or for which nobody has room.
    pub(super) cramped: Vec<usize>,
    /// Something was forgotten, so that there may be some.
    pub(super) room_came: bool,
    /// Flights that were refused, and when they are asked again.
    pub(super) later: VecDeque<(Instant, usize, u32)>,
    pub(super) fills: Vec<Fill>,
    pub(super) copying: usize,
    /// Something changed that may need other copies.
    pub(super) repair: bool,
    pub(super) drop_at: Instant,
    pub(super) hedge_at: Instant,
    pub(super) stuck: bool,
    /// Pieces with fewer copies than they should have.
    pub(super) degraded: u64,
    /// Pages that no copy was left of.
    pub(super) lost: u64,
    /// What the handler is to be told.
    pub(super) done: Vec<Done>,
}

impl Core {
    /// Of handler `shard`, whose pieces are dealt to places that [`add`](Self::add) will number so.
    pub(super) fn new(
        shards: Shards,
        shard: u32,
        settings: Settings,
        health: Arc<Health>,
        now: Instant,
    ) -> Self {
        let pieces = shards.of(shard).map(|_| Copies::default()).collect();
        Self {
            shards,
            shard,
            settings,
            health,
            pieces,
            places: Vec::new(),
            ops: Slab::new(),
            flights: Slab::new(),
            serial: 0,
            homeless: Vec::new(),
            cramped: Vec::new(),
            room_came: false,
            later: VecDeque::new(),
            fills: Vec::new(),
            copying: 0,
            repair: true,
            drop_at: now,
            hedge_at: now,
            stuck: false,
            degraded: 0,
            lost: 0,
            done: Vec::new(),
        }
    }

    /// Another place, with room for so many pages of this shard; the local file has room for all.
    pub(super) fn add(
        &mut self,
        name: &str,
        counters: Arc<Counters>,
        quota: u64,
        file: bool,
        now: Instant,
    ) -> usize {
        counters.room.store(quota, Ordering::Relaxed);
        self.places.push(Place {
            name: name.to_owned(),
            counters,
            serving: false,
            away: now,
            draining: false,
            left: false,
            file,
            quota,
            held: 0,
            to_free: 0,
            unsent: 0,
            used: 0,
            latency: FIRST_LATENCY,
            asks: Vec::new(),
            writes: Vec::new(),
            forgets: SmallVec::new(),
            cleanups: Vec::new(),
            leave: false,
            dropped: false,
            lacks: false,
        });
        (self.repair, self.room_came) = (true, true);
        self.places.len() - 1
    }

    /// Lets `dealt` keep this shard's pieces, before anything was stored.
    pub(super) fn deal(&mut self, dealt: &[Keepers]) {
        let file = self.places.iter().position(|place| place.file);
        for (index, piece) in self.shards.of(self.shard).enumerate() {
            let keepers =
                dealt.get(piece.0 as usize).into_iter().flatten().map(|keeper| usize::from(*keeper));
            for place in keepers.chain(file) {
                if self.pieces[index].add(place, Role::Keeping) {
                    self.places[place].used += 1;
                }
            }
        }
    }

    /// The piece, by its place in this shard, and the pages of it; `None` if they are not all of one piece of this
    /// shard.
    pub(super) fn locate(&self, first: Page, count: u32) -> Option<(usize, Range<u32>)> {
        let piece = self.shards.pieces().of(first)?;
        let range = self.shards.pieces().range(piece);
        let mine = piece.0 % self.shards.count() == self.shard;
        let start = u32::try_from(first.0.checked_sub(range.start)?).ok()?;
        let end = start.checked_add(count)?;
        let fits = count > 0 && first.0.checked_add(count.into())? <= range.end;
        (mine && fits).then_some(((piece.0 / self.shards.count()) as usize, start..end))
    }

    /// All pages of a piece of this shard, along the RAM file.
    pub(super) fn range(&self, piece: usize) -> Range<u64> {
        self.shards.pieces().range(Piece(piece as u32 * self.shards.count() + self.shard))
    }

    /// A page of a piece of this shard.
    pub(super) fn page(&self, piece: usize, page: u32) -> Page {
        Page(self.range(piece).start + u64::from(page))
    }

    /// Something happened at a place.
    pub(super) fn news(&mut self, place: usize, news: News, now: Instant) {
        if self.places.get(place).is_none_or(|place| place.left) {
            return;
        }
        match news {
            News::Here => self.here(place, now),
            News::Away(why) => self.away(place, why, now),
            News::Lost(why) => self.lost(place, &why, now),
            News::Left(why) => {
                self.lost(place, &why, now);
                self.places[place].left = true;
                self.health.stands(place, self.shard as usize, &Standing::Left { why });
            }
            News::Answer(tag, outcome) => self.answered(place, tag, outcome, now),
        }
    }

    fn here(&mut self, place: usize, now: Instant) {
        (self.places[place].serving, self.places[place].dropped) = (true, false);
        self.health.stands(place, self.shard as usize, &Standing::Here);
        self.repair = true;
        self.reroute(now);
    }

    fn away(&mut self, place: usize, why: String, now: Instant) {
        let at = &mut self.places[place];
        if std::mem::replace(&mut at.serving, false) {
            at.away = now;
        }
        let standing = Standing::Away { since: at.away, why };
        self.health.stands(place, self.shard as usize, &standing);
        self.reroute(now);
    }

    /// What a place had is gone.
    fn lost(&mut self, place: usize, why: &str, now: Instant) {
        self.away(place, why.to_owned(), now);
        let at = &mut self.places[place];
        at.asks.clear();
        at.writes.clear();
        at.forgets.clear();
        at.cleanups.clear();
        (at.to_free, at.unsent) = (0, 0);
        let mut bereft = self.take_flights(place, None);
        // Who is asked again says by itself what is lost.
        bereft.retain(|op| self.ops[*op].flights.is_empty());
        let fetches: Vec<usize> =
            bereft.iter().copied().filter(|op| matches!(self.ops[*op].kind, Kind::Fetch(_))).collect();
        for op in &fetches {
            let Op { piece, pages, .. } = &self.ops[*op];
            self.pieces[*piece].will_ask(pages.clone(), true);
        }
        let mut lost = 0;
        for piece in 0..self.pieces.len() {
            if self.pieces[piece].find(place).is_some() {
                self.remove_copy(piece, place);
                lost += self.tell_lost(piece, why);
            }
        }
        for op in fetches {
            let Op { piece, pages, .. } = &self.ops[op];
            self.pieces[*piece].will_ask(pages.clone(), false);
        }
        bereft.into_iter().for_each(|op| self.bereft(op, why, now));
        if lost > 0 {
            let helper = &self.places[place].name;
            tracing::error!(%helper, pages = lost, why, "Pages of the guest's memory are lost");
        }
        self.repair = true;
    }

    /// Tells of the pages of a piece that are good nowhere; returns how many.
    pub(super) fn tell_lost(&mut self, piece: usize, why: &str) -> u64 {
        let mut lost = 0;
        for run in self.pieces[piece].take_lost() {
            self.outdate(piece, &run);
            self.release(piece, &run, &[], Instant::now());
            let (first, count) = (self.page(piece, run.start), run.len() as u32);
            lost += u64::from(count);
            self.done.push(Done::Lost { first, count, why: why.to_owned() });
        }
        self.say_lost(lost, why);
        lost
    }

    pub(super) fn say_lost(&mut self, pages: u64, why: &str) {
        self.lost += pages;
        self.health.lost(self.shard as usize, pages, why);
    }

    /// A place does not keep a piece any more, and has nothing of it.
    pub(super) fn remove_copy(&mut self, piece: usize, place: usize) {
        let Some(copy) = self.pieces[piece].find(place) else { return };
        let len = (self.range(piece).end - self.range(piece).start) as u32;
        let less = self.pieces[piece].set_bad(0..len, copy.slot);
        let freed = self.pieces[piece].take(0..len, copy.slot, false);
        let at = &mut self.places[place];
        at.counters.pages.fetch_sub(less, Ordering::Relaxed);
        at.counters.lost.fetch_add(less, Ordering::Relaxed);
        at.used = at.used.saturating_sub(1);
        at.held = at.held.saturating_sub(freed);
        self.pieces[piece].remove(place);
        self.stop_copies(piece, place);
        if copy.role.stays() && less > 0 {
            self.refill_members(piece);
        }
        self.room_came = true;
    }

    /// Nobody waits any more for what `place` was asked (for `piece`, if given). Returns who waited.
    ///
    /// Of a place as a whole, no answer comes any more; of a piece, it may.
    pub(super) fn take_flights(&mut self, place: usize, piece: Option<usize>) -> Vec<usize> {
        let mut waited = Vec::new();
        let mut over = Vec::new();
        for (index, flight) in &mut self.flights {
            if flight.place != place {
                continue;
            }
            let Some(op) = flight.op else {
                over.push(index);
                continue;
            };
            if piece.is_none_or(|piece| self.ops[op].piece == piece) {
                self.ops[op].flights.retain(|other| *other != index);
                flight.op = None;
                waited.push(op);
                over.push(index);
            }
        }
        if piece.is_none() {
            over.into_iter().for_each(|index| drop(self.flights.remove(index)));
        }
        waited.sort_unstable();
        waited.dedup();
        waited
    }

    /// Asks `place` for something; what it is to forget goes first.
    pub(super) fn ask(&mut self, place: usize, op: Option<usize>, asked: Asked, what: What, now: Instant) {
        if matches!(what, What::Store { .. }) {
            self.flush_forgets(place, now);
        }
        self.serial = self.serial.wrapping_add(1);
        let serial = self.serial;
        let ranges = match &what {
            What::Fetch { .. } => SmallVec::new(),
            What::Store { first, content } => {
                SmallVec::from_elem(*first..*first + (content.len() / PAGE) as u64, 1)
            }
            What::Forget { ranges } => ranges.clone(),
        };
        let earlier = &self.places[place].writes;
        let blocked = earlier.iter().any(|other| overlap(&self.flights[*other].ranges, &ranges));
        let writes = !ranges.is_empty();
        let (now_or_later, waits) = if blocked { (None, Some(what)) } else { (Some(what), None) };
        let frees =
            if matches!(asked, Asked::Forget) { std::mem::take(&mut self.places[place].unsent) } else { 0 };
        let flight = Flight { op, place, serial, what: asked, begun: now, ranges, frees, waits };
        let index = self.flights.insert(flight);
        if let Some(op) = op {
            self.ops[op].flights.push(index);
        }
        let at = &mut self.places[place];
        if writes {
            at.writes.push(index);
        }
        at.asks.extend(now_or_later.map(|what| Ask { tag: tag(index, serial), what }));
    }

    /// Sends what waited for something that is answered now.
    pub(super) fn send_waiting(&mut self, place: usize, now: Instant) {
        let mut at = 0;
        while let Some(index) = self.places[place].writes.get(at).copied() {
            let earlier = &self.places[place].writes[..at];
            let flight = &self.flights[index];
            let free = || !earlier.iter().any(|other| overlap(&self.flights[*other].ranges, &flight.ranges));
            if flight.waits.is_none() || !free() {
                at += 1;
            } else if flight.op.is_none() && matches!(flight.what, Asked::Store) {
                // Nobody wants it any more, and it was never sent.
                self.places[place].writes.remove(at);
                self.flights.remove(index);
            } else if let Some(flight) = self.flights.get_mut(index) {
                flight.begun = now;
                let what = flight.waits.take();
                let tag = tag(index, flight.serial);
                self.places[place].asks.extend(what.map(|what| Ask { tag, what }));
            }
        }
    }

    /// The flight with this tag, if `place` has not answered it yet.
    pub(super) fn flight(&self, place: usize, tag: u64) -> Option<usize> {
        let (index, serial) = ((tag & u64::from(u32::MAX)) as usize, (tag >> 32) as u32);
        let flight = self.flights.get(index)?;
        (flight.place == place && flight.serial == serial).then_some(index)
    }

    pub(super) fn queue_forget(&mut self, place: usize, range: Range<u64>, now: Instant) {
        let forgets = &mut self.places[place].forgets;
        match forgets.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => forgets.push(range),
        }
        if forgets.len() == MAX_RANGES {
            self.flush_forgets(place, now);
        }
    }

    pub(super) fn flush_forgets(&mut self, place: usize, now: Instant) {
        let ranges = std::mem::take(&mut self.places[place].forgets);
        if !ranges.is_empty() {
            self.ask(place, None, Asked::Forget, What::Forget { ranges }, now);
        }
    }
}

fn overlap(some: &[Range<u64>], others: &[Range<u64>]) -> bool {
    some.iter().any(|one| others.iter().any(|other| one.start < other.end && other.start < one.end))
}

/// Under which a place is asked.
pub(super) fn tag(index: usize, serial: u32) -> u64 {
    u64::from(serial) << 32 | index as u64 & u64::from(u32::MAX)
}
