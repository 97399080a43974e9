use std::sync::Mutex;

use devices::interrupt::{Delivery, Destination, LocalApic, Trigger};

use super::*;

#[derive(Default)]
struct Posted(Mutex<Vec<Vec<u8>>>);

impl Elsewhere for Posted {
    fn post(&self, targets: Targets, _: Message) {
        self.0.lock().expect("no panic").push(targets.iter().map(|id| id.0).collect());
    }
}

fn view(id: u8) -> View {
    View { enabled: true, ..LocalApic::new(ApicId(id), false).view() }
}

fn broadcast(vector: u8) -> Message {
    let (delivery, trigger) = (Delivery::Fixed, Trigger::Edge);
    Message { destination: Destination::All, delivery, vector, trigger, asserted: true }
}

#[test]
fn a_broadcast_crosses_to_each_member_once_and_what_came_from_there_does_not_go_back() {
    let switch = Switch::default();
    let (far, farther): (Arc<Posted>, Arc<Posted>) = Default::default();
    let here = Arc::new(Inbox::default());
    switch.put(view(0), Place::Here(Arc::clone(&here)));
    for id in [1, 3] {
        switch.put(view(id), Place::Elsewhere(Arc::clone(&far) as _));
    }
    switch.put(view(2), Place::Elsewhere(Arc::clone(&farther) as _));
    assert!(switch.post(&broadcast(0x40)));
    assert_eq!(*far.0.lock().expect("no panic"), [[1, 3]]);
    assert_eq!(*farther.0.lock().expect("no panic"), [[2]]);
    assert!(!here.enters(), "something is there");

    switch.post_here(switch.views().iter().map(|view| view.id).collect(), &broadcast(0x41));
    assert_eq!(far.0.lock().expect("no panic").len(), 1);
}

#[test]
fn what_one_member_sends_to_others_goes_on_to_them_and_not_back_and_follows_who_moved() {
    let switch = Switch::default();
    let (far, farther): (Arc<Posted>, Arc<Posted>) = Default::default();
    let [one, other] = [&far, &farther].map(|way| Arc::clone(way) as Arc<dyn Elsewhere>);
    let here = Arc::new(Inbox::default());
    switch.put(view(0), Place::Here(Arc::clone(&here)));
    switch.put(view(1), Place::Elsewhere(Arc::clone(&one)));
    switch.put(view(2), Place::Elsewhere(Arc::clone(&other)));
    let all = || switch.views().iter().map(|view| view.id).collect();
    switch.pass_on(all(), &broadcast(0x40), &one);
    assert!(far.0.lock().expect("no panic").is_empty());
    assert_eq!(*farther.0.lock().expect("no panic"), [[2]]);
    assert!(!here.enters(), "something is there");
    switch.place(ApicId(2), Place::Elsewhere(Arc::clone(&one)));
    switch.pass_on(all(), &broadcast(0x41), &one);
    assert_eq!(farther.0.lock().expect("no panic").len(), 1, "it is not there any more");
    switch.deliver([ApicId(2)].into_iter().collect(), &broadcast(0x42));
    assert_eq!(*far.0.lock().expect("no panic"), [[2]]);
}

#[test]
fn a_view_counts_for_the_next_message_and_tells_whether_to_try_again() {
    let switch = Switch::default();
    let off = LocalApic::new(ApicId(0), true).view();
    switch.put(off, Place::Here(Arc::default()));
    assert!(!switch.post(&broadcast(0x40)), "nobody is enabled");
    assert!(switch.set_view(view(0)) && !switch.set_view(View { tpr: 0x20, ..view(0) }));
    assert!(!switch.set_view(view(9)), "there is no such APIC");
    assert!(switch.post(&broadcast(0x40)));
}
