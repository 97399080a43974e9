//! Guests of a few instructions on `/dev/kvm`, with these interrupt controllers instead of the kernel's.

use std::sync::atomic::AtomicU64;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use devices::bus::{Action, BusDevice, Outcome, Range};
use devices::interrupt::{ApicId, LocalApic, Nanos};
use devices::irq::{InterruptController, MsiMessage};
use devices::lifecycle::Lifecycle;
use vm_memory::{Bytes as _, GuestAddress};

use super::*;
use crate::cpu::{self, ApicCpu, Buses, Clock, Event, Fabric, Gang, Inbox, Place, Switch};
use crate::kvm::{self, Controllers, Partition, install_kick_handler};
use crate::memory::{Backing, Layout, Ram};
use crate::units;

const LONG: Duration = Duration::from_secs(60);
/// Where all vCPUs begin, by reset or SIPI: goes to 32-bit protected mode, then to [`BOOTSTRAP`] or [`OTHERS`].
const START: u64 = 0x1000;
const BOOTSTRAP: u64 = 0x1200;
const OTHERS: u64 = 0x1400;
/// The interrupt table, and a page of code for each handler.
const TABLE: u64 = 0x3000;
const HANDLERS: u64 = 0x1_0000;

// The local APIC's registers.
const ID: u32 = 0xfee0_0020;
const TPR: u32 = 0xfee0_0080;
const EOI: u32 = 0xfee0_00b0;
const SPURIOUS: u32 = 0xfee0_00f0;
const ICR: u32 = 0xfee0_0300;
const ICR_HIGH: u32 = 0xfee0_0310;
const TIMER: u32 = 0xfee0_0320;
const INITIAL: u32 = 0xfee0_0380;
const DIVIDE: u32 = 0xfee0_03e0;

/// Machine code, put together.
#[derive(Clone, Default)]
struct Code(Vec<u8>);

impl Code {
    fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }
    /// mov dword [at], value
    fn set(self, at: u32, value: u32) -> Self {
        self.bytes(&[0xc7, 0x05]).bytes(&at.to_le_bytes()).bytes(&value.to_le_bytes())
    }
    /// inc dword [at]
    fn count(self, at: u32) -> Self {
        self.bytes(&[0xff, 0x05]).bytes(&at.to_le_bytes())
    }
    /// mov al, value; out 0x10, al
    fn say(self, value: u8) -> Self {
        self.bytes(&[0xb0, value, 0xe6, 0x10])
    }
    /// out 0x17, al: the end
    fn end(self) -> Self {
        self.bytes(&[0xe6, 0x17])
    }
    /// Enables the local APIC.
    fn enable(self) -> Self {
        self.set(SPURIOUS, 0x1ff)
    }
    /// Ends a handler: interrupts on, and halts for the next. (Not iret, which KVM's instruction interpreter does not
    /// know in protected mode: it starts on a fresh stack instead.)
    fn wait(self) -> Self {
        self.fresh_stack().bytes(&[0xfb, 0xf4, 0xeb, 0xfd]) // sti; hlt; jmp to the hlt
    }
    /// mov esp, ebp
    fn fresh_stack(self) -> Self {
        self.bytes(&[0x89, 0xec])
    }
    /// Goes on only if the dword at `at` is `value`; if not, `other` is run, which must not come back.
    fn only_if(self, at: u32, value: u32, other: &Self) -> Self {
        self.bytes(&[0x81, 0x3d])
            .bytes(&at.to_le_bytes())
            .bytes(&value.to_le_bytes()) // cmp dword [at], value
            .bytes(&[0x0f, 0x84])
            .bytes(&(other.0.len() as u32).to_le_bytes()) // je over it
            .bytes(&other.0)
    }
}

/// From real mode at 0x100:0 or 0:0x1000 to flat 32-bit protected mode, interrupt table and a stack of its own.
fn start() -> Vec<u8> {
    let mut code = vec![
        0x0f, 0x01, 0x16, 0xf8, 0x10, // lgdt [0x10f8]
        0x0f, 0x20, 0xc0, 0x0c, 0x01, 0x0f, 0x22, 0xc0, // cr0 |= 1
        0xea, 0x20, 0x10, 0x08, 0x00, // jmp 8:0x1020
    ];
    code.resize(0x20, 0x90);
    let flat = Code::default()
        .bytes(&[0xb8, 0x10, 0, 0, 0, 0x8e, 0xd8, 0x8e, 0xd0]) // mov eax, 0x10; mov ds, ax; mov ss, ax
        .bytes(&[0x0f, 0x01, 0x1d, 0x00, 0x11, 0, 0]) // lidt [0x1100]
        .bytes(&[0xa1])
        .bytes(&ID.to_le_bytes()) // mov eax, [ID]
        .bytes(&[0xc1, 0xe8, 12]) // shr eax, 12: the APIC's ID × 0x1000
        .bytes(&[0x8d, 0xa8, 0, 0x80, 0, 0, 0x89, 0xec]) // lea ebp, [eax + 0x8000]; mov esp, ebp
        .bytes(&[0x85, 0xc0]) // test eax, eax
        .bytes(&[0x0f, 0x84, 5, 0, 0, 0]); // jz over the next
    let after = START + code.len() as u64 + 0x20 - 0x20 + flat.0.len() as u64;
    let jump = |from: u64, to: u64| ((to as u32).wrapping_sub(from as u32 + 5)).to_le_bytes();
    let flat =
        flat.bytes(&[0xe9]).bytes(&jump(after, OTHERS)).bytes(&[0xe9]).bytes(&jump(after + 5, BOOTSTRAP));
    code.extend(flat.0);
    assert!(code.len() <= 0x80);
    code.resize(0x80, 0x90);
    for descriptor in [0_u64, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff] {
        code.extend(descriptor.to_le_bytes());
    }
    code.resize(0xf8, 0);
    code.extend([0x17, 0, 0x80, 0x10, 0, 0]);
    code.resize(0x100, 0);
    code.extend([0xff, 0x07]);
    code.extend((TABLE as u32).to_le_bytes());
    code
}

#[derive(Default)]
struct Recorder(Mutex<Vec<u8>>);

impl BusDevice for Recorder {
    fn read(&self, _: u64, data: &mut [u8]) -> Outcome {
        data.fill(0);
        Outcome::Done
    }
    fn write(&self, offset: u64, data: &[u8]) -> Outcome {
        self.0.lock().expect("no panic").extend(data);
        if offset == 7 { Outcome::Act(Action::PowerOff) } else { Outcome::Done }
    }
}

type Cpus = Vec<Arc<Mutex<ApicCpu<kvm::Vcpu>>>>;

struct Guest {
    board: Arc<Board>,
    ram: Ram,
    cpus: Cpus,
    gang: Arc<Gang>,
    recorder: Arc<Recorder>,
    events: Receiver<Event>,
    threads: Vec<JoinHandle<()>>,
}

impl Guest {
    /// A guest of `count` vCPUs: the first begins with `bootstrap`, others with `others` when they are started.
    /// `handlers` are for vectors. `None` where there is no KVM.
    fn new(count: u8, bootstrap: &Code, others: &Code, handlers: &[(u8, &Code)]) -> Option<Self> {
        install_kick_handler().expect("a signal handler");
        let layout = Layout::new(units::Bytes(2 << 20), 36).expect("it fits");
        let ram = Ram::new(&layout, Backing::Private).expect("RAM");
        let write = |bytes: &[u8], at: u64| ram.memory().write_slice(bytes, GuestAddress(at)).expect("RAM");
        write(&start(), START);
        write(&bootstrap.0, BOOTSTRAP);
        write(&others.0, OTHERS);
        for (vector, code) in handlers {
            let at = HANDLERS + u64::from(*vector) * 0x100;
            assert!(code.0.len() <= 0x100);
            write(&code.0, at);
            let gate = at & 0xffff | 8 << 16 | 0x8e00 << 32 | (at >> 16) << 48;
            write(&gate.to_le_bytes(), TABLE + 8 * u64::from(*vector));
        }
        let partition = match Partition::new(ram.memory().clone(), count, Controllers::Userspace) {
            Err(error @ kvm::Error::Open { .. }) => {
                eprintln!("cannot run: {error}");
                return None;
            }
            other => other.expect("a partition"),
        };
        let clock = Arc::new(Clock::saying(Nanos(0)));
        let board = Arc::new(Board::new(Arc::new(Switch::default()), clock).expect("a board"));
        let recorder = Arc::new(Recorder::default());
        let mut buses = Buses::default();
        buses.port.insert(Range { base: 0x10, len: 8 }, Arc::clone(&recorder) as _).expect("free");
        board.insert(&mut buses).expect("free");
        board.start().expect("it starts");
        let cpus: Cpus = (0..count).map(|index| vcpu(&partition, &board, index)).collect();
        let gang = Arc::new(Gang::new(count.into()));
        let inboxes: Vec<_> =
            cpus.iter().map(|cpu| Arc::clone(cpu.lock().expect("no panic").inbox())).collect();
        gang.set_kick(Box::new(move || inboxes.iter().for_each(|inbox| inbox.kick())));
        let (sender, events) = channel();
        let buses = Arc::new(buses);
        let threads = cpus.iter().enumerate().map(|(index, cpu)| {
            let (cpu, gang, buses, sender) =
                (Arc::clone(cpu), Arc::clone(&gang), Arc::clone(&buses), sender.clone());
            thread::spawn(move || {
                while gang.park() {
                    let mut cpu = cpu.lock().expect("no panic");
                    let _attached = cpu.attach();
                    cpu::run(index as u8, &mut *cpu, &buses, &gang, &sender, &AtomicU64::new(0));
                }
            })
        });
        let threads = threads.collect();
        Some(Self { board, ram, cpus, gang, recorder, events, threads })
    }

    fn word(&self, at: u32) -> u32 {
        self.ram.memory().read_obj(GuestAddress(at.into())).expect("RAM")
    }

    fn ends(&self) {
        let event = self.events.recv_timeout(LONG);
        assert_eq!(event, Ok(Event::Action(Action::PowerOff)), "counted {}", self.word(0x2000));
    }

    fn until(&self, what: &str, done: impl Fn() -> bool) {
        let end = Instant::now() + LONG;
        while !done() {
            let words = [self.word(0x2000), self.word(0x2004)];
            assert!(Instant::now() < end, "{what}: {words:?}, {:x?}", self.written());
            thread::sleep(Duration::from_millis(1));
        }
    }

    fn written(&self) -> Vec<u8> {
        self.recorder.0.lock().expect("no panic").clone()
    }
}

fn vcpu(partition: &Partition, board: &Arc<Board>, index: u8) -> Arc<Mutex<ApicCpu<kvm::Vcpu>>> {
    let (id, first, inbox) = (ApicId(index), index == 0, Arc::new(Inbox::default()));
    board.switch().put(LocalApic::new(id, first).view(), Place::Here(Arc::clone(&inbox)));
    let core = partition.vcpu(index).expect("a vCPU");
    if first {
        let mut sregs = core.fd().get_sregs().expect("registers");
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        core.fd().set_sregs(&sregs).expect("registers");
        let regs = kvm_bindings::kvm_regs { rip: START, rflags: 2, rsp: 0x8000, ..Default::default() };
        core.fd().set_regs(&regs).expect("registers");
    }
    let fabric = Arc::clone(board) as Arc<dyn Fabric>;
    Arc::new(Mutex::new(ApicCpu::new(core, id, first, inbox, fabric, Arc::clone(board.clock()))))
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.gang.end();
        for thread in self.threads.drain(..) {
            thread.join().expect("a vCPU's thread ends");
        }
    }
}

/// Counts at 0x2000 and ends the interrupt.
fn counting() -> Code {
    Code::default().count(0x2000).set(EOI, 0)
}

fn redirect(pin: u32, low: u32) -> Code {
    let (select, window) = (0xfec0_0000, 0xfec0_0010);
    Code::default().set(select, 0x11 + 2 * pin).set(window, 0).set(select, 0x10 + 2 * pin).set(window, low)
}

#[test]
fn a_halted_vcpu_is_woken_by_its_timer_periodic_and_one_shot() {
    const TICK: u32 = 300_000;
    let begin = |mode: u32| {
        Code::default().enable().set(DIVIDE, 0xb).set(TIMER, mode | 0x41).set(INITIAL, TICK).wait()
    };
    let wait = Code::default().wait();
    let periodic = counting().only_if(0x2000, 20, &wait).end();
    let again = Code::default().set(INITIAL, TICK).wait();
    let one_shot = counting().only_if(0x2000, 20, &again).end();
    for (mode, handler) in [(1 << 17, periodic), (0, one_shot)] {
        let begun = Instant::now();
        let Some(guest) = Guest::new(1, &begin(mode), &wait, &[(0x41, &handler)]) else { return };
        guest.gang.resume();
        guest.ends();
        assert!(begun.elapsed() >= Duration::from_micros(20 * 300), "the timer is early");
    }
}

#[test]
fn a_processor_is_started_by_init_and_sipi_and_a_thousand_ipis_each_way_arrive() {
    const EACH: u32 = 1000;
    let send = |to: u32, vector: u32| Code::default().set(ICR_HIGH, to << 24).set(ICR, vector);
    let bootstrap = Code::default().enable().bytes(&send(1, 0x4500).0).bytes(&send(1, 0x4601).0).wait();
    let started = Code::default().enable().bytes(&send(0, 0x50).0).wait();
    let back = counting().only_if(0x2000, EACH, &send(1, 0x51).wait()).end();
    let forth = Code::default().count(0x2004).set(EOI, 0).bytes(&send(0, 0x50).0).wait();
    let Some(guest) = Guest::new(2, &bootstrap, &started, &[(0x50, &back), (0x51, &forth)]) else { return };
    guest.gang.resume();
    // In the middle of it everything is paused, becomes a value, and goes on from that.
    guest.until("the first hundred", || guest.word(0x2000) >= 100);
    guest.gang.pause(LONG).expect("they pause");
    for cpu in &guest.cpus {
        let mut cpu = cpu.lock().expect("no panic");
        let (state, core) = (cpu.state(), cpu.core().save().expect("it saves"));
        let text = serde_json::to_string(&(&state, &core)).expect("a value");
        let (state, core) = serde_json::from_str(&text).expect("a state");
        cpu.core_mut().restore(&core).expect("it restores");
        cpu.restore(&state);
    }
    let chipset = guest.board.save().expect("it saves");
    guest.board.restore(&chipset).expect("it restores");
    guest.gang.resume();
    guest.ends();
    assert_eq!((guest.word(0x2000), guest.word(0x2004)), (EACH, EACH - 1));
}

#[test]
fn interrupts_of_an_io_apic_pin_an_msi_the_pic_and_an_nmi_reach_their_handlers() {
    let begin = Code::default()
        .enable()
        .bytes(&redirect(4, 0x61).0)
        .set(0xfee0_0350, 0x700) // LINT0: the PIC's
        // The PIC: ICW1 to ICW4, vectors from 0x30 on, all but IRQ 3 masked.
        .bytes(&[0xb0, 0x11, 0xe6, 0x20, 0xb0, 0x30, 0xe6, 0x21, 0xb0, 4, 0xe6, 0x21, 0xb0, 1, 0xe6, 0x21])
        .bytes(&[0xb0, 0xf7, 0xe6, 0x21])
        .say(1)
        .wait();
    let says = |value| Code::default().set(EOI, 0).say(value).wait();
    // The end of an interrupt at the PIC; an NMI by an IPI to itself.
    let pic =
        Code::default().bytes(&[0xb0, 0x20, 0xe6, 0x20]).say(0x33).set(ICR, 0x4_4400).set(ICR, 0x400).wait();
    let handlers = [(0x61, says(0x61)), (0x62, says(0x62)), (0x33, pic), (2, Code::default().say(2).wait())];
    let handlers: Vec<_> = handlers.iter().map(|(vector, code)| (*vector, code)).collect();
    let Some(guest) = Guest::new(1, &begin, &Code::default(), &handlers) else { return };
    guest.gang.resume();
    let expect = |said: &[u8]| guest.until("a handler", || guest.written() == said);
    expect(&[1]);
    let (pin, irq) = (guest.board.line(4).expect("a line"), guest.board.line(3).expect("a line"));
    pin.set(true).expect("it rises");
    expect(&[1, 0x61]);
    let msi = guest.board.msi().expect("a vector");
    msi.set(MsiMessage { address: 0xfee0_0000, data: 0x62 }).expect("it is set");
    msi.trigger().expect("it triggers");
    expect(&[1, 0x61, 0x62]);
    msi.mask(true).expect("it masks");
    msi.trigger().expect("held back");
    irq.set(true).expect("it rises");
    expect(&[1, 0x61, 0x62, 0x33, 2]);
    msi.mask(false).expect("it unmasks");
    expect(&[1, 0x61, 0x62, 0x33, 2, 0x62]);
}

#[test]
fn a_level_interrupts_again_at_each_end_until_it_falls_and_a_task_priority_holds_it_back() {
    let begin = Code::default().enable().bytes(&redirect(9, 0x8071).0).wait();
    // At the count of 10 the task priority is raised above the vector, and lowered when 0x2008 says so.
    let raised = Code::default()
        .set(TPR, 0x80)
        .set(EOI, 0)
        .say(0x80)
        .fresh_stack()
        .bytes(&[0xfb])
        .bytes(&[0x83, 0x3d, 8, 0x20, 0, 0, 0, 0x74, 0xf7]) // until [0x2008] is not 0
        .set(TPR, 0)
        .wait();
    let handler = Code::default().count(0x2000).only_if(0x2000, 10, &Code::default().set(EOI, 0).wait());
    let handler = handler.bytes(&raised.0);
    let Some(guest) = Guest::new(1, &begin, &Code::default(), &[(0x71, &handler)]) else { return };
    guest.gang.resume();
    let sci = guest.board.line(9).expect("a line");
    sci.set(true).expect("it rises");
    guest.until("it holds back", || guest.written() == [0x80]);
    assert_eq!(guest.word(0x2000), 10);
    guest.ram.memory().write_obj(1_u32, GuestAddress(0x2008)).expect("RAM");
    guest.until("it goes on", || guest.word(0x2000) >= 20);
    sci.set(false).expect("it falls");
    guest.gang.pause(LONG).expect("it pauses");
    guest.gang.resume();
    // What was under way may still come once; after that there is nothing until the line rises again.
    let before = guest.word(0x2000);
    sci.set(true).expect("it rises");
    guest.until("it is raised again", || guest.word(0x2000) > before + 1);
}

#[test]
fn the_pit_interrupts_through_the_io_apic() {
    let begin = Code::default()
        .enable()
        .bytes(&redirect(2, 0x45).0)
        .bytes(&[0xb0, 0x34, 0xe6, 0x43, 0xb0, 0x00, 0xe6, 0x40, 0xb0, 0x04, 0xe6, 0x40]) // mode 2, 1024 ticks
        .wait();
    let handler = counting().only_if(0x2000, 10, &Code::default().wait()).end();
    let begun = Instant::now();
    let Some(guest) = Guest::new(1, &begin, &Code::default(), &[(0x45, &handler)]) else { return };
    guest.gang.resume();
    guest.ends();
    assert!(begun.elapsed() >= Duration::from_micros(858 * 9), "the timer is early");
}
