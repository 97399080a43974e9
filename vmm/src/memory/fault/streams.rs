//! Which pages will be needed next, judged by the faults alone.
//!
//! A page that is here faults no more, so a stream is seen only where it meets pages that are not: at the edge of
//! what was asked for, or among pages that are still on their way. Both say that what lies before them was of use,
//! and the window, how far beyond a fault is asked, doubles. A fault some pages beyond the edge says that it was
//! not: the window halves, and the stream ends when nothing is left of it. Streams that no fault continues ask for
//! nothing more, and what they had asked for in vain is counted when their place is needed. While more than half is
//! in vain, it takes more faults in a row to open a stream.
//!
//! ```text
//! asked for before                  asked for now
//! |  used  | on their way or here |::::::::::::::|
//!          ^ fault                ^ edge         ^ fault + window
//! ```
//!
//! Many streams may run at once, forwards, backwards or in strides. What a fault continues is found by its place
//! alone, so it does not matter how streams interleave, nor which thread goes on with one. New ones are looked for
//! among the last faults of the same thread, where accesses of others do not hide them.
//!
//! Places are those of one shard ([`Shards::place`](super::Shards::place)), so that a stream that runs over the end
//! of a piece goes on in the next one of the shard. All tables are of fixed size; a fault costs no allocation.

use std::ops::{Deref, Range};

/// Pages in a run at most: 1 MiB.
pub const RUN: u32 = 256;
/// Runs in one answer at most.
const RUNS: usize = 32;
/// How many pages beyond a fault a stream asks at most: several runs, so that one can be on its way while another
/// is installed.
const DEPTH: u32 = 4 * RUN;
/// The same for a stream in strides, whose pages are asked for one by one.
const STRIDES: u32 = 32;
/// The window of a new stream.
const OPENING: u32 = 4;
/// The largest stride, in pages.
const LONGEST: i64 = 4096;
/// Streams that are followed at a time.
const STREAMS: usize = 16;
/// Threads whose faults are told apart.
const THREADS: usize = 8;
/// Faults that are remembered of each.
const RECENT: usize = 8;
/// How far a stream may jump over pages that are here.
const JUMP: i64 = 64;
/// The same between two faults that open one.
const NEAR: i64 = 16;
/// How many pages that are not here it may leave out.
const SKIP: usize = 2;
/// Fewer pages than this say nothing about whether fetching ahead pays.
const ENOUGH: u32 = 64;
/// Older pages count half after so many.
const MEMORY: u32 = 4096;

/// Pages that follow each other, in one piece.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Run {
    /// The place of the first in the shard.
    pub first: usize,
    /// How many, at most [`RUN`].
    pub count: u32,
}

/// What to fetch ahead, soonest needed first.
#[derive(Clone, Copy, Debug)]
pub struct Ahead {
    runs: [Run; RUNS],
    len: usize,
}

impl Ahead {
    const NOTHING: Self = Self { runs: [Run { first: 0, count: 0 }; RUNS], len: 0 };

    /// Adds a page; `false` if there is no room left.
    fn push(&mut self, page: usize, piece: usize) -> bool {
        if let Some(last) = self.len.checked_sub(1).and_then(|last| self.runs.get_mut(last))
            && last.count < RUN
            && last.first / piece == page / piece
        {
            let end = last.first + last.count as usize;
            if end == page || page + 1 == last.first {
                last.first = last.first.min(page);
                last.count += 1;
                return true;
            }
        }
        let Some(free) = self.runs.get_mut(self.len) else { return false };
        *free = Run { first: page, count: 1 };
        self.len += 1;
        true
    }
}

impl Deref for Ahead {
    type Target = [Run];

    fn deref(&self) -> &[Run] {
        self.runs.get(..self.len).unwrap_or_default()
    }
}

/// What became of pages that were asked for ahead. Those in neither count are not judged yet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Accuracy {
    /// Pages asked for.
    pub asked: u64,
    /// Of these: their stream went on beyond them.
    pub used: u64,
    /// Of these: their stream did not, or left them out.
    pub unused: u64,
}

/// A run of accesses that goes on in equal steps.
#[derive(Clone, Copy, Debug, Default)]
struct Stream {
    /// Where its last fault was.
    last: i64,
    /// The last page that it has asked for, or would have if it were not here.
    edge: i64,
    /// From one access to the next, in pages. 0: no stream.
    step: i64,
    /// How many steps beyond a fault it asks.
    window: u32,
    /// Pages that it has asked for and not reached.
    pending: u32,
    /// When its last fault was, in faults.
    at: u64,
}

/// Where a fault is seen from a stream that it continues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Landing {
    /// At or just behind its last fault.
    Again,
    /// So many steps on, on a page that is on its way.
    Inside(u32),
    /// Among what was asked for, on a page that has been given up since.
    Gone,
    /// Beyond what was asked for, with so many pages left out that are not here.
    Beyond(usize),
}

impl Stream {
    /// How `place` continues this stream, if it does.
    fn landing(&self, place: i64, away: &impl Fn(usize) -> bool) -> Option<Landing> {
        if self.step == 0 || (place - self.last) % self.step != 0 {
            return None;
        }
        let sequential = self.step.abs() == 1;
        let steps = (place - self.last) / self.step;
        let reach = (self.edge - self.last) / self.step;
        if steps <= 0 {
            let near = if sequential { NEAR / 2 } else { 0 };
            return (steps >= -near).then_some(Landing::Again);
        }
        if steps <= reach {
            let gone = away(place as usize);
            return Some(if gone { Landing::Gone } else { Landing::Inside(steps as u32) });
        }
        let gap = steps - reach - 1;
        if gap > if sequential { JUMP } else { SKIP as i64 } {
            return None;
        }
        let skipped = (1..=gap).filter(|step| away((self.edge + step * self.step) as usize)).count();
        (skipped <= SKIP).then_some(Landing::Beyond(skipped))
    }

    /// How many steps it asks ahead at most.
    fn depth(&self) -> u32 {
        if self.step.abs() == 1 { DEPTH } else { STRIDES }
    }

    /// What to ask for after a fault at `last`: of the pages in `window` that were not asked for before, those
    /// that are away, at most `room`.
    fn extend(&mut self, pages: i64, piece: usize, room: u32, away: &impl Fn(usize) -> bool) -> Ahead {
        let mut ahead = Ahead::NOTHING;
        let target = self.last + self.step * i64::from(self.window);
        let mut asked = 0;
        while asked < room && (target - self.edge) * self.step.signum() > 0 {
            let next = self.edge + self.step;
            if !(0..pages).contains(&next) {
                break;
            }
            if away(next as usize) {
                if !ahead.push(next as usize, piece) {
                    break;
                }
                asked += 1;
            }
            self.edge = next;
        }
        self.pending += asked;
        ahead
    }
}

/// The last faults of one thread, newest first.
#[derive(Clone, Copy, Debug)]
struct Faults {
    places: [i64; RECENT],
}

impl Faults {
    fn push(&mut self, place: i64) {
        self.places.rotate_right(1);
        self.places[0] = place;
    }

    fn has(&self, place: i64) -> bool {
        place >= 0 && self.places.contains(&place)
    }

    /// The step in which `place` follows earlier faults, three in a row with equal distances or two with nothing
    /// that is away between them; one more of each if `strict`.
    fn step(&self, place: i64, strict: bool, away: &impl Fn(usize) -> bool) -> Option<i64> {
        let follows = |from: i64, to: i64| {
            let (low, high) = (from.min(to), from.max(to));
            from >= 0 && low < high && high - low <= NEAR && (low + 1..high).all(|page| !away(page as usize))
        };
        for before in self.places.into_iter().filter(|before| *before >= 0) {
            let distance = place - before;
            let step = distance.signum();
            if follows(before, place) {
                let earlier = |first: &i64| (before - first).signum() == step && follows(*first, before);
                if !strict || self.places.iter().any(earlier) {
                    return Some(step);
                }
            }
            let stride = distance.abs() > 1 && distance.abs() <= LONGEST;
            let again = |times: i64| self.has(before - distance * times);
            if stride && again(1) && (!strict || again(2)) {
                return Some(distance);
            }
        }
        None
    }
}

/// The streams among the faults of one shard.
#[derive(Debug)]
pub struct Streams {
    pages: i64,
    piece: usize,
    streams: [Stream; STREAMS],
    threads: [Faults; THREADS],
    /// Faults so far.
    clock: u64,
    accuracy: Accuracy,
    /// Of the last pages asked for: used and unused.
    lately: (u32, u32),
}

impl Streams {
    /// Of a shard of so many pages, cut into pieces of `piece` pages.
    #[must_use]
    pub fn new(pages: usize, piece: u32) -> Self {
        Self {
            pages: pages as i64,
            piece: piece.max(1) as usize,
            streams: [Stream::default(); STREAMS],
            threads: [Faults { places: [-1; RECENT] }; THREADS],
            clock: 0,
            accuracy: Accuracy::default(),
            lately: (0, 0),
        }
    }

    /// A fault at `place` by `thread` (any number that tells threads apart; 0 if unknown). To be told of every fault
    /// on a page that is not here, whether it has been asked for or not. `away` says of a page whether it is
    /// neither here nor on its way; of `place` itself, whether it was so before this fault. Answers what to fetch
    /// besides `place`: at most `room` pages, all of them away.
    pub fn fault(&mut self, place: usize, thread: u32, room: u32, away: impl Fn(usize) -> bool) -> Ahead {
        let at = place as i64;
        if at >= self.pages {
            return Ahead::NOTHING;
        }
        self.clock += 1;
        let landed = self.continued(at, &away);
        // From now on, the fault's own page is on its way.
        let away = |page: usize| page != place && away(page);
        if let Some((index, landing)) = landed {
            return self.go_on(index, landing, at, thread, room, &away);
        }
        let strict = self.lately.0 + self.lately.1 >= ENOUGH && self.lately.0 < self.lately.1;
        let faults = &mut self.threads[thread as usize % THREADS];
        let step = faults.step(at, strict, &away);
        faults.push(at);
        let Some(step) = step else { return Ahead::NOTHING };
        let stream = Stream { last: at, edge: at, step, window: OPENING, pending: 0, at: self.clock };
        let slot = self.free();
        self.streams[slot] = stream;
        self.extend(slot, room, &away)
    }

    /// A page that was fetched ahead was given up without ever having been touched: wherever that can be seen.
    pub fn unused(&mut self, place: usize) {
        let at = place as i64;
        let behind = |stream: &&mut Stream| {
            stream.step != 0
                && (0..4 * i64::from(DEPTH)).contains(&((stream.edge - at) * stream.step.signum()))
        };
        if let Some(stream) = self.streams.iter_mut().find(behind) {
            stream.window = (stream.window / 2).max(1);
        }
        self.note(0, 1);
    }

    /// What became of what was asked for.
    #[must_use]
    pub fn accuracy(&self) -> Accuracy {
        self.accuracy
    }

    /// The stream that a fault continues: the one whose last fault is nearest.
    fn continued(&self, place: i64, away: &impl Fn(usize) -> bool) -> Option<(usize, Landing)> {
        let found = self.streams.iter().enumerate();
        let found = found.filter_map(|(index, stream)| Some((index, stream.landing(place, away)?)));
        found.min_by_key(|(index, landing)| {
            (*landing == Landing::Again, (place - self.streams[*index].last).abs())
        })
    }

    fn go_on(
        &mut self,
        index: usize,
        landing: Landing,
        place: i64,
        thread: u32,
        room: u32,
        away: &impl Fn(usize) -> bool,
    ) -> Ahead {
        let stream = &mut self.streams[index];
        stream.at = self.clock;
        let (used, unused) = match landing {
            Landing::Again => return Ahead::NOTHING,
            Landing::Inside(steps) => (stream.pending.min(steps), 0),
            Landing::Beyond(0) => (stream.pending, 0),
            Landing::Beyond(_) | Landing::Gone => (0, stream.pending),
        };
        stream.pending -= used + unused;
        stream.last = place;
        let growing = matches!(landing, Landing::Inside(_) | Landing::Beyond(0));
        stream.window = if growing { (stream.window * 2).min(stream.depth()) } else { stream.window / 2 };
        if let Landing::Beyond(_) | Landing::Gone = landing {
            stream.edge = place;
        }
        let closed = stream.window == 0;
        if closed {
            *stream = Stream::default();
        }
        // What is asked for while more is on its way is worth a request of some size.
        let left = ((stream.edge - place) / stream.step.abs().max(1)).unsigned_abs();
        let worthwhile =
            u64::from(stream.window).saturating_sub(left) >= u64::from((stream.window / 4).max(1));
        self.note(used, unused);
        if closed {
            self.threads[thread as usize % THREADS].push(place);
        }
        if closed || !worthwhile { Ahead::NOTHING } else { self.extend(index, room, away) }
    }

    fn extend(&mut self, index: usize, room: u32, away: &impl Fn(usize) -> bool) -> Ahead {
        let stream = &mut self.streams[index];
        let before = stream.pending;
        let ahead = stream.extend(self.pages, self.piece, room, away);
        self.accuracy.asked += u64::from(stream.pending - before);
        ahead
    }

    /// The slot that has been idle for longest, emptied.
    fn free(&mut self) -> usize {
        let oldest = self.streams.iter().enumerate().min_by_key(|(_, stream)| (stream.step != 0, stream.at));
        let index = oldest.map_or(0, |(index, _)| index);
        let unused = self.streams[index].pending;
        self.note(0, unused);
        index
    }

    /// Counts pages of which is known whether they were of use.
    fn note(&mut self, used: u32, unused: u32) {
        self.accuracy.used += u64::from(used);
        self.accuracy.unused += u64::from(unused);
        self.lately = (self.lately.0 + used, self.lately.1 + unused);
        if self.lately.0 + self.lately.1 > MEMORY {
            self.lately = (self.lately.0 / 2, self.lately.1 / 2);
        }
    }
}

/// The places that an answer names.
pub fn places(ahead: &Ahead) -> impl Iterator<Item = Range<usize>> + '_ {
    ahead.iter().map(|run| run.first..run.first + run.count as usize)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    const PIECE: u32 = 4096;

    /// A shard whose pages are all away at first, and come as soon as they are asked for.
    struct Shard {
        streams: Streams,
        here: HashSet<usize>,
        faults: usize,
        fetched: usize,
    }

    impl Shard {
        fn new(pages: usize) -> Self {
            Self { streams: Streams::new(pages, PIECE), here: HashSet::new(), faults: 0, fetched: 0 }
        }

        /// Touches a page; what was asked for ahead because of it.
        fn touch(&mut self, place: usize, thread: u32) -> Ahead {
            if self.here.contains(&place) {
                return Ahead::NOTHING;
            }
            self.faults += 1;
            let ahead = self.streams.fault(place, thread, u32::MAX, |page| !self.here.contains(&page));
            self.here.insert(place);
            for page in places(&ahead).flatten() {
                assert!(self.here.insert(page), "{page} was away");
                self.fetched += 1;
            }
            ahead
        }
    }

    #[test]
    fn a_sequential_stream_opens_with_its_second_fault_and_soon_needs_few() {
        let mut shard = Shard::new(1 << 16);
        assert!(shard.touch(1000, 1).is_empty());
        assert_eq!(*shard.touch(1001, 1), [Run { first: 1002, count: OPENING }]);
        for page in 1002..1000 + 8192 {
            shard.touch(page, 1);
        }
        assert!(shard.faults <= 8192 / 100, "{} faults for 8192 pages", shard.faults);
        assert!(shard.fetched <= 8192 + DEPTH as usize);
        let accuracy = shard.streams.accuracy();
        assert_eq!(accuracy.unused, 0);
        assert!(accuracy.used + u64::from(DEPTH) >= accuracy.asked, "{accuracy:?}");
    }

    #[test]
    fn a_backward_stream_is_as_good() {
        let mut shard = Shard::new(1 << 16);
        for page in (5000..5000 + 8192).rev() {
            shard.touch(page, 1);
        }
        assert!(shard.faults <= 8192 / 100, "{} faults for 8192 pages", shard.faults);
        for page in (0..200).rev() {
            shard.touch(page, 1); // to the very beginning, and not beyond it
        }
    }

    #[test]
    fn strides_are_followed_without_what_lies_between() {
        for stride in [2, 3, 8, 17, 512] {
            let mut shard = Shard::new(1 << 20);
            for turn in 0..1000 {
                shard.touch(10 + turn * stride, 1);
            }
            assert!(shard.faults <= 100, "stride {stride}: {} faults for 1000 pages", shard.faults);
            assert!(
                shard.fetched <= 1000 + STRIDES as usize,
                "stride {stride}: {} pages fetched",
                shard.fetched
            );
        }
    }

    #[test]
    fn interleaved_streams_of_one_thread_and_of_many_are_told_apart() {
        for threads in [1, 4] {
            let mut shard = Shard::new(1 << 18);
            for turn in 0..2000 {
                shard.touch(turn, 0);
                shard.touch(60_000 + turn, 1 % threads);
                shard.touch(200_000 - turn, 2 % threads);
                shard.touch(210_000 + turn * 5, 3 % threads);
            }
            assert!(shard.faults <= 8000 / 20, "{threads} threads: {} faults for 8000 pages", shard.faults);
        }
    }

    #[test]
    fn pages_that_are_here_already_do_not_end_a_stream() {
        let mut shard = Shard::new(1 << 16);
        let mut seed = 7_u64;
        let mut random = move |bound: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) % bound
        };
        shard.here.extend((0..8192).filter(|_| random(2) == 0));
        let away = 8192 - shard.here.len();
        for page in 0..8192 {
            shard.touch(page, 1);
        }
        assert!(shard.faults <= away / 20, "{} faults for {away} pages", shard.faults);
    }

    #[test]
    fn a_fault_on_a_page_that_is_on_its_way_asks_for_more_before_the_stream_runs_dry() {
        let mut streams = Streams::new(1 << 16, PIECE);
        let (mut edge, mut place) = (0, 0);
        let mut asked = HashSet::new();
        for _ in 0..64 {
            let ahead = streams.fault(place, 1, u32::MAX, |page| !asked.contains(&page));
            for page in places(&ahead).flatten() {
                asked.insert(page);
                edge = edge.max(page);
            }
            // The link is slow: of what is on its way, each time but a few pages come before the next fault.
            place += 1 + edge.saturating_sub(place) / 8;
        }
        assert!(edge - place > RUN as usize, "{} pages are still on their way", edge - place);
    }

    #[test]
    fn random_and_zipfian_accesses_open_next_to_nothing() {
        let mut seed = 1_u64;
        let mut random = move || {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            (seed >> 11) as f64 / (1_u64 << 53) as f64
        };
        for skew in [1.0, 3.0] {
            let pages = 1 << 16;
            let mut shard = Shard::new(pages);
            for turn in 0..40_000 {
                // A power of a uniform number: a few pages take most accesses.
                let rank = (random().powf(skew) * pages as f64) as usize;
                shard.touch((rank.wrapping_mul(40_503)) % pages, 1);
                if turn % 2 == 0 {
                    shard.here.retain(|page| page % 97 != turn % 97); // pages leave, too
                }
            }
            let share = shard.fetched as f64 / shard.faults as f64;
            assert!(share < 0.01, "{} pages fetched ahead at {} faults", shard.fetched, shard.faults);
        }
    }

    #[test]
    fn a_stream_that_leaves_out_what_was_fetched_closes() {
        let mut streams = Streams::new(1 << 20, PIECE);
        let mut fetched = 0;
        let mut place = 0;
        for turn in 0..400 {
            // Pairs of neighbours, each followed by a jump: every pair looks like a beginning.
            let ahead = streams.fault(place, 1, u32::MAX, |_| true);
            fetched += places(&ahead).flatten().count();
            place += if turn % 2 == 0 { 1 } else { 1000 + turn * 7 };
        }
        let accuracy = streams.accuracy();
        assert!(accuracy.unused > accuracy.used);
        assert!(fetched <= 4 * ENOUGH as usize, "{fetched} pages fetched in vain");
    }

    #[test]
    fn pages_found_untouched_halve_the_window_of_their_stream() {
        let mut shard = Shard::new(1 << 16);
        let mut last = Ahead::NOTHING;
        for page in 0..4000 {
            let ahead = shard.touch(page, 1);
            last = if ahead.is_empty() { last } else { ahead };
        }
        let before: u32 = last.iter().map(|run| run.count).sum();
        for page in 3000..3005 {
            shard.streams.unused(page);
        }
        let mut page = 4000;
        let after = loop {
            let ahead = shard.touch(page, 1);
            page += 1;
            if !ahead.is_empty() {
                break ahead.iter().map(|run| run.count).sum::<u32>();
            }
        };
        assert!(after < before / 4, "{before} pages at a time before, {after} after");
    }

    proptest! {
        #[test]
        fn whatever_faults_no_answer_leaves_the_shard_a_piece_or_its_bounds(
            pages in 1_usize..20_000,
            piece in 1_u32..5000,
            faults in prop::collection::vec((0_usize..20_100, 0_u32..6, 0_u32..2000, 0_usize..40, 1_usize..9), 1..60),
        ) {
            let mut streams = Streams::new(pages, piece);
            for (start, thread, room, length, step) in faults {
                for turn in 0..length {
                    let place = start + turn * step;
                    let ahead = streams.fault(place, thread, room, |page| page % 11 != 3);
                    let mut seen = HashSet::new();
                    for run in ahead.iter() {
                        prop_assert!(run.count >= 1 && run.count <= RUN);
                        let end = run.first + run.count as usize - 1;
                        prop_assert!(end < pages, "{run:?} of {pages}");
                        prop_assert_eq!(run.first / piece as usize, end / piece as usize);
                    }
                    for page in places(&ahead).flatten() {
                        prop_assert!(seen.insert(page) && page != place && page % 11 != 3, "{}", page);
                    }
                    prop_assert!(seen.len() <= room.min(DEPTH) as usize);
                    if turn % 5 == 0 {
                        streams.unused(place / 2);
                    }
                }
                let accuracy = streams.accuracy();
                prop_assert!(accuracy.used <= accuracy.asked);
            }
        }
    }
}
