//! `omega run`: configuration → consoles → machine → control socket → exit code.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use devices::thread::{Role, spawn};

use super::runtime::Claim;
use super::signals::{self, Event};
use super::{Failure, args, credentials};
use crate::config::{Disk, Guest, Mistakes, Serial};
use crate::console::{self, Command, Hub, terminal};
use crate::control::protocol::Console;
use crate::control::{Controlled, Server, State};
use crate::machine::{self, Exit, Machine};
use crate::seccomp;

/// How often the power button is pressed of a guest that does not listen yet.
const AGAIN: Duration = Duration::from_millis(200);

pub(super) fn run(args: &args::Run) -> Result<(), Failure> {
    let guest = configure(args)?;
    // Before the first thread, which would take signals otherwise, and before anybody can know of this guest
    // and ask it to end.
    let held = signals::hold()?;
    let claim = Claim::take(&guest.name)?;
    seccomp::install(args.seccomp).map_err(|why| Failure::failed(why.to_string()))?;
    let (steering, wishes) = Steering::new();
    let consoles = Consoles::open(&guest, &claim, &steering)?;
    let (watching, hub) = (Arc::clone(&steering), consoles.serial.clone());
    held.watch(move |event| watching.signal(event, &hub))?;
    let result = live(&guest, args, &claim, &consoles, &steering, wishes);
    // First the terminal: what is said next is to be read.
    consoles.finish();
    let exit = result?;
    match exit {
        Exit::PoweredOff => tracing::info!("The guest powered off"),
        Exit::Rebooted => tracing::info!("The guest rebooted, which ends it (`on.reboot`)"),
        Exit::Panicked => tracing::error!("The guest's kernel panicked"),
        Exit::TripleFault => tracing::error!("The guest ended by a triple fault"),
        Exit::Killed => tracing::info!("The guest was ended"),
        Exit::MemoryLost => tracing::error!("The guest ended because memory of it was lost with a helper"),
    }
    drop(claim);
    match exit.code() {
        0 => Ok(()),
        code => Err(Failure::silent(code)),
    }
}

/// Builds the machine, and runs it until it ends.
fn live(
    guest: &Guest,
    args: &args::Run,
    claim: &Claim,
    consoles: &Consoles,
    steering: &Arc<Steering>,
    wishes: Receiver<Wish>,
) -> Result<Exit, Failure> {
    tracing::info!("{}", describe(guest));
    let options = machine::Options {
        allow_unfit_kvm: args.allow_unfit_kvm,
        identity: credentials::find(guest, args.identity.as_deref())?,
        cache: cache(),
        serial: consoles.serial.clone(),
        console: consoles.virtio.clone(),
    };
    let machine = Machine::new(guest, options).map_err(|why| not_started(&why))?;
    let controller: Arc<dyn Controlled> = machine.controller();
    let hubs = (consoles.serial.clone(), consoles.virtio.clone());
    let resize = Box::new(move |which, columns, rows| match (which, &hubs) {
        (Console::Serial, (serial, _)) => serial.resize(columns, rows),
        (Console::Virtio, (_, Some(virtio))) => virtio.resize(columns, rows),
        (Console::Virtio, (_, None)) => {}
    });
    let path = claim.folder().control();
    let server = Server::start(&path, Arc::clone(&controller), resize).map_err(|why| {
        Failure::failed(format!("The control socket {} cannot be made: {why}", path.display()))
    })?;
    steering.start(controller, wishes)?;
    if consoles.serial.take_terminal(&guest.serial)? {
        tracing::info!("Keys go to the guest; Ctrl-] and then ? for help");
    }
    let result = machine.run();
    server.finish();
    result.map_err(|why| Failure::failed(why.to_string()))
}

/// One line for a machine that cannot be built.
fn not_started(why: &machine::Error) -> Failure {
    Failure::failed(match why {
        machine::Error::Unfit(crate::kvm::Fitness::Unfit(_)) => {
            format!("{why} (`omega check` says more; --allow-unfit-kvm starts all the same)")
        }
        _ => why.to_string(),
    })
}

/// Reads the configuration and what the command line changes in it.
fn configure(args: &args::Run) -> Result<Guest, Failure> {
    let wrong = |mistakes: Mistakes| {
        // Each line begins with the file, so that editors find it.
        eprintln!("{mistakes}");
        Failure::silent(2)
    };
    let mut guest = Guest::load(&args.config).map_err(wrong)?;
    let args::Run { name, cpus, memory, cmdline_append, .. } = args;
    if name.is_none() && cpus.is_none() && memory.is_none() && cmdline_append.is_none() {
        return Ok(guest);
    }
    if let Some(name) = name {
        guest.name.clone_from(name);
    }
    if let Some(cpus) = cpus {
        guest.cpu.count = *cpus;
    }
    if let Some(memory) = memory {
        guest.memory.size = *memory;
    }
    if let Some(words) = cmdline_append {
        let cmdline = &mut guest.kernel.cmdline;
        if !cmdline.is_empty() {
            cmdline.push(' ');
        }
        cmdline.push_str(words);
    }
    guest.check("with the command line's changes").map_err(wrong)?;
    Ok(guest)
}

/// What is about to be started, in one line.
fn describe(guest: &Guest) -> String {
    let Guest { name, kernel, cpu, memory, disk, net, .. } = guest;
    let plural = if cpu.count == 1 { "" } else { "s" };
    let mut text = format!(
        "Starting the guest `{name}`: {} vCPU{plural}, {} of RAM, kernel {}",
        cpu.count,
        memory.size,
        kernel.image.display()
    );
    for (index, disk) in disk.iter().enumerate() {
        let Disk { path, remote, .. } = disk;
        if let Some(path) = path {
            text += &format!(", disk{index} {}", path.display());
        } else if let Some(remote) = remote {
            text += &format!(", disk{index} {} of {}", remote.volume, remote.agent);
        }
    }
    for (index, net) in net.iter().enumerate() {
        text += &format!(", net{index} {}", net.tap);
    }
    text
}

/// Where unpacked kernels are kept.
fn cache() -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|path| !path.is_empty()).map(PathBuf::from);
    let folder = set("XDG_CACHE_HOME").or_else(|| set("HOME").map(|home| home.join(".cache")))?;
    Some(folder.join("omega"))
}

struct Consoles {
    serial: Hub,
    virtio: Option<Hub>,
}

impl Consoles {
    fn open(guest: &Guest, claim: &Claim, steering: &Arc<Steering>) -> Result<Self, Failure> {
        let failed = |why: console::Error| Failure::failed(why.to_string());
        let told = Arc::clone(steering);
        let options = console::Options {
            socket: Some(claim.folder().console()),
            command: Some(Box::new(move |command| told.command(command))),
        };
        let serial = Hub::open(&guest.serial, options).map_err(failed)?;
        let virtio = match guest.console {
            Some(_) => {
                let socket = Some(claim.folder().virtio_console());
                let options = console::Options { socket, command: None };
                Some(Hub::open(&Serial::Console, options).map_err(failed)?)
            }
            None => None,
        };
        Ok(Self { serial, virtio })
    }

    fn finish(&self) {
        self.serial.finish();
        if let Some(virtio) = &self.virtio {
            virtio.finish();
        }
    }
}

/// What people want of the guest by signals and keys. Nothing here waits, except on the thread of its own.
struct Steering {
    machine: OnceLock<Arc<dyn Controlled>>,
    /// How often the guest was asked to end.
    ends: AtomicU32,
    wishes: SyncSender<Wish>,
}

/// What may take a while.
enum Wish {
    /// Pause the guest, or let it go on.
    Pause,
    /// Press the power button until the guest listens to it.
    PowerOff,
}

impl Steering {
    fn new() -> (Arc<Self>, Receiver<Wish>) {
        let (wishes, received) = sync_channel(4);
        (Arc::new(Self { machine: OnceLock::new(), ends: AtomicU32::new(0), wishes }), received)
    }

    /// From now on there is a machine to steer.
    fn start(&self, machine: Arc<dyn Controlled>, wishes: Receiver<Wish>) -> Result<(), Failure> {
        let steered = Arc::clone(&machine);
        spawn(Role::Control, "wishes", move || {
            // A guest that is still booting, or paused, hears its power button later.
            let mut pressing = false;
            loop {
                let wish = if pressing {
                    wishes.recv_timeout(AGAIN)
                } else {
                    wishes.recv().map_err(|_| RecvTimeoutError::Disconnected)
                };
                match wish {
                    Ok(Wish::Pause) => toggle_pause(&*steered),
                    Ok(Wish::PowerOff) => pressing = !press(&*steered, true),
                    Err(RecvTimeoutError::Timeout) => pressing = !press(&*steered, false),
                    Err(RecvTimeoutError::Disconnected) => return,
                }
            }
        })?;
        // Called once.
        let _ = self.machine.set(machine);
        Ok(())
    }

    fn signal(&self, event: Event, hub: &Hub) {
        match event {
            Event::End => self.end(hub_finish(hub)),
            Event::EndNow => self.kill(hub_finish(hub)),
            Event::Window => hub.window_changed(),
            Event::Continued => {
                hub.window_changed();
                hub.input_ready();
            }
        }
    }

    fn command(&self, command: Command) {
        match command {
            Command::Quit => self.end(terminal::restore),
            Command::Kill => self.kill(terminal::restore),
            Command::Pause => drop(self.wishes.try_send(Wish::Pause)),
            Command::Help => {}
        }
    }

    /// The first time the power button, the second time the end. `leave` before there is a machine.
    fn end(&self, leave: impl FnOnce()) {
        let Some(machine) = self.machine.get() else { return self.kill(leave) };
        if self.ends.fetch_add(1, Ordering::SeqCst) > 0 {
            return machine.kill();
        }
        // If more is being done already than fits, the next time ends the guest all the same.
        drop(self.wishes.try_send(Wish::PowerOff));
    }

    fn kill(&self, leave: impl FnOnce()) {
        match self.machine.get() {
            Some(machine) => machine.kill(),
            None => {
                leave();
                // The machine is being built, perhaps waiting for another PC: nothing to be put in order.
                std::process::exit(Exit::Killed.code().into());
            }
        }
    }
}

fn hub_finish(hub: &Hub) -> impl FnOnce() {
    let hub = hub.clone();
    move || hub.finish()
}

/// Presses the power button; whether it was heard. `first` is told of.
fn press(machine: &dyn Controlled, first: bool) -> bool {
    match machine.power_off() {
        Ok(()) => tracing::info!("Pressed the guest's power button; the next time ends it at once"),
        Err(why) if first => {
            tracing::warn!(
                "{why}; its power button is pressed until it is heard, the next time ends it at once"
            );
            return false;
        }
        Err(_) => return false,
    }
    true
}

fn toggle_pause(machine: &dyn Controlled) {
    let (what, result) = match machine.status().state {
        State::Paused => ("resumed", machine.resume()),
        _ => ("paused", machine.pause()),
    };
    match result {
        Ok(()) => tracing::info!("The guest is {what}"),
        Err(why) => tracing::warn!("The guest cannot be {what}: {why}"),
    }
}
