//! How local APICs reach each other and the chipset, wherever their vCPUs run.

use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use devices::interrupt::{ApicId, Message, Targets, View, route};
use smallvec::SmallVec;

use super::Inbox;

/// The interrupt system of a guest, as one of its local APICs sees it. Called by vCPUs' threads; nothing in here waits
/// for another PC.
///
/// A message that [`send`](Self::send) hands to an APIC may be refused there; only of level-triggered ones that matters.
pub trait Fabric: Send + Sync {
    /// An IPI: to be routed, perhaps to the sender itself.
    fn send(&self, message: Message);
    /// A level-triggered interrupt of `vector` was finished: the I/O APIC is to hear of it.
    fn end_of_interrupt(&self, vector: u8);
    /// An APIC's [`View`] changed. What this APIC says afterwards by any other call is to take effect after it.
    fn view(&self, view: View);
    /// An APIC did not take a level-triggered interrupt of `vector`, so no end of it will come.
    fn refused(&self, vector: u8);
    /// The vCPU takes an external interrupt: the PIC's vector. `None` where there is no PIC, on members other than the
    /// console node: the bootstrap processor, which is there, is the only one that its output is wired to.
    fn acknowledge(&self) -> Option<u8>;
    /// The vCPU whose thread calls is halted: it needs no memory until something wakes it.
    fn halted(&self) {}
}

/// A way to the local APICs of another member.
pub trait Elsewhere: Send + Sync {
    /// Posts `message` to `targets`, all of which are over there. Ordered after what was posted before; does not
    /// wait.
    fn post(&self, targets: Targets, message: Message);
}

/// Where a local APIC is.
#[derive(Clone)]
pub enum Place {
    /// In this process.
    Here(Arc<Inbox>),
    /// With another member. Several APICs of one member share one `Arc`, so that a message to all of them is posted
    /// once.
    Elsewhere(Arc<dyn Elsewhere>),
}

/// All local APICs of a guest: what is known of them, and where they are. One on each member.
#[derive(Default)]
pub struct Switch {
    apics: RwLock<Apics>,
}

#[derive(Default)]
struct Apics {
    views: Vec<View>,
    /// In the order of `views`.
    places: Vec<Place>,
}

impl Switch {
    fn read(&self) -> RwLockReadGuard<'_, Apics> {
        self.apics.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Apics> {
        self.apics.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds an APIC, or says where a known one is from now on. It is reached by the next message.
    pub fn put(&self, view: View, place: Place) {
        let mut apics = self.write();
        match apics.at(view.id) {
            Some(at) => (apics.views[at], apics.places[at]) = (view, place),
            None => {
                apics.views.push(view);
                apics.places.push(place);
            }
        }
    }

    /// Takes note of an APIC's view, if it is one of this guest's. Whether messages may be taken now that were refused
    /// before: something other than its priority changed.
    pub fn set_view(&self, view: View) -> bool {
        let mut apics = self.write();
        let Some(at) = apics.at(view.id) else { return false };
        let old = std::mem::replace(&mut apics.views[at], view);
        old != View { tpr: old.tpr, ..view }
    }

    /// What is known of all APICs, in the order in which they were put here.
    #[must_use]
    pub fn views(&self) -> Vec<View> {
        self.read().views.clone()
    }

    /// Routes `message` and hands it to every APIC that it is for. `false`: there is none.
    pub fn post(&self, message: &Message) -> bool {
        let apics = self.read();
        let targets = route(message, &apics.views);
        apics.deliver(targets, message);
        !targets.is_empty()
    }

    /// Hands `message`, which another member has routed, to those of `targets` that are here. The others are not
    /// looked at: what crossed the border once does not cross it again.
    pub fn post_here(&self, targets: Targets, message: &Message) {
        let apics = self.read();
        for (view, place) in apics.views.iter().zip(&apics.places) {
            if let Place::Here(inbox) = place
                && targets.contains(view.id)
            {
                inbox.post(message);
            }
        }
    }

    /// Hands `message` to `targets`, wherever they are.
    pub fn deliver(&self, targets: Targets, message: &Message) {
        self.read().deliver(targets, message);
    }

    /// Hands `message`, which the member behind `from` has routed, to those of `targets` that are not over there: on
    /// the console node, by which members reach each other.
    pub fn pass_on(&self, targets: Targets, message: &Message, from: &Arc<dyn Elsewhere>) {
        let apics = self.read();
        let others = apics.views.iter().zip(&apics.places).filter(|(_, place)| match place {
            Place::Here(_) => true,
            Place::Elsewhere(way) => !Arc::ptr_eq(way, from),
        });
        let others = others.map(|(view, _)| view.id).filter(|id| targets.contains(*id)).collect();
        apics.deliver(others, message);
    }

    /// Says where a known APIC is from now on; what is known of it stays.
    pub fn place(&self, id: ApicId, place: Place) {
        let mut apics = self.write();
        if let Some(at) = apics.at(id) {
            apics.places[at] = place;
        }
    }

    /// The PIC's output, which is wired to the bootstrap processor.
    pub fn set_lint0(&self, id: ApicId, high: bool) {
        let apics = self.read();
        if let Some(Place::Here(inbox)) = apics.at(id).map(|at| &apics.places[at]) {
            inbox.set_lint0(high);
        }
    }
}

/// A way to another member, and which APICs over there a message is for.
type Crossing<'a> = (&'a Arc<dyn Elsewhere>, SmallVec<[ApicId; 4]>);

impl Apics {
    fn at(&self, id: ApicId) -> Option<usize> {
        self.views.iter().position(|view| view.id == id)
    }

    fn deliver(&self, targets: Targets, message: &Message) {
        if targets.is_empty() {
            return;
        }
        let mut far: SmallVec<[Crossing<'_>; 2]> = SmallVec::new();
        for (view, place) in self.views.iter().zip(&self.places).filter(|(view, _)| targets.contains(view.id))
        {
            match place {
                Place::Here(inbox) => inbox.post(message),
                Place::Elsewhere(way) => match far.iter_mut().find(|(known, _)| Arc::ptr_eq(known, way)) {
                    Some((_, ids)) => ids.push(view.id),
                    None => far.push((way, SmallVec::from_iter([view.id]))),
                },
            }
        }
        for (way, ids) in far {
            way.post(ids.into_iter().collect(), *message);
        }
    }
}

#[cfg(test)]
#[path = "fabric_test.rs"]
mod tests;
