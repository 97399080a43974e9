//! What a lease's file says of itself, so that the next process of the agent can take it over. Behind the pages come
//! one bit for each of them (set: its content is in place) and a last page:
//!
//! ```text
//!  0           pages · 4096        + bits        file's end - 4096
//!  ┌───────────────────┬────────────────────────┬──────────────────────────────────────────┐
//!  │ pages             │ bits, to whole pages   │ magic │ quota │ over │ … 64: length │ JSON │
//!  └───────────────────┴────────────────────────┴──────────────────────────────────────────┘
//! ```
//!
//! A bit is set after its page is written and cleared before it is given up, so at whatever moment the process is
//! killed, what the bits say is there.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

use super::PAGE;
use super::mapping::Mapping;
use crate::lease::Holder;

const MAGIC: u64 = u64::from_le_bytes(*b"OMEGAMEM");
/// Where the text begins in the last page.
const TEXT: u64 = 64;

/// Whose memory it is. Nothing of it ever changes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Record {
    /// The layout of the file.
    pub(crate) version: u32,
    /// The lease.
    pub(crate) epoch: u64,
    /// Names this memory: random, in hexadecimal.
    #[serde(with = "crate::lease::hexadecimal")]
    pub(crate) instance: u128,
    /// Pages of the guest's RAM.
    pub(crate) pages: u64,
    /// Who holds it, with the guest's name.
    pub(crate) holder: Holder,
}

/// The version that this program writes and reads.
pub(crate) const VERSION: u32 = 1;

/// Where the parts of a file are that holds so many pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) pages: u64,
}

impl Layout {
    pub(super) fn bits(self) -> u64 {
        self.pages * PAGE
    }

    pub(super) fn words(self) -> usize {
        self.pages.div_ceil(64) as usize
    }

    fn last(self) -> u64 {
        self.bits() + (8 * self.words() as u64).next_multiple_of(PAGE)
    }

    pub(super) fn len(self) -> u64 {
        self.last() + PAGE
    }
}

/// Makes the file of a new lease.
///
/// # Errors
/// No memory is left.
pub(super) fn create(record: &Record, quota: u64) -> io::Result<Mapping> {
    let layout = Layout { pages: record.pages };
    let mapping = Mapping::create("omega-memory", layout.len())?;
    mapping.reserve(layout.last(), PAGE)?;
    let text = serde_json::to_vec(record)?;
    if text.len() as u64 > PAGE - TEXT - 4 {
        return Err(io::Error::other("the lease's names are too long"));
    }
    mapping.write_bytes(layout.last() + TEXT, &(text.len() as u32).to_le_bytes())?;
    mapping.write_bytes(layout.last() + TEXT + 4, &text)?;
    let head = Head::of(&mapping, layout);
    head.set_quota(quota);
    head.0[0].store(MAGIC, Ordering::Release);
    Ok(mapping)
}

/// Takes the memory for the bits of `pages`, and of some around them: bits that nobody uses take none.
///
/// # Errors
/// There is none.
pub(super) fn reserve_bits(mapping: &Mapping, layout: Layout, pages: &Range<u64>) -> io::Result<()> {
    let from = (pages.start / 8) / PAGE * PAGE;
    let to = pages.end.div_ceil(8).next_multiple_of(PAGE);
    mapping.reserve(layout.bits() + from, to - from)
}

/// Reads a file of an earlier process.
///
/// # Errors
/// It is none of a lease, or of another version of the agent.
pub(super) fn read(mapping: &Mapping) -> io::Result<Record> {
    let wrong = |why: &str| io::Error::other(format!("it is no file of a memory lease: {why}"));
    let last = mapping.len().checked_sub(PAGE).ok_or_else(|| wrong("too short"))?;
    if !last.is_multiple_of(PAGE) || mapping.words(last, 1)[0].load(Ordering::Acquire) != MAGIC {
        return Err(wrong("no record at its end"));
    }
    let mut len = [0; 4];
    mapping.read_bytes(last + TEXT, &mut len)?;
    let len = u32::from_le_bytes(len);
    if u64::from(len) > PAGE - TEXT - 4 {
        return Err(wrong("its record is too long"));
    }
    let mut text = vec![0; len as usize];
    mapping.read_bytes(last + TEXT + 4, &mut text)?;
    let record: Record = serde_json::from_slice(&text).map_err(|e| wrong(&e.to_string()))?;
    let fits = record.version == VERSION
        && (1..=vmm::memory::store::protocol::MAX_RAM).contains(&record.pages)
        && Layout { pages: record.pages }.len() == mapping.len();
    if fits { Ok(record) } else { Err(wrong("its record is another version's")) }
}

/// What changes in the last page.
pub(super) struct Head<'a>(&'a [AtomicU64]);

impl<'a> Head<'a> {
    pub(super) fn of(mapping: &'a Mapping, layout: Layout) -> Self {
        Self(mapping.words(layout.last(), 3))
    }

    pub(super) fn quota(&self) -> u64 {
        self.0[1].load(Ordering::Acquire)
    }

    pub(super) fn set_quota(&self, pages: u64) {
        self.0[1].store(pages, Ordering::Release);
    }

    /// The lease has ended, and whatever is still there is nobody's.
    pub(super) fn is_over(&self) -> bool {
        self.0[2].load(Ordering::Acquire) != 0
    }

    pub(super) fn end(&self) {
        self.0[2].store(1, Ordering::Release);
    }
}
