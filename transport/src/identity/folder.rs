//! The files of an identity: `ca.pem`, `node.pem`, `node.key` and `crl.pem` in one folder.
//!
//! A folder is replaced as a whole. The new files are written beside the old ones as `*.new`, then the file
//! `commit` says that all of them are there, then they take the old ones' places. Whoever finds `commit`
//! finishes what was begun; without it, `*.new` means nothing.
//!
//! Root writes into folders of services that it does not trust so far (`omega-agent join`): neither the folder nor
//! a file in it may be a symbolic link, and what is written goes into the folder that was looked at, whatever has
//! its name by then.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivatePkcs8KeyDer};

use super::Error;

/// The household's authority.
pub const CA: &str = "ca.pem";
/// This node's certificate.
pub const NODE: &str = "node.pem";
/// This node's key.
pub const KEY: &str = "node.key";
/// What the authority has revoked.
pub const CRL: &str = "crl.pem";

/// Each file and its mode.
const FILES: [(&str, u32); 4] = [(CA, 0o644), (NODE, 0o644), (KEY, 0o600), (CRL, 0o644)];
/// The new files are complete.
const COMMIT: &str = "commit";
/// No file of an identity is longer.
const MAX_FILE: u64 = 1 << 20;

/// Where the agent, and `omega` for root, has its identity.
pub const SYSTEM: &str = "/etc/omega/identity";

/// Where this user's identity is: `/etc/omega/identity` for root, else in `XDG_CONFIG_HOME` or `~/.config`.
/// `None` for a user without a home.
#[must_use]
pub fn of_this_user() -> Option<PathBuf> {
    if nix::unistd::Uid::effective().is_root() {
        return Some(PathBuf::from(SYSTEM));
    }
    let absolute =
        |name| std::env::var_os(name).map(PathBuf::from).filter(|path: &PathBuf| path.is_absolute());
    let config = absolute("XDG_CONFIG_HOME").or_else(|| absolute("HOME").map(|home| home.join(".config")))?;
    Some(config.join("omega/identity"))
}

/// What the files hold.
#[derive(Debug)]
pub(crate) struct Parts {
    pub(crate) ca: CertificateDer<'static>,
    pub(crate) node: CertificateDer<'static>,
    pub(crate) key: PrivatePkcs8KeyDer<'static>,
    pub(crate) crl: CertificateRevocationListDer<'static>,
}

impl Clone for Parts {
    fn clone(&self) -> Self {
        let Self { ca, node, key, crl } = self;
        Self { ca: ca.clone(), node: node.clone(), key: key.clone_key(), crl: crl.clone() }
    }
}

/// Reads `folder`, after finishing a replacement that was cut short.
pub(crate) fn read(folder: &Path) -> Result<Parts, Error> {
    guard(folder, 0o022, 0o700)?;
    if folder.join(COMMIT).exists() {
        Held::of(folder)?.within(finish)?;
    }
    Ok(Parts {
        ca: part(folder, CA)?,
        node: part(folder, NODE)?,
        key: part(folder, KEY)?,
        crl: part(folder, CRL)?,
    })
}

/// Replaces `folder` by `parts`: wholly, or not at all. Makes it if there is none.
pub(crate) fn write(folder: &Path, parts: &Parts) -> Result<(), Error> {
    make(folder)?;
    let Parts { ca, node, key, crl } = parts;
    let texts = [
        text("CERTIFICATE", ca),
        text("CERTIFICATE", node),
        text("PRIVATE KEY", key.secret_pkcs8_der()),
        text("X509 CRL", crl),
    ];
    Held::of(folder)?.within(|folder| {
        for ((name, mode), text) in FILES.into_iter().zip(texts) {
            put(&folder.join(fresh(name)), text.as_bytes(), mode)?;
        }
        put(&folder.join(COMMIT), b"", 0o600)?;
        sync(folder)?;
        finish(folder)
    })
}

/// Makes sure that something can be stored in `folder`, which is made if there is none.
pub(crate) fn try_out(folder: &Path) -> Result<(), Error> {
    make(folder)?;
    guard(folder, 0o022, 0o700)?;
    Held::of(folder)?.within(|folder| {
        let probe = folder.join("probe");
        put(&probe, b"", 0o600)?;
        fs::remove_file(&probe).map_err(|source| Error::File { path: probe, source })
    })
}

/// A folder that is held open.
struct Held<'a> {
    open: File,
    folder: &'a Path,
}

impl<'a> Held<'a> {
    fn of(folder: &'a Path) -> Result<Self, Error> {
        let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
        let flags = libc::O_DIRECTORY | libc::O_NOFOLLOW;
        match OpenOptions::new().read(true).custom_flags(flags).open(folder) {
            Ok(open) => Ok(Self { open, folder }),
            Err(_) if folder.is_symlink() => Err(Error::Link(folder.to_owned())),
            Err(source) => Err(Error::File { path: folder.to_owned(), source }),
        }
    }

    /// Does something by a path that leads into this very folder.
    fn within(&self, act: impl FnOnce(&Path) -> Result<(), Error>) -> Result<(), Error> {
        let inside = PathBuf::from(format!("/proc/self/fd/{}", self.open.as_raw_fd()));
        act(&inside).map_err(|why| match why {
            Error::File { path, source } => {
                let path =
                    path.strip_prefix(&inside).map_or_else(|_| path.clone(), |rest| self.folder.join(rest));
                Error::File { path, source }
            }
            other => other,
        })
    }
}

/// Replaces the CRL alone.
pub(crate) fn write_crl(folder: &Path, crl: &CertificateRevocationListDer<'_>) -> Result<(), Error> {
    replace(&folder.join(CRL), text("X509 CRL", crl).as_bytes(), 0o644)
}

/// Makes `folder`, closed to others, and what leads to it.
pub(crate) fn make(folder: &Path) -> Result<(), Error> {
    let failed = |source| Error::File { path: folder.to_owned(), source };
    match fs::symlink_metadata(folder) {
        Ok(about) if about.is_symlink() => return Err(Error::Link(folder.to_owned())),
        Ok(about) if about.is_dir() => return Ok(()),
        _ => {}
    }
    if let Some(above) = folder.parent() {
        fs::create_dir_all(above).map_err(failed)?;
    }
    DirBuilder::new().mode(0o700).create(folder).map_err(failed)?;
    let made = OpenOptions::new().read(true).custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW).open(folder);
    made.and_then(|made| bequeath(&made, folder)).map_err(failed)
}

/// What root makes belongs to the owner of the folder that it is in: `omega-agent join` runs as root, and the
/// service whose folder it writes does not.
fn bequeath(made: &File, path: &Path) -> io::Result<()> {
    let Some(above) = path.parent().filter(|_| nix::unistd::Uid::effective().is_root()) else {
        return Ok(());
    };
    let above = fs::metadata(if above.as_os_str().is_empty() { Path::new(".") } else { above })?;
    std::os::unix::fs::fchown(made, Some(above.uid()), Some(above.gid()))
}

/// Replaces the file at `path`, on stable storage, wholly or not at all.
pub(crate) fn replace(path: &Path, bytes: &[u8], mode: u32) -> Result<(), Error> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    Held::of(path.parent().unwrap_or(Path::new("/")))?.within(|folder| {
        // The number keeps two processes that do this at once apart.
        let beside = folder.join(format!("{name}.{}.new", std::process::id()));
        let done = put(&beside, bytes, mode).and_then(|()| rename(&beside, &folder.join(&*name)));
        if done.is_err() {
            fs::remove_file(&beside).ok();
        }
        done?;
        sync(folder)
    })
}

/// A file's whole content, as far as others cannot have it.
pub(crate) fn content(path: &Path, forbidden: u32, right: u32) -> Result<Vec<u8>, Error> {
    let failed = |source| Error::File { path: path.to_owned(), source };
    // No link, and nothing that is waited for.
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file =
        OpenOptions::new().read(true).custom_flags(flags).open(path).map_err(|source| {
            if path.is_symlink() { Error::Link(path.to_owned()) } else { failed(source) }
        })?;
    let mode = file.metadata().map_err(failed)?.permissions().mode() & 0o777;
    if mode & forbidden != 0 {
        return Err(Error::Exposed { path: path.to_owned(), mode, right });
    }
    let mut bytes = Vec::new();
    file.take(MAX_FILE + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(Error::malformed(path.display().to_string(), "it is too long"));
    }
    Ok(bytes)
}

/// Refuses a folder that is open to others in a way that `forbidden` names.
pub(crate) fn guard(folder: &Path, forbidden: u32, right: u32) -> Result<(), Error> {
    let failed = |source| Error::File { path: folder.to_owned(), source };
    let mode = match fs::symlink_metadata(folder) {
        Ok(about) if about.is_symlink() => return Err(Error::Link(folder.to_owned())),
        Ok(about) => about.permissions().mode() & 0o777,
        Err(why) if why.kind() == io::ErrorKind::NotFound => {
            return Err(Error::Missing { folder: folder.to_owned(), file: NODE });
        }
        Err(why) => return Err(failed(why)),
    };
    if mode & forbidden != 0 {
        return Err(Error::Exposed { path: folder.to_owned(), mode, right });
    }
    Ok(())
}

pub(crate) fn text(tag: &str, der: &[u8]) -> String {
    let config = pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF);
    pem::encode_config(&pem::Pem::new(tag, der), config)
}

/// Decodes the first object of its kind in `bytes`.
pub(crate) fn decode<T: PemObject>(path: &Path, bytes: &[u8]) -> Result<T, Error> {
    T::from_pem_slice(bytes).map_err(|why| Error::malformed(path.display().to_string(), &why))
}

fn part<T: PemObject>(folder: &Path, name: &'static str) -> Result<T, Error> {
    let path = folder.join(name);
    let (forbidden, right) = if name == KEY { (0o077, 0o600) } else { (0o022, 0o644) };
    let bytes = content(&path, forbidden, right).map_err(|why| match why {
        Error::File { source, .. } if source.kind() == io::ErrorKind::NotFound => {
            Error::Missing { folder: folder.to_owned(), file: name }
        }
        other => other,
    })?;
    decode(&path, &bytes)
}

fn fresh(name: &str) -> String {
    format!("{name}.new")
}

/// The new files take the old ones' places. Another process may be doing the same.
fn finish(folder: &Path) -> Result<(), Error> {
    for (name, _) in FILES {
        rename(&folder.join(fresh(name)), &folder.join(name))?;
    }
    sync(folder)?;
    let commit = folder.join(COMMIT);
    match fs::remove_file(&commit) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(Error::File { path: commit, source }),
        _ => sync(folder),
    }
}

fn rename(from: &Path, to: &Path) -> Result<(), Error> {
    match fs::rename(from, to) {
        // It is done already.
        Err(why) if why.kind() == io::ErrorKind::NotFound && to.exists() => Ok(()),
        other => other.map_err(|source| Error::File { path: to.to_owned(), source }),
    }
}

/// Writes a new file, to stable storage. What was left there by a writer that was cut short goes.
fn put(path: &Path, bytes: &[u8], mode: u32) -> Result<(), Error> {
    let write = || {
        match fs::remove_file(path) {
            Err(why) if why.kind() != io::ErrorKind::NotFound => return Err(why),
            _ => {}
        }
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
        // The process's umask may have taken bits away.
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        bequeath(&file, path)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(|source| Error::File { path: path.to_owned(), source })
}

fn sync(folder: &Path) -> Result<(), Error> {
    let synced = File::open(folder).and_then(|folder| folder.sync_all());
    synced.map_err(|source| Error::File { path: folder.to_owned(), source })
}
