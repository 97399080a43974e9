//! The volumes that an agent serves, and the grants under which sessions use them.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use devices::disk::file::{Image, OpenError, Options};

use crate::config;
use crate::lease::Activity;

/// Locks, also after another thread panicked: what the agent's locks guard is always whole.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whose a grant is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// The session.
    pub session: u128,
    /// The node whose session it is, where nodes are proven.
    pub node: Option<String>,
}

/// One session's right to use a volume, until it is revoked.
///
/// A request counts itself in, then looks whether the grant was revoked; who revokes it sets that, then
/// waits for the count. So after the wait nothing is carried out under the grant any more.
#[derive(Debug)]
pub struct Grant {
    /// The lease that it stands on.
    pub epoch: u64,
    /// Who may use it; `None`: any, since nobody writes.
    pub user: Option<User>,
    revoked: AtomicBool,
    in_flight: AtomicUsize,
    connections: AtomicUsize,
}

impl Grant {
    /// A grant of `epoch` to a session.
    #[must_use]
    pub fn new(epoch: u64, user: Option<User>) -> Arc<Self> {
        Arc::new(Self {
            epoch,
            user,
            revoked: AtomicBool::new(false),
            in_flight: AtomicUsize::new(0),
            connections: AtomicUsize::new(0),
        })
    }

    /// Begins a request; `false` if the grant was revoked. Each `true` needs an [`Grant::exit`].
    #[must_use]
    pub fn enter(&self) -> bool {
        self.in_flight.fetch_add(1, SeqCst);
        if self.revoked.load(SeqCst) {
            self.exit();
            return false;
        }
        true
    }

    /// Ends a request.
    pub fn exit(&self) {
        self.in_flight.fetch_sub(1, SeqCst);
    }

    /// Nothing begins under it from now on.
    pub fn revoke(&self) {
        self.revoked.store(true, SeqCst);
    }

    /// Whether nothing is in flight under it.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.in_flight.load(SeqCst) == 0
    }

    /// A connection uses it, or no longer does.
    pub fn connected(&self, yes: bool) {
        if yes {
            self.connections.fetch_add(1, SeqCst);
        } else {
            self.connections.fetch_sub(1, SeqCst);
        }
    }
}

/// What a volume is granted for, and what that must wait for.
#[derive(Debug, Default)]
struct Granted {
    current: Option<Arc<Grant>>,
    /// Revoked grants that had requests in flight when last looked at.
    draining: Vec<Arc<Grant>>,
}

/// A volume.
#[derive(Debug)]
pub struct Volume {
    /// Its configuration.
    pub config: config::Volume,
    image: Mutex<Option<Arc<Image>>>,
    problem: Mutex<Option<String>>,
    granted: Mutex<Granted>,
    /// When its holder was last heard of, in milliseconds since `born`.
    seen: AtomicU64,
    born: Instant,
    full: AtomicU64,
}

impl Volume {
    /// A volume that is not open yet. Its holder, if it has one, counts as heard of just now: it could not
    /// renew its lease while the agent was away.
    #[must_use]
    pub fn new(config: config::Volume) -> Self {
        Self {
            config,
            image: Mutex::new(None),
            problem: Mutex::new(None),
            granted: Mutex::default(),
            seen: AtomicU64::new(0),
            born: Instant::now(),
            full: AtomicU64::new(0),
        }
    }

    /// Its image, opened if it is not open yet.
    ///
    /// # Errors
    /// Why it cannot be served.
    pub fn image(&self) -> Result<Arc<Image>, OpenError> {
        let mut image = lock(&self.image);
        if let Some(image) = &*image {
            return Ok(Arc::clone(image));
        }
        let opened = open(&self.config).map(Arc::new);
        *lock(&self.problem) = opened.as_ref().err().map(ToString::to_string);
        let opened = opened?;
        *image = Some(Arc::clone(&opened));
        Ok(opened)
    }

    /// Its image, if it is open.
    #[must_use]
    pub fn opened(&self) -> Option<Arc<Image>> {
        lock(&self.image).clone()
    }

    /// Why it could not be opened the last time.
    #[must_use]
    pub fn problem(&self) -> Option<String> {
        lock(&self.problem).clone()
    }

    /// Grants the volume to `user` under `epoch` and revokes what was granted before. Also returns every
    /// revoked grant that must be idle before the new one is used, not just the last: that one may itself
    /// have been waiting, unused.
    pub fn grant(&self, epoch: u64, user: User) -> (Arc<Grant>, Vec<Arc<Grant>>) {
        let mut granted = lock(&self.granted);
        let Granted { current, draining } = &mut *granted;
        if self.config.read_only {
            if let Some(grant) = current.as_ref().filter(|g| g.epoch == epoch) {
                return (Arc::clone(grant), Vec::new());
            }
            let grant = Grant::new(epoch, None);
            *current = Some(Arc::clone(&grant));
            return (grant, Vec::new());
        }
        let grant = Grant::new(epoch, Some(user));
        if let Some(old) = current.replace(Arc::clone(&grant)) {
            old.revoke();
            draining.push(old);
        }
        // All are revoked: one that is idle now stays so.
        draining.retain(|old| !old.is_idle());
        (grant, draining.clone())
    }

    /// Revokes what is granted: its lease is over.
    pub fn revoke(&self) {
        if let Some(grant) = &lock(&self.granted).current {
            grant.revoke();
        }
    }

    /// The grant that `user` has under `epoch`, for a session that goes on over a new connection.
    #[must_use]
    pub fn granted(&self, epoch: u64, user: &User) -> Option<Arc<Grant>> {
        let granted = lock(&self.granted);
        let fits = |g: &&Arc<Grant>| g.epoch == epoch && g.user.as_ref().is_none_or(|u| u == user);
        granted.current.as_ref().filter(fits).cloned()
    }

    /// The holder was heard of.
    pub fn heard(&self) {
        let millis = u64::try_from(self.born.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.seen.fetch_max(millis, SeqCst);
    }

    /// What the holder did lately.
    #[must_use]
    pub fn activity(&self) -> Activity {
        let idle = self.born.elapsed().saturating_sub(Duration::from_millis(self.seen.load(SeqCst)));
        let connected = lock(&self.granted).current.as_ref().is_some_and(|g| g.connections.load(SeqCst) > 0);
        Activity { idle, connected }
    }

    /// Says in the log that there is no space, at most every ten seconds.
    pub fn tell_full(&self) {
        let now = self.born.elapsed().as_secs() + 10;
        if self.full.fetch_max(now, SeqCst) + 10 <= now {
            let (volume, path) = (&self.config.name, self.config.path.display());
            tracing::error!(%volume, %path, "No space is left for the volume; its guest's writes wait");
        }
    }
}

/// Opens a volume's image, and makes it first if its configuration says so.
///
/// # Errors
/// Why it cannot be served.
pub fn open(volume: &config::Volume) -> Result<Image, OpenError> {
    if let Some(size) = volume.create {
        create(volume, size.0).map_err(|source| OpenError::Open { path: volume.path.clone(), source })?;
    }
    let (path, read_only) = (volume.path.clone(), volume.read_only);
    Image::open(&Options { path, read_only, direct: volume.direct.into() })
}

/// Makes a sparse file, whole or not at all, so that what a guest has flushed into it is found after a power cut.
fn create(volume: &config::Volume, size: u64) -> io::Result<()> {
    let made = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&volume.path);
    match made {
        Ok(file) => {
            let kept = || {
                file.set_len(size)?;
                file.sync_all()?;
                let folder = volume.path.parent().filter(|folder| !folder.as_os_str().is_empty());
                // A folder may take files from us and not show what is in it.
                match File::open(folder.unwrap_or(Path::new("."))) {
                    Ok(folder) => folder.sync_all(),
                    Err(_) => Ok(()),
                }
            };
            kept().inspect_err(|_| {
                std::fs::remove_file(&volume.path).ok();
            })
        }
        // The power failed while it was made: it has its name and no size yet.
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists && is_unfinished(&volume.path) => {
            let file = OpenOptions::new().write(true).open(&volume.path)?;
            file.set_len(size)?;
            file.sync_all()
        }
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(e) => Err(e),
    }
}

fn is_unfinished(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|about| about.is_file() && about.len() == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(session: u128) -> User {
        User { session, node: Some("desk".into()) }
    }

    #[test]
    fn nothing_begins_under_a_grant_that_was_revoked_and_idle() {
        let grant = Grant::new(1, Some(user(1)));
        let (worker, begun) = (Arc::clone(&grant), Arc::new(AtomicU64::new(0)));
        let counts = Arc::clone(&begun);
        let busy = std::thread::spawn(move || {
            while worker.enter() {
                counts.fetch_add(1, SeqCst);
                worker.exit();
            }
        });
        while begun.load(SeqCst) == 0 {
            std::thread::yield_now();
        }
        grant.revoke();
        while !grant.is_idle() {
            std::thread::yield_now();
        }
        busy.join().expect("it ends");
        assert!(!grant.enter() && grant.is_idle());
    }

    #[test]
    fn a_grant_is_one_nodes_even_if_another_names_the_same_session() {
        let volume = Volume::new(configured("unused".into()));
        let (_grant, _) = volume.grant(1, user(1));
        assert!(volume.granted(1, &user(1)).is_some());
        for node in [None, Some("shed".to_owned())] {
            assert!(volume.granted(1, &User { session: 1, node }).is_none());
        }
        assert!(volume.granted(1, &user(2)).is_none() && volume.granted(2, &user(1)).is_none());
    }

    fn configured(path: std::path::PathBuf) -> config::Volume {
        config::Volume {
            name: "a".into(),
            path,
            read_only: false,
            direct: config::DirectIo::Off,
            create: Some(vmm::units::Bytes(1 << 20)),
        }
    }

    #[test]
    fn a_new_grant_waits_for_all_earlier_ones_however_many_unused_ones_lie_between() {
        let volume = Volume::new(configured("unused".into()));
        let (busy, earlier) = volume.grant(1, user(1));
        assert!(earlier.is_empty() && busy.enter());
        for session in 2..5 {
            let (unused, earlier) = volume.grant(session as u64, user(session));
            assert!(earlier.iter().any(|g| !g.is_idle()), "session {session} waits");
            assert_eq!(earlier.len(), 1, "an unused grant is not kept");
            assert!(unused.is_idle() && !busy.enter());
        }
        let (last, earlier) = volume.grant(5, user(5));
        busy.exit();
        assert!(earlier.iter().all(|g| g.is_idle()) && last.enter());
        last.exit();
        assert!(volume.grant(6, user(6)).1.is_empty());
    }

    #[test]
    fn a_volume_is_created_once_and_kept() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("a.img");
        let config = configured(path.clone());
        drop(open(&config).expect("it is made"));
        std::fs::write(&path, [7; 1024]).expect("it writes");
        assert_eq!(open(&config).expect("it is there").geometry().size, 1024);
    }

    #[test]
    fn a_volume_that_a_power_cut_left_without_a_size_is_made() {
        let folder = tempfile::tempdir().expect("a folder");
        let config = configured(folder.path().join("a.img"));
        std::fs::write(&config.path, []).expect("it writes");
        let made = open(&config).expect("it is made").geometry().size;
        assert_eq!(Some(made), config.create.map(|size| size.0));
    }
}
