//! Guests of a few instructions on `/dev/kvm`: they run on every KVM, also on one that cannot run kernels.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use devices::bus::{Action, Bus, BusDevice, Deferred, DoorbellRegistry, Outcome, Range};
use devices::interrupt::Tsc;
use devices::irq::{InterruptController, MsiMessage};
use vm_memory::{Bytes as _, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::signal::Killable;

use super::*;
use crate::cpu::{self, Buses, Core as _, Event, Gang};
use crate::memory::fault::{self, Engine, Options};
use crate::memory::store::testing::{InMemory, Pace};
use crate::memory::{Backing, Layout, Ram};
use crate::units::Bytes;

#[path = "members_test.rs"]
mod members;

const LONG: Duration = Duration::from_secs(60);
/// Where code is put, and where real-mode guests begin.
const CODE: u64 = 0x1000;

/// What guests write by port 0x10, and what they read there.
#[derive(Default)]
struct Recorder {
    written: Mutex<Vec<u8>>,
    reads: AtomicU32,
    /// Reads wait until this is completed, if there is one.
    deferred: Mutex<Option<Deferred>>,
}

impl BusDevice for Recorder {
    fn read(&self, offset: u64, data: &mut [u8]) -> Outcome {
        self.reads.fetch_add(1, Ordering::SeqCst);
        data.fill(0x40 + offset as u8);
        match &*self.deferred.lock().expect("no panic") {
            Some(token) => Outcome::Deferred(token.clone()),
            None => Outcome::Done,
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Outcome {
        self.written.lock().expect("no panic").extend(data);
        if offset == 7 { Outcome::Act(Action::PowerOff) } else { Outcome::Done }
    }
}

/// A running machine of nothing but vCPUs, RAM and a recorder at port 0x10 and address 3 GiB.
struct Guest {
    partition: Arc<Partition>,
    ram: Ram,
    vcpus: Vec<Arc<Mutex<Vcpu>>>,
    threads: Arc<Mutex<Vec<JoinHandle<()>>>>,
    gang: Arc<Gang>,
    recorder: Arc<Recorder>,
    events: Receiver<Event>,
    /// Handles the RAM's page faults, if its pages may be elsewhere; outlives the vCPUs' threads.
    engine: Option<Engine>,
}

impl Guest {
    /// A guest of `count` vCPUs that all begin in real mode at `code`; `None` where there is no KVM.
    fn new(count: u8, code: &[u8]) -> Option<Self> {
        Self::with_local(count, code, None)
    }

    /// As [`new`](Self::new), with all but `local` bytes of its RAM elsewhere; `None` also where page faults cannot
    /// be handled.
    fn with_local(count: u8, code: &[u8], local: Option<Bytes>) -> Option<Self> {
        if !runs() {
            return None;
        }
        let layout = Layout::new(Bytes(2 << 20), 36).expect("it fits");
        let ram = Ram::new(&layout, Backing::Shared).expect("RAM");
        let engine = match local.map(|local| handle(&ram, local)) {
            Some(Err(error)) => {
                eprintln!("cannot run: {error}");
                return None;
            }
            other => other.and_then(Result::ok),
        };
        let mut guest = Self::on(ram, count, code);
        guest.engine = engine;
        Some(guest)
    }

    /// A guest with this RAM, whose page faults somebody else may handle.
    fn on(ram: Ram, count: u8, code: &[u8]) -> Self {
        ram.memory().write_slice(code, GuestAddress(CODE)).expect("RAM");
        let partition =
            Arc::new(Partition::new(ram.memory().clone(), count, Controllers::Kernel).expect("a partition"));
        let recorder = Arc::new(Recorder::default());
        let mut buses = Buses { port: Bus::default(), mmio: Bus::default() };
        buses.port.insert(Range { base: 0x10, len: 8 }, Arc::clone(&recorder) as _).expect("free");
        buses.mmio.insert(Range { base: 3 << 30, len: 8 }, Arc::clone(&recorder) as _).expect("free");
        let gang = Arc::new(Gang::new(count.into()));
        let (sender, events) = channel();
        let vcpus: Vec<_> =
            (0..count).map(|index| Arc::new(Mutex::new(partition.vcpu(index).expect("a vCPU")))).collect();
        let buses = Arc::new(buses);
        let threads = Arc::new(Mutex::new(Vec::new()));
        for (index, vcpu) in vcpus.iter().enumerate() {
            real_mode(&vcpu.lock().expect("no panic"));
            let (vcpu, gang, buses) = (Arc::clone(vcpu), Arc::clone(&gang), Arc::clone(&buses));
            let sender = sender.clone();
            threads.lock().expect("no panic").push(thread::spawn(move || {
                while gang.park() {
                    let mut vcpu = vcpu.lock().expect("no panic");
                    let _attached = vcpu.attach();
                    cpu::run(index as u8, &mut *vcpu, &buses, &gang, &sender, &AtomicU64::new(0));
                }
            }));
        }
        let kicked = Arc::clone(&threads);
        gang.set_kick(Box::new(move || {
            for thread in &*kicked.lock().expect("no panic") {
                let _ = thread.kill(kick_signal());
            }
        }));
        Self { partition, ram, vcpus, threads, gang, recorder, events, engine: None }
    }

    fn event(&self) -> Event {
        self.events.recv_timeout(LONG).expect("the guest asks for something")
    }

    fn written(&self) -> Vec<u8> {
        self.recorder.written.lock().expect("no panic").clone()
    }

    fn word(&self, at: u64) -> u32 {
        self.ram.memory().read_obj(GuestAddress(at)).expect("RAM")
    }

    /// Waits until `done`.
    fn until(&self, done: impl Fn() -> bool) {
        let end = Instant::now() + LONG;
        while !done() {
            assert!(Instant::now() < end, "the guest wrote {:?} and then nothing", self.written());
            thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Whether there is a KVM.
fn runs() -> bool {
    install_kick_handler().expect("a signal handler");
    partition::open().inspect_err(|error| eprintln!("cannot run: {error}")).is_ok()
}

fn handle(ram: &Ram, local: Bytes) -> Result<Engine, fault::Error> {
    let (source, _) = InMemory::new(Pace::Shuffled(7));
    Engine::start(ram, vec![Box::new(source)], Options { local })
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.gang.end();
        let threads = std::mem::take(&mut *self.threads.lock().expect("no panic"));
        for thread in threads {
            // Once more, in case the first kick came before the thread could take it.
            while !thread.is_finished() {
                let _ = thread.kill(kick_signal());
                thread::sleep(Duration::from_millis(1));
            }
            thread.join().expect("a vCPU's thread ends");
        }
    }
}

/// Real mode at [`CODE`], whatever the number of the vCPU; data at 0.
fn real_mode(vcpu: &Vcpu) {
    let mut sregs = vcpu.fd().get_sregs().expect("registers");
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.fd().set_sregs(&sregs).expect("registers");
    let rbx = vcpu.index().into();
    let regs = kvm_bindings::kvm_regs { rip: CODE, rflags: 2, rsp: 0x8000, rbx, ..Default::default() };
    vcpu.fd().set_regs(&regs).expect("registers");
    let running = kvm_bindings::kvm_mp_state { mp_state: kvm_bindings::KVM_MP_STATE_RUNNABLE };
    vcpu.fd().set_mp_state(running).expect("it is runnable");
}

#[test]
fn a_guest_reads_and_writes_ports_and_ends_by_an_action() {
    // in al, 0x13; out 0x10, al; mov ax, 0x1234; out 0x12, ax; out 0x17, al; hlt
    let code = [0xe4, 0x13, 0xe6, 0x10, 0xb8, 0x34, 0x12, 0xe7, 0x12, 0xe6, 0x17, 0xf4];
    let Some(guest) = Guest::new(1, &code) else { return };
    guest.gang.resume();
    assert_eq!(guest.event(), Event::Action(Action::PowerOff));
    assert_eq!(guest.written(), [0x43, 0x34, 0x12, 0x34]);
}

#[test]
fn a_string_of_port_writes_arrives_byte_by_byte() {
    // mov si, 0x1020; mov cx, 5; mov dx, 0x10; rep outsb; out 0x17, al
    let mut code = vec![0xbe, 0x20, 0x10, 0xb9, 5, 0, 0xba, 0x10, 0, 0xf3, 0x6e, 0xb0, 0, 0xe6, 0x17, 0xf4];
    code.resize(0x20, 0);
    code.extend(b"omega");
    let Some(guest) = Guest::new(1, &code) else { return };
    guest.gang.resume();
    assert_eq!(guest.event(), Event::Action(Action::PowerOff));
    assert_eq!(guest.written(), b"omega\0");
}

/// Goes to 32-bit protected mode with flat segments, whose descriptors follow at 0x1080, and runs `then`.
fn protected(then: &[u8]) -> Vec<u8> {
    let mut code = vec![
        0x0f, 0x01, 0x16, 0xf8, 0x10, // lgdt [0x10f8]
        0x0f, 0x20, 0xc0, 0x0c, 0x01, 0x0f, 0x22, 0xc0, // cr0 |= 1
        0xea, 0x20, 0x10, 0x08, 0x00, // jmp 8:0x1020
    ];
    code.resize(0x20, 0x90);
    code.extend([0xb8, 0x10, 0, 0, 0, 0x8e, 0xd8]); // mov eax, 0x10; mov ds, ax
    code.extend(then);
    code.resize(0x80, 0x90);
    for descriptor in [0_u64, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff] {
        code.extend(descriptor.to_le_bytes());
    }
    code.resize(0xf8, 0);
    code.extend([0x17, 0, 0x80, 0x10, 0, 0]);
    code
}

#[test]
fn a_guest_reads_and_writes_mmio() {
    let code = protected(&[
        0xa1, 0x04, 0, 0, 0xc0, // mov eax, [0xc0000004]
        0xa3, 0x00, 0, 0, 0xc0, // mov [0xc0000000], eax
        0xa2, 0x07, 0, 0, 0xc0, // mov [0xc0000007], al
        0xf4,
    ]);
    let Some(guest) = Guest::new(1, &code) else { return };
    guest.gang.resume();
    assert_eq!(guest.event(), Event::Action(Action::PowerOff));
    assert_eq!(guest.written(), [0x44; 5]);
}

#[test]
fn a_deferred_read_waits_for_its_completion_and_a_pause_does_not_wait_for_it() {
    // in al, 0x13; out 0x10, al; out 0x17, al
    let Some(guest) = Guest::new(1, &[0xe4, 0x13, 0xe6, 0x10, 0xe6, 0x17, 0xf4]) else { return };
    let token = Deferred::default();
    *guest.recorder.deferred.lock().expect("no panic") = Some(token.clone());
    guest.gang.resume();
    guest.until(|| guest.recorder.reads.load(Ordering::SeqCst) == 1);
    guest.gang.pause(LONG).expect("it pauses while it waits");
    token.complete(&[0x77]);
    guest.gang.settle(LONG).expect("the access is finished during the pause");
    assert_eq!(guest.written(), [0_u8; 0], "no guest code ran during the pause");
    guest.gang.resume();
    assert_eq!(guest.event(), Event::Action(Action::PowerOff));
    assert_eq!(guest.written(), [0x77, 0x77]);
}

#[test]
fn two_vcpus_count_stand_still_while_paused_and_go_on_from_a_saved_state() {
    let Some(guest) = Guest::new(2, &COUNT_BX) else { return };
    for round in 0..3 {
        guest.gang.resume();
        let before = [guest.word(0x2000), guest.word(0x2004)];
        guest.until(|| guest.word(0x2000) > before[0] + 50 && guest.word(0x2004) > before[1] + 50);
        guest.gang.pause(LONG).expect("they pause");
        let paused = [guest.word(0x2000), guest.word(0x2004)];
        thread::sleep(Duration::from_millis(5));
        assert_eq!([guest.word(0x2000), guest.word(0x2004)], paused, "round {round}: a paused vCPU ran");
        for vcpu in &guest.vcpus {
            let mut vcpu = vcpu.lock().expect("no panic");
            let state = vcpu.save().expect("it saves");
            let text = serde_json::to_string(&state).expect("a value");
            // Something else happens to the vCPU; the state puts it right.
            vcpu.fd().set_regs(&kvm_bindings::kvm_regs { rflags: 2, ..Default::default() }).expect("set");
            vcpu.restore(&serde_json::from_str(&text).expect("a state")).expect("it restores");
            assert_eq!(vcpu.save().expect("it saves").regs, state.regs);
        }
        let state = guest.partition.save().expect("it saves");
        guest.partition.restore(&state).expect("it restores");
    }
}

/// shl bx, 2; inc dword [bx + 0x2000]; jmp to the inc
const COUNT_BX: [u8; 10] = [0xc1, 0xe3, 2, 0x66, 0xff, 0x87, 0x00, 0x20, 0xeb, 0xf9];

/// Each vCPU counts in every second page of the upper megabyte, over and over, and its rounds at 0x8000 or 0x9000.
const COUNT_IN_PAGES: [u8; 35] = [
    0xc1, 0xe3, 12, // shl ebx, 12
    0x8d, 0xb3, 0, 0, 0x10, 0, // lea esi, [ebx + 0x100000]
    0x89, 0xf7, // round: mov edi, esi
    0xff, 0x07, // page: inc dword [edi]
    0x81, 0xc7, 0, 0x20, 0, 0, // add edi, 0x2000
    0x81, 0xff, 0, 0, 0x20, 0, // cmp edi, 0x200000
    0x72, 0xf0, // jb page
    0xff, 0x83, 0, 0x80, 0, 0, // inc dword [ebx + 0x8000]
    0xeb, 0xe6, // jmp round
];

#[test]
fn two_vcpus_lose_no_write_while_most_of_their_memory_is_elsewhere() {
    let code = protected(&COUNT_IN_PAGES);
    let Some(guest) = Guest::with_local(2, &code, Some(Bytes(64 << 12))) else { return };
    for pause in 1..=5 {
        guest.gang.resume();
        guest.until(|| guest.word(0x8000) > pause * 10 && guest.word(0x9000) > pause * 10);
        guest.gang.pause(LONG).expect("they pause");
        for vcpu in 0..2_u64 {
            let rounds = guest.word(0x8000 + (vcpu << 12));
            let counts: Vec<u32> = (0..128).map(|page| guest.word((0x100 + vcpu + 2 * page) << 12)).collect();
            // It is in the middle of a round: pages that it has passed are one ahead.
            let passed = counts.iter().take_while(|count| **count == rounds + 1).count();
            assert_eq!(counts[passed..], vec![rounds; 128 - passed], "vCPU {vcpu}, pause {pause}");
        }
    }
    let counters = guest.engine.as_ref().expect("it has one").counters();
    assert!(counters.remote_faults > 1000 && counters.write_faults > 0, "{counters:?}");
}

#[test]
fn a_triple_fault_is_reported() {
    // ud2, with an interrupt table of zeros: no handler for it, nor for the fault that this is.
    let code = protected(&[0x0f, 0x0b]);
    let Some(guest) = Guest::new(1, &code) else { return };
    guest.gang.resume();
    assert_eq!(guest.event(), Event::TripleFault(0));
}

#[test]
fn a_doorbell_rings_without_an_exit() {
    let code = protected(&[
        0xc7, 0x05, 0x10, 0, 0, 0xc0, 5, 0, 0, 0, // mov dword [0xc0000010], 5
        0x31, 0xc0, 0xa2, 0x07, 0, 0, 0xc0, 0xf4, // xor eax, eax; mov [0xc0000007], al; hlt
    ]);
    let Some(guest) = Guest::new(1, &code) else { return };
    let event = EventFd::new(EFD_NONBLOCK).expect("an eventfd");
    let doorbells = guest.partition.doorbells();
    let address = (3 << 30) + 0x10;
    doorbells.register(address, 0, None, &event).expect("it registers");
    guest.gang.resume();
    assert_eq!(guest.event(), Event::Action(Action::PowerOff));
    assert_eq!(event.read().expect("it rang"), 1);
    assert_eq!(guest.written(), [0], "only the last write left KVM");
    doorbells.unregister(address, 0, None, &event).expect("it unregisters");
}

#[test]
fn a_message_signalled_interrupt_reaches_the_guest_through_its_eventfd_unless_masked() {
    let mut code = protected(&[
        0x0f, 0x01, 0x1d, 0x00, 0x11, 0, 0, // lidt [0x1100]
        0xbc, 0x00, 0x80, 0, 0, // mov esp, 0x8000
        0xb8, 0x10, 0, 0, 0, 0x8e, 0xd0, // mov ss, ax
        0xc7, 0x05, 0xf0, 0, 0xe0, 0xfe, 0xff, 1, 0,
        0, // mov dword [0xfee000f0], 0x1ff: enable the APIC
        0xfb, 0xe6, 0x10, // sti; out 0x10, al
        0xeb, 0xfe, // jmp $
    ]);
    code.resize(0x100, 0);
    code.extend([0xff, 0x07, 0, 0x30, 0, 0]); // the interrupt table is at 0x3000
    code.resize(0x110, 0);
    // mov dword [0xfee000b0], 0 (end of interrupt); mov al, 0x99; out 0x11, al; sti; jmp $
    // (Not iret, which KVM's instruction interpreter does not know in protected mode.)
    code.extend([0xc7, 0x05, 0xb0, 0, 0xe0, 0xfe, 0, 0, 0, 0, 0xb0, 0x99, 0xe6, 0x11, 0xfb, 0xeb, 0xfe]);
    let Some(guest) = Guest::new(1, &code) else { return };
    let gate: u64 = 0x1110 | 8 << 16 | 0x8e00 << 32;
    guest.ram.memory().write_obj(gate, GuestAddress(0x3000 + 8 * 0x41)).expect("RAM");
    let interrupts = guest.partition.interrupts().expect("interrupts");
    let msi = interrupts.msi().expect("a vector");
    msi.set(MsiMessage { address: 0xfee0_0000, data: 0x41 }).expect("it is set");
    guest.gang.resume();
    guest.until(|| guest.written().len() == 1);
    msi.event().expect("an eventfd").write(1).expect("it triggers");
    guest.until(|| guest.written().len() == 2);
    assert_eq!(guest.written()[1], 0x99);
    msi.mask(true).expect("it masks");
    msi.trigger().expect("held back");
    thread::sleep(Duration::from_millis(20));
    assert_eq!(guest.written().len(), 2, "a masked vector interrupted");
    msi.mask(false).expect("it unmasks");
    guest.until(|| guest.written().len() == 3);
}

#[test]
fn the_guests_time_stamp_counter_reads_what_its_offset_says() {
    // rdtsc; mov [0x2000], eax; mov [0x2004], edx; out 0x17, al
    let code = [0x0f, 0x31, 0x66, 0xa3, 0x00, 0x20, 0x66, 0x89, 0x16, 0x04, 0x20, 0xe6, 0x17, 0xf4];
    let Some(guest) = Guest::new(1, &code) else { return };
    // One that runs guests without the processor's help has them read this PC's counter.
    if let Fitness::Unfit(why) = fitness() {
        eprintln!("cannot run: this KVM has no counters of vCPUs ({why})");
        return;
    }
    let vcpu = Arc::clone(&guest.vcpus[0]);
    if let Err(why) = vcpu.lock().expect("no panic").tsc_offset() {
        eprintln!("cannot run: {why}");
        return;
    }
    let khz = vcpu.lock().expect("no panic").fd().get_tsc_khz().expect("a rate");
    let rate = tsc::Rate { host_khz: khz, guest_khz: khz };
    let (begun, base) = (tsc::now(), Tsc(1 << 50));
    vcpu.lock().expect("no panic").set_tsc(base, begun, rate).expect("it is set");
    guest.gang.resume();
    assert_eq!(guest.event(), Event::Action(Action::PowerOff));
    let elapsed = tsc::now().0 - begun.0;
    let read = u64::from(guest.word(0x2004)) << 32 | u64::from(guest.word(0x2000));
    assert!((base.0..=base.0 + elapsed).contains(&read), "{read:#x} after {elapsed} ticks");
    guest.gang.pause(LONG).expect("it pauses");
    let offset = vcpu.lock().expect("no panic").tsc_offset().expect("as before");
    assert_eq!(offset, base.0.wrapping_sub(begun.0), "it stays where it was put");
}
