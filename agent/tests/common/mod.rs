//! A real agent process, and a remote disk driven as a device's queue drives it.
#![allow(dead_code, unreachable_pub)] // each test file uses its part

pub mod proxy;
pub mod systemd;

use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use devices::disk::remote::{ConnectError, Options, RemoteDisk, connect};
use devices::disk::{Disk, Done, Error, Operation, Request};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use transport::buffer::Buffer;
use transport::ring::Ring;

use systemd::Systemd;

/// Nothing here takes so long, unless it never ends.
pub const LIMIT: Duration = Duration::from_secs(60);

/// A port that nobody listens on, for a process that will. Not one that the kernel gives to whoever asks for any, or to
/// connections: it would be taken again before the process listens, or between two of its lives.
pub fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let first = std::process::id().wrapping_mul(131) as u16;
    let candidates = || (NEXT.fetch_add(1, Ordering::Relaxed).wrapping_add(first)) % 20_000 + 10_000;
    let free = |port: &u16| TcpListener::bind(("127.0.0.1", *port)).is_ok();
    std::iter::repeat_with(candidates).take(20_000).find(free).expect("a free port")
}

/// A folder with a configuration, and the agent that runs on it.
pub struct Agent {
    pub folder: tempfile::TempDir,
    pub address: String,
    /// Whether single requests are logged.
    pub traces: bool,
    /// What keeps the agent's descriptors, if something does.
    pub systemd: Option<Systemd>,
    child: Option<Child>,
    log: Arc<Mutex<String>>,
}

impl Agent {
    /// Starts an agent with the volumes of `volumes`, in TOML, where `DIR` is the agent's folder.
    pub fn start(volumes: &str) -> Self {
        Self::start_logging(volumes, false)
    }

    /// The same, and single requests are logged if `traces` says so.
    pub fn start_logging(volumes: &str, traces: bool) -> Self {
        let port = free_port();
        let folder = tempfile::tempdir().expect("a folder");
        let address = format!("127.0.0.1:{port}");
        let mut agent = Self { folder, address, traces, systemd: None, child: None, log: Arc::default() };
        agent.configure(volumes);
        agent.run();
        agent
    }

    /// Writes the configuration.
    pub fn configure(&self, volumes: &str) {
        let folder = self.folder.path().display().to_string();
        let ttl = if volumes.contains("lease_ttl") { "" } else { "lease_ttl = '2s'\n" };
        let text = format!(
            "listen = '{}'\nname = 'pc2'\nstate = '{folder}/state'\n{ttl}{}",
            self.address,
            volumes.replace("DIR", &folder)
        );
        std::fs::write(self.config(), text).expect("it writes");
    }

    pub fn config(&self) -> PathBuf {
        self.folder.path().join("agent.toml")
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Starts the process and waits until it listens.
    pub fn run(&mut self) {
        let program = env!("CARGO_BIN_EXE_omega-agent");
        let command = self.systemd.as_ref().map(|systemd| systemd.command(program));
        let mut child = command
            .unwrap_or_else(|| Command::new(program))
            .args(self.traces.then_some("--log=info,transport::request=trace"))
            .args(["--config".as_ref(), self.config().as_os_str()])
            .stderr(Stdio::piped())
            .spawn()
            .expect("it starts");
        let stderr = child.stderr.take().expect("piped");
        let log = Arc::clone(&self.log);
        let (ready, listening) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                if line.contains("Listening") {
                    ready.send(()).ok();
                }
                let mut log = log.lock().expect("the log");
                log.push_str(&line);
                log.push('\n');
            }
        });
        self.child = Some(child);
        listening
            .recv_timeout(LIMIT)
            .unwrap_or_else(|_| panic!("the agent does not listen:\n{}", self.log()));
    }

    pub fn log(&self) -> String {
        self.log.lock().expect("the log").clone()
    }

    pub fn signal(&self, signal: Signal) {
        let child = self.child.as_ref().expect("it runs");
        kill(Pid::from_raw(child.id() as i32), signal).expect("it is there");
    }

    /// The number of the process.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("it runs").id()
    }

    /// Ends the process with `signal` and returns its exit code, none if the signal killed it.
    pub fn end(&mut self, signal: Signal) -> Option<i32> {
        self.signal(signal);
        let mut child = self.child.take().expect("it runs");
        child.wait().expect("it ends").code()
    }

    /// Kills the process and starts it again.
    pub fn restart(&mut self) {
        self.end(Signal::SIGKILL);
        self.run();
    }

    pub fn options(&self, volume: &str) -> Options {
        Options::new(&self.address, volume, "guest@test").expect("random bytes")
    }

    pub fn connect(&self, volume: &str) -> Result<RemoteDisk, ConnectError> {
        connect(self.options(volume), Duration::from_secs(10))
    }

    pub fn disk(&self, volume: &str) -> Driver {
        Driver::new(self.connect(volume).unwrap_or_else(|e| panic!("{e}\n{}", self.log())))
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().ok();
            child.wait().ok();
        }
    }
}

/// A file of `size` bytes.
pub fn image(path: &Path, size: u64) {
    std::fs::File::create(path).and_then(|f| f.set_len(size)).expect("sparse");
}

/// Drives a disk on a ring, as a device's worker does.
pub struct Driver {
    pub disk: RemoteDisk,
    pub ring: Ring,
    pub done: Vec<Done>,
    tag: u64,
}

impl Driver {
    pub fn new(mut disk: RemoteDisk) -> Self {
        let mut ring = Ring::new(64).expect("io_uring works here");
        disk.attach(&mut ring).expect("it attaches");
        Self { disk, ring, done: Vec::new(), tag: 0 }
    }

    pub fn submit(&mut self, operation: Operation, offset: u64, len: u64, buffer: Buffer) -> u64 {
        self.tag += 1;
        let request = Request { tag: self.tag, operation, offset, len, buffer };
        self.disk.submit(&mut self.ring, request, &mut self.done);
        self.tag
    }

    /// One round: sends what is ready and waits for something, `most` at the longest.
    pub fn round(&mut self, most: Duration) {
        let now = Instant::now();
        let next = self.disk.tick(&mut self.ring, now, &mut self.done);
        let wait = next.map_or(most, |at| at.saturating_duration_since(now).min(most));
        let wait = if self.done.is_empty() { wait } else { Duration::ZERO };
        self.ring.wait(Some(wait)).expect("it waits");
        while let Some(completion) = self.ring.reap() {
            self.disk.complete(&mut self.ring, completion, &mut self.done);
        }
    }

    /// Drives the disk for a while, whatever happens.
    pub fn idle(&mut self, span: Duration) {
        let until = Instant::now() + span;
        while Instant::now() < until {
            self.round(Duration::from_millis(10));
        }
    }

    pub fn ask(&mut self, operation: Operation, offset: u64, len: u64, buffer: Buffer) -> Done {
        let tag = self.submit(operation, offset, len, buffer);
        let until = Instant::now() + LIMIT;
        loop {
            if let Some(at) = self.done.iter().position(|d| d.tag == tag) {
                return self.done.swap_remove(at);
            }
            assert!(Instant::now() < until, "no answer to {operation:?}: {}", self.disk.describe());
            self.round(Duration::from_millis(100));
        }
    }

    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        self.ask(Operation::Write, offset, bytes.len() as u64, Buffer::from_vec(bytes.to_vec())).result
    }

    pub fn read(&mut self, offset: u64, len: usize) -> Vec<u8> {
        let done = self.ask(Operation::Read, offset, len as u64, Buffer::zeroed(len));
        done.result.expect("it reads");
        done.buffer.to_vec()
    }

    pub fn flush(&mut self) -> Result<(), Error> {
        self.ask(Operation::Flush, 0, 0, Buffer::empty()).result
    }
}

impl Driver {
    /// Ends the use of the disk, as a device does when its guest ends.
    pub fn close(mut self) {
        self.disk.close(&mut self.ring);
    }
}
