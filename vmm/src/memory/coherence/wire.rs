//! Messages as bytes. A letter has 16 of them, and one encoding only. A body is one letter or several, one after the
//! other; content is the payload, and belongs to the last.
//!
//! ```text
//!   0      1        2      4            9           12      14     15     16
//!  ┌──────┬────────┬──────┬────────────┬───────────┬───────┬──────┬──────┐
//!  │ kind │ detail │ age  │ page       │ note      │ txn   │ to   │ gone │   little-endian; 0 where it says nothing
//!  └──────┴────────┴──────┴────────────┴───────────┴───────┴──────┴──────┘
//! ```
//!
//! The *note* is for holds (`holds.rs`) only: with `Get` and the orders that it leads to, when the asker began to be in
//! need; with what answers an order, whether that had to wait until a hold was over.

use super::message::{Answer, Content, Granted, MEMBERS, Member, Order, Right, ToHome, ToMember, Txn};
use crate::memory::frames::Page;

/// Bytes in a letter.
pub const BODY: usize = 16;

/// How often the guest's memory was forgotten: what is older than that is about memory that is no more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Age(pub u16);

impl Age {
    /// The one after.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0.wrapping_add(1))
    }

    /// Whether it is before `other`.
    #[must_use]
    pub fn before(self, other: Self) -> bool {
        other.0.wrapping_sub(self.0) as i16 > 0
    }
}

/// What members say to each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum What {
    /// To a page's home.
    Home(Page, ToHome),
    /// To a member, of a page.
    Member(Page, ToMember),
    /// From the console: forget all that you have and know, and begin nothing. The letter's age is the new one.
    Forget,
    /// To the console: it is forgotten.
    Forgotten,
    /// From the console: all have forgotten; go on.
    GoOn,
}

/// When somebody began to be in need: a number that is greater than all that its member had heard of (Lamport, CACM 21,
/// 1978), modulo 2^24. So all members agree on who was earlier; of two with the same number, the member with the smaller one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Need(pub(super) u32);

impl Need {
    const BITS: u32 = 24;

    /// The one after.
    #[must_use]
    pub fn next(self) -> Self {
        Self((self.0 + 1) % (1 << Self::BITS))
    }

    /// Whether it is earlier than `other`.
    #[must_use]
    pub fn before(self, other: Self) -> bool {
        (other.0.wrapping_sub(self.0) << (u32::BITS - Self::BITS)) as i32 > 0
    }
}

/// A message, and of which age it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Letter {
    /// The sender's age.
    pub age: Age,
    /// With [`ToHome::Get`] and orders: since when the one whom the transaction is for has been in need.
    pub need: Need,
    /// With [`ToMember::Answer`] and [`ToMember::Gone`]: the order had to wait until a hold was over.
    pub late: bool,
    /// What it says.
    pub what: What,
}

/// Bytes that are no letter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("A message about the guest's memory makes no sense")]
pub struct Malformed;

/// The first byte.
mod kind {
    pub(super) const GET: u8 = 1;
    pub(super) const OFFER: u8 = 2;
    pub(super) const DONE: u8 = 3;
    pub(super) const FORWARD: u8 = 4;
    pub(super) const INVALIDATE: u8 = 5;
    pub(super) const ANSWER: u8 = 6;
    pub(super) const GONE: u8 = 7;
    pub(super) const FORGET: u8 = 8;
    pub(super) const FORGOTTEN: u8 = 9;
    pub(super) const GO_ON: u8 = 10;
}

/// The fields of a body.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Fields {
    kind: u8,
    detail: u8,
    age: u16,
    /// Below 2^40.
    page: u64,
    /// Below 2^24.
    note: u32,
    txn: u16,
    to: u8,
    gone: u8,
}

impl Fields {
    fn bytes(self) -> [u8; BODY] {
        let mut bytes = [0; BODY];
        bytes[0] = self.kind;
        bytes[1] = self.detail;
        bytes[2..4].copy_from_slice(&self.age.to_le_bytes());
        bytes[4..12].copy_from_slice(&self.page.to_le_bytes());
        bytes[9..12].copy_from_slice(&self.note.to_le_bytes()[..3]);
        bytes[12..14].copy_from_slice(&self.txn.to_le_bytes());
        bytes[14] = self.to;
        bytes[15] = self.gone;
        bytes
    }

    fn read(bytes: [u8; BODY]) -> Self {
        let [kind, detail, a0, a1, p0, p1, p2, p3, p4, n0, n1, n2, t0, t1, to, gone] = bytes;
        Self {
            kind,
            detail,
            age: u16::from_le_bytes([a0, a1]),
            page: u64::from_le_bytes([p0, p1, p2, p3, p4, 0, 0, 0]),
            note: u32::from_le_bytes([n0, n1, n2, 0]),
            txn: u16::from_le_bytes([t0, t1]),
            to,
            gone,
        }
    }
}

impl Letter {
    /// Its body.
    #[must_use]
    pub fn encode(&self) -> [u8; BODY] {
        let fields = match self.what {
            What::Home(page, message) => Fields { page: page.0, ..home(message) },
            What::Member(page, message) => Fields { page: page.0, ..member(message) },
            What::Forget => Fields { kind: kind::FORGET, ..Fields::default() },
            What::Forgotten => Fields { kind: kind::FORGOTTEN, ..Fields::default() },
            What::GoOn => Fields { kind: kind::GO_ON, ..Fields::default() },
        };
        Fields { age: self.age.0, note: self.note(), ..fields }.bytes()
    }

    /// Reads a body.
    ///
    /// # Errors
    /// It is none, or says something where it has nothing to say.
    pub fn decode(body: &[u8]) -> Result<Self, Malformed> {
        let fields = Fields::read(body.try_into().map_err(|_| Malformed)?);
        let (need, late) = (Need(fields.note), fields.note == 1);
        let mut letter = Self { age: Age(fields.age), need, late, what: what(fields)? };
        // Only one of them is said.
        letter.need = if letter.says_need() { need } else { Need::default() };
        letter.late = letter.says_late() && late;
        if letter.encode() == body { Ok(letter) } else { Err(Malformed) }
    }

    fn note(&self) -> u32 {
        match (self.says_need(), self.says_late()) {
            (true, _) => self.need.0,
            (_, true) => u32::from(self.late),
            _ => 0,
        }
    }

    fn says_need(&self) -> bool {
        matches!(self.what, What::Home(_, ToHome::Get { .. }) | What::Member(_, ToMember::Order(_)))
    }

    fn says_late(&self) -> bool {
        matches!(self.what, What::Member(_, ToMember::Answer(_) | ToMember::Gone { .. }))
    }

    /// Whether content comes with it.
    #[must_use]
    pub fn has_content(&self) -> bool {
        let What::Member(_, ToMember::Answer(answer)) = self.what else { return false };
        answer.content == Content::Sent
    }
}

fn home(message: ToHome) -> Fields {
    match message {
        ToHome::Get { right, copy } => Fields {
            kind: kind::GET,
            detail: u8::from(right == Right::Write) | u8::from(copy) << 1,
            ..Fields::default()
        },
        ToHome::Offer => Fields { kind: kind::OFFER, ..Fields::default() },
        ToHome::Done { txn } => Fields { kind: kind::DONE, txn: txn.0, ..Fields::default() },
    }
}

fn member(message: ToMember) -> Fields {
    match message {
        ToMember::Order(Order::Forward { to, txn, granted, gone }) => Fields {
            kind: kind::FORWARD,
            detail: granted as u8,
            txn: txn.0,
            to: to.number(),
            gone,
            ..Fields::default()
        },
        ToMember::Order(Order::Invalidate { to, txn }) => {
            Fields { kind: kind::INVALIDATE, txn: txn.0, to: to.number(), ..Fields::default() }
        }
        ToMember::Answer(Answer { txn, granted, gone, content }) => Fields {
            kind: kind::ANSWER,
            detail: granted as u8 | (content as u8) << 4,
            txn: txn.0,
            gone,
            ..Fields::default()
        },
        ToMember::Gone { txn } => Fields { kind: kind::GONE, txn: txn.0, ..Fields::default() },
    }
}

fn what(fields: Fields) -> Result<What, Malformed> {
    let Fields { kind, detail, page, txn, to, gone, .. } = fields;
    let (page, txn) = (Page(page), Txn(txn));
    let others = || if usize::from(gone) < MEMBERS { Ok(gone) } else { Err(Malformed) };
    let to = || Member::new(to).ok_or(Malformed);
    let to_member = |message| Ok(What::Member(page, message));
    match kind {
        kind::GET => {
            let right = if detail & 1 != 0 { Right::Write } else { Right::Read };
            Ok(What::Home(page, ToHome::Get { right, copy: detail & 2 != 0 }))
        }
        kind::OFFER => Ok(What::Home(page, ToHome::Offer)),
        kind::DONE => Ok(What::Home(page, ToHome::Done { txn })),
        kind::FORWARD => {
            let granted = granted(detail)?;
            to_member(ToMember::Order(Order::Forward { to: to()?, txn, granted, gone: others()? }))
        }
        kind::INVALIDATE => to_member(ToMember::Order(Order::Invalidate { to: to()?, txn })),
        kind::ANSWER => {
            let (granted, content) = (granted(detail & 0xf)?, content(detail >> 4)?);
            to_member(ToMember::Answer(Answer { txn, granted, gone: others()?, content }))
        }
        kind::GONE => to_member(ToMember::Gone { txn }),
        kind::FORGET => Ok(What::Forget),
        kind::FORGOTTEN => Ok(What::Forgotten),
        kind::GO_ON => Ok(What::GoOn),
        _ => Err(Malformed),
    }
}

fn granted(number: u8) -> Result<Granted, Malformed> {
    let all = [Granted::Share, Granted::Own, Granted::Write];
    all.into_iter().find(|granted| *granted as u8 == number).ok_or(Malformed)
}

fn content(number: u8) -> Result<Content, Malformed> {
    let all = [Content::Zeros, Content::Yours, Content::Sent];
    all.into_iter().find(|content| *content as u8 == number).ok_or(Malformed)
}

/// Bytes from a peer: what is read is what is written.
#[doc(hidden)]
pub fn fuzz(data: &[u8]) {
    if let Ok(letter) = Letter::decode(data) {
        assert_eq!(letter.encode(), data, "a letter has one encoding");
    }
}

#[cfg(test)]
#[path = "wire_test.rs"]
mod tests;
