//! A real agent that has an identity: who may connect, who may do what, and who is cut.
#![allow(missing_docs)]

mod common;

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use common::{Agent, Driver, LIMIT};
use devices::disk::remote::{ConnectError, Options, connect};
use devices::disk::volume::{
    Access, Acquire, Acquired, Lease, Open, Opened, Refusal, Volume, opcode, status,
};
use devices::disk::{Disk, Operation};
use nix::sys::signal::Signal;
use transport::blocking::{Client, Reply};
use transport::buffer::Buffer;
use transport::identity::testing::{Household, security};
use transport::identity::{Identity, Reloading, Role, Roles, Security, revocation};
use transport::wire::{Class, MAX_PAYLOAD, Status};

const VOLUMES: &str = "[[volume]]\nname = 'v'\npath = 'DIR/v.img'\ncreate = '1M'\n\
                       [[volume]]\nname = 'w'\npath = 'DIR/w.img'\ncreate = '1M'\n";

fn agent(house: &Household, more: &str) -> Agent {
    let folder = house.folder(&house.agent("pc2"));
    Agent::start(&format!("identity = '{}'\n{VOLUMES}{more}", folder.display()))
}

fn options(agent: &Agent, volume: &str, identity: &Arc<Identity>, node: Option<&str>) -> Options {
    Options { security: security(identity), node: node.map(str::to_owned), ..agent.options(volume) }
}

fn client(agent: &Agent, security: &Security) -> Client {
    Client::new(&agent.address, "tester", security, Some("pc2")).expect("a client")
}

fn ask(client: &mut Client, opcode: u16, body: &[u8]) -> Reply {
    client
        .call(Class::Control, opcode, body, Vec::new(), MAX_PAYLOAD, LIMIT)
        .unwrap_or_else(|why| panic!("{opcode:#x}: {why}"))
}

fn acquire(volume: &str, holder: u128) -> transport::wire::Body {
    Acquire { volume: volume.into(), holder, expected: 0, name: "g".into() }.encode()
}

fn why(reply: &Reply) -> String {
    Refusal::decode(&reply.body).expect("a refusal").text
}

#[test]
fn a_console_of_the_household_uses_a_volume_of_the_node_that_it_expects_and_of_no_other() {
    let house = Household::new();
    let agent = agent(&house, "");
    let desk = house.console("desk");
    let disk = connect(options(&agent, "v", &desk, Some("pc2")), LIMIT).expect("it connects");
    let mut disk = Driver::new(disk);
    disk.write(4096, &[7; 512]).expect("it writes");
    assert_eq!(disk.read(4096, 512), [7; 512]);
    assert!(agent.log().contains("node desk (calls itself"), "{}", agent.log());
    disk.close();
    let other = connect(options(&agent, "v", &desk, Some("pc3")), Duration::from_secs(3));
    assert!(matches!(other, Err(ConnectError::Unreachable { .. })), "it is not pc3");
}

#[test]
fn a_disk_stays_with_the_agent_that_it_met_though_its_address_leads_to_another() {
    let house = Household::new();
    let mut agent = agent(&house, "");
    let disk = connect(options(&agent, "v", &house.console("desk"), None), LIMIT).expect("it connects");
    let becomes = |agent: &mut Agent, name: &str| {
        agent.end(Signal::SIGKILL);
        let folder = house.folder(&house.agent(name));
        agent.configure(&format!("identity = '{}'\n{VOLUMES}", folder.display()));
        agent.run();
    };
    becomes(&mut agent, "pc3");
    let mut disk = Driver::new(disk);
    let tag = disk.submit(Operation::Write, 0, 512, Buffer::from_vec(vec![3; 512]));
    let until = Instant::now() + LIMIT;
    while !disk.disk.describe().contains("pc2.node.omega.internal") {
        assert!(Instant::now() < until && disk.done.is_empty(), "{}", disk.disk.describe());
        disk.round(Duration::from_millis(50));
    }
    becomes(&mut agent, "pc2");
    let until = Instant::now() + LIMIT;
    while disk.done.is_empty() {
        assert!(Instant::now() < until, "{}\n{}", disk.disk.describe(), agent.log());
        disk.round(Duration::from_millis(50));
    }
    assert!(disk.done[0].tag == tag && disk.done[0].result.is_ok());
}

#[test]
fn who_cannot_prove_a_node_of_the_household_gets_no_answer() {
    let (house, other) = (Household::new(), Household::new());
    let agent = agent(&house, "");
    let console: Roles = Role::Console.into();
    let strangers = [
        ("plain", Security::Plain),
        ("another household's", security(&house.stranger(&other, "desk", console))),
        ("expired", security(&house.expired("desk", console))),
        ("not yet valid", security(&house.not_yet_valid("desk", console))),
        ("self-signed", security(&house.self_signed("desk", console))),
    ];
    thread::scope(|scope| {
        for (who, security) in &strangers {
            let agent = &agent;
            scope.spawn(move || {
                let mut client = client(agent, security);
                let short = Duration::from_secs(2);
                let answer =
                    client.call(Class::Control, opcode::VOLUMES, &[], Vec::new(), MAX_PAYLOAD, short);
                assert!(answer.is_err(), "{who}: {answer:?}");
            });
        }
    });
    ask(&mut client(&agent, &security(&house.console("desk"))), opcode::VOLUMES, &[]);
}

#[test]
fn policy_is_asked_for_every_kind_of_request_and_says_why_it_refuses() {
    let house = Household::new();
    let allow = "[[allow]]\nnodes = ['desk']\nvolumes = ['v']\naccess = 'write'\n\
                 [[allow]]\nnodes = ['lap-*']\nvolumes = ['v']\n";
    let agent = agent(&house, allow);
    let mut desk = client(&agent, &security(&house.console("desk")));
    let reply = ask(&mut desk, opcode::ACQUIRE, &acquire("v", 1));
    let epoch = Acquired::decode(&reply.body).expect("a lease").epoch;
    let lease = Lease { epoch, holder: 1 };

    // A console that no table names is told nothing, and cannot use what it may have overheard.
    let mut stranger = client(&agent, &security(&house.console("stranger")));
    for volume in ["v", "nowhere"] {
        let reply = ask(&mut stranger, opcode::ACQUIRE, &acquire(volume, 2));
        assert_eq!(reply.status, status::FORBIDDEN, "{volume}");
        assert!(
            why(&reply).contains(&format!("node stranger may not use volume {volume}")),
            "{}",
            why(&reply)
        );
    }
    assert_eq!(ask(&mut stranger, opcode::VOLUMES, &[]).payload, b"[]");
    assert_eq!(ask(&mut stranger, opcode::INVENTORY, &[]).status, status::FORBIDDEN);
    let access = Access { epoch, offset: 0, len: 512, unmap: false }.encode();
    for (kind, body) in [
        (opcode::RENEW, lease.encode()),
        (opcode::OPEN, Open { epoch, holder: 1 }.encode()),
        (opcode::FLUSH, Access { epoch, offset: 0, len: 0, unmap: false }.encode()),
        (opcode::DISCARD, access.clone()),
        (opcode::WRITE_ZEROES, access.clone()),
    ] {
        assert_eq!(ask(&mut stranger, kind, &body).status, status::FENCED, "{kind:#x}");
    }
    let read =
        stranger.call(Class::Normal, opcode::READ, &access, Vec::new(), 512, LIMIT).expect("an answer");
    let write =
        stranger.call(Class::Normal, opcode::WRITE, &access, vec![1; 512], 0, LIMIT).expect("an answer");
    assert_eq!((read.status, write.status), (status::FENCED, status::FENCED));
    // Giving a lease back that is another's is no error, and no deed.
    assert_eq!(ask(&mut stranger, opcode::RELEASE, &lease.encode()).status, Status::OK);
    assert_eq!(ask(&mut desk, opcode::RENEW, &lease.encode()).status, Status::OK);

    // Who may read holds a lease like others, and the disk is read-only to it.
    assert_eq!(ask(&mut desk, opcode::RELEASE, &lease.encode()).status, Status::OK);
    let mut lap = client(&agent, &security(&house.console("lap-7")));
    let reply = ask(&mut lap, opcode::ACQUIRE, &acquire("v", 3));
    let epoch = Acquired::decode(&reply.body).expect("a lease").epoch;
    let reply = ask(&mut lap, opcode::OPEN, &Open { epoch, holder: 3 }.encode());
    assert!(Opened::decode(&reply.body).expect("opened").geometry.read_only);
    let access = Access { epoch, offset: 0, len: 512, unmap: false }.encode();
    let read = lap.call(Class::Normal, opcode::READ, &access, Vec::new(), 512, LIMIT).expect("an answer");
    assert_eq!((read.status, read.payload), (Status::OK, vec![0; 512]));
    let write = lap.call(Class::Normal, opcode::WRITE, &access, vec![1; 512], 0, LIMIT).expect("an answer");
    assert_eq!(write.status, status::READ_ONLY);
    assert!(why(&write).contains("node lap-7 may only read volume v"), "{}", why(&write));
    for kind in [opcode::DISCARD, opcode::WRITE_ZEROES] {
        assert_eq!(ask(&mut lap, kind, &access).status, status::READ_ONLY, "{kind:#x}");
    }
    let seen: Vec<Volume> =
        serde_json::from_slice(&ask(&mut lap, opcode::VOLUMES, &[]).payload).expect("JSON");
    assert_eq!(seen.iter().map(|v| v.name.as_str()).collect::<Vec<_>>(), ["v"]);

    // The agent's log has each reason once, however often one asks.
    for _ in 0..20 {
        ask(&mut stranger, opcode::ACQUIRE, &acquire("v", 2));
    }
    let said = agent.log().matches("node stranger may not use volume v:").count();
    assert_eq!(said, 1, "{}", agent.log());
}

#[test]
fn without_a_table_a_helper_may_use_nothing() {
    let house = Household::new();
    let agent = agent(&house, "");
    let mut helper = client(&agent, &security(&house.agent("shed")));
    assert_eq!(ask(&mut helper, opcode::ACQUIRE, &acquire("v", 1)).status, status::FORBIDDEN);
    assert_eq!(ask(&mut helper, opcode::VOLUMES, &[]).payload, b"[]");
    assert_eq!(ask(&mut helper, opcode::INVENTORY, &[]).status, status::FORBIDDEN);
}

#[test]
fn a_revoked_console_is_cut_its_disk_waits_and_its_lease_expires() {
    let mut house = Household::new();
    let agent = agent(&house, "");
    let desk = house.console("desk");
    let mut disk = Driver::new(connect(options(&agent, "v", &desk, None), LIMIT).expect("it connects"));
    disk.write(0, &[1; 512]).expect("it writes");

    house.revoke(desk.serial());
    // Any node may carry the list; here a helper, which may do nothing else.
    let held = Reloading::in_memory(house.agent("shed"));
    let mut shed = client(&agent, &security(&house.agent("shed")));
    let reply = shed
        .call(Class::Control, revocation::OPCODE, &[], house.crl().to_vec(), 0, LIMIT)
        .expect("an answer");
    assert_eq!((reply.status, revocation::number(&reply.body)), (Status::OK, Some(house_number(&held))));

    let until = Instant::now() + LIMIT;
    while !disk.disk.describe().contains("revoked") {
        assert!(Instant::now() < until, "{}\n{}", disk.disk.describe(), agent.log());
        disk.round(Duration::from_millis(50));
    }
    assert!(agent.log().contains("certificate was revoked"), "{}", agent.log());
    // Somebody else gets the volume once the lease is over, as with any holder that is gone.
    let next = house.console("next");
    let next = Driver::new(connect(options(&agent, "v", &next, None), LIMIT).expect("the lease expires"));
    next.close();
}

/// The number of the list that an identity of the household begins with now.
fn house_number(held: &Reloading) -> u64 {
    held.current().crl().number()
}

#[test]
fn a_list_that_is_not_the_authoritys_changes_nothing() {
    let (house, mut other) = (Household::new(), Household::new());
    let agent = agent(&house, "");
    let desk = house.console("desk");
    other.revoke(desk.serial());
    let mut client = client(&agent, &security(&desk));
    for list in [other.crl().to_vec(), vec![0x30; 300]] {
        let reply = client.call(Class::Control, revocation::OPCODE, &[], list, 0, LIMIT).expect("an answer");
        assert_eq!(reply.status, Status::MALFORMED);
    }
    ask(&mut client, opcode::VOLUMES, &[]);
}

#[test]
fn a_renewed_identity_is_taken_at_sighup_while_connections_stay() {
    let house = Household::new();
    let old = house.agent("pc2");
    let folder = house.folder(&old);
    let agent = Agent::start(&format!("identity = '{}'\n{VOLUMES}", folder.display()));
    let desk = house.console("desk");
    let mut disk = Driver::new(connect(options(&agent, "v", &desk, None), LIMIT).expect("it connects"));
    disk.write(0, &[1; 512]).expect("it writes");
    let renewed = house.agent("pc2");
    let new = house.folder(&renewed);
    for name in ["node.pem", "node.key"] {
        std::fs::copy(new.join(name), folder.join(name)).expect("it copies");
    }
    agent.signal(Signal::SIGHUP);
    let until = Instant::now() + LIMIT;
    let mut client = client(&agent, &security(&desk));
    while client.proven().is_none_or(|peer| peer.serial != *renewed.serial()) {
        assert!(Instant::now() < until, "{}", agent.log());
        client = self::client(&agent, &security(&desk));
        ask(&mut client, opcode::VOLUMES, &[]);
    }
    disk.write(0, &[2; 512]).expect("it writes on");
    assert_eq!(disk.disk.counters().snapshot().cuts, 0, "the connection stayed");
}
