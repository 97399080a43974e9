//! What holds whatever a guest and its devices do.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::local_test::*;
use super::*;
use crate::interrupt::time::Nanos;

#[derive(Clone, Debug)]
enum Step {
    Accept(u8, bool),
    Take,
    Eoi,
    Tpr(u8),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (any::<u8>(), any::<bool>()).prop_map(|(vector, level)| Step::Accept(vector, level)),
        4 => Just(Step::Take),
        3 => Just(Step::Eoi),
        1 => any::<u8>().prop_map(Step::Tpr),
    ]
}

/// What the APIC has to be, said as plainly as can be.
#[derive(Default)]
struct Model {
    requested: BTreeMap<u8, ()>,
    level: BTreeMap<u8, bool>,
    in_service: Vec<u8>,
    tpr: u8,
}

impl Model {
    fn next(&self) -> Option<u8> {
        let floor = self.in_service.last().map_or(0, |vector| vector >> 4).max(self.tpr >> 4);
        self.requested.keys().next_back().copied().filter(|vector| vector >> 4 > floor)
    }
}

fn is_at_rest(apic: &mut LocalApic) -> bool {
    (0x100..0x180).chain(0x200..0x280).step_by(16).all(|offset| get(apic, offset) == 0)
}

proptest! {
    #[test]
    fn no_interrupt_is_lost_or_doubled_and_none_of_a_class_interrupts_another_of_it(
        steps in proptest::collection::vec(step(), 0..200),
    ) {
        let (mut apic, mut model) = (running(), Model::default());
        let finish = std::iter::once(Step::Tpr(0)).chain([Step::Take, Step::Eoi].into_iter().cycle().take(1200));
        for step in steps.into_iter().chain(finish) {
            match step {
                Step::Accept(vector, level) => {
                    let trigger = if level { Trigger::Level } else { Trigger::Edge };
                    prop_assert_eq!(send(&mut apic, Delivery::Fixed, vector, trigger), vector >= 16);
                    if vector >= 16 {
                        model.requested.insert(vector, ());
                        model.level.insert(vector, level);
                    }
                }
                Step::Take => {
                    let next = model.next();
                    prop_assert_eq!(apic.pending().interrupt, next.is_some());
                    let taken = apic.take(OPEN);
                    prop_assert_eq!(taken, next.map(|vector| Event::Interrupt { vector }));
                    if let Some(vector) = next {
                        prop_assert!(model.in_service.iter().all(|other| other >> 4 < vector >> 4));
                        model.requested.remove(&vector);
                        model.in_service.push(vector);
                    }
                }
                Step::Eoi => {
                    let ended = model.in_service.pop();
                    let eoi = ended.filter(|vector| model.level[vector]);
                    prop_assert_eq!(put(&mut apic, 0xb0, 0), Effects { eoi, message: None });
                }
                Step::Tpr(value) => {
                    model.tpr = value;
                    put(&mut apic, 0x80, value.into());
                }
            }
        }
        prop_assert!(model.requested.is_empty() && model.in_service.is_empty());
        prop_assert!(is_at_rest(&mut apic));
    }

    /// Progress is counted in 128ths of a count, the slowest that the timer can be.
    #[test]
    fn the_timer_never_fires_early_and_always_at_its_deadline(
        periodic: bool,
        count in 1..2_000_000u32,
        changes in proptest::collection::vec((0..3_000_000u64, 0..16u32), 0..20),
    ) {
        let mut apic = running();
        let (mut now, mut divide, mut progress) = (0, 0, 0);
        put(&mut apic, 0x320, 0x40 | u32::from(periodic) << 17);
        put(&mut apic, 0x380, count);
        let speed = |divide: u32| 128 >> ((((divide >> 1) & 4 | divide & 3) + 1) & 7);
        for (wait, next) in changes {
            progress += wait * speed(divide);
            now += wait;
            apic.advance(at(now));
            if apic.take(OPEN).is_some() {
                put(&mut apic, 0xb0, 0);
                prop_assert!(progress >= u64::from(count) * 128);
                progress = if periodic { progress % (u64::from(count) * 128) } else { 0 };
                if !periodic {
                    put_at(&mut apic, 0x380, count, now);
                }
            }
            put_at(&mut apic, 0x3e0, next, now);
            divide = next;
        }
        let Some(Deadline::Nanos(deadline)) = apic.deadline() else { panic!("it runs") };
        apic.advance(Now { nanos: Nanos(deadline.0 - 1), ..at(0) });
        prop_assert_eq!(apic.take(OPEN), None);
        apic.advance(Now { nanos: deadline, ..at(0) });
        prop_assert_eq!(apic.take(OPEN), Some(Event::Interrupt { vector: 0x40 }));
    }

    #[test]
    fn any_accesses_leave_an_apic_that_is_the_same_value_after_being_saved_and_restored(
        accesses in proptest::collection::vec((0..0x440u64, any::<u32>(), any::<bool>(), any::<u32>()), 0..100),
    ) {
        let mut apic = running();
        for (offset, value, write, now) in accesses {
            if write {
                put_at(&mut apic, offset & !3, value, now.into());
            } else {
                get_at(&mut apic, offset, now.into());
            }
            apic.set_lint(if value & 1 == 0 { Lint::Lint0 } else { Lint::Lint1 }, value & 2 == 0);
            apic.set_tsc_deadline(Tsc(value.into()), at(now.into()));
            apic.take(Window { interrupts: value & 4 == 0, nmi: value & 8 == 0 });
        }
        let saved = serde_json::to_value(&apic).expect("it is plain data");
        let mut restored: LocalApic = serde_json::from_value(saved).expect("it is its own");
        prop_assert_eq!(&restored, &apic);
        restored.reset();
    }
}
