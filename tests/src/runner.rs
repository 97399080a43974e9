//! Commands in a PC, as the lab sees them.

use std::collections::HashMap;
use std::fmt;
use std::io::{self, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::frames::{Frame, Kind, MAX_PAYLOAD};

/// What a command printed, and how it ended.
#[derive(Clone, Debug)]
pub struct Output {
    /// The command.
    pub command: String,
    /// The exit code, or minus the signal that ended it.
    pub code: i32,
    /// Its standard output.
    pub stdout: Vec<u8>,
    /// Its standard error, as text.
    pub stderr: String,
}

impl Output {
    /// Whether the exit code is 0.
    pub fn success(&self) -> bool {
        self.code == 0
    }

    /// Standard output as text, without the last line's end.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).trim_end().to_owned()
    }

    /// The end and both outputs, for messages.
    pub fn all(&self) -> String {
        format!("[{}] {}{}", self.code, String::from_utf8_lossy(&self.stdout), self.stderr)
    }

    /// The text, or an error that shows everything if the command failed.
    pub fn ok(self) -> Result<String> {
        if self.success() {
            Ok(self.text())
        } else {
            bail!("`{}` ended with {}:\n{}", self.command, self.code, self.all())
        }
    }
}

#[derive(Default)]
struct State {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    /// How much of `stdout` was already expected.
    seen: usize,
    end: Option<Result<i32, String>>,
}

type Tee = Box<dyn Write + Send>;

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    /// Where its output also goes, as it comes.
    tees: Mutex<Vec<Tee>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

type Commands = Arc<Mutex<HashMap<u32, Arc<Shared>>>>;

/// The lab's end of the connection to the runner in a PC.
pub struct Runner {
    stream: Arc<Mutex<UnixStream>>,
    commands: Commands,
    next: AtomicU32,
}

impl Runner {
    /// Over this connection, once the runner answers; `alive` is asked now and then whether waiting makes sense.
    pub fn connect(
        stream: UnixStream,
        patience: Duration,
        mut alive: impl FnMut() -> Result<()>,
    ) -> Result<Self> {
        let mut reader = stream.try_clone()?;
        let runner =
            Self { stream: Arc::new(Mutex::new(stream)), commands: Arc::default(), next: AtomicU32::new(1) };
        let hello = Arc::new(Shared::default());
        lock(&runner.commands).insert(0, Arc::clone(&hello));
        let commands = Arc::clone(&runner.commands);
        thread::spawn(move || {
            let why = loop {
                match Frame::read(&mut reader) {
                    Ok(frame) => dispatch(&commands, &frame),
                    Err(error) => break error,
                }
            };
            for (_, command) in lock(&commands).drain() {
                lock(&command.state).end.get_or_insert(Err(format!("The connection to the PC ended: {why}")));
                command.changed.notify_all();
            }
        });
        runner.send(&Frame::new(0, Kind::Hello, *b"lab"))?;
        let deadline = Instant::now() + patience;
        loop {
            let state = lock(&hello.state);
            let (state, _) = hello
                .changed
                .wait_timeout(state, Duration::from_millis(200))
                .unwrap_or_else(PoisonError::into_inner);
            match &state.end {
                Some(Ok(_)) => return Ok(runner),
                Some(Err(why)) => bail!("{why}"),
                None => {}
            }
            drop(state);
            alive()?;
            if Instant::now() > deadline {
                bail!("The PC did not come up within {} s", patience.as_secs());
            }
        }
    }

    fn send(&self, frame: &Frame) -> io::Result<()> {
        frame.write(&mut *lock(&self.stream))
    }

    /// Starts a shell command.
    pub fn spawn(&self, command: &str) -> Result<Process> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let shared = Arc::new(Shared::default());
        lock(&self.commands).insert(id, Arc::clone(&shared));
        self.send(&Frame::new(id, Kind::Exec, command)).context("The connection to the PC is gone")?;
        Ok(Process { command: command.to_owned(), id, stream: Arc::clone(&self.stream), shared })
    }

    /// Stirs fresh random bytes into the PC's kernel.
    pub fn mix(&self, seed: &[u8]) -> Result<()> {
        Ok(self.send(&Frame::new(0, Kind::Mix, seed))?)
    }

    /// Ends the connection; commands in the PC go on.
    pub fn close(&self) {
        let _ = lock(&self.stream).shutdown(Shutdown::Both);
    }
}

fn dispatch(commands: &Commands, frame: &Frame) {
    let Some(command) = lock(commands).get(&frame.id).cloned() else { return };
    let mut state = lock(&command.state);
    match frame.kind {
        Kind::Stdout => state.stdout.extend_from_slice(&frame.payload),
        Kind::Stderr => state.stderr.extend_from_slice(&frame.payload),
        Kind::Exit => state.end = Some(Ok(frame.number())),
        Kind::Failed => state.end = Some(Err(String::from_utf8_lossy(&frame.payload).into_owned())),
        Kind::Hello => state.end = Some(Ok(0)),
        Kind::Exec | Kind::Stdin | Kind::Signal | Kind::Mix => {}
    }
    if matches!(frame.kind, Kind::Stdout | Kind::Stderr) {
        for tee in lock(&command.tees).iter_mut() {
            let _ = tee.write_all(&frame.payload).and_then(|()| tee.flush());
        }
    }
    if state.end.is_some() {
        lock(commands).remove(&frame.id);
    }
    command.changed.notify_all();
}

/// A command neither did what was waited for nor ended.
#[derive(Debug)]
pub struct Silence(String);

impl fmt::Display for Silence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Silence {}

/// A command that runs in a PC. Dropping it leaves the command alone.
pub struct Process {
    command: String,
    id: u32,
    stream: Arc<Mutex<UnixStream>>,
    shared: Arc<Shared>,
}

impl Process {
    /// From now on its output also goes here, as it comes; what it has printed before goes there at once.
    pub fn tee(&self, mut to: impl Write + Send + 'static) {
        let state = lock(&self.shared.state);
        let _ =
            to.write_all(&state.stdout).and_then(|()| to.write_all(&state.stderr)).and_then(|()| to.flush());
        lock(&self.shared.tees).push(Box::new(to));
    }

    /// Gives it input.
    pub fn write(&self, bytes: &[u8]) -> Result<()> {
        for piece in bytes.chunks(MAX_PAYLOAD) {
            self.frame(Kind::Stdin, piece)?;
        }
        Ok(())
    }

    /// Ends its input.
    pub fn close_stdin(&self) -> Result<()> {
        self.frame(Kind::Stdin, &[])
    }

    /// Sends a signal to it and its children.
    pub fn signal(&self, signal: i32) -> Result<()> {
        self.frame(Kind::Signal, &signal.to_le_bytes())
    }

    fn frame(&self, kind: Kind, payload: &[u8]) -> Result<()> {
        Frame::new(self.id, kind, payload)
            .write(&mut *lock(&self.stream))
            .with_context(|| format!("The PC in which `{}` runs is gone", self.command))
    }

    /// Waits until `found` finds what it looks for in the state, or the command or the patience ends.
    fn wait_for<T>(
        &self,
        patience: Duration,
        what: &str,
        mut found: impl FnMut(&mut State) -> Option<T>,
    ) -> Result<T> {
        let deadline = Instant::now() + patience;
        let mut state = lock(&self.shared.state);
        loop {
            if let Some(value) = found(&mut state) {
                return Ok(value);
            }
            let end = state.end.clone();
            let left = deadline.saturating_duration_since(Instant::now());
            if end.is_some() || left.is_zero() {
                let how = match &end {
                    Some(Ok(code)) => format!("it ended with {code}"),
                    Some(Err(why)) => why.clone(),
                    None => format!("{} s passed", patience.as_secs()),
                };
                let (last, last_error) = (last_line(&state.stdout), last_line(&state.stderr));
                let text = format!(
                    "`{}`: waiting for {what}, {how}; its last lines are `{last}` and `{last_error}`; \
                     its output ends with:\n{}",
                    self.command,
                    tail(&state)
                );
                if end.is_none() {
                    return Err(Silence(text).into());
                }
                bail!("{text}");
            }
            state = self.shared.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Waits until `text` appears in its output, after what was expected before; returns the output up to and
    /// with it.
    pub fn expect(&self, text: &str, patience: Duration) -> Result<String> {
        self.expect_any(&[text], patience).map(|(_, output)| output)
    }

    /// As [`Self::expect`], for whichever of several texts comes first; says which one it was.
    pub fn expect_any(&self, texts: &[&str], patience: Duration) -> Result<(usize, String)> {
        let what = format!("{texts:?}");
        self.wait_for(patience, &what, |state| {
            let new = &state.stdout[state.seen..];
            let (at, which) = texts
                .iter()
                .enumerate()
                .filter_map(|(i, text)| find(new, text.as_bytes()).map(|at| (at + text.len(), i)))
                .min()?;
            let output = String::from_utf8_lossy(&new[..at]).into_owned();
            state.seen += at;
            Some((which, output))
        })
    }

    /// Waits until `text` is in its standard error, wherever.
    pub fn expect_error(&self, text: &str, patience: Duration) -> Result<()> {
        self.wait_for(patience, &format!("`{text}` in its standard error"), |state| {
            find(&state.stderr, text.as_bytes()).map(drop)
        })
    }

    /// Everything that it has printed to standard output so far.
    pub fn so_far(&self) -> String {
        String::from_utf8_lossy(&lock(&self.shared.state).stdout).into_owned()
    }

    /// Everything that it has printed to standard error so far.
    pub fn errors_so_far(&self) -> String {
        String::from_utf8_lossy(&lock(&self.shared.state).stderr).into_owned()
    }

    /// Whether it has ended.
    pub fn ended(&self) -> bool {
        lock(&self.shared.state).end.is_some()
    }

    /// Waits for its end.
    pub fn wait(&self, patience: Duration) -> Result<Output> {
        let end = self.wait_for(patience, "its end", |state| state.end.clone())?;
        let code = end.map_err(|why| anyhow::anyhow!("`{}`: {why}", self.command))?;
        let state = lock(&self.shared.state);
        Ok(Output {
            command: self.command.clone(),
            code,
            stdout: state.stdout.clone(),
            stderr: String::from_utf8_lossy(&state.stderr).into_owned(),
        })
    }
}

fn find(bytes: &[u8], text: &[u8]) -> Option<usize> {
    bytes.windows(text.len()).position(|window| window == text)
}

/// Where an error's text is cut off, its first line is what is left.
fn last_line(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(&bytes[bytes.len().saturating_sub(1000)..]).into_owned();
    text.trim_end().rsplit(['\n', '\r']).next().unwrap_or_default().to_owned()
}

fn tail(state: &State) -> String {
    let last =
        |bytes: &[u8]| String::from_utf8_lossy(&bytes[bytes.len().saturating_sub(3000)..]).into_owned();
    format!("{}\n{}", last(&state.stdout), last(&state.stderr))
}
