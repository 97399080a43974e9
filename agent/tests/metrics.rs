//! What a scraper of Prometheus gets from an agent that works.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Instant;

use common::{Agent, free_port};
use devices::disk::volume::opcode;
use nix::sys::signal::Signal;
use transport::blocking::Client;
use transport::identity::Security;
use transport::wire::{Class, Status};

/// One sample: its family, name, labels and value.
#[derive(Debug)]
struct Sample {
    name: String,
    labels: BTreeMap<String, String>,
    value: f64,
}

/// Reads the text format strictly: every line is a comment of a known kind or a sample; each family is one
/// group under one HELP and TYPE; no sample comes twice; histograms are cumulative and whole.
fn parse(text: &str) -> Vec<Sample> {
    assert!(text.ends_with('\n'), "the last line ends");
    let mut families: BTreeMap<String, &str> = BTreeMap::new();
    let (mut current, mut helped) = (String::new(), String::new());
    let mut samples: Vec<Sample> = Vec::new();
    let mut seen = BTreeSet::new();
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let (name, help) = rest.split_once(' ').expect("a help text");
            assert!(!help.is_empty() && is_name(name), "{line}");
            helped = name.to_owned();
            continue;
        }
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').expect("a type");
            assert!(["counter", "gauge", "histogram"].contains(&kind), "{line}");
            assert_eq!(name, helped, "HELP and TYPE belong together");
            assert!(families.insert(name.to_owned(), kind).is_none(), "{name} is one group");
            current = name.to_owned();
            continue;
        }
        let sample = sample(line);
        let kind = families[&current];
        let suffixes: &[&str] = if kind == "histogram" { &["_bucket", "_sum", "_count"] } else { &[""] };
        let belongs = suffixes.iter().any(|suffix| sample.name == format!("{current}{suffix}"));
        assert!(belongs, "{line} is in the group of {current}");
        assert_eq!(kind == "counter", current.ends_with("_total"), "{current}");
        assert!(seen.insert((sample.name.clone(), sample.labels.clone())), "{line} comes twice");
        assert!(sample.value >= 0.0, "{line}");
        samples.push(sample);
    }
    check_histograms(&samples);
    samples
}

fn is_name(text: &str) -> bool {
    let first = |c: char| c.is_ascii_alphabetic() || c == '_' || c == ':';
    text.starts_with(first) && text.chars().all(|c| first(c) || c.is_ascii_digit())
}

fn sample(line: &str) -> Sample {
    let end = line.find(['{', ' ']).expect("a name and a value");
    let (name, mut rest) = line.split_at(end);
    assert!(is_name(name), "{line}");
    let mut labels = BTreeMap::new();
    if let Some(inside) = rest.strip_prefix('{') {
        rest = inside;
        loop {
            let (label, after) = rest.split_once("=\"").expect("a label");
            assert!(is_name(label) && !label.contains(':'), "{line}");
            let (value, after) = quoted(after);
            assert!(labels.insert(label.to_owned(), value).is_none(), "{line}");
            match after.strip_prefix(',') {
                Some(next) => rest = next,
                None => {
                    rest = after.strip_prefix('}').expect("the labels end");
                    break;
                }
            }
        }
    }
    let value = rest.strip_prefix(' ').expect("one space before the value");
    Sample { name: name.to_owned(), labels, value: value.parse().unwrap_or_else(|_| panic!("{line}")) }
}

/// The text before the quote that ends it, without escapes, and what follows.
fn quoted(text: &str) -> (String, &str) {
    let mut value = String::new();
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return (value, &text[at + 1..]),
            '\\' => match chars.next().expect("something is escaped").1 {
                'n' => value.push('\n'),
                c @ ('\\' | '"') => value.push(c),
                other => panic!("\\{other} is no escape"),
            },
            c => value.push(c),
        }
    }
    panic!("a value without end: {text}");
}

fn check_histograms(samples: &[Sample]) {
    let mut series: BTreeMap<BTreeMap<String, String>, Vec<(f64, f64)>> = BTreeMap::new();
    for bucket in samples.iter().filter(|s| s.name.ends_with("_bucket")) {
        let mut labels = bucket.labels.clone();
        let edge = labels.remove("le").expect("a bucket has an edge");
        let edge = if edge == "+Inf" { f64::INFINITY } else { edge.parse().expect("a number") };
        labels.insert("name".into(), bucket.name.trim_end_matches("_bucket").into());
        series.entry(labels).or_default().push((edge, bucket.value));
    }
    for (mut labels, buckets) in series {
        let name = labels.remove("name").expect("set above");
        assert!(buckets.is_sorted_by(|a, b| a.0 < b.0 && a.1 <= b.1), "{name} {labels:?}: {buckets:?}");
        let of = |suffix: &str| {
            let mut found =
                samples.iter().filter(|s| s.name == format!("{name}{suffix}") && s.labels == labels);
            let value = found.next().unwrap_or_else(|| panic!("{name}{suffix} {labels:?} is there")).value;
            assert!(found.next().is_none());
            value
        };
        let (edge, all) = *buckets.last().expect("there are some");
        assert!(edge.is_infinite(), "the last bucket has no edge");
        assert!((all - of("_count")).abs() < 0.5, "{name} {labels:?}");
        assert!(of("_sum") > 0.0 || all == 0.0, "{name} {labels:?}");
    }
}

fn scrape(address: &str) -> Vec<Sample> {
    let mut socket = TcpStream::connect(address).expect("it listens");
    socket
        .write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n")
        .expect("it is taken");
    let mut answer = String::new();
    socket.read_to_string(&mut answer).expect("it is answered");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    assert!(head.contains(&format!("Content-Length: {}\r\n", body.len())), "{head}");
    parse(body)
}

fn value(samples: &[Sample], name: &str, labels: &[(&str, &str)]) -> f64 {
    let has = |s: &&Sample| labels.iter().all(|(k, v)| s.labels.get(*k).is_some_and(|value| value == v));
    let found: Vec<_> = samples.iter().filter(|s| s.name == name).filter(has).collect();
    let [one] = &found[..] else { panic!("{name} {labels:?}: {found:?} in {samples:#?}") };
    one.value
}

fn scrape_until(address: &str, name: &str, peer: (&str, &str), wanted: f64) -> Vec<Sample> {
    let until = Instant::now() + common::LIMIT;
    loop {
        let samples = scrape(address);
        let now = value(&samples, name, &[peer]);
        if (now - wanted).abs() < 0.5 {
            return samples;
        }
        assert!(Instant::now() < until, "{name} is {now}, never {wanted}");
    }
}

fn agent(more: &str) -> (Agent, String) {
    let port = free_port();
    let address = format!("127.0.0.1:{port}");
    let volume = "[[volume]]\nname = 'v'\npath = 'DIR/v.img'\ncreate = '8M'\n";
    (Agent::start(&format!("metrics = '{address}'\n{more}{volume}")), address)
}

#[test]
fn a_scraper_reads_what_a_guest_did() {
    let (agent, address) = agent("");
    let empty = scrape(&address);
    assert_eq!(value(&empty, "omega_agent_info", &[("name", "pc2")]), 1.0);
    assert!(!empty.iter().any(|s| s.labels.contains_key("peer")), "nobody came yet");
    let mut disk = agent.disk("v");
    for at in 0..10 {
        disk.write(at * 4096, &[1; 4096]).expect("it writes");
    }
    assert_eq!(disk.read(0, 8192), vec![1; 8192]);
    disk.flush().expect("it flushes");
    let seen = scrape(&address);
    let peer = ("peer", "guest@test");
    let count = |op| {
        let labels = [peer, ("class", "normal"), ("operation", op)];
        value(&seen, "omega_agent_request_duration_seconds_count", &labels)
    };
    assert_eq!((count("write"), count("read"), count("flush")), (10.0, 1.0, 1.0));
    let write = [peer, ("operation", "write")];
    assert_eq!(value(&seen, "omega_agent_request_bytes_total", &write), 40960.0);
    assert_eq!(value(&seen, "omega_agent_answer_bytes_total", &[peer, ("operation", "read")]), 8192.0);
    assert_eq!(value(&seen, "omega_agent_request_failures_total", &write), 0.0);
    assert!(value(&seen, "omega_agent_peer_received_bytes_total", &[peer]) > 40960.0);
    assert_eq!(value(&seen, "omega_agent_peer_carrier", &[peer]), 1.0);
    // The connection over which the lease was taken may be ending still.
    let _ = scrape_until(&address, "omega_agent_peer_connections", peer, 1.0);

    disk.close();
    let after = scrape_until(&address, "omega_agent_peer_connections", peer, 0.0);
    let labels = [peer, ("class", "normal"), ("operation", "write")];
    assert_eq!(
        value(&after, "omega_agent_request_duration_seconds_count", &labels),
        10.0,
        "it stays counted"
    );
}

#[test]
fn a_peer_whose_name_is_no_label_is_escaped_and_an_idle_scraper_holds_up_nobody() {
    let (agent, address) = agent("");
    let name = "evil\"} 1 \\ desk";
    let mut client = Client::new(&agent.address, name, &Security::Plain, None).expect("io_uring works here");
    let echo = client
        .call(Class::Urgent, opcode::ECHO, &[], vec![7; 5000], 5000, common::LIMIT)
        .expect("it answers");
    assert_eq!((echo.status, echo.payload), (Status::OK, vec![7; 5000]));
    let _idle = TcpStream::connect(&address).expect("it listens");
    let seen = scrape(&address);
    let labels = [("peer", name), ("class", "urgent"), ("operation", "echo")];
    assert_eq!(value(&seen, "omega_agent_request_duration_seconds_count", &labels), 1.0);
    assert!(agent.log().contains("Serving metrics"), "{}", agent.log());
}

#[test]
fn a_port_that_is_taken_is_one_clear_line() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let (mut agent, first) = agent("");
    agent.end(Signal::SIGTERM);
    let text = std::fs::read_to_string(agent.config()).expect("readable");
    let taken = taken.local_addr().expect("an address").to_string();
    std::fs::write(agent.config(), text.replace(&first, &taken)).expect("it writes");
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_omega-agent"))
        .args(["--config".as_ref(), agent.config().as_os_str()])
        .output()
        .expect("it starts");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    let line = said.lines().last().expect("a line");
    assert!(line.starts_with(&format!("omega-agent: Cannot serve metrics on {taken}: ")), "{said}");
}
