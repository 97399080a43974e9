//! What a member knows of a page, and what it does when something happens.
//!
//! ```text
//!                   Get, answered: Share                          Get, answered: Write
//!            ┌─────────────────────────────► Shared ───────────────────────────────────┐
//!            │        ◄──────────────────────                                          ▼
//!          None         Invalidate, dropped          Forward: Share               Modified
//!            │        ◄──────────────────────        ◄─────────────────────────────────
//!            └─────────────────────────────► Owned ────────────────────────────────────►
//!                   another's Offer            Get, answered: Write
//!                   ◄──────────────── Owned, Modified: Forward to one who writes or keeps ────────
//! ```

use smallvec::SmallVec;

use super::Violation;
use super::message::{Answer, Content, Granted, Member, Order, Right, ToHome, ToMember, Txn};

/// What a member has of a page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Copy {
    /// Nothing: a touch is a fault.
    #[default]
    None,
    /// Its content, mapped to be read.
    Shared,
    /// The same; and it answers for the content.
    Owned,
    /// Its content, mapped to be written; nobody else has it.
    Modified,
}

impl Copy {
    /// Whether `right` can be used at once.
    #[must_use]
    pub fn allows(self, right: Right) -> bool {
        match right {
            Right::Read => self != Self::None,
            Right::Write => self == Self::Modified,
        }
    }

    /// Whether this member answers for the content.
    #[must_use]
    pub fn owns(self) -> bool {
        matches!(self, Self::Owned | Self::Modified)
    }
}

/// A transaction that is for this member, as far as it has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
struct Progress {
    /// Not known before the first message of it.
    txn: Option<Txn>,
    answer: Option<Answer>,
    gone: u8,
}

impl Progress {
    fn belongs(&mut self, txn: Txn) -> Result<(), Violation> {
        if *self.txn.get_or_insert(txn) == txn { Ok(()) } else { Err(Violation("two transactions at once")) }
    }

    fn complete(&self) -> Result<Option<Answer>, Violation> {
        match self.answer {
            Some(answer) if self.gone > answer.gone => Err(Violation("more copies are gone than there were")),
            Some(answer) if self.gone == answer.gone => Ok(Some(answer)),
            _ => Ok(None),
        }
    }
}

/// What happens to a page at a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// Somebody stands still for it.
    Fault(Right),
    /// A message came.
    Heard(ToMember),
    /// An order is about to come, and somebody still uses the page.
    Hold,
    /// It was here for as long as it may be held.
    HoldOver,
    /// Its memory is wanted for something else. Who keeps pages for others does not say so of one that it owns.
    Evict,
}

/// What is to be done, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Send this to the page's home.
    Ask(ToHome),
    /// Keep the content that came with the message until it is installed or thrown away.
    Stage,
    /// Throw it away.
    Unstage,
    /// Map the content that was kept; so that it can be written to, or only read.
    Install {
        /// Whether it can be written to.
        writable: bool,
    },
    /// Map zeros, writable.
    InstallZeros,
    /// What is mapped may be written to from now on.
    Unprotect,
    /// What is mapped may only be read from now on: nobody writes to it when this is done.
    Protect,
    /// Take it out of the mapping: nobody reads or writes it when this is done. Its content is still needed.
    Unmap,
    /// Send the content, which nobody can change now, with this.
    Send(Member, Answer),
    /// Say that the copy is gone.
    SendGone(Member, Txn),
    /// Its memory is free.
    Free,
    /// Whoever stands still for it may go on, or ask again.
    Wake,
    /// It may not be taken away before [`Event::HoldOver`].
    Hold,
}

/// What is to be done; rarely more than four things.
pub type Actions = SmallVec<[Action; 4]>;

/// See the [module](self).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Page {
    copy: Copy,
    /// What somebody stands still for.
    wants: Option<Right>,
    /// The home was asked for it.
    asked: Option<Progress>,
    /// Another's offer is being taken over.
    taking: Option<Progress>,
    /// The home was told that it may go.
    offered: bool,
    held: bool,
    /// What is to be done when it is held no longer.
    deferred: Option<Order>,
}

impl Page {
    /// A page of which nothing is under way.
    #[must_use]
    pub fn resting(copy: Copy) -> Self {
        Self { copy, ..Self::default() }
    }

    /// What the member has of it.
    #[must_use]
    pub fn copy(&self) -> Copy {
        self.copy
    }

    /// Whether nothing of it is under way, so that [`Page::copy`] is all there is to know.
    #[must_use]
    pub fn idle(&self) -> bool {
        *self == Self::resting(self.copy)
    }

    /// Whether it waits to be given up until it is held no longer.
    #[must_use]
    pub fn held(&self) -> bool {
        self.held
    }

    /// Whether another member waits until it is held no longer.
    #[must_use]
    pub fn defers(&self) -> bool {
        self.deferred.is_some()
    }

    /// Whether its home was asked for it.
    #[must_use]
    pub fn asks(&self) -> bool {
        self.asked.is_some()
    }

    /// What `event` leads to.
    ///
    /// # Errors
    /// A message makes no sense.
    pub fn step(mut self, event: Event) -> Result<(Self, Actions), Violation> {
        let mut actions = Actions::new();
        match event {
            Event::Fault(right) => self.fault(right, &mut actions),
            Event::Heard(ToMember::Order(order)) => self.order(order, &mut actions)?,
            Event::Heard(ToMember::Answer(answer)) => self.answer(answer, &mut actions)?,
            Event::Heard(ToMember::Gone { txn }) => {
                let asked = self.asked.as_mut().ok_or(Violation("a copy is gone that nobody asked for"))?;
                asked.belongs(txn)?;
                asked.gone = asked.gone.checked_add(1).ok_or(Violation("too many copies are gone"))?;
                self.finish(&mut actions)?;
            }
            Event::Hold => self.held |= self.copy != Copy::None,
            Event::HoldOver => {
                self.held = false;
                if let Some(order) = self.deferred.take() {
                    self.obey(order, &mut actions)?;
                }
            }
            Event::Evict => self.evict(&mut actions),
        }
        Ok((self, actions))
    }

    fn fault(&mut self, right: Right, actions: &mut Actions) {
        if self.copy.allows(right) {
            actions.push(Action::Wake);
            return;
        }
        self.wants = self.wants.max(Some(right));
        if self.asked.is_none() {
            self.ask(actions);
        }
    }

    /// Asks for what is wanted.
    fn ask(&mut self, actions: &mut Actions) {
        let Some(right) = self.wants else { return };
        self.asked = Some(Progress::default());
        actions.push(Action::Ask(ToHome::Get { right, copy: self.copy != Copy::None }));
    }

    fn order(&mut self, order: Order, actions: &mut Actions) -> Result<(), Violation> {
        if self.deferred.is_some() {
            return Err(Violation("two orders at once"));
        }
        if self.held && self.copy != Copy::None {
            self.deferred = Some(order);
            return Ok(());
        }
        self.obey(order, actions)
    }

    fn obey(&mut self, order: Order, actions: &mut Actions) -> Result<(), Violation> {
        match order {
            Order::Forward { to, txn, granted, gone } => {
                if !self.copy.owns() {
                    return Err(Violation("who does not own a page cannot send it"));
                }
                let answer = Answer { txn, granted, gone, content: Content::Sent };
                if granted == Granted::Share {
                    if self.copy == Copy::Modified {
                        actions.push(Action::Protect);
                    }
                    self.copy = Copy::Owned;
                    actions.push(Action::Send(to, answer));
                } else {
                    actions.extend([Action::Unmap, Action::Send(to, answer), Action::Free]);
                    self.gone();
                }
            }
            Order::Invalidate { to, txn } => {
                // One that only shares it may have dropped it without a word.
                if self.copy != Copy::None {
                    actions.extend([Action::Unmap, Action::Free]);
                }
                self.gone();
                actions.push(Action::SendGone(to, txn));
            }
        }
        Ok(())
    }

    fn gone(&mut self) {
        self.copy = Copy::None;
        self.offered = false;
    }

    fn answer(&mut self, answer: Answer, actions: &mut Actions) -> Result<(), Violation> {
        // A page that nobody here asked for is sent by one who wants to be rid of it.
        let given = answer.granted == Granted::Own && answer.content == Content::Sent;
        let progress = if given { Some(self.taking.get_or_insert_default()) } else { self.asked.as_mut() };
        let progress = progress.ok_or(Violation("an answer that nobody asked for"))?;
        progress.belongs(answer.txn)?;
        if progress.answer.replace(answer).is_some() {
            return Err(Violation("an answer came twice"));
        }
        if answer.content == Content::Sent {
            actions.push(Action::Stage);
        }
        if given { self.take(actions) } else { self.finish(actions) }
    }

    /// Another's page was sent here to be kept.
    fn take(&mut self, actions: &mut Actions) -> Result<(), Violation> {
        let Some(progress) = self.taking else { return Ok(()) };
        let Some(answer) = progress.complete()? else { return Ok(()) };
        self.taking = None;
        match self.copy {
            Copy::None => actions.push(Action::Install { writable: false }),
            Copy::Shared => actions.push(Action::Unstage),
            Copy::Owned | Copy::Modified => return Err(Violation("a page was given to its owner")),
        }
        self.copy = Copy::Owned;
        actions.push(Action::Ask(ToHome::Done { txn: answer.txn }));
        Ok(())
    }

    /// Uses what was asked for, if everything has come.
    fn finish(&mut self, actions: &mut Actions) -> Result<(), Violation> {
        let Some(progress) = self.asked else { return Ok(()) };
        let Some(answer) = progress.complete()? else { return Ok(()) };
        self.asked = None;
        let has = self.copy != Copy::None;
        match (answer.content, answer.granted) {
            (Content::Zeros, Granted::Write) if !has => actions.push(Action::InstallZeros),
            (Content::Sent, granted) if !has => {
                actions.push(Action::Install { writable: granted == Granted::Write });
            }
            (Content::Yours, Granted::Write) if has => actions.push(Action::Unprotect),
            (Content::Yours, Granted::Own) if self.copy == Copy::Owned => {}
            _ => return Err(Violation("an answer does not fit what is here")),
        }
        self.copy = match answer.granted {
            Granted::Share => Copy::Shared,
            Granted::Own => Copy::Owned,
            Granted::Write => Copy::Modified,
        };
        self.held = true;
        actions.extend([Action::Hold, Action::Wake, Action::Ask(ToHome::Done { txn: answer.txn })]);
        if self.wants.take_if(|wants| self.copy.allows(*wants)).is_none() {
            self.ask(actions);
        }
        Ok(())
    }

    fn evict(&mut self, actions: &mut Actions) {
        if self.asked.is_some() || self.held {
            return;
        }
        match self.copy {
            Copy::Shared if self.taking.is_none() => {
                actions.extend([Action::Unmap, Action::Free]);
                self.copy = Copy::None;
            }
            Copy::Owned | Copy::Modified if !self.offered => {
                self.offered = true;
                actions.push(Action::Ask(ToHome::Offer));
            }
            _ => {}
        }
    }
}
