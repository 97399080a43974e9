//! A guest with a vCPU on this process's machine and others in real agents.

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

/// Where started vCPUs begin, in real mode: a page for each.
const TRAMPOLINES: u32 = 0xc000;
/// Where the code of vCPU 1 is; a page on, that of the next.
const OTHERS: u32 = 0x10_1000;
/// A page for each of these.
const COUNT: u32 = 0x20_0000;
const STARTED: u32 = 0x20_1000;
const MESSAGE: u32 = 0x20_2000;
const ANSWER: u32 = 0x20_3000;
const COUNTED: [u32; 3] = [0x20_4000, 0x20_5000, 0x20_6000];

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
    /// Starts vCPU `cpu`, whose code is in its page.
    fn start(self, cpu: u32) -> Self {
        let page = TRAMPOLINES + (cpu - 1) * 0x1000;
        let trampoline = trampoline(page, OTHERS + (cpu - 1) * 0x1000);
        let words = (page..).step_by(4).zip(trampoline.chunks_exact(4));
        let code = words.fold(self, |code, (at, word)| {
            code.set(at, u32::from_le_bytes(word.try_into().expect("four bytes")))
        });
        code.send(cpu, 0x4500).send(cpu, 0x4600 | page >> 12)
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

/// From real mode at `page` to `to` in flat 32-bit protected mode.
fn trampoline(page: u32, to: u32) -> Vec<u8> {
    let at = |offset: u32| ((page + offset) as u16).to_le_bytes();
    let mut code = vec![0x0f, 0x01, 0x16]; // lgdt
    code.extend(at(0x78));
    code.extend([0x0f, 0x20, 0xc0, 0x0c, 0x01, 0x0f, 0x22, 0xc0, 0xea]); // cr0 |= 1; jmp 8:flat
    code.extend(at(0x20));
    code.extend([0x08, 0x00]);
    code.resize(0x20, 0x90);
    code.extend([0xb8, 0x10, 0, 0, 0, 0x8e, 0xd8, 0x8e, 0xd0, 0x8e, 0xc0, 0xb8]); // ds, ss, es; mov eax, to
    code.extend(to.to_le_bytes());
    code.extend([0xff, 0xe0]); // jmp eax
    code.resize(0x40, 0x90);
    for descriptor in [0_u64, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff] {
        code.extend(descriptor.to_le_bytes());
    }
    code.resize(0x78, 0);
    code.extend([0x17, 0]);
    code.extend((page + 0x40).to_le_bytes());
    code.resize(0x80, 0);
    code
}

/// Both vCPUs count on one page, pass messages by two others and interrupt each other; then vCPU 1 writes to the serial
/// port, and vCPU 0 ends the guest.
fn both(counts: u32, messages: u32) -> Vec<u8> {
    let first = Code::default()
        .set(SPURIOUS, 0x1ff)
        .start(1)
        .wait_for(STARTED, 1)
        .count(COUNT, counts)
        .set(COUNTED[0], 1)
        .wait_for(COUNTED[1], 1)
        .unless(COUNT, 2 * counts, &wrong())
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
    kernel(&[first, others])
}

/// All three vCPUs count on one page; then vCPU 1 interrupts vCPU 2, which answers with an interrupt of vCPU 0.
fn all_three(counts: u32) -> Vec<u8> {
    let first = Code::default()
        .set(SPURIOUS, 0x1ff)
        .start(1)
        .start(2)
        .count(COUNT, counts)
        .wait_for(COUNTED[1], 1)
        .wait_for(COUNTED[2], 1)
        .unless(COUNT, 3 * counts, &wrong())
        .set(STARTED, 1)
        .wait_for_bit(REQUESTS, 2)
        .bytes(&micro::say("all\n"))
        .bytes(&micro::power_off());
    let second = Code::default()
        .set(SPURIOUS, 0x1ff)
        .count(COUNT, counts)
        .set(COUNTED[1], 1)
        .wait_for(STARTED, 1)
        .send(2, 0x4040)
        .bytes(&micro::halt());
    let third = Code::default()
        .set(SPURIOUS, 0x1ff)
        .count(COUNT, counts)
        .set(COUNTED[2], 1)
        .wait_for_bit(REQUESTS, 1)
        .send(0, 0x4041)
        .bytes(&micro::halt());
    kernel(&[first, second, third])
}

/// A guest's kernel: the code of vCPU 0, and a page on that of each further one.
fn kernel(codes: &[Code]) -> Vec<u8> {
    let mut whole = Vec::new();
    for (page, code) in codes.iter().enumerate() {
        assert!(whole.len() <= page * 0x1000, "vCPU {page}'s code begins in its page");
        whole.resize(page * 0x1000, 0x90);
        whole.extend(&code.0);
    }
    micro::kernel(&whole)
}

/// What a vCPU does that has found a number wrong.
fn wrong() -> Vec<u8> {
    [micro::say("wrong\n"), micro::power_off()].concat()
}

/// vCPU 1 runs for ever; vCPU 0 has said so and halts.
fn endless() -> Vec<u8> {
    let first = Code::default()
        .set(SPURIOUS, 0x1ff)
        .start(1)
        .wait_for(STARTED, 1)
        .bytes(&micro::say("both run\n"))
        .bytes(&micro::halt());
    let others = Code::default().set(STARTED, 1).bytes(&[0xf0, 0xff, 0x05]).word(COUNT).bytes(&[0xeb, 0xf7]);
    kernel(&[first, others])
}

type End = Result<Exit, String>;

/// A guest that did not begin yet.
struct Ready {
    folder: tempfile::TempDir,
    hub: Hub,
    machine: Machine,
}

struct Running {
    folder: tempfile::TempDir,
    hub: Hub,
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

/// A guest of two vCPUs, the second one at `agent`, where `more` is in its configuration.
fn machine(agent: &Agent, kernel: &[u8], more: &str) -> Result<Ready, String> {
    spanning(&[(agent, 1, more)], kernel)
}

/// A guest of a vCPU here and so many at each of `agents`, which are called `pc2` and so on.
fn spanning(agents: &[(&Agent, u8, &str)], kernel: &[u8]) -> Result<Ready, String> {
    let folder = tempfile::tempdir().expect("a folder");
    let at = |name: &str| folder.path().join(name);
    std::fs::write(at("kernel"), kernel).expect("it writes");
    let count = 1 + agents.iter().map(|(_, count, _)| count).sum::<u8>();
    let mut text = format!(
        "name = 'both'\nkernel.image = 'kernel'\nserial.file = 'serial'\nmemory.size = '16M'\n[cpu]\ncount = {count}\n"
    );
    for (number, (agent, count, more)) in (2..).zip(agents) {
        text += &format!(
            "[[cpu.place]]\nnode = 'pc{number}'\nagent = '{}'\ninsecure = true\ncount = {count}\n{more}",
            agent.address
        );
    }
    let guest = Guest::parse(&at("guest.toml"), &text).unwrap_or_else(|mistakes| panic!("{mistakes}"));
    let hub = Hub::open(&guest.serial, HubOptions::default()).expect("a console");
    let serial = hub.clone();
    let options = Options { allow_unfit_kvm: true, identity: None, cache: None, serial, console: None };
    let machine = Machine::new(&guest, options).map_err(|error| error.to_string())?;
    Ok(Ready { folder, hub, machine })
}

fn run(agent: &Agent, kernel: &[u8], more: &str) -> Running {
    begin(machine(agent, kernel, more).unwrap_or_else(|why| panic!("{why}\n{}", agent.log())))
}

fn begin(Ready { folder, hub, machine }: Ready) -> Running {
    let controller = machine.controller();
    let (tell, end) = channel();
    thread::spawn(move || tell.send(machine.run().map_err(|error| error.to_string())));
    Running { folder, hub, end, controller }
}

impl Running {
    fn serial(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("serial")).unwrap_or_default()
    }

    fn ends(&self, agent: &Agent) -> End {
        let end = self.end.recv_timeout(LIMIT);
        // What the guest said last is in the file from here on.
        self.hub.finish();
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
fn vcpus_on_two_helpers_reach_each_other_by_way_of_the_console_node() {
    if !can_run() {
        return;
    }
    let (one, other) = (Agent::start(LENDS), Agent::start(LENDS));
    let machine = spanning(&[(&one, 1, ""), (&other, 1, "")], &all_three(2000));
    let guest = begin(machine.unwrap_or_else(|why| panic!("{why}\n{}\n{}", one.log(), other.log())));
    assert_eq!(guest.ends(&one), Ok(Exit::PoweredOff), "{}\n{}", guest.serial(), other.log());
    assert_eq!(guest.serial(), "all\n");
}

#[test]
fn a_vcpu_moves_between_pcs_while_it_works_and_loses_nothing() {
    use vmm::control::Controlled as _;
    if !can_run() {
        return;
    }
    let (one, other) = (Agent::start("[cpu]\ncount = 2\n"), Agent::start("[cpu]\ncount = 2\n"));
    let kernel = all_three(400_000);
    let machine = spanning(&[(&one, 1, "room = 2\n"), (&other, 1, "")], &kernel);
    let guest = begin(machine.unwrap_or_else(|why| panic!("{why}\n{}\n{}", one.log(), other.log())));
    until("all run", || guest.controller.counters()["coherence"]["fetched"] > 10);
    let places = || -> Vec<Vec<u8>> {
        guest.controller.status().places.into_iter().map(|place| place.vcpus).collect()
    };
    let moved = |vcpu, node| guest.controller.move_vcpu(vcpu, node).map_err(|why| why.to_string());
    assert_eq!(places(), [vec![0], vec![1], vec![2]]);
    let full = moved(1, "pc3").expect_err("there is no room");
    assert!(full.contains("raise `room`"), "{full}");
    assert!(moved(0, "pc2").expect_err("it stays").contains("vCPU 0 stays"));
    assert!(moved(1, "pc4").expect_err("nobody").contains("there are: console, pc2, pc3"));
    for (vcpu, node, after) in [
        (1, "console", [vec![0, 1], vec![], vec![2]]),
        (1, "console", [vec![0, 1], vec![], vec![2]]),
        (2, "pc2", [vec![0, 1], vec![2], vec![]]),
        (1, "pc2", [vec![0], vec![1, 2], vec![]]),
        (2, "pc3", [vec![0], vec![1], vec![2]]),
    ] {
        moved(vcpu, node).unwrap_or_else(|why| panic!("{vcpu} to {node}: {why}\n{}", one.log()));
        assert_eq!(places(), after);
    }
    let drained = |node| guest.controller.drain_vcpus(node).map_err(|why| why.to_string());
    assert_eq!(drained("pc3"), Ok(1), "to the other helper, which has room");
    assert_eq!(places(), [vec![0], vec![1, 2], vec![]]);
    assert_eq!(drained("pc2"), Ok(2));
    assert_eq!(places(), [vec![0, 2], vec![], vec![1]], "one goes to the helper that has room");
    assert_eq!(guest.ends(&one), Ok(Exit::PoweredOff), "{}\n{}", guest.serial(), other.log());
    assert_eq!(guest.serial(), "all\n");
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
    let _first = machine(&agent, &endless(), "").unwrap_or_else(|why| panic!("{why}"));
    let why = machine(&agent, &endless(), "").err().expect("it is refused");
    assert!(why.contains("1 are in use"), "{why}");
}
