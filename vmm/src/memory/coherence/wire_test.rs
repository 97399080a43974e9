use std::path::{Path, PathBuf};

use proptest::prelude::*;

use super::*;

fn corpus() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fuzz/corpus/coherence")
}

fn letter(what: What) -> Letter {
    let mut letter = Letter { age: Age(0x0102), need: Need::default(), late: false, what };
    letter.late = letter.says_late();
    letter.need = Need(if letter.says_need() { 0x0b_0c0d } else { 0 });
    letter
}

/// One letter of each kind.
fn samples() -> Vec<(&'static str, Letter)> {
    let (page, txn, to) = (Page(0x0003_0405_0607), Txn(0x0809), Member::new(10).expect("small"));
    let at_home = |message| letter(What::Home(page, message));
    let at_member = |message| letter(What::Member(page, message));
    let answer = |granted, content| at_member(ToMember::Answer(Answer { txn, granted, gone: 11, content }));
    let forward = Order::Forward { to, txn, granted: Granted::Share, gone: 11 };
    vec![
        ("get-to-read", at_home(ToHome::Get { right: Right::Read, copy: false })),
        ("get-to-write", at_home(ToHome::Get { right: Right::Write, copy: true })),
        ("offer", at_home(ToHome::Offer)),
        ("done", at_home(ToHome::Done { txn })),
        ("forward", at_member(ToMember::Order(forward))),
        ("invalidate", at_member(ToMember::Order(Order::Invalidate { to, txn }))),
        ("answer-zeros", answer(Granted::Write, Content::Zeros)),
        ("answer-yours", answer(Granted::Own, Content::Yours)),
        ("answer-sent", answer(Granted::Share, Content::Sent)),
        ("gone", at_member(ToMember::Gone { txn })),
        ("forget", letter(What::Forget)),
        ("forgotten", letter(What::Forgotten)),
        ("go-on", letter(What::GoOn)),
    ]
}

/// Bodies that are refused, each for one reason.
fn refused() -> Vec<(&'static str, Vec<u8>)> {
    let changed = |name: &str, at: usize, byte: u8| {
        let samples = samples();
        let (_, letter) = samples.iter().find(|(other, _)| *other == name).expect("a sample");
        let mut bytes = letter.encode().to_vec();
        bytes[at] = byte;
        bytes
    };
    vec![
        ("no-kind", changed("done", 0, 0)),
        ("unknown-kind", changed("done", 0, 11)),
        ("get-unknown-detail", changed("get-to-read", 1, 4)),
        ("get-with-transaction", changed("get-to-read", 12, 1)),
        ("forward-to-nobody", changed("forward", 14, MEMBERS as u8)),
        ("forward-too-many-gone", changed("forward", 15, MEMBERS as u8)),
        ("answer-unknown-right", changed("answer-sent", 1, 0x23)),
        ("answer-unknown-content", changed("answer-sent", 1, 0x30)),
        ("answer-unknown-note", changed("answer-sent", 9, 2)),
        ("done-in-need", changed("done", 9, 1)),
        ("forget-a-page", changed("forget", 4, 1)),
        ("cut", letter(What::GoOn).encode()[..BODY - 1].to_vec()),
        ("empty", Vec::new()),
    ]
}

/// Writes the corpus anew when letters change: `OMEGA_WRITE_CORPUS=1 cargo test -p omega-vmm coherence_corpus`.
#[test]
fn the_coherence_corpus_holds_every_letter_as_it_is_written_now() {
    let all = samples().into_iter().map(|(name, letter)| (name, letter.encode().to_vec())).chain(refused());
    for (name, bytes) in all {
        let path = corpus().join(name);
        if std::env::var_os("OMEGA_WRITE_CORPUS").is_some() {
            std::fs::create_dir_all(corpus()).expect("a folder");
            std::fs::write(&path, &bytes).expect("it writes");
        }
        assert_eq!(std::fs::read(&path).expect("readable"), bytes, "{}", path.display());
    }
}

#[test]
fn letters_read_as_they_were_written_and_what_makes_no_sense_is_refused() {
    for (name, letter) in samples() {
        assert_eq!(Letter::decode(&letter.encode()), Ok(letter), "{name}");
        assert_eq!(letter.has_content(), name == "answer-sent");
    }
    for (name, bytes) in refused() {
        assert_eq!(Letter::decode(&bytes), Err(Malformed), "{name}");
    }
}

#[test]
fn who_is_in_need_is_in_order_around_the_end_of_the_numbers() {
    assert!(Need(3).before(Need(4)) && !Need(4).before(Need(4)) && !Need(5).before(Need(4)));
    assert!(Need(0xff_ffff).before(Need(0xff_ffff).next()) && Need(0xff_fff0).before(Need(5)));
}

#[test]
fn ages_are_in_order_around_the_end_of_their_numbers() {
    assert!(Age(3).before(Age(4)) && !Age(4).before(Age(4)) && !Age(5).before(Age(4)));
    assert!(Age(u16::MAX).before(Age(u16::MAX).next()));
}

proptest! {
    #[test]
    fn no_bytes_do_harm_in_the_coherence_fuzz_target(
        which in any::<prop::sample::Index>(),
        edits in proptest::collection::vec((0..BODY, any::<u8>()), 0..4),
    ) {
        let mut bytes = which.get(&samples()).1.encode();
        for (at, byte) in edits {
            bytes[at] = byte;
        }
        fuzz(&bytes);
    }
}
