//! A guest with a vCPU on this process's machine and one in a real agent.

mod common;

use std::path::Path;
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

use common::{Agent, LIMIT};
use nix::sys::signal::Signal;
use vmm::config::Guest;
use vmm::console::{Hub, Options as HubOptions};
use vmm::loader::micro;
use vmm::machine::{Exit, Machine, Options};

const LENDS: &str = "[cpu]\ncount = 1\n";

/// Where a started vCPU begins, in real mode.
const TRAMPOLINE: u32 = 0xc000;
/// Where the code of vCPU 1 is.
const OTHERS: u32 = 0x10_1000;
/// A page for each of these.
const COUNT: u32 = 0x20_0000;
const STARTED: u32 = 0x20_1000;
const MESSAGE: u32 = 0x20_2000;
const ANSWER: u32 = 0x20_3000;
const COUNTED: [u32; 2] = [0x20_4000, 0x20_5000];

// The local APIC's registers.
const SPURIOUS: u32 = 0xfee0_00f0;
/// IRR of vectors 0x40 to 0x5f.
const REQUESTS: u32 = 0xfee0_0220;
const ICR: u32 = 0xfee0_0300;
const ICR_HIGH: u32 = 0xfee0_0310;

/// 32-bit machine code, put together.
#[derive(Clone, Default)]
struct Code(Vec<u8>);

impl Code {
    fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }
    fn word(self, word: u32) -> Self {
        self.bytes(&word.to_le_bytes())
    }
    /// mov dword [at], value
    fn set(self, at: u32, value: u32) -> Self {
        self.bytes(&[0xc7, 0x05]).word(at).word(value)
    }
    /// pause; cmp dword [at], value; jne back
    fn wait_for(self, at: u32, value: u32) -> Self {
        self.bytes(&[0xf3, 0x90, 0x81, 0x3d]).word(at).word(value).bytes(&[0x75, 0xf2])
    }
    /// pause; test dword [at], bit; jz back
    fn wait_for_bit(self, at: u32, bit: u32) -> Self {
        self.bytes(&[0xf3, 0x90, 0xf7, 0x05]).word(at).word(bit).bytes(&[0x74, 0xf2])
    }
    /// mov ecx, times; lock inc dword [at]; dec ecx; jnz back
    fn count(self, at: u32, times: u32) -> Self {
        self.bytes(&[0xb9]).word(times).bytes(&[0xf0, 0xff, 0x05]).word(at).bytes(&[0x49, 0x75, 0xf6])
    }
    /// For eax from 1 to `last`: writes it to `to`, waits until it is at `from`.
    fn ask(self, to: u32, from: u32, last: u32) -> Self {
        self.bytes(&[0xb8])
            .word(1)
            .bytes(&[0xa3])
            .word(to)
            .bytes(&[0x39, 0x05])
            .word(from)
            .bytes(&[0x75, 0xf8, 0x40, 0x3d])
            .word(last + 1)
            .bytes(&[0x75, 0xeb])
    }
    /// For eax from 1 to `last`: waits until it is at `from`, writes it to `to`.
    fn answer(self, from: u32, to: u32, last: u32) -> Self {
        self.bytes(&[0xb8])
            .word(1)
            .bytes(&[0x39, 0x05])
            .word(from)
            .bytes(&[0x75, 0xf8, 0xa3])
            .word(to)
            .bytes(&[0x40, 0x3d])
            .word(last + 1)
            .bytes(&[0x75, 0xeb])
    }
    /// Sends an interrupt to the APIC `to`.
    fn send(self, to: u32, command: u32) -> Self {
        self.set(ICR_HIGH, to << 24).set(ICR, command)
    }
    /// cmp dword [at], value; je over `other`, which does not come back
    fn unless(self, at: u32, value: u32, other: &[u8]) -> Self {
        self.bytes(&[0x81, 0x3d])
            .word(at)
            .word(value)
            .bytes(&[0x0f, 0x84])
            .word(other.len() as u32)
            .bytes(other)
    }
}

/// From real mode at `TRAMPOLINE` to `OTHERS` in flat 32-bit protected mode.
fn trampoline() -> Vec<u8> {
    let at = |offset: u32| ((TRAMPOLINE + offset) as u16).to_le_bytes();
    let mut code = vec![0x0f, 0x01, 0x16]; // lgdt
    code.extend(at(0x78));
    code.extend([0x0f, 0x20, 0xc0, 0x0c, 0x01, 0x0f, 0x22, 0xc0, 0xea]); // cr0 |= 1; jmp 8:flat
    code.extend(at(0x20));
    code.extend([0x08, 0x00]);
    code.resize(0x20, 0x90);
    code.extend([0xb8, 0x10, 0, 0, 0, 0x8e, 0xd8, 0x8e, 0xd0, 0x8e, 0xc0, 0xb8]); // ds, ss, es; mov eax, OTHERS
    code.extend(OTHERS.to_le_bytes());
    code.extend([0xff, 0xe0]); // jmp eax
    code.resize(0x40, 0x90);
    for descriptor in [0_u64, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff] {
        code.extend(descriptor.to_le_bytes());
    }
    code.resize(0x78, 0);
    code.extend([0x17, 0]);
    code.extend((TRAMPOLINE + 0x40).to_le_bytes());
    code.resize(0x80, 0);
    code
}

/// Both vCPUs count on one page, pass messages by two others and interrupt each other; then vCPU 1 writes to the serial
/// port, and vCPU 0 ends the guest.
fn both(counts: u32, messages: u32) -> Vec<u8> {
    let mut first = Code::default();
    for (at, word) in (TRAMPOLINE..).step_by(4).zip(trampoline().chunks_exact(4)) {
        first = first.set(at, u32::from_le_bytes(word.try_into().expect("four bytes")));
    }
    let wrong = [micro::say("wrong\n"), micro::power_off()].concat();
    let first = first
        .set(SPURIOUS, 0x1ff)
        .send(1, 0x4500)
        .send(1, 0x4600 | TRAMPOLINE >> 12)
        .wait_for(STARTED, 1)
        .count(COUNT, counts)
        .set(COUNTED[0], 1)
        .wait_for(COUNTED[1], 1)
        .unless(COUNT, 2 * counts, &wrong)
        .ask(MESSAGE, ANSWER, messages)
        .send(1, 0x4040)
        .wait_for_bit(REQUESTS, 2)
        .bytes(&micro::say("and here\n"))
        .bytes(&micro::power_off());
    let others = Code::default()
        .set(SPURIOUS, 0x1ff)
        .set(STARTED, 1)
        .count(COUNT, counts)
        .set(COUNTED[1], 1)
        .wait_for(COUNTED[0], 1)
        .answer(MESSAGE, ANSWER, messages)
        .wait_for_bit(REQUESTS, 1)
        .bytes(&micro::say("there\n"))
        .send(0, 0x4041)
        .bytes(&micro::halt());
    let mut code = first.0;
    assert!(code.len() <= 0x1000);
    code.resize(0x1000, 0x90);
    code.extend(others.0);
    micro::kernel(&code)
}

/// vCPU 1 runs for ever; vCPU 0 has said so and halts.
fn endless() -> Vec<u8> {
    let mut first = Code::default();
    for (at, word) in (TRAMPOLINE..).step_by(4).zip(trampoline().chunks_exact(4)) {
        first = first.set(at, u32::from_le_bytes(word.try_into().expect("four bytes")));
    }
    let first = first
        .set(SPURIOUS, 0x1ff)
        .send(1, 0x4500)
        .send(1, 0x4600 | TRAMPOLINE >> 12)
        .wait_for(STARTED, 1)
        .bytes(&micro::say("both run\n"))
        .bytes(&micro::halt());
    let others = Code::default().set(STARTED, 1).bytes(&[0xf0, 0xff, 0x05]).word(COUNT).bytes(&[0xeb, 0xf7]);
    let mut code = first.0;
    code.resize(0x1000, 0x90);
    code.extend(others.0);
    micro::kernel(&code)
}

type End = Result<Exit, String>;

struct Running {
    folder: tempfile::TempDir,
    end: Receiver<End>,
    controller: std::sync::Arc<vmm::machine::Controller>,
}

fn can_run() -> bool {
    let can = ["/dev/kvm", "/dev/userfaultfd"]
        .iter()
        .all(|path| std::fs::OpenOptions::new().read(true).write(true).open(Path::new(path)).is_ok());
    if !can {
        eprintln!("cannot run: /dev/kvm or /dev/userfaultfd cannot be opened");
    }
    can
}

/// A guest of two vCPUs, the second one at `agent`.
fn machine(agent: &Agent, kernel: &[u8], more: &str) -> Result<(tempfile::TempDir, Machine), String> {
    let folder = tempfile::tempdir().expect("a folder");
    let at = |name: &str| folder.path().join(name);
    std::fs::write(at("kernel"), kernel).expect("it writes");
    let text = format!(
        "name = 'both'\nkernel.image = 'kernel'\nserial.file = 'serial'\nmemory.size = '16M'\n[cpu]\ncount = 2\n\
         [[cpu.place]]\nnode = 'pc2'\nagent = '{}'\ninsecure = true\ncount = 1\n{more}",
        agent.address
    );
    let guest = Guest::parse(&at("guest.toml"), &text).unwrap_or_else(|mistakes| panic!("{mistakes}"));
    let hub = Hub::open(&guest.serial, HubOptions::default()).expect("a console");
    let options = Options { allow_unfit_kvm: true, identity: None, cache: None, serial: hub, console: None };
    let machine = Machine::new(&guest, options).map_err(|error| error.to_string())?;
    Ok((folder, machine))
}

fn run(agent: &Agent, kernel: &[u8], more: &str) -> Running {
    let (folder, machine) =
        machine(agent, kernel, more).unwrap_or_else(|why| panic!("{why}\n{}", agent.log()));
    let controller = machine.controller();
    let (tell, end) = channel();
    thread::spawn(move || tell.send(machine.run().map_err(|error| error.to_string())));
    Running { folder, end, controller }
}

impl Running {
    fn serial(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("serial")).unwrap_or_default()
    }

    fn ends(&self, agent: &Agent) -> End {
        let end = self.end.recv_timeout(LIMIT);
        end.unwrap_or_else(|_| {
            let counters = vmm::control::Controlled::counters(&*self.controller);
            panic!(
                "it does not end; serial {:?}, counters {counters:?}, agent:\n{}",
                self.serial(),
                agent.log()
            )
        })
    }
}

fn until(what: &str, done: impl Fn() -> bool) {
    let begun = std::time::Instant::now();
    while !done() {
        assert!(begun.elapsed() < LIMIT, "not within a minute: {what}");
        thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn two_vcpus_on_two_members_count_talk_and_interrupt_each_other_and_lose_nothing() {
    if !can_run() {
        return;
    }
    let agent = Agent::start(LENDS);
    let guest = run(&agent, &both(2000, 100), "");
    assert_eq!(guest.ends(&agent), Ok(Exit::PoweredOff), "{}", guest.serial());
    assert_eq!(guest.serial(), "there\nand here\n");
}

#[test]
fn a_guest_that_spans_pcs_pauses_goes_on_and_ends_when_its_helper_is_gone() {
    use vmm::control::{Controlled as _, State};
    if !can_run() {
        return;
    }
    let mut agent = Agent::start(LENDS);
    let guest = run(&agent, &endless(), "");
    until("both run", || guest.serial().contains("both run"));
    guest.controller.pause().expect("it pauses");
    assert_eq!(guest.controller.status().state, State::Paused);
    let exits = |guest: &Running| guest.controller.counters()["vcpu1"]["exits"];
    let before = exits(&guest);
    guest.controller.resume().expect("it goes on");
    assert_eq!(guest.controller.status().state, State::Running);
    until("vCPU 1 is entered again", || exits(&guest) > before);
    agent.end(Signal::SIGKILL);
    agent.run();
    assert_eq!(guest.ends(&agent), Ok(Exit::MemoryLost));
}

#[test]
fn a_guest_stands_still_while_its_helper_is_frozen_and_loses_nothing() {
    use vmm::control::{Controlled as _, State};
    if !can_run() {
        return;
    }
    let agent = Agent::start(LENDS);
    let guest = run(&agent, &both(20_000, 500), "");
    until("both vCPUs run", || guest.controller.counters()["coherence"]["fetched"] > 0);
    agent.signal(Signal::SIGSTOP);
    until("it stands still", || guest.controller.status().waits_for.is_some());
    assert_eq!(guest.controller.status().state, State::Paused);
    agent.signal(Signal::SIGCONT);
    assert_eq!(guest.ends(&agent), Ok(Exit::PoweredOff), "{}", guest.serial());
    assert_eq!(guest.serial(), "there\nand here\n");
}

#[test]
fn an_agent_that_lends_no_vcpus_or_not_so_many_says_so() {
    if !can_run() {
        return;
    }
    let agent = Agent::start("");
    let why = machine(&agent, &endless(), "").err().expect("it is refused");
    assert!(why.contains("lends no vCPUs"), "{why}");
    until("the agent's log says so too", || agent.log().contains("lends no vCPUs"));
    let agent = Agent::start(LENDS);
    let (_folder, _first) = machine(&agent, &endless(), "").unwrap_or_else(|why| panic!("{why}"));
    let why = machine(&agent, &endless(), "").err().expect("it is refused");
    assert!(why.contains("1 are in use"), "{why}");
}
