//! Runs in a lab PC: starts the commands that the lab asks for over a virtio-serial port.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread;
use std::time::Duration;

use lab::frames::{Frame, Kind};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

/// The port's name on QEMU's command line.
const PORT: &str = "lab.runner";

fn main() -> io::Result<()> {
    let port = open_port()?;
    let runner = Runner { out: Arc::new(Mutex::new(port.try_clone()?)), commands: Arc::default() };
    let mut port = Patient(port);
    loop {
        let frame = Frame::read(&mut port)?;
        runner.handle(&frame);
    }
}

fn open_port() -> io::Result<File> {
    loop {
        for entry in std::fs::read_dir("/sys/class/virtio-ports")?.flatten() {
            let name = std::fs::read_to_string(entry.path().join("name")).unwrap_or_default();
            if name.trim() == PORT {
                let device = PathBuf::from("/dev").join(entry.file_name());
                return OpenOptions::new().read(true).write(true).open(device);
            }
        }
        thread::sleep(Duration::from_millis(50));
    }
}

/// A port whose other side may be away for a while: reading nothing means just that.
struct Patient(File);

impl Read for Patient {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.0.read(buffer)? {
                0 => thread::sleep(Duration::from_millis(20)),
                n => return Ok(n),
            }
        }
    }
}

struct Running {
    group: Pid,
    /// Input goes to a thread, so that a command that does not read stops nobody else.
    stdin: mpsc::Sender<Vec<u8>>,
}

struct Runner {
    out: Arc<Mutex<File>>,
    commands: Arc<Mutex<HashMap<u32, Running>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn send(out: &Mutex<File>, frame: &Frame) {
    // The lab may be gone; then nobody is left to tell.
    let _ = frame.write(&mut *lock(out));
}

impl Runner {
    fn handle(&self, frame: &Frame) {
        match frame.kind {
            Kind::Hello => send(&self.out, frame),
            Kind::Exec => self.exec(frame.id, &frame.payload),
            Kind::Stdin => {
                if let Some(running) = lock(&self.commands).get(&frame.id) {
                    let _ = running.stdin.send(frame.payload.clone());
                }
            }
            Kind::Signal => {
                if let (Some(running), Ok(signal)) =
                    (lock(&self.commands).get(&frame.id), Signal::try_from(frame.number()))
                {
                    let _ = killpg(running.group, signal);
                }
            }
            Kind::Mix => mix(&frame.payload),
            Kind::Stdout | Kind::Stderr | Kind::Exit | Kind::Failed => {}
        }
    }

    fn exec(&self, id: u32, command: &[u8]) {
        let mut child = match Command::new("/bin/sh")
            .arg("-c")
            .arg(String::from_utf8_lossy(command).as_ref())
            .current_dir("/root")
            .env("HOME", "/root")
            .env("TERM", "dumb")
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
        {
            Ok(child) => child,
            Err(error) => return send(&self.out, &Frame::new(id, Kind::Failed, error.to_string())),
        };
        let (stdin, input) = mpsc::channel();
        if let Some(pipe) = child.stdin.take() {
            thread::spawn(move || feed(pipe, &input));
        }
        let group = Pid::from_raw(child.id().cast_signed());
        lock(&self.commands).insert(id, Running { group, stdin });
        let (ended, ends) = mpsc::channel();
        if let Some(pipe) = child.stdout.take() {
            let (out, ended) = (Arc::clone(&self.out), ended.clone());
            thread::spawn(move || forward(pipe, id, Kind::Stdout, &out, &ended));
        }
        if let Some(pipe) = child.stderr.take() {
            let out = Arc::clone(&self.out);
            thread::spawn(move || forward(pipe, id, Kind::Stderr, &out, &ended));
        }
        let (out, commands) = (Arc::clone(&self.out), Arc::clone(&self.commands));
        thread::spawn(move || {
            let code = wait(&mut child);
            // A daemon that it left behind may keep its output open: do not wait for that one.
            for _ in 0..2 {
                let _ = ends.recv_timeout(Duration::from_millis(300));
            }
            lock(&commands).remove(&id);
            send(&out, &Frame::new(id, Kind::Exit, code.to_le_bytes()));
        });
    }
}

fn wait(child: &mut Child) -> i32 {
    match child.wait() {
        Ok(status) => status.code().or_else(|| status.signal().map(|s| -s)).unwrap_or(255),
        Err(_) => 255,
    }
}

fn feed(mut pipe: ChildStdin, input: &mpsc::Receiver<Vec<u8>>) {
    for bytes in input {
        if bytes.is_empty() || pipe.write_all(&bytes).is_err() {
            return;
        }
    }
}

fn forward(mut pipe: impl Read, id: u32, kind: Kind, out: &Mutex<File>, ended: &mpsc::Sender<()>) {
    let mut buffer = vec![0; 32 << 10];
    while let Ok(n @ 1..) = pipe.read(&mut buffer) {
        send(out, &Frame::new(id, kind, &buffer[..n]));
    }
    let _ = ended.send(());
}

/// Two PCs that were restored from one snapshot would otherwise draw the same random numbers.
fn mix(seed: &[u8]) {
    if let Ok(mut urandom) = OpenOptions::new().write(true).open("/dev/urandom") {
        let _ = urandom.write_all(seed);
        let _ = lab::child::reseed(&urandom);
    }
}
