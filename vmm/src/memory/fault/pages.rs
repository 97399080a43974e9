//! The life of a page: what may happen to it, what becomes of it, and what is then to be done. Nothing here has an
//! effect; the handler carries out what [`step`] returns. `docs/guest-memory.md` has the drawing.
//!
//! ```text
//!          fault                        write-back, all zeros
//!   Zero ────────► Dirty ◄─────────────────────────┐  (read fault of Zero: Blank)
//!    ▲ ▲            │ ▲ write                  Blank
//!    │ └────────────│─│────────────── drop ───────┘
//!    │   write-back ▼ │
//!    │            Clean ── drop ──► Remote ── fault, ahead ──► Fetching ──► Clean or Dirty
//!    └── discard: from everywhere                                └─ held back ─► Parked ──► Clean or Dirty
//! ```
//! A Clean page is Dirty too when the source has to give up its copy, for want of room (*reclaimed*).
//!
//! Beside that, two operations of a page may be in flight, whatever becomes of the page meanwhile: a *store*, whose
//! content may be outdated, and a fetch whose answer nobody wants any more, an *orphan*. While either is, the page
//! is neither stored, dropped nor forgotten; so no later request can be taken for answered by an earlier answer.

/// Where a page is, which operations of it are in flight, and whether the source keeps something of it: one byte.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct State(u8);

/// Where a page is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Place {
    /// It is all zeros and not in memory.
    Zero,
    /// The source has it, and nobody else.
    Remote,
    /// The source was asked for it.
    Fetching,
    /// Its content is here, but not in memory: a fault is to tell that it is wanted.
    Parked,
    /// In memory and protected; all zeros, of which the source knows nothing.
    Blank,
    /// In memory and protected; the source has it too, or is about to.
    Clean,
    /// In memory, and the source does not have it.
    Dirty,
    /// Nobody has it any more.
    Lost,
}

impl Place {
    /// All of them.
    pub(super) const ALL: [Self; 8] = [
        Self::Zero,
        Self::Remote,
        Self::Fetching,
        Self::Parked,
        Self::Blank,
        Self::Clean,
        Self::Dirty,
        Self::Lost,
    ];

    /// Whether the guest's mapping has the page.
    #[must_use]
    pub(super) fn resident(self) -> bool {
        matches!(self, Self::Blank | Self::Clean | Self::Dirty)
    }

    /// Whether memory of this PC is taken up by it, or soon will be.
    #[must_use]
    pub(super) fn here(self) -> bool {
        self.resident() || matches!(self, Self::Fetching | Self::Parked)
    }
}

const PLACE: u8 = 7;
/// The source keeps something of it.
const KEPT: u8 = 1 << 3;
/// A store is in flight.
const STORING: u8 = 1 << 4;
/// A fetch is in flight whose answer is to be ignored.
const ORPHAN: u8 = 1 << 5;
/// Somebody waits for the fetch,
const AWAITED: u8 = 1 << 6;
/// to write.
const WRITE: u8 = 1 << 7;

impl State {
    /// A page that was never touched.
    pub(super) const FIRST: Self = Self(0);

    fn at(place: Place, flags: u8) -> Self {
        Self(place as u8 | flags)
    }

    fn flags(self) -> u8 {
        self.0 & !PLACE
    }

    fn has(self, flag: u8) -> bool {
        self.0 & flag != 0
    }

    fn with(self, flag: u8) -> Self {
        Self(self.0 | flag)
    }

    fn without(self, flag: u8) -> Self {
        Self(self.0 & !flag)
    }

    fn moved(self, place: Place) -> Self {
        Self::at(place, self.flags())
    }

    /// Where the page is.
    #[must_use]
    pub(super) fn place(self) -> Place {
        Place::ALL[usize::from(self.0 & PLACE)]
    }

    /// Whether a thread waits for the fetch that is in flight.
    #[must_use]
    pub(super) fn awaited(self) -> bool {
        self.has(AWAITED)
    }

    /// Whether it is on its way though nobody waits for it.
    #[must_use]
    pub(super) fn ahead(self) -> bool {
        self.place() == Place::Fetching && !self.awaited()
    }

    /// Whether a store is in flight.
    #[must_use]
    pub(super) fn storing(self) -> bool {
        self.has(STORING)
    }

    /// Whether nothing is known of the page at all.
    #[must_use]
    pub(super) fn untouched(self) -> bool {
        self == Self::FIRST
    }

    fn busy(self) -> bool {
        self.has(STORING | ORPHAN)
    }

    /// Whether [`Event::Saved`] or [`Event::Blank`] may happen to it.
    #[must_use]
    pub(super) fn storable(self) -> bool {
        self.place() == Place::Dirty && !self.busy()
    }

    /// Whether [`Event::Reclaimed`] may happen to it: it is here, and what the source keeps of it only takes up room.
    #[must_use]
    pub(super) fn reclaimable(self) -> bool {
        matches!(self.place(), Place::Clean | Place::Dirty) && self.has(KEPT) && !self.busy()
    }

    /// Whether [`Event::Drop`] may happen to it.
    #[must_use]
    pub(super) fn droppable(self) -> bool {
        matches!(self.place(), Place::Clean | Place::Blank | Place::Parked) && !self.busy()
    }
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", self.place())?;
        let flags = [
            (KEPT, "kept"),
            (STORING, "storing"),
            (ORPHAN, "orphan"),
            (AWAITED, "awaited"),
            (WRITE, "write"),
        ];
        flags.iter().filter(|(flag, _)| self.has(*flag)).try_for_each(|(_, name)| write!(f, "+{name}"))
    }
}

/// What happens to a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Event {
    /// A thread waits for the page.
    Fault {
        /// It wants to write.
        write: bool,
    },
    /// It is worth having ahead of need.
    Ahead,
    /// The source has brought it.
    Fetched {
        /// Do not install it before somebody wants it.
        park: bool,
    },
    /// It was protected and a copy of it is about to be stored.
    Saved,
    /// It was protected and found to be all zeros.
    Blank,
    /// The source has stored it.
    Stored,
    /// The source has lost it.
    Lost,
    /// It is here, and the source needs the room that its copy there takes up.
    Reclaimed,
    /// It is not wanted in memory now.
    Drop,
    /// The guest does not need its content any more.
    Discard,
}

impl Event {
    /// All of them.
    #[cfg(test)]
    pub(super) const ALL: [Self; 12] = [
        Self::Fault { write: false },
        Self::Fault { write: true },
        Self::Ahead,
        Self::Fetched { park: false },
        Self::Fetched { park: true },
        Self::Saved,
        Self::Blank,
        Self::Stored,
        Self::Lost,
        Self::Reclaimed,
        Self::Drop,
        Self::Discard,
    ];
}

/// What is to be done to a page in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Action {
    /// Nothing.
    None,
    /// Have who waits for it try again.
    Wake,
    /// Install zeros.
    Zero {
        /// Protected.
        protected: bool,
    },
    /// Install what was fetched just now.
    Install {
        /// Protected.
        protected: bool,
    },
    /// Install what was parked.
    Unpark {
        /// Protected.
        protected: bool,
    },
    /// Keep what was fetched just now, without installing it.
    Park,
    /// Drop what was parked.
    Unkeep,
    /// Let it be written to, and wake who waits for that.
    Unprotect,
    /// Take it out of memory, in all mappings.
    Punch,
    /// Tell who runs the guest that it cannot go on.
    Report,
}

/// What the source is to be told of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Order {
    /// Nothing.
    None,
    /// Fetch it.
    Fetch,
    /// Store the copy that was made.
    Store,
    /// Forget it.
    Forget,
}

/// What follows from an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Step {
    /// The page's state from now on.
    pub(super) state: State,
    /// What is to be done here.
    pub(super) action: Action,
    /// What the source is told.
    pub(super) order: Order,
}

/// What becomes of a page in `state` to which `event` happens.
#[must_use]
pub(super) fn step(state: State, event: Event) -> Step {
    let place = state.place();
    let stay = Step { state, action: Action::None, order: Order::None };
    let to = |place, action| settle(state.moved(place), action);
    match event {
        Event::Fault { write } => fault(state, write),
        Event::Ahead if place == Place::Remote => {
            Step { state: state.moved(Place::Fetching), action: Action::None, order: Order::Fetch }
        }
        Event::Fetched { park } => fetched(state, park),
        Event::Saved if state.storable() => {
            let state = state.moved(Place::Clean).with(STORING | KEPT);
            Step { state, action: Action::None, order: Order::Store }
        }
        Event::Blank if state.storable() => to(Place::Blank, Action::None),
        Event::Stored if state.storing() => settle(state.without(STORING), Action::None),
        Event::Lost => lost(state),
        // What is here is the only copy now, so it has to be stored again before it is dropped. It stays protected if it
        // was, which costs a write to it no more than before.
        Event::Reclaimed if state.reclaimable() => {
            let state = state.moved(Place::Dirty).without(KEPT);
            Step { state, action: Action::None, order: Order::Forget }
        }
        Event::Drop if state.droppable() => match place {
            Place::Clean => to(Place::Remote, Action::Punch),
            Place::Parked => to(Place::Remote, Action::Unkeep),
            _ => to(Place::Zero, Action::Punch),
        },
        Event::Discard => discard(state),
        Event::Ahead | Event::Saved | Event::Blank | Event::Stored | Event::Reclaimed | Event::Drop => stay,
    }
}

fn fault(state: State, write: bool) -> Step {
    let there = if write { Place::Dirty } else { Place::Clean };
    let (state, action, order) = match state.place() {
        Place::Zero if write => (state.moved(Place::Dirty), Action::Zero { protected: false }, Order::None),
        Place::Zero => (state.moved(Place::Blank), Action::Zero { protected: true }, Order::None),
        Place::Remote => (awaited(state.moved(Place::Fetching), write), Action::None, Order::Fetch),
        Place::Fetching => (awaited(state, write), Action::None, Order::None),
        Place::Parked => (state.moved(there), Action::Unpark { protected: !write }, Order::None),
        // The event is older than what was done about it, or the page is protected. Of a dirty page both may be
        // true: after its copies were lost.
        Place::Blank | Place::Clean | Place::Dirty if write => {
            (state.moved(Place::Dirty), Action::Unprotect, Order::None)
        }
        Place::Blank | Place::Clean | Place::Dirty => (state, Action::Wake, Order::None),
        // Never zeros: whoever wants it waits for the end.
        Place::Lost => (state, Action::None, Order::None),
    };
    Step { state, action, order }
}

fn awaited(state: State, write: bool) -> State {
    state.with(if write { AWAITED | WRITE } else { AWAITED })
}

fn fetched(state: State, park: bool) -> Step {
    if state.has(ORPHAN) {
        return settle(state.without(ORPHAN), Action::None);
    }
    let (place, action) = match state.place() {
        Place::Fetching if state.has(WRITE) => (Place::Dirty, Action::Install { protected: false }),
        Place::Fetching if park && !state.awaited() => (Place::Parked, Action::Park),
        Place::Fetching => (Place::Clean, Action::Install { protected: true }),
        other => (other, Action::None),
    };
    Step { state: state.without(AWAITED | WRITE).moved(place), action, order: Order::None }
}

fn lost(state: State) -> Step {
    let (place, action) = match state.place() {
        Place::Remote | Place::Fetching => (Place::Lost, Action::Report),
        // What is here is the only copy now, so it has to be stored again.
        Place::Parked => (Place::Dirty, Action::Unpark { protected: true }),
        Place::Clean => (Place::Dirty, Action::None),
        other => (other, Action::None),
    };
    let state = state.without(KEPT | STORING | ORPHAN | AWAITED | WRITE).moved(place);
    Step { state, action, order: Order::None }
}

fn discard(state: State) -> Step {
    let (flags, action) = match state.place() {
        Place::Zero | Place::Remote => (state.flags(), Action::None),
        // Who waits tries again, and gets zeros.
        Place::Fetching => {
            let action = if state.awaited() { Action::Wake } else { Action::None };
            (state.flags() & !(AWAITED | WRITE) | ORPHAN, action)
        }
        Place::Parked => (state.flags(), Action::Unkeep),
        Place::Blank | Place::Clean | Place::Dirty => (state.flags(), Action::Punch),
        Place::Lost => (state.flags(), Action::Wake),
    };
    settle(State::at(Place::Zero, flags), action)
}

/// What the source keeps of a page that is all zeros is worthless; it is told when nothing is in flight any more.
fn settle(state: State, action: Action) -> Step {
    let worthless = matches!(state.place(), Place::Zero | Place::Blank) && state.has(KEPT) && !state.busy();
    let (state, order) = if worthless { (state.without(KEPT), Order::Forget) } else { (state, Order::None) };
    Step { state, action, order }
}

#[cfg(test)]
#[path = "pages_test.rs"]
mod tests;
