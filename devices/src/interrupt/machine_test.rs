//! All of it together: a chipset, local APICs, and messages between them that take their time.

use proptest::prelude::*;

use super::*;
use crate::interrupt::local::{Event, Lint, Window};
use crate::interrupt::message::{ApicId, Message};
use crate::interrupt::{LocalApic, Now, Tsc, View, route};
use crate::irq::MsiMessage;

const OPEN: Window = Window { interrupts: true, nmi: true };

/// What is on its way between members.
enum Parcel {
    Message { target: ApicId, message: Message },
    Eoi(u8),
}

struct Machine {
    chipset: Chipset,
    apics: Vec<LocalApic>,
    parcels: Vec<Parcel>,
    now: Nanos,
}

impl Machine {
    /// All processors but the first wait for a SIPI; the first is as firmware leaves it.
    fn new(processors: u8) -> Self {
        let mut apics: Vec<_> = (0..processors).map(|id| LocalApic::new(ApicId(id), id == 0)).collect();
        apics[0].set_virtual_wire();
        Self { chipset: Chipset::default(), apics, parcels: Vec::new(), now: Nanos(0) }
    }

    /// All are enabled, with flat logical IDs.
    fn running(processors: u8) -> Self {
        let mut machine = Self::new(processors);
        for id in 0..processors {
            machine.post(Message {
                delivery: crate::interrupt::Delivery::StartUp,
                vector: 8,
                destination: crate::interrupt::Destination::Physical(ApicId(id)),
                trigger: crate::interrupt::Trigger::Edge,
                asserted: true,
            });
            machine.deliver_all();
            machine.apics[usize::from(id)].take(OPEN);
            machine.write(id, 0xf0, 0x1ff);
            machine.write(id, 0xd0, 1 << (24 + id));
        }
        machine
    }

    fn post(&mut self, message: Message) -> bool {
        let views: Vec<View> = self.apics.iter().map(LocalApic::view).collect();
        let targets = route(&message, &views);
        self.parcels.extend(targets.iter().map(|target| Parcel::Message { target, message }));
        !targets.is_empty()
    }

    fn post_all(&mut self, messages: Messages) {
        for raised in messages {
            if !self.post(raised.message) {
                self.chipset.io_apic().refused(raised.pin);
            }
        }
    }

    fn deliver(&mut self, which: usize) {
        match self.parcels.remove(which) {
            Parcel::Message { target, message } => {
                self.apics[usize::from(target.0)].accept(&message);
            }
            Parcel::Eoi(vector) => {
                let again = self.chipset.io_apic().end_of_interrupt(vector);
                self.post_all(again);
            }
        }
    }

    fn deliver_all(&mut self) {
        while !self.parcels.is_empty() {
            self.deliver(0);
        }
        self.apics[0].set_lint(Lint::Lint0, self.chipset.intr());
    }

    fn write(&mut self, id: u8, offset: u64, value: u32) {
        let now = Now { nanos: self.now, tsc: Tsc(self.now.0) };
        let effects = self.apics[usize::from(id)].write(offset, &value.to_le_bytes(), now);
        if let Some(message) = effects.message {
            self.post(message);
        }
        self.parcels.extend(effects.eoi.map(Parcel::Eoi));
    }

    fn program(&mut self, pin: u8, entry: u64) {
        for (half, at) in [(1, 32), (0, 0)] {
            let select = u32::from(0x10 + 2 * pin + half);
            let mut messages = self.chipset.io_apic().write(0, &select.to_le_bytes());
            messages.extend(self.chipset.io_apic().write(0x10, &((entry >> at) as u32).to_le_bytes()));
            self.post_all(messages);
        }
    }

    fn line(&mut self, gsi: u8, high: bool) {
        let messages = self.chipset.set_line(gsi, high);
        self.post_all(messages);
    }

    fn ports(&mut self, writes: &[(u64, u8)]) {
        for (address, value) in writes {
            assert!(self.chipset.write_port(*address, *value, self.now));
        }
    }

    fn advance(&mut self, now: Nanos) {
        self.now = now;
        let messages = self.chipset.advance(now);
        self.post_all(messages);
        self.deliver_all();
    }

    fn take(&mut self, id: u8) -> Option<Event> {
        self.apics[usize::from(id)].take(OPEN)
    }
}

/// Both PICs as Linux sets them up, and the timer at 100 Hz.
const LEGACY: [(u64, u8); 11] = [
    (0x20, 0x11),
    (0x21, 0x30),
    (0x21, 4),
    (0x21, 1),
    (0xa0, 0x11),
    (0xa1, 0x38),
    (0xa1, 2),
    (0xa1, 1),
    (0x43, 0x34),
    (0x40, 0x9c),
    (0x40, 0x2e),
];

#[test]
fn a_processor_is_started_by_another_with_init_and_two_sipis() {
    let mut machine = Machine::new(3);
    for (high, low) in
        [(0x0200_0000, 0xc500), (0x0200_0000, 0x8500), (0x0200_0000, 0x069a), (0x0200_0000, 0x069a)]
    {
        machine.write(0, 0x310, high);
        machine.write(0, 0x300, low);
    }
    machine.deliver_all();
    assert_eq!(machine.take(2), Some(Event::Init));
    assert_eq!((machine.take(2), machine.take(2)), (Some(Event::StartUp { vector: 0x9a }), None));
    assert_eq!((machine.take(0), machine.take(1)), (None, None));
    assert!(machine.apics[1].waits_for_start_up());
}

#[test]
fn before_the_apics_are_set_up_the_timer_comes_through_the_pic_as_an_external_interrupt() {
    let mut machine = Machine::new(2);
    machine.ports(&LEGACY);
    for tick in 1..=3 {
        let deadline = machine.chipset.deadline().expect("it runs");
        assert_eq!(deadline.0 / 10_000_000, tick);
        machine.advance(deadline);
        assert_eq!((machine.take(0), machine.chipset.acknowledge()), (Some(Event::External), 0x30));
        machine.deliver_all();
        assert_eq!(machine.take(0), None);
        machine.ports(&[(0x20, 0x20)]);
    }
}

#[test]
fn with_the_apics_set_up_the_timer_comes_through_pin_2() {
    let mut machine = Machine::running(2);
    machine.ports(&LEGACY);
    machine.ports(&[(0x21, 0xff), (0xa1, 0xff)]);
    machine.program(2, 0x0100_0000_0000_0030);
    machine.advance(machine.chipset.deadline().expect("it runs"));
    assert_eq!((machine.take(0), machine.take(1)), (None, Some(Event::Interrupt { vector: 0x30 })));
}

#[test]
fn an_ipi_to_all_others_reaches_them_once_each() {
    let mut machine = Machine::running(4);
    machine.write(1, 0x300, 0xc_40fd);
    machine.deliver_all();
    let hit = Some(Event::Interrupt { vector: 0xfd });
    assert_eq!([0, 1, 2, 3].map(|id| machine.take(id)), [hit, None, hit, hit]);
    assert_eq!([0, 1, 2, 3].map(|id| machine.take(id)), [None; 4]);
}

#[test]
fn an_msi_goes_to_the_processor_of_the_lowest_priority() {
    let mut machine = Machine::running(3);
    machine.write(0, 0x80, 0x20);
    machine.write(2, 0x80, 0x10);
    let msi = MsiMessage { address: 0xfee0_500c, data: 0x61 };
    let message = Message::from_msi(msi).expect("it is one");
    assert!(machine.post(message));
    machine.deliver_all();
    assert_eq!([0, 1, 2].map(|id| machine.take(id)), [None, None, Some(Event::Interrupt { vector: 0x61 })]);
}

#[test]
fn a_level_that_no_processor_takes_waits_for_one_that_does() {
    let mut machine = Machine::running(2);
    machine.write(1, 0xf0, 0xff);
    machine.program(9, 0x0100_0000_0000_8042);
    machine.line(9, true);
    machine.deliver_all();
    machine.write(1, 0xf0, 0x1ff);
    assert_eq!(machine.take(1), None);
    let again = machine.chipset.io_apic().retry();
    machine.post_all(again);
    machine.deliver_all();
    assert_eq!(machine.take(1), Some(Event::Interrupt { vector: 0x42 }));
}

#[test]
fn the_ports_are_those_of_a_pc_and_no_others() {
    let mut chipset = Chipset::default();
    let known: Vec<u64> =
        (0..0x1000).filter(|address| chipset.read_port(*address, Nanos(0)).is_some()).collect();
    assert_eq!(known, [0x20, 0x21, 0x40, 0x41, 0x42, 0x43, 0x61, 0xa0, 0xa1, 0x4d0, 0x4d1]);
    assert!((0..0x1000).all(|at| chipset.write_port(at, 0, Nanos(0)) == known.contains(&at)));
}

proptest! {
    /// Two devices share a level-triggered line. Messages and EOIs arrive in any order. A driver serves whichever
    /// devices ask when its interrupt comes; so every request is served in the end, and then all is at rest.
    #[test]
    fn a_shared_level_triggered_line_is_served_whatever_the_order_of_messages(
        steps in proptest::collection::vec((0..4u8, any::<prop::sample::Index>(), any::<bool>()), 0..200),
        lowest_priority: bool,
    ) {
        let mut machine = Machine::running(3);
        machine.program(9, 0x0700_0000_0000_8842 | u64::from(lowest_priority) << 8);
        let mut asking = [false; 2];
        let serve = |machine: &mut Machine, asking: &mut [bool; 2], id: u8| {
            let Some(event) = machine.take(id) else { return };
            assert_eq!(event, Event::Interrupt { vector: 0x42 });
            *asking = [false; 2];
            machine.line(9, false);
            machine.write(id, 0xb0, 0);
        };
        for (what, which, device) in steps {
            match what {
                0 => {
                    asking[usize::from(device)] = true;
                    machine.line(9, true);
                }
                1 if !machine.parcels.is_empty() => {
                    let which = which.index(machine.parcels.len());
                    machine.deliver(which);
                }
                _ => serve(&mut machine, &mut asking, which.index(3) as u8),
            }
        }
        for _ in 0..4 {
            machine.deliver_all();
            (0..3).for_each(|id| serve(&mut machine, &mut asking, id));
        }
        prop_assert_eq!(asking, [false; 2]);
        prop_assert!(machine.parcels.is_empty());
        let mut entry = [0; 4];
        prop_assert!(machine.chipset.io_apic().write(0, &[0x22, 0, 0, 0]).is_empty());
        machine.chipset.io_apic().read(0x10, &mut entry);
        prop_assert_eq!(u32::from_le_bytes(entry) & 1 << 14, 0, "Remote IRR");
    }
}
