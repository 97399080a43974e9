//! What all connections of one serving process share.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use crate::core::asker::Identity;
use crate::identity::Peer;
use crate::server::Limits;
use crate::wire::{Body, Fault, MAX_PAYLOAD, Status};

/// What all connections of one serving process share: its identity, limits, and the sessions that a
/// reconnecting peer may resume.
pub struct Sessions {
    pub(crate) identity: Identity,
    pub(crate) limits: Limits,
    numbers: AtomicU64,
    table: Mutex<HashMap<u128, Entry>>,
    /// Live connections whose peers have proven who they are.
    present: Mutex<HashMap<u64, Present>>,
}

/// A live connection as a revocation sees it.
struct Present {
    peer: Arc<Peer>,
    revoked: Arc<AtomicBool>,
    wake: Signal,
}

/// Says as long as it lives that a connection's peer is here.
pub(crate) struct Attendance {
    sessions: Arc<Sessions>,
    number: u64,
    peer: Arc<Peer>,
    revoked: Arc<AtomicBool>,
}

impl Attendance {
    /// The connection of `claimant`, whose peer has proven to be `peer`.
    pub(crate) fn new(sessions: &Arc<Sessions>, claimant: &Claimant, peer: Peer) -> Self {
        let (peer, revoked) = (Arc::new(peer), Arc::new(AtomicBool::new(false)));
        let present = Present { peer: peer.clone(), revoked: revoked.clone(), wake: claimant.wake.clone() };
        lock(&sessions.present).insert(claimant.number, present);
        Self { sessions: sessions.clone(), number: claimant.number, peer, revoked }
    }

    pub(crate) fn peer(&self) -> &Peer {
        &self.peer
    }

    /// # Errors
    /// The peer's certificate was revoked.
    pub(crate) fn check(&self) -> Result<(), Fault> {
        if self.revoked.load(Ordering::Relaxed) {
            return Err(Fault::Revoked(self.peer.name.clone()));
        }
        Ok(())
    }
}

impl Drop for Attendance {
    fn drop(&mut self) {
        lock(&self.sessions.present).remove(&self.number);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The answers of `once` requests that the asking side has not confirmed.
#[derive(Debug, Default)]
pub(crate) struct Records {
    /// Every request with a lower id is confirmed.
    pub(crate) acked: u64,
    pub(crate) finished: BTreeMap<u64, (Status, Body)>,
}

impl Records {
    /// The asking side has all answers below `acked`.
    pub(crate) fn confirm(&mut self, acked: u64) {
        if acked <= self.acked {
            return;
        }
        self.acked = acked;
        while self.finished.first_key_value().is_some_and(|(id, _)| *id < acked) {
            self.finished.pop_first();
        }
    }
}

/// Something that another thread may call.
pub(crate) type Signal = Arc<dyn Fn() + Send + Sync>;

/// A connection that wants a session.
#[derive(Clone)]
pub(crate) struct Claimant {
    /// Grows with every accepted connection: the newest wins.
    pub(crate) number: u64,
    /// Ends the connection's socket.
    pub(crate) cut: Signal,
    /// Makes it claim again.
    pub(crate) wake: Signal,
}

/// What came of a claim.
pub(crate) enum Claim {
    /// It is the claimant's now.
    Granted { serial: u64, resumed: bool, records: Records },
    /// Its earlier connection is being finished; claim again when woken.
    Wait,
    /// A newer connection has it.
    Superseded,
    /// There are too many sessions.
    Full,
    /// The node has as many connections as one may have.
    Crowded,
    /// Another node began it.
    NotYours,
}

struct Entry {
    serial: u64,
    holder: Holder,
    heir: Option<Claimant>,
    /// The connection that held it last.
    last: u64,
    /// The node that began it, as it has proven to be.
    owner: Option<String>,
}

enum Holder {
    Connection(Claimant),
    Nobody(Records),
}

impl Sessions {
    /// A process that serves peers under `name`.
    #[must_use]
    pub fn new(name: &str, limits: Limits) -> Arc<Self> {
        let limits = Limits {
            requests: limits.requests.max(4),
            bytes: limits.bytes.max(4 * MAX_PAYLOAD as u64),
            sessions: limits.sessions.max(1),
            ..limits
        };
        Arc::new(Self {
            identity: Identity::of_this_process(name),
            limits,
            numbers: AtomicU64::new(1),
            table: Mutex::default(),
            present: Mutex::default(),
        })
    }

    /// Ends every live connection whose peer `is_revoked`, with that reason on both sides, and returns the
    /// names of those peers, each once. Call it after what they are judged by has changed: a connection that is just being
    /// made looks there itself.
    pub fn revoke(&self, is_revoked: impl Fn(&Peer) -> bool) -> Vec<String> {
        let mut names = Vec::new();
        for present in lock(&self.present).values().filter(|present| is_revoked(&present.peer)) {
            if !present.revoked.swap(true, Ordering::Relaxed) {
                (present.wake)();
                names.push(present.peer.name.clone());
            }
        }
        names
    }

    /// How many `once` requests a peer may have unconfirmed.
    pub(crate) fn window(&self) -> u32 {
        self.limits.requests.saturating_mul(8).min(1 << 16)
    }

    /// A number for a new connection.
    pub(crate) fn number(&self) -> u64 {
        self.numbers.fetch_add(1, Ordering::Relaxed)
    }

    /// Asks for `session` as it was in its life `serial`, for the node `owner`. An earlier connection of it is
    /// cut.
    pub(crate) fn claim(
        &self,
        session: u128,
        serial: u64,
        claimant: &Claimant,
        owner: Option<&str>,
    ) -> Claim {
        let mut table = lock(&self.table);
        if let Some(refusal) = self.crowding(&table, session, owner) {
            return refusal;
        }
        if !table.contains_key(&session) && table.len() >= self.limits.sessions && !evict(&mut table, owner) {
            return Claim::Full;
        }
        let entry = table.entry(session).or_insert_with(|| Entry {
            serial: 0,
            holder: Holder::Nobody(Records::default()),
            heir: None,
            last: 0,
            owner: owner.map(str::to_owned),
        });
        if entry.owner.as_deref() != owner {
            return Claim::NotYours;
        }
        if entry.heir.as_ref().is_some_and(|heir| heir.number > claimant.number) {
            return Claim::Superseded;
        }
        match &mut entry.holder {
            Holder::Connection(holder) if holder.number > claimant.number => Claim::Superseded,
            Holder::Connection(holder) => {
                (holder.cut)();
                let earlier = entry.heir.replace(claimant.clone());
                if let Some(earlier) = earlier.filter(|earlier| earlier.number != claimant.number) {
                    (earlier.wake)();
                }
                Claim::Wait
            }
            Holder::Nobody(records) => {
                let resumed = serial != 0 && serial == entry.serial;
                let records = if resumed { std::mem::take(records) } else { Records::default() };
                if !resumed {
                    entry.serial = nonzero();
                }
                entry.holder = Holder::Connection(claimant.clone());
                entry.last = claimant.number;
                if let Some(heir) = entry.heir.take().filter(|heir| heir.number != claimant.number) {
                    (heir.wake)();
                }
                Claim::Granted { serial: entry.serial, resumed, records }
            }
        }
    }

    /// Why `session` gets no connection for `owner`, if there are as many as may be. Who comes back for a session
    /// that still has one takes no place: the earlier connection ends.
    fn crowding(&self, table: &HashMap<u128, Entry>, session: u128, owner: Option<&str>) -> Option<Claim> {
        if table.get(&session).is_some_and(Entry::is_connected) {
            return None;
        }
        let connected = || table.values().filter(|entry| entry.is_connected());
        let of_owner = || connected().filter(|entry| entry.owner.as_deref() == owner).count();
        if owner.is_some() && of_owner() >= self.limits.per_node {
            return Some(Claim::Crowded);
        }
        (connected().count() >= self.limits.connections).then_some(Claim::Full)
    }

    /// The connection `number` is done with `session`. Without records the session is over.
    pub(crate) fn release(&self, session: u128, number: u64, records: Option<Records>) {
        let mut table = lock(&self.table);
        let Some(entry) = table.get_mut(&session) else { return };
        if entry.heir.as_ref().is_some_and(|heir| heir.number == number) {
            entry.heir = None;
        }
        if !matches!(&entry.holder, Holder::Connection(holder) if holder.number == number) {
            return;
        }
        let heir = entry.heir.clone();
        match records {
            Some(records) => entry.holder = Holder::Nobody(records),
            None if heir.is_none() => drop(table.remove(&session)),
            None => {
                entry.holder = Holder::Nobody(Records::default());
                entry.serial = nonzero();
            }
        }
        if let Some(heir) = heir {
            (heir.wake)();
        }
    }
}

impl Entry {
    fn is_connected(&self) -> bool {
        matches!(self.holder, Holder::Connection(_)) || self.heir.is_some()
    }
}

/// Drops the session that is longest without a connection: one of `owner`'s own if there is one, so that nobody
/// drives others' sessions out by beginning many.
fn evict(table: &mut HashMap<u128, Entry>, owner: Option<&str>) -> bool {
    let idles = table.iter().filter(|(_, entry)| !entry.is_connected());
    let victim = idles.min_by_key(|(_, entry)| (entry.owner.as_deref() != owner, entry.last));
    let victim = victim.map(|(session, _)| *session);
    victim.is_some_and(|session| table.remove(&session).is_some())
}

fn nonzero() -> u64 {
    (random() as u64).max(1)
}

/// A number that nobody guesses.
///
/// # Panics
/// The kernel has no random numbers.
pub(crate) fn random() -> u128 {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).expect("the kernel gives random numbers");
    u128::from_le_bytes(bytes)
}

impl Identity {
    /// This process, under `name`.
    pub(crate) fn of_this_process(name: &str) -> Self {
        Self { name: name.to_owned(), instance: random(), boot: this_boot() }
    }
}

/// The boot of this PC's kernel. Read once: a thread that opens a channel again may be confined by then.
fn this_boot() -> u128 {
    static BOOT: OnceLock<u128> = OnceLock::new();
    *BOOT.get_or_init(|| {
        // Without the kernel's word every start counts as a new boot, which costs only care.
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok();
        let boot = boot.map(|text| text.chars().filter(char::is_ascii_hexdigit).collect::<String>());
        boot.and_then(|hex| u128::from_str_radix(&hex, 16).ok()).unwrap_or_else(random)
    })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;

    use super::*;

    struct Party {
        claimant: Claimant,
        cuts: Arc<AtomicU32>,
        wakes: Arc<AtomicU32>,
    }

    fn party(sessions: &Sessions) -> Party {
        let (cuts, wakes) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
        let (cut, wake) = (cuts.clone(), wakes.clone());
        let claimant = Claimant {
            number: sessions.number(),
            cut: Arc::new(move || {
                cut.fetch_add(1, Ordering::Relaxed);
            }),
            wake: Arc::new(move || {
                wake.fetch_add(1, Ordering::Relaxed);
            }),
        };
        Party { claimant, cuts, wakes }
    }

    fn sessions(most: usize) -> Arc<Sessions> {
        Sessions::new("test", Limits { sessions: most, ..Limits::default() })
    }

    fn granted(claim: Claim) -> (u64, bool, Records) {
        match claim {
            Claim::Granted { serial, resumed, records } => (serial, resumed, records),
            _ => panic!("the session is free"),
        }
    }

    #[test]
    fn a_newer_connection_cuts_the_older_one_and_waits_for_its_requests() {
        let sessions = sessions(4);
        let (old, middle, new) = (party(&sessions), party(&sessions), party(&sessions));
        let (serial, resumed, mut records) = granted(sessions.claim(1, 0, &old.claimant, None));
        assert!(!resumed);
        assert!(matches!(sessions.claim(1, serial, &middle.claimant, None), Claim::Wait));
        assert_eq!(old.cuts.load(Ordering::Relaxed), 1);
        assert!(matches!(sessions.claim(1, serial, &new.claimant, None), Claim::Wait));
        assert_eq!(middle.wakes.load(Ordering::Relaxed), 1);
        assert!(matches!(sessions.claim(1, serial, &middle.claimant, None), Claim::Superseded));
        records.finished.insert(9, (Status::OK, Body::new()));
        sessions.release(1, old.claimant.number, Some(records));
        assert_eq!(new.wakes.load(Ordering::Relaxed), 1);
        let (same, resumed, records) = granted(sessions.claim(1, serial, &new.claimant, None));
        assert_eq!((same, resumed, records.finished.len()), (serial, true, 1));
        assert!(matches!(sessions.claim(1, serial, &old.claimant, None), Claim::Superseded));
    }

    #[test]
    fn a_session_goes_on_only_in_the_life_that_both_sides_know() {
        let sessions = sessions(4);
        let (first, second, third) = (party(&sessions), party(&sessions), party(&sessions));
        let (serial, _, mut records) = granted(sessions.claim(1, 0, &first.claimant, None));
        records.finished.insert(9, (Status::OK, Body::new()));
        sessions.release(1, first.claimant.number, Some(records));
        let (other, resumed, records) = granted(sessions.claim(1, serial ^ 1, &second.claimant, None));
        assert!(!resumed && other != serial && records.finished.is_empty());
        sessions.release(1, second.claimant.number, None);
        let (_, resumed, _) = granted(sessions.claim(1, other, &third.claimant, None));
        assert!(!resumed, "a session that is over does not go on");
    }

    #[test]
    fn a_session_belongs_to_the_node_that_began_it() {
        let sessions = sessions(4);
        let (first, other, again) = (party(&sessions), party(&sessions), party(&sessions));
        let (serial, _, records) = granted(sessions.claim(1, 0, &first.claimant, Some("attic")));
        assert!(matches!(sessions.claim(1, serial, &other.claimant, Some("cellar")), Claim::NotYours));
        assert!(matches!(sessions.claim(1, serial, &other.claimant, None), Claim::NotYours));
        assert_eq!(first.cuts.load(Ordering::Relaxed), 0, "nobody else can cut its connection");
        sessions.release(1, first.claimant.number, Some(records));
        assert!(matches!(sessions.claim(1, serial, &other.claimant, Some("cellar")), Claim::NotYours));
        let (_, resumed, _) = granted(sessions.claim(1, serial, &again.claimant, Some("attic")));
        assert!(resumed);
    }

    #[test]
    fn a_node_has_only_its_share_of_the_connections_and_comes_back_for_each_of_them() {
        let limits = Limits { connections: 3, per_node: 2, ..Limits::default() };
        let sessions = Sessions::new("test", limits);
        let parties: Vec<Party> = (0..8).map(|_| party(&sessions)).collect();
        let claim =
            |session, party: usize, owner| sessions.claim(session, 0, &parties[party].claimant, owner);
        granted(claim(1, 0, Some("attic")));
        granted(claim(2, 1, Some("attic")));
        assert!(matches!(claim(3, 2, Some("attic")), Claim::Crowded));
        assert!(matches!(claim(1, 3, Some("attic")), Claim::Wait), "a reconnection is none more");
        granted(claim(4, 4, Some("cellar")));
        assert!(matches!(claim(5, 5, Some("desk")), Claim::Full), "all nodes together have three");
        sessions.release(2, parties[1].claimant.number, Some(Records::default()));
        granted(claim(5, 6, Some("desk")));
        sessions.release(4, parties[4].claimant.number, None);
        granted(claim(3, 7, Some("attic")));
    }

    #[test]
    fn a_node_that_begins_many_sessions_drives_out_its_own_first() {
        let sessions = sessions(3);
        let visit = |session, owner| {
            let party = party(&sessions);
            let (serial, resumed, records) =
                granted(sessions.claim(session, 0, &party.claimant, Some(owner)));
            sessions.release(session, party.claimant.number, Some(records));
            (serial, resumed)
        };
        let (serial, _) = visit(1, "attic");
        for session in 2..20 {
            visit(session, "cellar");
        }
        let party = party(&sessions);
        let (_, resumed, _) = granted(sessions.claim(1, serial, &party.claimant, Some("attic")));
        assert!(resumed, "attic's session is the oldest, and stayed");
    }

    #[test]
    fn the_session_longest_without_a_connection_makes_room() {
        let sessions = sessions(2);
        let parties: Vec<Party> = (0..5).map(|_| party(&sessions)).collect();
        let (one, _, records) = granted(sessions.claim(1, 0, &parties[0].claimant, None));
        sessions.release(1, parties[0].claimant.number, Some(records));
        let (two, _, records) = granted(sessions.claim(2, 0, &parties[1].claimant, None));
        sessions.release(2, parties[1].claimant.number, Some(records));
        granted(sessions.claim(3, 0, &parties[2].claimant, None));
        let (_, resumed, _) = granted(sessions.claim(2, two, &parties[3].claimant, None));
        assert!(resumed, "the younger one stayed");
        assert!(matches!(sessions.claim(1, one, &parties[4].claimant, None), Claim::Full));
    }
}
