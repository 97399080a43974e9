//! What the processor itself has to report: pins, performance counters, the thermal monitor (Intel SDM vol. 3A,
//! "Local Vector Table").

use super::local_test::*;
use super::*;

#[test]
fn a_level_triggered_lint0_asks_again_until_the_pin_falls() {
    let mut apic = running();
    apic.set_lint(Lint::Lint0, true);
    put(&mut apic, 0x350, 0x8040);
    assert_eq!(get(&mut apic, 0x350), 0xc040, "Remote IRR");
    assert_eq!(apic.take(OPEN), interrupt(0x40));
    apic.set_lint(Lint::Lint0, false);
    apic.set_lint(Lint::Lint0, true);
    assert_eq!(get(&mut apic, 0x220), 0, "not while it is in service");
    put(&mut apic, 0xb0, 0);
    assert_eq!(apic.take(OPEN), interrupt(0x40));
    apic.set_lint(Lint::Lint0, false);
    put(&mut apic, 0xb0, 0);
    assert_eq!((apic.take(OPEN), get(&mut apic, 0x350)), (None, 0x8040));
}

#[test]
fn an_edge_triggered_pin_counts_its_edges_by_its_polarity_only_while_unmasked() {
    let mut apic = running();
    put(&mut apic, 0x360, 0x40 | 1 << 13);
    assert_eq!(apic.take(OPEN), interrupt(0x40), "becoming active low is an edge of a pin that is low");
    put(&mut apic, 0xb0, 0);
    apic.set_lint(Lint::Lint1, true);
    assert_eq!(apic.take(OPEN), None);
    apic.set_lint(Lint::Lint1, false);
    assert_eq!(apic.take(OPEN), interrupt(0x40));
    put(&mut apic, 0xb0, 0);
    put(&mut apic, 0x360, 0x40 | 1 << 13 | 1 << 16);
    apic.set_lint(Lint::Lint1, true);
    apic.set_lint(Lint::Lint1, false);
    put(&mut apic, 0x360, 0x40 | 1 << 13);
    assert_eq!(apic.take(OPEN), None, "the edge was while it was masked");
}

#[test]
fn virtual_wire_mode_takes_external_interrupts_while_the_pin_is_high_and_nmis_at_its_edge() {
    let mut apic = LocalApic::new(ApicId(0), true);
    apic.set_virtual_wire();
    apic.set_cr8(15);
    apic.set_lint(Lint::Lint0, true);
    assert!(apic.pending().interrupt, "an external interrupt has no priority");
    assert_eq!((apic.take(OPEN), apic.take(OPEN)), (Some(Event::External), Some(Event::External)));
    apic.set_lint(Lint::Lint0, false);
    assert_eq!(apic.take(OPEN), None);
    apic.set_lint(Lint::Lint1, true);
    assert_eq!((apic.take(OPEN), apic.take(OPEN)), (Some(Event::Nmi), None));
    assert!(send(&mut apic, Delivery::External, 0, Trigger::Edge));
    assert_eq!((apic.take(OPEN), apic.take(OPEN)), (Some(Event::External), None), "as a message, once");
}

#[test]
fn the_performance_counter_entry_masks_itself() {
    let mut apic = running();
    put(&mut apic, 0x340, 0x400);
    apic.performance_counters_overflowed();
    apic.performance_counters_overflowed();
    assert_eq!((apic.take(OPEN), apic.take(OPEN)), (Some(Event::Nmi), None));
    assert_eq!(get(&mut apic, 0x340), 0x1_0400);
    put(&mut apic, 0x330, 0x55);
    apic.thermal_monitor_tripped();
    assert_eq!((apic.take(OPEN), get(&mut apic, 0x330)), (interrupt(0x55), 0x55));
}
