//! A shard: the pages of its pieces at this member, and the lines of those that are at home here. Whatever happens to
//! them (a fault, a message, the end of a hold) is worked off by the thread that brings it, under one lock, to the end.
//! What is then to be said to others is said without the lock.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use smallvec::SmallVec;
use transport::buffer::Buffer;

use super::counters::Tally;
use super::holds::Holds;
use super::member::{Action, Actions, Copy, Event};
use super::message::{Member, Members, Order, Right, ToHome, ToMember};
use super::table::{Busy, Table};
use super::timer::Timer;
use super::wire::{Age, BODY, Letter, Need, What};
use super::{Homes, Violation};
use crate::memory::frames::{Fault, Frames, PAGE, Page, Shards};

/// Letters to other members, each with the content that goes with it.
pub(super) type Mail = SmallVec<[(Member, Letter, Option<Buffer>); 4]>;

/// Why a shard cannot go on.
#[derive(Debug)]
pub(super) enum Failure {
    /// Another member cannot be trusted: the guest has to stop.
    Violation(Violation),
    /// The kernel refuses what the guest's life depends on.
    Kernel(io::Error),
}

impl From<Violation> for Failure {
    fn from(violation: Violation) -> Self {
        Self::Violation(violation)
    }
}

impl From<io::Error> for Failure {
    fn from(why: io::Error) -> Self {
        Self::Kernel(why)
    }
}

/// See the [module](self).
pub(super) struct Shard {
    me: Member,
    /// All of the guest's.
    members: Members,
    pub(super) shards: Shards,
    number: u32,
    homes: Arc<Homes>,
    pub(super) frames: Frames,
    /// Expires when a hold is over that another member waits for.
    pub(super) timer: Timer,
    state: Mutex<State>,
    /// No fault is worked off.
    paused: AtomicBool,
}

struct State {
    table: Table,
    holds: Holds,
    /// Since when members that ask for pages at home here have been in need.
    needs: HashMap<(u32, Member), Need>,
    age: Age,
    tally: Tally,
    /// So many orders wait for the end of a hold.
    deferred: usize,
    /// For when the timer is set.
    set: Option<Instant>,
}

impl Shard {
    pub(super) fn new(
        me: Member,
        members: Members,
        shards: Shards,
        number: u32,
        homes: Arc<Homes>,
        frames: Frames,
    ) -> io::Result<Self> {
        let table = Table::new(shards.pages(number), shards.pieces().each() as usize);
        let state = State {
            table,
            holds: Holds::new(me),
            needs: HashMap::new(),
            age: Age::default(),
            tally: Tally::default(),
            deferred: 0,
            set: None,
        };
        let (timer, state) = (Timer::new()?, Mutex::new(state));
        Ok(Self { me, members, shards, number, homes, frames, timer, state, paused: AtomicBool::new(false) })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks at the counters.
    pub(super) fn tally<T>(&self, look: impl FnOnce(&Tally) -> T) -> T {
        look(&self.lock().tally)
    }

    /// Whether faults wait.
    pub(super) fn is_paused(&self) -> bool {
        self.paused.load(Ordering::SeqCst)
    }

    /// From now on faults wait.
    pub(super) fn pause(&self) {
        self.paused.store(true, Ordering::SeqCst);
    }

    /// Faults are worked off again. Whoever stands still tries again, which brings back the events of faults that were
    /// read and forgotten.
    pub(super) fn resume(&self) -> io::Result<()> {
        self.paused.store(false, Ordering::SeqCst);
        for piece in self.shards.of(self.number) {
            let pages = self.shards.pieces().range(piece);
            self.frames.wake(Page(pages.start), pages.end - pages.start)?;
        }
        Ok(())
    }

    /// Gives all memory of the shard back and forgets all that is known of it.
    pub(super) fn forget(&self, age: Age) -> io::Result<()> {
        let mut state = self.lock();
        for piece in self.shards.of(self.number) {
            let pages = self.shards.pieces().range(piece);
            self.frames.punch(Page(pages.start), pages.end - pages.start)?;
        }
        state.table.clear();
        state.holds.clear();
        state.needs.clear();
        (state.deferred, state.age) = (0, age);
        Ok(())
    }

    /// How often this member has forgotten everything.
    pub(super) fn age(&self) -> Age {
        self.lock().age
    }

    /// Threads stand still.
    pub(super) fn faults(&self, faults: &[Fault]) -> Result<Mail, Failure> {
        self.work(|work| faults.iter().try_for_each(|fault| work.fault(fault)))
    }

    /// The thread needs nothing for now; `true`: somebody may wait for what it held.
    pub(super) fn rests(&self, thread: u32) -> bool {
        let state = &mut *self.lock();
        state.holds.rests(thread, Instant::now()) && state.deferred > 0
    }

    /// The timer has expired, or the bell was heard.
    pub(super) fn expired(&self) -> Result<Mail, Failure> {
        self.work(|work| {
            work.state.set = None;
            Ok(())
        })
    }

    /// `from` says something of the page at `place`. What it said before it was told to forget everything is forgotten.
    pub(super) fn hear(
        &self,
        from: Member,
        place: usize,
        letter: Letter,
        content: Option<Buffer>,
    ) -> Result<Mail, Failure> {
        self.work(|work| {
            if letter.age.before(work.state.age) {
                return Ok(());
            }
            if letter.age != work.state.age {
                return Err(Violation("a message from the future").into());
            }
            let place = place as u32;
            work.state.holds.heard_of(letter.need);
            match letter.what {
                What::Home(_, message) => work.at_home(place, from, message, letter.need),
                What::Member(_, message) => {
                    work.heard(place, message, Heard { content, need: letter.need, late: letter.late })
                }
                What::Forget | What::Forgotten | What::GoOn => Ok(()),
            }
        })
    }

    /// Works something off, and whatever is due.
    fn work(&self, begin: impl FnOnce(&mut Work<'_>) -> Result<(), Failure>) -> Result<Mail, Failure> {
        let mut state = self.lock();
        let mut work = Work {
            shard: self,
            state: &mut state,
            mail: Mail::new(),
            own: SmallVec::new(),
            zeros: SmallVec::new(),
            now: Instant::now(),
            late: false,
            ahead: false,
        };
        work.expire()?;
        begin(&mut work)?;
        work.settle()?;
        Ok(work.mail)
    }
}

/// A message of this member to itself.
enum Own {
    Home(ToHome, Need),
    Member(ToMember, Heard),
}

/// What comes with a message to a member; see [`Letter`].
#[derive(Default)]
struct Heard {
    content: Option<Buffer>,
    need: Need,
    late: bool,
}

/// Work under the lock.
struct Work<'a> {
    shard: &'a Shard,
    state: &'a mut State,
    mail: Mail,
    own: SmallVec<[(u32, Own); 4]>,
    /// Pages that are to be zeros when this is done.
    zeros: SmallVec<[Page; 4]>,
    now: Instant,
    /// What is said now answers an order that had to wait until a hold was over.
    late: bool,
    /// Nobody stands still for what is asked for now.
    ahead: bool,
}

impl Work<'_> {
    fn page(&self, place: u32) -> Page {
        self.shard.shards.page(self.shard.number, place as usize)
    }

    /// Ends holds whose time is over.
    fn expire(&mut self) -> Result<(), Failure> {
        while let Some(place) = self.state.holds.due(self.now) {
            let State { table, holds, tally, .. } = &mut *self.state;
            let Some(hold) = table.held(place) else { continue };
            match holds.end(place, &hold) {
                Some(end) if end.at <= self.now => {
                    tally.unused += u64::from(end.unused);
                    holds.goes(place, &hold, self.now);
                    self.late = true;
                    self.happens(place, Event::HoldOver, Heard::default())?;
                    self.late = false;
                }
                _ => holds.look_again(place, &hold),
            }
        }
        Ok(())
    }

    /// Hears what this member said to itself, and sets the timer.
    fn settle(&mut self) -> Result<(), Failure> {
        while let Some((place, own)) = self.own.pop() {
            match own {
                Own::Home(message, need) => self.at_home(place, self.shard.me, message, need)?,
                Own::Member(message, with) => self.heard(place, message, with)?,
            }
        }
        self.zeros.sort_unstable();
        for run in self.zeros.chunk_by(|page, next| page.plus(1) == *next) {
            self.shard.frames.zero(run[0], run.len() as u64, false)?;
        }
        let next = self.state.holds.next().filter(|_| self.state.deferred > 0);
        if let Some(next) = next
            && self.state.set != Some(next)
        {
            self.shard.timer.set(next.saturating_duration_since(self.now))?;
            self.state.set = Some(next);
        }
        let tally = &mut self.state.tally;
        tally.messages += self.mail.len() as u64;
        let contents = self.mail.iter().filter(|(_, _, content)| content.is_some()).count();
        tally.bytes += (self.mail.len() * BODY + contents * PAGE) as u64;
        Ok(())
    }

    fn fault(&mut self, fault: &Fault) -> Result<(), Failure> {
        let page = self.shard.frames.page(fault.address);
        let place = page.and_then(|page| self.shard.shards.place(page));
        let Some((_, place)) = place.filter(|(shard, _)| *shard == self.shard.number) else {
            return Err(io::Error::other("a fault came from somewhere else").into());
        };
        let right = if fault.write || fault.protected { Right::Write } else { Right::Read };
        let place = place as u32;
        let here = self.state.table.copy(place) != Copy::None;
        let known = (here, self.state.table.asks(place));
        let wish = self.state.holds.needs(fault.thread, place, right, known, self.now);
        self.happens(place, Event::Fault(wish.right), Heard::default())?;
        if !self.state.table.asks(place) {
            self.state.holds.goes_on(fault.thread, self.now);
            return Ok(());
        }
        self.ahead = true;
        if wish.known {
            for (other, right) in self.state.holds.along(fault.thread, place) {
                if self.is_missing(other) {
                    self.state.holds.comes(fault.thread, other, self.now);
                    self.happens(other, Event::Fault(right), Heard::default())?;
                }
            }
        }
        let home = self.shard.homes.of(self.page(place));
        for next in wish.stream {
            // Who comes to where others' memory begins rarely goes on.
            if self.is_missing(next) && self.shard.homes.of(self.page(next)) == home {
                self.happens(next, Event::Fault(wish.right), Heard::default())?;
            }
        }
        self.ahead = false;
        Ok(())
    }

    /// Whether the page at `place` is neither here nor asked for. What is here to be read stays as it is: others may be
    /// reading it too.
    fn is_missing(&self, place: u32) -> bool {
        let pages = self.shard.shards.pages(self.shard.number);
        let table = &self.state.table;
        (place as usize) < pages && table.copy(place) == Copy::None && !table.asks(place)
    }

    /// As the home of the page at `place`, hears what `from` says.
    fn at_home(&mut self, place: u32, from: Member, message: ToHome, need: Need) -> Result<(), Failure> {
        let page = self.page(place);
        if self.shard.homes.of(page) != Some(self.shard.me) {
            return Err(Violation("a page is at home somewhere else").into());
        }
        let line = self.state.table.line(place).ok_or(Violation("a page that there is not"))?;
        // Members have room for all of RAM, so nobody offers pages: the first member would keep them.
        let keeper = self.shard.me;
        let (next, sendings) = std::mem::take(line).step(keeper, from, message)?;
        *line = next;
        match message {
            ToHome::Get { .. } => drop(self.state.needs.insert((place, from), need)),
            ToHome::Done { .. } => drop(self.state.needs.remove(&(place, from))),
            ToHome::Offer => {}
        }
        for (to, message) in sendings {
            let need = match message {
                ToMember::Order(Order::Forward { to, .. } | Order::Invalidate { to, .. }) => {
                    self.state.needs.get(&(place, to)).copied().unwrap_or_default()
                }
                _ => Need::default(),
            };
            self.send(to, place, message, Heard { need, ..Heard::default() })?;
        }
        Ok(())
    }

    /// Hears `message` of the page at `place`.
    fn heard(&mut self, place: u32, message: ToMember, with: Heard) -> Result<(), Failure> {
        if matches!(message, ToMember::Order(_))
            && self.state.table.held(place).is_none()
            && let Some(hold) = self.state.holds.again(place, self.now)
        {
            self.happens(place, Event::Hold, Heard::default())?;
            self.state.table.hold(place, hold);
        }
        self.happens(place, Event::Heard(message), with)
    }

    /// Has `event` happen to the page at `place`.
    fn happens(&mut self, place: u32, event: Event, with: Heard) -> Result<(), Failure> {
        let mut busy = self.state.table.take(place);
        let (before, deferred) = (busy.page, busy.page.defers());
        let (page, actions) = before.step(event)?;
        busy.page = page;
        busy.late |= with.late;
        self.count(event, before.copy(), &page, &mut busy);
        self.state.deferred += usize::from(page.defers());
        self.state.deferred -= usize::from(deferred);
        if page.defers() && !deferred {
            self.state.tally.deferred += 1;
            if let (Some(hold), Some(by)) = (&mut busy.hold, for_whom(event)) {
                self.state.holds.wanted(place, hold, (with.need, by), self.now);
            }
        }
        self.act(place, before.copy(), &mut busy, actions, with.content)?;
        self.state.table.put(place, busy);
        Ok(())
    }

    fn count(&mut self, event: Event, copy: Copy, page: &super::Page, busy: &mut Busy) {
        let Event::Fault(right) = event else { return };
        let tally = &mut self.state.tally;
        if self.ahead {
            tally.ahead += 1;
            // How long somebody will have stood still for it does not tell what it takes to get a page.
            busy.late = true;
            return;
        }
        let number = match (right, copy) {
            _ if busy.since.is_some() || copy.allows(right) => &mut tally.late_faults,
            (Right::Read, _) => &mut tally.read_faults,
            (Right::Write, Copy::None) => &mut tally.write_faults,
            (Right::Write, _) => &mut tally.upgrades,
        };
        *number += 1;
        if page.asks() {
            busy.since.get_or_insert(self.now);
        }
    }

    /// Does what the page's next state asks for. `before` is what this member had of it.
    ///
    /// Letters leave when all of it is done: so `Unmap` only has to see to it that nobody writes any more, and `Free` to
    /// it that nobody reads.
    fn act(
        &mut self,
        place: u32,
        before: Copy,
        busy: &mut Busy,
        actions: Actions,
        mut content: Option<Buffer>,
    ) -> Result<(), Failure> {
        let (page, frames) = (self.page(place), &self.shard.frames);
        let mut woken = false;
        for action in actions {
            match action {
                Action::Ask(message) => self.ask(place, message),
                Action::Stage => {
                    let came = content.take().ok_or(Violation("content was promised and did not come"))?;
                    busy.staged = Some(came);
                }
                Action::Unstage => busy.staged = None,
                Action::Install { writable } => {
                    let staged = busy.staged.take().ok_or(Violation("there is nothing to install"))?;
                    frames.install(page, 1, &staged, !writable)?;
                    self.state.tally.fetched += 1;
                    woken = true;
                }
                Action::InstallZeros => {
                    self.zeros.push(page);
                    self.state.tally.zeroed += 1;
                    // Mostly its home is here: it tells nothing of what it takes to get a page.
                    busy.since = None;
                    woken = true;
                }
                Action::Unprotect => {
                    frames.unprotect(page, 1)?;
                    woken = true;
                }
                Action::Protect => {
                    frames.protect(page, 1)?;
                    self.state.tally.downgraded += 1;
                }
                Action::Unmap => {
                    if before == Copy::Modified {
                        frames.protect(page, 1)?;
                    }
                }
                Action::Send(to, answer) => {
                    let content = Buffer::from_vec(frames.read(page, 1)?);
                    self.state.tally.sent += 1;
                    let with = Heard { content: Some(content), late: self.late, ..Heard::default() };
                    self.send(to, place, ToMember::Answer(answer), with)?;
                }
                Action::SendGone(to, txn) => {
                    let with = Heard { late: self.late, ..Heard::default() };
                    self.send(to, place, ToMember::Gone { txn }, with)?;
                }
                Action::Free => {
                    frames.punch(page, 1)?;
                    self.state.tally.invalidated += 1;
                }
                Action::Wake => {
                    if !woken {
                        frames.wake(page, 1)?;
                    }
                }
                Action::Hold => self.hold(place, busy),
            }
        }
        Ok(())
    }

    fn hold(&mut self, place: u32, busy: &mut Busy) {
        let State { holds, tally, .. } = &mut *self.state;
        let late = std::mem::take(&mut busy.late);
        if let Some(needed) = busy.since.take() {
            let time = self.now.saturating_duration_since(needed);
            tally.latency.note(time);
            tally.waited_us += time.as_micros() as u64;
            if !late {
                holds.took(time);
            }
        }
        tally.held += 1;
        // Not from when this work began: to install a page takes its time.
        busy.hold = Some(holds.begin(place, Instant::now()));
    }

    fn ask(&mut self, place: u32, message: ToHome) {
        let need = self.state.holds.need(place);
        match self.shard.homes.of(self.page(place)) {
            Some(home) if home == self.shard.me => self.own.push((place, Own::Home(message, need))),
            Some(home) => {
                self.post(home, What::Home(self.page(place), message), Heard { need, ..Heard::default() });
            }
            // Every page has one.
            None => {}
        }
    }

    fn send(&mut self, to: Member, place: u32, message: ToMember, with: Heard) -> Result<(), Failure> {
        if to == self.shard.me {
            self.own.push((place, Own::Member(message, with)));
        } else if self.shard.members.has(to) {
            self.post(to, What::Member(self.page(place), message), with);
        } else {
            return Err(Violation("a page is to go to one who is no member").into());
        }
        Ok(())
    }

    fn post(&mut self, to: Member, what: What, with: Heard) {
        let Heard { content, need, late } = with;
        self.mail.push((to, Letter { age: self.state.age, need, late, what }, content));
    }
}

/// Whom an order is for.
fn for_whom(event: Event) -> Option<Member> {
    let Event::Heard(ToMember::Order(Order::Forward { to, .. } | Order::Invalidate { to, .. })) = event
    else {
        return None;
    };
    Some(to)
}

/// Whether what comes with `letter` is what it says.
pub(super) fn whole(letter: &Letter, content: Option<&Buffer>) -> bool {
    content.map(Buffer::len) == letter.has_content().then_some(PAGE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::coherence::message::{Answer, Content, Granted, Txn};

    #[test]
    fn a_letter_has_content_where_it_says_so_and_then_a_page_of_it() {
        let answer = |content| Answer { txn: Txn(1), granted: Granted::Share, gone: 0, content };
        let letter = |content| Letter {
            age: Age(0),
            need: Need::default(),
            late: false,
            what: What::Member(Page(3), ToMember::Answer(answer(content))),
        };
        let (page, short) = (Buffer::zeroed(PAGE), Buffer::zeroed(PAGE - 1));
        assert!(whole(&letter(Content::Sent), Some(&page)) && whole(&letter(Content::Yours), None));
        assert!(!whole(&letter(Content::Sent), None) && !whole(&letter(Content::Yours), Some(&page)));
        assert!(!whole(&letter(Content::Sent), Some(&short)));
    }
}
