use std::path::{Path, PathBuf};

use proptest::prelude::*;
use smallvec::smallvec;

use super::*;

/// One valid encoding of each body.
fn samples() -> Vec<(&'static str, Body)> {
    let take = Take { holder: 7 << 90, expected: 3, pages: 1 << 20, quota: 1 << 18, guest: "desktop".into() };
    vec![
        ("take", take.encode()),
        ("taken", Taken { epoch: 9, instance: 5 << 80, ttl: Duration::from_secs(15) }.encode()),
        ("open", Open { epoch: 9, holder: 7, instance: 5 << 80 }.encode()),
        ("opened", Opened { pages: 1 << 20, quota: 1 << 18, used: 12, flags: 0 }.encode()),
        ("pages", Pages { epoch: 9, first: 4096, count: 256, flags: 0 }.encode()),
        ("packing", Packing { packed: true, took: Duration::from_nanos(7000) }.encode()),
        ("absent", Absent { page: 77 }.encode()),
        ("forget", Forget { epoch: 9, ranges: smallvec![5..6, 100..4196] }.encode()),
        (
            "forget-most",
            Forget { epoch: 9, ranges: (0..MAX_RANGES as u64).map(|n| 2 * n..2 * n + 1).collect() }.encode(),
        ),
    ]
}

/// Bodies that are refused, each for one reason.
fn refused() -> Vec<(&'static str, Vec<u8>)> {
    let take = |pages: u64, quota: u64| {
        let take = Take { holder: 1, expected: 0, pages, quota, guest: "g".into() };
        take.encode().to_vec()
    };
    let forget = |ranges: &[(u64, u64)]| {
        let mut bytes = 9u64.to_le_bytes().to_vec();
        for (start, end) in ranges {
            bytes.extend(start.to_le_bytes());
            bytes.extend(end.to_le_bytes());
        }
        bytes
    };
    let mut cut = forget(&[(1, 2), (3, 4)]);
    cut.pop();
    vec![
        ("take-no-pages", take(0, 0)),
        ("take-too-many-pages", take(MAX_RAM + 1, 1)),
        ("take-no-quota", take(5, 0)),
        ("take-quota-above-pages", take(5, 6)),
        ("forget-nothing", forget(&[])),
        ("forget-empty-range", forget(&[(1, 2), (5, 5)])),
        ("forget-backward-range", forget(&[(8, 7)])),
        ("forget-cut", cut),
        ("forget-too-many", forget(&[(1, 2); MAX_RANGES + 1])),
        ("packing-unknown-flag", vec![2, 0, 0, 0, 9, 0, 0, 0]),
        ("empty", Vec::new()),
    ]
}

fn corpus() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fuzz/corpus/memory_requests")
}

/// Writes the corpus anew when the bodies change: `OMEGA_WRITE_CORPUS=1 cargo test -p omega-vmm memory_corpus`.
#[test]
fn the_memory_corpus_holds_every_body_as_it_is_written_now() {
    let all = samples().into_iter().map(|(name, body)| (name, body.to_vec())).chain(refused());
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
fn every_file_of_the_memory_corpus_decodes_or_is_refused_without_a_panic() {
    for entry in std::fs::read_dir(corpus()).expect("the corpus is there") {
        fuzz(&std::fs::read(entry.expect("an entry").path()).expect("readable"));
    }
}

#[test]
fn a_body_that_makes_no_sense_is_refused_and_none_is_taken_for_another() {
    for (name, bytes) in refused() {
        assert!(Take::decode(&bytes).is_err() || !name.starts_with("take"), "{name}");
        assert!(Forget::decode(&bytes).is_err() || !name.starts_with("forget"), "{name}");
        assert!(Packing::decode(&bytes).is_err() || !name.starts_with("packing"), "{name}");
    }
    for (name, body) in samples() {
        assert!(Take::decode(&body).is_err() || name == "take", "{name} is taken for a lease request");
        assert!(Taken::decode(&body).is_err() || ["taken", "opened"].contains(&name), "{name}");
    }
}

#[test]
fn bodies_fit_a_frame_and_pages_its_payload() {
    let most = samples().iter().map(|(_, body)| body.len()).max().expect("there are some");
    assert!(most <= MAX_BODY && most > MAX_BODY - 16, "{most}");
    assert_eq!(MAX_PAGES as usize * PAGE, MAX_PAYLOAD);
}

proptest! {
    #[test]
    fn every_memory_body_reads_as_it_was_written(
        numbers in any::<(u128, u128, u64, u64)>(),
        ram in 1..=MAX_RAM,
        part in 0.0..=1.0f64,
        (count, flags) in any::<(u32, u32)>(),
        guest in "[ -~é机]{0,40}",
        ranges in proptest::collection::vec((any::<u32>(), 1..u64::from(u32::MAX)), 1..40),
    ) {
        let (holder, instance, epoch, expected) = numbers;
        let quota = ((ram as f64 * part) as u64).clamp(1, ram);
        let take = Take { holder, expected, pages: ram, quota, guest };
        prop_assert_eq!(Take::decode(&take.encode()), Ok(take));
        let taken = Taken { epoch, instance, ttl: Duration::from_millis(count.into()) };
        prop_assert_eq!(Taken::decode(&taken.encode()), Ok(taken));
        let open = Open { epoch, holder, instance };
        prop_assert_eq!(Open::decode(&open.encode()), Ok(open));
        let opened = Opened { pages: ram, quota, used: expected, flags };
        prop_assert_eq!(Opened::decode(&opened.encode()), Ok(opened));
        let pages = Pages { epoch, first: expected, count, flags };
        prop_assert_eq!(Pages::decode(&pages.encode()), Ok(pages));
        let packing = Packing { packed: flags & 1 == 1, took: Duration::from_nanos(count.into()) };
        prop_assert_eq!(Packing::decode(&packing.encode()), Ok(packing));
        let absent = Absent { page: epoch };
        prop_assert_eq!(Absent::decode(&absent.encode()), Ok(absent));
        let ranges = ranges.into_iter().map(|(start, len)| u64::from(start)..u64::from(start) + len).collect();
        let forget = Forget { epoch, ranges };
        prop_assert_eq!(Forget::decode(&forget.encode()), Ok(forget));
    }

    #[test]
    fn no_mutation_of_a_memory_body_does_harm(
        which in any::<prop::sample::Index>(),
        edits in proptest::collection::vec((any::<prop::sample::Index>(), 0..4u8, any::<u8>()), 1..5),
    ) {
        let samples = samples();
        let mut bytes = which.get(&samples).1.to_vec();
        for (at, kind, byte) in edits {
            if bytes.is_empty() {
                break;
            }
            let at = at.index(bytes.len());
            match kind {
                0 => bytes[at] = byte,
                1 => bytes[at] ^= 1 << (byte % 8),
                2 => bytes.truncate(at),
                _ => bytes.insert(at, byte),
            }
        }
        fuzz(&bytes);
    }
}
