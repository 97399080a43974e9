#![allow(clippy::single_range_in_vec_init, reason = "lists of ranges, some of one")]

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;
use crate::lease::Holder;

/// Two parts and a bit.
const PAGES: u64 = 2 * PART + 70;

fn record(pages: u64) -> Record {
    let holder = Holder { id: 7, name: "desktop".into(), node: Some("desk".into()) };
    Record { version: record::VERSION, epoch: 3, instance: 9 << 70, pages, holder }
}

fn store(quota: u64) -> Arc<Store> {
    Arc::new(Store::create(&record(PAGES), quota, false).expect("memory is left"))
}

/// `count` pages that differ from each other and by `seed`.
fn content(first: u64, count: u64, seed: u8) -> Vec<u8> {
    (first..first + count).flat_map(|page| page_of(page, seed)).collect()
}

fn page_of(page: u64, seed: u8) -> [u8; PAGE as usize] {
    let mut bytes = [seed; PAGE as usize];
    bytes[..8].copy_from_slice(&page.to_le_bytes());
    bytes
}

fn put(store: &Store, first: u64, count: u64, seed: u8) -> Result<(), Refused> {
    store.store(first, &Buffer::from_vec(content(first, count, seed)))
}

/// The same file, as another process would find it.
fn again(store: &Store) -> Arc<Store> {
    let fd = store.mapping().fd().try_clone_to_owned().expect("a descriptor is left");
    let mapping = Mapping::of(fd).expect("it maps");
    let (found, store) = Store::adopt(mapping, false).expect("it is one").expect("its lease goes on");
    assert_eq!(found, record(PAGES));
    Arc::new(store)
}

/// The memory that the pages take, beside what their table takes.
fn taken(store: &Store) -> u64 {
    // A part of the table that nothing is noted in takes none; looking at it changes that.
    let _ = (0..PAGES).step_by(8 * PAGE as usize).filter(|page| store.is_set(*page)).count();
    let table = store.layout.len() - store.layout.bits();
    (store.mapping.taken().expect("it says") - table) / PAGE
}

#[test]
fn what_is_stored_is_fetched_and_what_is_not_is_absent() {
    let store = store(PAGES);
    let across = PART - 2;
    put(&store, across, 4, 5).expect("it stores");
    assert_eq!(store.fetch(across, 4).expect("held").to_vec(), content(across, 4, 5));
    assert_eq!(store.fetch(across + 1, 2).expect("held").to_vec(), content(across + 1, 2, 5));
    for (first, count, absent) in
        [(0, 1, 0), (across, 5, across + 4), (across - 3, 5, across - 3), (2 * PART - 1, 2, 2 * PART - 1)]
    {
        assert_eq!(store.fetch(first, count).expect_err("not held"), Refused::Absent(absent));
    }
    assert_eq!((store.used(), taken(&store)), (4, 4), "refused fetches leave nothing behind");
    let seen = (store.fetched.load(Ordering::Relaxed), store.stored.load(Ordering::Relaxed));
    assert_eq!(seen, (6, 4));
}

#[test]
fn pages_outside_the_ram_are_refused_whatever_the_numbers() {
    let store = store(PAGES);
    for (first, count) in [(PAGES, 1), (PAGES - 1, 2), (u64::MAX, 1), (u64::MAX - 1, 2), (0, 0), (0, 257)] {
        assert!(matches!(store.fetch(first, count), Err(Refused::OutOfRange(_))), "{first} {count}");
    }
    for (first, len) in
        [(PAGES - 1, 2 * PAGE), (u64::MAX, PAGE), (0, 0), (0, 257 * PAGE), (0, PAGE + 1), (0, 100)]
    {
        let content = Buffer::zeroed(len as usize);
        assert!(matches!(store.store(first, &content), Err(Refused::OutOfRange(_))), "{first} {len}");
    }
    #[expect(clippy::reversed_empty_ranges, reason = "the wire's decoder refuses it, and the store does too")]
    for ranges in
        [&[0..PAGES + 1][..], &[5..5], &[6..5], &[0..u64::MAX], &[0..PAGES, 0..1], &[3..4, 0..PAGES]]
    {
        assert!(matches!(store.forget(ranges), Err(Refused::OutOfRange(_))), "{ranges:?}");
    }
    store.forget(&[0..PAGES]).expect("all there is");
    assert_eq!((store.used(), taken(&store)), (0, 0));
}

#[test]
fn a_full_quota_refuses_new_pages_as_a_whole_and_still_takes_old_ones() {
    let store = store(3);
    put(&store, PART - 1, 2, 1).expect("it stores");
    assert!(matches!(put(&store, PART - 2, 3, 2), Ok(())), "one more, and two old ones");
    assert!(matches!(put(&store, PART - 3, 4, 3), Err(Refused::Full(_))));
    assert!(matches!(put(&store, PART - 1, 3, 3), Err(Refused::Full(_))), "the old ones come first");
    assert_eq!(store.fetch(PART - 2, 3).expect("held").to_vec(), content(PART - 2, 3, 2), "as they were");
    assert_eq!((store.used(), taken(&store)), (3, 3));
    store.forget(&[PART..PART + 1]).expect("held");
    put(&store, 0, 1, 4).expect("there is room again");
    assert_eq!(store.resize(2), Err(3));
    store.resize(4).expect("more");
    put(&store, 1, 1, 5).expect("it stores");
}

#[test]
fn a_page_that_is_on_its_way_out_is_given_back_when_it_is_out_and_counts_until_then() {
    let store = store(2);
    put(&store, 10, 2, 1).expect("it stores");
    let answers = [store.fetch(10, 2).expect("held"), store.fetch(11, 1).expect("held")];
    store.forget(&[10..12]).expect("held");
    assert!(matches!(store.fetch(10, 1), Err(Refused::Absent(10))));
    assert_eq!(store.used(), 2, "whoever reads them slowly gets no more than its quota");
    assert!(matches!(put(&store, 20, 1, 2), Err(Refused::Full(_))));
    assert_eq!(answers[0].to_vec(), content(10, 2, 1), "nothing was pulled away");
    let [both, one] = answers;
    drop(both);
    assert_eq!((store.used(), taken(&store)), (1, 1));
    put(&store, 11, 1, 3).expect("it has its place still");
    drop(one);
    assert_eq!((store.used(), taken(&store)), (1, 1));
    assert_eq!(store.fetch(11, 1).expect("held").to_vec(), content(11, 1, 3));
}

#[test]
fn a_page_is_on_its_way_out_at_most_so_often() {
    let store = store(2);
    put(&store, 0, 2, 1).expect("it stores");
    let most = usize::from(FETCHES / FETCH);
    let answers: Vec<Buffer> = (0..most).map(|_| store.fetch(1, 1).expect("held")).collect();
    assert!(matches!(store.fetch(0, 2), Err(Refused::Busy(_))));
    drop(answers);
    store.fetch(0, 2).expect("it is free again");
}

#[test]
fn after_the_end_nothing_is_served_and_all_memory_is_given_back() {
    let store = store(PAGES);
    put(&store, 0, 200, 1).expect("it stores");
    let answer = store.fetch(5, 1).expect("held");
    store.end();
    store.clear();
    assert!(matches!(store.fetch(0, 1), Err(Refused::Gone(_))));
    assert!(matches!(put(&store, 0, 1, 1), Err(Refused::Gone(_))));
    assert!(matches!(store.forget(&[0..1]), Err(Refused::Gone(_))));
    assert_eq!((store.used(), taken(&store)), (1, 1), "but what is on its way out");
    drop(answer);
    assert_eq!((store.used(), taken(&store)), (0, 0));
    let fd = store.mapping().fd().try_clone_to_owned().expect("a descriptor is left");
    let found = Store::adopt(Mapping::of(fd).expect("it maps"), false).expect("it is one");
    assert!(found.is_none(), "nobody takes it over");
}

#[test]
fn a_new_process_knows_what_was_stored_and_gives_back_what_was_not_finished() {
    let store = store(500);
    put(&store, PART - 3, 6, 1).expect("it stores");
    put(&store, 100, 3, 2).expect("it stores");
    // As after a kill between the copy and the bit, and between the bit's end and the hole.
    store.mapping.write(50 * PAGE, &Buffer::from_vec(content(50, 1, 9))).expect("memory is left");
    store.clear_bits(&(101..102));
    assert_eq!(taken(&store), 10);
    let store = again(&store);
    assert_eq!((store.used(), store.quota(), taken(&store)), (8, 500, 8));
    assert_eq!(store.fetch(PART - 3, 6).expect("held").to_vec(), content(PART - 3, 6, 1));
    for absent in [50, 101] {
        assert_eq!(store.fetch(absent, 1).expect_err("not held"), Refused::Absent(absent));
    }
    assert_eq!(store.fetch(102, 1).expect("held").to_vec(), content(102, 1, 2));
}

#[test]
fn a_file_that_is_no_store_is_refused() {
    let adopt = |mapping: Mapping| Store::adopt(mapping, false).map(|found| found.is_some());
    for len in [0, 100, PAGE, 10 * PAGE] {
        let Ok(mapping) = Mapping::create("other", len) else { continue };
        adopt(mapping).expect_err("it is none");
    }
    let other = |change: &dyn Fn(&mut Record)| {
        let mut record = record(PAGES);
        change(&mut record);
        record
    };
    let wrong = record::create(&other(&|r| r.version = 2), 5).expect("memory is left");
    adopt(wrong).expect_err("another version's");
    let long = other(&|r| r.holder.name = "x".repeat(4096));
    record::create(&long, 5).expect_err("a name that does not fit");
    let shorter = record::create(&other(&|r| r.pages = 64), 5).expect("memory is left");
    let text = serde_json::to_vec(&record(PAGES)).expect("JSON");
    let at = shorter.len() - PAGE + 64;
    shorter.write_bytes(at, &(text.len() as u32).to_le_bytes()).expect("it writes");
    shorter.write_bytes(at + 4, &text).expect("it writes");
    adopt(shorter).expect_err("shorter than it says");
    let cut = record::create(&record(PAGES), 5).expect("memory is left");
    cut.write_bytes(cut.len() - PAGE + 64, &u32::MAX.to_le_bytes()).expect("it writes");
    adopt(cut).expect_err("a text longer than its page");
    let file = tempfile::tempfile().expect("a file");
    Mapping::of(file.into()).expect_err("its length is not fixed");
}

#[test]
fn no_two_threads_tear_the_books_whatever_they_ask_of_the_same_pages() {
    let store = store(90);
    let ends = Arc::new(AtomicBool::new(false));
    let worker = |seed: u64| {
        let (store, ends) = (Arc::clone(&store), Arc::clone(&ends));
        std::thread::spawn(move || {
            let mut random = 0x9e37_79b9_7f4a_7c15u64.wrapping_mul(seed + 1);
            let mut next = move |limit: u64| {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                random % limit
            };
            let mut answers: Vec<(u64, Buffer)> = Vec::new();
            let mut counts = [0u64; 3];
            for round in 0..4000 {
                if ends.load(Ordering::SeqCst) {
                    break;
                }
                let (first, count) = (PART - 60 + next(110), 1 + next(8));
                match next(4) {
                    0 => counts[0] += u64::from(put(&store, first, count, seed as u8).is_ok()),
                    1 => counts[1] += u64::from(store.forget(&[first..first + count]).is_ok()),
                    2 => {
                        if let Ok(answer) = store.fetch(first, count as u32) {
                            counts[2] += 1;
                            answers.push((first, answer));
                        }
                    }
                    _ => answers.truncate(next(6) as usize),
                }
                if round % 64 == 0 {
                    for (first, answer) in &answers {
                        // Which thread's content it is, nobody knows; that it is this page's, everybody does.
                        let bytes = answer.to_vec();
                        let number = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes"));
                        assert_eq!(number, *first);
                    }
                }
            }
            counts
        })
    };
    let workers: Vec<_> = (0..4).map(worker).collect();
    for worker in workers {
        let counts = worker.join().expect("no thread fails");
        assert!(counts.iter().all(|count| *count > 0), "{counts:?}");
    }
    let held = (0..PAGES).filter(|page| store.is_set(*page)).count() as u64;
    assert_eq!((store.used(), taken(&store)), (held, held));
    assert!(held <= 90);
    for part in &store.parts {
        let part = lock(part);
        let states = part.states.iter().flat_map(|states| states.iter());
        assert!(states.into_iter().all(|state| [0, COUNTED | HELD].contains(state)));
    }
}

#[test]
fn bits_are_set_and_cleared_across_words_and_nowhere_else() {
    let store = store(PAGES);
    for range in [0..1, 63..65, 60..200, 64..128, PAGES - 1..PAGES, 100..101] {
        store.set_bits(&range);
        let set: Vec<u64> = (0..PAGES).filter(|page| store.is_set(*page)).collect();
        assert_eq!(set, range.clone().collect::<Vec<u64>>());
        store.set_bits(&(0..PAGES));
        store.clear_bits(&range);
        assert_eq!((0..PAGES).filter(|page| !store.is_set(*page)).collect::<Vec<u64>>(), set);
        store.clear_bits(&(0..PAGES));
    }
}

/// What may be asked of a store.
#[derive(Clone, Debug)]
enum Step {
    Store(u64, u64, u8),
    Fetch(u64, u64),
    /// One of the answers that are out is sent.
    Sent(prop::sample::Index),
    Forget(Vec<(u64, u64)>),
    Resize(u64),
    /// The process is killed, and another one takes the file over.
    Kill,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    // Around the border of two parts, and at the end.
    let first = prop_oneof![PART - 20..PART + 20, PAGES - 10..PAGES + 2];
    let few = 1..9u64;
    let range = (first.clone(), few.clone());
    let step = prop_oneof![
        6 => (range.clone(), any::<u8>()).prop_map(|((first, count), seed)| Step::Store(first, count, seed)),
        6 => range.clone().prop_map(|(first, count)| Step::Fetch(first, count)),
        5 => any::<prop::sample::Index>().prop_map(Step::Sent),
        4 => proptest::collection::vec(range, 1..4).prop_map(Step::Forget),
        1 => (0..40u64).prop_map(Step::Resize),
        1 => Just(Step::Kill),
    ];
    proptest::collection::vec(step, 1..80)
}

/// What a store should be.
#[derive(Default)]
struct Model {
    held: BTreeMap<u64, u8>,
    /// Forgotten while an answer with them is out.
    dead: BTreeSet<u64>,
    out: Vec<(u64, u64)>,
    quota: u64,
}

impl Model {
    fn used(&self) -> u64 {
        (self.held.len() + self.dead.len()) as u64
    }

    fn is_out(&self, page: u64) -> bool {
        self.out.iter().any(|(first, count)| (*first..first + count).contains(&page))
    }

    fn sent(&mut self, at: usize) {
        self.out.swap_remove(at);
        let dead = std::mem::take(&mut self.dead);
        self.dead = dead.into_iter().filter(|page| self.is_out(*page)).collect();
    }
}

proptest! {
    #[test]
    fn a_store_is_as_its_model_after_any_steps(steps in steps()) {
        let mut model = Model { quota: 24, ..Model::default() };
        let mut store = store(24);
        let mut answers: Vec<Buffer> = Vec::new();
        for step in steps {
            match step {
                Step::Store(first, count, seed) => {
                    let range = first..first + count;
                    let new = range.clone().filter(|p| !model.held.contains_key(p) && !model.dead.contains(p));
                    let fits = model.used() + new.count() as u64 <= model.quota;
                    match put(&store, first, count, seed) {
                        Ok(()) => {
                            prop_assert!(fits && range.end <= PAGES);
                            for page in range {
                                model.held.insert(page, seed);
                                model.dead.remove(&page);
                            }
                        }
                        Err(Refused::OutOfRange(_)) => prop_assert!(range.end > PAGES),
                        Err(refused) => prop_assert!(!fits && matches!(refused, Refused::Full(_)), "{refused:?}"),
                    }
                }
                Step::Fetch(first, count) => {
                    let range = first..first + count;
                    let absent = range.clone().find(|page| !model.held.contains_key(page));
                    match store.fetch(first, count as u32) {
                        Ok(answer) => {
                            let expected: Vec<u8> =
                                range.flat_map(|page| page_of(page, model.held[&page])).collect();
                            prop_assert!(answer.to_vec() == expected);
                            answers.push(answer);
                            model.out.push((first, count));
                        }
                        Err(Refused::OutOfRange(_)) => prop_assert!(range.end > PAGES),
                        Err(Refused::Busy(_)) => {
                            let out = |page: u64| model.out.iter().filter(move |(f, c)| (*f..f + c).contains(&page));
                            let busy = range.into_iter().any(|page| out(page).count() >= 31);
                            prop_assert!(busy, "nothing is out so often");
                        }
                        Err(refused) => prop_assert_eq!(Some(refused), absent.map(Refused::Absent)),
                    }
                }
                Step::Sent(which) if !answers.is_empty() => {
                    let at = which.index(answers.len());
                    answers.swap_remove(at);
                    model.sent(at);
                }
                Step::Sent(_) => {}
                Step::Forget(ranges) => {
                    let ranges: Vec<Range<u64>> = ranges.into_iter().map(|(f, c)| f..f + c).collect();
                    let fits = ranges.iter().all(|range| range.end <= PAGES);
                    prop_assert_eq!(store.forget(&ranges).is_ok(), fits);
                    for page in ranges.into_iter().flatten().filter(|_| fits) {
                        if model.held.remove(&page).is_some() && model.is_out(page) {
                            model.dead.insert(page);
                        }
                    }
                }
                Step::Resize(quota) => {
                    let expected = if model.used() <= quota { Ok(()) } else { Err(model.used()) };
                    prop_assert_eq!(store.resize(quota), expected);
                    model.quota = if expected.is_ok() { quota } else { model.quota };
                }
                Step::Kill => {
                    let next = again(&store);
                    // What a killed process has on its way out is never finished by it.
                    answers.drain(..).for_each(std::mem::forget);
                    store = next;
                    model.out.clear();
                    model.dead.clear();
                }
            }
            prop_assert_eq!(store.used(), model.used());
            prop_assert_eq!(store.quota(), model.quota);
            prop_assert_eq!(taken(&store), model.used());
        }
    }
}
