//! Against the MC146818A data sheet.

use std::cell::Cell;

use super::*;

thread_local!(static NOW: Cell<Duration> = const { Cell::new(Duration::ZERO) });

/// Saturday 2023-12-30 21:58:07 UTC.
const SATURDAY: u64 = 1_703_973_487;

fn rig(ram: RamSize) -> Rtc {
    NOW.set(Duration::from_secs(SATURDAY));
    Rtc::with_clock(ram, || NOW.get())
}

fn get(rtc: &Rtc, address: u8) -> u8 {
    let mut byte = [0];
    rtc.write(0, &[address]);
    rtc.read(1, &mut byte);
    byte[0]
}

fn put(rtc: &Rtc, address: u8, value: u8) {
    rtc.write(0, &[address]);
    rtc.write(1, &[value]);
}

fn all(rtc: &Rtc) -> [u8; 8] {
    [CENTURY, YEAR, MONTH, DAY_OF_MONTH, DAY_OF_WEEK, HOURS, MINUTES, SECONDS].map(|at| get(rtc, at))
}

#[test]
fn the_time_is_utc_in_bcd_and_24_hours_at_power_on() {
    let rtc = rig(RamSize::default());
    assert_eq!(all(&rtc), [0x20, 0x23, 0x12, 0x30, 7, 0x21, 0x58, 0x07]);
    assert_eq!(get(&rtc, REGISTER_B), H24);
    assert_eq!(get(&rtc, REGISTER_D), VRT);
    NOW.set(NOW.get() + Duration::from_secs(2 * 86_400));
    assert_eq!(all(&rtc)[..4], [0x20, 0x24, 0x01, 0x01]);
}

#[test]
fn the_guest_may_choose_binary_and_12_hours() {
    let rtc = rig(RamSize::default());
    put(&rtc, REGISTER_B, DM);
    assert_eq!(all(&rtc), [20, 23, 12, 30, 7, PM | 9, 58, 7]);
    for (hour, shown) in [(0, 12), (11, 11), (12, PM | 12), (23, PM | 11)] {
        put(&rtc, HOURS, shown);
        put(&rtc, REGISTER_B, DM | H24);
        assert_eq!(get(&rtc, HOURS), hour, "{shown:#x}");
        put(&rtc, REGISTER_B, DM);
        assert_eq!(get(&rtc, HOURS), shown);
    }
}

#[test]
fn setting_the_clock_as_linux_does_moves_it_and_it_runs_on_from_there() {
    let rtc = rig(RamSize::default());
    put(&rtc, REGISTER_B, H24 | SET);
    put(&rtc, REGISTER_A, 0x70); // Linux resets the divider while it writes
    for (at, value) in
        [(YEAR, 0x31), (MONTH, 0x02), (DAY_OF_MONTH, 0x28), (HOURS, 0x23), (MINUTES, 0x59), (SECONDS, 0x58)]
    {
        put(&rtc, at, value);
    }
    NOW.set(NOW.get() + Duration::from_secs(100));
    assert_eq!(get(&rtc, SECONDS), 0x58, "it stands while SET is on");
    put(&rtc, REGISTER_B, H24);
    put(&rtc, REGISTER_A, 0x26);
    NOW.set(NOW.get() + Duration::from_secs(3));
    assert_eq!(all(&rtc), [0x20, 0x31, 0x03, 0x01, 7, 0x00, 0x00, 0x01]);
}

#[test]
fn an_update_is_announced_only_in_the_last_244_microseconds_of_a_second() {
    let rtc = rig(RamSize::default());
    for (micros, uip) in [(0, 0), (500_000, 0), (999_755, 0), (999_756, UIP), (999_999, UIP)] {
        NOW.set(Duration::from_secs(SATURDAY) + Duration::from_micros(micros));
        assert_eq!(get(&rtc, REGISTER_A) & UIP, uip, "at {micros} µs");
    }
    put(&rtc, REGISTER_B, SET | H24);
    assert_eq!(get(&rtc, REGISTER_A) & UIP, 0, "none comes while the guest sets the clock");
}

#[test]
fn cmos_tells_the_ram_size_as_a_bios_leaves_it() {
    let rtc = rig(RamSize { below_4g: 3 << 30, above_4g: 5 << 30 });
    let word = |low: u8| u64::from(get(&rtc, low)) | u64::from(get(&rtc, low + 1)) << 8;
    assert_eq!(word(0x15), 640);
    assert_eq!(word(0x17), 0xffff, "64 MiB and more");
    assert_eq!(word(0x30), 0xffff);
    assert_eq!(word(0x34) << 16, (3 << 30) - (16 << 20));
    assert_eq!((word(0x5b) | u64::from(get(&rtc, 0x5d)) << 16) << 16, 5 << 30);
    let small = rig(RamSize { below_4g: 16 << 20, above_4g: 0 });
    assert_eq!(get(&small, 0x30), 0x00);
    assert_eq!(get(&small, 0x31), 0x3c, "15 MiB in KiB");
}

#[test]
fn the_alarm_and_free_bytes_are_stored_and_fixed_registers_are_not() {
    let rtc = rig(RamSize::default());
    for at in [0x01, 0x03, 0x05, 0x0f, 0x7f] {
        put(&rtc, at, 0xa5);
        assert_eq!(get(&rtc, at), 0xa5, "{at:#x}");
    }
    assert_eq!(get(&rtc, 0x7f | 0x80), 0xa5, "bit 7 of the index masks NMIs only");
    put(&rtc, REGISTER_C, 0xff);
    put(&rtc, REGISTER_D, 0);
    assert_eq!((get(&rtc, REGISTER_C), get(&rtc, REGISTER_D)), (0, VRT));
}

#[test]
fn a_set_clock_survives_save_and_restore_and_a_machine_reset() {
    let (old, new) = (rig(RamSize::default()), rig(RamSize::default()));
    put(&old, YEAR, 0x40);
    put(&old, 0x0f, 0x0a);
    put(&old, REGISTER_B, H24 | SET);
    put(&old, MINUTES, 0x11);
    let state = old.save().expect("it saves");
    new.restore(&state).expect("it restores");
    assert_eq!(new.save().expect("it saves"), state);
    assert_eq!((get(&new, YEAR), get(&new, MINUTES)), (0x40, 0x11));
    new.reset().expect("it resets");
    assert_eq!((get(&new, YEAR), get(&new, MINUTES), get(&new, 0x0f)), (0x40, 0x11, 0x0a), "battery-backed");
    assert_eq!(get(&new, REGISTER_B), H24);
}

#[test]
fn states_that_cannot_be_are_refused() {
    let rtc = rig(RamSize::default());
    let state = rtc.save().expect("it saves");
    let year = serde_json::json!({"year": 65535, "month": 1, "day": 1, "hour": 0, "minute": 0, "second": 0});
    for (key, value) in [("cmos", serde_json::json!([1, 2])), ("held", year)] {
        let mut bad = state.clone();
        bad.data[key] = value;
        assert!(matches!(rtc.restore(&bad), Err(Error::Invalid { .. })), "{key}");
    }
}

#[test]
fn any_access_of_any_size_and_any_bytes_is_harmless() {
    let rtc = rig(RamSize { below_4g: u64::MAX, above_4g: u64::MAX });
    for value in 0..=255u8 {
        for address in 0..=255 {
            put(&rtc, address, value);
            get(&rtc, address);
        }
    }
    for offset in [0, 1, 2, u64::MAX] {
        for len in [0, 1, 2, 4, 8, 64] {
            rtc.read(offset, &mut vec![0; len]);
            rtc.write(offset, &vec![0xff; len]);
        }
    }
}
