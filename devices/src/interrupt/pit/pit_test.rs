//! Against the Intel 8254 data sheet. Times are in ticks of the PIT's clock.

use proptest::prelude::*;

use super::*;

fn put(pit: &mut Pit, address: u64, value: u8, now: Tick) {
    pit.write(Port::at(address).expect("a register"), value, begins(now));
}

fn get(pit: &mut Pit, address: u64, now: Tick) -> u8 {
    pit.read(Port::at(address).expect("a register"), begins(now))
}

/// Counter `which` in `mode`, binary or BCD, with `count` written at tick 9, so loaded at 10.
fn counting(which: u8, mode: u8, bcd: bool, count: u16) -> Pit {
    let mut pit = Pit::default();
    put(&mut pit, 0x61, 1, 0);
    put(&mut pit, 0x43, which << 6 | 0x30 | mode << 1 | u8::from(bcd), 9);
    write(&mut pit, which, count, 9);
    pit
}

fn write(pit: &mut Pit, which: u8, count: u16, now: Tick) {
    for byte in count.to_le_bytes() {
        put(pit, 0x40 + u64::from(which), byte, now);
    }
}

fn read(pit: &mut Pit, which: u8, now: Tick) -> u16 {
    u16::from_le_bytes([(); 2].map(|()| get(pit, 0x40 + u64::from(which), now)))
}

fn output(pit: &mut Pit, now: Tick) -> bool {
    get(pit, 0x61, now) & 0x20 != 0
}

/// OUT of counter 2 at each of `ticks` from its load on, as the data sheet's timing diagrams show it.
fn wave(pit: &mut Pit, ticks: Tick) -> String {
    (0..ticks).map(|tick| if output(pit, 10 + tick) { '‾' } else { '_' }).collect()
}

fn counts(pit: &mut Pit, ticks: Tick) -> Vec<u16> {
    (0..ticks).map(|tick| read(pit, 2, 10 + tick)).collect()
}

#[test]
fn a_tick_begins_at_the_first_nanosecond_that_is_in_it() {
    for at in [0, 1, 2, 1_193_182, 123_456_789_012] {
        assert_eq!(tick(begins(at)), at);
        if at > 0 {
            assert_eq!(tick(Nanos(begins(at).0 - 1)), at - 1);
        }
    }
    assert_eq!(begins(FREQUENCY), Nanos(1_000_000_000));
    assert_eq!(begins(Tick::MAX), Nanos(u64::MAX));
}

#[test]
fn mode_0_goes_high_at_the_terminal_count_and_counts_on() {
    let mut pit = counting(2, 0, false, 4);
    assert_eq!(wave(&mut pit, 8), "____‾‾‾‾");
    assert_eq!(counts(&mut pit, 7), [4, 3, 2, 1, 0, 0xffff, 0xfffe]);
}

#[test]
fn mode_0_stops_at_the_first_byte_of_a_new_count_and_while_the_gate_is_low() {
    let mut pit = counting(2, 0, false, 4);
    put(&mut pit, 0x61, 0, 12);
    assert_eq!((read(&mut pit, 2, 100), output(&mut pit, 100)), (2, false));
    put(&mut pit, 0x61, 1, 100);
    assert!(!output(&mut pit, 101) && output(&mut pit, 102));
    put(&mut pit, 0x42, 3, 110);
    assert!(!output(&mut pit, 1000), "it waits for the other byte");
    put(&mut pit, 0x42, 0, 1000);
    assert!(!output(&mut pit, 1003) && output(&mut pit, 1004));
}

#[test]
fn mode_1_is_a_one_shot_that_each_rise_of_the_gate_starts_anew() {
    let mut pit = counting(2, 1, false, 3);
    assert_eq!(wave(&mut pit, 4), "‾‾‾‾");
    put(&mut pit, 0x61, 0, 14);
    put(&mut pit, 0x61, 1, 19);
    let ticks: Vec<bool> = (19..25).map(|tick| output(&mut pit, tick)).collect();
    assert_eq!(ticks, [true, false, false, false, true, true]);
    put(&mut pit, 0x61, 0, 30);
    put(&mut pit, 0x61, 1, 30);
    put(&mut pit, 0x61, 0, 32);
    put(&mut pit, 0x61, 1, 32);
    assert!(!output(&mut pit, 35) && output(&mut pit, 36));
}

#[test]
fn mode_2_is_low_for_the_last_tick_of_each_period() {
    let mut pit = counting(2, 2, false, 3);
    assert_eq!(wave(&mut pit, 9), "‾‾_‾‾_‾‾_");
    let mut pit = counting(2, 2, false, 3);
    assert_eq!(counts(&mut pit, 7), [3, 2, 1, 3, 2, 1, 3]);
}

#[test]
fn mode_3_is_high_for_half_of_each_period_and_for_a_tick_more_if_it_is_odd() {
    let mut pit = counting(2, 3, false, 4);
    assert_eq!(wave(&mut pit, 8), "‾‾__‾‾__");
    assert_eq!(counts(&mut counting(2, 3, false, 4), 6), [4, 2, 4, 2, 4, 2]);
    assert_eq!(wave(&mut counting(2, 3, false, 5), 10), "‾‾‾__‾‾‾__");
    assert_eq!(counts(&mut counting(2, 3, false, 5), 6), [4, 2, 0, 4, 2, 4]);
}

#[test]
fn modes_2_and_3_stand_with_a_high_output_while_the_gate_is_low_and_begin_anew_with_it() {
    for mode in [2, 3] {
        let mut pit = counting(2, mode, false, 4);
        put(&mut pit, 0x61, 0, 13);
        assert!(output(&mut pit, 13) && output(&mut pit, 1000));
        put(&mut pit, 0x61, 1, 1000);
        assert!(output(&mut pit, 1001) && !output(&mut pit, 1004));
    }
}

#[test]
fn mode_4_strobes_once_after_the_count() {
    assert_eq!(wave(&mut counting(2, 4, false, 3), 7), "‾‾‾_‾‾‾");
}

#[test]
fn mode_5_strobes_after_each_rise_of_the_gate() {
    let mut pit = counting(2, 5, false, 2);
    assert_eq!(wave(&mut pit, 4), "‾‾‾‾");
    for from in [20, 30] {
        put(&mut pit, 0x61, 0, from);
        put(&mut pit, 0x61, 1, from);
        let low: Vec<Tick> = (from..from + 8).filter(|tick| !output(&mut pit, *tick)).collect();
        assert_eq!(low, [from + 3]);
    }
}

#[test]
fn a_new_count_of_a_periodic_mode_waits_for_the_end_of_the_period() {
    let mut pit = counting(0, 2, false, 1000);
    write(&mut pit, 0, 5000, 500);
    assert_eq!(pit.deadline(), Some(begins(1010)));
    put(&mut pit, 0x43, 0xe2, 501); // read back the status of counter 0
    assert_eq!(get(&mut pit, 0x40, 502), 0x80 | 0x40 | 0x34, "null count");
    assert!(pit.advance(begins(1010)));
    assert_eq!(pit.deadline(), Some(begins(6010)));
    put(&mut pit, 0x43, 0xe2, 1011);
    assert_eq!(get(&mut pit, 0x40, 1011), 0x80 | 0x34);
}

#[test]
fn a_count_of_zero_is_the_longest() {
    assert_eq!(counting(0, 2, false, 0).deadline(), Some(begins(10 + 65_536)));
    assert_eq!(counting(0, 2, true, 0).deadline(), Some(begins(10 + 10_000)));
    assert_eq!(read(&mut counting(2, 2, false, 0), 2, 10), 0);
}

#[test]
fn bcd_counts_in_decimal_digits() {
    let mut pit = counting(2, 0, true, 0x1000);
    assert_eq!(counts(&mut pit, 2), [0x1000, 0x0999]);
    assert_eq!(read(&mut pit, 2, 1011), 0x9999);
    assert_eq!(counting(0, 2, true, 0xffff).deadline(), Some(begins(10 + 16_665)), "digits of fifteen");
}

#[test]
fn latched_counts_wait_to_be_read_and_the_first_of_two_holds() {
    let mut pit = counting(2, 0, false, 0x1234);
    put(&mut pit, 0x43, 0x80, 14);
    put(&mut pit, 0x43, 0x80, 500);
    assert_eq!(read(&mut pit, 2, 1000), 0x1230);
    assert_eq!(read(&mut pit, 2, 1010), 0x1234 - 1000);
}

#[test]
fn read_back_latches_status_and_count_of_the_counters_that_it_names() {
    let mut pit = counting(2, 2, false, 100);
    put(&mut pit, 0x43, 0xc8, 30);
    assert_eq!(get(&mut pit, 0x42, 90), 0x80 | 0x34, "the status comes first");
    assert_eq!(read(&mut pit, 2, 90), 80);
    put(&mut pit, 0x43, 0xc2, 95);
    assert_eq!(read(&mut pit, 2, 95), 15, "counter 0 was named");
    let mut pit = counting(2, 0, true, 0x50);
    put(&mut pit, 0x43, 0xe8, 9);
    assert_eq!(get(&mut pit, 0x42, 99), 0x40 | 0x31, "not loaded yet, output low");
}

#[test]
fn one_byte_may_be_all_that_is_written_and_read() {
    for (access, written, value) in [(0x10, 0x34, 0x34), (0x20, 0x12, 0x1200)] {
        let mut pit = Pit::default();
        put(&mut pit, 0x43, access | 4, 9);
        put(&mut pit, 0x40, written, 9);
        assert_eq!(pit.deadline(), Some(begins((10 + value).max(SHORTEST_PERIOD))));
        assert_eq!(get(&mut pit, 0x40, 10), written);
        assert_eq!(get(&mut pit, 0x40, 10), written);
    }
}

#[test]
fn counter_0_interrupts_in_each_mode_when_its_output_rises() {
    for (mode, first, second) in
        [(0, 1000, None), (2, 1000, Some(2000)), (3, 1000, Some(2000)), (4, 1001, None)]
    {
        let mut pit = counting(0, mode, false, 1000);
        assert_eq!(pit.deadline(), Some(begins(10 + first)), "mode {mode}");
        assert!(!pit.advance(Nanos(begins(10 + first).0 - 1)));
        assert!(pit.advance(begins(10 + first)));
        assert!(!pit.advance(begins(10 + first)), "once");
        assert_eq!(pit.deadline(), second.map(|tick: Tick| begins(10 + tick)), "mode {mode}");
    }
}

#[test]
fn periods_that_were_missed_are_one_interrupt_and_the_phase_stays() {
    let mut pit = counting(0, 2, false, 1000);
    assert!(pit.advance(begins(7500)));
    assert!(!pit.advance(begins(7501)));
    assert_eq!(pit.deadline(), Some(begins(8010)));
}

#[test]
fn an_edge_that_an_access_comes_across_is_not_lost() {
    let mut pit = counting(0, 2, false, 1000);
    read(&mut pit, 0, 1500);
    assert!(pit.advance(begins(1500)));
    put(&mut pit, 0x43, 0x34, 2500);
    assert!(pit.advance(begins(2500)));
    assert_eq!(pit.deadline(), None);
}

#[test]
fn a_period_that_would_drown_the_host_is_held_back() {
    let mut pit = counting(0, 2, false, 1);
    for _ in 0..10 {
        let before = pit.seen;
        let deadline = pit.deadline().expect("it runs");
        assert!(pit.advance(deadline));
        assert!(pit.seen - before >= SHORTEST_PERIOD);
    }
}

#[test]
fn port_61_shows_the_refresh_and_remembers_four_bits() {
    let mut pit = Pit::default();
    put(&mut pit, 0x61, 0xff, 0);
    let toggles: Vec<u8> = [0, 17, 18, 35, 36].map(|tick| get(&mut pit, 0x61, tick)).into();
    assert_eq!(toggles, [0x0f, 0x0f, 0x1f, 0x1f, 0x0f]);
}

#[test]
fn the_end_of_time_is_no_overflow() {
    for mode in 0..6 {
        let mut pit = Pit::default();
        let late = Nanos(u64::MAX);
        pit.write(Port::Control, 0x30 | mode << 1, late);
        pit.write(Port::Counter(0), 1, late);
        pit.write(Port::Counter(0), 0, late);
        let _ = (pit.advance(late), pit.deadline(), pit.read(Port::Counter(0), Nanos(0)));
    }
}

proptest! {
    #[test]
    fn no_interrupt_is_early_and_none_is_missing_at_its_deadline(
        accesses in proptest::collection::vec((0..5u64, any::<u8>(), 0..100_000u64), 0..60),
    ) {
        let mut pit = Pit::default();
        let mut now = Nanos(0);
        for (port, value, wait) in accesses {
            now = now.after(wait);
            let before = pit.deadline();
            let rose = pit.advance(now);
            prop_assert_eq!(rose, before.is_some_and(|at| at <= now));
            let port = Port::at([0x40, 0x42, 0x43, 0x61, 0x41][port as usize]).expect("a register");
            pit.write(port, value, now);
            pit.read(port, now);
            prop_assert!(pit.deadline().is_none_or(|at| at > now));
        }
        let saved = serde_json::to_value(&pit).expect("it is plain data");
        let mut pit: Pit = serde_json::from_value(saved).expect("it is its own");
        if let Some(deadline) = pit.deadline() {
            prop_assert!(!pit.advance(Nanos(deadline.0 - 1)));
            prop_assert!(pit.advance(deadline));
        }
    }
}
