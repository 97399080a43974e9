use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use transport::buffer::Buffer;
use transport::ring::Ring;

use super::*;
use crate::disk::{Disk, Done, Error, Operation, Request};

fn options(path: &Path) -> Options {
    Options { path: path.to_owned(), read_only: false, direct: Direct::Off }
}

fn image(size: u64) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().expect("a file");
    file.as_file().set_len(size).expect("sparse");
    file
}

/// A disk and its ring, one request at a time.
struct Rig {
    disk: FileDisk,
    ring: Ring,
}

impl Rig {
    fn new(options: &Options) -> Self {
        let mut disk = FileDisk::open(options).expect("it opens");
        let mut ring = Ring::new(64).expect("io_uring works here");
        disk.attach(&mut ring).expect("it attaches");
        Self { disk, ring }
    }

    fn ask(&mut self, operation: Operation, offset: u64, len: u64, buffer: Buffer) -> Done {
        let mut done = Vec::new();
        self.disk.submit(&mut self.ring, Request { tag: 7, operation, offset, len, buffer }, &mut done);
        while done.is_empty() {
            self.ring.wait(None).expect("it waits");
            while let Some(completion) = self.ring.reap() {
                assert!(self.disk.complete(&mut self.ring, completion, &mut done));
            }
        }
        done.pop().expect("one")
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        self.ask(Operation::Write, offset, bytes.len() as u64, Buffer::from_vec(bytes.to_vec())).result
    }

    fn read(&mut self, offset: u64, len: usize) -> Vec<u8> {
        let done = self.ask(Operation::Read, offset, len as u64, Buffer::zeroed(len));
        done.result.expect("it reads");
        done.buffer.to_vec()
    }
}

/// A buffer of many small segments at odd addresses.
fn scattered(bytes: &[u8]) -> Buffer {
    let whole = Buffer::zeroed(bytes.len() * 2 + 1);
    let base = whole.iovecs()[0].iov_base.cast::<u8>();
    let step = 512;
    let list: Vec<libc::iovec> = (0..bytes.len() / step)
        .map(|i| libc::iovec { iov_base: base.wrapping_add(1 + i * step * 2).cast(), iov_len: step })
        .collect();
    let owner = Arc::new(std::sync::Mutex::new(whole));
    // SAFETY: the list lies inside `whole`, which `owner` keeps.
    #[allow(unsafe_code)]
    let buffer = unsafe { Buffer::from_iovecs(owner, &list) };
    buffer.write_at(0, bytes);
    buffer
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i / 512 * 7 + i) as u8).collect()
}

#[test]
fn what_is_written_is_read_again() {
    let file = image(8 << 20);
    let mut rig = Rig::new(&options(file.path()));
    let bytes = pattern(2 << 20);
    rig.write(1 << 20, &bytes).expect("it writes");
    assert!(rig.ask(Operation::Flush, 0, 0, Buffer::empty()).result.is_ok());
    assert_eq!(rig.read(1 << 20, 2 << 20), bytes);
    assert_eq!(std::fs::read(file.path()).expect("readable")[1 << 20..3 << 20], bytes);
}

#[test]
fn more_segments_than_readv_takes_are_all_transferred() {
    let file = image(8 << 20);
    let mut rig = Rig::new(&options(file.path()));
    let bytes = pattern(1500 * 512);
    let done = rig.ask(Operation::Write, 512, bytes.len() as u64, scattered(&bytes));
    done.result.expect("it writes");
    assert_eq!(rig.read(512, bytes.len()), bytes);
    let done = rig.ask(Operation::Read, 512, bytes.len() as u64, scattered(&vec![0; bytes.len()]));
    done.result.expect("it reads");
    assert_eq!(done.buffer.to_vec(), bytes);
}

#[test]
fn direct_io_takes_buffers_at_any_address() {
    let file = image(1 << 20);
    let direct = Options { direct: Direct::On, ..options(file.path()) };
    if let Err(e @ OpenError::Direct { .. }) = FileDisk::open(&direct) {
        eprintln!("cannot run: {e}");
        return;
    }
    let mut rig = Rig::new(&direct);
    let bytes = pattern(64 << 10);
    rig.ask(Operation::Write, 512, 64 << 10, scattered(&bytes)).result.expect("it writes");
    let done = rig.ask(Operation::Read, 512, 64 << 10, scattered(&vec![0; 64 << 10]));
    done.result.expect("it reads");
    assert_eq!(done.buffer.to_vec(), bytes);
    let zeroes = rig.ask(Operation::WriteZeroes { unmap: false }, 1024, 512, Buffer::empty());
    zeroes.result.expect("it clears");
    assert_eq!(rig.read(1024, 512), [0; 512]);
}

#[test]
fn cleared_and_discarded_ranges_read_as_zeros() {
    let file = image(1 << 20);
    let mut rig = Rig::new(&options(file.path()));
    for operation in
        [Operation::Discard, Operation::WriteZeroes { unmap: true }, Operation::WriteZeroes { unmap: false }]
    {
        rig.write(0, &[0xee; 65536]).expect("it writes");
        match rig.ask(operation, 4096, 8192, Buffer::empty()).result {
            Err(Error::Unsupported) if operation == Operation::Discard => {
                eprintln!("cannot run: this file system punches no holes");
                continue;
            }
            other => other.expect("it clears"),
        }
        assert_eq!(rig.read(4096, 8192), [0; 8192], "{operation:?}");
        assert_eq!(rig.read(0, 4096), [0xee; 4096], "{operation:?}");
        assert_eq!(rig.read(12288, 4096), [0xee; 4096], "{operation:?}");
    }
}

#[test]
fn ranges_outside_the_disk_are_refused() {
    let file = image(1 << 20);
    let mut rig = Rig::new(&options(file.path()));
    for (offset, len) in [(1 << 20, 512), ((1 << 20) - 512, 1024), (1, 512), (u64::MAX - 511, 512)] {
        let done = rig.ask(Operation::Read, offset, len, Buffer::zeroed(len as usize));
        assert!(matches!(done.result, Err(Error::OutOfRange { .. })), "{offset} {len}: {:?}", done.result);
    }
    let done = rig.ask(Operation::Read, 0, 1024, Buffer::zeroed(512));
    assert!(matches!(done.result, Err(Error::OutOfRange { .. })));
}

#[test]
fn a_file_that_was_truncated_is_an_error_not_zeros() {
    let file = image(1 << 20);
    let mut rig = Rig::new(&options(file.path()));
    file.as_file().set_len(4096).expect("it shrinks");
    let done = rig.ask(Operation::Read, 0, 8192, Buffer::zeroed(8192));
    assert!(matches!(done.result, Err(Error::Io(_))), "{:?}", done.result);
}

#[test]
fn two_writers_cannot_open_one_image_and_readers_share_it() {
    let file = image(1 << 20);
    let read = Options { read_only: true, ..options(file.path()) };
    let writer = FileDisk::open(&options(file.path())).expect("the first writer");
    for second in [&options(file.path()), &read] {
        let Err(e) = FileDisk::open(second) else { panic!("the image was opened twice") };
        assert!(e.to_string().contains("in use by another process"), "{e}");
    }
    drop(writer);
    let _one = FileDisk::open(&read).expect("a reader");
    let mut two = Rig::new(&read);
    assert!(matches!(two.write(0, &[0; 512]), Err(Error::ReadOnly)));
    assert!(matches!(FileDisk::open(&options(file.path())), Err(OpenError::Locked { .. })));
}

#[test]
fn what_is_no_disk_is_refused_with_its_reason() {
    let directory = tempfile::tempdir().expect("a directory");
    let read = |path: &Path| {
        let options = Options { read_only: true, ..options(path) };
        FileDisk::open(&options).err().map(|e| e.to_string()).unwrap_or_default()
    };
    assert!(read(directory.path()).contains("neither a file nor a block device"));
    assert!(read(&directory.path().join("missing")).contains("No such file"));
    let odd = directory.path().join("odd");
    File::create(&odd).and_then(|mut f| f.write_all(&[0; 513])).expect("it writes");
    assert!(read(&odd).contains("is 513 bytes long; a disk needs a multiple of 512"));
}

#[test]
fn an_aborted_disk_gives_every_request_back() {
    let file = image(8 << 20);
    let mut rig = Rig::new(&options(file.path()));
    let mut done = Vec::new();
    for tag in 0..100 {
        let request =
            Request { tag, operation: Operation::Read, offset: 0, len: 65536, buffer: Buffer::zeroed(65536) };
        rig.disk.submit(&mut rig.ring, request, &mut done);
    }
    rig.disk.abort(&mut rig.ring, &mut done);
    let mut tags: Vec<u64> = done.iter().map(|d| d.tag).collect();
    tags.sort_unstable();
    assert_eq!(tags, (0..100).collect::<Vec<_>>());
    assert_eq!(rig.disk.in_flight(), 0);
}

/// A file system of `size` bytes, gone with the value.
struct TinyFs(tempfile::TempDir);

impl TinyFs {
    fn new(size: u64) -> Option<Self> {
        use nix::mount::{MsFlags, mount};
        let directory = tempfile::tempdir().expect("a directory");
        let data = format!("size={size}");
        match mount(Some("tiny"), directory.path(), Some("tmpfs"), MsFlags::empty(), Some(data.as_str())) {
            Ok(()) => Some(Self(directory)),
            Err(e) => {
                eprintln!("cannot run: no tmpfs can be mounted here: {e}");
                None
            }
        }
    }
}

impl Drop for TinyFs {
    fn drop(&mut self) {
        nix::mount::umount2(self.0.path(), nix::mount::MntFlags::MNT_DETACH).ok();
    }
}

#[test]
fn a_full_file_system_is_reported_as_full_and_the_rest_stays_readable() {
    let Some(tiny) = TinyFs::new(1 << 20) else { return };
    let path = tiny.0.path().join("image");
    File::create(&path).and_then(|f| f.set_len(4 << 20)).expect("sparse");
    let mut rig = Rig::new(&options(&path));
    rig.write(0, &pattern(512 << 10)).expect("there is room for this");
    let error = rig.write(1 << 20, &pattern(2 << 20)).expect_err("there is no room for this");
    assert!(matches!(error, Error::Full), "{error:?}");
    assert_eq!(rig.read(0, 512 << 10), pattern(512 << 10));
}

#[test]
fn of_several_flushes_none_succeeds_before_an_earlier_one_is_known_to_have() {
    let file = image(1 << 20);
    let shared = Arc::new(Image::open(&options(file.path())).expect("it opens"));
    let mut disk = FileDisk::new(Arc::clone(&shared));
    let mut ring = Ring::new(64).expect("io_uring works here");
    disk.attach(&mut ring).expect("it attaches");
    let mut done = Vec::new();
    let ask = |disk: &mut FileDisk, ring: &mut Ring, done: &mut Vec<Done>| {
        for tag in 0..4 {
            let request =
                Request { tag, operation: Operation::Flush, offset: 0, len: 0, buffer: Buffer::empty() };
            disk.submit(ring, request, done);
        }
    };
    let end = |disk: &mut FileDisk, ring: &mut Ring, done: &mut Vec<Done>| {
        while disk.in_flight() > 0 {
            ring.wait(None).expect("it waits");
            while let Some(completion) = ring.reap() {
                assert!(disk.complete(ring, completion, done));
            }
        }
        std::mem::take(done).iter().map(|done| (done.tag, done.result.is_ok())).collect::<Vec<_>>()
    };
    ask(&mut disk, &mut ring, &mut done);
    assert_eq!(end(&mut disk, &mut ring, &mut done), [(0, true), (1, true), (2, true), (3, true)]);

    ask(&mut disk, &mut ring, &mut done);
    disk.abort(&mut ring, &mut done);
    assert_eq!((done.len(), disk.in_flight()), (4, 0), "each comes back");
    done.clear();

    // As the kernel's answer to the first one would.
    ask(&mut disk, &mut ring, &mut done);
    shared.flush_has_failed();
    let ended = end(&mut disk, &mut ring, &mut done);
    assert_eq!(ended[1..], [(1, false), (2, false), (3, false)]);
}
