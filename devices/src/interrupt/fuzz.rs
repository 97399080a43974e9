//! The entry point for fuzzers.

use super::chipset::Chipset;
use super::io_apic;
use super::local::{Event, Lint, Window};
use super::{ApicId, LocalApic, Message, Now, Tsc, route};
use crate::irq::MsiMessage;
use crate::lifecycle::DeviceState;

/// Interrupt controllers of two processors. Each 8 bytes are an event: what, how long it waits, where, a value.
///
/// # Panics
/// An event makes more messages than there are pins, or the state does not survive being saved: both are bugs.
pub fn fuzz_interrupts(data: &[u8]) {
    run(Chipset::default(), [LocalApic::new(ApicId(0), true), LocalApic::new(ApicId(1), false)], data);
}

fn run(mut chipset: Chipset, mut apics: [LocalApic; 2], data: &[u8]) {
    const PORTS: [u64; 11] = [0x20, 0x21, 0xa0, 0xa1, 0x4d0, 0x4d1, 0x40, 0x42, 0x43, 0x61, 0x41];
    let mut now = Now::default();
    for event in data.chunks_exact(8).take(4096) {
        let at = u16::from_le_bytes([event[2], event[3]]);
        let value = u32::from_le_bytes([event[4], event[5], event[6], event[7]]);
        now.nanos = now.nanos.after(u64::from(event[1]) << (event[1] & 31));
        now.tsc = Tsc(now.nanos.0.saturating_mul(3));
        let apic = &mut apics[usize::from(event[0] >> 7)];
        let mut messages: Vec<Message> = Vec::new();
        let mut raised = chipset.advance(now.nanos);
        match event[0] & 7 {
            0 => {
                let effects = apic.write(u64::from(at), &value.to_le_bytes(), now);
                messages.extend(effects.message);
                if let Some(vector) = effects.eoi {
                    raised.extend(chipset.io_apic().end_of_interrupt(vector));
                }
            }
            1 => apic.read(u64::from(at), &mut [0; 8][..usize::from(event[4] & 7)], now),
            2 => raised.extend(chipset.io_apic().write(u64::from(at & 0x50), &value.to_le_bytes())),
            3 => drop(chipset.write_port(PORTS[usize::from(at) % PORTS.len()], event[4], now.nanos)),
            4 => drop(chipset.read_port(PORTS[usize::from(at) % PORTS.len()], now.nanos)),
            5 => raised.extend(chipset.set_line(event[2], value & 1 != 0)),
            6 => match apic.take(Window { interrupts: value & 1 == 0, nmi: value & 2 == 0 }) {
                Some(Event::External) => drop(chipset.acknowledge()),
                _ => apic.set_tsc_deadline(Tsc(value.into()), now),
            },
            _ => {
                let address = 0xfee0_0000 | u64::from(at) << 2;
                messages.extend(Message::from_msi(MsiMessage { address, data: value }));
            }
        }
        assert!(raised.len() <= 2 * io_apic::PINS, "an event raised {} interrupts", raised.len());
        for (pin, message) in raised
            .into_iter()
            .map(|raised| (Some(raised.pin), raised.message))
            .chain(messages.into_iter().map(|message| (None, message)))
        {
            let targets = route(&message, &apics.each_ref().map(LocalApic::view));
            let accepted = targets
                .iter()
                .filter(|id| apics.iter_mut().any(|apic| apic.id() == *id && apic.accept(&message)))
                .count();
            if let (0, Some(pin)) = (accepted, pin) {
                chipset.io_apic().refused(pin);
            }
        }
        apics[0].set_lint(Lint::Lint0, chipset.intr());
    }
    let state = DeviceState::of("interrupts", 1, &(&chipset, &apics)).expect("it is plain data");
    assert_eq!(state.value::<(Chipset, [LocalApic; 2])>("interrupts", 1).ok(), Some((chipset, apics)));
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;

    /// The numbers of `value`, and whether things are.
    fn leaves<'a>(value: &'a mut Value, found: &mut Vec<&'a mut Value>) {
        match value {
            Value::Array(items) => items.iter_mut().for_each(|item| leaves(item, found)),
            Value::Object(fields) => fields.values_mut().for_each(|item| leaves(item, found)),
            Value::Number(_) | Value::Bool(_) => found.push(value),
            Value::Null | Value::String(_) => {}
        }
    }

    fn event() -> impl Strategy<Value = Vec<u8>> {
        let at = prop_oneof![any::<u16>(), (0..0x40u16).prop_map(|register| register << 4)];
        (any::<u8>(), 0..32u8, at, any::<u32>()).prop_map(|(what, wait, at, value)| {
            [&[what, wait][..], &at.to_le_bytes(), &value.to_le_bytes()].concat()
        })
    }

    proptest! {
        /// A member may send any state that has the right shape.
        #[test]
        fn a_state_that_no_guest_could_have_made_does_no_harm(
            forged in proptest::collection::vec((any::<prop::sample::Index>(), 0..12usize), 1..40),
            timer in any::<[u32; 6]>(),
            events in proptest::collection::vec(event(), 0..60),
        ) {
            let mut apic = LocalApic::new(ApicId(0), true);
            let mut chipset = Chipset::default();
            let _ = apic.write(0xf0, &0x1ff_u32.to_le_bytes(), Now::default());
            for (register, value) in [0x320, 0x3e0, 0x380, 0x350, 0x80, 0xe0].into_iter().zip(timer) {
                let _ = apic.write(register, &value.to_le_bytes(), Now::default());
            }
            for counter in [0_u8, 2] {
                let count = timer[usize::from(counter)].to_le_bytes();
                let mode = count[2] & 0x0f;
                chipset.write_port(0x43, counter << 6 | 0x30 | mode, Now::default().nanos);
                for byte in &count[..2] {
                    chipset.write_port(0x40 + u64::from(counter), *byte, Now::default().nanos);
                }
            }
            let mut state = serde_json::to_value((&chipset, [&apic, &apic])).expect("plain data");
            for (which, value) in forged {
                let whole = state.clone();
                let mut found = Vec::new();
                leaves(&mut state, &mut found);
                let numbers = [0, 1, 3, 7, 8, 127, 255, 0xffff, 0x8000_0000, 0xffff_ffff, u64::MAX - 1, u64::MAX];
                let leaf = which.get_mut(&mut found);
                **leaf = if leaf.is_boolean() { Value::Bool(value % 2 == 0) } else { numbers[value].into() };
                if serde_json::from_value::<(Chipset, [LocalApic; 2])>(state.clone()).is_err() {
                    state = whole; // too large for where it stands
                }
            }
            let (chipset, apics) = serde_json::from_value(state).expect("every step could be read");
            run(chipset, apics, &events.concat());
        }
    }
}
