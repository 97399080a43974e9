//! How long a page stays after it came, so that whoever needed it can use it before the next one gets it.
//!
//! A vCPU needs several pages at once for one instruction: code, stack, data, and on some processors its page tables to
//! write to. If each went before the last one came, and the other member's vCPU needs the same ones, neither would ever
//! run. So a page is held until the *thread* that needed it has run for a while, in all: the longer, the more pages it had to
//! get. Times are counted in
//! *units*, which follow what it takes to get a page that nobody holds. How long one took that somebody held tells nothing:
//! if that counted, each member's holds would lengthen the other's without end.
//!
//! Two members may each hold what the other one needs. Then the one that has been in need for longer keeps what it has
//! until it has run, and the other gives its page up unused ("wound-wait": Rosenkrantz, Stearns, Lewis, 1978). So whoever has
//! been in need for longest runs next, whatever the others do. All members agree on who that is, because needs are numbered
//! ([`Need`]). But a page is asked for once, for the first of a member's threads that needs it; if another one of them has
//! been in need for longer, nobody is told. Then patience ends, half of which is left to chance.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::ops::Range;
use std::time::{Duration, Instant};

use smallvec::SmallVec;

use super::ahead::{self, Companions, Streams};
use super::message::{Member, Right};
use super::wire::Need;

/// The least unit: about what a thread needs to be woken and to touch a page.
const LEAST: Duration = Duration::from_micros(50);
/// The greatest, whatever the network.
const MOST: Duration = Duration::from_millis(32);

/// A thread runs for so many units for each page that it had to get before, if it uses them all the while.
const RUN: u32 = 2;

/// Who needs a page again within so many units after it had to go was still using it.
const STILL: u32 = 4;

/// What [`Thread::worth`] is of a thread that uses its pages as long as it has them.
const FULL: u32 = 8;

/// How long somebody waits at least for a thread that has been in need for longer, in units.
const PATIENCE: u32 = 32;

/// So many pages that come along with one that a thread stands still for cost about as much as that one.
const ALONG: u32 = 8;

/// So many pages at most, the last ones, count as what a thread needs at once. Others are held for one unit.
const TOGETHER: usize = 64;

/// So many threads are known: those that stood still last.
const THREADS: usize = 64;

/// A page is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Hold {
    /// For this thread, if any stood still for it.
    thread: Option<u32>,
    /// Until then in any case.
    least: Instant,
    /// Another member waits for it.
    rival: Option<Rival>,
}

/// Who waits for a page that is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Rival {
    /// Since when it has been in need, and who it is.
    since: (Need, Member),
    /// Then its patience is over.
    patience: Instant,
}

/// When a hold is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct End {
    pub(super) at: Instant,
    /// Who needed the page will not have run.
    pub(super) unused: bool,
}

/// What a thread wants that stands still.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Wish {
    /// With this right.
    pub(super) right: Right,
    /// Other pages may come [along](Holds::along).
    pub(super) known: bool,
    /// Pages that it comes to soon; there may not be as many.
    pub(super) stream: Range<u32>,
}

/// One that touches RAM, and had to stand still.
struct Thread {
    id: u32,
    /// For this page, now.
    waits: Option<u32>,
    /// When it last could go on.
    since: Instant,
    /// So long it is to run in all,
    run: Duration,
    /// but so long now in any case: that is to be worth what it took to get the last page.
    piece: Duration,
    /// So long it ran before it last stood still.
    ran: Duration,
    /// What it needed since it had run for so long,
    needed: SmallVec<[u32; TOGETHER]>,
    /// since when,
    need: Need,
    /// and how often it stood still for it.
    stood: u32,
    /// How much of what it is to run for is worth it, of [`FULL`].
    worth: u32,
    /// What others got while it ran, and when.
    gave: SmallVec<[(u32, Instant); TOGETHER]>,
    companions: Companions,
    streams: Streams,
    /// Pages whose holds are to be looked at when it goes on.
    parked: SmallVec<[u32; TOGETHER]>,
}

impl Thread {
    /// Whether it needs `page`, or needed it lately: then it uses it when it runs, as long as it is here.
    fn uses(&self, page: u32) -> bool {
        self.needed.contains(&page) || self.companions.has(page)
    }

    /// When it will have run for as long as is worth it, if nothing stops it.
    fn end(&self) -> Instant {
        let run = self.run * self.worth / FULL;
        self.since + run.saturating_sub(self.ran).max(self.piece)
    }

    /// It stands still for `page`. If it did without it for a while, its pages need not stay for as long: a processor that is
    /// interrupted needs those of the kernel for a moment, and then runs a program that does not.
    fn learns(&mut self, page: u32, unit: Duration, now: Instant) {
        let Some(at) = self.gave.iter().position(|(gone, _)| *gone == page) else { return };
        let (_, gone) = self.gave.remove(at);
        let still = now.saturating_duration_since(gone) < unit * STILL;
        self.worth = if still { (self.worth * 2).clamp(1, FULL) } else { self.worth / 2 };
    }

    /// It needs `page` too. Holds for pages that it does not need any more are to be looked at.
    fn needs(&mut self, page: u32, queue: &mut BinaryHeap<Reverse<(Instant, u32)>>, now: Instant) {
        if self.needed.contains(&page) {
            return;
        }
        if self.needed.len() == TOGETHER {
            queue.push(Reverse((now, self.needed.remove(0))));
        }
        self.needed.push(page);
    }
}

/// The holds of a shard's pages, which are numbered.
pub(super) struct Holds {
    /// Pages, in the order in which their holds are to be looked at.
    queue: BinaryHeap<Reverse<(Instant, u32)>>,
    threads: Vec<Thread>,
    /// What it took of late, on average, to get a page; `None`: none came yet.
    pace: Option<Duration>,
    /// Of chance.
    seed: u64,
    me: Member,
    /// The latest need that this member has heard of.
    latest: Need,
}

impl Holds {
    pub(super) fn new(me: Member) -> Self {
        let mut seed = [1; 8];
        // Without randomness chance is the same at each start, which does no harm.
        let _ = getrandom::fill(&mut seed);
        let seed = u64::from_le_bytes(seed) | 1;
        let (queue, threads) = (BinaryHeap::new(), Vec::new());
        Self { queue, threads, pace: None, seed, me, latest: Need::default() }
    }

    /// Forgets all of them.
    pub(super) fn clear(&mut self) {
        self.queue.clear();
        self.threads.clear();
    }

    /// Another member's need, which came with a message.
    pub(super) fn heard_of(&mut self, need: Need) {
        if self.latest.before(need) {
            self.latest = need;
        }
    }

    fn unit(&self) -> Duration {
        self.pace.unwrap_or_default().clamp(LEAST, MOST)
    }

    /// A page came that nobody held, which took so long.
    pub(super) fn took(&mut self, time: Duration) {
        // A link that was cut says nothing about what it takes when it is whole.
        let time = time.min(MOST);
        self.pace = Some(self.pace.map_or(time, |pace| (pace * 7 + time) / 8));
    }

    /// The thread `id` stands still for `page`, to use it with `right`; `here`: it may be read already; `asked`: it is on
    /// its way.
    pub(super) fn needs(
        &mut self,
        id: u32,
        page: u32,
        right: Right,
        (here, asked): (bool, bool),
        now: Instant,
    ) -> Wish {
        self.waits(id, page, now);
        let thread = self.threads.iter_mut().find(|thread| thread.id == id);
        thread.map_or(Wish { right, known: false, stream: 0..0 }, |thread| {
            // What came along and not in time costs no more than what did.
            thread.stood -= u32::from(asked && thread.stood > 1);
            let (right, known) = thread.companions.needed(page, right, here);
            Wish { right, known, stream: thread.streams.needed(page) }
        })
    }

    fn waits(&mut self, id: u32, page: u32, now: Instant) {
        let unit = self.unit();
        let Self { queue, threads, latest, .. } = self;
        let Some(thread) = known(threads, id, now) else { return };
        thread.learns(page, unit, now);
        if thread.waits.is_none() {
            thread.ran += now.saturating_duration_since(thread.since);
        }
        if thread.ran >= thread.run {
            thread.needed.clear();
            *latest = latest.next();
            (thread.need, thread.ran, thread.stood) = (*latest, Duration::ZERO, 0);
        }
        thread.needs(page, queue, now);
        thread.stood += 1;
        thread.waits = Some(page);
    }

    /// `page`'s hold is over. If another member gets it while who needed it runs, that tells whether it still used it.
    pub(super) fn goes(&mut self, page: u32, hold: &Hold, now: Instant) {
        let wanted = hold.rival.and(hold.thread);
        let thread = self.threads.iter_mut().find(|thread| Some(thread.id) == wanted);
        if let Some(thread) = thread.filter(|thread| thread.waits.is_none()) {
            thread.gave.retain(|(gone, _)| *gone != page);
            if thread.gave.len() == TOGETHER {
                thread.gave.remove(0);
            }
            thread.gave.push((page, now));
        }
    }

    /// What may come along with `page`, for which the thread `id` stands still.
    pub(super) fn along(&self, id: u32, page: u32) -> SmallVec<[(u32, Right); ahead::MOST]> {
        let thread = self.threads.iter().find(|thread| thread.id == id);
        thread.map(|thread| thread.companions.of(page)).unwrap_or_default()
    }

    /// `page` is asked for, to come along with the one for which the thread `id` stands still.
    pub(super) fn comes(&mut self, id: u32, page: u32, now: Instant) {
        let Self { queue, threads, .. } = self;
        if let Some(thread) = threads.iter_mut().find(|thread| thread.id == id) {
            thread.needs(page, queue, now);
            thread.companions.comes(page);
        }
    }

    /// The thread `id` needs nothing for now; `true`: it held something.
    pub(super) fn rests(&mut self, id: u32, now: Instant) -> bool {
        let Some(thread) = self.threads.iter_mut().find(|thread| thread.id == id) else { return false };
        if thread.run.is_zero() && thread.needed.is_empty() {
            return false;
        }
        let pages = thread.needed.drain(..).chain(thread.parked.drain(..)).chain(thread.companions.all());
        self.queue.extend(pages.map(|page| Reverse((now, page))));
        (thread.waits, thread.stood) = (None, 0);
        (thread.run, thread.piece, thread.ran) = Default::default();
        true
    }

    /// Since when the first of those has been in need who stand still, and need `page`.
    pub(super) fn need(&self, page: u32) -> Need {
        let waiting =
            self.threads.iter().filter(|thread| thread.waits.is_some() && thread.needed.contains(&page));
        let first = waiting.map(|thread| thread.need).reduce(|a, b| if b.before(a) { b } else { a });
        first.unwrap_or(self.latest)
    }

    /// The thread `id` stood still, but not for a page that has to be got.
    pub(super) fn goes_on(&mut self, id: u32, now: Instant) {
        if let Some(thread) = self.threads.iter_mut().find(|thread| thread.id == id) {
            (thread.waits, thread.since) = (None, now);
        }
    }

    /// `page`, which is not held, is about to be ordered away: how it is held if somebody still uses it.
    pub(super) fn again(&self, page: u32, now: Instant) -> Option<Hold> {
        let uses = |thread: &&Thread| thread.uses(page) && (thread.waits.is_some() || now < thread.end());
        let thread = Some(self.threads.iter().find(uses)?.id);
        Some(Hold { thread, least: now, rival: None })
    }

    /// `page` came: who stands still for it goes on, and it is held.
    pub(super) fn begin(&mut self, page: u32, now: Instant) -> Hold {
        let unit = self.unit();
        let mut hold = Hold { thread: None, least: now + unit, rival: None };
        for thread in self.threads.iter_mut().filter(|thread| thread.waits == Some(page)) {
            let along = (thread.needed.len() as u32).saturating_sub(thread.stood);
            let many = (thread.stood + along.div_ceil(ALONG)).clamp(1, TOGETHER as u32);
            let run = unit * RUN * many;
            (thread.waits, thread.since, thread.run, thread.piece) = (None, now, run, unit * RUN);
            hold.thread = Some(thread.id);
            let end = thread.end();
            self.queue.extend(thread.parked.drain(..).map(|other| Reverse((end, other))));
        }
        if hold.thread.is_none() {
            let uses = |thread: &&Thread| thread.uses(page);
            hold.thread = self.threads.iter().find(uses).map(|thread| thread.id);
        }
        self.queue.push(Reverse((hold.least, page)));
        hold
    }

    /// Another member, in need since then, wants `page`, which is held.
    pub(super) fn wanted(&mut self, page: u32, hold: &mut Hold, since: (Need, Member), now: Instant) {
        let patience = self.unit() * PATIENCE;
        hold.rival = Some(Rival { since, patience: now + patience + patience.mul_f64(self.chance()) });
        self.look_again(page, hold);
    }

    /// When `page`'s hold is over, as things are; `None`: not before another member wants it or its thread goes on.
    pub(super) fn end(&self, page: u32, hold: &Hold) -> Option<End> {
        let thread = hold.thread.and_then(|id| self.threads.iter().find(|thread| thread.id == id));
        let thread = thread.filter(|thread| thread.uses(page));
        let used = |at| Some(End { at, unused: false });
        let unused = |at| Some(End { at, unused: true });
        match (thread, hold.rival) {
            (Some(thread), _) if thread.waits.is_none() => used(hold.least.max(thread.end())),
            (Some(Thread { waits: Some(other), need, .. }), rival) if *other != page => match rival? {
                Rival { since, .. } if earlier(since, (*need, self.me)) => unused(hold.least),
                Rival { patience, .. } => unused(hold.least.max(patience)),
            },
            // Nobody needs it, or who does needs it anew, to write to it.
            _ => used(hold.least),
        }
    }

    /// The hold of `page` is to be looked at when it will be over, as things are.
    pub(super) fn look_again(&mut self, page: u32, hold: &Hold) {
        if let Some(end) = self.end(page, hold) {
            self.queue.push(Reverse((end.at, page)));
        }
        // Patience may be over long after the thread went on, and ran.
        let stands = |thread: &&mut Thread| Some(thread.id) == hold.thread && thread.waits.is_some();
        if let Some(thread) = self.threads.iter_mut().find(stands)
            && !thread.parked.contains(&page)
        {
            thread.parked.push(page);
        }
    }

    /// From 0 to 1 (xorshift64, Marsaglia 2003).
    fn chance(&mut self) -> f64 {
        self.seed ^= self.seed << 13;
        self.seed ^= self.seed >> 7;
        self.seed ^= self.seed << 17;
        (self.seed >> 32) as f64 / f64::from(u32::MAX)
    }

    /// A page whose hold may be over. Ask until there is none.
    pub(super) fn due(&mut self, now: Instant) -> Option<u32> {
        self.queue.peek().filter(|Reverse((at, _))| *at <= now)?;
        self.queue.pop().map(|Reverse((_, page))| page)
    }

    /// When the next hold is to be looked at.
    pub(super) fn next(&self) -> Option<Instant> {
        self.queue.peek().map(|Reverse((at, _))| *at)
    }
}

/// Whether the first one has been in need for longer.
fn earlier((need, who): (Need, Member), (other, whom): (Need, Member)) -> bool {
    need.before(other) || need == other && who.number() < whom.number()
}

/// Finds a thread, or makes it known in place of the one that went on longest ago.
fn known(threads: &mut Vec<Thread>, id: u32, now: Instant) -> Option<&mut Thread> {
    let at = threads.iter().position(|thread| thread.id == id).or_else(|| {
        let (needed, parked) = (SmallVec::new(), SmallVec::new());
        let (run, piece, ran) = Default::default();
        let (companions, streams) = (Companions::default(), Streams::default());
        let (since, need, stood, waits) = (now, Need::default(), 0, None);
        let (worth, gave) = (FULL, SmallVec::new());
        let thread = Thread {
            id,
            waits,
            since,
            run,
            piece,
            ran,
            needed,
            need,
            stood,
            worth,
            gave,
            companions,
            streams,
            parked,
        };
        if threads.len() < THREADS {
            threads.push(thread);
            return Some(threads.len() - 1);
        }
        let runs = threads.iter().enumerate().filter(|(_, thread)| thread.waits.is_none());
        let (oldest, _) = runs.min_by_key(|(_, thread)| thread.since)?;
        threads[oldest] = thread;
        Some(oldest)
    });
    threads.get_mut(at?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ME: u32 = 77;

    fn member(number: u8) -> Member {
        Member::new(number).expect("small")
    }

    /// Holds whose unit is the least one, and now.
    fn holds() -> (Holds, Instant) {
        let mut holds = Holds::new(member(1));
        holds.took(LEAST);
        (holds, Instant::now())
    }

    fn used(at: Instant) -> Option<End> {
        Some(End { at, unused: false })
    }

    fn unused(at: Instant) -> Option<End> {
        Some(End { at, unused: true })
    }

    #[test]
    fn a_page_is_held_until_who_needed_it_has_run_as_long_as_its_pages_are_many() {
        let (mut holds, mut now) = holds();
        let mut held = Vec::new();
        for page in 0..5 {
            holds.waits(ME, page, now);
            now += Duration::from_millis(10);
            assert!(held.iter().all(|(page, hold)| holds.end(*page, hold).is_none()), "it has not run yet");
            held.push((page, holds.begin(page, now)));
        }
        assert!(held.iter().all(|(page, hold)| holds.end(*page, hold) == used(now + LEAST * RUN * 5)));
        now += Duration::from_secs(1);
        holds.waits(ME, 9, now);
        let hold = holds.begin(9, now);
        assert_eq!(holds.end(9, &hold), used(now + LEAST * RUN), "it had run: now it needs something else");
    }

    #[test]
    fn who_polls_one_page_holds_it_briefly_however_often_it_goes_to_and_fro() {
        let (mut holds, mut now) = holds();
        for _ in 0..100 {
            holds.waits(ME, 3, now);
            now += LEAST * 100;
            let hold = holds.begin(3, now);
            assert_eq!(holds.end(3, &hold), used(now + LEAST * RUN));
            now += LEAST * RUN;
        }
    }

    #[test]
    fn of_two_who_hold_what_the_other_needs_the_one_in_need_for_longer_keeps_it() {
        let (mut holds, now) = holds();
        holds.heard_of(Need(6));
        holds.waits(ME, 1, now);
        let mut hold = holds.begin(1, now + LEAST * 3);
        holds.waits(ME, 2, now + LEAST * 3);
        let asked = now + LEAST * 8;
        assert_eq!((holds.need(2), holds.need(1)), (Need(7), Need(7)));
        for earlier in [(Need(6), member(2)), (Need(7), member(0))] {
            holds.wanted(1, &mut hold, earlier, asked);
            assert_eq!(holds.end(1, &hold), unused(now + LEAST * 4), "to one who has been for longer");
        }
        for later in [(Need(7), member(2)), (Need(8), member(0))] {
            holds.wanted(1, &mut hold, later, asked);
            let end = holds.end(1, &hold).expect("patience ends");
            let patience = end.at - asked;
            assert!(
                end.unused && patience >= LEAST * PATIENCE && patience <= LEAST * PATIENCE * 2,
                "{patience:?}"
            );
        }
        holds.begin(2, asked);
        assert_eq!(holds.end(1, &hold), used(asked + LEAST * RUN * 2), "it runs now");
    }

    #[test]
    fn who_does_without_a_page_for_long_holds_the_next_ones_more_briefly() {
        let (mut holds, mut now) = holds();
        let rounds = |holds: &mut Holds, now: &mut Instant, without: Duration| {
            let mut last = Duration::ZERO;
            for _ in 0..5 {
                let mut held = Vec::new();
                for page in 0..5 {
                    holds.waits(ME, page, *now);
                    held.push((page, holds.begin(page, *now)));
                }
                for (page, hold) in &mut held {
                    holds.wanted(*page, hold, (Need(0), member(2)), *now);
                    last = holds.end(*page, hold).expect("it runs").at - *now;
                    holds.goes(*page, hold, *now + last);
                }
                *now += last + without;
            }
            last
        };
        assert_eq!(rounds(&mut holds, &mut now, LEAST), LEAST * RUN * 5, "it still uses them");
        assert_eq!(rounds(&mut holds, &mut now, LEAST * STILL * 2), LEAST * RUN, "it does not");
        assert_eq!(rounds(&mut holds, &mut now, LEAST), LEAST * RUN * 5, "again");
    }

    #[test]
    fn a_page_that_somebody_waits_for_is_looked_at_when_who_holds_it_goes_on() {
        let (mut holds, now) = holds();
        holds.waits(ME, 1, now);
        let mut hold = holds.begin(1, now);
        holds.waits(ME, 2, now);
        while holds.due(now + LEAST).is_some() {}
        holds.wanted(1, &mut hold, (Need(9), member(2)), now);
        holds.begin(2, now);
        let end = now + LEAST * RUN * 2;
        assert_eq!(holds.end(1, &hold), used(end));
        let due = std::iter::from_fn(|| holds.due(end)).filter(|page| *page == 1).count();
        assert!(due > 0, "and not only when patience is over");
    }

    #[test]
    fn who_needs_the_same_page_anew_does_not_keep_it_from_others() {
        let (mut holds, now) = holds();
        holds.waits(ME, 1, now);
        let mut hold = holds.begin(1, now);
        holds.waits(ME, 1, now + LEAST * 3);
        holds.wanted(1, &mut hold, (Need(0), member(0)), now + LEAST * 3);
        assert_eq!(holds.end(1, &hold), used(now + LEAST), "it was to be read and is to be written to");
    }

    #[test]
    fn holds_follow_what_it_takes_to_get_a_page() {
        let (mut holds, now) = holds();
        for _ in 0..50 {
            holds.took(Duration::from_millis(5));
        }
        let held = holds.begin(7, now).least - now;
        assert!(held > Duration::from_millis(4) && held <= Duration::from_millis(5), "{held:?}");
        holds.took(Duration::from_secs(60));
        assert!(holds.unit() < Duration::from_millis(10), "the link was cut");
    }

    #[test]
    fn holds_are_looked_at_when_they_may_be_over_and_when_their_thread_goes_on() {
        let (mut holds, now) = holds();
        holds.waits(ME, 1, now);
        let mut first = holds.begin(1, now);
        holds.waits(ME, 2, now);
        let due = |holds: &mut Holds, until| std::iter::from_fn(|| holds.due(until)).collect::<Vec<_>>();
        assert_eq!(due(&mut holds, now + LEAST), [1]);
        assert_eq!(holds.next(), None);
        holds.look_again(1, &first);
        assert_eq!(holds.next(), None, "nobody wants it");
        holds.wanted(1, &mut first, (Need(100), member(0)), now + LEAST * 3);
        let patience = holds.next().expect("somebody wants it");
        assert_eq!(holds.end(1, &first), unused(patience));
        holds.begin(2, now + LEAST * 4);
        let end = holds.end(1, &first).expect("its thread runs");
        assert!(!end.unused && end.at < patience);
        assert!(due(&mut holds, end.at).contains(&1));
    }

    #[test]
    fn who_needs_page_after_page_is_in_need_for_no_longer_than_until_it_has_run_for_its_time() {
        let (mut holds, mut now) = holds();
        let (mut longest, mut need, mut began) = (Duration::ZERO, Need::default(), now);
        for page in 0..1000 {
            holds.waits(ME, page % 100, now);
            if holds.need(page % 100) != need {
                (need, began) = (holds.need(page % 100), now);
            }
            longest = longest.max(now - began);
            now += LEAST * 3;
            holds.begin(page % 100, now);
            now += LEAST;
        }
        let time = LEAST * RUN * TOGETHER as u32;
        assert!(longest >= time && longest <= time * 5, "{longest:?}");
    }

    #[test]
    fn who_goes_from_page_to_page_holds_the_last_ones_only() {
        let (mut holds, now) = holds();
        let held = Vec::from_iter((0..TOGETHER as u32 + 3).map(|page| {
            holds.waits(ME, page, now);
            holds.begin(page, now)
        }));
        let longest = used(now + LEAST * RUN * TOGETHER as u32);
        for (page, hold) in (0..).zip(&held) {
            assert_eq!(holds.end(page, hold), if page < 3 { used(now + LEAST) } else { longest }, "{page}");
        }
        let looks = std::iter::from_fn(|| holds.due(now + Duration::from_secs(1))).count();
        assert!(looks <= held.len() + 3, "{looks} looks at {} pages", held.len());
    }

    #[test]
    fn who_rests_holds_nothing_for_longer_than_a_unit() {
        let (mut holds, now) = holds();
        let mut held = Vec::new();
        for page in 0..8 {
            holds.waits(ME, page, now);
            held.push(holds.begin(page, now));
        }
        assert!(holds.rests(ME, now) && !holds.rests(ME, now) && !holds.rests(5, now));
        assert!((0..).zip(&held).all(|(page, hold)| holds.end(page, hold) == used(now + LEAST)));
        let looked = std::iter::from_fn(|| holds.due(now)).collect::<Vec<_>>();
        assert!((0..8).all(|page| looked.contains(&page)), "all are looked at at once: {looked:?}");
    }

    #[test]
    fn what_comes_along_is_held_for_the_thread_that_stands_still() {
        let (mut holds, mut now) = holds();
        for page in 0..5 {
            let wish = holds.needs(ME, page, Right::Write, (false, false), now);
            assert!(wish.right == Right::Write && !wish.known, "{wish:?}");
            holds.begin(page, now);
            now += Duration::from_millis(10);
        }
        assert!(holds.needs(ME, 2, Right::Write, (false, false), now).known);
        let along = holds.along(ME, 2);
        assert_eq!(along.len(), 4);
        along.iter().for_each(|(page, _)| holds.comes(ME, *page, now));
        assert_eq!(holds.need(4), holds.need(2), "it is asked for on behalf of who is in need");
        let early = holds.begin(4, now);
        assert_eq!(holds.end(4, &early), None, "who needs it stands still");
        holds.begin(2, now + LEAST);
        assert_eq!(holds.end(4, &early), used(now + LEAST + LEAST * RUN * 2), "four pages count as one more");
    }

    #[test]
    fn what_a_thread_used_lately_is_held_again_while_it_runs_or_stands_still_for_another() {
        let (mut holds, mut now) = holds();
        for page in 0..3 {
            holds.needs(ME, page, Right::Write, (false, false), now);
            holds.begin(page, now);
        }
        assert!(holds.again(1, now).is_some() && holds.again(7, now).is_none());
        now += LEAST * RUN * 3;
        assert_eq!(holds.again(1, now), None, "it has run");
        holds.needs(ME, 9, Right::Write, (false, false), now);
        let hold = holds.again(1, now).expect("it stands still, and will use it");
        assert_eq!(holds.end(1, &hold), None);
        holds.begin(9, now);
        assert_eq!(holds.end(1, &hold), used(now + LEAST * RUN));
        holds.rests(ME, now);
        assert_eq!(holds.again(1, now), None);
    }

    #[test]
    fn only_so_many_threads_are_known_and_those_that_stand_still_stay() {
        let (mut holds, now) = holds();
        for id in 0..THREADS as u32 {
            holds.waits(id, id, now);
        }
        holds.waits(1000, 500, now);
        assert_eq!(holds.begin(500, now).thread, None, "all of the others stand still");
        assert_eq!(holds.begin(1, now).thread, Some(1));
        holds.waits(1000, 500, now + LEAST);
        assert_eq!(holds.begin(500, now).thread, Some(1000), "in place of one that went on");
        assert_eq!(holds.threads.len(), THREADS);
        holds.clear();
        assert_eq!((holds.threads.len(), holds.next()), (0, None));
    }
}
