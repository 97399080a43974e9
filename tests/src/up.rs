//! A lab that stays up, and the commands that reach into it from other terminals.
//!
//! The process of `lab up` holds the PCs and listens on `target/lab/up/control`. A client sends one line of
//! JSON, a [`Request`], then speaks [frames](crate::frames) as the runner in a PC does.

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::frames::{Frame, Kind, MAX_PAYLOAD};
use crate::images::{Image, binary, target};
use crate::{Lab, Network, Pc};

/// What is asked of a lab that is up.
#[derive(Debug, Serialize, Deserialize)]
pub struct Request {
    /// Which PC.
    pub pc: String,
    /// What to do with it.
    pub act: Act,
}

/// What can be done to a PC.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Act {
    /// Run a shell command; frames follow.
    Run(String),
    /// Freeze it.
    Freeze,
    /// Thaw it.
    Thaw,
    /// Cut its power.
    Kill,
    /// Switch it on again.
    Start,
    /// Cut its cable.
    Cut,
    /// Mend its cable.
    Heal,
}

fn control() -> PathBuf {
    target().join("lab/up/control")
}

/// Starts this many PCs (`pc1`, `pc2`, …) on one network and keeps them until Ctrl-C. The last one's data
/// disk holds the Debian guest's root; all have Omega's programs, where these are built, in /usr/local/bin,
/// and the images' kernels in /images.
pub fn up(count: u8, fresh: bool) -> Result<()> {
    let start = Instant::now();
    let lab = Lab::new("up")?;
    let lan = lab.network("lan");
    let debian = Image::get("debian")?;
    let mut pcs = Vec::new();
    for number in 1..=count {
        let mut pc = lab.pc(&format!("pc{number}")).on(&lan);
        if number == count {
            pc = pc.data(&debian.file("disk.raw"));
        }
        if fresh {
            pc = pc.fresh();
        }
        let pc = pc.start()?;
        equip(&pc)?;
        println!("{}  {}", pc.name(), pc.address());
        pcs.push(pc);
    }
    println!(
        "up after {:.1} s; logs in {}; `lab run PC COMMAND`, `lab shell PC`; Ctrl-C ends it",
        start.elapsed().as_secs_f32(),
        lab.logs().display()
    );
    let listener = UnixListener::bind(control())?;
    let pcs = Arc::new(pcs);
    for client in listener.incoming().map_while(io::Result::ok) {
        let (pcs, lan) = (Arc::clone(&pcs), lan.clone());
        thread::spawn(move || {
            let mut answers = client.try_clone().ok();
            if let (Err(error), Some(to)) = (serve(client, &pcs, &lan), answers.as_mut()) {
                let _ = Frame::new(0, Kind::Failed, format!("{error:#}")).write(to);
            }
        });
    }
    Ok(())
}

/// Puts Omega's programs, as far as they are built, and the guests' kernels into a PC.
pub fn equip(pc: &Pc) -> Result<()> {
    for name in ["omega", "omega-agent"] {
        if let Ok(path) = binary(name) {
            pc.put(&path, &format!("/usr/local/bin/{name}"), 0o755)?;
        }
    }
    for image in ["mini", "debian"] {
        let from = Image::get(image)?;
        for file in ["vmlinuz", "initrd"] {
            pc.put(&from.file(file), &format!("/images/{image}/{file}"), 0o644)?;
        }
    }
    Ok(())
}

struct ToClient(Arc<Mutex<UnixStream>>);

impl Write for ToClient {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let bytes = &bytes[..bytes.len().min(MAX_PAYLOAD)];
        Frame::new(0, Kind::Stdout, bytes)
            .write(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn serve(client: UnixStream, pcs: &[Arc<Pc>], lan: &Network) -> Result<()> {
    let mut from = BufReader::new(client.try_clone()?);
    let mut line = String::new();
    from.read_line(&mut line)?;
    let request: Request = serde_json::from_str(&line)?;
    let pc = pcs
        .iter()
        .find(|pc| pc.name() == request.pc)
        .with_context(|| format!("There is no PC `{}`", request.pc))?;
    match request.act {
        Act::Freeze => pc.freeze()?,
        Act::Thaw => pc.thaw()?,
        Act::Kill => pc.kill(),
        Act::Start => pc.start()?,
        Act::Cut => lan.cut(pc.name()),
        Act::Heal => lan.heal(pc.name()),
        Act::Run(command) => {
            let process = Arc::new(pc.spawn(&command)?);
            let to = Arc::new(Mutex::new(client));
            process.tee(ToClient(Arc::clone(&to)));
            let input = Arc::clone(&process);
            thread::spawn(move || {
                while let Ok(frame) = Frame::read(&mut from) {
                    match frame.kind {
                        Kind::Stdin if frame.payload.is_empty() => drop(input.close_stdin()),
                        Kind::Stdin => drop(input.write(&frame.payload)),
                        _ => {}
                    }
                }
                // The client is gone: so is its command, a hangup as a terminal would send.
                let _ = input.signal(libc::SIGHUP);
            });
            let output = process.wait(Duration::from_secs(u64::from(u32::MAX)))?;
            let mut to = to.lock().unwrap_or_else(PoisonError::into_inner);
            return Ok(Frame::new(0, Kind::Exit, output.code.to_le_bytes()).write(&mut *to)?);
        }
    }
    Ok(Frame::new(0, Kind::Exit, 0i32.to_le_bytes()).write(&mut &client)?)
}

/// Asks the lab that is up; a command's input and output are this process's. Returns its exit code.
pub fn ask(pc: &str, act: Act) -> Result<i32> {
    let stream = UnixStream::connect(control()).context("No lab is up here; start one by `lab up`")?;
    let mut line = serde_json::to_string(&Request { pc: pc.to_owned(), act })?;
    line.push('\n');
    (&stream).write_all(line.as_bytes())?;
    let input = stream.try_clone()?;
    thread::spawn(move || {
        let mut buffer = [0; 4096];
        loop {
            let n = io::stdin().read(&mut buffer).unwrap_or(0);
            if Frame::new(0, Kind::Stdin, &buffer[..n]).write(&mut &input).is_err() || n == 0 {
                return;
            }
        }
    });
    let mut answers = BufReader::new(stream);
    loop {
        let frame = Frame::read(&mut answers).context("The lab has ended")?;
        match frame.kind {
            Kind::Stdout => {
                let mut out = io::stdout().lock();
                out.write_all(&frame.payload)?;
                out.flush()?;
            }
            Kind::Exit => return Ok(frame.number()),
            Kind::Failed => bail!("{}", String::from_utf8_lossy(&frame.payload)),
            _ => {}
        }
    }
}

/// Copies a file into a PC of the lab that is up.
pub fn put(pc: &str, from: &PathBuf, to: &str) -> Result<i32> {
    let content = fs::read(from).with_context(|| from.display().to_string())?;
    let stream = UnixStream::connect(control()).context("No lab is up here; start one by `lab up`")?;
    let act = Act::Run(format!("cat >{to}"));
    let mut line = serde_json::to_string(&Request { pc: pc.to_owned(), act })?;
    line.push('\n');
    (&stream).write_all(line.as_bytes())?;
    for piece in content.chunks(MAX_PAYLOAD) {
        Frame::new(0, Kind::Stdin, piece).write(&mut &stream)?;
    }
    Frame::new(0, Kind::Stdin, []).write(&mut &stream)?;
    loop {
        let frame = Frame::read(&mut &stream)?;
        match frame.kind {
            Kind::Exit => return Ok(frame.number()),
            Kind::Failed => bail!("{}", String::from_utf8_lossy(&frame.payload)),
            _ => {}
        }
    }
}
