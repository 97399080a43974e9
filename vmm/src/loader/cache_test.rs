use std::io::{Read, Write};
use std::os::unix::fs::FileExt;

use super::*;

/// An ELF-64 file of one segment with these contents, and zeros after them.
fn elf() -> Vec<u8> {
    let content = [vec![0xa5_u8; 8192], vec![0; 300_000], vec![0x5a; 100]].concat();
    let mut bytes = b"\x7fELF\x02\x01\x01".to_vec();
    bytes.resize(16, 0);
    bytes.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    for word in [0x10_0000_u64, 64, 0] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.extend([0; 4]);
    for half in [64_u16, 56, 1, 0, 0, 0] {
        bytes.extend(half.to_le_bytes());
    }
    bytes.extend([1_u32, 5].iter().flat_map(|word| word.to_le_bytes()));
    let len = content.len() as u64;
    for word in [120, 0x10_0000, 0x10_0000, len, len, 4096_u64] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.extend(content);
    bytes
}

/// A bzImage whose payload is this file as it is.
struct Packed {
    folder: tempfile::TempDir,
    file: File,
    header: setup_header,
}

impl Packed {
    fn new(payload: &[u8]) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let mut file = File::options()
            .create_new(true)
            .read(true)
            .write(true)
            .open(folder.path().join("vmlinuz"))
            .expect("a file");
        file.write_all(&[vec![0; 1024], payload.to_vec()].concat()).expect("it is written");
        let header =
            setup_header { setup_sects: 1, payload_length: payload.len() as u32, ..Default::default() };
        Self { folder, file, header }
    }

    fn cache(&self) -> PathBuf {
        self.folder.path().join("cache")
    }

    fn entry(&self) -> PathBuf {
        self.cache().join(name(&self.file).expect("a name"))
    }

    /// What is booted, from its first byte to its last.
    fn unpacked(&self) -> Vec<u8> {
        let elf = unpacked(&self.file, &self.header, Some(&self.cache()));
        let mut elf = elf.expect("it works").expect("it is known how");
        let mut bytes = Vec::new();
        elf.rewind().expect("it rewinds");
        elf.read_to_end(&mut bytes).expect("it is read");
        bytes
    }

    fn names(&self) -> Vec<String> {
        let all = fs::read_dir(self.cache()).expect("a folder");
        all.map(|entry| entry.expect("an entry").file_name().into_string().expect("text")).collect()
    }
}

#[test]
fn an_entry_that_is_empty_cut_or_garbage_is_replaced_and_the_same_kernel_boots() {
    let packed = Packed::new(&elf());
    let right = packed.unpacked();
    let entry = packed.entry();
    assert!(fs::read(&entry).expect("it is kept") == right);
    let cut = |len: usize| right[..len].to_vec();
    let mut elsewhere = right.clone();
    elsewhere[32..40].copy_from_slice(&(right.len() as u64).to_le_bytes()); // e_phoff
    let mut no_segment = right.clone();
    no_segment[56..58].copy_from_slice(&0_u16.to_le_bytes()); // e_phnum
    for damaged in [
        Vec::new(),
        cut(4),
        cut(64),
        cut(4096),
        cut(right.len() - 1),
        vec![0; right.len()],
        vec![0xff; right.len()],
        b"not a kernel".repeat(1000),
        elsewhere,
        no_segment,
    ] {
        fs::write(&entry, &damaged).expect("it is written");
        assert!(packed.unpacked() == right, "{} bytes are booted", damaged.len());
        assert!(fs::read(&entry).expect("it is kept") == right, "{} bytes are still there", damaged.len());
    }
}

#[test]
fn a_whole_entry_is_used_as_it_is() {
    let packed = Packed::new(&elf());
    packed.unpacked();
    let entry = File::options().write(true).open(packed.entry()).expect("it is kept");
    entry.write_all_at(b"mark", 200).expect("it is written");
    assert_eq!(packed.unpacked()[200..204], *b"mark");
}

#[test]
fn what_older_versions_and_writers_that_were_cut_short_left_goes() {
    let packed = Packed::new(&elf());
    fs::create_dir(packed.cache()).expect("a folder");
    let old = SystemTime::now() - 2 * ABANDONED;
    for (name, modified) in [
        ("1-2-3.sparse.vmlinux", SystemTime::now()),
        ("1-2-3.part7", old),
        ("1-2-3.part8", SystemTime::now()),
        ("something else", old),
    ] {
        let file = File::create(packed.cache().join(name)).expect("a file");
        file.set_modified(modified).expect("it takes a time");
    }
    for i in 0..KEPT {
        let file = File::create(packed.cache().join(format!("{i}.{EXTENSION}"))).expect("a file");
        file.set_modified(old + Duration::from_secs(i as u64)).expect("it takes a time");
    }
    packed.unpacked();
    let mut left = packed.names();
    left.sort();
    let entry = packed.entry().file_name().expect("a name").to_str().expect("text").to_owned();
    let mut expected: Vec<String> = (1..KEPT).map(|i| format!("{i}.{EXTENSION}")).collect();
    expected.extend(["1-2-3.part8".to_owned(), "something else".to_owned(), entry]);
    expected.sort();
    assert_eq!(left, expected);
}

#[test]
fn a_kernel_whose_file_names_more_than_it_has_is_not_kept() {
    let mut bytes = elf();
    bytes.truncate(bytes.len() - 50);
    let packed = Packed::new(&bytes);
    assert!(packed.unpacked() == bytes);
    assert!(!packed.entry().exists());
}
