//! The loop of one vCPU.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Sender;

use devices::bus::{Action, Bus, Outcome};

use super::{Data, Gang, VmEntry, VmExit};

/// Something that runs guest code until it needs an answer.
pub trait Processor {
    /// Gives the answer to the last exit and runs on until the next.
    fn enter(&mut self, entry: VmEntry) -> VmExit;
    /// Makes the next [`enter`](Self::enter) finish the access that it answers and then return
    /// [`VmExit::Interrupted`] without running guest code.
    fn interrupt(&mut self);
}

/// The address spaces that exits are answered from.
#[derive(Default)]
pub struct Buses {
    /// I/O ports.
    pub port: Bus,
    /// Memory-mapped I/O.
    pub mmio: Bus,
}

/// What a vCPU tells the machine; the vCPU and all others are then on their way to a pause.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A device wants something done.
    Action(Action),
    /// A triple fault on this vCPU.
    TripleFault(u8),
    /// This vCPU cannot go on; why, in words.
    Failed(u8, String),
}

/// Runs a vCPU until the gang pauses or ends, counting its `exits`. At return every access of the vCPU is finished, so that its
/// state is whole.
pub fn run(
    index: u8,
    cpu: &mut dyn Processor,
    buses: &Buses,
    gang: &Gang,
    events: &Sender<Event>,
    exits: &AtomicU64,
) {
    let raise = |event| {
        gang.request_pause();
        // Nobody listens any more only when the machine is being taken down.
        let _ = events.send(event);
    };
    let mut entry = VmEntry::Continue;
    loop {
        exits.fetch_add(1, Ordering::Relaxed);
        let (outcome, mut data) = match cpu.enter(entry) {
            VmExit::PortRead { port, size } => read(&buses.port, port.into(), size),
            VmExit::PortWrite { port, data } => (buses.port.write(port.into(), data.as_slice()), data),
            VmExit::MmioRead { address, size } => read(&buses.mmio, address, size),
            VmExit::MmioWrite { address, data } => (buses.mmio.write(address, data.as_slice()), data),
            VmExit::Interrupted if gang.may_run() => (Outcome::Done, Data::zeroed(0)),
            VmExit::Interrupted => return,
            VmExit::TripleFault => return raise(Event::TripleFault(index)),
            VmExit::Halted => return raise(Event::Failed(index, "It halted for ever".into())),
            VmExit::Failed(why) => return raise(Event::Failed(index, why)),
        };
        match outcome {
            Outcome::Done => {}
            Outcome::Act(action) => raise(Event::Action(action)),
            Outcome::Deferred(token) => match gang.hold(&token) {
                Some(answer) => data = Data::new(&answer, data.as_slice().len()),
                None => return,
            },
        }
        if !gang.may_run() {
            cpu.interrupt();
        }
        entry = VmEntry::Read(data);
    }
}

fn read(bus: &Bus, address: u64, size: u8) -> (Outcome, Data) {
    let mut data = Data::zeroed(size.into());
    let outcome = bus.read(address, data.as_mut_slice());
    (outcome, data)
}

#[cfg(test)]
#[path = "run_test.rs"]
mod tests;
