//! The local file as a place: a second copy of what helpers have, read only when they are away.
#![allow(unsafe_code)] // io_uring takes pointers into buffers, which are kept until the kernel is done

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use io_uring::{opcode, types};
use nix::sys::statvfs::fstatvfs;
use slab::Slab;
use transport::buffer::Buffer;
use transport::ring::{self, Completion, Ring};

use super::ask::{Ask, News, Outcome, What};
use crate::memory::fault::PAGE;

/// The file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It cannot be made.
    #[error(
        "The swap file {path} cannot be made: {source}; name a path in a folder that this user may write to"
    )]
    Make {
        /// Where.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The disk is too full.
    #[error("The swap file {path} needs up to {need} MiB, and its disk has {free} MiB left")]
    Full {
        /// Where.
        path: PathBuf,
        /// Mebibytes of guest RAM.
        need: u64,
        /// Mebibytes free.
        free: u64,
    },
}

/// Makes the file for `len` bytes of RAM: sparse, for this user only, and without a name from here on, so that
/// nothing is left of it whatever happens.
///
/// # Errors
/// It cannot be made, or the disk has no room for all of it.
pub(super) fn make(path: &Path, len: u64) -> Result<File, Error> {
    let failed = |source| Error::Make { path: path.to_owned(), source };
    let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path);
    let file = file.map_err(failed)?;
    std::fs::remove_file(path).map_err(failed)?;
    let disk = fstatvfs(&file).map_err(|errno| failed(errno.into()))?;
    let free = disk.blocks_available().saturating_mul(disk.fragment_size());
    if free < len {
        return Err(Error::Full { path: path.to_owned(), need: len >> 20, free: free >> 20 });
    }
    file.set_len(len).map_err(failed)?;
    Ok(file)
}

/// A read or write under way.
struct Transfer {
    tag: u64,
    write: bool,
    /// Where in the file, in bytes.
    at: u64,
    buffer: Buffer,
    /// Bytes that are through already.
    done: usize,
}

impl Transfer {
    fn overlaps(&self, other: &Self) -> bool {
        let end = |transfer: &Self| transfer.at + transfer.buffer.len() as u64;
        self.at < end(other) && other.at < end(self)
    }
}

/// A file on a handler's ring. Several handlers may share it: each has pages of its own.
pub(super) struct SwapFile {
    file: File,
    source: Option<ring::Source>,
    /// Boxed, so that the kernel finds their scatter lists where they were.
    flying: Slab<(Transfer, Box<[libc::iovec]>)>,
    /// Wait for one that they overlap.
    waiting: VecDeque<Transfer>,
    failed: bool,
    said: bool,
}

// SAFETY: the scatter lists name memory of the buffers beside them, which may be sent; nobody reads them here.
unsafe impl Send for SwapFile {}

impl SwapFile {
    pub(super) fn new(file: File) -> Self {
        Self { file, source: None, flying: Slab::new(), waiting: VecDeque::new(), failed: false, said: false }
    }

    pub(super) fn attach(&mut self, ring: &mut Ring) {
        self.source = Some(ring.source());
    }

    /// Carries out what the core asks. Forgetting costs nothing and frees nothing: the file never needs more than
    /// the guest's RAM.
    pub(super) fn push(&mut self, ring: &mut Ring, asks: &mut Vec<Ask>, news: &mut Vec<News>) {
        if !std::mem::replace(&mut self.said, true) {
            news.push(News::Here);
        }
        for Ask { tag, what } in asks.drain(..) {
            let (write, first, buffer) = match what {
                What::Fetch { first, count, .. } => (false, first, Buffer::zeroed(count as usize * PAGE)),
                What::Store { first, content } => (true, first, content),
                What::Forget { .. } => {
                    news.push(News::Answer(tag, Outcome::Done));
                    continue;
                }
            };
            let at = first * PAGE as u64;
            self.waiting.push_back(Transfer { tag, write, at, buffer, done: 0 });
        }
        self.start(ring);
    }

    /// Starts what overlaps nothing that came earlier.
    fn start(&mut self, ring: &mut Ring) {
        let mut blocked: VecDeque<Transfer> = VecDeque::new();
        while let Some(transfer) = self.waiting.pop_front() {
            let clash = |other: &Transfer| (transfer.write || other.write) && transfer.overlaps(other);
            if self.flying.iter().any(|(_, (other, _))| clash(other)) || blocked.iter().any(clash) {
                blocked.push_back(transfer);
            } else {
                self.submit(ring, transfer);
            }
        }
        self.waiting = blocked;
    }

    fn submit(&mut self, ring: &mut Ring, transfer: Transfer) {
        let Some(source) = self.source else { return };
        let left = transfer.buffer.len() - transfer.done;
        let rest = transfer.buffer.slice(transfer.done, left).unwrap_or_default();
        let iovecs: Box<[libc::iovec]> = rest.iovecs().into();
        let (write, at) = (transfer.write, transfer.at + transfer.done as u64);
        let slot = self.flying.insert((transfer, iovecs));
        let iovecs = &self.flying[slot].1;
        let (fd, count) = (types::Fd(self.file.as_raw_fd()), iovecs.len() as u32);
        let entry = if write {
            opcode::Writev::new(fd, iovecs.as_ptr(), count).offset(at).build()
        } else {
            opcode::Readv::new(fd, iovecs.as_ptr(), count).offset(at).build()
        };
        // SAFETY: `flying` keeps the scatter list, which is boxed, and the buffer that it names until the completion;
        // `close` waits for it.
        unsafe { ring.push(entry, source.token(slot as u64)) };
    }

    /// Looks at a completion. `false`: it is not this file's.
    pub(super) fn complete(&mut self, ring: &mut Ring, completion: Completion, news: &mut Vec<News>) -> bool {
        if Some(completion.token.source()) != self.source {
            return false;
        }
        let slot = completion.token.payload() as usize;
        let Some((mut transfer, _)) = self.flying.try_remove(slot) else { return true };
        match completion.count() {
            Ok(0) => self.fail(&io::ErrorKind::UnexpectedEof.into(), news),
            Ok(count) => {
                transfer.done += count;
                if transfer.done < transfer.buffer.len() {
                    self.submit(ring, transfer);
                } else {
                    let Transfer { tag, write, buffer, .. } = transfer;
                    let outcome = if write { Outcome::Done } else { Outcome::Fetched(buffer) };
                    news.push(News::Answer(tag, outcome));
                }
            }
            Err(e) if matches!(e.raw_os_error(), Some(libc::EINTR | libc::EAGAIN)) => {
                self.submit(ring, transfer);
            }
            Err(e) => self.fail(&e, news),
        }
        self.start(ring);
        true
    }

    /// A disk that failed once is not trusted again.
    fn fail(&mut self, error: &io::Error, news: &mut Vec<News>) {
        self.waiting.clear();
        if !std::mem::replace(&mut self.failed, true) {
            tracing::error!(%error, "The swap file fails; pages have their copies on helpers only from now on");
            news.push(News::Left(format!("the swap file fails: {error}")));
        }
    }

    /// Whether the kernel still uses its buffers.
    pub(super) fn is_busy(&self) -> bool {
        !self.flying.is_empty()
    }
}

impl Drop for SwapFile {
    fn drop(&mut self) {
        // The kernel may still use what it was given: then it is given up.
        if self.is_busy() {
            std::mem::forget(std::mem::take(&mut self.flying));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::store::Urgency;

    fn run(file: &mut SwapFile, ring: &mut Ring, whats: Vec<What>) -> Vec<(u64, Outcome)> {
        let mut asks = whats.into_iter().zip(0..).map(|(what, tag)| Ask { tag, what }).collect();
        let mut news = Vec::new();
        file.push(ring, &mut asks, &mut news);
        while file.is_busy() {
            ring.wait(None).expect("it waits");
            while let Some(completion) = ring.reap() {
                assert!(file.complete(ring, completion, &mut news));
            }
        }
        let answers = news.into_iter().filter_map(|news| match news {
            News::Answer(tag, outcome) => Some((tag, outcome)),
            News::Here => None,
            other => panic!("{other:?}"),
        });
        answers.collect()
    }

    fn page(value: u8) -> Buffer {
        Buffer::from_vec(vec![value; PAGE])
    }

    #[test]
    fn the_last_of_several_writes_of_a_page_stays_and_the_file_has_no_name() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("swap");
        let mut file = SwapFile::new(make(&path, 64 * PAGE as u64).expect("a file"));
        assert!(!path.exists());
        let mut ring = Ring::new(8).expect("io_uring works here");
        file.attach(&mut ring);
        let stores = (1..40).map(|value| What::Store { first: 3, content: page(value) });
        assert_eq!(run(&mut file, &mut ring, stores.collect()).len(), 39);
        let fetch = What::Fetch { first: 2, count: 2, urgency: Urgency::Fault };
        let answers = run(&mut file, &mut ring, vec![fetch]);
        let [(0, Outcome::Fetched(content))] = &answers[..] else { panic!("{answers:?}") };
        assert!(content.to_vec()[..PAGE].iter().all(|byte| *byte == 0));
        assert!(content.to_vec()[PAGE..].iter().all(|byte| *byte == 39), "the last one");
    }

    #[test]
    fn a_disk_without_room_is_refused_before_the_guest_starts() {
        let folder = tempfile::tempdir().expect("a folder");
        let error = make(&folder.path().join("swap"), 1 << 60).expect_err("no disk is so large");
        assert!(error.to_string().contains("its disk has"), "{error}");
    }

    #[test]
    fn a_file_that_fails_is_left() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("swap");
        std::fs::write(&path, []).expect("a file");
        let mut file = SwapFile::new(File::open(&path).expect("for reading only"));
        let mut ring = Ring::new(8).expect("io_uring works here");
        file.attach(&mut ring);
        let (mut asks, mut news) =
            (vec![Ask { tag: 0, what: What::Store { first: 0, content: page(1) } }], Vec::new());
        file.push(&mut ring, &mut asks, &mut news);
        while file.is_busy() {
            ring.wait(None).expect("it waits");
            while let Some(completion) = ring.reap() {
                file.complete(&mut ring, completion, &mut news);
            }
        }
        assert!(matches!(news[..], [News::Here, News::Left(_)]), "{news:?}");
    }
}
