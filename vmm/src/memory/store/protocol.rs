//! The memory protocol: what a guest and an agent that lends it memory say to each other in a transport's requests.
//! Drawn in `docs/memory-protocol.md`. All numbers are little-endian; pages are those of the guest's RAM, 4 KiB each,
//! counted along its RAM file.

use std::ops::Range;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use smallvec::SmallVec;
use transport::metrics::Operations;
pub use transport::wire::fields::Malformed;
use transport::wire::fields::{Reader, put_text};
use transport::wire::{Body, MAX_BODY, MAX_PAYLOAD};

pub use devices::disk::volume::{Lease, Refusal};

/// The bytes of a page.
pub const PAGE: usize = 4096;
/// A request carries at most so many pages.
pub const MAX_PAGES: u32 = (MAX_PAYLOAD / PAGE) as u32;
/// A request forgets at most so many ranges.
pub const MAX_RANGES: usize = (MAX_BODY - 8) / 16;
/// A guest's name has at most so many bytes.
pub const MAX_NAME: usize = 255;
/// A lease is of at most so many pages: 16 TiB of RAM.
pub const MAX_RAM: u64 = 1 << 32;

/// What is asked.
pub mod opcode {
    /// Take a lease, or confirm or resize one: [`Take`](super::Take) to [`Taken`](super::Taken).
    pub const LEASE: u16 = 0x0201;
    /// Keep a lease: [`Lease`](super::Lease) to nothing.
    pub const RENEW: u16 = 0x0202;
    /// Give a lease back with all that is stored under it: [`Lease`](super::Lease) to nothing.
    pub const RELEASE: u16 = 0x0203;
    /// Let this session use a lease: [`Open`](super::Open) to [`Opened`](super::Opened).
    pub const OPEN: u16 = 0x0204;
    /// [`Pages`](super::Pages) to a payload of so many pages.
    pub const FETCH: u16 = 0x0210;
    /// [`Pages`](super::Pages) with a payload of so many pages, to nothing.
    pub const STORE: u16 = 0x0211;
    /// [`Forget`](super::Forget) to nothing.
    pub const FORGET: u16 = 0x0212;
    /// Nothing to a payload: JSON, [`Lending`](super::Lending).
    pub const STATUS: u16 = 0x0220;
}

/// The operations' names, for what counts them.
pub const OPERATIONS: Operations = Operations(&NAMES);

/// The same, to be joined with other protocols' names.
pub const NAMES: [(u16, &str); 8] = [
    (opcode::FETCH, "fetch"),
    (opcode::STORE, "store"),
    (opcode::FORGET, "forget"),
    (opcode::RENEW, "memory_renew"),
    (opcode::LEASE, "memory_lease"),
    (opcode::RELEASE, "memory_release"),
    (opcode::OPEN, "memory_open"),
    (opcode::STATUS, "memory_status"),
];

/// Bits of the `flags` of [`Pages`]. In [`Opened`] those that the agent knows.
pub mod flag {
    /// Of a store: its payload is [packed](crate::memory::store::packed). Of a fetch: the answer's may be, and its body
    /// is a [`Packing`](super::Packing).
    pub const PACKED: u32 = 1;
}

/// Answers other than success. The body is a [`Refusal`], of [`ABSENT`](status::ABSENT) an
/// [`Absent`].
pub mod status {
    use transport::wire::Status;

    /// The agent does not lend (so much) memory; `wait` is not zero if some will be free again so soon.
    pub const NO_MEMORY: Status = Status(0x0200);
    /// The lease is over, or was never this holder's, and everything that was stored under it is gone for good.
    pub const GONE: Status = Status(0x0201);
    /// A page was never stored, or was forgotten.
    pub const ABSENT: Status = Status(0x0202);
    /// As many pages are stored as the lease may hold. Nothing of the request was stored; what was stored under
    /// its pages before is as it was.
    pub const FULL: Status = Status(0x0203);
    /// The pages are not all inside the RAM that the lease is of, or none, or more than a request may carry.
    pub const OUT_OF_RANGE: Status = Status(0x0204);
    /// The agent's policy does not allow it to the node that asks.
    pub const FORBIDDEN: Status = Status(0x0205);
    /// The agent is at its limits; send it again after `wait`.
    pub const BUSY: Status = Status(0x0206);
    /// The agent does not know what the flags ask for.
    pub const UNSUPPORTED: Status = Status(0x0207);
    /// The agent's kernel refused, with its `errno`. Of a store: none of its pages is stored now, whether it was
    /// before or not.
    pub const FAILED: Status = Status(0x0208);
    /// The lease is the asker's, and this session has not opened it.
    pub const NOT_OPEN: Status = Status(0x0209);
}

/// Asks for memory: a lease of pages of one guest's RAM, of which at most `quota` are stored at a time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Take {
    /// Who asks: random for each guest's run.
    pub holder: u128,
    /// 0: a new lease with nothing stored; one that this holder has already ends, with its content. Otherwise the
    /// epoch of the lease that the holder has: it is confirmed and its quota becomes this one, or the answer is
    /// [`status::GONE`].
    pub expected: u64,
    /// The guest's RAM: pages are numbered below this.
    pub pages: u64,
    /// So many pages may be stored at once.
    pub quota: u64,
    /// The guest's name, for people.
    pub guest: String,
}

/// A lease was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Taken {
    /// Names the lease in every request. Grows with each lease of the agent.
    pub epoch: u64,
    /// Names the memory behind it: random. Content never moves from one instance to another, so another instance
    /// means that it is lost.
    pub instance: u128,
    /// The lease ends, and its content with it, when it was not renewed for so long. Every request renews it.
    pub ttl: Duration,
}

/// Lets the session that asks use a lease. Sessions of the same lease are independent of each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Open {
    /// The lease.
    pub epoch: u64,
    /// Who holds it.
    pub holder: u128,
    /// Where the holder's content is; the answer is [`status::GONE`] if it is not there any more.
    pub instance: u128,
}

/// A lease is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Opened {
    /// The guest's RAM.
    pub pages: u64,
    /// So many pages may be stored.
    pub quota: u64,
    /// So many are.
    pub used: u64,
    /// The flags of [`Pages`] that the agent knows.
    pub flags: u32,
}

/// Pages of a leased store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pages {
    /// The lease.
    pub epoch: u64,
    /// The first one.
    pub first: u64,
    /// How many: 1 to [`MAX_PAGES`], which the store checks.
    pub count: u32,
    /// Of [`flag`]; an agent answers unknown ones with [`status::UNSUPPORTED`].
    pub flags: u32,
}

/// How the pages of a fetch come that allowed [`flag::PACKED`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packing {
    /// They are packed; if not, it would not have paid.
    pub packed: bool,
    /// How long the agent was about it; 4 s at most.
    pub took: Duration,
}

/// A page of a fetch is not there: never zeros in its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Absent {
    /// The first such page of the range.
    pub page: u64,
}

/// Gives pages up: their content is worthless.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Forget {
    /// The lease.
    pub epoch: u64,
    /// Pages: 1 to [`MAX_RANGES`] ranges, none empty; they may lie apart from each other in any order.
    pub ranges: SmallVec<[Range<u64>; 4]>,
}

/// What an agent lends, in the answer to [`opcode::STATUS`]. Sizes are in bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lending {
    /// The layout of this value.
    pub version: u32,
    /// Lent in all, at most; 0 if the agent lends no memory.
    pub size: u64,
    /// Leased now: the leases' quotas.
    pub leased: u64,
    /// Of it, stored now.
    pub used: u64,
    /// So much more the asker may lease now.
    pub free: u64,
    /// Whether what is stored is locked into RAM.
    pub locked: bool,
    /// Whether what is stored outlives a restart of the agent's process.
    pub survives: bool,
    /// The leases that the asker may know of.
    pub leases: Vec<Lent>,
}

/// A lease of memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lent {
    /// The guest that it is for.
    pub guest: String,
    /// The node that holds it, if it is proven.
    pub node: Option<String>,
    /// Its epoch.
    pub epoch: u64,
    /// The guest's RAM in bytes.
    pub ram: u64,
    /// What may be stored, in bytes.
    pub quota: u64,
    /// What is stored, in bytes.
    pub used: u64,
    /// Connections that use it.
    pub connections: u32,
    /// Its holder was heard of so long ago, in milliseconds.
    pub idle: u64,
}

impl Take {
    /// As bytes. A name that is too long is cut.
    #[must_use]
    pub fn encode(&self) -> Body {
        let mut out = Body::new();
        out.extend(self.holder.to_le_bytes());
        out.extend(self.expected.to_le_bytes());
        out.extend(self.pages.to_le_bytes());
        out.extend(self.quota.to_le_bytes());
        put_text(&mut out, &self.guest, MAX_NAME);
        out
    }

    /// From bytes.
    ///
    /// # Errors
    /// They are none of this: also if there are no pages, too many, or none may be stored or more than there are.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut r = Reader::new(bytes, "memory lease request");
        let (holder, expected, pages, quota) = (r.u128()?, r.u64()?, r.u64()?, r.u64()?);
        if !(1..=MAX_RAM).contains(&pages) || !(1..=pages).contains(&quota) {
            return Err(r.malformed());
        }
        let guest = r.text(MAX_NAME)?;
        r.end(Self { holder, expected, pages, quota, guest })
    }
}

impl Taken {
    /// As bytes.
    #[must_use]
    pub fn encode(&self) -> Body {
        let ttl = u32::try_from(self.ttl.as_millis()).unwrap_or(u32::MAX);
        let mut out = Body::new();
        out.extend(self.epoch.to_le_bytes());
        out.extend(self.instance.to_le_bytes());
        out.extend(ttl.to_le_bytes());
        out
    }

    /// From bytes.
    ///
    /// # Errors
    /// They are none of this.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut r = Reader::new(bytes, "memory lease answer");
        let (epoch, instance) = (r.u64()?, r.u128()?);
        let ttl = Duration::from_millis(r.u32()?.into());
        r.end(Self { epoch, instance, ttl })
    }
}

impl Open {
    /// As bytes.
    #[must_use]
    pub fn encode(&self) -> Body {
        let mut out = Body::new();
        out.extend(self.epoch.to_le_bytes());
        out.extend(self.holder.to_le_bytes());
        out.extend(self.instance.to_le_bytes());
        out
    }

    /// From bytes.
    ///
    /// # Errors
    /// They are none of this.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut r = Reader::new(bytes, "memory open request");
        let (epoch, holder, instance) = (r.u64()?, r.u128()?, r.u128()?);
        r.end(Self { epoch, holder, instance })
    }

    /// The lease that it names.
    #[must_use]
    pub fn lease(&self) -> Lease {
        Lease { epoch: self.epoch, holder: self.holder }
    }
}

impl Opened {
    /// As bytes.
    #[must_use]
    pub fn encode(&self) -> Body {
        let mut out = Body::new();
        out.extend(self.pages.to_le_bytes());
        out.extend(self.quota.to_le_bytes());
        out.extend(self.used.to_le_bytes());
        out.extend(self.flags.to_le_bytes());
        out
    }

    /// From bytes.
    ///
    /// # Errors
    /// They are none of this.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut r = Reader::new(bytes, "memory open answer");
        let (pages, quota, used, flags) = (r.u64()?, r.u64()?, r.u64()?, r.u32()?);
        if !(1..=MAX_RAM).contains(&pages) || quota > pages {
            return Err(r.malformed());
        }
        r.end(Self { pages, quota, used, flags })
    }
}

impl Pages {
    /// As bytes: 24 of them.
    #[must_use]
    pub fn encode(&self) -> Body {
        let mut out = Body::new();
        out.extend(self.epoch.to_le_bytes());
        out.extend(self.first.to_le_bytes());
        out.extend(self.count.to_le_bytes());
        out.extend(self.flags.to_le_bytes());
        out
    }

    /// From bytes. Whether the pages are the lease's is for the store to check.
    ///
    /// # Errors
    /// They are none of this.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut r = Reader::new(bytes, "memory request");
        let (epoch, first, count, flags) = (r.u64()?, r.u64()?, r.u32()?, r.u32()?);
        r.end(Self { epoch, first, count, flags })
    }
}

impl Packing {
    /// As bytes.
    #[must_use]
    pub fn encode(&self) -> Body {
        let flags = if self.packed { flag::PACKED } else { 0 };
        let took = u32::try_from(self.took.as_nanos()).unwrap_or(u32::MAX);
        let mut out = Body::new();
        out.extend(flags.to_le_bytes());
        out.extend(took.to_le_bytes());
        out
    }

    /// From bytes.
    ///
    /// # Errors
    /// They are none of this: also if there are flags that are not known.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut r = Reader::new(bytes, "packing of pages");
        let (flags, took) = (r.u32()?, r.u32()?);
        if flags & !flag::PACKED != 0 {
            return Err(r.malformed());
        }
        r.end(Self { packed: flags != 0, took: Duration::from_nanos(took.into()) })
    }
}

impl Absent {
    /// As bytes.
    #[must_use]
    pub fn encode(&self) -> Body {
        Body::from_slice(&self.page.to_le_bytes())
    }

    /// From bytes.
    ///
    /// # Errors
    /// They are none of this.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut r = Reader::new(bytes, "absent page");
        let page = r.u64()?;
        r.end(Self { page })
    }
}

impl Forget {
    /// As bytes: the first [`MAX_RANGES`] ranges.
    #[must_use]
    pub fn encode(&self) -> Body {
        let mut out = Body::new();
        out.extend(self.epoch.to_le_bytes());
        for range in self.ranges.iter().take(MAX_RANGES) {
            out.extend(range.start.to_le_bytes());
            out.extend(range.end.to_le_bytes());
        }
        out
    }

    /// From bytes. Whether the pages are the lease's is for the store to check.
    ///
    /// # Errors
    /// They are none of this: also if a range is empty, or there is none.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut r = Reader::new(bytes, "memory forget request");
        let epoch = r.u64()?;
        let mut ranges = SmallVec::new();
        while r.left() > 0 {
            let range = r.u64()?..r.u64()?;
            if range.is_empty() || ranges.len() == MAX_RANGES {
                return Err(r.malformed());
            }
            ranges.push(range);
        }
        if ranges.is_empty() {
            return Err(r.malformed());
        }
        r.end(Self { epoch, ranges })
    }
}

/// Decodes `data` as every body there is; each that decodes must encode to the same bytes again.
#[doc(hidden)]
pub fn fuzz(data: &[u8]) {
    let again = [
        Take::decode(data).ok().map(|v| v.encode()),
        Taken::decode(data).ok().map(|v| v.encode()),
        Open::decode(data).ok().map(|v| v.encode()),
        Opened::decode(data).ok().map(|v| v.encode()),
        Pages::decode(data).ok().map(|v| v.encode()),
        Packing::decode(data).ok().map(|v| v.encode()),
        Absent::decode(data).ok().map(|v| v.encode()),
        Forget::decode(data).ok().map(|v| v.encode()),
    ];
    for bytes in again.into_iter().flatten() {
        assert_eq!(&bytes[..], data, "a body has one encoding");
    }
}

#[cfg(test)]
#[path = "protocol_test.rs"]
mod protocol_test;
