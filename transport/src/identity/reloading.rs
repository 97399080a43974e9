//! The identity that connections share, while it changes.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::SystemTime;

use super::folder::{self, CA, CRL, KEY, NODE};
use super::offers::Offers;
use super::{Crl, Error, Identity, Peer};

/// A handle on an identity that may be renewed and that learns what is revoked. A new connection uses
/// [`current`](Self::current); a live one is to end when [`revokes`](Self::revokes) says so of its peer.
#[derive(Debug)]
pub struct Reloading {
    current: RwLock<Arc<Identity>>,
    pub(super) offers: Offers,
    store: Option<Store>,
}

/// The folder behind it.
#[derive(Debug)]
struct Store {
    folder: PathBuf,
    /// Held while the identity changes.
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// What the files were when they were read last.
    seen: Option<Stamp>,
    /// The CRL in force is newer than the folder's.
    unstored: bool,
}

/// Changes with the files: inode, size and time of each.
type Stamp = [(u64, u64, i64, i64); 4];

/// What became of a CRL that somebody sent.
#[derive(Debug)]
pub struct Taken {
    /// The number of the CRL that is in force now.
    pub number: u64,
    /// It was newer than the one before; look at live connections.
    pub newer: bool,
    /// It was not taken, though its number is not lower: it does not name all that the one in force does, or, with
    /// the same number, names more. The authority was put back from an old copy; `omega node revoke` finds out.
    pub conflicting: bool,
    /// It is in force but could not be stored; [`reload`](Reloading::reload) tries again.
    pub not_stored: Option<Error>,
}

impl Reloading {
    /// Of the identity in `folder`; what it learns is stored there.
    ///
    /// # Errors
    /// As [`Identity::load`].
    pub fn load(folder: &Path) -> Result<Arc<Self>, Error> {
        let seen = stamp(folder);
        let current = RwLock::new(Identity::load(folder)?);
        let store =
            Some(Store { folder: folder.to_owned(), state: Mutex::new(State { seen, unstored: false }) });
        Ok(Arc::new(Self { current, offers: Offers::default(), store }))
    }

    /// As [`load`](Self::load), or `None` if `folder` is not there or empty. Anything else that is wrong is an
    /// error: who removes or damages a file must not make a PC that has an identity go on without one.
    ///
    /// # Errors
    /// As [`Identity::load`].
    pub fn find(folder: &Path) -> Result<Option<Arc<Self>>, Error> {
        match fs::read_dir(folder).map(|mut entries| entries.next().is_none()) {
            Ok(true) => Ok(None),
            Ok(false) => Self::load(folder).map(Some),
            Err(why) if why.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(Error::File { path: folder.to_owned(), source }),
        }
    }

    /// Of `identity`. It reads and writes no file, so a confined thread may use all of it.
    #[must_use]
    pub fn in_memory(identity: Arc<Identity>) -> Arc<Self> {
        Arc::new(Self { current: RwLock::new(identity), offers: Offers::default(), store: None })
    }

    /// The identity for the next connection.
    #[must_use]
    pub fn current(&self) -> Arc<Identity> {
        Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether `peer`, who once proved who it is, can do so no more: its certificate is revoked by what is known
    /// now, has ended, or is of another household than this PC's identity is now.
    #[must_use]
    pub fn revokes(&self, peer: &Peer) -> bool {
        let identity = self.current();
        let foreign = peer.authority.is_some_and(|authority| authority != identity.authority());
        foreign || peer.expires < SystemTime::now() || identity.crl().revokes(&peer.serial)
    }

    /// Takes the folder's files if they changed since they were read; `true`: the identity is another. Of the
    /// CRLs of one authority the newest stays in force, wherever it came from, and is stored if it is not yet.
    ///
    /// # Errors
    /// As [`Identity::load`], or the CRL still cannot be stored; the identity stays as it was, and the next call
    /// tries again.
    pub fn reload(&self) -> Result<bool, Error> {
        let Some(store) = &self.store else { return Ok(false) };
        let mut state = lock(&store.state);
        let found = stamp(&store.folder);
        let mut changed = false;
        if found.is_none() || found != state.seen {
            let (old, mut new) = (self.current(), Identity::load(&store.folder)?);
            state.unstored = old.authority() == new.authority() && old.crl().number() > new.crl().number();
            if state.unstored {
                new = new.with_crl(old.crl())?;
            }
            state.seen = found;
            changed = old.serial() != new.serial()
                || old.authority() != new.authority()
                || old.crl().number() != new.crl().number();
            self.set(new);
        }
        if state.unstored
            && let Err(why) = store.keep(&mut state, self.current().crl())
            && !changed
        {
            return Err(why);
        }
        Ok(changed)
    }

    /// Takes the CRL `der`, whoever sent it, if the household's authority signed it and it is newer than the
    /// one in force and names all that this does: who is revoked stays so. Another one changes nothing.
    ///
    /// # Errors
    /// It is damaged or another authority's; nothing changed.
    pub fn take_crl(&self, der: &[u8]) -> Result<Taken, Error> {
        let mut state = self.store.as_ref().map(|store| lock(&store.state));
        let old = self.current();
        let held = old.crl().number();
        if der == old.crl().der().as_ref() {
            return Ok(Taken { number: held, newer: false, conflicting: false, not_stored: None });
        }
        let crl = Crl::verify(der, &old.parts().ca)?;
        let forgets = old.crl().serials().any(|serial| !crl.revokes(serial));
        if crl.number() <= held || forgets {
            let other = forgets || crl.len() != old.crl().len();
            let conflicting = crl.number() >= held && other;
            return Ok(Taken { number: held, newer: false, conflicting, not_stored: None });
        }
        self.set(old.with_crl(&crl)?);
        let store = self.store.as_ref().zip(state.as_mut());
        let not_stored = store.and_then(|(store, state)| store.keep(state, &crl).err());
        Ok(Taken { number: crl.number(), newer: true, conflicting: false, not_stored })
    }

    fn set(&self, identity: Arc<Identity>) {
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = identity;
    }
}

impl Store {
    /// Writes `crl` into the folder, or remembers that this is still to be done.
    fn keep(&self, state: &mut State, crl: &Crl) -> Result<(), Error> {
        let untouched = stamp(&self.folder) == state.seen;
        let kept = folder::write_crl(&self.folder, crl.der());
        state.unstored = kept.is_err();
        if untouched {
            // Our own change is no reason to read the files again.
            state.seen = stamp(&self.folder);
        }
        kept
    }
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

fn stamp(folder: &Path) -> Option<Stamp> {
    let mut all = Stamp::default();
    for (slot, name) in all.iter_mut().zip([CA, NODE, KEY, CRL]) {
        let about = fs::metadata(folder.join(name)).ok()?;
        *slot = (about.ino(), about.size(), about.mtime(), about.mtime_nsec());
    }
    Some(all)
}
