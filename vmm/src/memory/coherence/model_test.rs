//! Everything that can happen to a few members and pages, with messages that arrive in any order: an exhaustive
//! search through the very functions that run.
//!
//! The network is a bag: any message in it may be the next to arrive, however long ago it was sent. So a member that is
//! cut off is nothing but one whose messages arrive late, and whatever holds in all states holds while it is. A member
//! that dies says nothing more, and hears nothing.

use std::hash::Hash;

use stateright::{Checker, Model, Property};

use super::member::{Action, Copy, Event};
use super::message::{Content, Member, Right, ToHome, ToMember};
use super::{Line, Page, Violation};

/// What is searched through.
#[derive(Clone, Debug)]
struct Guest {
    members: u8,
    pages: u8,
    /// How often each member touches a page, and gives one up.
    touches: u8,
    evictions: u8,
    /// One member may die.
    deaths: bool,
}

impl Guest {
    /// Homes are spread, and keepers are somebody else.
    fn home(&self, page: u8) -> Member {
        member(page % self.members)
    }

    fn keeper(&self, page: u8) -> Member {
        member((page + 1) % self.members)
    }
}

fn member(number: u8) -> Member {
    Member::new(number).expect("a small number")
}

/// A page at a member, and what is in its memory: how often the page had been written to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Frame {
    page: Page,
    content: Option<u8>,
    staged: Option<u8>,
}

/// A member.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Node {
    frames: Vec<Frame>,
    /// What its vCPU stands still for.
    stands: Option<(u8, Right)>,
    touches: u8,
    evictions: u8,
    dead: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Letter {
    Home(ToHome),
    Member(ToMember, Option<u8>),
}

/// From, to, of which page.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Envelope(Member, Member, u8, Letter);

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct World {
    nodes: Vec<Node>,
    lines: Vec<Line>,
    /// In order, so that equal bags are equal.
    network: Vec<Envelope>,
    /// How often each page was written to.
    writes: Vec<u8>,
    broken: Option<Broken>,
}

/// What must never be.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Broken {
    Violation(Violation),
    /// A vCPU reads something else than what was written last.
    Stale,
    /// An action that makes no sense, such as to send what is not there.
    Impossible(&'static str),
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Happening {
    Touch(u8, u8, Right),
    Evict(u8, u8),
    Hold(u8, u8),
    HoldOver(u8, u8),
    Arrival(usize),
    Death(u8),
}

impl World {
    fn happen(&mut self, guest: &Guest, at: Member, page: u8, event: Event, payload: Option<u8>) {
        let frame = &self.nodes[usize::from(at.number())].frames[usize::from(page)];
        match frame.page.step(event) {
            Ok((next, actions)) => {
                self.frame(at, page).page = next;
                for action in actions {
                    if let Err(broken) = self.act(guest, at, page, action, payload) {
                        self.broken.get_or_insert(broken);
                    }
                }
            }
            Err(violation) => drop(self.broken.get_or_insert(Broken::Violation(violation))),
        }
    }

    fn frame(&mut self, at: Member, page: u8) -> &mut Frame {
        &mut self.nodes[usize::from(at.number())].frames[usize::from(page)]
    }

    fn act(
        &mut self,
        guest: &Guest,
        at: Member,
        page: u8,
        action: Action,
        payload: Option<u8>,
    ) -> Result<(), Broken> {
        let impossible = |why| Err(Broken::Impossible(why));
        let frame = self.frame(at, page);
        match action {
            Action::Ask(message) => {
                let home = guest.home(page);
                self.send(Envelope(at, home, page, Letter::Home(message)));
            }
            Action::Stage => match (frame.staged, payload) {
                (None, Some(_)) => frame.staged = payload,
                _ => return impossible("nothing came, or too much"),
            },
            Action::Unstage => frame.staged = None,
            Action::Install { .. } => match (frame.content, frame.staged.take()) {
                (None, Some(staged)) => frame.content = Some(staged),
                _ => return impossible("nothing to install, or no place"),
            },
            Action::InstallZeros => {
                if frame.content.replace(0).is_some() {
                    return impossible("zeros over something");
                }
            }
            Action::Unprotect | Action::Protect | Action::Unmap => {
                if frame.content.is_none() {
                    return impossible("nothing is mapped");
                }
            }
            Action::Send(to, answer) => {
                let Some(content) = frame.content else { return impossible("nothing to send") };
                assert_eq!(answer.content, Content::Sent);
                self.send(Envelope(at, to, page, Letter::Member(ToMember::Answer(answer), Some(content))));
            }
            Action::SendGone(to, txn) => {
                self.send(Envelope(at, to, page, Letter::Member(ToMember::Gone { txn }, None)));
            }
            Action::Free => {
                if frame.content.take().is_none() {
                    return impossible("it was free");
                }
            }
            Action::Wake => {
                if frame.page.copy() == Copy::None {
                    return impossible("woken for nothing");
                }
            }
            Action::Hold => {}
        }
        Ok(())
    }

    fn send(&mut self, envelope: Envelope) {
        let at = self.network.partition_point(|other| *other < envelope);
        self.network.insert(at, envelope);
    }

    /// The vCPU of `at` touches what it stands still for, if it may by now.
    fn retry(&mut self, at: Member) {
        let node = &mut self.nodes[usize::from(at.number())];
        let Some((page, right)) = node.stands else { return };
        let frame = &mut node.frames[usize::from(page)];
        if !frame.page.copy().allows(right) {
            return;
        }
        node.stands = None;
        let last = &mut self.writes[usize::from(page)];
        if frame.content != Some(*last) {
            self.broken.get_or_insert(Broken::Stale);
        }
        if right == Right::Write {
            *last += 1;
            frame.content = Some(*last);
        }
    }

    /// Whether an order for it is on its way.
    fn ordered(&self, to: Member, page: u8) -> bool {
        self.network.iter().any(|Envelope(_, at, of, letter)| {
            (*at, *of) == (to, page) && matches!(letter, Letter::Member(ToMember::Order(_), _))
        })
    }

    /// Nothing is on its way and nothing is held: what has not ended by now never will.
    fn still(&self) -> bool {
        let held = |node: &Node| node.frames.iter().any(|frame| frame.page.held());
        self.network.is_empty() && !self.nodes.iter().any(held)
    }

    fn all_over(&self) -> bool {
        let over = |node: &Node| {
            node.stands.is_none()
                && node.frames.iter().all(|frame| frame.page.idle() && frame.staged.is_none())
        };
        self.nodes.iter().all(over) && self.lines.iter().all(Line::idle)
    }
}

impl Model for Guest {
    type State = World;
    type Action = Happening;

    fn init_states(&self) -> Vec<World> {
        let node = Node {
            frames: vec![Frame::default(); self.pages.into()],
            stands: None,
            touches: self.touches,
            evictions: self.evictions,
            dead: false,
        };
        vec![World {
            nodes: vec![node; self.members.into()],
            lines: vec![Line::default(); self.pages.into()],
            network: Vec::new(),
            writes: vec![0; self.pages.into()],
            broken: None,
        }]
    }

    fn actions(&self, world: &World, actions: &mut Vec<Happening>) {
        for (at, node) in (0..).zip(&world.nodes).filter(|(_, node)| !node.dead) {
            for (page, frame) in (0..).zip(&node.frames) {
                if node.stands.is_none() && node.touches > 0 {
                    actions
                        .extend([Right::Read, Right::Write].map(|right| Happening::Touch(at, page, right)));
                }
                let keeps = self.keeper(page) == member(at) && frame.page.copy().owns();
                if node.evictions > 0 && frame.page.copy() != Copy::None && !keeps {
                    actions.push(Happening::Evict(at, page));
                }
                if frame.page.held() {
                    actions.push(Happening::HoldOver(at, page));
                } else if world.ordered(member(at), page) && frame.page.copy() != Copy::None {
                    actions.push(Happening::Hold(at, page));
                }
            }
            if self.deaths && world.nodes.iter().all(|node| !node.dead) {
                actions.push(Happening::Death(at));
            }
        }
        let mut before = None;
        for (index, envelope) in world.network.iter().enumerate() {
            if before != Some(envelope) && !world.nodes[usize::from(envelope.1.number())].dead {
                actions.push(Happening::Arrival(index));
            }
            before = Some(envelope);
        }
    }

    fn next_state(&self, before: &World, happening: Happening) -> Option<World> {
        let mut world = before.clone();
        let at = match happening {
            Happening::Touch(at, page, right) => {
                let node = &mut world.nodes[usize::from(at)];
                node.touches -= 1;
                node.stands = Some((page, right));
                if !node.frames[usize::from(page)].page.copy().allows(right) {
                    world.happen(self, member(at), page, Event::Fault(right), None);
                }
                member(at)
            }
            Happening::Evict(at, page) => {
                world.nodes[usize::from(at)].evictions -= 1;
                world.happen(self, member(at), page, Event::Evict, None);
                member(at)
            }
            Happening::Hold(at, page) => {
                world.happen(self, member(at), page, Event::Hold, None);
                member(at)
            }
            Happening::HoldOver(at, page) => {
                world.happen(self, member(at), page, Event::HoldOver, None);
                member(at)
            }
            Happening::Death(at) => {
                world.nodes[usize::from(at)].dead = true;
                member(at)
            }
            Happening::Arrival(index) => {
                let Envelope(from, to, page, letter) = world.network.remove(index);
                match letter {
                    Letter::Home(message) => {
                        let line = world.lines[usize::from(page)].clone();
                        match line.step(self.keeper(page), from, message) {
                            Ok((line, sendings)) => {
                                world.lines[usize::from(page)] = line;
                                for (to_whom, message) in sendings {
                                    world.send(Envelope(to, to_whom, page, Letter::Member(message, None)));
                                }
                            }
                            Err(violation) => {
                                world.broken.get_or_insert(Broken::Violation(violation));
                            }
                        }
                    }
                    Letter::Member(message, payload) => {
                        world.happen(self, to, page, Event::Heard(message), payload);
                    }
                }
                to
            }
        };
        world.retry(at);
        Some(world)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut properties = vec![
            Property::always("every message and action makes sense, and nobody reads what is old", sound),
            Property::always("who writes is alone", alone),
            Property::always("every copy is what was written last", current),
            Property::always("what was written has one owner, or is on its way", owned),
            Property::always("nobody waits for ever", served),
            Property::sometimes("all of them have written to the same page", shared),
        ];
        if self.evictions > 0 {
            properties.push(Property::sometimes("a page is taken over by its keeper", kept));
        }
        properties
    }
}

fn sound(_: &Guest, world: &World) -> bool {
    world.broken.is_none()
}

fn alone(guest: &Guest, world: &World) -> bool {
    (0..usize::from(guest.pages)).all(|page| {
        let copies = || world.nodes.iter().map(|node| node.frames[page].page.copy());
        let mapped = copies().filter(|copy| *copy != Copy::None).count();
        copies().all(|copy| copy != Copy::Modified) || mapped == 1
    })
}

fn current(guest: &Guest, world: &World) -> bool {
    (0..usize::from(guest.pages)).all(|page| {
        let frames = world.nodes.iter().map(|node| &node.frames[page]);
        let mut mapped = frames.filter(|frame| frame.page.copy() != Copy::None);
        mapped.all(|frame| frame.content == Some(world.writes[page]))
    })
}

fn owned(guest: &Guest, world: &World) -> bool {
    (0..usize::from(guest.pages)).all(|page| {
        let line = &world.lines[page];
        let owners = world.nodes.iter().filter(|node| node.frames[page].page.copy().owns()).count();
        owners == 1 || owners == 0 && (line.owner().is_none() || !line.idle())
    })
}

fn served(_: &Guest, world: &World) -> bool {
    world.nodes.iter().any(|node| node.dead) || !world.still() || world.all_over()
}

fn shared(guest: &Guest, world: &World) -> bool {
    world.writes.contains(&(guest.members * guest.touches))
}

fn kept(guest: &Guest, world: &World) -> bool {
    (0..guest.pages).any(|page| {
        let (line, keeper) = (&world.lines[usize::from(page)], guest.keeper(page));
        let keeper_touched = world.nodes[usize::from(keeper.number())].touches < guest.touches;
        line.owner() == Some(keeper) && line.idle() && !keeper_touched
    })
}

fn search(guest: Guest) -> usize {
    let said = format!("{guest:?}");
    let checker = guest.checker().threads(2).spawn_bfs().join();
    checker.assert_properties();
    println!("{said}: {} states, {} different ones", checker.state_count(), checker.unique_state_count());
    checker.unique_state_count()
}

/// Whether to search for as long as it takes (`make model`), or for some seconds.
fn far() -> bool {
    std::env::var_os("OMEGA_MODEL_FAR").is_some()
}

#[test]
fn three_members_and_a_page_never_disagree() {
    let guest = Guest { members: 3, pages: 1, touches: 2, evictions: far().into(), deaths: false };
    assert!(search(guest) > 100_000);
}

#[test]
fn two_members_and_two_pages_never_disagree() {
    let touches = if far() { 3 } else { 2 };
    let guest = Guest { members: 2, pages: 2, touches, evictions: 1, deaths: false };
    assert!(search(guest) > 100_000);
}

#[test]
fn three_members_and_two_pages_never_disagree() {
    let guest = Guest { members: 3, pages: 2, touches: 1, evictions: 1 + u8::from(far()), deaths: false };
    assert!(search(guest) > 100_000);
}

#[test]
fn nobody_reads_what_is_old_when_a_member_dies() {
    let touches = if far() { 2 } else { 1 };
    let guest = Guest { members: 3, pages: 1, touches, evictions: 1, deaths: true };
    assert!(search(guest) > 50_000);
}
