//! What members and homes say to each other about a page. Contents travel with [`Content::Sent`].

use std::fmt;

/// So many members at most share a guest.
pub const MEMBERS: usize = 16;

/// A PC that takes part in a guest's memory: its number, below [`MEMBERS`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Member(u8);

impl Member {
    /// The member of this number; `None`: there are not so many.
    #[must_use]
    pub fn new(number: u8) -> Option<Self> {
        (usize::from(number) < MEMBERS).then_some(Self(number))
    }

    /// Its number.
    #[must_use]
    pub fn number(self) -> u8 {
        self.0
    }
}

impl fmt::Debug for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "m{}", self.0)
    }
}

/// A set of members.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Members(u16);

impl Members {
    /// Of one.
    #[must_use]
    pub fn of(member: Member) -> Self {
        Self(1 << member.0)
    }

    /// Whether it has `member`.
    #[must_use]
    pub fn has(self, member: Member) -> bool {
        self.0 & 1 << member.0 != 0
    }

    /// With `member` too.
    #[must_use]
    pub fn with(self, member: Member) -> Self {
        Self(self.0 | 1 << member.0)
    }

    /// Without `member`.
    #[must_use]
    pub fn without(self, member: Member) -> Self {
        Self(self.0 & !(1 << member.0))
    }

    /// How many they are: at most [`MEMBERS`].
    #[must_use]
    pub fn len(self) -> u8 {
        self.0.count_ones() as u8
    }

    /// Whether they are none.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// All of them, by number.
    pub fn iter(self) -> impl Iterator<Item = Member> {
        (0..MEMBERS as u8).map(Member).filter(move |member| self.has(*member))
    }
}

impl fmt::Debug for Members {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

/// The number of a transaction of one page. The next one has the next number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Txn(pub u16);

impl Txn {
    /// The one after.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0.wrapping_add(1))
    }
}

/// What a vCPU or device needs of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Right {
    /// To read it.
    Read,
    /// To write to it.
    Write,
}

/// What a transaction makes of the member that it is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Granted {
    /// One of those that read it; its owner stays who it is.
    Share,
    /// Its owner, while others may read it.
    Own,
    /// Its owner, and nobody else has it.
    Write,
}

/// Where the content is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Content {
    /// Nobody ever wrote to the page.
    Zeros,
    /// Whoever asked has it.
    Yours,
    /// In this message.
    Sent,
}

/// From a member to a page's home.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ToHome {
    /// It needs the page. One at a time of each member and page.
    Get {
        /// For what.
        right: Right,
        /// It has a copy, and keeps it until it is answered or told to give it up.
        copy: bool,
    },
    /// It owns the page and wants to be rid of it.
    Offer,
    /// A transaction that was for it is over.
    Done {
        /// Which.
        txn: Txn,
    },
}

/// What one who owns or shares a page must do for a transaction that is for another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Order {
    /// The owner sends its content to `to`. It keeps a copy to read if `granted` is [`Granted::Share`].
    Forward {
        /// For whom.
        to: Member,
        /// The transaction.
        txn: Txn,
        /// What `to` becomes.
        granted: Granted,
        /// From how many members `to` has to hear that their copies are gone.
        gone: u8,
    },
    /// A copy is given up, and `to` is told.
    Invalidate {
        /// For whom.
        to: Member,
        /// The transaction.
        txn: Txn,
    },
}

/// To the member that a transaction is for, from the home or the owner before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Answer {
    /// The transaction.
    pub txn: Txn,
    /// What it becomes,
    pub granted: Granted,
    /// once so many others have said that their copies are gone.
    pub gone: u8,
    /// Where the content is.
    pub content: Content,
}

/// From a home or member to a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ToMember {
    /// From the home.
    Order(Order),
    /// From the home, or the owner before.
    Answer(Answer),
    /// From one whose copy is gone.
    Gone {
        /// For which transaction.
        txn: Txn,
    },
}
