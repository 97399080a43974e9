//! The control socket with a machine that only remembers.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use transport::metrics::{Distribution, Snapshot};

use super::super::client::{Client, Error as ClientError};
use super::super::{Controlled, Counters, Error, HelperStatus, MemoryStatus, Peers, State, Status};
use super::{Command, Console, Server};
use crate::memory::coherence;
use crate::units::Bytes;

#[derive(Default)]
struct Machine {
    done: Mutex<Vec<String>>,
    paused: AtomicBool,
    /// `pause` waits for this, as for a disk that cannot be reached.
    stuck: AtomicBool,
}

impl Machine {
    fn note(&self, what: impl Into<String>) {
        self.done.lock().expect("no panic").push(what.into());
    }
}

impl Controlled for Machine {
    fn status(&self) -> Status {
        let paused = self.paused.load(Ordering::SeqCst);
        Status {
            name: "g".into(),
            pid: 7,
            state: if paused { State::Paused } else { State::Running },
            vcpus: 2,
            memory: Bytes(512 << 20),
            balloon: None,
            uptime_ms: 1,
            resets: 0,
            waits_for: None,
            places: Vec::new(),
            devices: Vec::new(),
        }
    }

    fn pause(&self) -> Result<(), Error> {
        while self.stuck.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(1));
        }
        self.paused.store(true, Ordering::SeqCst);
        Ok(())
    }

    fn resume(&self) -> Result<(), Error> {
        self.paused.store(false, Ordering::SeqCst);
        Ok(())
    }

    fn power_off(&self) -> Result<(), Error> {
        if self.paused.load(Ordering::SeqCst) {
            return Err(Error::NotNow("the guest is paused".into()));
        }
        self.note("power off");
        Ok(())
    }

    fn kill(&self) {
        self.note("kill");
    }

    fn counters(&self) -> Counters {
        [("vcpu0".to_owned(), [("exits".to_owned(), 5)].into())].into()
    }

    fn peers(&self) -> Peers {
        [("disk0".to_owned(), Snapshot { peer: "pc2".into(), connects: 3, ..Snapshot::default() })].into()
    }

    fn memory(&self) -> Result<MemoryStatus, Error> {
        let mut memory = MemoryStatus { degraded_pieces: 2, ..MemoryStatus::default() };
        (memory.counters.resident, memory.counters.latency.count) = (7, 3);
        Ok(memory)
    }

    fn coherence(&self) -> Result<coherence::Counters, Error> {
        let latency = Distribution { count: 3, ..Distribution::default() };
        Ok(coherence::Counters { invalidated: 4, latency, ..coherence::Counters::default() })
    }

    fn helpers(&self) -> Result<Vec<HelperStatus>, Error> {
        Err(Error::Unsupported("its memory is all here".into()))
    }

    fn drain_helper(&self, helper: &str) -> Result<String, Error> {
        self.note(format!("drain {helper}"));
        Ok(format!("{helper}:7420"))
    }

    fn add_helper(&self, helper: &crate::config::Helper) -> Result<(), Error> {
        self.note(format!("add {}", helper.agent));
        Ok(())
    }

    fn move_vcpu(&self, vcpu: u8, node: &str) -> Result<(), Error> {
        self.note(format!("move {vcpu} to {node}"));
        Ok(())
    }

    fn drain_vcpus(&self, node: &str) -> Result<usize, Error> {
        self.note(format!("drain {node} of vCPUs"));
        Ok(2)
    }

    fn set_balloon(&self, target: Bytes) -> Result<(), Error> {
        self.note(format!("balloon {target}"));
        Ok(())
    }

    fn save_state(&self) -> Result<serde_json::Value, Error> {
        Ok(serde_json::json!({"vcpus": []}))
    }
}

struct Bench {
    _folder: tempfile::TempDir,
    path: PathBuf,
    machine: Arc<Machine>,
    server: Server,
    sizes: Arc<Mutex<Vec<(Console, u16, u16)>>>,
}

fn bench() -> Bench {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("control.sock");
    let machine = Arc::new(Machine::default());
    let sizes = Arc::new(Mutex::new(Vec::new()));
    let list = Arc::clone(&sizes);
    let resize = Box::new(move |which, columns, rows| {
        list.lock().expect("no panic").push((which, columns, rows));
    });
    let served: Arc<dyn Controlled> = Arc::clone(&machine) as _;
    let server = Server::start(&path, served, resize).expect("the server starts");
    Bench { _folder: folder, path, machine, server, sizes }
}

impl Bench {
    fn client(&self) -> Client {
        Client::connect(&self.path, Some(Duration::from_secs(20))).expect("the server listens")
    }

    fn raw(&self) -> BufReader<UnixStream> {
        let stream = UnixStream::connect(&self.path).expect("the server listens");
        stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a time-out is valid");
        BufReader::new(stream)
    }
}

fn say(stream: &mut BufReader<UnixStream>, bytes: &[u8]) {
    // The server may hang up in the middle of what is too long.
    let _ = stream.get_mut().write_all(bytes);
}

fn line(stream: &mut BufReader<UnixStream>) -> String {
    let mut line = String::new();
    stream.read_line(&mut line).expect("an answer");
    line
}

#[test]
fn every_command_reaches_the_machine_and_its_answer_comes_back() {
    let bench = bench();
    let mode = std::fs::metadata(&bench.path).expect("the socket is there").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let mut client = bench.client();
    assert_eq!(client.status().expect("a status"), bench.machine.status());
    assert_eq!(client.counters().expect("counters"), bench.machine.counters());
    assert_eq!(client.peers().expect("peers"), bench.machine.peers());
    assert_eq!(client.memory().ok(), bench.machine.memory().ok());
    assert_eq!(client.coherence().expect("counters"), bench.machine.coherence().expect("counters"));
    client.ask(Command::PowerOff).expect("it is pressed");
    client.ask(Command::Balloon { target: Bytes(64 << 20) }).expect("it is asked");
    client.ask(Command::Pause).expect("it pauses");
    assert_eq!(client.status().expect("a status").state, State::Paused);
    let refused = client.ask(Command::PowerOff).expect_err("a paused guest cannot notice");
    assert!(
        matches!(&refused, ClientError::Refused(Error::NotNow(why)) if why.contains("paused")),
        "{refused}"
    );
    let state = client.ask(Command::SaveState).expect("a state");
    assert_eq!(state, serde_json::json!({"vcpus": []}));
    client.ask(Command::Resume).expect("it resumes");
    client.ask(Command::Resize { console: Console::Serial, columns: 80, rows: 25 }).expect("it is told");
    client.ask(Command::Kill).expect("it is killed");
    assert_eq!(*bench.machine.done.lock().expect("no panic"), ["power off", "balloon 64M", "kill"]);
    assert_eq!(*bench.sizes.lock().expect("no panic"), [(Console::Serial, 80, 25)]);
    bench.server.finish();
    assert!(matches!(client.status(), Err(ClientError::Unreachable(_))));
}

#[test]
fn a_command_that_waits_holds_up_nobody() {
    let bench = bench();
    bench.machine.stuck.store(true, Ordering::SeqCst);
    let mut stream = bench.raw();
    for id in 0..5 {
        say(&mut stream, format!("{{\"version\":1,\"id\":{id},\"command\":\"pause\"}}\n").as_bytes());
    }
    let busy = line(&mut stream);
    assert!(busy.contains(r#""id":4"#) && busy.contains(r#""kind":"busy""#), "{busy}");
    let mut other = bench.client();
    assert_eq!(other.status().expect("a status").state, State::Running);
    other.ask(Command::Kill).expect("it is killed");
    bench.machine.stuck.store(false, Ordering::SeqCst);
    for id in 0..4 {
        assert!(line(&mut stream).contains(&format!(r#""id":{id},"ok":null"#)));
    }
    bench.server.finish();
}

#[test]
fn nonsense_is_answered_and_the_next_request_is_served() {
    let bench = bench();
    let mut stream = bench.raw();
    say(&mut stream, b"\xff\xfe nonsense\n\n  \n{\"version\":1,\"id\":9,\"command\":\"kill me\"}\n");
    assert!(line(&mut stream).contains(r#""id":null,"error":{"kind":"invalid""#));
    assert!(line(&mut stream).contains(r#""id":9,"error":{"kind":"invalid""#));
    // In pieces, and the rest of the line later.
    say(&mut stream, b"{\"version\":1,\"id\":10,");
    std::thread::sleep(Duration::from_millis(20));
    say(&mut stream, b"\"command\":\"status\"}\n");
    let answer = line(&mut stream);
    assert!(answer.contains(r#""id":10,"ok":{"#) && answer.contains(r#""name":"g""#), "{answer}");
    bench.server.finish();
}

#[test]
fn a_line_without_end_is_refused_and_its_connection_closed() {
    let bench = bench();
    let mut stream = bench.raw();
    say(&mut stream, &vec![b'x'; 1 << 20]);
    assert!(line(&mut stream).contains("a request is at most 4096 bytes long"));
    let mut rest = Vec::new();
    // Closed, or reset because the server did not read it all.
    let _ = stream.read_to_end(&mut rest);
    assert!(rest.is_empty());
    assert!(bench.client().status().is_ok(), "others are served");
    bench.server.finish();
}

#[test]
fn whoever_takes_no_answers_is_not_read_from_and_harms_nobody() {
    let bench = bench();
    let stream = bench.raw();
    let request = b"{\"version\":1,\"id\":1,\"command\":\"status\"}\n";
    stream.get_ref().set_write_timeout(Some(Duration::from_millis(300))).expect("a time-out is valid");
    let mut sent = 0u64;
    while sent < 64 << 20 {
        match stream.get_ref().write(request) {
            Ok(taken) => sent += taken as u64,
            Err(_) => break,
        }
    }
    assert!(sent < 16 << 20, "the server reads without bound: {sent}");
    assert!(bench.client().status().is_ok(), "others are served");
    bench.server.finish();
}

#[test]
fn more_connections_than_fit_are_told_so() {
    let bench = bench();
    let mut clients: Vec<_> = (0..super::MOST_CLIENTS).map(|_| bench.client()).collect();
    for client in &mut clients {
        client.status().expect("it is served");
    }
    let mut turned_away = bench.raw();
    assert!(line(&mut turned_away).contains(r#""kind":"busy""#));
    clients.pop();
    let start = std::time::Instant::now();
    while bench.client().status().is_err() {
        assert!(start.elapsed() < Duration::from_secs(20), "there is room again");
    }
    bench.server.finish();
}

#[test]
fn any_bytes_leave_the_server_serving() {
    let bench = bench();
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    for _ in 0..200 {
        let mut stream = bench.raw();
        let bytes: Vec<u8> = (0..random() % 6000)
            .map(|_| match random() % 6 {
                0 => b'\n',
                1 => b'{',
                2 => b'"',
                _ => random() as u8,
            })
            .collect();
        say(&mut stream, &bytes);
    }
    let start = std::time::Instant::now();
    while bench.client().status().is_err() {
        assert!(start.elapsed() < Duration::from_secs(20), "the server serves");
    }
    bench.server.finish();
}
