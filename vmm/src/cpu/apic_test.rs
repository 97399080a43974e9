use std::sync::Mutex;
use std::time::{Duration, Instant};

use devices::interrupt::{Delivery, Destination, Message, Trigger};

use super::*;
use crate::cpu::Kick;

/// A core that plays exits and notes what happens to it.
#[derive(Default)]
struct Script {
    exits: std::collections::VecDeque<VmExit>,
    log: Vec<String>,
    ready: bool,
    interrupted: bool,
    cr8: u8,
    /// What the guest writes to CR8 before its next exits.
    writes_cr8: std::collections::VecDeque<u8>,
}

impl Processor for Script {
    fn enter(&mut self, entry: VmEntry) -> VmExit {
        if let VmEntry::Read(data) = entry {
            self.log.push(format!("read {data:?}"));
        }
        if std::mem::take(&mut self.interrupted) {
            self.log.push("finished".into());
            return VmExit::Interrupted;
        }
        self.log.push("ran".into());
        self.cr8 = self.writes_cr8.pop_front().unwrap_or(self.cr8);
        self.exits.pop_front().unwrap_or(VmExit::TripleFault)
    }
    fn interrupt(&mut self) {
        self.interrupted = true;
    }
}

impl Core for Script {
    type Attached = ();
    fn attach(&mut self) {}
    fn kick(&self) -> Kick {
        Box::new(|| {})
    }
    fn set_alarm(&mut self, after: Option<Duration>) {
        self.log.push(format!("alarm {}", after.is_some()));
    }
    fn ready(&self) -> bool {
        self.ready
    }
    fn inject(&mut self, vector: u8) -> Result<(), String> {
        self.log.push(format!("inject {vector:#x}"));
        self.ready = false;
        Ok(())
    }
    fn inject_nmi(&mut self) -> Result<(), String> {
        self.log.push("nmi".into());
        Ok(())
    }
    fn request_window(&mut self, wanted: bool) {
        if wanted {
            self.log.push("window".into());
        }
    }
    fn cr8(&self) -> u8 {
        self.cr8
    }
    fn set_cr8(&mut self, value: u8) {
        self.cr8 = value;
    }
    fn apic_base(&self) -> u64 {
        0xfee0_0900
    }
    fn init(&mut self) -> Result<(), String> {
        self.log.push("init".into());
        Ok(())
    }
    fn start_up(&mut self, vector: u8) -> Result<(), String> {
        self.log.push(format!("start {vector:#x}"));
        Ok(())
    }
}

/// Notes what an APIC tells others.
#[derive(Default)]
struct Ear(Mutex<Vec<String>>);

impl Fabric for Ear {
    fn send(&self, message: Message) {
        self.0.lock().expect("no panic").push(format!("send {:#x} {:?}", message.vector, message.delivery));
    }
    fn end_of_interrupt(&self, vector: u8) {
        self.0.lock().expect("no panic").push(format!("eoi {vector:#x}"));
    }
    fn view(&self, view: View) {
        self.0.lock().expect("no panic").push(format!("view enabled {}", view.enabled));
    }
    fn refused(&self, vector: u8) {
        self.0.lock().expect("no panic").push(format!("refused {vector:#x}"));
    }
    fn acknowledge(&self) -> Option<u8> {
        Some(0x77)
    }
}

fn cpu(bootstrap: bool, exits: Vec<VmExit>) -> (ApicCpu<Script>, Arc<Ear>) {
    let ear = Arc::new(Ear::default());
    let script = Script { exits: exits.into(), ready: true, ..Script::default() };
    let clock = Arc::new(Clock::saying(Nanos(0)));
    let mut cpu = ApicCpu::new(
        script,
        ApicId(0),
        bootstrap,
        Arc::default(),
        Arc::clone(&ear) as Arc<dyn Fabric>,
        clock,
    );
    cpu.attach();
    (cpu, ear)
}

fn write(offset: u64, value: u32) -> VmExit {
    VmExit::MmioWrite { address: 0xfee0_0000 + offset, data: Data::new(&value.to_le_bytes(), 4) }
}

fn message(delivery: Delivery, vector: u8, trigger: Trigger) -> Message {
    let destination = Destination::Physical(ApicId(0));
    Message { destination, delivery, vector, trigger, asserted: true }
}

#[test]
fn accesses_to_the_apic_stay_inside_and_what_they_do_goes_out() {
    let version = VmExit::MmioRead { address: 0xfee0_0030, size: 4 };
    let other = VmExit::MmioRead { address: 0xfec0_0000, size: 4 };
    let (mut cpu, ear) = cpu(true, vec![write(0xf0, 0x1ff), version, write(0x300, 0x4_4041), other.clone()]);
    assert_eq!(cpu.enter(VmEntry::Continue), other);
    assert!(cpu.core().log.contains(&"read [14, 00, 05, 00]".to_owned()), "{:?}", cpu.core().log);
    assert_eq!(*ear.0.lock().expect("no panic"), ["view enabled true", "send 0x41 Fixed"]);
}

#[test]
fn an_access_is_finished_before_an_interrupt_an_init_or_a_stop() {
    let read = VmExit::PortRead { port: 0x10, size: 1 };
    let (mut cpu, _) = cpu(true, vec![read.clone(), read.clone(), read.clone()]);
    cpu.set_virtual_wire();
    let answer = VmEntry::Read(Data::new(&[7], 1));
    assert_eq!(cpu.enter(VmEntry::Continue), read);
    cpu.inbox().post(&message(Delivery::Fixed, 0x41, Trigger::Edge));
    assert_eq!(cpu.enter(answer), read);
    cpu.inbox().post(&message(Delivery::Init, 0, Trigger::Edge));
    assert_eq!(cpu.enter(answer), read);
    cpu.interrupt();
    assert_eq!(cpu.enter(answer), VmExit::Interrupted);
    let finished = ["read [07]", "finished"];
    let expected: Vec<_> =
        [&["ran"][..], &finished, &["inject 0x41", "ran"], &finished, &["init", "ran"], &finished].concat();
    assert_eq!(cpu.core().log, expected);
}

#[test]
fn a_halted_vcpu_sleeps_until_its_timer_an_interrupt_or_a_kick() {
    let timer = [write(0xf0, 0x1ff), write(0x3e0, 0xb), write(0x320, 0x51), write(0x380, 20_000_000)];
    let halt = [VmExit::Halted, VmExit::TripleFault];
    let (mut cpu, _) = cpu(true, timer.into_iter().chain(halt.clone()).collect());
    let begun = Instant::now();
    assert_eq!(cpu.enter(VmEntry::Continue), VmExit::TripleFault);
    assert!(begun.elapsed() >= Duration::from_millis(20), "before the timer");
    assert!(cpu.core().log.contains(&"inject 0x51".to_owned()), "{:?}", cpu.core().log);

    cpu.core.exits = halt.into();
    let inbox = Arc::clone(cpu.inbox());
    let other = std::thread::spawn(move || inbox.post(&message(Delivery::Nmi, 0, Trigger::Edge)));
    assert_eq!(cpu.enter(VmEntry::Continue), VmExit::TripleFault);
    other.join().expect("it ends");

    cpu.core.exits = [VmExit::Halted].into();
    let inbox = Arc::clone(cpu.inbox());
    let other = std::thread::spawn(move || {
        while Arc::strong_count(&inbox) > 1 {
            inbox.kick();
            std::thread::yield_now();
        }
    });
    while !cpu.state().halted {
        assert_eq!(cpu.enter(VmEntry::Continue), VmExit::Interrupted);
    }
    assert_eq!(cpu.enter(VmEntry::Continue), VmExit::Interrupted, "it sleeps on");
    drop(cpu);
    other.join().expect("it ends");
}

#[test]
fn a_vcpu_that_waits_for_its_start_runs_from_the_sipi_s_page_and_its_state_is_a_value() {
    let (mut cpu, _) = cpu(false, vec![]);
    cpu.inbox().kick();
    assert_eq!(cpu.enter(VmEntry::Continue), VmExit::Interrupted);
    assert!(cpu.core().log.is_empty(), "it ran before its start");
    cpu.inbox().post(&message(Delivery::StartUp, 0x9a, Trigger::Edge));
    // What has arrived belongs to the state.
    let text = serde_json::to_string(&cpu.state()).expect("a value");
    cpu.restore(&serde_json::from_str(&text).expect("a state"));
    assert_eq!(cpu.enter(VmEntry::Continue), VmExit::TripleFault);
    assert_eq!(cpu.core().log, ["start 0x9a", "ran"]);
}

#[test]
fn a_level_is_ended_towards_the_io_apic_and_the_pic_is_asked_for_its_vector() {
    let (mut cpu, ear) = cpu(true, vec![write(0xb0, 0), VmExit::Interrupted]);
    cpu.set_virtual_wire();
    cpu.inbox().post(&message(Delivery::Fixed, 0x61, Trigger::Level));
    assert_eq!(cpu.enter(VmEntry::Continue), VmExit::TripleFault);
    cpu.inbox().set_lint0(true);
    (cpu.core.ready, cpu.core.exits) = (true, [VmExit::TripleFault].into());
    assert_eq!(cpu.enter(VmEntry::Continue), VmExit::TripleFault);
    assert_eq!(ear.0.lock().expect("no panic").last().map(String::as_str), Some("eoi 0x61"));
    assert!(cpu.core().log.contains(&"inject 0x77".to_owned()), "{:?}", cpu.core().log);
    assert!(cpu.core().log.contains(&"window".to_owned()), "the pin is still high: {:?}", cpu.core().log);
}

#[test]
fn cr8_holds_interrupts_of_its_class_and_below_back_until_it_is_lowered() {
    let (mut cpu, _) = cpu(true, vec![VmExit::TripleFault]);
    cpu.set_virtual_wire();
    cpu.core.writes_cr8 = [8].into();
    assert_eq!(cpu.enter(VmEntry::Continue), VmExit::TripleFault);
    cpu.inbox().post(&message(Delivery::Fixed, 0x81, Trigger::Edge));
    cpu.inbox().post(&message(Delivery::Fixed, 0x91, Trigger::Edge));
    (cpu.core.exits, cpu.core.log) = ([write(0xb0, 0), VmExit::TripleFault].into(), vec![]);
    assert_eq!(cpu.enter(VmEntry::Continue), VmExit::TripleFault);
    assert_eq!(cpu.core.log, ["inject 0x91", "ran", "ran"], "the other is not above CR8");
    assert_eq!(cpu.core.cr8, 8, "what the guest wrote stays");
    (cpu.core.exits, cpu.core.log) = ([VmExit::Interrupted, VmExit::TripleFault].into(), vec![]);
    (cpu.core.ready, cpu.core.writes_cr8) = (true, [7].into());
    assert_eq!(cpu.enter(VmEntry::Continue), VmExit::TripleFault);
    assert_eq!(cpu.core.log, ["ran", "inject 0x81", "ran"]);
}
