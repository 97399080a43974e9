//! All handlers of a guest, as everybody else sees them.

use std::io;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use vm_memory::GuestAddress;

use super::counters::{Counters, Tally};
use super::handler::{Handler, Post};
use super::mailbox::{Mailbox, Message};
use super::{PAGE, Page, Shards};
use crate::memory::Ram;
use crate::memory::frames::{Frames, LEAST, Map, Unwatched, Whole, worker};
use crate::memory::store::Source;
use crate::units::Bytes;

/// How a guest's memory is handled.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// How much of it may be in this PC's memory.
    pub local: Bytes,
}

/// Guest RAM cannot be handled.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It is private, or somebody has touched it.
    #[error("Guest RAM can be elsewhere only if it is a memory file that nobody has touched yet")]
    Unfit,
    /// No handler, or more than can have a part of RAM each.
    #[error("Guest RAM of {pieces} pieces cannot be divided among {handlers} handlers")]
    Handlers {
        /// Pieces of RAM.
        pieces: u32,
        /// Handlers asked for.
        handlers: usize,
    },
    /// Too little memory here.
    #[error("The guest needs at least {least} of this PC's memory, not {local}")]
    TooLittle {
        /// What was given.
        local: Bytes,
        /// What is needed.
        least: Bytes,
    },
    /// No userfaultfd that sees the guest's faults.
    #[error("The guest's page faults cannot be handled by this process (`omega check` says what is missing)")]
    Userfault(#[source] io::Error),
    /// A handler does not start.
    #[error("A handler of page faults cannot be started")]
    Start(#[source] io::Error),
    /// The handlers have ended.
    #[error("Guest RAM is handled no more")]
    Closed,
}

/// Handles a guest's page faults until it is closed or dropped: which must be after the last access to its RAM,
/// because from then on what is not in this PC's memory reads as zeros.
///
/// A handler that fails ends the whole process, with one line on stderr: a guest must never wait for ever, or read
/// zeros where something was.
pub struct Engine {
    map: Map,
    shards: Shards,
    desks: Vec<Desk>,
}

/// What is known of a handler's thread outside of it.
struct Desk {
    mailbox: Arc<Mailbox>,
    tally: Arc<Tally>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Engine {
    /// Starts one handler for each of `sources`. Whoever touches `ram` from now on may have to wait for them; nobody
    /// may have touched it before.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn start(ram: &Ram, sources: Vec<Box<dyn Source>>, options: Options) -> Result<Self, Error> {
        let whole = Whole::new(ram).map_err(Error::Start)?.ok_or(Error::Unfit)?;
        let pieces = whole.pieces;
        let handlers = sources.len();
        let count = u32::try_from(handlers).ok().filter(|count| (1..=pieces.count()).contains(count));
        let shards = Shards::new(pieces, count.ok_or(Error::Handlers { pieces: pieces.count(), handlers })?);
        let local = options.local.0 / PAGE as u64;
        let least = LEAST * handlers as u64;
        if local < least {
            return Err(Error::TooLittle { local: options.local, least: Bytes(least * PAGE as u64) });
        }
        let mut engine = Self { map: whole.map.clone(), shards, desks: Vec::new() };
        for (shard, source) in (0..).zip(sources) {
            let limit = shards.limit(shard, local);
            let frames = Frames::new(&whole, &shards, shard).map_err(|why| match why {
                Unwatched::Userfault(why) => Error::Userfault(why),
                Unwatched::Start(why) => Error::Start(why),
            })?;
            let mailbox = Arc::new(Mailbox::new().map_err(Error::Start)?);
            let tally = Arc::new(Tally::default());
            let desk = Desk { mailbox: mailbox.clone(), tally: tally.clone(), thread: Mutex::new(None) };
            let post = Post { shard, shards, frames, source, mailbox, tally, limit };
            *lock(&desk.thread) = Some(run(post).map_err(Error::Start)?);
            engine.desks.push(desk);
        }
        Ok(engine)
    }

    /// How the guest's RAM is divided.
    #[must_use]
    pub fn shards(&self) -> &Shards {
        &self.shards
    }

    /// The guest does not need the content of `len` bytes from `start` on any more: whole pages in there are zeros
    /// when this returns, and nobody keeps anything of them. Returns how many bytes of this PC's memory that freed.
    /// Other threads must not count on the content meanwhile.
    ///
    /// # Errors
    /// [`Error::Closed`].
    pub fn discard(&self, start: GuestAddress, len: u64) -> Result<u64, Error> {
        let (tell, told) = channel();
        let mut asked = 0;
        for range in self.map.guest(start, len) {
            let mut at = range.start;
            while at < range.end {
                let here = self.shards.pieces().run(Page(at), range.end - at);
                let owner = self.shards.place(Page(at)).and_then(|(shard, _)| self.desks.get(shard as usize));
                let desk = owner.filter(|_| here > 0).ok_or(Error::Closed)?;
                desk.send(Message::Discard(at..at + here, tell.clone()))?;
                asked += 1;
                at += here;
            }
        }
        drop(tell);
        let freed: Vec<u64> = told.iter().collect();
        if freed.len() == asked { Ok(freed.iter().sum::<u64>() * PAGE as u64) } else { Err(Error::Closed) }
    }

    /// Makes all RAM zeros, as at power-on; nobody keeps anything of it.
    ///
    /// # Errors
    /// [`Error::Closed`].
    pub fn clear(&self) -> Result<(), Error> {
        self.ask(Message::Clear)
    }

    fn ask(&self, message: impl Fn(Sender<u64>) -> Message) -> Result<(), Error> {
        let (tell, told) = channel();
        self.desks.iter().try_for_each(|desk| desk.send(message(tell.clone())))?;
        drop(tell);
        if told.iter().count() == self.desks.len() { Ok(()) } else { Err(Error::Closed) }
    }

    /// What was counted until now.
    #[must_use]
    pub fn counters(&self) -> Counters {
        let mut sum = Counters::default();
        self.desks.iter().for_each(|desk| desk.tally.add_to(&mut sum));
        sum
    }

    /// Why the guest cannot go on, if pages of it were lost that nobody has any more. Threads that touch one wait
    /// for ever.
    #[must_use]
    pub fn lost(&self) -> Option<String> {
        let why = |desk: &Desk| lock(&desk.tally.lost_why).clone();
        self.desks.iter().find_map(why)
    }

    /// Ends the handlers. Nobody may touch the guest's RAM any more.
    pub fn close(&self) {
        for desk in &self.desks {
            // If nobody looks at it any more the handler has ended.
            let _ = desk.send(Message::Stop);
        }
        for thread in self.desks.iter().filter_map(|desk| lock(&desk.thread).take()) {
            // A handler that panics ends the process, so this one did not.
            let _ = thread.join();
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.close();
    }
}

impl Desk {
    fn send(&self, message: Message) -> Result<(), Error> {
        if self.mailbox.send(message) { Ok(()) } else { Err(Error::Closed) }
    }
}

fn run(post: Post) -> io::Result<JoinHandle<()>> {
    let name = format!("memory{}", post.shard);
    worker::start(name, move || Handler::new(post), |mut handler| handler.run())
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
#[path = "engine_test.rs"]
mod tests;
