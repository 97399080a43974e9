//! `omega node drain`: has guests' memory moved away from a node, and shows how far that is.

use std::io;
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use serde::Serialize;

use super::human::harmless;
use super::runtime::{self, Folder};
use super::{Failure, args, show};
use crate::control;
use crate::control::client::{self, Client};
use crate::control::protocol::Command;

/// How long a guest may take to answer what it answers at once.
const PATIENCE: Duration = Duration::from_secs(5);
const LOOK: Duration = Duration::from_millis(200);
/// A move that stood still for so long, with no room left anywhere, waits for more helpers. Room that pieces on their
/// way have taken is not left either, so what tells is that nothing is copied any more.
const NO_ROOM: Duration = Duration::from_secs(10);

/// A guest whose memory moves.
struct Move {
    guest: String,
    client: Client,
    /// The helper's name in that guest.
    helper: String,
    left: Option<u64>,
    /// Pages that other helpers have got so far.
    copied: u64,
    since: Instant,
}

/// How far one guest's move is, for programs.
#[derive(Serialize)]
struct Progress<'a> {
    guest: &'a str,
    helper: &'a str,
    /// Pieces that are still to move.
    leaving: u64,
    /// Pages that it still keeps.
    pages: u64,
    done: bool,
}

pub(super) fn drain(args: &args::NodeDrain) -> Result<(), Failure> {
    // From here on Ctrl-C stops the watching only.
    let signals: SigSet = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP].into_iter().collect();
    signals.thread_block().map_err(io::Error::from)?;
    let flags = SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC;
    let signals = SignalFd::with_flags(&signals, flags).map_err(io::Error::from)?;
    let folders = match &args.guest {
        Some(name) => vec![runtime::find(name)?],
        None => runtime::running()?,
    };
    let mut moves = Vec::new();
    for folder in &folders {
        moves.extend(begin(folder, &args.node, args.guest.is_some())?);
    }
    if moves.is_empty() {
        return Err(Failure::failed(format!("No guest here has memory on {}", harmless(&args.node))));
    }
    loop {
        let mut over = true;
        for of in &mut moves {
            over &= of.look(args.json)?;
        }
        if over {
            return Ok(());
        }
        if signals.read_signal().is_ok_and(|signal| signal.is_some()) {
            eprintln!("The move goes on; `omega node drain {}` shows it again.", harmless(&args.node));
            return Err(Failure::silent(1));
        }
        sleep(LOOK);
    }
}

/// Begins to empty `node`, if the guest has memory there. `must`: it is this guest that was named.
fn begin(folder: &Folder, node: &str, must: bool) -> Result<Option<Move>, Failure> {
    let guest = folder.name().to_owned();
    let failed = |why: &dyn std::fmt::Display| Failure::failed(format!("The guest `{guest}`: {why}"));
    let mut client = match Client::connect(&folder.control(), Some(PATIENCE)) {
        Ok(client) => client,
        Err(why) if must => return Err(failed(&why)),
        Err(_) => return Ok(None),
    };
    let helper = match client.ask(Command::MemoryDrain { helper: node.to_owned() }) {
        Ok(serde_json::Value::String(helper)) => helper,
        Ok(_) => return Err(failed(&"it answers in a way that this version does not understand")),
        Err(why) if must => return Err(failed(&why)),
        Err(client::Error::Refused(why @ control::Error::NotNow(_))) => return Err(failed(&why)),
        // It has no memory there.
        Err(_) => return Ok(None),
    };
    Ok(Some(Move { guest, client, helper, left: None, copied: 0, since: Instant::now() }))
}

impl Move {
    /// Shows what changed; whether it is over.
    fn look(&mut self, json: bool) -> Result<bool, Failure> {
        let Self { guest, helper, .. } = self;
        // Otherwise it ended, and so did its memory there.
        let Ok(helpers) = self.client.helpers() else { return Ok(true) };
        let Some(now) = helpers.iter().find(|known| known.name == *helper) else { return Ok(true) };
        let done = now.standing == "left";
        let others = || helpers.iter().filter(|other| other.name != *helper);
        let copied = others().map(|other| other.copied).sum();
        if std::mem::replace(&mut self.copied, copied) != copied {
            self.since = Instant::now();
        }
        if self.left != Some(now.leaving) || done {
            self.since = Instant::now();
            self.left = Some(now.leaving);
            let (leaving, pages) = (now.leaving, now.pages);
            if json {
                let progress = Progress { guest, helper, leaving, pages, done };
                let line = serde_json::to_string(&progress).map_err(io::Error::other)?;
                show(&format!("{line}\n"))?;
            } else if done {
                show(&format!("{guest}: {} keeps nothing any more\n", harmless(helper)))?;
            } else {
                show(&format!("{guest}: {leaving} pieces, {pages} pages still on {}\n", harmless(helper)))?;
            }
        }
        let here = others().filter(|other| other.standing == "here");
        let room: u64 = here.map(|other| other.room.saturating_sub(other.pages)).sum();
        if !done && now.leaving > 0 && room == 0 && self.since.elapsed() >= NO_ROOM {
            return Err(Failure::failed(format!(
                "{} pieces of `{guest}` stay on {}: no other helper has room for them; they move as soon as one has",
                now.leaving,
                harmless(helper)
            )));
        }
        Ok(done)
    }
}
