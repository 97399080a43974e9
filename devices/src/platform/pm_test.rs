//! Against ACPI 6.5, section 4.8.3.

use super::*;

/// The levels that the line was set to.
#[derive(Default)]
struct Line(Mutex<Vec<bool>>);

impl InterruptLine for Line {
    fn set(&self, high: bool) -> io::Result<()> {
        lock(&self.0).push(high);
        Ok(())
    }
}

fn rig() -> (Pm, Arc<Line>) {
    let line = Arc::new(Line::default());
    let sci: Arc<dyn InterruptLine> = Arc::clone(&line) as _;
    (Pm::new(sci), line)
}

fn read16(pm: &Pm, offset: u64) -> u16 {
    let mut data = [0; 2];
    pm.read(offset, &mut data);
    u16::from_le_bytes(data)
}

fn timer(pm: &Pm) -> u32 {
    let mut data = [0; 4];
    pm.read(TIMER, &mut data);
    u32::from_le_bytes(data)
}

fn write16(pm: &Pm, offset: u64, value: u16) -> Outcome {
    pm.write(offset, &value.to_le_bytes())
}

fn levels(line: &Line) -> Vec<bool> {
    std::mem::take(&mut lock(&line.0))
}

#[test]
fn the_power_button_raises_the_sci_until_its_status_is_cleared() {
    let (pm, line) = rig();
    write16(&pm, ENABLE, PWRBTN);
    assert!(pm.press_power_button().expect("it presses"));
    assert_eq!(read16(&pm, STATUS), PWRBTN);
    assert_eq!(levels(&line), [true]);
    write16(&pm, STATUS, TMR);
    assert_eq!(read16(&pm, STATUS), PWRBTN, "a written zero keeps a status bit");
    write16(&pm, STATUS, PWRBTN);
    assert_eq!(read16(&pm, STATUS), 0);
    assert_eq!(levels(&line), [false]);
}

#[test]
fn a_press_that_no_guest_listens_to_is_kept_and_said_so() {
    let (pm, line) = rig();
    assert!(!pm.press_power_button().expect("it presses"));
    assert_eq!(levels(&line), [] as [bool; 0]);
    write16(&pm, ENABLE, PWRBTN);
    assert_eq!(levels(&line), [true], "enabling a pending event raises the line");
}

#[test]
fn sleep_type_s5_with_sleep_enable_powers_off_and_nothing_else_does() {
    let (pm, _) = rig();
    let s5 = u16::from(ports::SLEEP_TYPE_S5) << SLP_TYP_SHIFT;
    assert!(matches!(write16(&pm, CONTROL, s5), Outcome::Done), "the type alone");
    assert!(matches!(write16(&pm, CONTROL, SLP_EN | 1 << SLP_TYP_SHIFT), Outcome::Done), "S1");
    assert!(matches!(write16(&pm, CONTROL, s5 | SLP_EN), Outcome::Act(Action::PowerOff)));
    assert_eq!(read16(&pm, CONTROL) & SLP_EN, 0, "SLP_EN is write-only");
    // By bytes, as the ISA bus may split it.
    assert!(matches!(
        pm.write(CONTROL + 1, &[(s5 | SLP_EN).to_le_bytes()[1]]),
        Outcome::Act(Action::PowerOff)
    ));
}

#[test]
fn acpi_mode_is_always_on() {
    let (pm, _) = rig();
    assert_eq!(read16(&pm, CONTROL), SCI_EN);
    write16(&pm, CONTROL, 0);
    assert_eq!(read16(&pm, CONTROL), SCI_EN);
}

#[test]
fn the_timer_counts_at_3_579545_mhz() {
    let (pm, _) = rig();
    // The readings are taken inside [before, after], and outside [least]: two bounds that hold however
    // long the thread is kept waiting.
    let before = Instant::now();
    let first = timer(&pm);
    let inner = Instant::now();
    std::thread::sleep(Duration::from_millis(20));
    let least = inner.elapsed();
    let ticks = timer(&pm).wrapping_sub(first);
    let most = before.elapsed();
    let at = |time: Duration| time.as_secs_f64() * f64::from(TIMER_HZ);
    let ticks = f64::from(ticks);
    assert!(at(least) - 1.0 <= ticks && ticks <= at(most) + 1.0, "{ticks} in {least:?} to {most:?}");
}

#[test]
fn the_timers_top_bit_sets_its_status_each_time_it_changes() {
    let zero = Instant::now();
    let mut state = State::initial(zero);
    let half = Duration::from_secs_f64(f64::from(1u32 << 31) / f64::from(TIMER_HZ));
    state.note_timer(zero + half - Duration::from_millis(1));
    assert_eq!(state.status, 0);
    for half_turns in 1..4 {
        state.note_timer(zero + half * half_turns + Duration::from_millis(1));
        assert_eq!(state.status, TMR, "after {half_turns} half turns");
        state.status = 0;
    }
}

#[test]
fn the_timer_stands_still_while_the_machine_is_stopped() {
    let (pm, _) = rig();
    pm.stop().expect("it stops");
    let stopped = timer(&pm);
    std::thread::sleep(Duration::from_millis(5));
    assert_eq!(timer(&pm), stopped);
    pm.start().expect("it starts");
    let first = timer(&pm).wrapping_sub(stopped);
    assert!(first < TIMER_HZ, "it goes on from where it stood: {first}");
    std::thread::sleep(Duration::from_millis(5));
    assert!(timer(&pm).wrapping_sub(stopped) >= TIMER_HZ / 200);
}

#[test]
fn a_pending_event_and_the_timer_survive_save_and_restore_into_a_stopped_machine() {
    let ((old, _), (new, line)) = (rig(), rig());
    write16(&old, ENABLE, PWRBTN);
    old.press_power_button().expect("it presses");
    old.stop().expect("it stops");
    let state = old.save().expect("it saves");
    new.stop().expect("it stops");
    new.restore(&state).expect("it restores");
    assert_eq!(new.save().expect("it saves"), state);
    assert_eq!(timer(&new), timer(&old));
    assert_eq!(levels(&line), [] as [bool; 0], "no interrupt while stopped");
    new.start().expect("it starts");
    assert_eq!(levels(&line), [true]);
    new.reset().expect("it resets");
    assert_eq!(levels(&line), [false]);
    assert_eq!((read16(&new, STATUS), read16(&new, ENABLE)), (0, 0));
}

#[test]
fn any_access_of_any_size_is_harmless() {
    let (pm, _) = rig();
    for offset in [0, 1, 2, 5, 8, 15, 16, u64::MAX] {
        for len in [0, 1, 2, 4, 8, 64] {
            let mut data = vec![0; len];
            pm.read(offset, &mut data);
            pm.write(offset, &vec![0xff; len]);
        }
    }
    let mut data = [0; 4];
    pm.read(14, &mut data);
    assert_eq!(data[2..], [0xff, 0xff], "beyond the end nobody answers");
}
