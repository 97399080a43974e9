//! An opened image: checked, measured and locked, so that two guests cannot write the same one.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::UNIX_EPOCH;

use nix::fcntl::{FcntlArg, fcntl};

use super::sys::{self, Alignment};
use crate::disk::Geometry;

/// Whether I/O goes past this PC's page cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Direct {
    /// Through the page cache.
    Off,
    /// Past it for block devices that allow it; image files are cached.
    #[default]
    Auto,
    /// Past it, or the image cannot be opened.
    On,
}

/// What to open, and how.
#[derive(Clone, Debug)]
pub struct Options {
    /// A regular file or a block device.
    pub path: PathBuf,
    /// Refuse writes; others may read it at the same time.
    pub read_only: bool,
    /// Whether I/O goes past the page cache.
    pub direct: Direct,
}

/// An image could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// It is missing or not permitted, or a question about it failed.
    #[error("Cannot open {path}: {source}", path = path.display())]
    Open {
        /// The image.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is a directory, a socket or something else.
    #[error("{path} is neither a file nor a block device", path = .0.display())]
    NotADisk(PathBuf),
    /// Its size is none that a disk can have.
    #[error(
        "{path} is {size} bytes long; a disk needs a multiple of 512, and at least 512",
        path = path.display()
    )]
    Size {
        /// The image.
        path: PathBuf,
        /// Its size.
        size: u64,
    },
    /// Somebody else holds its lock.
    #[error("{path} is in use by another process, which {how}", path = path.display())]
    Locked {
        /// The image.
        path: PathBuf,
        /// Whether the other one writes, or reads while we want to write.
        how: &'static str,
    },
    /// `O_DIRECT` was asked for and is not possible.
    #[error("{path} cannot be used past the page cache: {why}", path = path.display())]
    Direct {
        /// The image.
        path: PathBuf,
        /// Why not.
        why: String,
    },
}

/// An image file or block device that is open, locked and measured.
#[derive(Debug)]
pub struct Image {
    pub(super) file: File,
    path: PathBuf,
    geometry: Geometry,
    identity: u128,
    /// The memory alignment that `O_DIRECT` needs, where it is used.
    pub(super) direct: Option<usize>,
    /// A flush failed: the kernel may have dropped what it could not write, so none can succeed again.
    flush_failed: AtomicBool,
}

impl Image {
    /// Opens, checks and locks an image.
    ///
    /// # Errors
    /// Each [`OpenError`], which names the path and the reason.
    pub fn open(options: &Options) -> Result<Self, OpenError> {
        let path = &options.path;
        let failed = |source| OpenError::Open { path: path.clone(), source };
        let file = open(path, options.read_only, 0).map_err(failed)?;
        let kind = file.metadata().map_err(failed)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(OpenError::NotADisk(path.clone()));
        }
        let block_device = kind.is_block_device();
        let size = (&file).seek(SeekFrom::End(0)).map_err(failed)?;
        if size == 0 || size % 512 != 0 {
            return Err(OpenError::Size { path: path.clone(), size });
        }
        let block_size = if block_device { sys::logical_block(&file).map_err(failed)? } else { 512 };
        let (file, direct) = choose_direct(file, options, block_device, block_size)?;
        lock(&file, options)?;
        let geometry = Geometry {
            size,
            block_size,
            read_only: options.read_only,
            discard: !options.read_only && (!block_device || device_discards(&file)),
            write_zeroes: !options.read_only,
        };
        let identity = if block_device { device_identity(&file) } else { file_identity(&file) };
        let flush_failed = AtomicBool::new(false);
        Ok(Self { file, path: path.clone(), geometry, identity, direct, flush_failed })
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its size and limits.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Stays the same over restarts and differs from any other image's; 0 if the kernel has nothing to
    /// tell a block device by.
    #[must_use]
    pub fn identity(&self) -> u128 {
        self.identity
    }

    /// Whether I/O goes past the page cache.
    #[must_use]
    pub fn is_direct(&self) -> bool {
        self.direct.is_some()
    }

    /// Flushes from the calling thread, which waits.
    ///
    /// # Errors
    /// The kernel could not write everything to stable storage, now or at an earlier flush.
    pub fn flush(&self) -> io::Result<()> {
        self.flush_allowed()?;
        self.file.sync_data().inspect_err(|_| self.flush_has_failed())
    }

    pub(super) fn flush_allowed(&self) -> io::Result<()> {
        if self.flush_failed.load(Ordering::Acquire) {
            return Err(io::Error::other("An earlier flush failed, so what it covered may be lost"));
        }
        Ok(())
    }

    pub(super) fn flush_has_failed(&self) {
        self.flush_failed.store(true, Ordering::Release);
    }
}

fn open(path: &Path, read_only: bool, flags: i32) -> io::Result<File> {
    OpenOptions::new().read(true).write(!read_only).custom_flags(flags | libc::O_CLOEXEC).open(path)
}

/// Opens the image again with `O_DIRECT` where that is asked for and possible, and says what it needs of
/// memory.
fn choose_direct(
    file: File,
    options: &Options,
    block_device: bool,
    block_size: u32,
) -> Result<(File, Option<usize>), OpenError> {
    let wanted = match options.direct {
        Direct::Off => false,
        Direct::Auto => block_device,
        Direct::On => true,
    };
    if !wanted {
        return Ok((file, None));
    }
    let refused = |why: String| OpenError::Direct { path: options.path.clone(), why };
    let attempt = open(&options.path, options.read_only, libc::O_DIRECT).map_err(|e| refused(e.to_string()));
    let attempt = attempt.and_then(|direct| {
        let guess = Alignment { memory: 512.max(block_size as usize), offset: 512.max(block_size as usize) };
        let need = sys::direct_alignment(&direct).unwrap_or(guess);
        // A guest that sees blocks of 512 bytes may write one; a bigger unit would have to be read first.
        if need.offset > block_size as usize {
            return Err(refused(format!("its storage works in units of {} bytes", need.offset)));
        }
        Ok((direct, Some(need.memory)))
    });
    match (attempt, options.direct) {
        (Ok(direct), _) => Ok(direct),
        (Err(e), Direct::On) => Err(e),
        (Err(_), _) => Ok((file, None)),
    }
}

/// Takes the image's lock: shared to read, exclusive to write. It belongs to the open file, so it lasts
/// until the last I/O of a killed process is done.
fn lock(file: &File, options: &Options) -> Result<(), OpenError> {
    let kind = if options.read_only { libc::F_RDLCK } else { libc::F_WRLCK };
    let range =
        libc::flock { l_type: kind as i16, l_whence: libc::SEEK_SET as i16, l_start: 0, l_len: 0, l_pid: 0 };
    let Err(source) = fcntl(file, FcntlArg::F_OFD_SETLK(&range)) else {
        return Ok(());
    };
    let path = options.path.clone();
    match source {
        nix::Error::EAGAIN | nix::Error::EACCES => {
            let how = if options.read_only { "writes it" } else { "reads or writes it" };
            Err(OpenError::Locked { path, how })
        }
        other => Err(OpenError::Open { path, source: other.into() }),
    }
}

/// The inode and its time of birth: another file in the same place differs.
fn file_identity(file: &File) -> u128 {
    let Ok(metadata) = file.metadata() else { return 0 };
    let born = metadata.created().ok().and_then(|t| t.duration_since(UNIX_EPOCH).ok());
    let born = born.map_or(0, |d| d.as_nanos() as u64);
    u128::from(metadata.ino()) << 64 | u128::from(born)
}

fn sysfs(file: &File) -> Option<PathBuf> {
    let device = file.metadata().ok()?.rdev();
    let path = format!("/sys/dev/block/{}:{}", libc::major(device), libc::minor(device));
    std::fs::canonicalize(path).ok()
}

/// A hash of what the kernel tells a block device by, over restarts.
fn device_identity(file: &File) -> u128 {
    let names =
        ["wwid", "device/wwid", "uuid", "dm/uuid", "md/uuid", "device/serial", "serial", "partition/uuid"];
    let Some(directory) = sysfs(file) else { return 0 };
    let known: Vec<u8> = names
        .iter()
        .filter_map(|name| std::fs::read(directory.join(name)).ok())
        .chain(std::fs::read(directory.join("partition")).ok())
        .flatten()
        .collect();
    if known.is_empty() { 0 } else { fnv(&known) }
}

/// FNV-1a, 128 bits: the same in every release, which `std`'s hashes do not promise.
fn fnv(bytes: &[u8]) -> u128 {
    bytes.iter().fold(0x6c62_272e_07bb_0142_62b8_2175_6295_c58d, |hash: u128, &byte| {
        (hash ^ u128::from(byte)).wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b)
    })
}

fn device_discards(file: &File) -> bool {
    let Some(directory) = sysfs(file) else { return false };
    ["queue", "../queue"]
        .iter()
        .filter_map(|queue| {
            std::fs::read_to_string(directory.join(queue).join("write_zeroes_unmap_max_hw_bytes"))
                .or_else(|_| std::fs::read_to_string(directory.join(queue).join("discard_max_bytes")))
                .ok()
        })
        .any(|text| text.trim() != "0")
}
