//! An agent that joined a household: who reaches it, while certificates are renewed and revoked.

mod common;

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use common::{Agent, Driver, LIMIT, image};
use devices::disk::remote::{ConnectError, Options, connect};
use devices::disk::{Disk, Operation};
use nix::sys::signal::Signal;
use transport::blocking::Client;
use transport::buffer::Buffer;
use transport::identity::authority::Authority;
use transport::identity::join::{Invitation, Outcome, Token};
use transport::identity::{Identity, NodeName, Reloading, Role, Security, join};
use transport::wire::{Class, MAX_PAYLOAD};

const VOLUMES: &str =
    "[[volume]]\nname = 'v'\npath = 'DIR/v.img'\n[[volume]]\nname = 'w'\npath = 'DIR/w.img'\n";

/// An agent, the authority of its household, and a console.
struct Home {
    agent: Agent,
    authority: Authority,
    desk: Arc<Reloading>,
}

impl Home {
    fn begin() -> Self {
        let mut agent = Agent::start("");
        for name in ["v", "w"] {
            image(&agent.path(&format!("{name}.img")), 1 << 20);
        }
        let authority = Authority::init(&agent.path("ca"), "home").expect("an authority");
        let desk = agent.path("desk");
        authority.make_own(&name("desk"), Role::Console.into(), &desk).expect("a console");
        join_agent(&authority, &agent);
        agent.end(Signal::SIGTERM);
        agent.configure(VOLUMES);
        agent.run();
        Self { authority, desk: Reloading::load(&desk).expect("its identity"), agent }
    }

    fn options(&self, volume: &str, identity: &Arc<Reloading>) -> Options {
        Options {
            security: Security::Tls(Arc::clone(identity)),
            node: Some("attic".to_owned()),
            ..self.agent.options(volume)
        }
    }

    fn disk(&self, volume: &str, identity: &Arc<Reloading>) -> Driver {
        let disk = connect(self.options(volume, identity), Duration::from_secs(10));
        Driver::new(disk.unwrap_or_else(|e| panic!("{e}\n{}", self.agent.log())))
    }

    /// The serial number of the certificate that the agent shows now.
    fn shown(&self) -> String {
        let security = Security::Tls(Arc::clone(&self.desk));
        let mut client =
            Client::new(&self.agent.address, "test", &security, Some("attic")).expect("a client");
        let volumes = devices::disk::volume::opcode::VOLUMES;
        client.call(Class::Control, volumes, &[], Vec::new(), MAX_PAYLOAD, LIMIT).expect("an answer");
        client.proven().expect("proven").serial.to_string()
    }

    fn wait_for(&self, what: &str, mut is_so: impl FnMut() -> bool) {
        let until = Instant::now() + LIMIT;
        while !is_so() {
            assert!(Instant::now() < until, "{what} never comes:\n{}", self.agent.log());
            thread::sleep(Duration::from_millis(20));
        }
    }
}

fn name(name: &str) -> NodeName {
    name.parse().expect("a name")
}

/// Invites `node` while `body` has the token.
fn invite<T>(authority: &Authority, node: &str, role: Role, body: impl FnOnce(&Token) -> T) -> T {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let addresses = vec![listener.local_addr().expect("an address")];
    let invitation = Invitation::new(authority, &name(node), role.into(), LIMIT, listener, addresses)
        .expect("an invitation");
    let token = invitation.token().clone();
    thread::scope(|scope| {
        let waiting = scope.spawn(move || invitation.wait(&|| false));
        let result = body(&token);
        assert!(matches!(waiting.join().expect("it waits"), Outcome::Joined(joined) if joined.confirmed));
        result
    })
}

/// `omega-agent join`, as the administrator types it.
fn join_agent(authority: &Authority, agent: &Agent) {
    let output = invite(authority, "attic", Role::Agent, |token| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_omega-agent"));
        command
            .arg("--config")
            .arg(agent.config())
            .args(["join", &token.to_string()])
            .output()
            .expect("it runs")
    });
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{err}");
    assert!(out.contains("is the node `attic` (agent)"), "{out}");
}

fn join_console(home: &Home, node: &str) -> Arc<Reloading> {
    let folder: PathBuf = home.agent.path(node);
    invite(&home.authority, node, Role::Console, |token| join::join(token, &folder, None).expect("joined"));
    Reloading::load(&folder).expect("its identity")
}

fn held(folder: &Path) -> u64 {
    Identity::load(folder).expect("an identity").crl().number()
}

#[test]
fn an_agent_takes_a_renewed_certificate_while_a_guest_uses_it() {
    let home = Home::begin();
    let mut disk = home.disk("v", &home.desk);
    disk.write(0, &[1; 4096]).expect("it writes");
    let before = home.shown();
    join_agent(&home.authority, &home.agent);
    let after = home.authority.nodes().expect("a list").pop().expect("the newest").serial;
    assert_ne!(before, after);
    home.wait_for("the new certificate", || home.shown() == after);
    disk.write(4096, &[2; 4096]).expect("it writes on");
}

#[test]
fn a_guest_waits_for_an_agent_that_was_revoked_and_invited_again() {
    let home = Home::begin();
    let mut disk = home.disk("v", &home.desk);
    disk.write(0, &[1; 4096]).expect("it writes");
    home.authority.revoke("attic").expect("known");
    home.authority.hand_crl_to(&home.agent.path("desk")).expect("stored");
    assert!(home.desk.reload().expect("readable"));
    let tag = disk.submit(Operation::Write, 4096, 4096, Buffer::from_vec(vec![2; 4096]));
    home.wait_for("the end of the connection", || {
        disk.idle(Duration::from_millis(50));
        disk.disk.describe().contains("away for")
    });
    join_agent(&home.authority, &home.agent);
    home.wait_for("the agent with its new certificate", || {
        disk.idle(Duration::from_millis(50));
        disk.done.iter().any(|done| done.tag == tag)
    });
    assert!(disk.done.iter().all(|done| done.result.is_ok()), "no error for the guest");
    assert_eq!(disk.read(0, 8192), [[1; 4096], [2; 4096]].concat());
}

#[test]
fn a_revoked_console_is_cut_off_as_soon_as_any_other_connects_and_stays_out() {
    let mut home = Home::begin();
    let mut good = home.disk("v", &home.desk);
    let lost = join_console(&home, "lost");
    let mut bad = home.disk("w", &lost);
    bad.write(0, &[7; 4096]).expect("it may, until it is revoked");

    let crl = home.authority.revoke("lost").expect("known");
    home.authority.hand_crl_to(&home.agent.path("desk")).expect("stored");
    assert!(home.desk.reload().expect("readable"), "the running guest's process sees it");
    let stored = home.agent.path("state/identity");
    assert!(held(&stored) < crl.number());
    // The guest that runs hands it on by itself.
    home.wait_for("the list", || {
        good.idle(Duration::from_millis(100));
        held(&stored) == crl.number()
    });
    // The list is stored a moment before it is heeded.
    home.wait_for("the cut", || {
        bad.idle(Duration::from_millis(50));
        bad.disk.describe().contains("away for")
    });
    let tag = bad.submit(Operation::Read, 0, 4096, Buffer::zeroed(4096));
    bad.idle(Duration::from_secs(2));
    assert!(!bad.done.iter().any(|done| done.tag == tag && done.result.is_ok()), "it reads no more");
    let away = bad.disk.describe();
    assert!(away.contains("away for"), "{away}\n{}", home.agent.log());

    home.agent.restart();
    let again = connect(home.options("w", &lost), Duration::from_secs(2)).err();
    assert!(matches!(again, Some(ConnectError::Unreachable { .. })), "after a restart too: {again:?}");
    assert_eq!(good.read(0, 4096), [0; 4096], "the others go on");
}

#[test]
fn nobody_without_a_certificate_gets_an_answer() {
    let home = Home::begin();
    let plain = connect(home.agent.options("v"), Duration::from_secs(2)).err();
    assert!(matches!(plain, Some(ConnectError::Unreachable { .. })), "{plain:?}");
    let other = Authority::init(&home.agent.path("other"), "next door").expect("an authority");
    let folder = home.agent.path("thief");
    other.make_own(&name("desk"), Role::Console.into(), &folder).expect("made");
    let thief = Reloading::load(&folder).expect("whole");
    let stranger = connect(home.options("v", &thief), Duration::from_secs(2)).err();
    assert!(matches!(stranger, Some(ConnectError::Unreachable { .. })), "{stranger:?}");
    // With another name than the expected one the console does not talk, either.
    let options = Options { node: Some("cellar".into()), ..home.options("v", &home.desk) };
    let wrong = connect(options, Duration::from_secs(2)).err();
    assert!(matches!(wrong, Some(ConnectError::Unreachable { .. })), "{wrong:?}");
    home.disk("v", &home.desk).write(0, &[1; 512]).expect("the console of the house may");
}

#[test]
fn what_joining_as_an_agent_meets_is_one_line() {
    let agent = Agent::start("");
    let join = |token: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_omega-agent"));
        let output =
            command.arg("--config").arg(agent.config()).args(["join", token]).output().expect("it runs");
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (code, said) = join("omega-nonsense");
    assert!(code == Some(2) && said.contains("The token is damaged") && said.lines().count() == 1, "{said}");
    let authority = Authority::init(&agent.path("ca"), "home").expect("an authority");
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let addresses = vec![listener.local_addr().expect("an address")];
    let role = Role::Agent.into();
    let invitation =
        Invitation::new(&authority, &name("attic"), role, LIMIT, listener, addresses).expect("an invitation");
    let token = invitation.token().to_string();
    assert!(matches!(invitation.wait(&|| true), Outcome::Stopped));
    let (code, said) = join(&token);
    assert!(code == Some(1) && said.contains("still waiting") && said.lines().count() == 1, "{said}");
    assert!(!agent.path("state/identity/node.pem").exists());
}
