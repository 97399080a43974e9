//! `omega console`: this terminal on a console of a guest that runs.

use std::io::{self, IsTerminal, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};

use super::runtime::{self, Folder};
use super::signals::{self, Event};
use super::{Failure, args};
use crate::console::{Command, Escape, terminal};
use crate::control::Client;
use crate::control::protocol::{Command as Request, Console};

const HELP: &str = "[omega: Ctrl-] and then  q  detach   k  end the guest   p  pause or resume it   \
    Ctrl-]  send Ctrl-] to the guest]";

pub(super) fn console(args: &args::Console) -> Result<(), Failure> {
    let folder = runtime::find(&args.name)?;
    let (path, which) = match args.virtio {
        false => (folder.console(), Console::Serial),
        true => (folder.virtio_console(), Console::Virtio),
    };
    let stream = UnixStream::connect(&path).map_err(|why| {
        let name = folder.name();
        let (kind, key) = if args.virtio { ("virtio", "console") } else { ("serial", "serial") };
        Failure::failed(match why.kind() {
            io::ErrorKind::NotFound => {
                format!("The guest `{name}` has no {kind} console; its configuration's key `{key}` says so")
            }
            _ => format!("The console of the guest `{name}` does not answer: {why}"),
        })
    })?;
    let held = signals::hold()?;
    let raw = terminal::Raw::enter()?;
    let attachment =
        Arc::new(Attachment { folder, which, stream: stream.try_clone()?, why: Mutex::default() });
    attachment.tell_size();
    let watched = Arc::clone(&attachment);
    held.watch(move |event| match event {
        Event::End | Event::EndNow => watched.leave("detached by a signal"),
        Event::Window | Event::Continued => watched.tell_size(),
    })?;
    if raw.is_some() {
        eprint!("[omega: console of `{}`; Ctrl-] and then ? for help]\r\n", args.name);
    }
    let typing = Arc::clone(&attachment);
    // Ends with the process: nothing wakes who waits for a key.
    std::thread::Builder::new().name("keys".into()).spawn(move || typing.keys())?;
    let result = show_output(stream);
    drop(raw);
    let why = attachment.why.lock().unwrap_or_else(PoisonError::into_inner).take();
    if io::stderr().is_terminal() {
        eprintln!("\n[omega: {}]", why.as_deref().unwrap_or("the console ended"));
    }
    match result {
        // Standard output is gone, as with `| head`: nobody is there to be told.
        Err(why) if why.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other.map_err(Failure::from),
    }
}

fn show_output(mut stream: UnixStream) -> io::Result<()> {
    let mut out = io::stdout().lock();
    let mut bytes = [0; 16384];
    loop {
        match stream.read(&mut bytes) {
            Ok(0) => return Ok(()),
            Ok(taken) => {
                out.write_all(&bytes[..taken])?;
                out.flush()?;
            }
            Err(why) if why.kind() == io::ErrorKind::Interrupted => {}
            Err(why) if why.kind() == io::ErrorKind::ConnectionReset => return Ok(()),
            Err(why) => return Err(why),
        }
    }
}

struct Attachment {
    folder: Folder,
    which: Console,
    stream: UnixStream,
    /// Why it ended, if not by the guest.
    why: Mutex<Option<String>>,
}

impl Attachment {
    fn leave(&self, why: &str) {
        *self.why.lock().unwrap_or_else(PoisonError::into_inner) = Some(why.to_owned());
        // Whoever reads the output sees the end of it.
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    /// Sends keys to the guest until there are none.
    fn keys(&self) {
        let interactive = io::stdin().is_terminal();
        let mut escape = Escape::default();
        let mut bytes = [0; 1024];
        loop {
            let taken = match nix::unistd::read(io::stdin(), &mut bytes) {
                // The output goes on.
                Ok(0) => return,
                Ok(taken) => taken,
                Err(nix::Error::EINTR) => continue,
                // In the background nothing is typed; look again when somebody may have come back.
                Err(nix::Error::EIO) if interactive && !terminal::in_foreground() => {
                    std::thread::sleep(std::time::Duration::from_millis(200));
                    continue;
                }
                Err(_) => return,
            };
            let mut input = Vec::new();
            let commands = if interactive {
                escape.feed(&bytes[..taken], &mut input)
            } else {
                input.extend_from_slice(&bytes[..taken]);
                Vec::new()
            };
            if (&self.stream).write_all(&input).is_err() {
                return;
            }
            for command in commands {
                self.obey(command);
            }
        }
    }

    fn obey(&self, command: Command) {
        match command {
            Command::Quit => self.leave("detached; the guest runs on"),
            Command::Help => eprint!("\r\n{HELP}\r\n"),
            Command::Kill => self.ask(Request::Kill),
            Command::Pause => {
                let paused = self.client().and_then(|mut client| client.status().ok());
                let paused = paused.is_some_and(|status| status.state == crate::control::State::Paused);
                self.ask(if paused { Request::Resume } else { Request::Pause });
            }
        }
    }

    fn client(&self) -> Option<Client> {
        Client::connect(&self.folder.control(), Some(std::time::Duration::from_secs(5))).ok()
    }

    fn ask(&self, request: Request) {
        let what = format!("{request:?}").to_lowercase();
        match self.client().map(|mut client| client.ask(request)) {
            Some(Ok(_)) => eprint!("\r\n[omega: {what}: done]\r\n"),
            Some(Err(why)) => eprint!("\r\n[omega: {what}: {why}]\r\n"),
            None => eprint!("\r\n[omega: {what}: the guest does not answer]\r\n"),
        }
    }

    fn tell_size(&self) {
        let Some((columns, rows)) = terminal::size() else { return };
        if let Some(mut client) = self.client() {
            // A guest that is just ending needs no window.
            let _ = client.ask(Request::Resize { console: self.which, columns, rows });
        }
    }
}
