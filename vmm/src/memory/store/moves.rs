//! What is done in the background so that every piece is where it should be: other copies for what was lost, places
//! that are emptied, places that are given up on.

use std::ops::Range;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use smallvec::SmallVec;
use transport::buffer::Buffer;

use super::Urgency;
use super::ask::What;
use super::copies::{Copies, Copy, Enough, Good, Role};
use super::core::{Asked, Core, Kind, Op, Place};
use super::health::Standing;
use super::placement::{Candidate, choose};
use super::protocol::MAX_RANGES;

/// So many copyings are under way at once,
const WINDOW: usize = 8;
/// of so many pages at most: as much as may be on the way beside urgent requests.
const RUN: u32 = 32;
/// How often it is looked again whether a place that is away can be done without.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// A piece that is being copied to a place.
#[derive(Debug)]
pub(super) struct Fill {
    pub(super) piece: usize,
    pub(super) to: usize,
    /// Pages before this one were copied, or are being so.
    cursor: u32,
    /// Copyings under way.
    flying: usize,
}

impl Core {
    /// Does what is due by the clock, and says when to come again. What is to be asked of the places is then in
    /// their queues.
    pub(super) fn tick(&mut self, now: Instant) -> Option<Instant> {
        while let Some((_, index, serial)) = self.later.front().copied().filter(|(at, ..)| *at <= now) {
            self.later.pop_front();
            self.ask_again(index, serial, now);
        }
        let mut next = self.later.front().map(|(at, ..)| *at);
        if self.settings.copies + usize::from(self.settings.local) > 1 {
            next = earlier(next, self.give_up_on(now));
            next = earlier(next, self.hedge(now));
        }
        if std::mem::take(&mut self.repair) {
            self.repair_all(now);
        }
        next = earlier(next, self.uncramp(now));
        self.pump(now);
        if self.repair {
            next = Some(now);
        }
        for place in 0..self.places.len() {
            self.flush_forgets(place, now);
            self.clean(place, now);
        }
        self.tell_stuck(now);
        next
    }

    /// Whether something changed since [`tick`](Self::tick) that should not wait.
    pub(super) fn wants_tick(&self) -> bool {
        self.repair
            || self.room_came && !self.cramped.is_empty()
            || self.places.iter().any(|at| !at.asks.is_empty() || !at.cleanups.is_empty() || at.leave)
    }

    /// Starts to empty a place.
    pub(super) fn drain(&mut self, place: usize) {
        let Some(at) = self.places.get_mut(place).filter(|at| !at.file && !at.left) else { return };
        at.draining = true;
        self.repair = true;
        self.health.drains(place, self.shard as usize);
    }

    /// Another copy for a piece that has too few: kept from now on if nothing is stored yet, else filled. `false`:
    /// nobody has room who is here.
    pub(super) fn find_member(&mut self, piece: usize, now: Instant) -> bool {
        let copies = &self.pieces[piece];
        let open = self.places.iter().enumerate().filter(|(index, at)| {
            let role = copies.find(*index).map(|copy| copy.role);
            let known = role.map_or(copies.has_slot(), |role| role == Role::Helping);
            at.serving && !at.draining && !at.left && !at.file && known
        });
        let candidate = |(place, at): (usize, &Place)| Candidate { place, quota: at.quota, used: at.used };
        let found = choose(open.map(candidate));
        found.is_some_and(|place| self.add_member(piece, place, now))
    }

    fn add_member(&mut self, piece: usize, place: usize, now: Instant) -> bool {
        let empty = self.pieces[piece].is_empty();
        let role = if empty { Role::Keeping } else { Role::Filling };
        if self.pieces[piece].find(place).is_some_and(|copy| copy.role == Role::Helping) {
            self.pieces[piece].set_role(place, role);
        } else if self.pieces[piece].add(place, role) {
            self.places[place].used += 1;
        } else {
            return false;
        }
        if !empty {
            self.fills.push(Fill { piece, to: place, cursor: 0, flying: 0 });
            // What is being stored goes there too, so that all that is missing there can be copied.
            let storing = |op: &Op| op.piece == piece && matches!(op.kind, Kind::Store(_));
            let stores = self.ops.iter().filter(|(_, op)| storing(op) && !op.flights.is_empty());
            let stores: Vec<usize> = stores.map(|(index, _)| index).collect();
            for op in stores {
                let Op { pages, flights, .. } = &self.ops[op];
                let asked = flights.iter().any(|flight| self.flights[*flight].place == place);
                if !asked && self.fits(piece, pages, place) {
                    self.ask_store(op, place, now);
                }
            }
        }
        true
    }

    /// Where those who get the piece lack pages, since somebody goes who had them, they are filled up again.
    pub(super) fn refill_members(&mut self, piece: usize) {
        let (copies, file) = (&self.pieces[piece], self.file());
        let enough = copies.enough(self.settings.copies, file);
        let lacks = |copy: &&Copy| {
            let enough = if Some(usize::from(copy.place)) == file { Enough::NEVER } else { enough };
            copy.role == Role::Keeping && !copies.is_full(copy.slot, enough)
        };
        let keeping = copies.at.iter().filter(lacks);
        let keeping: SmallVec<[usize; 3]> = keeping.map(|copy| usize::from(copy.place)).collect();
        keeping.into_iter().for_each(|place| self.refill(piece, place));
    }

    /// `pages` were stored: with fewer copies than they should have, if room was short.
    pub(super) fn fill_up(&mut self, piece: usize, pages: &Range<u32>) {
        let copies = &self.pieces[piece];
        let file = self.file();
        let helpers = copies.lacks(pages.clone(), copies.enough(self.settings.copies, file));
        let good = copies.all_good(pages.clone());
        let lacks = copies.at.iter().filter(|copy| {
            let is_file = Some(usize::from(copy.place)) == file;
            copy.role == Role::Keeping && !good.has(copy.slot) && (helpers || is_file)
        });
        let lacks: SmallVec<[usize; 3]> = lacks.map(|copy| usize::from(copy.place)).collect();
        lacks.into_iter().for_each(|place| self.refill(piece, place));
    }

    /// A copy that lacks pages is filled up again.
    pub(super) fn refill(&mut self, piece: usize, place: usize) {
        self.pieces[piece].set_role(place, Role::Filling);
        if !self.fills.iter().any(|fill| (fill.piece, fill.to) == (piece, place)) {
            self.fills.push(Fill { piece, to: place, cursor: 0, flying: 0 });
        }
    }

    /// A place keeps a piece no more; it may have it again when it has forgotten what it had.
    fn retire(&mut self, piece: usize, place: usize, now: Instant) {
        let Some(copy) = self.pieces[piece].find(place).filter(|copy| copy.role != Role::Gone) else {
            return;
        };
        self.pieces[piece].set_role(place, Role::Gone);
        let len = (self.range(piece).end - self.range(piece).start) as u32;
        let less = self.pieces[piece].set_bad(0..len, copy.slot);
        self.places[place].counters.pages.fetch_sub(less, Ordering::Relaxed);
        self.stop_copies(piece, place);
        self.places[place].cleanups.push(piece);
        self.refill_members(piece);
        for op in self.take_flights(place, Some(piece)) {
            self.bereft(op, "no copy is left", now);
        }
    }

    /// What is being copied of a piece to a place is worthless there.
    pub(super) fn stop_copies(&mut self, piece: usize, place: usize) {
        self.fills.retain(|fill| (fill.piece, fill.to) != (piece, place));
        for (_, op) in &mut self.ops {
            if let Kind::Copy { to, outdated, .. } = &mut op.kind
                && (op.piece, *to) == (piece, place)
            {
                *outdated = true;
            }
        }
    }

    /// Has a place forget what it had of pieces that it keeps no more.
    fn clean(&mut self, place: usize, now: Instant) {
        let mut pieces = std::mem::take(&mut self.places[place].cleanups);
        while !pieces.is_empty() {
            let some = pieces.split_off(pieces.len().saturating_sub(MAX_RANGES));
            let ranges = some.iter().map(|piece| self.range(*piece)).collect();
            self.ask(place, None, Asked::Cleanup(some), What::Forget { ranges }, now);
        }
    }

    /// A place has forgotten a piece.
    pub(super) fn cleaned(&mut self, piece: usize, place: usize) {
        if self.pieces[piece].find(place).is_some_and(|copy| copy.role == Role::Gone) {
            self.remove_copy(piece, place);
            self.repair = true;
        }
    }

    /// Gives up on places that are away for too long, where others have what they have.
    fn give_up_on(&mut self, now: Instant) -> Option<Instant> {
        let away: SmallVec<[usize; 4]> = (0..self.places.len())
            .filter(|place| {
                !self.places[*place].serving && !self.places[*place].left && self.places[*place].used > 0
            })
            .collect();
        if away.is_empty() {
            return None;
        }
        let over = |place: &usize| self.places[*place].away + self.settings.patience;
        let first = away.iter().map(over).min()?;
        let due = first.max(self.drop_at);
        if due > now {
            return Some(due);
        }
        self.drop_at = now + LOOK_AGAIN;
        let late: SmallVec<[usize; 4]> = away.iter().filter(|place| over(place) <= now).copied().collect();
        for place in late {
            let gone =
                (0..self.pieces.len()).filter(|piece| self.can_spare(*piece, place)).collect::<Vec<_>>();
            if gone.is_empty() {
                continue;
            }
            if !std::mem::replace(&mut self.places[place].dropped, true) {
                let pieces = gone.len();
                let helper = &self.places[place].name;
                tracing::warn!(%helper, pieces,
                    "A helper is away for too long: its copies do not count any more"
                );
            }
            gone.into_iter().for_each(|piece| self.retire(piece, place, now));
            self.repair = true;
        }
        Some(self.drop_at)
    }

    /// Whether a piece can do without its copy at `place`: others who are here have all of it and take stores.
    fn can_spare(&self, piece: usize, place: usize) -> bool {
        let copies = &self.pieces[piece];
        let Some(copy) = copies.find(place).filter(|copy| copy.role != Role::Gone) else { return false };
        let here = copies.at.iter().filter(|other| {
            usize::from(other.place) != place
                && other.role != Role::Gone
                && self.places[usize::from(other.place)].serving
        });
        let slots: SmallVec<[u8; 3]> = here.clone().map(|other| other.slot).collect();
        here.clone().any(|other| other.role.stores()) && copies.is_spare(copy.slot, &slots)
    }

    /// Asks another copy for what takes long.
    fn hedge(&mut self, now: Instant) -> Option<Instant> {
        if self.hedge_at > now {
            return (!self.ops.is_empty()).then_some(self.hedge_at);
        }
        self.hedge_at = now + self.settings.hedge / 2;
        let slow = |op: &Op| {
            matches!(op.kind, Kind::Fetch(_)) && op.flights.len() < 2 && op.begun + self.settings.hedge <= now
        };
        let slow: Vec<usize> = self.ops.iter().filter(|(_, op)| slow(op)).map(|(index, _)| index).collect();
        slow.into_iter().for_each(|op| self.ask_another(op, now));
        (!self.ops.is_empty()).then_some(self.hedge_at)
    }

    /// Sees to it that every piece has its copies, and none where it should not be.
    fn repair_all(&mut self, now: Instant) {
        let mut degraded = 0;
        for piece in 0..self.pieces.len() {
            degraded += u64::from(!self.repair_piece(piece, now));
        }
        self.tell_degraded(degraded);
        for op in std::mem::take(&mut self.homeless) {
            self.send_store(op, now);
        }
        for place in 0..self.places.len() {
            let on = |copies: &&Copies| copies.find(place).is_some_and(|copy| copy.role != Role::Gone);
            let kept = self.pieces.iter().filter(on).count() as u64;
            let at = &self.places[place];
            at.counters.pieces.store(kept, Ordering::Relaxed);
            at.counters.leaving.store(if at.draining { kept } else { 0 }, Ordering::Relaxed);
            if at.draining && !at.left && kept == 0 {
                self.leave(place, now);
            }
        }
    }

    /// Says how many pieces have too few copies, where that begins or ends.
    fn tell_degraded(&mut self, degraded: u64) {
        let shard = self.shard;
        match (std::mem::replace(&mut self.degraded, degraded), degraded) {
            (0, pieces @ 1..) => {
                tracing::warn!(shard, pieces, "Some of the guest's memory has fewer copies than it should");
            }
            (1.., 0) if self.lost == 0 => {
                tracing::info!(shard, "All of the guest's memory has its copies again");
            }
            (1.., 0) => {
                let lost = self.lost;
                tracing::info!(
                    shard,
                    lost,
                    "What is left of the guest's memory has its copies; pages of it are lost"
                );
            }
            _ => {}
        }
        self.health.degraded(shard as usize, degraded);
    }

    /// Nothing is kept at a place any more: its memory is given back.
    fn leave(&mut self, place: usize, now: Instant) {
        for piece in 0..self.pieces.len() {
            self.remove_copy(piece, place);
        }
        for op in self.take_flights(place, None) {
            self.bereft(op, "no copy is left", now);
        }
        let at = &mut self.places[place];
        at.asks.clear();
        at.writes.clear();
        at.forgets.clear();
        at.cleanups.clear();
        (at.to_free, at.unsent) = (0, 0);
        (at.left, at.leave, at.serving) = (true, true, false);
        let why = "everything was moved to others".to_owned();
        self.health.stands(place, self.shard as usize, &Standing::Left { why });
    }

    /// `false`: it has fewer copies than it should.
    fn repair_piece(&mut self, piece: usize, now: Instant) -> bool {
        let members = |core: &Self| -> SmallVec<[usize; 3]> {
            let members = core.pieces[piece].members().map(|copy| usize::from(copy.place));
            members.filter(|place| !core.places[*place].file).collect()
        };
        for place in members(self) {
            if self.places[place].draining && self.find_member(piece, now) {
                self.pieces[piece].set_role(place, Role::Leaving);
                self.stop_copies(piece, place);
                self.refill_members(piece);
            }
        }
        self.repair_helping(piece);
        while members(self).len() < self.settings.copies {
            let leaving = self.pieces[piece].at.iter().find(|copy| copy.role == Role::Leaving).copied();
            match leaving {
                _ if self.find_member(piece, now) => {}
                Some(copy) => self.refill(piece, copy.place.into()),
                None => return false,
            }
        }
        if self.settings.local
            && let Some(file) = self.places.iter().position(|at| at.file && !at.left)
            && self.pieces[piece].find(file).is_none()
        {
            self.add_member(piece, file, now);
        }
        self.dismiss_leaving(piece, now);
        let has = |role: Role| self.pieces[piece].at.iter().any(|copy| copy.role == role);
        let filling = has(Role::Filling) && !has(Role::Leaving);
        !filling && (!self.settings.local || self.places.iter().any(|at| at.file && !at.left))
    }

    /// Who helps and has nothing any more is let go, and who helps and is to be emptied leaves.
    fn repair_helping(&mut self, piece: usize) {
        let helping = self.pieces[piece].at.iter().filter(|copy| copy.role == Role::Helping);
        let helping: SmallVec<[Copy; 3]> = helping.copied().collect();
        for copy in helping {
            let place = usize::from(copy.place);
            let len = self.shards.pieces().each();
            if self.pieces[piece].taken(0..len, copy.slot) == 0 {
                self.remove_copy(piece, place);
            } else if self.places[place].draining {
                self.pieces[piece].set_role(place, Role::Leaving);
                self.refill_members(piece);
            }
        }
    }

    /// Who is leaving goes when others have everything.
    fn dismiss_leaving(&mut self, piece: usize, now: Instant) {
        let copies = &self.pieces[piece];
        // As long as all members are being filled, one of them may need what only the leaving one has.
        if !copies.members().any(|copy| copy.role == Role::Keeping) {
            return;
        }
        let stay = copies.at.iter().filter(|copy| copy.role.stays());
        let slots: SmallVec<[u8; 3]> = stay.map(|copy| copy.slot).collect();
        let leaving = copies.at.iter().filter(|copy| copy.role == Role::Leaving);
        let spare = leaving.filter(|copy| copies.is_spare(copy.slot, &slots));
        let spare: SmallVec<[usize; 3]> = spare.map(|copy| usize::from(copy.place)).collect();
        spare.into_iter().for_each(|place| self.retire(piece, place, now));
    }

    /// Copies on, as far as the window allows.
    fn pump(&mut self, now: Instant) {
        if self.fills.is_empty() {
            return;
        }
        let mut at = 0;
        while at < self.fills.len() && self.copying < WINDOW {
            if self.copy_some(at, now) {
                at += 1;
            }
        }
    }

    /// Copies on for one piece. `false`: it is done, and no longer in the list.
    fn copy_some(&mut self, at: usize, now: Instant) -> bool {
        let Fill { piece, to, .. } = self.fills[at];
        let Some(copy) = self.pieces[piece].find(to).filter(|_| self.places[to].serving) else { return true };
        let file = self.file();
        let enough = match file {
            Some(file) if file == to => Enough::NEVER,
            _ => self.pieces[piece].enough(self.settings.copies, file),
        };
        let mut room = true;
        while self.copying < WINDOW {
            let source = |good: Good| {
                let place = self.best(piece, good, &[to]).filter(|place| self.places[*place].serving)?;
                Some(self.pieces[piece].find(place)?.slot)
            };
            let found =
                self.pieces[piece].next_to_copy(self.fills[at].cursor, RUN, copy.slot, enough, source);
            let Some((pages, slot)) = found else { break };
            let Some(place) = self.copy_to(piece, &pages, to) else {
                room = false;
                break;
            };
            let from = self.pieces[piece].at.iter().find(|copy| copy.slot == slot);
            let Some(from) = from.map(|copy| usize::from(copy.place)) else { break };
            self.fills[at].cursor = pages.end;
            self.fills[at].flying += 1;
            self.copying += 1;
            let kind = Kind::Copy { to: place, fill: to, content: Buffer::empty(), outdated: false };
            let op = self.ops.insert(Op { piece, pages, kind, flights: SmallVec::new(), begun: now });
            self.ask_fetch(op, from, Urgency::Ahead, now);
        }
        if !room || self.copying == WINDOW || self.fills[at].flying > 0 {
            return true;
        }
        // The end, or a page that nobody who is here has.
        self.fills[at].cursor = 0;
        if !self.pieces[piece].is_full(copy.slot, enough) {
            return true;
        }
        self.fills.remove(at);
        self.pieces[piece].set_role(to, Role::Keeping);
        self.repair = true;
        false
    }

    /// Where `pages` are to be copied for the sake of `to`: there, or to whoever has room. `None`: nobody has.
    fn copy_to(&mut self, piece: usize, pages: &Range<u32>, to: usize) -> Option<usize> {
        if self.places[to].file {
            return Some(to);
        }
        if !self.may_copy() {
            return None;
        }
        if self.fits(piece, pages, to) {
            return Some(to);
        }
        let good = self.pieces[piece].any_good(pages.clone());
        let have = self.pieces[piece].at.iter().filter(|copy| good.has(copy.slot));
        let have: SmallVec<[usize; 3]> = have.map(|copy| usize::from(copy.place)).collect();
        let place = self.helping(piece, pages, &have)?;
        self.help(piece, place);
        Some(place)
    }

    /// A copying is over, one way or the other.
    pub(super) fn end_copy(&mut self, op: usize) {
        let Op { piece, kind, .. } = self.end(op);
        let Kind::Copy { fill, .. } = kind else { return };
        self.copying -= 1;
        if let Some(fill) = self.fills.iter_mut().find(|other| (other.piece, other.to) == (piece, fill)) {
            fill.flying = fill.flying.saturating_sub(1);
        }
    }

    /// Says whom something waits for that nobody else can do.
    fn tell_stuck(&mut self, now: Instant) {
        let away = self.places.iter().any(|at| !at.serving && !at.left);
        let cramped = !self.cramped.is_empty() && !self.enough_for_one();
        if !away && !self.stuck && self.homeless.is_empty() && !cramped {
            return;
        }
        let waits = |op: &Op| {
            let done =
                matches!(op.kind, Kind::Store(_)) && !self.pieces[op.piece].all_good(op.pages.clone()).none();
            let missed = op.flights.first().map(|flight| self.flights[*flight].place);
            missed.filter(|_| !done && !matches!(op.kind, Kind::Copy { .. }) && !self.served(op))
        };
        let missed = self.ops.iter().find_map(|(_, op)| waits(op));
        let homeless = || self.places.iter().position(|at| !at.serving && !at.file);
        let missed =
            missed.or_else(|| (cramped || !self.homeless.is_empty()).then(|| homeless().unwrap_or_default()));
        self.stuck = missed.is_some();
        self.health.stuck(self.shard as usize, missed, now);
    }
}

fn earlier(one: Option<Instant>, other: Option<Instant>) -> Option<Instant> {
    [one, other].into_iter().flatten().min()
}
