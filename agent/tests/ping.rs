//! The way to a real agent, measured.

mod common;

use std::cell::Cell;
use std::time::{Duration, Instant};

use common::{Agent, LIMIT};
use nix::sys::signal::Signal;
use transport::identity::Security;
use transport::wire::Class;
use vmm::ping::{Error, Options, run};

fn options(agent: &Agent) -> Options {
    Options {
        address: agent.address.clone(),
        name: "a test".to_owned(),
        security: Security::Plain,
        node: None,
        classes: Class::ALL.to_vec(),
        count: 10,
        size: 5000,
        pause: Duration::ZERO,
        bandwidth: Duration::from_millis(30),
        timeout: LIMIT,
    }
}

#[test]
fn a_real_agent_echoes_in_every_class() {
    let agent = Agent::start("");
    let report = run(&options(&agent), &|| false).expect("it answers");
    assert!(report.is_whole(), "{report:?}");
    assert_eq!((report.name.as_str(), report.proven.as_ref()), ("pc2", None), "{report:?}");
    assert_eq!(report.classes.iter().map(|m| m.class).collect::<Vec<_>>(), Class::ALL);
    for measured in &report.classes {
        assert_eq!(measured.round_trips.answered, 10, "{report:?}");
        assert!(measured.up_bytes_per_s > Some(1e6) && measured.down_bytes_per_s > Some(1e6), "{report:?}");
    }
    let empty = Options { size: 0, bandwidth: Duration::ZERO, ..options(&agent) };
    assert!(run(&empty, &|| false).expect("it answers").is_whole(), "nothing can be echoed too");
}

#[test]
fn an_agent_that_went_away_is_lost_requests_and_one_that_is_not_there_an_error() {
    let mut agent = Agent::start("");
    let timeout = Duration::from_millis(300);
    let frozen = Options { timeout, count: 100_000, pause: Duration::from_millis(1), ..options(&agent) };
    let (connected, since) = (Cell::new(None), Cell::new(None));
    let report = run(&frozen, &|| {
        if connected.get().is_none() && agent.log().contains("A peer is connected") {
            connected.set(Some(Instant::now()));
        }
        // It froze amid the round trips, and two of them had their time since.
        let measuring = connected.get().is_some_and(|at| at.elapsed() > timeout);
        if measuring && since.get().is_none() {
            agent.signal(Signal::SIGSTOP);
            since.set(Some(Instant::now()));
        }
        since.get().is_some_and(|at| at.elapsed() > timeout * 3)
    });
    agent.signal(Signal::SIGCONT);
    let report = report.expect("there was a connection");
    assert!(!report.is_whole(), "{report:?}");
    let [urgent] = &report.classes[..] else { panic!("it was interrupted in the first class: {report:?}") };
    let trips = &urgent.round_trips;
    assert!(trips.answered > 0 && trips.answered < trips.sent, "{report:?}");
    assert_eq!((urgent.up_bytes_per_s, urgent.down_bytes_per_s), (None, None), "{report:?}");
    agent.end(Signal::SIGKILL);
    let gone = run(&frozen, &|| false).expect_err("nobody listens").to_string();
    assert!(gone.starts_with(&format!("{} does not answer within 300.0ms: ", agent.address)), "{gone}");
    let stopped = run(&frozen, &|| true).expect_err("it was interrupted");
    assert!(matches!(stopped, Error::Interrupted(_)), "{stopped}");
}
