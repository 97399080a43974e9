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
//! been in need for longest runs next, whatever the others do. Where two take themselves for the older one, which is possible
//! because times come by messages, the one whose patience ends first gives way: half of that is left to chance.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::{Duration, Instant};

use smallvec::SmallVec;

/// The least unit: about what a thread needs to be woken and to touch a page.
const LEAST: Duration = Duration::from_micros(50);
/// The greatest, whatever the network.
const MOST: Duration = Duration::from_millis(32);

/// A thread runs for so many units for each page that it had to get before.
const RUN: u32 = 2;

/// How long one of two who both take themselves for the older one waits for the other, in units.
const PATIENCE: u32 = 32;

/// So many pages at most, the last ones, count as what a thread needs at once. Others are held for one unit.
const TOGETHER: usize = 16;

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
    /// Since when it has been in need.
    since: Instant,
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

/// One that touches RAM, and had to stand still.
struct Thread {
    id: u32,
    /// For this page, now.
    waits: Option<u32>,
    /// When it last could go on.
    since: Instant,
    /// So long it is to run in all,
    run: Duration,
    /// and so long it ran before it last stood still.
    ran: Duration,
    /// What it needed since it had run for so long,
    needed: SmallVec<[u32; TOGETHER]>,
    /// and since when.
    need: Instant,
    /// Pages whose holds are to be looked at when it goes on.
    parked: SmallVec<[u32; TOGETHER]>,
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
}

impl Holds {
    pub(super) fn new() -> Self {
        let mut seed = [1; 8];
        // Without randomness chance is the same at each start, which does no harm.
        let _ = getrandom::fill(&mut seed);
        let seed = u64::from_le_bytes(seed) | 1;
        Self { queue: BinaryHeap::new(), threads: Vec::new(), pace: None, seed }
    }

    /// Forgets all of them.
    pub(super) fn clear(&mut self) {
        self.queue.clear();
        self.threads.clear();
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

    /// The thread `id` stands still for `page`.
    pub(super) fn waits(&mut self, id: u32, page: u32, now: Instant) {
        let Self { queue, threads, .. } = self;
        let Some(thread) = known(threads, id, now) else { return };
        if thread.waits.is_none() {
            thread.ran += now.saturating_duration_since(thread.since);
        }
        if thread.ran >= thread.run {
            thread.needed.clear();
            (thread.need, thread.ran) = (now, Duration::ZERO);
        }
        if !thread.needed.contains(&page) {
            if thread.needed.len() == TOGETHER {
                queue.push(Reverse((now, thread.needed.remove(0))));
            }
            thread.needed.push(page);
        }
        thread.waits = Some(page);
    }

    /// The thread `id` needs nothing for now; `true`: it held something.
    pub(super) fn rests(&mut self, id: u32, now: Instant) -> bool {
        let Some(thread) = self.threads.iter_mut().find(|thread| thread.id == id) else { return false };
        let held = !thread.needed.is_empty();
        let pages = thread.needed.drain(..).chain(thread.parked.drain(..));
        self.queue.extend(pages.map(|page| Reverse((now, page))));
        (thread.waits, thread.run, thread.ran) = (None, Duration::ZERO, Duration::ZERO);
        held
    }

    /// For how long those who stand still for `page` have been in need.
    pub(super) fn need(&self, page: u32, now: Instant) -> Duration {
        let waiting = self.threads.iter().filter(|thread| thread.waits == Some(page));
        waiting.map(|thread| now.saturating_duration_since(thread.need)).max().unwrap_or_default()
    }

    /// The thread `id` stood still, but not for a page that has to be got.
    pub(super) fn goes_on(&mut self, id: u32, now: Instant) {
        if let Some(thread) = self.threads.iter_mut().find(|thread| thread.id == id) {
            (thread.waits, thread.since) = (None, now);
        }
    }

    /// `page` came: who stands still for it goes on, and it is held.
    pub(super) fn begin(&mut self, page: u32, now: Instant) -> Hold {
        let unit = self.unit();
        let mut hold = Hold { thread: None, least: now + unit, rival: None };
        for thread in self.threads.iter_mut().filter(|thread| thread.waits == Some(page)) {
            let run = unit * RUN * thread.needed.len().max(1) as u32;
            (thread.waits, thread.since, thread.run) = (None, now, run);
            hold.thread = Some(thread.id);
            let end = now + run.saturating_sub(thread.ran);
            self.queue.extend(thread.parked.drain(..).map(|other| Reverse((end, other))));
        }
        self.queue.push(Reverse((hold.least, page)));
        hold
    }

    /// Another member, in need since then, wants `page`, which is held.
    pub(super) fn wanted(&mut self, page: u32, hold: &mut Hold, since: Instant, now: Instant) {
        let patience = self.unit() * PATIENCE;
        hold.rival = Some(Rival { since, patience: now + patience + patience.mul_f64(self.chance()) });
        self.look_again(page, hold);
    }

    /// When `page`'s hold is over, as things are; `None`: not before another member wants it or its thread goes on.
    pub(super) fn end(&self, page: u32, hold: &Hold) -> Option<End> {
        let thread = hold.thread.and_then(|id| self.threads.iter().find(|thread| thread.id == id));
        let thread = thread.filter(|thread| thread.needed.contains(&page));
        let used = |at| Some(End { at, unused: false });
        let unused = |at| Some(End { at, unused: true });
        match (thread, hold.rival) {
            (Some(Thread { waits: None, since, run, ran, .. }), _) => {
                used(hold.least.max(*since + run.saturating_sub(*ran)))
            }
            (Some(Thread { waits: Some(other), need, .. }), rival) if *other != page => match rival? {
                Rival { since, .. } if since < *need => unused(hold.least),
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
        } else if let Some(thread) = self.threads.iter_mut().find(|thread| Some(thread.id) == hold.thread)
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

/// Finds a thread, or makes it known in place of the one that went on longest ago.
fn known(threads: &mut Vec<Thread>, id: u32, now: Instant) -> Option<&mut Thread> {
    let at = threads.iter().position(|thread| thread.id == id).or_else(|| {
        let (needed, parked) = (SmallVec::new(), SmallVec::new());
        let (run, ran) = (Duration::ZERO, Duration::ZERO);
        let thread = Thread { id, waits: None, since: now, run, ran, needed, need: now, parked };
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

    /// Holds whose unit is the least one, and now.
    fn holds() -> (Holds, Instant) {
        let mut holds = Holds::new();
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
        holds.waits(ME, 1, now);
        let mut hold = holds.begin(1, now + LEAST * 3);
        holds.waits(ME, 2, now + LEAST * 3);
        let asked = now + LEAST * 8;
        assert_eq!((holds.need(2, asked), holds.need(1, asked)), (LEAST * 8, Duration::ZERO));
        holds.wanted(1, &mut hold, now - LEAST, asked);
        assert_eq!(holds.end(1, &hold), unused(now + LEAST * 4), "to one who has been for longer");
        holds.wanted(1, &mut hold, now + LEAST, asked);
        let end = holds.end(1, &hold).expect("patience ends");
        let patience = end.at - asked;
        assert!(
            end.unused && patience >= LEAST * PATIENCE && patience <= LEAST * PATIENCE * 2,
            "{patience:?}"
        );
        holds.begin(2, asked);
        assert_eq!(holds.end(1, &hold), used(asked + LEAST * RUN * 2), "it runs now");
    }

    #[test]
    fn who_needs_the_same_page_anew_does_not_keep_it_from_others() {
        let (mut holds, now) = holds();
        holds.waits(ME, 1, now);
        let mut hold = holds.begin(1, now);
        holds.waits(ME, 1, now + LEAST * 3);
        holds.wanted(1, &mut hold, now, now + LEAST * 3);
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
        holds.wanted(1, &mut first, now + LEAST, now + LEAST * 3);
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
        let mut longest = Duration::ZERO;
        for page in 0..1000 {
            holds.waits(ME, page % 100, now);
            longest = longest.max(holds.need(page % 100, now));
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
        assert_eq!(std::iter::from_fn(|| holds.due(now)).count(), held.len(), "all are looked at at once");
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
