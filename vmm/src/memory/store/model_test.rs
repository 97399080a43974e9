//! Any history of stores, fetches, forgets, cuts, restarts with and without loss, drains and helpers that join, against
//! a map of what each page must hold.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use transport::buffer::Buffer;

use super::ask::{Ask, News, Outcome, What};
use super::copies::Role;
use super::core::{Core, Settings};
use super::health::Health;
use super::{Done, Urgency, placement};
use crate::memory::fault::{PAGE, Page, Pieces, Shards};
use crate::units::Bytes;

/// Pieces of RAM, every other of which is this handler's; and how many pages of each are used.
const PIECES: u64 = 8;
const USED: u64 = 10;
const PATIENCE: Duration = Duration::from_secs(10);

struct Random(u64);

impl Random {
    fn below(&mut self, most: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % most
    }

    fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }
}

/// A helper's PC, and the connection to it.
#[derive(Default)]
struct Pc {
    /// What it keeps for each page.
    pages: BTreeMap<u64, u64>,
    /// What it was asked and has not been heard to answer, in order; what it answered.
    asked: Vec<(Ask, Option<Outcome>)>,
    up: bool,
    file: bool,
    left: bool,
}

impl Pc {
    /// Carries out a request: stores and forgets in order, fetches at any time.
    fn work(&mut self, random: &mut Random) {
        let first = self
            .asked
            .iter()
            .position(|(ask, outcome)| outcome.is_none() && !matches!(ask.what, What::Fetch { .. }));
        let open = |index: usize, (ask, outcome): &(Ask, Option<Outcome>)| {
            outcome.is_none() && (matches!(ask.what, What::Fetch { .. }) || Some(index) == first)
        };
        let open: Vec<usize> =
            self.asked.iter().enumerate().filter(|(i, a)| open(*i, a)).map(|(i, _)| i).collect();
        if open.is_empty() {
            return;
        }
        let index = open[random.below(open.len())];
        let busy = random.one_in(20);
        let (ask, outcome) = &mut self.asked[index];
        *outcome = Some(match &ask.what {
            _ if busy => Outcome::Refused("busy".to_owned()),
            What::Fetch { first, count, .. } => {
                let pages = *first..*first + u64::from(*count);
                match pages.clone().find(|page| !self.pages.contains_key(page)) {
                    Some(absent) => Outcome::Absent(absent),
                    None => Outcome::Fetched(content(pages.map(|page| self.pages[&page]))),
                }
            }
            What::Store { first, content } => {
                for (page, version) in (*first..).zip(versions(content)) {
                    self.pages.insert(page, version);
                }
                Outcome::Done
            }
            What::Forget { ranges } => {
                ranges.iter().for_each(|range| self.pages.retain(|page, _| !range.contains(page)));
                Outcome::Done
            }
        });
    }
}

/// Pages that hold these versions.
fn content(versions: impl Iterator<Item = u64>) -> Buffer {
    let pages = versions.flat_map(|version| {
        let mut page = vec![0; PAGE];
        page[..8].copy_from_slice(&version.to_le_bytes());
        page[PAGE - 8..].copy_from_slice(&version.to_le_bytes());
        page
    });
    Buffer::from_vec(pages.collect())
}

fn versions(content: &Buffer) -> Vec<u64> {
    let bytes = content.to_vec();
    let number = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().expect("eight bytes"));
    let pages = bytes.chunks(PAGE).map(|page| (number(&page[..8]), number(&page[PAGE - 8..])));
    pages.map(|(head, tail)| if head == tail { head } else { panic!("a torn page") }).collect()
}

/// What the handler knows of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Known {
    Nothing,
    Kept(u64),
    Storing(u64),
    Fetching(u64),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Policy {
    None,
    Mirror,
    LocalDisk,
}

/// What happens to helpers.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// Anything.
    Any,
    /// One is lost only when everything has all its copies.
    OneByOne,
}

struct World {
    core: Core,
    pcs: Vec<Pc>,
    known: BTreeMap<u64, Known>,
    random: Random,
    now: Instant,
    version: u64,
    policy: Policy,
    fate: Fate,
    losses: u64,
    lost: u64,
    drained: u64,
}

impl World {
    fn new(seed: u64, policy: Policy, fate: Fate) -> Self {
        let now = Instant::now();
        let shards = Shards::new(Pieces::new(Bytes(PIECES << 24)), 2);
        let copies = if policy == Policy::Mirror { 2 } else { 1 };
        let local = policy == Policy::LocalDisk;
        let hedge = Duration::from_millis(250);
        let settings = Settings { copies, local, patience: PATIENCE, hedge };
        let health = Arc::new(Health::new(2).expect("an eventfd"));
        let mut world = Self {
            core: Core::new(shards, 1, settings, health, now),
            pcs: Vec::new(),
            known: BTreeMap::new(),
            random: Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1),
            now,
            version: 0,
            policy,
            fate,
            losses: 0,
            lost: 0,
            drained: 0,
        };
        (0..3).for_each(|_| world.join(false));
        if local {
            world.join(true);
        }
        let dealt = placement::deal(PIECES as u32, &[8, 8, 8], copies as u32).expect("there is room");
        world.core.deal(&dealt);
        world
    }

    fn join(&mut self, file: bool) {
        let name = format!("pc{}", self.pcs.len());
        let counters = Arc::default();
        self.core.health.add(&name, vec![(Arc::default(), None), (Arc::clone(&counters), None)]);
        self.core.add(&name, counters, 4, file, self.now);
        self.pcs.push(Pc { file, ..Pc::default() });
        if file {
            self.connect(self.pcs.len() - 1);
        }
    }

    fn pages(&self) -> Vec<u64> {
        let pieces = (1..PIECES).step_by(2);
        pieces.flat_map(|piece| piece * 4096..piece * 4096 + USED).collect()
    }

    fn known(&self, page: u64) -> Known {
        self.known.get(&page).copied().unwrap_or(Known::Nothing)
    }

    /// A run of pages of one piece to which `may` applies.
    fn run(&mut self, may: impl Fn(Known) -> bool) -> std::ops::Range<u64> {
        let pages = self.pages();
        let first = pages[self.random.below(pages.len())];
        let end = first - first % 4096 + USED;
        let most = first + 1 + self.random.below(6) as u64;
        let end = (first..end.min(most)).find(|page| !may(self.known(*page))).unwrap_or(end.min(most));
        first..end
    }

    fn guest(&mut self) {
        match self.random.below(10) {
            0..5 => {
                let run = self.run(|known| matches!(known, Known::Nothing | Known::Kept(_)));
                if run.is_empty() {
                    return;
                }
                let base = self.version;
                self.version += run.end - run.start;
                for (page, version) in run.clone().zip(base + 1..) {
                    self.known.insert(page, Known::Storing(version));
                }
                let pages = content((base + 1..).take((run.end - run.start) as usize));
                self.core.store(Page(run.start), pages, self.now);
            }
            5..9 => {
                let run = self.run(|known| matches!(known, Known::Kept(_)));
                self.fetch(run);
            }
            _ => {
                let run = self.run(|known| matches!(known, Known::Nothing | Known::Kept(_)));
                if !run.is_empty() {
                    self.core.forget(Page(run.start), (run.end - run.start) as u32, self.now);
                    self.known.extend(run.map(|page| (page, Known::Nothing)));
                }
            }
        }
        self.take_done();
    }

    fn fetch(&mut self, run: std::ops::Range<u64>) {
        if run.is_empty() {
            return;
        }
        for page in run.clone() {
            let Known::Kept(version) = self.known(page) else { panic!("not kept") };
            self.known.insert(page, Known::Fetching(version));
        }
        let urgency = if self.random.one_in(2) { Urgency::Fault } else { Urgency::Ahead };
        self.core.fetch(Page(run.start), (run.end - run.start) as u32, urgency, self.now);
    }

    fn take_done(&mut self) {
        for done in std::mem::take(&mut self.core.done) {
            match done {
                Done::Fetched { first, count, content } => {
                    let found = versions(&content);
                    assert_eq!(found.len(), count as usize);
                    for (page, found) in (first.0..).zip(found) {
                        let Known::Fetching(version) = self.known(page) else { panic!("answered twice") };
                        assert_eq!(found, version, "page {page} is stale");
                        self.known.insert(page, Known::Kept(version));
                    }
                }
                Done::Stored { first, count } => {
                    for page in first.0..first.0 + u64::from(count) {
                        let Known::Storing(version) = self.known(page) else { panic!("answered twice") };
                        self.known.insert(page, Known::Kept(version));
                    }
                }
                Done::Lost { first, count, why } => {
                    for page in first.0..first.0 + u64::from(count) {
                        self.check_loss(page, &why);
                    }
                }
            }
        }
    }

    /// Nothing is called lost that can still be had.
    fn check_loss(&mut self, page: u64, why: &str) {
        let (Known::Kept(version) | Known::Fetching(version)) = self.known(page) else {
            panic!("page {page} is {:?} and was lost: {why}", self.known(page));
        };
        assert!(self.losses > 0, "page {page}: {why}");
        assert!(self.fate == Fate::Any, "page {page} had another copy: {why}");
        if self.policy == Policy::None {
            // Others may have it and not have said so.
            let piece = &self.core.pieces[page as usize / 4096 / 2];
            let keeps = |place: usize| piece.find(place).is_some_and(|copy| copy.role == Role::Keeping);
            let has = |(place, pc): (usize, &Pc)| keeps(place) && pc.pages.get(&page) == Some(&version);
            let kept = self.pcs.iter().enumerate().position(has);
            assert_eq!(kept, None, "page {page} is there: {why}");
        }
        self.known.insert(page, Known::Nothing);
        self.lost += 1;
    }

    /// Hands the core's requests to the PCs.
    fn send(&mut self) {
        for (at, pc) in self.core.places.iter_mut().zip(&mut self.pcs) {
            if std::mem::take(&mut at.leave) {
                (pc.left, pc.up) = (true, false);
                pc.pages.clear();
                pc.asked.clear();
                self.drained += 1;
            }
            assert!(at.asks.is_empty() || !pc.left, "a place that left is asked");
            pc.asked.extend(at.asks.drain(..).map(|ask| (ask, None)));
        }
    }

    fn tick(&mut self, by: Duration) {
        self.now += by;
        self.core.tick(self.now);
        self.take_done();
        self.send();
    }

    fn news(&mut self, place: usize, news: News) {
        self.core.news(place, news, self.now);
        self.take_done();
    }

    fn work(&mut self, place: usize) {
        if self.pcs[place].up {
            self.pcs[place].work(&mut self.random);
        }
    }

    fn deliver(&mut self, place: usize) {
        let pc = &mut self.pcs[place];
        let ready: Vec<usize> = (0..pc.asked.len()).filter(|i| pc.asked[*i].1.is_some()).collect();
        if !pc.up || ready.is_empty() {
            return;
        }
        let (ask, outcome) = pc.asked.remove(ready[self.random.below(ready.len())]);
        self.news(place, News::Answer(ask.tag, outcome.expect("it is ready")));
    }

    fn connect(&mut self, place: usize) {
        let pc = &mut self.pcs[place];
        if !pc.up && !pc.left {
            pc.up = true;
            self.news(place, News::Here);
        }
    }

    /// The connection is cut; `restart`: the session is forgotten too, so that everything is sent again.
    fn cut(&mut self, place: usize, restart: bool) {
        let pc = &mut self.pcs[place];
        if pc.left || pc.file {
            return;
        }
        pc.up = false;
        for (ask, outcome) in &mut pc.asked {
            if restart || matches!(ask.what, What::Fetch { .. }) {
                *outcome = None;
            }
        }
        self.news(place, News::Away("cut".to_owned()));
    }

    /// Every page is good wherever its piece is kept, and pieces are kept as often as they should.
    fn whole(&self) -> bool {
        let copies = self.core.settings.copies + usize::from(self.core.settings.local);
        let files = self.core.places.iter().any(|at| at.file && at.left);
        self.core.fills.is_empty()
            && !self.core.repair
            && !files
            && self.core.pieces.iter().all(|piece| {
                let members = piece.members().filter(|copy| copy.role == Role::Keeping).count();
                let full = piece.members().all(|copy| piece.is_full(copy.slot));
                members >= copies && full
            })
            && self.known.values().all(|known| !matches!(known, Known::Storing(_)))
    }

    fn lose(&mut self, place: usize) {
        let pc = &mut self.pcs[place];
        if pc.left || self.fate == Fate::OneByOne && (!self.whole() || self.policy == Policy::None) {
            return;
        }
        let pc = &mut self.pcs[place];
        pc.pages.clear();
        pc.asked.clear();
        pc.up = false;
        self.losses += 1;
        if pc.file {
            pc.left = true;
            return self.news(place, News::Left("the disk fails".to_owned()));
        }
        self.news(place, News::Lost("killed".to_owned()));
    }

    fn drain(&mut self, place: usize) {
        let stay = self.core.places.iter().filter(|at| !at.left && !at.draining && !at.file).count();
        if stay > self.core.settings.copies && !self.pcs[place].file {
            self.core.drain(place);
        } else if self.pcs.len() < 12 {
            self.join(false);
        }
    }

    fn step(&mut self) {
        let place = self.random.below(self.pcs.len());
        let is_file = self.pcs[place].file;
        match self.random.below(400) {
            0..100 => self.guest(),
            100..200 => self.work(place),
            200..300 => self.deliver(place),
            300..340 => self.connect(place),
            340..348 => self.cut(place, false),
            348..352 => self.cut(place, true),
            352 | 353 if !is_file || self.random.one_in(8) => self.lose(place),
            354 => self.drain(place),
            355..358 => self.tick(Duration::from_secs(4)),
            _ => self.tick(Duration::from_millis(30)),
        }
    }

    fn waits(&self) -> bool {
        self.known.values().any(|known| matches!(known, Known::Storing(_) | Known::Fetching(_)))
    }

    /// Lets everything come to rest, with `but` out of reach.
    fn settle(&mut self, but: Option<usize>) {
        for _ in 0..4000 {
            for place in (0..self.pcs.len()).filter(|place| Some(*place) != but) {
                self.connect(place);
                for _ in 0..3 {
                    self.work(place);
                    self.deliver(place);
                }
            }
            self.tick(Duration::from_millis(20));
            let quiet = self.pcs.iter().all(|pc| !pc.up || pc.asked.is_empty());
            if !self.waits() && quiet && !self.core.wants_tick() && self.core.later.is_empty() {
                return;
            }
        }
        let waiting: Vec<_> =
            self.known.iter().filter(|(_, k)| !matches!(k, Known::Kept(_) | Known::Nothing)).collect();
        let (fills, repair, homeless) = (&self.core.fills, self.core.repair, &self.core.homeless);
        let asked: Vec<_> = self.pcs.iter().map(|pc| (pc.up, pc.left, pc.asked.len())).collect();
        panic!("something waits for ever: {waiting:?} {fills:?} {repair} {homeless:?} {asked:?}");
    }

    fn read_all(&mut self, but: Option<usize>) {
        for page in self.pages() {
            if matches!(self.known(page), Known::Kept(_)) {
                self.fetch(page..page + 1);
            }
        }
        self.settle(but);
    }

    /// The counters are what the PCs have.
    fn check_counters(&self) {
        for (place, (at, pc)) in self.core.places.iter().zip(&self.pcs).enumerate() {
            let counted = at.counters.pages.load(Ordering::Relaxed);
            let good = self.core.pieces.iter().filter_map(|piece| {
                let copy = piece.find(place)?;
                Some(
                    (0..USED as u32)
                        .filter(|page| piece.good(*page).is_some_and(|good| good.has(copy.slot)))
                        .count(),
                )
            });
            assert_eq!(counted, good.sum::<usize>() as u64, "place {place}");
            // Of pages that were lost, copies may be left that were never read.
            if !pc.file && self.lost == 0 {
                assert_eq!(pc.pages.len() as u64, counted, "nothing is left behind at place {place}");
            }
        }
    }
}

fn histories(policy: Policy, fate: Fate, seeds: std::ops::Range<u64>) -> (u64, u64, u64, u64) {
    let (mut losses, mut lost, mut drained, mut copied) = (0, 0, 0, 0);
    for seed in seeds {
        let world = std::panic::catch_unwind(|| {
            let mut world = World::new(seed, policy, fate);
            for _ in 0..6 {
                (0..400).for_each(|_| world.step());
                if policy == Policy::None {
                    world.settle(None);
                } else {
                    // One that never comes back is done without, once everything was whole.
                    world.settle(None);
                    world.tick(PATIENCE);
                    world.settle(None);
                    if !world.whole() {
                        continue;
                    }
                    let helpers: Vec<usize> =
                        (0..world.pcs.len()).filter(|place| !world.pcs[*place].file).collect();
                    let away = helpers[world.random.below(helpers.len())];
                    world.cut(away, false);
                    world.tick(PATIENCE);
                    world.settle(Some(away));
                    world.read_all(Some(away));
                    if fate == Fate::OneByOne {
                        world.settle(None);
                        let victim = helpers[world.random.below(helpers.len())];
                        world.lose(victim);
                        world.read_all(Some(victim));
                    }
                }
            }
            world.settle(None);
            world.read_all(None);
            world.check_counters();
            world
        });
        let Ok(world) = world else { panic!("the history with seed {seed} breaks {policy:?}") };
        losses += world.losses;
        lost += world.lost;
        drained += world.drained;
        let copies = world.core.places.iter().map(|at| at.counters.copied.load(Ordering::Relaxed));
        copied += copies.sum::<u64>();
    }
    (losses, lost, drained, copied)
}

#[test]
fn without_copies_no_page_is_stale_and_only_what_is_gone_is_called_lost() {
    let (losses, lost, drained, copied) = histories(Policy::None, Fate::Any, 1..50);
    assert!(losses > 100 && lost > 200 && drained > 50 && copied > 200, "{losses} {lost} {drained} {copied}");
}

#[test]
fn a_mirror_survives_one_loss_after_the_other_without_a_wrong_or_lost_page() {
    let (losses, lost, drained, copied) = histories(Policy::Mirror, Fate::OneByOne, 1..50);
    assert_eq!(lost, 0);
    assert!(losses > 100 && drained > 50 && copied > 500, "{losses} {drained} {copied}");
}

#[test]
fn a_mirror_is_never_stale_whatever_happens() {
    let (losses, lost, ..) = histories(Policy::Mirror, Fate::Any, 1..50);
    assert!(losses > 50 && lost > 10, "{losses} {lost}");
}

#[test]
fn a_local_copy_is_read_when_the_helper_is_lost_and_never_stale() {
    let (losses, lost, _, copied) = histories(Policy::LocalDisk, Fate::OneByOne, 1..30);
    assert_eq!(lost, 0);
    assert!(losses > 50 && copied > 500, "{losses} {copied}");
    histories(Policy::LocalDisk, Fate::Any, 200..220);
}
