use std::path::Path;

use proptest::prelude::*;

use super::*;

fn geometry() -> Geometry {
    Geometry { size: 1 << 30, block_size: 4096, read_only: false, discard: true, write_zeroes: true }
}

/// One valid encoding of each body.
fn samples() -> Vec<(&'static str, Body)> {
    let acquire = Acquire { volume: "debian".into(), holder: 7 << 90, expected: 3, name: "guest@pc".into() };
    vec![
        ("acquire", acquire.encode()),
        ("acquired", Acquired { epoch: 9, ttl: Duration::from_secs(15) }.encode()),
        ("lease", Lease { epoch: 9, holder: 7 }.encode()),
        ("opened", Opened { geometry: geometry(), identity: 5 << 70 }.encode()),
        ("access", Access { epoch: 9, offset: 4096, len: 512, unmap: true }.encode()),
        ("refusal", Refusal { errno: 5, wait: Duration::from_millis(20), text: "é".into() }.encode()),
    ]
}

fn corpus() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fuzz/corpus/volume")
}

#[test]
fn every_file_of_the_corpus_decodes_or_is_refused_without_a_panic() {
    let mut seen = 0;
    for entry in std::fs::read_dir(corpus()).expect("the corpus is there") {
        fuzz(&std::fs::read(entry.expect("an entry").path()).expect("readable"));
        seen += 1;
    }
    assert!(seen >= samples().len(), "the corpus holds {seen} files");
}

#[test]
fn a_hundred_thousand_mutations_of_valid_bodies_do_no_harm() {
    let mut random = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = move || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    let samples = samples();
    for _ in 0..100_000 {
        let mut bytes = samples[next() as usize % samples.len()].1.to_vec();
        for _ in 0..next() % 4 + 1 {
            let at = next() as usize % bytes.len();
            match next() % 4 {
                0 => bytes[at] = next() as u8,
                1 => bytes[at] ^= 1 << (next() % 8),
                2 => bytes.truncate(at.max(1)),
                _ => bytes.insert(at, next() as u8),
            }
        }
        fuzz(&bytes);
    }
}

#[test]
fn truncated_and_padded_bodies_are_refused() {
    for (name, bytes) in samples() {
        let good = |b: &[u8]| match name {
            "acquire" => Acquire::decode(b).is_ok(),
            "acquired" => Acquired::decode(b).is_ok(),
            "lease" => Lease::decode(b).is_ok(),
            "opened" => Opened::decode(b).is_ok(),
            "access" => Access::decode(b).is_ok(),
            _ => Refusal::decode(b).is_ok(),
        };
        assert!(good(&bytes), "{name}");
        assert!(!good(&bytes[..bytes.len() - 1]), "{name} cut");
        assert!(!good(&[&bytes[..], &[0]].concat()), "{name} padded");
    }
}

#[test]
fn geometries_that_no_disk_has_are_refused() {
    for (size, block_size) in
        [(0, 512), (513, 512), (1 << 63, 512), (1 << 20, 0), (1 << 20, 768), (512, 1 << 20)]
    {
        let opened = Opened { geometry: Geometry { size, block_size, ..geometry() }, identity: 0 };
        assert!(Opened::decode(&opened.encode()).is_err(), "{size} {block_size}");
    }
}

#[test]
fn names_that_would_forge_log_lines_are_refused() {
    let mut bytes = Acquire { volume: "a b".into(), holder: 0, expected: 0, name: String::new() }.encode();
    assert!(Acquire::decode(&bytes).is_ok());
    let at = bytes.iter().position(|b| *b == b' ').expect("the space");
    bytes[at] = b'\n';
    assert!(Acquire::decode(&bytes).is_err());
}

proptest! {
    #[test]
    fn what_is_encoded_decodes_to_the_same(
        volume in "[a-zA-Z0-9._ -]{0,255}", name in "[\\p{L}\\p{N}\\p{P}\\p{S} ]{0,60}",
        holder: u128, epoch: u64, offset: u64, len: u64, unmap: bool, errno: i32, wait: u32,
    ) {
        let acquire = Acquire { volume, holder, expected: epoch, name: name.clone() };
        prop_assert_eq!(Acquire::decode(&acquire.encode()), Ok(acquire));
        let access = Access { epoch, offset, len, unmap };
        prop_assert_eq!(Access::decode(&access.encode()), Ok(access));
        let refusal = Refusal { errno, wait: Duration::from_millis(wait.into()), text: name };
        prop_assert_eq!(Refusal::decode(&refusal.encode()), Ok(refusal));
    }
}
