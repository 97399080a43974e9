use std::sync::Arc;
use std::sync::mpsc::channel;

use devices::bus::{BusDevice, Deferred, Range};

use super::*;

/// A processor that plays exits and notes what it is entered with.
struct Script {
    exits: std::vec::IntoIter<VmExit>,
    entries: Vec<VmEntry>,
    interrupted: bool,
}

impl Script {
    fn new(exits: Vec<VmExit>) -> Self {
        Self { exits: exits.into_iter(), entries: Vec::new(), interrupted: false }
    }
}

impl Processor for Script {
    fn enter(&mut self, entry: VmEntry) -> VmExit {
        self.entries.push(entry);
        if std::mem::take(&mut self.interrupted) {
            return VmExit::Interrupted;
        }
        self.exits.next().unwrap_or(VmExit::Halted)
    }

    fn interrupt(&mut self) {
        self.interrupted = true;
    }
}

struct Device;

impl BusDevice for Device {
    fn read(&self, offset: u64, data: &mut [u8]) -> Outcome {
        if offset == 7 {
            let token = Deferred::default();
            token.complete(&[0xd, 0xe]);
            return Outcome::Deferred(token);
        }
        data.fill(offset as u8);
        Outcome::Done
    }

    fn write(&self, offset: u64, _data: &[u8]) -> Outcome {
        if offset == 1 { Outcome::Act(Action::PowerOff) } else { Outcome::Done }
    }
}

fn play(exits: Vec<VmExit>) -> (Script, Vec<Event>) {
    let mut buses = Buses::default();
    buses.port.insert(Range { base: 0x10, len: 8 }, Arc::new(Device)).expect("free");
    buses.mmio.insert(Range { base: 0x1000, len: 8 }, Arc::new(Device)).expect("free");
    let mut script = Script::new(exits);
    let gang = Gang::new(0);
    gang.resume();
    let (events, received) = channel();
    run(3, &mut script, &buses, &gang, &events, &AtomicU64::new(0));
    drop(events);
    (script, received.iter().collect())
}

#[test]
fn reads_are_answered_from_their_bus() {
    let (script, events) = play(vec![
        VmExit::PortRead { port: 0x12, size: 2 },
        VmExit::MmioRead { address: 0x1004, size: 4 },
        VmExit::MmioRead { address: 0x9000, size: 1 },
    ]);
    let expected = [
        VmEntry::Continue,
        VmEntry::Read(Data::new(&[2, 2], 2)),
        VmEntry::Read(Data::new(&[4; 4], 4)),
        VmEntry::Read(Data::new(&[0xff], 1)),
    ];
    assert_eq!(script.entries, expected);
    assert_eq!(events, [Event::Failed(3, "It halted for ever".into())]);
}

#[test]
fn a_deferred_read_is_answered_with_what_completes_it_padded_with_zeros() {
    let (script, _) = play(vec![VmExit::PortRead { port: 0x17, size: 1 }]);
    assert_eq!(script.entries[1], VmEntry::Read(Data::new(&[0xd], 1)));
}

#[test]
fn an_action_is_reported_once_and_its_access_finished_before_the_vcpu_stops() {
    let write = VmExit::MmioWrite { address: 0x1001, data: Data::new(&[0], 1) };
    let (script, events) = play(vec![write, VmExit::TripleFault]);
    assert_eq!(events, [Event::Action(Action::PowerOff)]);
    assert_eq!(script.entries.len(), 2, "entered once more, to finish the access");
    assert_eq!(script.exits.len(), 1, "no guest code ran after the action");
}

#[test]
fn a_triple_fault_and_a_failure_stop_the_vcpu() {
    assert_eq!(play(vec![VmExit::TripleFault]).1, [Event::TripleFault(3)]);
    assert_eq!(play(vec![VmExit::Failed("x".into())]).1, [Event::Failed(3, "x".into())]);
}
