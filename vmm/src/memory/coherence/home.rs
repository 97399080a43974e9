//! What a page's home knows of it: who owns it, who may have a copy, and who waits. One transaction at a time.
//!
//! ```text
//!             Get, Offer: orders and an answer go out
//!        ┌────────────────────────────────────────────┐
//!        │                                            ▼
//!      Idle ◄──────────────────────────────────────  Busy ◄─┐
//!               Done, and nobody waits                │     │ Get: waits; Done: the next one's turn
//!                                                     └─────┘
//! ```

use smallvec::SmallVec;

use super::Violation;
use super::message::{Answer, Content, Granted, Member, Members, Order, Right, ToHome, ToMember, Txn};

/// A request that waits for its turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Get {
    from: Member,
    right: Right,
    copy: bool,
}

/// The transaction that is under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Busy {
    to: Member,
    granted: Granted,
}

/// What is under way and who waits: only pages that are fought for have it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Traffic {
    busy: Option<Busy>,
    /// In order; one of each member at most.
    waiting: SmallVec<[Get; 2]>,
    /// Who offers it. Of those one can be its owner; the others' offers are outdated.
    offers: Members,
}

/// What a page's home knows of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Line {
    /// Who answers for the content; `None`: it is all zeros.
    owner: Option<Member>,
    /// Who may have a copy, the owner among them.
    sharers: Members,
    txn: Txn,
    traffic: Option<Box<Traffic>>,
}

/// Messages to send; rarely more than three.
pub type Sendings = SmallVec<[(Member, ToMember); 3]>;

impl Line {
    /// Who answers for the content; `None`: it is all zeros, and nobody has it.
    #[must_use]
    pub fn owner(&self) -> Option<Member> {
        self.owner
    }

    /// Whether no transaction is under way and nobody waits for one.
    #[must_use]
    pub fn idle(&self) -> bool {
        self.traffic.is_none()
    }

    /// What a message from `from` leads to. `keeper` takes pages that their owners want to be rid of.
    ///
    /// # Errors
    /// The message makes no sense.
    pub fn step(
        mut self,
        keeper: Member,
        from: Member,
        message: ToHome,
    ) -> Result<(Self, Sendings), Violation> {
        let mut sendings = Sendings::new();
        let mut traffic = self.traffic.take().unwrap_or_default();
        match message {
            ToHome::Get { right, copy } => {
                if traffic.waiting.iter().any(|get| get.from == from) {
                    return Err(Violation("a member asked twice"));
                }
                traffic.waiting.push(Get { from, right, copy });
            }
            ToHome::Offer => traffic.offers = traffic.offers.with(from),
            ToHome::Done { txn } => {
                let busy = traffic.busy.take().filter(|busy| busy.to == from && self.txn == txn);
                self.done(busy.ok_or(Violation("something is done that was not begun"))?);
            }
        }
        while traffic.busy.is_none() {
            if !traffic.waiting.is_empty() {
                let get = traffic.waiting.remove(0);
                traffic.busy = Some(self.get(get, &mut sendings));
            } else if !std::mem::take(&mut traffic.offers).iter().any(|from| {
                traffic.busy = self.offered(keeper, from, &mut sendings);
                traffic.busy.is_some()
            }) {
                break;
            }
        }
        self.traffic = (*traffic != Traffic::default()).then_some(traffic);
        Ok((self, sendings))
    }

    /// Begins what `get` asks for.
    fn get(&mut self, get: Get, sendings: &mut Sendings) -> Busy {
        let Get { from, right, copy } = get;
        self.txn = self.txn.next();
        let txn = self.txn;
        let answer = |granted, gone, content| ToMember::Answer(Answer { txn, granted, gone, content });
        let Some(owner) = self.owner else {
            // Nobody has it, so whoever comes first may as well write to it.
            sendings.push((from, answer(Granted::Write, 0, Content::Zeros)));
            return Busy { to: from, granted: Granted::Write };
        };
        let forward = |granted, gone| ToMember::Order(Order::Forward { to: from, txn, granted, gone });
        let granted = match right {
            Right::Read if owner == from => {
                sendings.push((from, answer(Granted::Own, 0, Content::Yours)));
                Granted::Own
            }
            Right::Read => {
                sendings.push((owner, forward(Granted::Share, 0)));
                Granted::Share
            }
            Right::Write => {
                let yours = owner == from || copy && self.sharers.has(from);
                let others = self.sharers.without(from);
                let others = if yours { others } else { others.without(owner) };
                let order = ToMember::Order(Order::Invalidate { to: from, txn });
                sendings.extend(others.iter().map(|other| (other, order)));
                sendings.push(if yours {
                    (from, answer(Granted::Write, others.len(), Content::Yours))
                } else {
                    (owner, forward(Granted::Write, others.len()))
                });
                Granted::Write
            }
        };
        Busy { to: from, granted }
    }

    /// Has the page go from `from` to its keeper; `None`: it is not `from`'s to offer, or has nowhere to go.
    fn offered(&mut self, keeper: Member, from: Member, sendings: &mut Sendings) -> Option<Busy> {
        if self.owner != Some(from) || keeper == from {
            return None;
        }
        self.txn = self.txn.next();
        let (txn, granted) = (self.txn, Granted::Own);
        sendings.push((from, ToMember::Order(Order::Forward { to: keeper, txn, granted, gone: 0 })));
        Some(Busy { to: keeper, granted })
    }

    fn done(&mut self, Busy { to, granted }: Busy) {
        match granted {
            Granted::Share => self.sharers = self.sharers.with(to),
            Granted::Own => {
                if let Some(before) = self.owner.filter(|before| *before != to) {
                    self.sharers = self.sharers.without(before);
                }
                self.owner = Some(to);
                self.sharers = self.sharers.with(to);
            }
            Granted::Write => {
                self.owner = Some(to);
                self.sharers = Members::of(to);
            }
        }
    }
}
