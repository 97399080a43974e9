use std::collections::HashSet;

use super::*;

/// Whether `event` can happen to a page in `state`, if everybody keeps their promises.
fn possible(state: State, event: Event) -> bool {
    match event {
        Event::Fetched { .. } => state.place() == Place::Fetching || state.has(ORPHAN),
        Event::Stored => state.storing(),
        Event::Saved | Event::Blank => state.storable(),
        Event::Reclaimed => state.reclaimable(),
        Event::Drop => state.droppable(),
        Event::Fault { .. } | Event::Ahead | Event::Lost | Event::Discard => true,
    }
}

fn reachable() -> HashSet<State> {
    let (mut seen, mut new) = (HashSet::from([State::FIRST]), vec![State::FIRST]);
    while let Some(state) = new.pop() {
        for event in Event::ALL.into_iter().filter(|event| possible(state, *event)) {
            let next = step(state, event).state;
            if seen.insert(next) {
                new.push(next);
            }
        }
    }
    seen
}

#[test]
fn every_state_that_can_be_reached_makes_sense() {
    let states = reachable();
    assert_eq!(states.len(), 18, "{states:?}");
    for state in states {
        let place = state.place();
        if matches!(place, Place::Remote | Place::Fetching | Place::Parked | Place::Clean) {
            assert!(state.has(KEPT), "{state:?}: the source has it");
        }
        if matches!(place, Place::Remote | Place::Fetching | Place::Parked | Place::Lost) {
            assert!(!state.busy(), "{state:?}: an old answer could be taken for a new one");
        }
        assert!(place == Place::Fetching || !state.has(AWAITED | WRITE), "{state:?}: nothing comes");
        assert!(!state.has(WRITE) || state.has(AWAITED), "{state:?}: who writes waits");
        assert!(!(state.has(STORING) && state.has(ORPHAN)), "{state:?}: never a store and a fetch");
        if matches!(place, Place::Zero | Place::Blank) && !state.busy() {
            assert!(!state.has(KEPT), "{state:?}: the source was told that it is worthless");
        }
    }
}

#[test]
fn every_event_in_every_state_does_to_memory_what_the_new_state_says() {
    for state in reachable() {
        for event in Event::ALL {
            let Step { state: next, action, order } = step(state, event);
            let what = format!("{state:?} and {event:?} make {next:?}, {action:?}, {order:?}");
            let (before, after) = (state.place(), next.place());
            match action {
                Action::Zero { protected } => {
                    assert!(before == Place::Zero, "{what}");
                    assert_eq!(after, if protected { Place::Blank } else { Place::Dirty }, "{what}");
                }
                Action::Install { protected } => {
                    assert!(before == Place::Fetching && !state.has(ORPHAN), "{what}");
                    assert_eq!(after, if protected { Place::Clean } else { Place::Dirty }, "{what}");
                }
                Action::Unpark { protected } => {
                    assert!(before == Place::Parked, "{what}");
                    assert!(after == Place::Dirty || protected && after == Place::Clean, "{what}");
                }
                Action::Park => assert!(before == Place::Fetching && after == Place::Parked, "{what}"),
                Action::Unkeep => assert!(before == Place::Parked && !after.here(), "{what}"),
                Action::Punch => assert!(before.resident() && !after.here(), "{what}"),
                Action::Unprotect => assert!(before.resident() && after == Place::Dirty, "{what}"),
                Action::Report => assert!(!before.resident() && after == Place::Lost, "{what}"),
                Action::Wake | Action::None => {
                    assert_eq!(before.resident(), after.resident(), "{what}");
                    assert_eq!(before == Place::Parked, after == Place::Parked, "{what}");
                }
            }
            if event == Event::Reclaimed && possible(state, event) {
                assert_eq!((after, order), (Place::Dirty, Order::Forget), "{what}");
            }
            match order {
                Order::Fetch => assert!(before == Place::Remote && !state.busy(), "{what}"),
                Order::Store => assert!(event == Event::Saved && !state.busy(), "{what}"),
                Order::Forget => assert!(!next.busy() && !next.has(KEPT), "{what}"),
                Order::None => {}
            }
            if !possible(state, event) && !matches!(event, Event::Fetched { .. }) {
                assert_eq!((next, action, order), (state, Action::None, Order::None), "{what}");
            }
            if event == Event::Discard {
                assert_eq!(after, Place::Zero, "{what}");
            }
        }
    }
}

/// One page, what is really in it, and a thread that uses it: the simplest machine that pages can be wrong in.
#[derive(Default)]
struct World {
    state: Option<State>,
    /// What the guest wrote last; 0 where it wrote nothing or gave the page back.
    truth: u64,
    /// What is in memory, and whether it is protected.
    memory: Option<(u64, bool)>,
    parked: Option<u64>,
    kept: Option<u64>,
    fetching: bool,
    storing: Option<u64>,
    /// The thread waits, since it wanted to read or write.
    waits: bool,
    /// Events that nobody has read yet.
    unread: Vec<bool>,
    history: Vec<String>,
}

impl World {
    fn state(&self) -> State {
        self.state.unwrap_or(State::FIRST)
    }

    /// The thread reads or writes.
    fn access(&mut self, write: Option<u64>) {
        self.history.push(format!("access {write:?}"));
        match (&mut self.memory, write) {
            (Some((content, _)), None) => assert_eq!(*content, self.truth, "{:#?}", self.history),
            (Some((content, false)), Some(new)) => {
                assert_eq!(*content, self.truth, "{:#?}", self.history);
                (*content, self.truth) = (new, new);
            }
            _ => {
                self.waits = true;
                self.unread.push(write.is_some());
            }
        }
    }

    fn happen(&mut self, event: Event, fetched: Option<u64>) {
        let before = self.state();
        let Step { state, action, order } = step(before, event);
        self.state = Some(state);
        self.history.push(format!("{before:?} --{event:?}-> {state:?}, {action:?}, {order:?}"));
        self.act(action, fetched);
        let busy = self.fetching || self.storing.is_some();
        match order {
            Order::None => {}
            _ if busy => panic!("something is in flight: {:#?}", self.history),
            Order::Fetch => {
                assert!(self.kept.is_some(), "nobody has it: {:#?}", self.history);
                self.fetching = true;
            }
            Order::Store => self.storing = self.memory.map(|(content, _)| content),
            Order::Forget => self.kept = None,
        }
    }

    fn act(&mut self, action: Action, fetched: Option<u64>) {
        let new = match action {
            Action::Zero { protected } => Some((0, protected)),
            Action::Install { protected } => fetched.map(|content| (content, protected)),
            Action::Unpark { protected } => self.parked.take().map(|content| (content, protected)),
            Action::Unprotect => self.memory.map(|(content, _)| (content, false)),
            Action::Park => {
                self.parked = fetched;
                return;
            }
            Action::Unkeep => {
                assert!(self.parked.take().is_some(), "{:#?}", self.history);
                return;
            }
            Action::Punch => {
                assert!(self.memory.take().is_some(), "{:#?}", self.history);
                return;
            }
            Action::Wake => {
                self.waits = false;
                return;
            }
            Action::None | Action::Report => return,
        };
        assert_eq!(self.memory.is_some(), action == Action::Unprotect, "{:#?}", self.history);
        assert!(new.is_some(), "{:#?}", self.history);
        self.memory = new;
        self.waits = false;
    }

    /// The source answers what is in flight.
    fn answer(&mut self, park: bool) {
        if std::mem::take(&mut self.fetching) {
            self.happen(Event::Fetched { park }, self.kept);
        } else if let Some(content) = self.storing.take() {
            self.kept = Some(content);
            self.happen(Event::Stored, None);
        }
    }

    fn store(&mut self) {
        let Some((content, protected)) = &mut self.memory else { return };
        if self.state.is_some_and(State::storable) {
            *protected = true;
            let event = if *content == 0 { Event::Blank } else { Event::Saved };
            self.happen(event, None);
        }
    }

    fn roll(&mut self, dice: u64, losses: bool) {
        match dice % 16 {
            0 | 1 if !self.waits => self.access(None),
            2 | 3 if !self.waits => self.access(Some(dice)),
            4 | 5 if !self.unread.is_empty() => {
                let at = (dice >> 8) as usize % self.unread.len();
                let write = self.unread.swap_remove(at);
                self.happen(Event::Fault { write }, None);
            }
            6 | 7 => self.answer(dice >> 8 & 1 == 0),
            8 | 9 => self.store(),
            10 | 11 if self.state().droppable() => self.happen(Event::Drop, None),
            12 => self.happen(Event::Ahead, None),
            13 if self.state().reclaimable() => self.happen(Event::Reclaimed, None),
            14 => {
                self.truth = 0;
                self.happen(Event::Discard, None);
            }
            15 if losses && dice >> 8 & 7 == 0 => {
                (self.kept, self.fetching, self.storing) = (None, false, None);
                self.happen(Event::Lost, None);
            }
            _ => {}
        }
    }
}

#[test]
fn content_is_never_lost_stale_or_zero_and_nobody_waits_for_ever() {
    for seed in 0..3000_u64 {
        let mut world = World::default();
        let mut dice = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        for _ in 0..200 {
            dice = dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            world.roll(dice >> 20, seed % 3 == 0);
        }
        // All events are read and all answers come in the end.
        while let Some(write) = world.unread.pop() {
            world.happen(Event::Fault { write }, None);
        }
        while world.fetching || world.storing.is_some() {
            world.answer(false);
        }
        let lost = world.state().place() == Place::Lost;
        assert!(lost || !world.waits, "seed {seed}: {:#?}", world.history);
        assert!(seed % 3 == 0 || !lost, "seed {seed}: {:#?}", world.history);
        if !lost && !world.waits {
            world.access(None);
        }
    }
}
