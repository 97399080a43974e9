//! A folder with guests in it, and the binary `omega` to run on them.
#![allow(dead_code, missing_docs, unreachable_pub, clippy::unwrap_used)] // each test program uses a part of it

pub mod agent;
pub mod micro;

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// How long anything may take on a machine that is slow or busy.
pub const PATIENCE: Duration = Duration::from_secs(60);

pub struct Bench {
    folder: tempfile::TempDir,
}

impl Bench {
    pub fn new() -> Self {
        Self { folder: tempfile::tempdir().expect("a folder") }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Writes the file `name`.
    pub fn file(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, content).expect("the file is written");
        path
    }

    /// A guest whose kernel is `code`; `more` is added to its configuration.
    pub fn guest(&self, name: &str, code: &micro::Code, more: &str) -> PathBuf {
        self.file(&format!("{name}.elf"), code.elf());
        let text =
            format!("name = '{name}'\n{more}\n[kernel]\nimage = '{name}.elf'\n[memory]\nsize = '16M'\n");
        self.file(&format!("{name}.toml"), text)
    }

    /// Where running guests are found.
    pub fn runtime(&self) -> PathBuf {
        self.path("run")
    }

    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_omega"));
        command.args(args).env("OMEGA_RUNTIME_DIR", self.runtime()).current_dir(self.folder.path());
        command.env("XDG_CACHE_HOME", self.path("cache")).env_remove("OMEGA_LOG").stdin(Stdio::null());
        command
    }

    /// Runs the binary to its end.
    pub fn omega(&self, args: &[&str]) -> Outcome {
        Outcome::of(&self.command(args).output().expect("the binary starts"))
    }

    /// Starts `omega run` with its serial port on a pipe.
    pub fn run(&self, config: &Path, args: &[&str]) -> Running {
        let config = config.to_str().expect("a path of ASCII");
        let all = [&["run", config, "--allow-unfit-kvm", "--seccomp", "explain"], args].concat();
        let mut command = self.command(&all);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Running { child: command.spawn().expect("the binary starts"), output: String::new() }
    }
}

#[derive(Debug)]
pub struct Outcome {
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
}

impl Outcome {
    pub fn of(output: &Output) -> Self {
        Self {
            code: output.status.code(),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

pub struct Running {
    pub child: Child,
    pub output: String,
}

impl Running {
    /// Reads the serial port until `text` comes.
    pub fn until(&mut self, text: &str) {
        let out = self.child.stdout.as_mut().expect("its output is a pipe");
        let mut byte = [0];
        while !self.output.contains(text) {
            match out.read(&mut byte).expect("the pipe is read") {
                0 => {
                    let mut err = String::new();
                    let _ = self.child.stderr.as_mut().expect("a pipe").read_to_string(&mut err);
                    panic!("`{text}` did not come; all that came: {:?}; {err}", self.output);
                }
                _ => self.output.push(byte[0].into()),
            }
        }
    }

    pub fn signal(&self, signal: nix::sys::signal::Signal) {
        let pid = nix::unistd::Pid::from_raw(self.child.id() as i32);
        nix::sys::signal::kill(pid, signal).expect("it runs");
    }

    /// Waits for its end.
    pub fn end(mut self) -> Outcome {
        let start = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("it is a child") {
                break status;
            }
            if start.elapsed() > PATIENCE {
                self.child.kill().expect("it runs");
                self.child.wait().expect("it is a child");
                panic!("it did not end; output: {:?}", self.output);
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        let (mut out, mut err) = (std::mem::take(&mut self.output), String::new());
        let _ = self.child.stdout.as_mut().expect("a pipe").read_to_string(&mut out);
        let _ = self.child.stderr.as_mut().expect("a pipe").read_to_string(&mut err);
        Outcome { code: status.code(), out, err }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits until something holds.
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < PATIENCE, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Whether micro-guests can run; says why not.
pub fn kvm() -> bool {
    match std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Ok(_) => true,
        Err(why) => {
            eprintln!("cannot run: /dev/kvm: {why}");
            false
        }
    }
}
