use std::path::{Path, PathBuf};

use proptest::prelude::*;

use super::*;

/// Pages as guests have them: some text-like, some zeros, some that nothing shrinks.
fn page(kind: u64, seed: u64) -> Vec<u8> {
    let mut x = seed | 1;
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x
    };
    match kind % 4 {
        0 => vec![0; PAGE],
        1 => (0..PAGE / 8).flat_map(|_| next().to_le_bytes()).collect(),
        2 => (0..PAGE / 16)
            .flat_map(|_| [next() & 0xffff_fff8, 0x7f32_0000_1000])
            .flat_map(u64::to_le_bytes)
            .collect(),
        _ => b"a page of the guest's memory "
            .iter()
            .copied()
            .cycle()
            .skip((seed % 29) as usize)
            .take(PAGE)
            .collect(),
    }
}

fn pages(kinds: &[u64]) -> Buffer {
    Buffer::from_vec((1..).zip(kinds).flat_map(|(seed, kind)| page(*kind, seed * 0x9e37_79b9)).collect())
}

fn unpack_all(bytes: &[u8], count: usize) -> Result<Vec<u8>, Unpackable> {
    let into = Buffer::zeroed(count * PAGE);
    let packed = Buffer::from_vec(bytes.to_vec());
    Packer::default().unpack(&packed, packed.len(), &into).map(|()| into.to_vec())
}

/// Packed pages with these lengths and this after them.
fn made(lengths: &[u16], rest: &[u8]) -> Vec<u8> {
    lengths.iter().flat_map(|length| length.to_le_bytes()).chain(rest.iter().copied()).collect()
}

#[test]
fn pages_come_back_as_they_were_and_those_that_do_not_shrink_are_there_as_they_are() {
    let content = pages(&[3, 1, 2, 0]);
    let packed = Packer::default().pack(&content).expect("it shrinks").to_vec();
    assert_eq!(u16::from_le_bytes([packed[2], packed[3]]), PAGE as u16, "the second one does not shrink");
    assert!(packed.len() < PAGE + PAGE / 2 + 200, "{}", packed.len());
    assert!(unpack_all(&packed, 4) == Ok(content.to_vec()));
}

#[test]
fn what_saves_less_than_an_eighth_is_not_packed() {
    let mut packer = Packer::default();
    assert!(packer.pack(&pages(&[1])).is_none());
    assert!(packer.pack(&pages(&[1; 9])).is_none());
    assert!(packer.pack(&pages(&[1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0])).is_none());
    assert!(packer.pack(&pages(&[1, 1, 0])).is_some());
    assert!(packer.pack(&Buffer::zeroed(PAGE + 1)).is_none() && packer.pack(&Buffer::empty()).is_none());
    assert!(packer.pack(&Buffer::zeroed((MAX_PAGES as usize + 1) * PAGE)).is_none());
}

#[test]
fn pages_are_unpacked_in_the_memory_that_they_came_in() {
    let content = pages(&[3, 2, 2, 3]);
    let mut packer = Packer::default();
    let packed = packer.pack(&content).expect("it shrinks");
    let answer = Buffer::zeroed(4 * PAGE);
    answer.write_at(0, &packed.to_vec());
    packer.unpack(&answer, packed.len(), &answer).expect("it was packed");
    assert!(answer.to_vec() == content.to_vec());
}

/// What a peer may send instead of packed pages, and why it is none.
fn refused() -> Vec<(&'static str, usize, Vec<u8>)> {
    let zeros = Packer::default().pack(&pages(&[0])).expect("zeros shrink").to_vec();
    let block = &zeros[LENGTH..];
    let length = block.len() as u16;
    let mut short = vec![0x10, b'x'];
    short.splice(0..0, made(&[2], &[]));
    // Matches that reach before the page, and one that makes far more than a page.
    let before = made(&[6], &[0x1f, b'x', 0xff, 0x7f, 0x00, 0x00]);
    let endless: Vec<u8> = [0x1f, b'x', 1, 0].into_iter().chain([0xff; 2000]).chain([0, 0]).collect();
    vec![
        ("cut-lengths", 2, vec![1]),
        ("cut-page", 1, made(&[length + 1], block)),
        ("more-behind", 1, made(&[length], &[block, &[0]].concat())),
        ("no-length", 2, made(&[0, length], block)),
        ("too-long", 1, made(&[PAGE as u16 + 1], &vec![0; PAGE + 1])),
        ("longest", 1, made(&[u16::MAX], block)),
        ("fewer-pages", 2, zeros.clone()),
        ("more-pages", 1, made(&[length, length], &[block, block].concat())),
        ("short", 1, short),
        ("before", 1, before),
        ("endless", 1, made(&[endless.len() as u16], &endless)),
        ("empty", 1, Vec::new()),
    ]
}

#[test]
fn what_is_no_packed_pages_is_refused() {
    for (name, count, bytes) in refused() {
        assert!(unpack_all(&bytes, count).is_err(), "{name}");
    }
    let packed = Buffer::zeroed(PAGE);
    let mut packer = Packer::default();
    for (len, room) in [(PAGE + 1, PAGE), (usize::MAX, PAGE), (PAGE, PAGE - 1), (8, PAGE * 257)] {
        assert!(packer.unpack(&packed, len, &Buffer::zeroed(room)).is_err(), "{len} into {room}");
    }
}

fn corpus() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fuzz/corpus/packed_pages")
}

/// Written anew by `OMEGA_WRITE_CORPUS=1 cargo test -p omega-vmm packed_corpus`.
#[test]
fn the_packed_corpus_holds_what_is_refused_and_what_is_not_and_all_of_it_does_no_harm() {
    if std::env::var_os("OMEGA_WRITE_CORPUS").is_some() {
        std::fs::create_dir_all(corpus()).expect("a folder");
        let good = [("good-one", vec![3]), ("good-mixed", vec![3, 1, 0, 2])].map(|(name, kinds)| {
            let packed = Packer::default().pack(&pages(&kinds)).expect("it shrinks").to_vec();
            (name, kinds.len(), packed)
        });
        for (name, count, bytes) in refused().into_iter().chain(good) {
            let bytes = [&[(count - 1) as u8], &bytes[..]].concat();
            std::fs::write(corpus().join(name), bytes).expect("it writes");
        }
    }
    let mut good = 0;
    for entry in std::fs::read_dir(corpus()).expect("the corpus is there") {
        let path = entry.expect("an entry").path();
        let bytes = std::fs::read(&path).expect("readable");
        fuzz(&bytes);
        let unpacked = unpack_all(&bytes[1..], usize::from(bytes[0]) + 1);
        let is_good = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("good"));
        assert_eq!(unpacked.is_ok(), is_good, "{}", path.display());
        good += u32::from(is_good);
    }
    assert_eq!(good, 2);
}

proptest! {
    #[test]
    fn any_pages_come_back_as_they_were(kinds in proptest::collection::vec(0..4u64, 1..20)) {
        let content = pages(&kinds);
        if let Some(packed) = Packer::default().pack(&content) {
            prop_assert!(packed.len() <= content.len() / 8 * 7);
            prop_assert!(unpack_all(&packed.to_vec(), kinds.len()) == Ok(content.to_vec()));
        }
    }

    #[test]
    fn no_mutation_of_packed_pages_does_harm(
        kinds in proptest::collection::vec(0..4u64, 1..5),
        edits in proptest::collection::vec((any::<prop::sample::Index>(), 0..3u8, any::<u8>()), 1..6),
    ) {
        let Some(packed) = Packer::default().pack(&pages(&kinds)) else { return Ok(()) };
        let mut bytes = [&[kinds.len() as u8 - 1], &packed.to_vec()[..]].concat();
        for (at, kind, byte) in edits {
            let at = at.index(bytes.len());
            match kind {
                0 => bytes[at] = byte,
                1 => bytes[at] ^= 1 << (byte % 8),
                _ => bytes.truncate(at.max(1)),
            }
        }
        fuzz(&bytes);
    }
}
