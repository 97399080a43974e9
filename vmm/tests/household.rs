//! A household set up by the commands that a user types: `omega ca`, `omega node`, `omega join`.
#![allow(missing_docs)]

mod support;

use std::io::{BufRead, BufReader, Read};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use support::Bench;
use transport::identity::{Identity, Role, Roles};

fn omega(bench: &Bench, args: &[&str], identity: &str) -> support::Outcome {
    let mut command = bench.command(args);
    command.env("OMEGA_IDENTITY", bench.path(identity));
    support::Outcome::of(&command.output().expect("the binary starts"))
}

fn begin() -> Bench {
    let bench = Bench::new();
    let outcome = omega(&bench, &["ca", "init", "--name", "attic street", "--node", "desk"], "desk/identity");
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    assert!(outcome.out.contains("`attic street` has begun"), "{outcome:?}");
    bench
}

/// `omega node invite` that waits, and its token.
fn invite(bench: &Bench, args: &[&str]) -> (Child, String) {
    let mut command: Command =
        bench.command(&[&["node", "invite", "--listen", "127.0.0.1:0"], args].concat());
    command.env("OMEGA_IDENTITY", bench.path("desk/identity"));
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts");
    let mut token = String::new();
    BufReader::new(child.stdout.as_mut().expect("piped")).read_line(&mut token).expect("a line");
    (child, token.trim().to_owned())
}

fn end(mut child: Child) -> (Option<i32>, String) {
    let mut said = String::new();
    child.stderr.take().expect("piped").read_to_string(&mut said).expect("text");
    (child.wait().expect("it ends").code(), said)
}

fn load(bench: &Bench, name: &str) -> Arc<Identity> {
    Identity::load(&bench.path(name)).expect("an identity")
}

#[test]
fn a_household_begins_with_an_authority_and_its_first_console() {
    let bench = begin();
    let desk = load(&bench, "desk/identity");
    assert_eq!((desk.name(), desk.roles()), ("desk", Roles::from(Role::Console)));
    let mode = |name: &str| bench.path(name).metadata().expect("there").permissions().mode() & 0o777;
    assert_eq!(
        (mode("desk/ca"), mode("desk/ca/ca.key"), mode("desk/identity/node.key")),
        (0o700, 0o600, 0o600)
    );
    let again = omega(&bench, &["ca", "init"], "desk/identity");
    assert_eq!(again.code, Some(1), "{again:?}");
    assert!(again.err.contains("is the node `desk` of a household already"), "{again:?}");
}

#[test]
fn an_invited_pc_joins_once_and_is_listed_until_it_is_revoked() {
    let bench = begin();
    let (waiting, token) = invite(&bench, &["laptop", "--role", "console"]);
    let outcome = omega(&bench, &["join", &token], "laptop");
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    assert!(outcome.out.contains("is the node `laptop` (console)"), "{outcome:?}");
    let (code, said) = end(waiting);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("`laptop` has joined, from 127.0.0.1"), "{said}");
    assert_eq!(load(&bench, "laptop").authority(), load(&bench, "desk/identity").authority());

    let again = omega(&bench, &["join", &token], "laptop");
    assert_eq!(again.code, Some(1), "{again:?}");
    let list = omega(&bench, &["node", "list"], "desk/identity");
    let names: Vec<_> = list.out.lines().skip(1).filter_map(|line| line.split_whitespace().next()).collect();
    assert_eq!(names, ["desk", "laptop"], "{list:?}");

    let revoked = omega(&bench, &["node", "revoke", "laptop"], "desk/identity");
    assert_eq!(revoked.code, Some(0), "{revoked:?}");
    let laptop = load(&bench, "laptop");
    assert!(load(&bench, "desk/identity").crl().revokes(laptop.serial()));
    let list = omega(&bench, &["node", "list", "--json"], "desk/identity");
    let list: serde_json::Value = serde_json::from_str(&list.out).expect("JSON");
    assert_eq!((&list[1]["name"], &list[1]["state"]), (&"laptop".into(), &"revoked".into()), "{list}");
    assert_eq!(list[1]["serial"], laptop.serial().to_string());
    let nobody = omega(&bench, &["node", "revoke", "nobody"], "desk/identity");
    assert_eq!(nobody.code, Some(1), "{nobody:?}");
    assert!(nobody.err.contains("no node named `nobody`"), "{nobody:?}");
}

#[test]
fn a_token_is_read_from_standard_input_so_that_no_other_process_sees_it() {
    let bench = begin();
    let (waiting, token) = invite(&bench, &["laptop", "--role", "console"]);
    let file = std::fs::File::open(bench.file("token", format!("{token}\n"))).expect("a file");
    let mut join = bench.command(&["join", "-", "--identity", "laptop"]);
    let outcome = support::Outcome::of(&join.stdin(file).output().expect("it starts"));
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    let (code, said) = end(waiting);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("\n  omega join -\n"), "what it tells to type has no token: {said}");
    assert_eq!(load(&bench, "laptop").name(), "laptop");
}

#[test]
fn what_goes_wrong_says_what_to_do() {
    let bench = begin();
    let (waiting, token) = invite(&bench, &["laptop"]);
    kill(Pid::from_raw(waiting.id().cast_signed()), Signal::SIGINT).expect("it runs");
    let (code, said) = end(waiting);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("the token is worthless now"), "{said}");
    let late = omega(&bench, &["join", &token], "laptop");
    assert_eq!(late.code, Some(1), "{late:?}");
    assert!(late.err.contains("is `omega node invite` still waiting"), "{late:?}");

    let (waiting, _) = invite(&bench, &["laptop", "--expires", "1s"]);
    let (code, said) = end(waiting);
    assert!(code == Some(1) && said.contains("Nobody joined within 1 s"), "{said}");

    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("an address").to_string();
    for (args, code, text) in [
        (&["join", &token[..token.len() - 1]][..], 2, "The token is damaged"),
        (&["join", "hello"], 2, "does not begin with `omega-`"),
        (&["node", "invite", "Laptop"], 2, "no name for a node"),
        (&["node", "invite", "laptop", "--role", "king"], 2, "no role"),
        (&["node", "invite", "laptop", "--expires", "1ms"], 2, "--expires is between"),
        (&["node", "invite", "laptop", "--listen", &address], 1, "Cannot listen at"),
        (&["node", "list", "--identity", "elsewhere/identity"], 1, "no household authority"),
    ] {
        let outcome = omega(&bench, args, "desk/identity");
        assert_eq!(outcome.code, Some(code), "{args:?}: {outcome:?}");
        assert!(outcome.err.contains(text), "{args:?}: {outcome:?}");
        assert_eq!(outcome.out, "", "{args:?}");
    }
}

#[test]
fn a_revocation_is_told_to_every_agent_by_its_name_even_if_this_pc_itself_cannot_take_it() {
    let bench = begin();
    let (waiting, token) = invite(&bench, &["laptop"]);
    assert_eq!(omega(&bench, &["join", &token], "laptop").code, Some(0));
    assert_eq!(end(waiting).0, Some(0));
    std::fs::remove_file(bench.path("desk/identity/node.key")).expect("it was there");
    let nobody = TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("an address");
    let revoked =
        omega(&bench, &["node", "revoke", "laptop", "--tell", &nobody.to_string()], "desk/identity");
    assert_eq!(revoked.code, Some(1), "{revoked:?}");
    assert!(revoked.err.contains("This PC's own guests do not know it"), "{revoked:?}");
    assert!(revoked.out.contains(&format!("{nobody} was not told")), "but it was tried: {revoked:?}");
}
