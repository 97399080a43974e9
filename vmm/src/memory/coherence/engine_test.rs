//! Members on this kernel's userfaultfd, with real memory and lines in memory.

use std::os::unix::fs::MetadataExt as _;
use std::sync::atomic::Ordering::SeqCst;
use std::thread;

use super::super::message::{Answer, Content, Granted, Right, ToHome, ToMember, Txn};
use super::super::testing::{Order, Scene, Words, dice, member};
use super::*;
use crate::memory::frames::{PAGE, Page, Pieces};

/// Pages in 16 MiB, which are a piece.
const PIECE: usize = 4096;

#[test]
fn what_one_member_writes_the_others_read_wherever_its_home_is() {
    let Some(scene) = Scene::new(3, 48 << 20, 2, Order::Sent) else { return };
    let words = [0, 1, 2].map(|member| scene.words(member));
    for page in [3, 77] {
        for round in 1..=3_u64 {
            for (writer, words_of) in words.iter().enumerate() {
                let value = round * 10 + writer as u64;
                words_of.page(page).store(value, SeqCst);
                words.iter().for_each(|reader| assert_eq!(reader.page(page).load(SeqCst), value));
            }
        }
    }
    let counters = [0, 1, 2].map(|member| scene.counters(member));
    assert!(counters.iter().all(|at| at.fetched > 0 && at.invalidated > 0), "{counters:?}");
    // Who wrote to what it had read asks for all of it at once the next time.
    assert!(counters.iter().any(|at| at.upgrades > 0), "{counters:?}");
    scene.nobody_stopped();
}

/// Memory in which page 0 to 5 are fought for: each page has a word that all count up, and each thread one of its own.
fn fight(words: Words, thread: usize, steps: u32, mut seed: u64) -> [u64; 6] {
    let (mut own, mut seen, mut added) = ([0; 6], [0; 6], [0; 6]);
    for step in 0..steps {
        let page = dice(&mut seed) as usize % 6;
        let mine = words.u64(page * PAGE + 64 + thread * 8);
        match dice(&mut seed) % 4 {
            0 => {
                let before = words.page(page).fetch_add(1, SeqCst);
                assert!(before >= seen[page], "page {page} went back from {} to {before}", seen[page]);
                (seen[page], added[page]) = (before + 1, added[page] + 1);
            }
            1 => {
                let now = words.page(page).load(SeqCst);
                assert!(now >= seen[page], "page {page} went back from {} to {now}", seen[page]);
                seen[page] = now;
            }
            2 => {
                own[page] = u64::from(step);
                mine.store(own[page], SeqCst);
            }
            _ => assert_eq!(mine.load(SeqCst), own[page], "page {page}, thread {thread}, step {step}"),
        }
    }
    added
}

#[test]
fn nothing_is_lost_or_goes_back_however_many_fight_for_a_page_and_whatever_overtakes_what() {
    for (members, order, seed) in
        [(2, Order::Sent, 1), (3, Order::Any(7), 2), (2, Order::Any(8), 3), (3, Order::Riding, 4)]
    {
        let Some(scene) = Scene::new(members, 32 << 20, 1, order) else { return };
        let added: Vec<[u64; 6]> = thread::scope(|scope| {
            let fighters: Vec<_> = (0..2 * usize::from(members))
                .map(|thread| {
                    let words = scene.words(thread % usize::from(members));
                    scope.spawn(move || fight(words, thread, 1500, seed * 100 + thread as u64))
                })
                .collect();
            fighters.into_iter().map(|fighter| fighter.join().expect("no panic")).collect()
        });
        for page in 0..6 {
            let sum: u64 = added.iter().map(|added| added[page]).sum();
            for member in 0..usize::from(members) {
                assert_eq!(
                    scene.words(member).page(page).load(SeqCst),
                    sum,
                    "page {page} at member {member}"
                );
            }
        }
        scene.nobody_stopped();
    }
}

#[test]
fn what_waits_for_another_message_to_go_with_goes_alone_if_there_is_none() {
    let Some(scene) = Scene::new(2, 32 << 20, 1, Order::Riding) else { return };
    let [reader, writer] = [0, 1].map(|member| scene.words(member));
    // Not one after the other: those would be asked for together.
    let pages = || (0..100).map(|number| PIECE - 100 + number * 37 % 100);
    // At home at member 0, so what member 1 asks for and is done with goes over the line.
    pages().for_each(|page| reader.page(page).store(1, SeqCst));
    let before = scene.lines(1);
    pages().for_each(|page| assert_eq!(writer.page(page).load(SeqCst), 1));
    let after = scene.lines(1);
    // A page takes a request and a `Done`, which may go with the next request.
    assert!((100..=200).contains(&(after - before)), "{} messages for 100 pages", after - before);
    // The last `Done` came too: else the home would let nobody else have the page.
    reader.page(PIECE - 1).store(2, SeqCst);
    assert_eq!(writer.page(PIECE - 1).load(SeqCst), 2);
    scene.nobody_stopped();
}

#[test]
fn untouched_memory_is_zeros_and_a_members_own_costs_no_second_message() {
    let Some(scene) = Scene::new(2, 32 << 20, 1, Order::Sent) else { return };
    let words = scene.words(0);
    for page in 0..100 {
        assert_eq!(words.page(page).load(SeqCst), 0);
        words.page(page).store(7, SeqCst);
    }
    let (counters, other) = (scene.counters(0), scene.counters(1));
    assert_eq!((counters.messages, other.messages), (0, 0), "at home here: no message");
    assert!((100..=132).contains(&counters.zeroed) && counters.ahead >= 80, "{counters:?}");
    assert!(counters.write_faults + counters.read_faults < 40, "a fault for several pages: {counters:?}");
    assert_eq!((counters.upgrades, counters.fetched), (0, 0), "who is first may write");
}

#[test]
fn who_reads_page_after_page_waits_for_few_of_them() {
    let Some(scene) = Scene::new(2, 32 << 20, 1, Order::Sent) else { return };
    let [reader, writer] = [0, 1].map(|member| scene.words(member));
    let pages = PIECE - 250..PIECE - 50;
    pages.clone().for_each(|page| writer.page(page).store(page as u64, SeqCst));
    pages.clone().for_each(|page| assert_eq!(reader.page(page).load(SeqCst), page as u64));
    let counters = scene.counters(0);
    assert!(counters.read_faults < 60 && counters.fetched >= 200, "{counters:?}");
    pages.for_each(|page| assert_eq!(reader.page(page).fetch_add(1, SeqCst), page as u64));
    scene.nobody_stopped();
}

#[test]
fn a_page_that_two_write_to_is_held_longer() {
    let Some(scene) = Scene::new(2, 32 << 20, 1, Order::Sent) else { return };
    thread::scope(|scope| {
        for member in 0..2 {
            let words = scene.words(member);
            scope.spawn(move || (0..200_000).for_each(|_| words.count(5)));
        }
    });
    assert_eq!(scene.words(0).page(5).load(SeqCst), 400_000);
    let counters = scene.counters(0);
    assert!(counters.fetched < 20_000, "{counters:?}");
    scene.nobody_stopped();
}

#[test]
fn a_member_that_pauses_gives_what_others_need_and_asks_for_nothing() {
    let Some(scene) = Scene::new(2, 32 << 20, 1, Order::Sent) else { return };
    let [here, there] = [0, 1].map(|member| scene.words(member));
    here.page(1).store(1, SeqCst);
    there.page(2).store(2, SeqCst);
    scene.engines[0].pause();
    thread::scope(|scope| {
        let reader = scope.spawn(|| here.page(2).load(SeqCst));
        assert_eq!(there.page(1).load(SeqCst), 1);
        there.page(1).store(3, SeqCst);
        assert!(!reader.is_finished());
        scene.engines[0].go_on();
        assert_eq!(reader.join().expect("it reads"), 2);
        assert_eq!(here.page(1).load(SeqCst), 3);
    });
    scene.nobody_stopped();
}

#[test]
fn a_reset_makes_everything_zeros_at_all_members_and_gives_the_memory_back() {
    let Some(scene) = Scene::new(3, 48 << 20, 2, Order::Any(3)) else { return };
    let words = [0, 1, 2].map(|member| scene.words(member));
    for round in 0..3 {
        (0..300).for_each(|page| words[(page + round) % 3].page(page).store(page as u64 + 1, SeqCst));
        (0..300).for_each(|page| {
            assert_eq!(words[(page + round + 1) % 3].page(page).load(SeqCst), page as u64 + 1);
        });
        scene.engines[0].clear().expect("it is open");
        for ram in &scene.rams {
            let blocks = ram.file().expect("a file").metadata().expect("it is open").blocks();
            assert_eq!(blocks, 0, "nothing is left of round {round}");
        }
        (0..300).for_each(|page| assert_eq!(words[page % 3].page(page).load(SeqCst), 0));
    }
    scene.nobody_stopped();
}

#[test]
fn a_peer_that_breaks_the_protocol_stops_the_guest_with_a_reason_and_harms_nothing() {
    let page = Page(1);
    let get = ToHome::Get { right: Right::Read, copy: false };
    let answer = |content| Answer { txn: Txn(1), granted: Granted::Write, gone: 0, content };
    let aged =
        |age, what| Letter { age: Age(age), need: Need::default(), late: false, what }.encode().to_vec();
    let letter = |what| aged(0, what);
    let one = Some(Buffer::zeroed(PAGE));
    let cases = [
        (vec![1, 2, 3], None, "a message that makes no sense"),
        (letter(What::Home(Page(u64::MAX / 8192), get)), None, "not in RAM"),
        (letter(What::Home(Page(PIECE as u64), get)), None, "at home somewhere else"),
        (letter(What::Home(page, ToHome::Done { txn: Txn(9) })), None, "that was not begun"),
        (letter(What::Member(page, ToMember::Answer(answer(Content::Sent)))), one, "nobody asked for"),
        (
            letter(What::Member(page, ToMember::Answer(answer(Content::Sent)))),
            None,
            "content that does not belong",
        ),
        (letter(What::Member(page, ToMember::Gone { txn: Txn(1) })), None, "nobody asked for"),
        (letter(What::Forget), None, "only the console"),
        (aged(1, What::Home(page, get)), None, "from the future"),
    ];
    for (body, content, why) in cases {
        let Some(scene) = Scene::new(2, 32 << 20, 1, Order::Sent) else { return };
        scene.words(0).page(9).store(5, SeqCst);
        let ear = scene.engines[0].ear();
        ear.hear(member(1), &body, content);
        let stopped = scene.stopped.lock().expect("no panic").clone();
        assert!(matches!(&*stopped, [said] if said.contains(why)), "{why}: {stopped:?}");
        assert!(scene.engines[0].broken().is_some_and(|said| said.contains("heard from member 1")));
        ear.hear(member(1), &body, None);
        assert_eq!(scene.stopped.lock().expect("no panic").len(), 1, "it is said once");
        assert_eq!(scene.words(0).page(9).load(SeqCst), 5, "what is here can be read");
        assert!(matches!(scene.engines[0].clear(), Err(Error::Closed)));
    }
}

#[test]
fn ram_or_members_that_do_not_fit_are_refused() {
    use crate::memory::{Backing, Layout};
    use crate::units::Bytes;
    struct Nobody;
    impl Lines for Nobody {
        fn send(&self, _: Member, _: &[u8], _: Option<Buffer>) {}
    }
    let layout = Layout::new(Bytes(32 << 20), 40).expect("it fits");
    let pieces = Pieces::new(Bytes(32 << 20));
    let (me, other) = (member(0), member(1));
    let start = |backing, members, home, shards| {
        let ram = Ram::new(&layout, backing).expect("RAM");
        let homes = Homes::spread(pieces, &[home]).expect("there is one");
        let options = Options { me, members, homes, shards };
        Engine::start(&ram, &options, Arc::new(Nobody), Box::new(|_| {}), Vec::new()).err()
    };
    let both = Members::of(me).with(other);
    assert!(matches!(start(Backing::Private, both, other, 1), Some(Error::Unfit)));
    assert!(matches!(start(Backing::Shared, Members::of(me), other, 1), Some(Error::Members(_))));
    assert!(matches!(start(Backing::Shared, Members::of(other), other, 1), Some(Error::Members(_))));
    assert!(matches!(start(Backing::Shared, both, other, 3), Some(Error::Members(_))));
}
