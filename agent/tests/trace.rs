//! One request in the logs of both sides. In a program of its own, since it takes the whole process's log.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::{Agent, LIMIT};
use tracing_subscriber::EnvFilter;

#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().expect("no panic").extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// What a log says of each request: name and operation to the words.
fn requests(log: &str) -> BTreeMap<String, BTreeSet<String>> {
    let mut found: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for line in log.lines() {
        let Some((_, rest)) = line.split_once("request{") else { continue };
        let (span, said) = rest.split_once("}: ").unwrap_or_else(|| panic!("{line}"));
        let word = said.split(' ').next().expect("a word");
        found.entry(span.to_owned()).or_default().insert(word.to_owned());
    }
    found
}

#[test]
fn a_request_has_one_name_in_the_logs_of_both_sides() {
    let ours = Log::default();
    let writer = ours.clone();
    tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::new("transport::request=trace"))
        .with_writer(move || writer.clone())
        .with_ansi(false)
        .with_target(false)
        .init();
    let agent = Agent::start_logging("[[volume]]\nname = 'v'\npath = 'DIR/v.img'\ncreate = '8M'\n", true);
    let mut disk = agent.disk("v");
    for at in 0..20 {
        disk.write(at * 4096, &[1; 4096]).expect("it writes");
    }
    disk.flush().expect("it flushes");
    disk.close();
    let asked = requests(&String::from_utf8_lossy(&ours.0.lock().expect("no panic")));
    let of = |operation: &str| {
        let text = format!(" operation=\"{operation}\" ");
        asked.keys().filter(|span| span.contains(&text)).cloned().collect::<Vec<String>>()
    };
    assert_eq!((of("write").len(), of("flush").len()), (20, 1), "{asked:#?}");
    let both: Vec<String> = [of("write"), of("flush")].concat();
    assert!(
        both.iter().all(|span| asked[span] == ["Answered", "Sent"].map(String::from).into()),
        "{asked:#?}"
    );
    let name = |span: &str| span.split(' ').next().is_some_and(|id| id.starts_with("id=") && id.len() > 16);
    assert!(both.iter().all(|span| name(span)), "{both:?}");

    // The agent's log comes through a pipe.
    let until = Instant::now() + LIMIT;
    loop {
        let served = requests(&agent.log());
        let whole = ["Answered", "Received"].map(String::from).into();
        if both.iter().all(|span| served.get(span) == Some(&whole)) {
            return;
        }
        assert!(Instant::now() < until, "{both:#?} in {served:#?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
