//! What a guest sees of an agent that lends it memory.

mod common;

use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use common::systemd::Systemd;
use common::{Agent, LIMIT};
use nix::sys::signal::Signal;
use transport::blocking::{Client, Reply};
use transport::buffer::Buffer;
use transport::identity::testing::{Household, security};
use transport::identity::{Identity, Security};
use transport::wire::{Body, Class, MAX_PAYLOAD, Status};
use vmm::memory::store::packed::Packer;
use vmm::memory::store::protocol::{
    Absent, Forget, Lease, Lending, MAX_PAGES, Open, Opened, PAGE, Packing, Pages, Refusal, Take, Taken,
    flag, opcode, status,
};

/// Nobody loses a lease by being slow.
const MEMORY: &str = "lease_ttl = '60s'\n[memory]\nsize = '64M'\nlock = false\n";
/// Who does not renew a lease within two seconds may lose it.
const SOON: &str = "[memory]\nsize = '64M'\nlock = false\n";
/// Pages of a guest's RAM: more than one part of a store, and no whole number of them.
const RAM: u64 = 9000;

/// A guest's run, and one session of it.
struct Guest {
    client: Client,
    lease: Lease,
    instance: u128,
    /// The answer to the lease request.
    taken: Taken,
}

fn client(agent: &Agent) -> Client {
    Client::new(&agent.address, "guest@test", &Security::Plain, None).expect("a client")
}

fn ask(client: &mut Client, opcode: u16, body: &[u8], payload: Vec<u8>, answer_len: usize) -> Reply {
    client.call(Class::Normal, opcode, body, payload, answer_len, LIMIT).unwrap_or_else(|e| panic!("{e}"))
}

fn take(client: &mut Client, asked: &Take) -> Result<Taken, (Status, Refusal)> {
    let reply = ask(client, opcode::LEASE, &asked.encode(), Vec::new(), 0);
    match reply.status {
        Status::OK => Ok(Taken::decode(&reply.body).expect("taken")),
        status => Err((status, Refusal::decode(&reply.body).expect("a refusal"))),
    }
}

fn want(holder: u128, quota: u64) -> Take {
    Take { holder, expected: 0, pages: RAM, quota, guest: format!("guest-{holder}") }
}

/// Asks until the answer is not that something is being cleared.
fn take_waiting(client: &mut Client, asked: &Take) -> Taken {
    let until = Instant::now() + LIMIT;
    loop {
        match take(client, asked) {
            Ok(taken) => return taken,
            Err((status::NO_MEMORY, refusal)) if !refusal.wait.is_zero() && Instant::now() < until => {
                thread::sleep(refusal.wait.min(Duration::from_millis(200)));
            }
            Err((status, refusal)) => panic!("{status:?} {}", refusal.text),
        }
    }
}

fn client_of(agent: &Agent, identity: &Arc<Identity>) -> Client {
    Client::new(&agent.address, "guest@test", &security(identity), Some("pc2")).expect("a client")
}

impl Guest {
    fn new(agent: &Agent, holder: u128, quota: u64) -> Self {
        Self::over(client(agent), holder, quota)
    }

    fn over(mut client: Client, holder: u128, quota: u64) -> Self {
        let taken = take_waiting(&mut client, &want(holder, quota));
        let lease = Lease { epoch: taken.epoch, holder };
        let mut guest = Self { client, lease, instance: taken.instance, taken };
        guest.open().expect("it opens");
        guest
    }

    /// One more session.
    fn session(&self, agent: &Agent) -> Self {
        let mut session =
            Self { client: client(agent), lease: self.lease, instance: self.instance, taken: self.taken };
        session.open().expect("it opens");
        session
    }

    fn ask(&mut self, opcode: u16, body: &[u8]) -> Reply {
        ask(&mut self.client, opcode, body, Vec::new(), 0)
    }

    fn open(&mut self) -> Result<Opened, Status> {
        let open = Open { epoch: self.lease.epoch, holder: self.lease.holder, instance: self.instance };
        let reply = self.ask(opcode::OPEN, &open.encode());
        if reply.status == Status::OK {
            Ok(Opened::decode(&reply.body).expect("opened"))
        } else {
            Err(reply.status)
        }
    }

    fn pages(&self, first: u64, count: u32) -> Body {
        Pages { epoch: self.lease.epoch, first, count, flags: 0 }.encode()
    }

    fn try_store(&mut self, first: u64, content: Vec<u8>) -> Status {
        let body = self.pages(first, (content.len() / PAGE) as u32);
        ask(&mut self.client, opcode::STORE, &body, content, 0).status
    }

    fn store(&mut self, first: u64, content: Vec<u8>) {
        assert_eq!(self.try_store(first, content), Status::OK);
    }

    fn try_fetch(&mut self, first: u64, count: u32) -> Reply {
        let body = self.pages(first, count);
        ask(&mut self.client, opcode::FETCH, &body, Vec::new(), count as usize * PAGE)
    }

    fn fetch(&mut self, first: u64, count: u32) -> Vec<u8> {
        let reply = self.try_fetch(first, count);
        assert_eq!(reply.status, Status::OK);
        reply.payload
    }

    /// The first page of a fetch that is not there.
    fn absent(&mut self, first: u64, count: u32) -> u64 {
        let reply = self.try_fetch(first, count);
        assert_eq!((reply.status, reply.payload.len()), (status::ABSENT, 0), "never zeros");
        Absent::decode(&reply.body).expect("a page").page
    }

    fn forget(&mut self, ranges: &[(u64, u64)]) -> Status {
        let ranges = ranges.iter().map(|(first, count)| *first..first + count).collect();
        let body = Forget { epoch: self.lease.epoch, ranges }.encode();
        self.ask(opcode::FORGET, &body).status
    }

    fn renew(&mut self) -> Status {
        let body = self.lease.encode();
        self.ask(opcode::RENEW, &body).status
    }

    fn release(&mut self) {
        let body = self.lease.encode();
        assert_eq!(self.ask(opcode::RELEASE, &body).status, Status::OK);
    }
}

/// `count` pages that differ from each other and by `seed`.
fn content(first: u64, count: u64, seed: u8) -> Vec<u8> {
    (first..first + count).flat_map(|page| std::iter::repeat_n(seed ^ page as u8, PAGE)).collect()
}

fn lending(agent: &Agent) -> Lending {
    let reply = ask(&mut client(agent), opcode::STATUS, &[], Vec::new(), MAX_PAYLOAD);
    serde_json::from_slice(&reply.payload).expect("JSON")
}

/// The memory that the agent's process holds for guests, by its files in RAM.
fn held_by(agent: &Agent) -> u64 {
    let folder = format!("/proc/{}/fd", agent.pid());
    let entries = std::fs::read_dir(folder).expect("the process").map_while(Result::ok);
    let memory = entries.filter(|entry| {
        std::fs::read_link(entry.path()).is_ok_and(|to| to.to_string_lossy().contains("memfd:omega-memory"))
    });
    memory.filter_map(|entry| std::fs::metadata(entry.path()).ok()).map(|file| file.blocks() * 512).sum()
}

fn wait_for(what: &str, agent: &Agent, mut is_so: impl FnMut() -> bool) {
    let until = Instant::now() + LIMIT;
    while !is_so() {
        assert!(Instant::now() < until, "{what} never comes:\n{}", agent.log());
        thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn what_one_session_stores_every_session_of_the_lease_fetches_until_it_is_forgotten() {
    let agent = Agent::start(MEMORY);
    let mut one = Guest::new(&agent, 1, 2000);
    let mut two = one.session(&agent);
    let most = u64::from(MAX_PAGES);
    let first = 4096 - 100;
    one.store(first, content(first, most, 7));
    assert!(two.fetch(first, MAX_PAGES) == content(first, most, 7));
    two.store(first + 5, content(first + 5, 2, 9));
    assert!(one.fetch(first + 4, 2) == [content(first + 4, 1, 7), content(first + 5, 1, 9)].concat());
    assert_eq!(one.absent(first - 1, 3), first - 1);
    assert_eq!(one.absent(first + most - 1, 2), first + most);
    assert_eq!(two.forget(&[(first + 10, 3), (0, 5), (first, 1)]), Status::OK);
    assert_eq!(one.absent(first + 8, 4), first + 10);
    assert_eq!(one.absent(first, 1), first);
    let opened = one.open().expect("again");
    let expected = Opened { pages: RAM, quota: 2000, used: most - 4, flags: flag::PACKED };
    assert_eq!(opened, expected);
    let lending = lending(&agent);
    assert_eq!((lending.size, lending.leased, lending.used), (64 << 20, 2000 * 4096, (most - 4) * 4096));
    assert_eq!(lending.free, (64 << 20) - 2000 * 4096);
    let lent = &lending.leases[0];
    assert_eq!((lent.guest.as_str(), lent.ram, lent.connections), ("guest-1", RAM * 4096, 2));
    assert!(!lending.survives && !lending.locked);
}

#[test]
fn every_wrong_request_has_its_answer_and_changes_nothing() {
    let agent = Agent::start(MEMORY);
    let mut guest = Guest::new(&agent, 1, 4);
    guest.store(10, content(10, 4, 1));
    let epoch = guest.lease.epoch;
    let pages = |epoch, first, count, flags| Pages { epoch, first, count, flags }.encode();
    let fetch = |guest: &mut Guest, body: &[u8], len: usize| {
        ask(&mut guest.client, opcode::FETCH, body, Vec::new(), len).status
    };
    let all_wrong = [
        (pages(epoch + 1, 10, 1, 0), PAGE, status::GONE),
        (pages(0, 10, 1, 0), PAGE, status::GONE),
        (pages(epoch, 10, 1, 2), PAGE, status::UNSUPPORTED),
        (pages(epoch, 10, 2, 0), PAGE, Status::MALFORMED),
        (pages(epoch, 10, 0, 0), 0, status::OUT_OF_RANGE),
        (pages(epoch, RAM, 1, 0), PAGE, status::OUT_OF_RANGE),
        (pages(epoch, u64::MAX, 2, 0), 2 * PAGE, status::OUT_OF_RANGE),
        (pages(epoch, 10, u32::MAX, 0), PAGE, Status::MALFORMED),
        (Body::from_slice(&[1; 23]), PAGE, Status::MALFORMED),
    ];
    for (body, len, expected) in &all_wrong {
        assert_eq!(fetch(&mut guest, body, *len), *expected, "{body:?}");
        let store = ask(&mut guest.client, opcode::STORE, body, vec![9; *len], 0).status;
        assert_eq!(store, *expected, "{body:?}");
    }
    assert_eq!(guest.try_store(20, content(20, 1, 2)), status::FULL);
    assert_eq!(guest.try_store(9, content(9, 2, 2)), status::FULL);
    assert_eq!(guest.forget(&[(RAM - 1, 2)]), status::OUT_OF_RANGE);
    assert_eq!(guest.forget(&[(0, RAM), (0, 1)]), status::OUT_OF_RANGE, "more than there is in all");
    assert_eq!(guest.ask(opcode::FORGET, &[0; 8]).status, Status::MALFORMED);
    for op in [opcode::LEASE, opcode::RENEW, opcode::RELEASE, opcode::OPEN] {
        assert_eq!(guest.ask(op, &[1; 5]).status, Status::MALFORMED, "{op:#x}");
    }
    // The numbers of another holder, or of other memory.
    let strangers = [
        Open { epoch, holder: 2, instance: guest.instance },
        Open { epoch: epoch + 1, holder: 1, instance: guest.instance },
        Open { epoch, holder: 1, instance: guest.instance ^ 1 },
    ];
    let mut other = client(&agent);
    for open in strangers {
        assert_eq!(ask(&mut other, opcode::OPEN, &open.encode(), Vec::new(), 0).status, status::GONE);
    }
    assert_eq!(
        ask(&mut other, opcode::FETCH, &guest.pages(10, 1), Vec::new(), PAGE).status,
        status::NOT_OPEN
    );
    let stranger = Lease { epoch, holder: 2 }.encode();
    assert_eq!(ask(&mut other, opcode::RENEW, &stranger, Vec::new(), 0).status, status::GONE);
    assert_eq!(ask(&mut other, opcode::RELEASE, &stranger, Vec::new(), 0).status, Status::OK);
    assert_eq!(ask(&mut other, opcode::STATUS, &[], Vec::new(), 3).status, Status::MALFORMED);
    assert_eq!(ask(&mut other, 0x0213, &[], Vec::new(), 0).status, Status::UNKNOWN_OPERATION);
    assert!(guest.fetch(10, 4) == content(10, 4, 1), "all is as it was");
    guest.store(10, content(10, 4, 3));
    assert!(guest.fetch(10, 4) == content(10, 4, 3), "what is held may be replaced though the quota is full");
}

#[test]
fn pages_that_come_packed_are_stored_whole_and_packed_again_only_for_who_takes_them_so() {
    let agent = Agent::start(MEMORY);
    let mut guest = Guest::new(&agent, 1, 600);
    let epoch = guest.lease.epoch;
    let pages = |first, count| Pages { epoch, first, count, flags: flag::PACKED }.encode();
    let store = |guest: &mut Guest, first, count, payload: &[u8]| {
        ask(&mut guest.client, opcode::STORE, &pages(first, count), payload.to_vec(), 0).status
    };
    let whole = content(10, 256, 5);
    let packed = Packer::default().pack(&Buffer::from_vec(whole.clone())).expect("it shrinks").to_vec();
    assert_eq!(store(&mut guest, 10, 256, &packed), Status::OK);
    assert!(guest.fetch(10, 256) == whole, "nobody sees how it came");
    // Nothing of what makes no sense is stored.
    let wrong: [(u32, &[u8], Status); 7] = [
        (256, &packed[..packed.len() - 1], Status::MALFORMED),
        (255, &packed, Status::MALFORMED),
        (1, &whole[..PAGE], Status::MALFORMED),
        (1, &[], Status::MALFORMED),
        (0, &[], status::OUT_OF_RANGE),
        (257, &packed, status::OUT_OF_RANGE),
        (u32::MAX, &packed, status::OUT_OF_RANGE),
    ];
    for (count, payload, expected) in wrong {
        assert_eq!(store(&mut guest, 300, count, payload), expected, "{count} pages in {}", payload.len());
    }
    assert_eq!(guest.absent(300, 1), 300);
    assert_eq!(store(&mut guest, RAM, 256, &packed), status::OUT_OF_RANGE);
    let mut fetch = |first: u64, count: u32| {
        let room = count as usize * PAGE;
        ask(&mut guest.client, opcode::FETCH, &pages(first, count), Vec::new(), room)
    };
    let reply = fetch(10, 256);
    assert!(
        Packing::decode(&reply.body).expect("it says so").packed && reply.payload.len() < whole.len() / 8
    );
    let into = Buffer::zeroed(whole.len());
    let came = Buffer::from_vec(reply.payload);
    Packer::default().unpack(&came, came.len(), &into).expect("it is packed");
    assert!(into.to_vec() == whole);
    assert_eq!(fetch(300, 1).status, status::ABSENT);
    // What does not shrink comes as it is.
    let mut x = 1u64;
    let mut next = || {
        x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (x >> 33) as u8
    };
    let hard: Vec<u8> = (0..2 * PAGE).map(|_| next()).collect();
    guest.store(400, hard.clone());
    let reply = ask(&mut guest.client, opcode::FETCH, &pages(400, 2), Vec::new(), 2 * PAGE);
    assert!(!Packing::decode(&reply.body).expect("it says so").packed && reply.payload == hard);
}

#[test]
fn nobody_leases_more_than_is_lent_and_the_answer_says_how_much_is_free() {
    let agent = Agent::start("");
    let refused = take(&mut client(&agent), &want(1, 10)).expect_err("none is lent");
    assert_eq!(refused.0, status::NO_MEMORY);
    assert!(refused.1.text.contains("no `[memory]`") && refused.1.wait.is_zero(), "{}", refused.1.text);
    let agent = Agent::start(&MEMORY.replace("64M", "16M"));
    let mut first = Guest::new(&agent, 1, 3072);
    let (code, refusal) = take(&mut client(&agent), &want(2, 1025)).expect_err("too much");
    assert_eq!(code, status::NO_MEMORY);
    let text = refusal.text;
    assert!(text.contains("of 16M") && text.contains("4M are free") && !text.contains("guest-1"), "{text}");
    let mut second = Guest::new(&agent, 2, 1024);
    // A full guest is refused, and the others go on.
    for first in (0..1024).step_by(256) {
        second.store(first, content(first, 256, 1));
    }
    assert_eq!(second.try_store(1024, content(0, 1, 1)), status::FULL);
    first.store(0, content(0, 256, 2));
    assert!(first.fetch(0, 256) == content(0, 256, 2));
    assert!(second.fetch(768, 256) == content(768, 256, 1));
    // A lease grows and shrinks as far as it can.
    let resize = |guest: &mut Guest, quota| {
        let asked = Take { expected: guest.lease.epoch, ..want(guest.lease.holder, quota) };
        take(&mut guest.client, &asked).map(|taken| taken.instance).map_err(|(code, _)| code)
    };
    assert_eq!(resize(&mut second, 1025), Err(status::NO_MEMORY));
    assert_eq!(resize(&mut second, 1023), Err(status::FULL));
    assert_eq!(resize(&mut first, 3000), Ok(first.instance));
    assert_eq!(resize(&mut second, 1096), Ok(second.instance));
    second.store(1024, content(1024, 72, 1));
    assert_eq!(second.try_store(1500, content(0, 1, 1)), status::FULL);
    let other_ram = Take { expected: first.lease.epoch, pages: RAM + 1, ..want(1, 3000) };
    assert_eq!(take(&mut first.client, &other_ram).expect_err("another guest").0, status::OUT_OF_RANGE);
    let other_holder = Take { expected: first.lease.epoch, ..want(3, 3000) };
    assert_eq!(take(&mut first.client, &other_holder).expect_err("not its own").0, status::GONE);
    // Numbers of pages cost something too.
    let huge = Take { pages: 1 << 32, ..want(3, 1) };
    assert_eq!(take(&mut client(&agent), &huge).expect_err("too much RAM").0, status::NO_MEMORY);
}

#[test]
fn a_lease_that_is_given_back_is_gone_at_once_and_its_memory_nobodys() {
    let agent = Agent::start(MEMORY);
    let mut guest = Guest::new(&agent, 1, 16384.min(RAM));
    for first in (0..8192).step_by(256) {
        guest.store(first, content(first, 256, 5));
    }
    assert!(held_by(&agent) >= 8192 * 4096);
    let mut session = guest.session(&agent);
    guest.release();
    for guest in [&mut guest, &mut session] {
        assert_eq!(guest.try_fetch(0, 1).status, status::GONE);
        assert_eq!(guest.try_store(0, content(0, 1, 1)), status::GONE);
        assert_eq!(guest.forget(&[(0, 1)]), status::GONE);
        assert_eq!(guest.renew(), status::GONE);
        assert_eq!(guest.open(), Err(status::GONE));
    }
    guest.release();
    // All of it is lent again, to a guest that finds nothing.
    let mut next = Guest::new(&agent, 2, RAM);
    assert!(next.lease.epoch > guest.lease.epoch && next.instance != guest.instance);
    for first in (0..RAM).step_by(500) {
        assert_eq!(next.absent(first, 1), first);
    }
    drop(session);
    wait_for("all memory back", &agent, || held_by(&agent) < 4 << 20);
}

#[test]
fn a_holder_that_takes_a_new_lease_finds_none_of_its_old_pages() {
    let agent = Agent::start(MEMORY);
    let mut guest = Guest::new(&agent, 1, 100);
    guest.store(0, content(0, 100, 5));
    let mut again = Guest::new(&agent, 1, RAM);
    assert_eq!(again.absent(0, 1), 0);
    assert_eq!(guest.try_fetch(0, 1).status, status::GONE);
    assert_eq!(lending(&agent).leases.len(), 1);
}

#[test]
fn a_lease_that_nobody_renews_expires_and_one_that_is_renewed_does_not() {
    let agent = Agent::start(&format!("{SOON}keep = '5s'\n"));
    let mut silent = Guest::new(&agent, 1, 100);
    silent.store(0, content(0, 100, 1));
    let mut alive = Guest::new(&agent, 2, 100);
    alive.store(0, content(0, 100, 2));
    wait_for("the end of a lease", &agent, || {
        assert_eq!(alive.renew(), Status::OK);
        lending(&agent).leases.len() == 1
    });
    assert!(alive.fetch(0, 100) == content(0, 100, 2));
    assert_eq!(silent.try_fetch(0, 1).status, status::GONE);
    assert!(agent.log().contains("was not renewed"), "{}", agent.log());
    wait_for("its memory back", &agent, || lending(&agent).used == 100 * 4096);
}

#[test]
fn memory_of_a_guest_that_went_silent_is_anothers_when_that_needs_it_and_stays_until_then() {
    let agent = Agent::start(SOON);
    let mut silent = Guest::new(&agent, 1, RAM);
    silent.store(0, content(0, 256, 1));
    let mut needs = client(&agent);
    let asked = want(2, 12000);
    let asked = Take { pages: 20000, ..asked };
    let (code, refusal) = take(&mut needs, &asked).expect_err("it is leased");
    assert_eq!(code, status::NO_MEMORY, "{}", refusal.text);
    // It asks until the other's time is over.
    let until = Instant::now() + LIMIT;
    while take(&mut needs, &asked).is_err() {
        assert!(Instant::now() < until, "{}", agent.log());
        thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(silent.try_fetch(0, 1).status, status::GONE);
    assert!(agent.log().contains("its memory is wanted"), "{}", agent.log());
}

#[test]
fn a_lease_does_not_expire_while_the_agent_stands_still() {
    let agent = Agent::start(&format!("{SOON}keep = '4s'\n"));
    let mut guest = Guest::new(&agent, 1, 100);
    guest.store(0, content(0, 100, 1));
    agent.signal(Signal::SIGSTOP);
    thread::sleep(Duration::from_secs(5));
    agent.signal(Signal::SIGCONT);
    let reply = guest.try_fetch(0, 100);
    // The transport may have given the connection up meanwhile, and then the session is another one.
    if reply.status == status::NOT_OPEN {
        guest.open().expect("the lease goes on");
    }
    assert!(guest.fetch(0, 100) == content(0, 100, 1));
}

#[test]
fn memory_survives_a_kill_and_a_restart_of_the_agent_under_systemd() {
    let mut agent = Agent::start(MEMORY);
    agent.end(Signal::SIGTERM);
    agent.systemd = Some(Systemd::start(agent.folder.path()));
    agent.run();
    let mut guest = Guest::new(&agent, 1, 2000);
    let mut ended = Guest::new(&agent, 2, 10);
    ended.store(0, content(0, 10, 3));
    assert!(lending(&agent).survives);
    let mut stored = Vec::new();
    for round in 0..4u64 {
        let first = 4000 + 200 * round;
        guest.store(first, content(first, 190, round as u8));
        stored.push((first, round as u8));
        guest.forget(&[(first + 180, 10)]);
        let signal = if round % 2 == 0 { Signal::SIGKILL } else { Signal::SIGTERM };
        agent.end(signal);
        agent.run();
        assert_eq!(guest.try_fetch(4000, 1).status, status::NOT_OPEN, "a session is the process's");
        let opened = guest.open().expect("the lease goes on");
        assert_eq!((opened.used, opened.quota), (180 * stored.len() as u64, 2000));
        for (first, seed) in &stored {
            assert!(guest.fetch(*first, 180) == content(*first, 180, *seed), "round {round}");
            assert_eq!(guest.absent(first + 179, 2), first + 180);
        }
        if round == 1 {
            ended.open().expect("it goes on too");
            ended.release();
        }
    }
    let names = || agent.systemd.as_ref().expect("systemd").names();
    wait_for("what ended is kept no longer", &agent, || names().len() == 1);
    assert_eq!(ended.open(), Err(status::GONE));
    // A new lease is above what was taken over, even if the agent's table is lost.
    agent.end(Signal::SIGKILL);
    std::fs::remove_file(agent.path("state/leases.json")).expect("it is there");
    agent.run();
    guest.open().expect("the lease goes on");
    let fresh = Guest::new(&agent, 3, 10);
    assert!(fresh.lease.epoch > guest.lease.epoch);
    // An agent that lends nothing any more gives it up.
    agent.end(Signal::SIGKILL);
    agent.configure("");
    agent.run();
    wait_for("nothing is kept", &agent, || agent.systemd.as_ref().expect("systemd").names().is_empty());
    assert_eq!(guest.open(), Err(status::GONE));
}

#[test]
fn without_systemd_a_restart_loses_memory_and_says_so() {
    let mut agent = Agent::start(MEMORY);
    let mut guest = Guest::new(&agent, 1, 100);
    guest.store(0, content(0, 100, 1));
    agent.end(Signal::SIGTERM);
    wait_for("a word about it", &agent, || agent.log().contains("ends with this process"));
    agent.run();
    assert_eq!(guest.try_fetch(0, 1).status, status::GONE);
    assert_eq!(guest.open(), Err(status::GONE));
    let confirm = Take { expected: guest.lease.epoch, ..want(1, 100) };
    assert_eq!(take(&mut guest.client, &confirm).expect_err("lost").0, status::GONE);
    let mut again = Guest::new(&agent, 1, 100);
    assert!(again.lease.epoch > guest.lease.epoch && again.instance != guest.instance);
    assert_eq!(again.absent(0, 100), 0);
}

#[test]
fn a_node_leases_what_its_table_gives_it_and_touches_nobody_elses_memory() {
    let house = Household::new();
    let folder = house.folder(&house.agent("pc2"));
    let agent = Agent::start(&format!(
        "identity = '{}'\n{MEMORY}\
         [[allow]]\nnodes = ['desk', 'lap']\nmemory = '20M'\n\
         [[allow]]\nnodes = ['desk']\nmemory = '8M'\n\
         [[allow]]\nnodes = ['den']\nvcpus = 1\n",
        folder.display()
    ));
    let [desk, lap, den] = ["desk", "lap", "den"].map(|name| house.console(name));
    let mut one = Guest::over(client_of(&agent, &desk), 1, 3000);
    one.store(7, content(7, 5, 1));
    let mut too_much = client_of(&agent, &desk);
    let (code, refusal) = take(&mut too_much, &want(2, 2121)).expect_err("more than 20M in all");
    assert_eq!(code, status::FORBIDDEN);
    assert!(refusal.text.contains("20M"), "{}", refusal.text);
    let other = Guest::over(too_much, 2, 2120);
    let (code, refusal) = take(&mut client_of(&agent, &den), &want(3, 1)).expect_err("it has none");
    assert_eq!(code, status::FORBIDDEN);
    assert!(refusal.text.contains("node den may lease no memory"), "{}", refusal.text);
    wait_for("a line in the log", &agent, || agent.log().contains("den may lease no memory"));
    // Whoever knows all numbers of the lease is another node still.
    for thief in [&lap, &den] {
        let mut thief = client_of(&agent, thief);
        let lease = one.lease.encode();
        let open = Open { epoch: one.lease.epoch, holder: 1, instance: one.instance }.encode();
        let mut ask = |opcode, body: &[u8]| ask(&mut thief, opcode, body, Vec::new(), PAGE).status;
        assert!([status::GONE, status::FORBIDDEN].contains(&ask(opcode::OPEN, &open)));
        assert_eq!(ask(opcode::RENEW, &lease), status::GONE);
        assert_eq!(ask(opcode::RELEASE, &lease), Status::OK, "as if it were over");
        assert_eq!(ask(opcode::FETCH, &one.pages(7, 1)), status::GONE);
        let again = Take { expected: one.lease.epoch, ..want(1, 10) }.encode();
        assert!([status::GONE, status::FORBIDDEN].contains(&ask(opcode::LEASE, &again)));
    }
    // The same holder's number at another node is another holder's.
    let lap_one = Guest::over(client_of(&agent, &lap), 1, 100);
    assert!(one.fetch(7, 5) == content(7, 5, 1));
    let status = |identity: &Arc<Identity>| {
        let reply = ask(&mut client_of(&agent, identity), opcode::STATUS, &[], Vec::new(), MAX_PAYLOAD);
        serde_json::from_slice::<Lending>(&reply.payload).map_err(|_| reply.status)
    };
    let seen = status(&desk).expect("it may");
    assert_eq!((seen.free, seen.leases.len()), (0, 3), "what of its 20M is left");
    assert_eq!(seen.leases[0].node.as_deref(), Some("desk"));
    assert_eq!(status(&lap).expect("it may").free, (20 << 20) - 100 * 4096);
    let den_sees = status(&den).expect("it may use something here");
    assert_eq!((den_sees.free, den_sees.leases.len()), (0, 0), "and not whose guests use memory");
    drop((other, lap_one));
}

#[test]
fn the_numbers_of_memory_are_served_to_prometheus_and_shown_by_the_command_line() {
    let port = common::free_port();
    let agent = Agent::start(&format!("metrics = '127.0.0.1:{port}'\n{MEMORY}"));
    let mut guest = Guest::new(&agent, 1, 256);
    guest.store(0, content(0, 200, 1));
    guest.fetch(3, 5);
    let mut text = String::new();
    let mut stream = std::net::TcpStream::connect(("127.0.0.1", port)).expect("it answers");
    std::io::Write::write_all(&mut stream, b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        .expect("sent");
    std::io::Read::read_to_string(&mut stream, &mut text).expect("an answer");
    let lease = format!("{{guest=\"guest-1\",node=\"\",lease=\"{}\"}}", guest.lease.epoch);
    for line in [
        "omega_agent_memory_size_bytes 67108864".to_owned(),
        "omega_agent_memory_leased_bytes 1048576".to_owned(),
        "omega_agent_memory_stored_bytes 819200".to_owned(),
        format!("omega_agent_memory_lease_stored_pages_total{lease} 200"),
        format!("omega_agent_memory_lease_fetched_pages_total{lease} 5"),
    ] {
        assert!(text.lines().any(|l| l == line), "{line} in {text}");
    }
    assert!(text.contains("operation=\"fetch\"") && text.contains("operation=\"store\""), "{text}");
    let run = |words: &[&str]| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_omega-agent"));
        let output = command.arg("--config").arg(agent.config()).args(words).output().expect("it runs");
        (output.status.code(), String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned())
    };
    let (code, text) = run(&["memory"]);
    assert!(code == Some(0) && text.contains("guest-1") && text.contains("819200"), "{text}");
    let json: Lending = serde_json::from_str(&run(&["memory", "--json"]).1).expect("JSON");
    assert_eq!(json.leases.len(), 1);
    let inventory =
        ask(&mut guest.client, devices::disk::volume::opcode::INVENTORY, &[], Vec::new(), MAX_PAYLOAD);
    let inventory: serde_json::Value = serde_json::from_slice(&inventory.payload).expect("JSON");
    assert_eq!(inventory["memory"]["lent"]["used"], 819_200);
    assert!(run(&["validate"]).1.contains("64M of memory"), "{}", run(&["validate"]).1);
    agent.configure("[memory]\nsize = '512T'\n");
    let (code, text) = run(&["validate"]);
    assert!(code == Some(1) && text.contains("smaller `size`") && text.lines().count() == 1, "{text}");
}

#[test]
fn what_is_stored_is_locked_into_ram_where_the_configuration_says_so() {
    // Small enough for whoever may lock little.
    let mut agent = Agent::start("[memory]\nsize = '2M'\n");
    agent.end(Signal::SIGTERM);
    agent.systemd = Some(Systemd::start(agent.folder.path()));
    agent.run();
    let mut client = client(&agent);
    let asked = Take { pages: 300, ..want(1, 200) };
    let taken = take(&mut client, &asked).unwrap_or_else(|(_, refusal)| panic!("{}", refusal.text));
    let lease = Lease { epoch: taken.epoch, holder: 1 };
    let mut guest = Guest { client, lease, instance: taken.instance, taken };
    guest.open().expect("it opens");
    let locked = |agent: &Agent| {
        let maps = std::fs::read_to_string(format!("/proc/{}/smaps", agent.pid())).expect("readable");
        let memory = maps.split("\n").skip_while(|line| !line.contains("memfd:omega-memory"));
        let locked = memory.skip(1).take_while(|line| !line.contains("-") || line.contains(':'));
        let line = locked.into_iter().find(|line| line.starts_with("Locked:")).expect("a line").to_owned();
        line.split_whitespace().nth(1).expect("a number").parse::<u64>().expect("a number")
    };
    assert!(lending(&agent).locked);
    guest.store(10, content(10, 150, 1));
    assert!((600..800).contains(&locked(&agent)), "{} KiB", locked(&agent));
    agent.restart();
    assert!((600..800).contains(&locked(&agent)), "{} KiB", locked(&agent));
    guest.client = crate::client(&agent);
    guest.open().expect("the lease goes on");
    guest.forget(&[(10, 140)]);
    assert!(locked(&agent) < 200, "{} KiB", locked(&agent));
    assert!(guest.fetch(150, 10) == content(150, 10, 1));
}

#[test]
fn no_bytes_of_a_peer_harm_the_agent_or_another_guest() {
    let agent = Agent::start(MEMORY);
    let mut good = Guest::new(&agent, 1, 500);
    good.store(0, content(0, 256, 7));
    let mut evil = Guest::new(&agent, 2, 300);
    let mut random = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = move |limit: u64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random % limit
    };
    let edges =
        [0, 1, 63, 64, 255, 256, 4095, 4096, RAM - 1, RAM, u64::from(u32::MAX), u64::MAX - 1, u64::MAX];
    for _ in 0..3000 {
        let mut number = || edges[next(edges.len() as u64) as usize];
        let (first, end, epoch) = (number(), number(), evil.lease.epoch);
        let count = number() as u32;
        let body = match next(5) {
            0 => Pages { epoch, first, count, flags: 0 }.encode(),
            1 => {
                Pages { epoch, first: next(RAM + 2), count: next(260) as u32, flags: next(2) as u32 }.encode()
            }
            2 => Forget { epoch, ranges: [first..end, end..first].into_iter().collect() }.encode(),
            3 => Forget { epoch, ranges: std::iter::once(next(RAM)..next(RAM + 2)).collect() }.encode(),
            _ => (0..next(60)).map(|_| next(256) as u8).collect(),
        };
        let opcodes =
            [opcode::FETCH, opcode::STORE, opcode::FORGET, opcode::OPEN, opcode::RENEW, opcode::STATUS];
        let op = opcodes[next(6) as usize];
        let pages = Pages::decode(&body).map_or(0, |p| (p.count as usize).min(256));
        let len = if next(8) == 0 { next(9000) as usize } else { pages * PAGE };
        let (payload, answer) = if op == opcode::STORE { (vec![1; len], 0) } else { (Vec::new(), len) };
        ask(&mut evil.client, op, &body, payload, answer);
    }
    assert!(good.fetch(0, 256) == content(0, 256, 7));
    let lending = lending(&agent);
    let evils = lending.leases.iter().find(|lent| lent.guest == "guest-2").expect("its lease");
    assert!(evils.used <= evils.quota);
    // What is stored, and three tables.
    assert!(held_by(&agent) <= lending.used + (1 << 20), "{} {}", held_by(&agent), lending.used);
    evil.release();
    wait_for("its memory back", &agent, || lending_used(&agent) == 256 * 4096);
}

fn lending_used(agent: &Agent) -> u64 {
    lending(agent).used
}
