//! Against the Intel SDM vol. 3A, "APIC Timer".

use super::local_test::*;
use super::*;
use crate::interrupt::time::Nanos;

const LVT: u64 = 0x320;
const INITIAL: u64 = 0x380;
const CURRENT: u64 = 0x390;
const DIVIDE: u64 = 0x3e0;
const PERIODIC: u32 = 1 << 17;
const TSC_DEADLINE: u32 = 1 << 18;
/// Divide by one.
const BY_1: u32 = 0b1011;

fn armed(lvt: u32, divide: u32, count: u32) -> LocalApic {
    let mut apic = running();
    put(&mut apic, LVT, lvt);
    put(&mut apic, DIVIDE, divide);
    put(&mut apic, INITIAL, count);
    apic
}

fn due(nanos: u64) -> Option<Deadline> {
    Some(Deadline::Nanos(Nanos(nanos)))
}

fn fired(apic: &mut LocalApic) -> bool {
    let event = apic.take(OPEN);
    assert!([None, Some(Event::Interrupt { vector: 0x40 })].contains(&event), "{event:?}");
    put(apic, 0xb0, 0);
    event.is_some()
}

#[test]
fn the_divide_configuration_is_decoded_as_the_manual_draws_it() {
    let table = [(0, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (10, 128), (11, 1)];
    for (value, divisor) in table {
        assert_eq!(armed(0x40, value, 1000).deadline(), due(1000 * divisor), "{value:#b}");
    }
}

#[test]
fn a_one_shot_fires_once_when_its_count_is_down_and_not_a_nanosecond_before() {
    let mut apic = armed(0x40, 0, 1000);
    assert_eq!(get_at(&mut apic, CURRENT, 1), 1000);
    assert_eq!(get_at(&mut apic, CURRENT, 2), 999);
    assert_eq!(get_at(&mut apic, CURRENT, 1999), 1);
    apic.advance(at(1999));
    assert!(!fired(&mut apic));
    apic.advance(at(2000));
    assert!(fired(&mut apic));
    assert_eq!((get_at(&mut apic, CURRENT, 2000), get(&mut apic, INITIAL)), (0, 1000));
    apic.advance(at(1 << 40));
    assert_eq!((fired(&mut apic), apic.deadline()), (false, None));
}

#[test]
fn a_count_of_zero_stops_the_timer() {
    let mut apic = armed(0x40, BY_1, 1000);
    put_at(&mut apic, INITIAL, 0, 500);
    apic.advance(at(5000));
    assert_eq!((fired(&mut apic), apic.deadline(), get_at(&mut apic, CURRENT, 500)), (false, None, 0));
}

#[test]
fn a_periodic_timer_keeps_its_phase_however_late_it_is_looked_at() {
    let mut apic = armed(0x40 | PERIODIC, BY_1, 1_000_000);
    assert_eq!(apic.deadline(), due(1_000_000));
    apic.advance(at(1_300_000));
    assert!(fired(&mut apic));
    assert_eq!(apic.deadline(), due(2_000_000));
    assert_eq!(get_at(&mut apic, CURRENT, 1_300_000), 700_000);
    apic.advance(at(7_500_000));
    assert!(fired(&mut apic), "six periods are one interrupt");
    assert_eq!((fired(&mut apic), apic.deadline()), (false, due(8_000_000)));
}

#[test]
fn a_period_that_would_drown_the_host_is_held_back() {
    let mut apic = armed(0x40 | PERIODIC, BY_1, 3);
    let mut now = 0;
    for _ in 0..100 {
        let Some(Deadline::Nanos(next)) = apic.deadline() else { panic!("it runs") };
        assert!(next.0 > now + SHORTEST_PERIOD / 2 && next.0 <= now + SHORTEST_PERIOD);
        now = next.0;
        assert!((1..=3).contains(&get_at(&mut apic, CURRENT, now - 1)), "it counts on");
        apic.advance(at(now));
        assert!(fired(&mut apic));
    }
}

#[test]
fn a_masked_timer_runs_out_silently() {
    let mut apic = armed(0x40 | 1 << 16, BY_1, 1000);
    apic.advance(at(1000));
    put_at(&mut apic, LVT, 0x40, 1001);
    assert_eq!((fired(&mut apic), apic.deadline()), (false, None));
}

#[test]
fn another_divisor_counts_on_from_where_the_count_is() {
    let mut apic = armed(0x40, BY_1, 1000);
    put_at(&mut apic, DIVIDE, 0, 600);
    assert_eq!(get_at(&mut apic, CURRENT, 600), 400);
    assert_eq!(apic.deadline(), due(600 + 800));
}

#[test]
fn the_tsc_deadline_fires_once_and_then_reads_zero() {
    let mut apic = armed(0x40 | TSC_DEADLINE, BY_1, 1000);
    assert_eq!(apic.deadline(), None, "the initial count is ignored");
    apic.set_tsc_deadline(Tsc(3000), at(0));
    assert_eq!((apic.tsc_deadline(), apic.deadline()), (Tsc(3000), Some(Deadline::Tsc(Tsc(3000)))));
    assert_eq!(get_at(&mut apic, CURRENT, 10), 0);
    apic.advance(at(999));
    assert!(!fired(&mut apic));
    apic.advance(at(1000));
    assert!(fired(&mut apic));
    assert_eq!((apic.tsc_deadline(), apic.deadline()), (Tsc(0), None));
}

#[test]
fn a_tsc_deadline_in_the_past_fires_at_once_and_zero_disarms() {
    let mut apic = armed(0x40 | TSC_DEADLINE, BY_1, 0);
    apic.set_tsc_deadline(Tsc(1), at(1000));
    assert!(fired(&mut apic));
    apic.set_tsc_deadline(Tsc(9000), at(1000));
    apic.set_tsc_deadline(Tsc(0), at(1000));
    apic.advance(at(1 << 40));
    assert!(!fired(&mut apic));
}

#[test]
fn the_tsc_deadline_is_ignored_in_other_modes_and_a_change_of_mode_disarms() {
    let mut apic = armed(0x40, BY_1, 0);
    apic.set_tsc_deadline(Tsc(3000), at(0));
    assert_eq!((apic.tsc_deadline(), apic.deadline()), (Tsc(0), None));
    for (from, to) in [
        (0, TSC_DEADLINE),
        (PERIODIC, TSC_DEADLINE),
        (PERIODIC, PERIODIC | TSC_DEADLINE),
        (0, PERIODIC),
        (PERIODIC, 0),
    ] {
        let mut apic = armed(0x40 | from, BY_1, 1000);
        put_at(&mut apic, LVT, 0x40 | to, 10);
        assert_eq!(apic.deadline(), None, "{from:#x} to {to:#x}");
    }
    let mut apic = armed(0x40 | PERIODIC, BY_1, 1000);
    put_at(&mut apic, LVT, 0x41 | PERIODIC | 1 << 16, 10);
    assert_eq!(apic.deadline(), due(SHORTEST_PERIOD), "another vector or mask does not");
    let mut apic = armed(0x40 | TSC_DEADLINE, BY_1, 0);
    apic.set_tsc_deadline(Tsc(3000), at(0));
    put(&mut apic, LVT, 0x40);
    assert_eq!(apic.deadline(), None);
}

#[test]
fn the_end_of_time_is_no_overflow() {
    let mut apic = running();
    put(&mut apic, LVT, 0x40 | PERIODIC);
    put(&mut apic, DIVIDE, 0b1010);
    let late = Now { nanos: Nanos(u64::MAX - 5), tsc: Tsc(u64::MAX) };
    let _ = apic.write(INITIAL, &[0xff; 4], late);
    apic.advance(Now { nanos: Nanos(u64::MAX), ..late });
    assert!(fired(&mut apic));
    let mut count = [0; 4];
    apic.read(CURRENT, &mut count, Now::default());
    assert_eq!(count, [0xff; 4], "a clock that went back shows no more than the initial count");
}
