use linux_loader::loader::bootparam::boot_params;

use super::*;
use crate::memory::{Backing, Ram, TABLES};
use crate::units;

const START: u64 = 0x10_0000;
const CODE: &[u8] = b"code of a kernel";

/// An ELF kernel of one segment at 1 MiB, with a note that names a PVH entry if asked.
fn elf(pvh: bool) -> Vec<u8> {
    let mut note = Vec::new();
    note.extend([4, 4, 18_u32].iter().flat_map(|word| word.to_le_bytes())); // XEN_ELFNOTE_PHYS32_ENTRY
    note.extend(b"Xen\0");
    note.extend(((START + 4) as u32).to_le_bytes());
    let headers = 64 + 2 * 56;
    let segment = |kind: u32, offset: usize, at: u64, len: usize| {
        let mut header = Vec::new();
        header.extend(kind.to_le_bytes());
        header.extend(5_u32.to_le_bytes());
        for word in [offset as u64, at, at, len as u64, len as u64, 4] {
            header.extend(word.to_le_bytes());
        }
        header
    };
    let mut bytes = b"\x7fELF\x02\x01\x01".to_vec();
    bytes.resize(16, 0);
    bytes.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    for word in [START, 64, 0] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.extend([0; 4]);
    for half in [64_u16, 56, if pvh { 2 } else { 1 }, 0, 0, 0] {
        bytes.extend(half.to_le_bytes());
    }
    bytes.extend(segment(1, headers, START, CODE.len()));
    bytes.extend(segment(4, headers + CODE.len(), 0, note.len()));
    bytes.extend(CODE);
    bytes.extend(note);
    bytes
}

struct Scene {
    folder: tempfile::TempDir,
    layout: Layout,
    ram: Ram,
}

impl Scene {
    fn new() -> Self {
        let layout = Layout::new(units::Bytes(16 << 20), 40).expect("it fits");
        let ram = Ram::new(&layout, Backing::Private).expect("RAM");
        Self { folder: tempfile::tempdir().expect("a folder"), layout, ram }
    }

    fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.folder.path().join(name);
        std::fs::write(&path, bytes).expect("it writes");
        path
    }

    fn load(&self, image: PathBuf, initrd: Option<PathBuf>, cmdline: &str) -> Result<Entry, Error> {
        let config = config::Kernel { image, initrd, cmdline: cmdline.into() };
        let mut kernel = Kernel::open(&config, None)?;
        kernel.load(self.ram.memory(), &self.layout, GuestAddress(TABLES.base))
    }

    fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.ram.memory().read_slice(&mut bytes, GuestAddress(at)).expect("RAM");
        bytes
    }
}

#[test]
fn a_plain_elf_kernel_gets_boot_parameters_with_its_command_line_initrd_and_memory_map() {
    let scene = Scene::new();
    let initrd = scene.file("initrd", &[7; 5000]);
    let entry = scene.load(scene.file("vmlinux", &elf(false)), Some(initrd), "console=ttyS0");
    let expected = Entry::Linux64 { start: GuestAddress(START), params: address::BOOT_PARAMS };
    assert_eq!(entry.expect("it loads"), expected);
    assert_eq!(scene.bytes(START, CODE.len()), CODE);
    let params: boot_params = scene.ram.memory().read_obj(address::BOOT_PARAMS).expect("RAM");
    assert_eq!({ params.acpi_rsdp_addr }, TABLES.base);
    assert_eq!(scene.bytes({ params.hdr.cmd_line_ptr }.into(), 14), b"console=ttyS0\0");
    assert_eq!({ params.hdr.ramdisk_size }, 5000);
    assert_eq!(scene.bytes({ params.hdr.ramdisk_image }.into(), 5000), [7; 5000]);
    let map = { params.e820_table };
    let ram: u64 = map[..params.e820_entries.into()].iter().filter(|e| e.r#type == 1).map(|e| e.size).sum();
    assert_eq!(ram, (16 << 20) - 0x10_0000 + LOW_RAM_END);
}

#[test]
fn linux_is_told_the_rate_of_its_counter_before_what_is_for_init_unless_the_user_did() {
    let scene = Scene::new();
    let image = scene.file("vmlinux", &elf(false));
    for (given, is) in [
        ("quiet -- 3", "tsc_early_khz=2500000 quiet -- 3"),
        ("", "tsc_early_khz=2500000"),
        ("a tsc_early_khz=7", "a tsc_early_khz=7"),
    ] {
        let config = config::Kernel { image: image.clone(), initrd: None, cmdline: given.into() };
        let mut kernel = Kernel::open(&config, None).expect("a kernel");
        kernel.tell_tsc(2_500_000);
        kernel.load(scene.ram.memory(), &scene.layout, GuestAddress(TABLES.base)).expect("it loads");
        let params: boot_params = scene.ram.memory().read_obj(address::BOOT_PARAMS).expect("RAM");
        let line = scene.bytes({ params.hdr.cmd_line_ptr }.into(), is.len() + 1);
        assert_eq!(String::from_utf8_lossy(&line), format!("{is}\0"));
    }
}

#[test]
fn a_kernel_with_a_pvh_entry_begins_there() {
    let scene = Scene::new();
    let entry = scene.load(scene.file("vmlinux", &elf(true)), None, "").expect("it loads");
    assert_eq!(entry, Entry::Pvh { start: GuestAddress(START + 4), info: address::START_INFO });
    let magic: u32 = scene.ram.memory().read_obj(address::START_INFO).expect("RAM");
    assert_eq!(magic, 0x336e_c578);
}

#[test]
fn what_cannot_be_booted_is_refused_in_one_line() {
    let scene = Scene::new();
    let text = scene.file("notes.txt", &[b'x'; 8000]);
    let vmlinux = || scene.file("vmlinux", &elf(false));
    let missing = scene.folder.path().join("missing");
    let large = scene.file("large", &vec![0; 17 << 20]);
    let mut far = elf(false);
    far[64 + 24..64 + 32].copy_from_slice(&(1_u64 << 30).to_le_bytes()); // p_paddr
    for (error, says) in [
        (scene.load(text, None, ""), "is no kernel that can be booted"),
        (scene.load(missing.clone(), None, ""), "The kernel"),
        (scene.load(vmlinux(), Some(missing), ""), "The initial RAM disk"),
        (scene.load(vmlinux(), Some(large), ""), "the initial RAM disk does not fit"),
        (scene.load(scene.file("far", &far), None, ""), "the kernel does not fit"),
        (scene.load(vmlinux(), None, &"x".repeat(3000)), "takes at most 2047"),
        (scene.load(scene.file("cut", &elf(false)[..100]), None, ""), "is damaged"),
    ] {
        let error = error.expect_err(says).to_string();
        assert!(error.contains(says) && !error.contains('\n'), "{error}");
    }
}
