use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use super::*;

fn message(delivery: Delivery, vector: u8, trigger: Trigger) -> Message {
    let destination = Destination::Physical(ApicId(0));
    Message { destination, delivery, vector, trigger, asserted: true }
}

/// An enabled APIC, as firmware leaves the bootstrap processor's.
fn enabled() -> LocalApic {
    let mut apic = LocalApic::new(ApicId(0), true);
    apic.set_virtual_wire();
    apic
}

#[test]
fn everything_that_is_posted_arrives_once_and_wakes_the_thread_that_sleeps_for_it() {
    const EACH: usize = 2000;
    let inbox = Arc::new(Inbox::default());
    inbox.attach(Box::new(|| {}));
    let taken = Arc::new(AtomicUsize::new(0));
    // Each sender waits until its message was taken, so none may be merged with the next.
    let senders: Vec<_> = [0x31_u8, 0x71, 0xf1]
        .map(|vector| {
            let inbox = Arc::clone(&inbox);
            let (told, tell) = std::sync::mpsc::channel();
            let thread = thread::spawn(move || {
                for _ in 0..EACH {
                    inbox.post(&message(Delivery::Fixed, vector, Trigger::Edge));
                    tell_next(&tell);
                }
            });
            (vector, told, thread)
        })
        .into_iter()
        .collect();
    while taken.load(Ordering::SeqCst) < 3 * EACH {
        inbox.sleep(None);
        let mut found = Vec::new();
        if inbox.filled.swap(false, Ordering::SeqCst) {
            inbox.edge.take(|vector| found.push(vector));
        }
        for vector in found {
            taken.fetch_add(1, Ordering::SeqCst);
            let (_, told, _) = senders.iter().find(|(known, ..)| *known == vector).expect("a sender's");
            told.send(()).expect("it waits");
        }
    }
    for (_, _, thread) in senders {
        thread.join().expect("it ends");
    }
}

fn tell_next(taken: &std::sync::mpsc::Receiver<()>) {
    taken.recv_timeout(Duration::from_secs(60)).expect("the message is taken");
}

#[test]
fn a_thread_in_guest_code_is_kicked_once_and_does_not_enter_with_something_unseen() {
    let inbox = Inbox::default();
    let kicks = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&kicks);
    inbox.attach(Box::new(move || {
        counted.fetch_add(1, Ordering::SeqCst);
    }));
    assert!(inbox.enters());
    inbox.post(&message(Delivery::Nmi, 0, Trigger::Edge));
    inbox.post(&message(Delivery::Fixed, 0x40, Trigger::Edge));
    assert_eq!(kicks.load(Ordering::SeqCst), 1);
    inbox.left();
    assert!(!inbox.enters(), "something is there");
    inbox.empty_into(&mut enabled(), |_| {});
    assert!(inbox.enters());
    inbox.kick();
    assert_eq!(kicks.load(Ordering::SeqCst), 2);
    assert!(!inbox.enters() && inbox.take_kick() && !inbox.take_kick() && inbox.enters());
}

#[test]
fn a_sipi_counts_after_its_init_and_the_first_of_two_wins() {
    let inbox = Inbox::default();
    let mut apic = LocalApic::new(ApicId(1), false);
    for (delivery, vector) in [(4, 0x11), (5, 0), (4, 0x12), (4, 0x13)] {
        let delivery = if delivery == 4 { Delivery::StartUp } else { Delivery::Init };
        inbox.post(&message(delivery, vector, Trigger::Edge));
    }
    inbox.empty_into(&mut apic, |_| {});
    let window = devices::interrupt::local::Window::default();
    assert_eq!(apic.take(window), Some(devices::interrupt::local::Event::Init));
    assert_eq!(apic.take(window), Some(devices::interrupt::local::Event::StartUp { vector: 0x12 }));
}

#[test]
fn a_level_that_a_disabled_apic_does_not_take_is_reported_and_a_pulse_of_lint0_is_not_lost() {
    let inbox = Inbox::default();
    let mut refused = Vec::new();
    inbox.post(&message(Delivery::Fixed, 0x55, Trigger::Level));
    inbox.post(&message(Delivery::Fixed, 0x56, Trigger::Edge));
    inbox.empty_into(&mut LocalApic::new(ApicId(0), true), |vector| refused.push(vector));
    assert_eq!(refused, [0x55]);

    let mut apic = enabled();
    // LINT0 as a fixed edge of vector 0x66.
    let now = devices::interrupt::Now::default();
    let _ = apic.write(0x350, &0x66_u32.to_le_bytes(), now);
    inbox.set_lint0(true);
    inbox.set_lint0(false);
    inbox.empty_into(&mut apic, |_| {});
    assert!(apic.pending().interrupt);
    assert!(!inbox.lint0());
}
