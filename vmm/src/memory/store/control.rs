//! What is told to running stores from other threads: that a helper is to be emptied, and that there is another one.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::connect::{self, ConnectError, Terms};
use super::health::{Counters, Health, HelperReport, Standing};
use super::remote::{Helper, Remote};

/// What a handler is told.
pub(super) enum Command {
    /// To move everything away from this place.
    Drain(usize),
    /// That there is another place, with room for so many pages.
    Add(Box<Remote>, Arc<Counters>, u64),
}

/// A handler's letters.
pub(super) struct Mailbox {
    commands: Mutex<Vec<Command>>,
    bell: EventFd,
}

impl Mailbox {
    pub(super) fn new() -> std::io::Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        Ok(Self { commands: Mutex::default(), bell: EventFd::from_value_and_flags(0, flags)? })
    }

    fn commands(&self) -> MutexGuard<'_, Vec<Command>> {
        self.commands.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn send(&self, command: Command) {
        self.commands().push(command);
        // A counter that is full rings already.
        let _ = self.bell.write(1);
    }

    pub(super) fn take(&self) -> Vec<Command> {
        // It did not ring.
        let _ = self.bell.read();
        std::mem::take(&mut *self.commands())
    }

    pub(super) fn bell(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}

/// The helper that was named is none of this guest's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("This guest has no memory on {0}")]
pub struct NoSuchHelper(pub String);

/// Steers the stores of a guest while it runs. The order of helpers is that of [`Health::report`].
pub struct Control {
    terms: Terms,
    health: Arc<Health>,
    mailboxes: Vec<Arc<Mailbox>>,
    /// Who the agents know this guest as.
    holders: Vec<u128>,
    /// Places are numbered in the order in which every handler hears of them.
    adding: Mutex<()>,
}

impl Control {
    pub(super) fn new(
        terms: Terms,
        health: Arc<Health>,
        mailboxes: Vec<Arc<Mailbox>>,
        holders: Vec<u128>,
    ) -> Self {
        Self { terms, health, mailboxes, holders, adding: Mutex::default() }
    }

    /// Has everything moved away from `helper` (its agent, as it was given), piece by piece, while the guest runs;
    /// then its memory is given back. [`Health::report`] says how far that is, and when it has left. What nobody else
    /// has room for stays until somebody has.
    ///
    /// # Errors
    /// There is no such helper, or it has left.
    pub fn drain(&self, helper: &str) -> Result<(), NoSuchHelper> {
        let place = self.health.number(helper).ok_or_else(|| NoSuchHelper(helper.to_owned()))?;
        tracing::info!(%helper, "The helper is being emptied");
        self.mailboxes.iter().for_each(|mailbox| mailbox.send(Command::Drain(place)));
        Ok(())
    }

    /// How many bytes those that are here lack to have room for everything without `helper`; nothing of one that is being
    /// emptied already, or that there is not.
    #[must_use]
    pub fn lacks_without(&self, helper: &str) -> u64 {
        let helpers = self.health.report().helpers;
        let one = |other: &&HelperReport| other.name == helper && !other.draining;
        if !helpers.iter().any(|other| one(&other)) {
            return 0;
        }
        let stays = |other: &&HelperReport| {
            // A local file has no connections.
            let helps = other.name != helper && !other.connections.is_empty();
            helps && !other.draining && other.standing == Standing::Here
        };
        let rooms: Vec<u64> = helpers.iter().filter(stays).map(|other| other.room).collect();
        self.terms.missing(&rooms)
    }

    /// Takes another helper's memory, while the guest runs: what lacks a copy gets one there, and what must move.
    /// What is well where it is stays there. Blocks until the helper has answered; not for a confined thread.
    ///
    /// # Errors
    /// Each [`ConnectError`]: one line that says what is wrong.
    pub fn add(&self, helper: &Helper) -> Result<(), ConnectError> {
        let _one_by_one = self.adding.lock().unwrap_or_else(PoisonError::into_inner);
        let room = connect::by_need(helper.pages(), &self.terms);
        let remotes = connect::take(helper, &self.terms, &self.holders, &room)?;
        let counters: Vec<Arc<Counters>> = remotes.iter().map(Remote::counters).collect();
        let views =
            counters.iter().cloned().zip(remotes.iter().map(|remote| Some(remote.metrics()))).collect();
        self.health.add(&helper.agent, views);
        tracing::info!(helper = %helper.agent, "Another helper lends memory");
        let added = remotes.into_iter().zip(counters).zip(room);
        for (mailbox, ((remote, counters), room)) in self.mailboxes.iter().zip(added) {
            mailbox.send(Command::Add(Box::new(remote), counters, room));
        }
        Ok(())
    }
}
