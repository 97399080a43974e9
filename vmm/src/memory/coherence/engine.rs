//! A member's part of a guest's memory, as everybody else sees it.

use std::io;
use std::os::fd::{AsRawFd as _, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use smallvec::SmallVec;
use transport::buffer::Buffer;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::attend::{self, Board};
use super::counters::Counters;
use super::message::{Member, Members, ToHome};
use super::shard::{Failure, Mail, Shard, whole};
use super::wire::{Age, BODY, Letter, Need, What};
use super::{Homes, Violation};
use crate::memory::Ram;
use crate::memory::frames::{Fault, Frames, Shards, Unwatched, Whole, worker};

/// How members reach each other.
pub trait Lines: Send + Sync {
    /// Sends `body`, a few letters, and a page of `content` if there is one, to member `to`: once, however long that takes. Messages may
    /// overtake each other. It neither blocks nor calls the engine.
    fn send(&self, to: Member, body: &[u8], content: Option<Buffer>);
}

/// Hears that the guest has to stop, and why; on any thread, once at most.
pub type Broken = Box<dyn Fn(&str) + Send + Sync>;

/// A member's part.
#[derive(Clone, Debug)]
pub struct Options {
    /// Who it is.
    pub me: Member,
    /// Who takes part, this one among them. Number 0 is the console.
    pub members: Members,
    /// Which of them are home to which pages: the same for all members.
    pub homes: Homes,
    /// How many threads read faults.
    pub shards: u32,
}

/// A member's memory cannot be kept coherent.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It is private, or somebody has touched it.
    #[error("Guest RAM can be shared with other PCs only if it is a memory file that nobody has touched yet")]
    Unfit,
    /// The options contradict each other or the RAM.
    #[error("The members of the guest's memory do not fit together: {0}")]
    Members(&'static str),
    /// No userfaultfd that sees the guest's faults.
    #[error("The guest's page faults cannot be handled by this process (`omega check` says what is missing)")]
    Userfault(#[source] io::Error),
    /// A thread does not start.
    #[error("A handler of page faults cannot be started")]
    Start(#[source] io::Error),
    /// The engine was closed, or the guest had to stop.
    #[error("Guest RAM is shared with other PCs no more")]
    Closed,
}

/// Keeps one member's part of a guest's memory coherent with the others' until it is closed or dropped: which must be
/// after the last access to its RAM, because from then on what is not in this PC's memory reads as zeros.
///
/// If the kernel refuses something the whole process ends, with one line on stderr: a guest must never wait for ever,
/// or read what is not true. If another member breaks the protocol the guest has to stop, which [`Broken`] hears;
/// threads that touch what is not here wait then until the engine is closed.
pub struct Engine {
    inner: Arc<Inner>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// Where messages for a member's engine go. Clones are the same.
#[derive(Clone)]
pub struct Ear {
    inner: Arc<Inner>,
    /// On the thread of a shard: what is not urgent may go with the next message.
    riding: bool,
}

/// What is shared by all threads.
pub(super) struct Inner {
    me: Member,
    members: Members,
    shards: Vec<Shard>,
    bells: Vec<EventFd>,
    lines: Arc<dyn Lines>,
    broken: Broken,
    why: OnceLock<String>,
    closed: AtomicBool,
    /// Who has not forgotten yet.
    forgetting: Mutex<Members>,
    forgotten: Condvar,
    later: Mutex<Later>,
}

/// Letters that wait for another one to go with, and since when.
#[derive(Default)]
struct Later {
    letters: SmallVec<[(Member, Letter); 8]>,
    since: Option<Instant>,
}

/// A body of several letters.
type Letters = SmallVec<[u8; 4 * BODY]>;

/// So many letters go together.
const MOST: usize = 8;

/// So long at most a letter waits for another.
const LATER: Duration = Duration::from_micros(20);

impl Engine {
    /// Starts. Whoever touches `ram` from now on may have to wait for other members; nobody may have touched it before.
    /// `boards` ride on the first shard's ring.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn start(
        ram: &Ram,
        options: &Options,
        lines: Arc<dyn Lines>,
        broken: Broken,
        boards: Vec<Board>,
    ) -> Result<Self, Error> {
        let Options { me, members, homes, shards: count } = options;
        let whole = Whole::new(ram).map_err(Error::Start)?.ok_or(Error::Unfit)?;
        let pieces = whole.pieces;
        if !members.has(*me) || !homes.all().all(|home| members.has(home)) {
            return Err(Error::Members("somebody is no member"));
        }
        if *homes.pieces() != pieces || !(1..=pieces.count()).contains(count) {
            return Err(Error::Members("RAM is cut into other pieces"));
        }
        let dealt = Shards::new(pieces, *count);
        let homes = Arc::new(homes.clone());
        let (mut shards, mut bells) = (Vec::new(), Vec::new());
        for number in 0..*count {
            let frames = Frames::new(&whole, &dealt, number).map_err(|why| match why {
                Unwatched::Userfault(why) => Error::Userfault(why),
                Unwatched::Start(why) => Error::Start(why),
            })?;
            let shard = Shard::new(*me, *members, dealt, number, homes.clone(), frames);
            shards.push(shard.map_err(Error::Start)?);
            bells.push(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(Error::Start)?);
        }
        let inner = Arc::new(Inner {
            me: *me,
            members: *members,
            shards,
            bells,
            lines,
            broken,
            why: OnceLock::new(),
            closed: AtomicBool::new(false),
            forgetting: Mutex::default(),
            forgotten: Condvar::new(),
            later: Mutex::default(),
        });
        let engine = Self { inner, threads: Mutex::default() };
        let mut boards = Some(boards);
        for shard in 0..*count as usize {
            let boards = boards.take().unwrap_or_default();
            let thread = attend::start(&engine.inner, shard, boards).map_err(Error::Start)?;
            lock(&engine.threads).push(thread);
        }
        Ok(engine)
    }

    /// Where messages from other members go.
    #[must_use]
    pub fn ear(&self) -> Ear {
        Ear { inner: self.inner.clone(), riding: false }
    }

    /// What was counted until now.
    #[must_use]
    pub fn counters(&self) -> Counters {
        let mut sum = Counters::default();
        self.inner.shards.iter().for_each(|shard| shard.tally(|tally| tally.add_to(&mut sum)));
        sum
    }

    /// Why the guest has to stop, if it has.
    #[must_use]
    pub fn broken(&self) -> Option<&str> {
        self.inner.why.get().map(String::as_str)
    }

    /// This member begins nothing more: who touches what is not here waits until it [goes on](Self::go_on). What others
    /// need of it they get.
    pub fn pause(&self) {
        self.inner.pause();
    }

    /// After [`pause`](Self::pause).
    pub fn go_on(&self) {
        self.inner.go_on();
    }

    /// Makes all RAM zeros at all members, as at power-on. For the console, while no vCPU and no device of any member
    /// runs; waits until all members have answered, so while one is away too.
    ///
    /// # Errors
    /// [`Error::Closed`].
    pub fn clear(&self) -> Result<(), Error> {
        let inner = &*self.inner;
        let age = inner.age().next();
        inner.forget(age);
        let others = inner.members.without(inner.me);
        *lock(&inner.forgetting) = others;
        inner.tell(others, age, What::Forget);
        let mut left = lock(&inner.forgetting);
        while !left.is_empty() {
            if inner.is_closed() || inner.why.get().is_some() {
                return Err(Error::Closed);
            }
            left = inner.forgotten.wait(left).unwrap_or_else(PoisonError::into_inner);
        }
        drop(left);
        inner.tell(others, age, What::GoOn);
        inner.go_on();
        Ok(())
    }

    /// Ends the threads. Nobody may touch the guest's RAM any more.
    pub fn close(&self) {
        self.inner.close();
        for thread in lock(&self.threads).drain(..) {
            // One that panics ends the process, so this one did not.
            let _ = thread.join();
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.close();
    }
}

impl Later {
    /// Takes out what is for `to`, up to a few letters.
    fn take(&mut self, to: Member, body: &mut Letters) {
        while body.len() < MOST * BODY
            && let Some(at) = self.letters.iter().position(|(other, _)| *other == to)
        {
            body.extend_from_slice(&self.letters.remove(at).1.encode());
        }
        if self.letters.is_empty() {
            self.since = None;
        }
    }
}

impl Ear {
    /// For a rider on a shard's ring.
    pub(super) fn riding(inner: &Arc<Inner>) -> Self {
        Self { inner: inner.clone(), riding: true }
    }

    /// Hears what member `from` has sent with [`Lines::send`]. Whatever follows from it is done when this returns; any
    /// thread may call it.
    pub fn hear(&self, from: Member, body: &[u8], content: Option<Buffer>) {
        self.inner.hear(from, body, content, self.riding);
    }

    /// The thread that calls, which touches RAM, needs nothing of it for now: what it holds may go.
    pub fn rests(&self) {
        self.inner.rests(nix::unistd::gettid().as_raw() as u32);
    }

    /// `from` is gone for good, or something else has happened after which memory cannot be trusted: the guest has to stop.
    pub fn lost(&self, why: &str) {
        self.inner.stop(why);
    }
}

impl Inner {
    fn hear(&self, from: Member, body: &[u8], content: Option<Buffer>, riding: bool) {
        let (letters, rest) = body.as_chunks::<BODY>();
        let Some((last, before)) = letters.split_last().filter(|_| rest.is_empty()) else {
            return self.violated(from, Violation("a message that makes no sense"));
        };
        before.iter().for_each(|letter| self.letter(from, letter, None, riding));
        self.letter(from, last, content, riding);
    }

    fn letter(&self, from: Member, body: &[u8], content: Option<Buffer>, riding: bool) {
        if self.why.get().is_some() || self.is_closed() {
            return;
        }
        let letter = match Letter::decode(body) {
            Ok(letter) if whole(&letter, content.as_ref()) => letter,
            Ok(_) => return self.violated(from, Violation("content that does not belong to its message")),
            Err(_) => return self.violated(from, Violation("a message that makes no sense")),
        };
        if from == self.me || !self.members.has(from) {
            return self.violated(from, Violation("a message from one who is no other member"));
        }
        match letter.what {
            What::Home(page, _) | What::Member(page, _) => {
                let place = self.shards.first().and_then(|shard| shard.shards.place(page));
                let owner = place.and_then(|(shard, place)| Some((self.shards.get(shard as usize)?, place)));
                let Some((shard, place)) = owner else {
                    return self.violated(from, Violation("a page that is not in RAM"));
                };
                self.finish(from, shard.hear(from, place, letter, content), riding);
            }
            What::Forget | What::GoOn if from.number() != 0 => {
                self.violated(from, Violation("only the console may have memory forgotten"));
            }
            What::Forget => {
                self.forget(letter.age);
                self.lines.send(from, &Letter { what: What::Forgotten, ..letter }.encode(), None);
            }
            What::GoOn => self.go_on(),
            What::Forgotten => {
                let mut left = lock(&self.forgetting);
                if letter.age == self.age() {
                    *left = left.without(from);
                    self.forgotten.notify_all();
                }
            }
        }
    }

    /// Sends what came of some work, or stops. With `riding`, a `Done` waits a moment for another message to its page's
    /// home to go with: it delays nobody but the next transaction of the page, which is held here meanwhile.
    fn finish(&self, from: Member, worked: Result<Mail, Failure>, riding: bool) {
        let mail = match worked {
            Ok(mail) if mail.is_empty() => return,
            Ok(mail) => mail,
            Err(Failure::Violation(violation)) => return self.violated(from, violation),
            Err(Failure::Kernel(why)) => worker::fail(&why.to_string()),
        };
        // What goes to the same member without content goes together.
        let mut bodies = SmallVec::<[(Member, Letters); 3]>::new();
        for (to, letter, content) in mail {
            if riding && matches!(letter.what, What::Home(_, ToHome::Done { .. })) {
                let mut later = lock(&self.later);
                later.since.get_or_insert_with(Instant::now);
                later.letters.push((to, letter));
            } else if content.is_some() {
                self.lines.send(to, &letter.encode(), content);
            } else {
                let room = |(other, body): &&mut (Member, Letters)| *other == to && body.len() < MOST * BODY;
                match bodies.iter_mut().find(room) {
                    Some((_, body)) => body.extend_from_slice(&letter.encode()),
                    None => bodies.push((to, Letters::from_slice(&letter.encode()))),
                }
            }
        }
        for (to, mut body) in bodies {
            lock(&self.later).take(to, &mut body);
            self.lines.send(to, &body, None);
        }
    }

    /// Sends what has waited for long enough; says how long the rest may wait.
    pub(super) fn send_later(&self, now: Instant) -> Option<Duration> {
        let mut later = lock(&self.later);
        let waited = now.saturating_duration_since(later.since?);
        if waited < LATER {
            return Some(LATER - waited);
        }
        let mut letters = std::mem::take(&mut *later);
        drop(later);
        while let Some((to, _)) = letters.letters.first().copied() {
            let mut body = Letters::new();
            letters.take(to, &mut body);
            self.lines.send(to, &body, None);
        }
        None
    }

    fn violated(&self, from: Member, violation: Violation) {
        self.stop(&format!("{violation} (heard from member {})", from.number()));
    }

    fn stop(&self, why: &str) {
        if self.why.set(why.to_owned()).is_ok() {
            (self.broken)(why);
            self.wake_up();
        }
    }

    fn tell(&self, to: Members, age: Age, what: What) {
        let body = Letter { age, need: Need::default(), late: false, what }.encode();
        to.iter().for_each(|to| self.lines.send(to, &body, None));
    }

    fn age(&self) -> Age {
        self.shards.first().map(Shard::age).unwrap_or_default()
    }

    fn forget(&self, age: Age) {
        self.pause();
        for shard in &self.shards {
            shard.forget(age).unwrap_or_else(|why| worker::fail(&why.to_string()));
        }
    }

    fn pause(&self) {
        self.shards.iter().for_each(Shard::pause);
    }

    fn go_on(&self) {
        for shard in &self.shards {
            shard.resume().unwrap_or_else(|why| worker::fail(&why.to_string()));
        }
        self.ring();
    }

    fn rests(&self, thread: u32) {
        for (shard, bell) in self.shards.iter().zip(&self.bells) {
            if shard.rests(thread) {
                // The shard's thread works it off: this one may be confined to less.
                let _ = bell.write(1);
            }
        }
    }

    fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        self.wake_up();
    }

    /// Has everybody look whether all is over.
    fn wake_up(&self) {
        self.ring();
        let _left = lock(&self.forgetting);
        self.forgotten.notify_all();
    }

    fn ring(&self) {
        for bell in &self.bells {
            // It can only refuse when the count is about to overflow, and then it has been rung.
            let _ = bell.write(1);
        }
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    /// Whether the shard's faults are worked off.
    pub(super) fn attends(&self, shard: usize) -> bool {
        self.why.get().is_none() && self.shards.get(shard).is_some_and(|shard| !shard.is_paused())
    }

    /// What the thread of a shard waits for: its faults, its holds, or its bell.
    pub(super) fn descriptor(&self, shard: usize, faults: bool, holds: bool) -> RawFd {
        match (self.shards.get(shard), self.bells.get(shard)) {
            (Some(shard), _) if faults => shard.frames.as_raw_fd(),
            (Some(shard), _) if holds => shard.timer.as_raw_fd(),
            (_, Some(bell)) => bell.as_raw_fd(),
            _ => -1,
        }
    }

    /// The shard's timer (`holds`) or its bell was heard.
    pub(super) fn silence(&self, shard: usize, holds: bool) {
        match (self.shards.get(shard), self.bells.get(shard)) {
            (Some(shard), _) if holds => shard.timer.read(),
            (_, Some(bell)) => drop(bell.read()),
            _ => {}
        }
    }

    /// Reads faults of the shard; `true`: there may be more.
    pub(super) fn read_faults(&self, shard: usize, faults: &mut Vec<Fault>) -> io::Result<bool> {
        self.shards.get(shard).map_or(Ok(false), |shard| shard.frames.faults(faults))
    }

    /// Works faults of the shard off.
    pub(super) fn faults(&self, shard: usize, faults: &[Fault]) {
        if let Some(shard) = self.shards.get(shard).filter(|_| !faults.is_empty()) {
            self.finish(self.me, shard.faults(faults), false);
        }
    }

    /// The shard's timer has expired.
    pub(super) fn expired(&self, shard: usize) {
        if let Some(shard) = self.shards.get(shard) {
            self.finish(self.me, shard.expired(), false);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
#[path = "engine_test.rs"]
mod tests;
