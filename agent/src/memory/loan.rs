//! One lease of memory: who has it, in which sessions, and since when it was not heard of.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vmm::memory::store::protocol::Lent;

use super::record::Record;
use super::store::Store;
use super::{PAGE, Refused};
use crate::lease::Holder;
use crate::volume::{User, lock};

/// Sessions of a lease at once.
const SESSIONS: usize = 64;

/// A lease, and what it holds.
#[derive(Debug)]
pub(super) struct Loan {
    pub(super) record: Record,
    pub(super) store: Arc<Store>,
    sessions: Mutex<Vec<Session>>,
    /// Connections that use it.
    connections: AtomicU32,
    /// When its holder was last heard of.
    seen: AtomicU64,
    clock: Arc<Clock>,
}

/// Milliseconds since the agent started.
#[derive(Debug)]
pub(super) struct Clock {
    born: Instant,
    /// When the agent last found that it could not hear anybody for a while.
    deaf: AtomicU64,
}

impl Clock {
    pub(super) fn start() -> Arc<Self> {
        Arc::new(Self { born: Instant::now(), deaf: AtomicU64::new(0) })
    }

    /// Whoever was silent until now could not be heard.
    pub(super) fn was_deaf(&self) {
        self.deaf.fetch_max(self.now(), Ordering::SeqCst);
    }

    fn now(&self) -> u64 {
        u64::try_from(self.born.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

/// A session that opened the lease.
#[derive(Debug)]
struct Session {
    user: User,
    connections: u32,
}

impl Loan {
    pub(super) fn new(record: Record, store: Store, clock: &Arc<Clock>) -> Arc<Self> {
        let loan = Self {
            record,
            store: Arc::new(store),
            sessions: Mutex::default(),
            connections: AtomicU32::new(0),
            seen: AtomicU64::new(clock.now()),
            clock: Arc::clone(clock),
        };
        Arc::new(loan)
    }

    pub(super) fn epoch(&self) -> u64 {
        self.record.epoch
    }

    /// The holder was heard of.
    pub(super) fn heard(&self) {
        self.seen.fetch_max(self.clock.now(), Ordering::SeqCst);
    }

    pub(super) fn idle(&self) -> Duration {
        let seen = self.seen.load(Ordering::SeqCst).max(self.clock.deaf.load(Ordering::SeqCst));
        Duration::from_millis(self.clock.now().saturating_sub(seen))
    }

    /// A connection of `user` begins or ends to use it. `false`: the session has not opened it.
    pub(super) fn connected(&self, user: &User, yes: bool) -> bool {
        let mut sessions = lock(&self.sessions);
        let Some(session) = sessions.iter_mut().find(|session| session.user == *user) else { return false };
        if yes {
            session.connections += 1;
            self.connections.fetch_add(1, Ordering::SeqCst);
        } else {
            session.connections = session.connections.saturating_sub(1);
            self.connections.fetch_sub(1, Ordering::SeqCst);
        }
        true
    }

    pub(super) fn open(&self, user: User) -> Result<(), Refused> {
        let mut sessions = lock(&self.sessions);
        if sessions.iter().any(|session| session.user == user) {
            return Ok(());
        }
        if sessions.len() >= SESSIONS {
            // The oldest that is not connected does not come back, or opens it again.
            let Some(gone) = sessions.iter().position(|session| session.connections == 0) else {
                return Err(Refused::Busy("the lease is open in as many sessions as it can be"));
            };
            sessions.remove(gone);
        }
        sessions.push(Session { user, connections: 0 });
        Ok(())
    }

    pub(super) fn to_lent(&self) -> Lent {
        let Holder { name, node, .. } = &self.record.holder;
        Lent {
            guest: name.clone(),
            node: node.clone(),
            epoch: self.record.epoch,
            ram: self.record.pages * PAGE,
            quota: self.store.quota() * PAGE,
            used: self.store.used() * PAGE,
            connections: self.connections.load(Ordering::SeqCst),
            idle: u64::try_from(self.idle().as_millis()).unwrap_or(u64::MAX),
        }
    }
}
