//! Who may use which volume: a table that survives crashes of the agent and of its PC.
//!
//! An epoch names one holder's right to one volume. Epochs of an agent only grow and are never given
//! twice, so a request that carries an old one can be told apart for ever.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use devices::disk::volume::{Acquire, Lease};
use serde::{Deserialize, Serialize};

use crate::Error;

/// A volume's lease as it is stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// The current or last epoch.
    pub epoch: u64,
    /// Who holds it; nobody after it was given back.
    pub holder: Option<Holder>,
}

/// Who holds a lease.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Holder {
    /// Random for each run of a guest; in hexadecimal.
    #[serde(with = "hexadecimal")]
    pub id: u128,
    /// For people.
    pub name: String,
    /// The node that took it, as its certificate proved: nobody else renews, uses or gives back the lease, even
    /// if it knows the number. None if it came over a plain connection.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
}

impl Holder {
    pub(crate) fn is(&self, id: u128, node: Option<&str>) -> bool {
        self.id == id && self.node.as_deref() == node
    }
}

/// For people.
impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.node {
            // What is proven comes first, and the rest cannot be taken for it.
            Some(node) => write!(f, "node {node} (calls itself {:?})", self.name),
            None => f.write_str(&self.name),
        }
    }
}

pub(crate) mod hexadecimal {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(crate) fn serialize<S: Serializer>(id: &u128, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&format!("{id:032x}"))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<u128, D::Error> {
        u128::from_str_radix(&String::deserialize(from)?, 16).map_err(D::Error::custom)
    }
}

/// The file's content.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    version: u32,
    last_epoch: u64,
    volumes: BTreeMap<String, Record>,
}

/// What a lease's holder did lately, as the connections know it.
#[derive(Clone, Copy, Debug)]
pub struct Activity {
    /// How long it was not heard of.
    pub idle: Duration,
    /// Whether it is connected.
    pub connected: bool,
}

/// Why a lease was not given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refused {
    /// Somebody else has it; it may be taken after `wait`, zero if there is no telling.
    Leased {
        /// When to ask again.
        wait: Duration,
        /// Who has it.
        why: String,
    },
    /// It is no longer the asker's.
    Fenced(String),
    /// The agent's policy does not let the asker's node have it.
    Forbidden(String),
    /// It could not be stored.
    Failed(String),
}

/// All leases of an agent.
#[derive(Debug)]
pub struct Table {
    folder: PathBuf,
    stored: Stored,
    ttl: Duration,
}

impl Table {
    /// Reads the table from `folder`, which is made if it is missing.
    ///
    /// # Errors
    /// The folder or the file cannot be used.
    pub fn load(folder: &Path, ttl: Duration) -> Result<Self, Error> {
        let failed = |source| Error::State { path: folder.to_owned(), source };
        fs::create_dir_all(folder).map_err(failed)?;
        let path = folder.join("leases.json");
        let stored = match fs::read(&path) {
            Ok(bytes) => {
                serde_json::from_slice(&bytes).map_err(|e| Error::State { path, source: e.into() })?
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => Stored { version: 1, ..Stored::default() },
            Err(source) => return Err(Error::State { path, source }),
        };
        let table = Self { folder: folder.to_owned(), stored, ttl };
        // A folder that cannot be written is better known now than when a guest starts.
        table.store(&table.stored).map_err(failed)?;
        Ok(table)
    }

    /// The time after which a lease may be taken.
    #[must_use]
    pub fn ttl(&self) -> Duration {
        self.ttl
    }

    /// A volume's lease.
    #[must_use]
    pub fn get(&self, volume: &str) -> Option<&Record> {
        self.stored.volumes.get(volume)
    }

    /// The volume that `epoch` is the current lease of.
    #[must_use]
    pub fn volume_of(&self, epoch: u64) -> Option<(&str, &Record)> {
        let (name, record) = self.stored.volumes.iter().find(|(_, record)| record.epoch == epoch)?;
        Some((name, record))
    }

    /// Gives `asked.volume` to the asker on `node`, or confirms that it is the asker's. The volume exists, and
    /// policy was asked; `activity` is that of its holder now. Returns the epoch; it is on stable storage.
    ///
    /// # Errors
    /// [`Refused`].
    pub fn acquire(
        &mut self,
        asked: &Acquire,
        node: Option<&str>,
        activity: Activity,
    ) -> Result<u64, Refused> {
        let record = self.stored.volumes.get(&asked.volume);
        let holder = record.and_then(|r| r.holder.as_ref());
        let epoch = record.map_or(0, |r| r.epoch);
        let ours = holder.is_some_and(|h| h.is(asked.holder, node));
        if ours && (asked.expected == 0 || asked.expected == epoch) {
            return Ok(epoch);
        }
        if asked.expected != 0 {
            let who = holder.map_or_else(|| "nobody has it now".to_owned(), |h| format!("{h} has it"));
            return Err(Refused::Fenced(format!("the lease of volume {} is over; {who}", asked.volume)));
        }
        if let Some(holder) = holder
            && activity.idle < self.ttl
        {
            // A holder renews after a third of the time: one that has not after half of it may be gone, even if
            // nobody has noticed yet that its connection is dead.
            let alive = activity.connected && activity.idle < self.ttl / 2;
            let wait = if alive { Duration::ZERO } else { self.ttl - activity.idle };
            let left = wait.as_secs() + 1;
            let gone = format!("went away without giving it back; the lease expires in {left} s");
            let state = if alive { "is connected".to_owned() } else { gone };
            return Err(Refused::Leased { wait, why: format!("{holder} holds it and {state}") });
        }
        let node = node.map(str::to_owned);
        let holder = Some(Holder { id: asked.holder, name: asked.name.clone(), node });
        self.give(&asked.volume, holder)
    }

    /// An epoch for something else than a volume.
    ///
    /// # Errors
    /// [`Refused::Failed`].
    pub fn fresh_epoch(&mut self) -> Result<u64, Refused> {
        let full = || Refused::Failed("no epoch is left".to_owned());
        let next = self.stored.last_epoch.checked_add(1).ok_or_else(full)?;
        self.at_least(next)?;
        Ok(next)
    }

    /// Says that `epoch` was given: all later ones are above it.
    ///
    /// # Errors
    /// [`Refused::Failed`].
    pub fn at_least(&mut self, epoch: u64) -> Result<(), Refused> {
        if epoch <= self.stored.last_epoch {
            return Ok(());
        }
        self.replace(Stored { last_epoch: epoch, ..self.stored.clone() })
    }

    /// The epoch under which everybody reads a volume that nobody writes.
    ///
    /// # Errors
    /// [`Refused::Failed`].
    pub fn share(&mut self, volume: &str) -> Result<u64, Refused> {
        match self.stored.volumes.get(volume) {
            Some(Record { epoch, holder: None }) => Ok(*epoch),
            _ => self.give(volume, None),
        }
    }

    fn give(&mut self, volume: &str, holder: Option<Holder>) -> Result<u64, Refused> {
        let mut next = self.stored.clone();
        let full = || Refused::Failed("no epoch is left".to_owned());
        next.last_epoch = next.last_epoch.checked_add(1).ok_or_else(full)?;
        let epoch = next.last_epoch;
        next.volumes.insert(volume.to_owned(), Record { epoch, holder });
        self.replace(next)?;
        Ok(epoch)
    }

    /// Whether `lease` is current and of `node`, and of which volume. Without a holder it is only of a volume
    /// that is `read_only`: another one was given back, and its epoch is nobody's.
    ///
    /// # Errors
    /// [`Refused::Fenced`].
    pub fn check(
        &self,
        lease: Lease,
        node: Option<&str>,
        read_only: impl Fn(&str) -> bool,
    ) -> Result<&str, Refused> {
        match self.volume_of(lease.epoch) {
            Some((volume, Record { holder: None, .. })) if read_only(volume) => Ok(volume),
            Some((volume, Record { holder: Some(holder), .. })) if holder.is(lease.holder, node) => {
                Ok(volume)
            }
            _ => Err(Refused::Fenced(format!("lease {} is over", lease.epoch))),
        }
    }

    /// Ends `lease` if it is of `node`; no holder may act under it again. Ending one that is over already is no
    /// error.
    ///
    /// # Errors
    /// [`Refused::Failed`].
    pub fn release(&mut self, lease: Lease, node: Option<&str>) -> Result<Option<String>, Refused> {
        let held = self.volume_of(lease.epoch).and_then(|(volume, record)| {
            let holder = record.holder.as_ref()?;
            holder.is(lease.holder, node).then(|| volume.to_owned())
        });
        let Some(volume) = held else { return Ok(None) };
        let mut next = self.stored.clone();
        if let Some(record) = next.volumes.get_mut(&volume) {
            record.holder = None;
            // The epoch of a lease that was given back is nobody's.
            next.last_epoch = next.last_epoch.saturating_add(1);
            record.epoch = next.last_epoch;
        }
        self.replace(next)?;
        Ok(Some(volume))
    }

    fn replace(&mut self, next: Stored) -> Result<(), Refused> {
        self.store(&next).map_err(|e| Refused::Failed(format!("the agent cannot store its leases: {e}")))?;
        self.stored = next;
        Ok(())
    }

    /// Replaces the file so that after a crash either the old or the new one is there, whole.
    fn store(&self, stored: &Stored) -> io::Result<()> {
        let new = self.folder.join("leases.json.new");
        let mut file = File::create(&new)?;
        file.write_all(&serde_json::to_vec_pretty(stored)?)?;
        file.sync_all()?;
        fs::rename(&new, self.folder.join("leases.json"))?;
        File::open(&self.folder)?.sync_all()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TTL: Duration = Duration::from_secs(10);
    const QUIET: Activity = Activity { idle: Duration::from_secs(3), connected: false };
    const GONE: Activity = Activity { idle: Duration::from_secs(11), connected: false };

    const DESK: Option<&str> = Some("desk");

    fn ask(holder: u128, expected: u64) -> Acquire {
        Acquire { volume: "v".into(), holder, expected, name: format!("guest-{holder}") }
    }

    fn writable(_volume: &str) -> bool {
        false
    }

    fn table() -> (tempfile::TempDir, Table) {
        let folder = tempfile::tempdir().expect("a folder");
        let table = Table::load(folder.path(), TTL).expect("it loads");
        (folder, table)
    }

    #[test]
    fn a_lease_is_one_holders_until_it_expires_and_epochs_only_grow() {
        let (_folder, mut table) = table();
        let first = table.acquire(&ask(1, 0), DESK, GONE).expect("free");
        assert_eq!(table.acquire(&ask(1, 0), DESK, QUIET), Ok(first), "asking again confirms it");
        assert_eq!(table.acquire(&ask(1, first), DESK, QUIET), Ok(first));
        let refused = table.acquire(&ask(2, 0), DESK, QUIET).expect_err("leased");
        let wait = TTL - QUIET.idle;
        assert!(
            matches!(&refused, Refused::Leased { wait: w, why } if *w == wait && why.contains("guest-1"))
        );
        let second = table.acquire(&ask(2, 0), DESK, GONE).expect("expired");
        assert!(second > first);
        assert!(
            matches!(table.acquire(&ask(1, first), DESK, GONE), Err(Refused::Fenced(why)) if why.contains("guest-2"))
        );
        assert!(table.check(Lease { epoch: first, holder: 1 }, DESK, writable).is_err());
        assert_eq!(table.check(Lease { epoch: second, holder: 2 }, DESK, writable), Ok("v"));
        let guessed = Lease { epoch: second, holder: 1 };
        assert!(table.check(guessed, DESK, writable).is_err(), "a guessed epoch is not enough");
        table.release(Lease { epoch: second, holder: 2 }, DESK).expect("it stores");
        for epoch in 0..second + 5 {
            let guessed = Lease { epoch, holder: 1 };
            assert!(
                table.check(guessed, DESK, writable).is_err(),
                "nor once the lease was given back: {epoch}"
            );
        }
    }

    #[test]
    fn a_lease_is_the_nodes_that_took_it_even_if_another_knows_its_numbers() {
        let (folder, mut table) = table();
        let epoch = table.acquire(&ask(1, 0), DESK, GONE).expect("free");
        let lease = Lease { epoch, holder: 1 };
        for other in [Some("shed"), None] {
            assert!(matches!(table.check(lease, other, writable), Err(Refused::Fenced(_))), "{other:?}");
            assert_eq!(table.release(lease, other), Ok(None), "{other:?}");
            let again = table.acquire(&ask(1, epoch), other, GONE);
            assert!(
                matches!(again, Err(Refused::Fenced(why)) if why.contains("node desk (calls itself \"guest-1\")")),
                "{other:?}"
            );
            let anew = table.acquire(&ask(1, 0), other, QUIET);
            assert!(matches!(anew, Err(Refused::Leased { .. })), "{other:?}: {anew:?}");
        }
        let mut table = Table::load(folder.path(), TTL).expect("it loads");
        assert_eq!(table.check(lease, DESK, writable), Ok("v"), "also after a restart of the agent");
        assert_eq!(table.release(lease, DESK), Ok(Some("v".into())));
    }

    #[test]
    fn a_table_of_an_agent_that_knew_no_nodes_is_read() {
        let (folder, _) = table();
        let old =
            r#"{"version":1,"last_epoch":7,"volumes":{"v":{"epoch":7,"holder":{"id":"01","name":"g"}}}}"#;
        fs::write(folder.path().join("leases.json"), old).expect("it writes");
        let table = Table::load(folder.path(), TTL).expect("it loads");
        assert_eq!(table.check(Lease { epoch: 7, holder: 1 }, None, writable), Ok("v"));
        assert!(table.check(Lease { epoch: 7, holder: 1 }, DESK, writable).is_err());
    }

    #[test]
    fn leases_survive_a_restart_of_the_agent() {
        let (folder, mut table) = table();
        let epoch = table.acquire(&ask(1, 0), DESK, GONE).expect("free");
        drop(table);
        let mut table = Table::load(folder.path(), TTL).expect("it loads");
        assert_eq!(table.acquire(&ask(1, epoch), DESK, QUIET), Ok(epoch));
        assert!(table.acquire(&ask(2, 0), DESK, QUIET).is_err());
    }

    #[test]
    fn a_lease_that_was_given_back_is_free_and_its_epoch_dead() {
        let (folder, mut table) = table();
        let epoch = table.acquire(&ask(1, 0), DESK, GONE).expect("free");
        assert_eq!(table.release(Lease { epoch, holder: 2 }, DESK), Ok(None), "not the holder");
        assert_eq!(table.release(Lease { epoch, holder: 1 }, DESK), Ok(Some("v".into())));
        assert!(table.check(Lease { epoch, holder: 1 }, DESK, writable).is_err());
        let mut table = Table::load(folder.path(), TTL).expect("it loads");
        assert!(matches!(table.acquire(&ask(1, epoch), DESK, QUIET), Err(Refused::Fenced(_))));
        assert!(table.acquire(&ask(2, 0), DESK, QUIET).expect("free") > epoch);
    }

    #[test]
    fn a_shared_volume_keeps_its_epoch() {
        let (folder, mut table) = table();
        let epoch = table.share("r").expect("free");
        let mut table2 = Table::load(folder.path(), TTL).expect("it loads");
        assert_eq!(table2.share("r"), Ok(epoch));
        assert_eq!(table.release(Lease { epoch, holder: 0 }, DESK), Ok(None));
        assert_eq!(table.check(Lease { epoch, holder: 77 }, DESK, |name| name == "r"), Ok("r"));
        assert!(table.check(Lease { epoch, holder: 77 }, DESK, writable).is_err(), "it is writable by now");
    }

    #[test]
    fn an_epoch_for_something_else_is_above_all_that_were_given_and_no_volumes_later() {
        let (folder, mut table) = table();
        let first = table.acquire(&ask(1, 0), DESK, GONE).expect("free");
        assert_eq!(table.fresh_epoch(), Ok(first + 1));
        assert_eq!((table.at_least(first + 10), table.at_least(2)), (Ok(()), Ok(())));
        assert_eq!(table.fresh_epoch(), Ok(first + 11));
        drop(table);
        let mut table = Table::load(folder.path(), TTL).expect("it loads");
        assert_eq!(table.fresh_epoch(), Ok(first + 12));
        let other = Acquire { volume: "w".into(), ..ask(2, 0) };
        assert_eq!(table.acquire(&other, DESK, GONE), Ok(first + 13));
        table.at_least(u64::MAX).expect("it stores");
        assert!(matches!(table.fresh_epoch(), Err(Refused::Failed(_))));
    }

    #[test]
    fn a_broken_table_is_refused_rather_than_forgotten() {
        let (folder, _) = table();
        fs::write(folder.path().join("leases.json"), "{").expect("it writes");
        let error = Table::load(folder.path(), TTL).expect_err("refused").to_string();
        assert!(error.contains("leases.json"), "{error}");
    }
}
