//! Where running guests are found: a folder for each, with its lock and its sockets.
//!
//! `/run/omega/NAME/` for root, `$XDG_RUNTIME_DIR/omega/NAME/` for others. The file `pid` in it is locked for
//! as long as the guest's process lives, so a folder that a process left behind when it was killed is known
//! by its lock.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::unistd::geteuid;

/// Names another folder than the usual one.
pub const VARIABLE: &str = "OMEGA_RUNTIME_DIR";

const PID: &str = "pid";
const CONTROL: &str = "control.sock";
const CONSOLE: &str = "console.sock";
const VIRTIO_CONSOLE: &str = "virtio-console.sock";

/// How often a lock is tried.
const TRIES: u32 = 20;

/// A guest's folder cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Another process runs a guest of this name.
    #[error("The guest `{name}` runs already, in process {pid}")]
    Runs {
        /// The guest.
        name: String,
        /// Its process, as far as is known.
        pid: String,
    },
    /// No guest of this name runs.
    #[error("No guest `{name}` runs here{}", nearest.as_ref().map(|name| format!("; did you mean `{name}`?")).unwrap_or_default())]
    None {
        /// The guest.
        name: String,
        /// One that runs and is called nearly so.
        nearest: Option<String>,
    },
    /// Somebody else's folder is in the way.
    #[error("{0} belongs to another user")]
    Foreign(PathBuf),
    /// The file system refuses.
    #[error("{path}: {source}")]
    Io {
        /// What was touched.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> Error + '_ {
    move |source| Error::Io { path: path.to_owned(), source }
}

/// The folder of all guests of this user.
#[must_use]
pub fn root() -> PathBuf {
    if let Some(path) = std::env::var_os(VARIABLE).filter(|path| !path.is_empty()) {
        return path.into();
    }
    let user = geteuid();
    if user.is_root() {
        return "/run/omega".into();
    }
    match std::env::var_os("XDG_RUNTIME_DIR").filter(|path| !path.is_empty()) {
        Some(path) => Path::new(&path).join("omega"),
        // No session manager gave this user a folder: a private one of the same life time.
        None => format!("/tmp/omega-{user}").into(),
    }
}

/// A guest's folder.
#[derive(Clone, Debug)]
pub struct Folder {
    name: String,
    path: PathBuf,
}

impl Folder {
    /// The folder of the guest `name`, which must be a valid name; it need not exist.
    #[must_use]
    pub fn of(name: &str) -> Self {
        Self { name: name.to_owned(), path: root().join(name) }
    }

    /// The control socket.
    #[must_use]
    pub fn control(&self) -> PathBuf {
        self.path.join(CONTROL)
    }

    /// The serial console's socket.
    #[must_use]
    pub fn console(&self) -> PathBuf {
        self.path.join(CONSOLE)
    }

    /// The virtio console's socket.
    #[must_use]
    pub fn virtio_console(&self) -> PathBuf {
        self.path.join(VIRTIO_CONSOLE)
    }

    /// The guest's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The process that runs the guest; none when no process does.
    #[must_use]
    pub fn process(&self) -> Option<u32> {
        let file = File::open(self.path.join(PID)).ok()?;
        let Err((mut file, Errno::EWOULDBLOCK)) = Flock::lock(file, FlockArg::LockSharedNonblock) else {
            return None;
        };
        let mut text = String::new();
        file.read_to_string(&mut text).ok()?;
        // A process that has not written its number yet is there all the same.
        Some(text.trim().parse().unwrap_or(0))
    }

    fn clear(&self) {
        for name in [CONTROL, CONSOLE, VIRTIO_CONSOLE, PID] {
            // What is not there need not be removed.
            let _ = fs::remove_file(self.path.join(name));
        }
        let _ = fs::remove_dir(&self.path);
    }
}

/// A guest's folder that this process holds. It is removed when this is dropped, or at the next start.
#[derive(Debug)]
pub struct Claim {
    folder: Folder,
    _lock: Flock<File>,
}

impl Claim {
    /// Makes the folder of the guest `name` and locks it, so that no second process runs the same guest.
    /// What an earlier one left there is removed.
    ///
    /// # Errors
    /// The guest runs already, or the folder cannot be made.
    pub fn take(name: &str) -> Result<Self, Error> {
        let folder = Folder::of(name);
        let root = root();
        private(&root)?;
        // Whoever ends removes folder and lock: a lock on a file that is no longer there is none.
        let mut tries = 0;
        loop {
            private(&folder.path)?;
            let path = folder.path.join(PID);
            let opened = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .custom_flags(libc::O_NOFOLLOW)
                .open(&path);
            let file = match opened {
                Ok(file) => file,
                Err(why) if why.kind() == io::ErrorKind::NotFound => continue,
                Err(why) => return Err(at(&path)(why)),
            };
            let mut lock = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => lock,
                // Whoever looks whether the guest runs holds the lock for a moment too.
                Err((_, Errno::EWOULDBLOCK)) if tries < TRIES => {
                    tries += 1;
                    std::thread::sleep(std::time::Duration::from_millis(2));
                    continue;
                }
                Err((mut file, Errno::EWOULDBLOCK)) => {
                    let mut pid = String::new();
                    file.read_to_string(&mut pid).map_err(at(&path))?;
                    let pid = pid.trim().to_owned();
                    return Err(Error::Runs { name: name.to_owned(), pid });
                }
                Err((_, why)) => return Err(at(&path)(why.into())),
            };
            let mine = lock.metadata().map_err(at(&path))?;
            let there = fs::symlink_metadata(&path);
            if there.is_ok_and(|there| (there.dev(), there.ino()) == (mine.dev(), mine.ino())) {
                lock.set_len(0).map_err(at(&path))?;
                writeln!(lock, "{}", std::process::id()).map_err(at(&path))?;
                return Ok(Self { folder, _lock: lock });
            }
        }
    }

    /// The folder.
    #[must_use]
    pub fn folder(&self) -> &Folder {
        &self.folder
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.folder.clear();
    }
}

/// Makes the folder `path`, for this user only.
fn private(path: &Path) -> Result<(), Error> {
    match DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => return Ok(()),
        Err(why) if why.kind() == io::ErrorKind::AlreadyExists => {}
        Err(why) if why.kind() == io::ErrorKind::NotFound => {
            DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(at(path))?;
        }
        Err(why) => return Err(at(path)(why)),
    }
    let there = fs::symlink_metadata(path).map_err(at(path))?;
    if there.is_dir() && there.uid() == geteuid().as_raw() && there.mode() & 0o022 == 0 {
        return Ok(());
    }
    Err(Error::Foreign(path.to_owned()))
}

/// The guests that run, by name.
///
/// # Errors
/// The folder of all guests is there but cannot be read.
pub fn running() -> Result<Vec<Folder>, Error> {
    let root = root();
    let entries = match fs::read_dir(&root) {
        Ok(entries) => entries,
        Err(why) if why.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(why) => return Err(at(&root)(why)),
    };
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut names: Vec<String> = names.filter(|name| crate::config::name_mistake(name).is_none()).collect();
    names.sort();
    Ok(names.iter().map(|name| Folder::of(name)).filter(|folder| folder.process().is_some()).collect())
}

/// The folder of the guest `name`, which runs.
///
/// # Errors
/// It does not.
pub fn find(name: &str) -> Result<Folder, Error> {
    let folder = Folder::of(name);
    if crate::config::name_mistake(name).is_none() && folder.process().is_some() {
        return Ok(folder);
    }
    let running = running()?;
    let names = running.iter().map(Folder::name);
    let nearest = crate::config::toml_file::nearest(name, names).map(ToOwned::to_owned);
    Err(Error::None { name: name.to_owned(), nearest })
}
