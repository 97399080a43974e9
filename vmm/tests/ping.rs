//! `omega ping` beside an agent, and beside none.
#![allow(missing_docs)]

mod support;

use std::io::Read;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use support::{Bench, agent, eventually};

/// Ends a slow test's many small waits.
const QUICK: [&str; 4] = ["--pause", "0s", "--bandwidth", "20ms"];

#[test]
fn every_class_is_measured_and_the_carrier_named() {
    let (bench, address) = (Bench::new(), agent::start().to_string());
    let ping = |more: &[&str]| bench.omega(&[&["ping", &address], &QUICK[..], more].concat());
    let table = ping(&["--count", "5"]);
    assert_eq!(table.code, Some(0), "{table:?}");
    let lines: Vec<&str> = table.out.lines().collect();
    assert_eq!(
        lines[0],
        format!("attic ({address}), not authenticated, carried by tcp, 4096 bytes each way"),
        "{table:?}"
    );
    let rows = &lines[lines.len() - 5..lines.len() - 1];
    let firsts = ["urgent        5     0 ", "normal ", "control ", "bulk "];
    assert!(rows.iter().zip(firsts).all(|(row, first)| row.starts_with(first)), "{table:?}");
    assert!(lines.iter().skip(2).all(|line| line.chars().count() <= 80), "{table:?}");

    let json = ping(&["--json", "--class", "bulk", "--class", "urgent", "-c", "3", "-s", "1M"]);
    assert_eq!(json.code, Some(0), "{json:?}");
    let report: serde_json::Value = serde_json::from_str(&json.out).expect("it is JSON");
    assert_eq!(
        (&report["carrier"], &report["proven"]),
        (&"tcp".into(), &serde_json::Value::Null),
        "{json:?}"
    );
    let classes = report["classes"].as_array().expect("a list");
    assert_eq!(
        classes.iter().map(|c| c["class"].as_str()).collect::<Vec<_>>(),
        [Some("bulk"), Some("urgent")]
    );
    for class in classes {
        let number = |name: &str| class[name].as_f64().unwrap_or_else(|| panic!("{name} in {json:?}"));
        assert_eq!((number("sent"), number("answered"), number("size")), (3.0, 3.0, 1_048_576.0), "{json:?}");
        assert!(0.0 < number("min_us") && number("min_us") <= number("p50_us"), "{json:?}");
        assert!(number("p50_us") <= number("p99_us") && number("p99_us") <= number("max_us"), "{json:?}");
        assert!(number("jitter_us") >= 0.0, "{json:?}");
        assert!(number("up_bytes_per_s") > 1e6 && number("down_bytes_per_s") > 1e6, "{json:?}");
    }
}

#[test]
fn an_agent_that_does_not_answer_is_one_line_and_code_1() {
    let bench = Bench::new();
    let closed = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = closed.local_addr().expect("an address").to_string();
    // It accepts, and never says a word.
    let silent = bench.omega(&["ping", &address, "--timeout", "300ms"]);
    drop(closed);
    let refused = bench.omega(&["ping", &address, "--timeout", "300ms"]);
    for outcome in [silent, refused] {
        assert_eq!((outcome.code, outcome.out.as_str()), (Some(1), ""), "{outcome:?}");
        let start = format!("omega: {address} does not answer within 300.0ms: ");
        assert!(outcome.err.starts_with(&start) && outcome.err.lines().count() == 1, "{outcome:?}");
    }
    for mistake in [["--size", "2M"], ["--count", "0"], ["--class", "slow"]] {
        assert_eq!(bench.omega(&["ping", "localhost", mistake[0], mistake[1]]).code, Some(2), "{mistake:?}");
    }
}

#[test]
fn an_interruption_shows_what_was_measured_until_then() {
    let (bench, echoes) = (Bench::new(), Arc::<AtomicU64>::default());
    let address = agent::start_counting(Arc::clone(&echoes)).to_string();
    let mut command = bench.command(&["ping", &address, "-c", "1000000", "--pause", "1ms", "--json"]);
    let mut child = command.stdout(Stdio::piped()).spawn().expect("the binary starts");
    eventually("it measures", || echoes.load(Ordering::Relaxed) > 10);
    kill(Pid::from_raw(child.id() as i32), Signal::SIGINT).expect("it runs");
    let mut out = String::new();
    child.stdout.take().expect("a pipe").read_to_string(&mut out).expect("text");
    assert_eq!(child.wait().expect("it ends").code(), Some(0), "{out}");
    let report: serde_json::Value = serde_json::from_str(&out).expect("it is JSON");
    let [class] = &report["classes"].as_array().expect("a list")[..] else { panic!("one class: {out}") };
    let (sent, answered) = (class["sent"].as_u64(), class["answered"].as_u64());
    assert!(sent > Some(0) && sent < Some(1_000_000) && sent == answered, "{out}");
    assert_eq!(class["up_bytes_per_s"], serde_json::Value::Null, "{out}");
}
