//! The commands that talk to guests which run already.

use std::fmt::Write as _;
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::human::harmless;
use super::runtime::{self, Folder};
use super::{Failure, args, show};
use crate::control::client::{Client, Error as ClientError};
use crate::control::protocol::Command;
use crate::control::{ClockStatus, Counters, Error as Refusal, State, Status, VcpuPlace, Waiting};

/// How long a guest may take to answer what it answers at once.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often to look whether a guest has ended.
const LOOK: Duration = Duration::from_millis(20);

fn connect(folder: &Folder, patience: Option<Duration>) -> Result<Client, Failure> {
    let name = folder.name();
    Client::connect(&folder.control(), patience).map_err(|why| {
        Failure::failed(format!("The guest `{name}` does not answer yet or any more ({why}); try again"))
    })
}

fn refused(name: &str, why: &ClientError) -> Failure {
    Failure::failed(match why {
        ClientError::Refused(Refusal::Unsupported(why)) => {
            format!("The guest `{name}` cannot do this: {why}")
        }
        ClientError::Refused(Refusal::NotNow(why)) => format!("The guest `{name}` cannot do this now: {why}"),
        ClientError::Refused(why) => format!("The guest `{name}` refuses: {why}"),
        why => format!("The guest `{name}` does not answer: {why}"),
    })
}

pub(super) fn ps(args: &args::Output) -> Result<(), Failure> {
    let mut rows = Vec::new();
    for folder in runtime::running()? {
        let client = Client::connect(&folder.control(), Some(PATIENCE));
        match client.and_then(|mut client| client.status()) {
            Ok(status) => rows.push(status),
            Err(_) => {
                // Its process lives: it is being built, or ending, or another version.
                let Some(pid) = folder.process() else { continue };
                rows.push(silent(&folder, pid));
            }
        }
    }
    if args.json {
        return show(&format!("{}\n", super::json(&rows)?));
    }
    let width = rows.iter().map(|row| row.name.len()).max().unwrap_or(0).max(4);
    let mut text =
        format!("{:width$}  {:8}  {:>4}  {:>7}  {:>9}  PID\n", "NAME", "STATE", "CPUS", "MEMORY", "UPTIME");
    for row in &rows {
        let Status { name, pid, vcpus, memory, .. } = row;
        let (state, up) = (state(row.state), uptime(row.uptime_ms));
        let (vcpus, memory) = match row.state {
            State::Starting => ("-".to_owned(), "-".to_owned()),
            _ => (vcpus.to_string(), memory.to_string()),
        };
        // Writing to a text cannot fail.
        let _ = write!(text, "{name:width$}  {state:8}  {vcpus:>4}  {memory:>7}  {up:>9}  {pid}");
        match &row.waits_for {
            Some(waiting) => drop(writeln!(text, "  waits for {}", waits(waiting))),
            None => text.push('\n'),
        }
    }
    show(&text)
}

/// What is known of a guest that does not answer.
fn silent(folder: &Folder, pid: u32) -> Status {
    Status {
        name: folder.name().to_owned(),
        pid,
        state: State::Starting,
        vcpus: 0,
        memory: crate::units::Bytes(0),
        balloon: None,
        uptime_ms: 0,
        resets: 0,
        waits_for: None,
        places: Vec::new(),
        devices: Vec::new(),
    }
}

pub(super) fn state(state: State) -> &'static str {
    match state {
        State::Starting => "starting",
        State::Running => "running",
        State::Paused => "paused",
        State::Ending => "ending",
    }
}

/// Why a guest stands still.
pub(super) fn waits(waiting: &Waiting) -> String {
    let Waiting { helper, why, for_ms } = waiting;
    harmless(&format!("its memory on {helper}, away for {} s: {why}", for_ms / 1000))
}

pub(super) fn uptime(milliseconds: u64) -> String {
    let seconds = milliseconds / 1000;
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60);
    let seconds = seconds % 60;
    if days > 0 {
        format!("{days}d {hours:02}:{minutes:02}")
    } else {
        format!("{hours:02}:{minutes:02}:{seconds:02}")
    }
}

pub(super) fn status(args: &args::Status) -> Result<(), Failure> {
    let folder = runtime::find(&args.name)?;
    let mut client = connect(&folder, Some(PATIENCE))?;
    let status = client.status().map_err(|why| refused(&args.name, &why))?;
    let counters = client.counters().map_err(|why| refused(&args.name, &why))?;
    if args.json {
        #[derive(serde::Serialize)]
        struct Both {
            #[serde(flatten)]
            status: Status,
            counters: Counters,
        }
        return show(&format!("{}\n", super::json(&Both { status, counters })?));
    }
    show(&table(&status, &counters))
}

fn table(status: &Status, counters: &Counters) -> String {
    let Status { name, pid, state: now, vcpus, memory, balloon, uptime_ms, resets, .. } = status;
    let mut text = format!("name      {name}\nstate     {}\nprocess   {pid}\n", state(*now));
    if let Some(waiting) = &status.waits_for {
        let _ = writeln!(text, "waits for {}", waits(waiting));
    }
    // Writing to a text cannot fail.
    let _ = writeln!(text, "vcpus     {vcpus}");
    for VcpuPlace { node, vcpus, room, clock } in &status.places {
        let which: Vec<_> = vcpus.iter().map(u8::to_string).collect();
        let which = if which.is_empty() { "none".to_owned() } else { which.join(", ") };
        let room = room.map_or(String::new(), |room| format!(" (room for {room})"));
        let clock = clock.map_or(String::new(), |ClockStatus { error_ns, latency_ns, in_order }| {
            let order = if in_order { "" } else { ", NOT IN ORDER" };
            format!(", clock within {error_ns} ns, {latency_ns} ns away{order}")
        });
        let _ = writeln!(text, "  on {}: {which}{room}{clock}", harmless(node));
    }
    let _ = writeln!(text, "memory    {memory}");
    if let Some(balloon) = balloon {
        let _ = writeln!(text, "balloon   {balloon}");
    }
    let _ = write!(text, "uptime    {}\nresets    {resets}\n", uptime(*uptime_ms));
    for device in &status.devices {
        let _ = writeln!(text, "{:9} {} ({})", device.name, device.about, device.kind);
    }
    for (group, counters) in counters {
        for (counter, value) in counters {
            let _ = writeln!(text, "{group}.{counter} {value}");
        }
    }
    text
}

pub(super) fn pause(args: &args::Name) -> Result<(), Failure> {
    order(&args.name, Command::Pause)
}

pub(super) fn resume(args: &args::Name) -> Result<(), Failure> {
    order(&args.name, Command::Resume)
}

/// Has the guest carry out what may take as long as its devices need.
fn order(name: &str, command: Command) -> Result<(), Failure> {
    let folder = runtime::find(name)?;
    let mut client = connect(&folder, None)?;
    client.ask(command).map(drop).map_err(|why| refused(name, &why))
}

pub(super) fn stop(args: &args::Stop) -> Result<(), Failure> {
    let folder = runtime::find(&args.name)?;
    let deadline = Instant::now().checked_add(args.timeout.0);
    let late = || deadline.is_some_and(|deadline| Instant::now() >= deadline);
    let pressed = ask_to_end(&folder, args, &late)?;
    while folder.process().is_some() {
        if late() {
            let (name, waited) = (&args.name, args.timeout);
            let waiting = connect(&folder, Some(PATIENCE)).ok().and_then(|mut client| client.status().ok());
            let ear = match waiting.and_then(|status| status.waits_for) {
                Some(waiting) => format!(" (it stands still for {})", waits(&waiting)),
                None if pressed => String::new(),
                None => " (it does not listen to its power button)".to_owned(),
            };
            return Err(Failure::failed(format!(
                "The guest `{name}` did not end within {waited} and runs on{ear}; wait longer with --timeout, \
                 or end it at once with `omega stop --force {name}`"
            )));
        }
        sleep(LOOK);
    }
    Ok(())
}

/// How a guest can be asked to end.
enum Reached {
    /// By its control socket.
    Answering(Client),
    /// It has none yet, perhaps because an agent is waited for, and nothing runs: a signal is enough.
    Building(Pid),
    /// It has ended.
    Gone,
}

/// Finds out how the guest can be asked. A process that has just begun, or is about to end, lacks its number
/// or its socket for a moment: it is looked at again until it is too `late`.
fn reach(folder: &Folder, late: &impl Fn() -> bool) -> Result<Reached, Failure> {
    let until = Instant::now() + PATIENCE;
    loop {
        let why = match connect(folder, Some(PATIENCE)) {
            Ok(client) => return Ok(Reached::Answering(client)),
            Err(why) => why,
        };
        match folder.process() {
            None => return Ok(Reached::Gone),
            Some(pid @ 1..) if !folder.control().exists() => {
                return Ok(Reached::Building(Pid::from_raw(i32::try_from(pid).unwrap_or(i32::MAX))));
            }
            Some(_) if late() || Instant::now() >= until => return Err(why),
            Some(_) => sleep(LOOK),
        }
    }
}

/// Presses the power button until it is heard, or pulls the plug. `false` when it was too late.
fn ask_to_end(folder: &Folder, args: &args::Stop, late: &impl Fn() -> bool) -> Result<bool, Failure> {
    let name = &args.name;
    let mut client = match reach(folder, late)? {
        Reached::Answering(client) => client,
        Reached::Building(pid) => {
            kill(pid, Signal::SIGTERM).map_err(std::io::Error::from)?;
            return Ok(true);
        }
        Reached::Gone => return Ok(true),
    };
    let command = if args.force { Command::Kill } else { Command::PowerOff };
    loop {
        match client.ask(command.clone()) {
            Ok(_) => return Ok(true),
            // A guest that ends at this moment is what was asked for.
            Err(ClientError::Unreachable(_)) => return Ok(true),
            Err(why @ ClientError::Refused(Refusal::NotNow(_))) => {
                let status = client.status();
                if status.is_ok_and(|status| status.state == State::Paused && status.waits_for.is_none()) {
                    let mend = format!(
                        "`omega resume {name}` first, or `omega stop --force {name}` ends it at once"
                    );
                    return Err(Failure::failed(format!("{}; {mend}", refused(name, &why).message)));
                }
            }
            Err(why) => return Err(refused(name, &why)),
        }
        if late() {
            return Ok(false);
        }
        sleep(LOOK);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uptimes_are_short() {
        assert_eq!(uptime(59_999), "00:00:59");
        assert_eq!(uptime(3_600_000 * 5), "05:00:00");
        assert_eq!(uptime(86_400_000 * 3 + 60_000), "3d 00:01");
    }
}
