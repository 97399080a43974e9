//! Unpacked kernels, kept under the identity of the file that they came from.

use std::fs::{self, File};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use linux_loader::loader::bootparam::setup_header;
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::{sparse, unpack};

/// How many unpacked kernels are kept; the longest unused go first.
const KEPT: usize = 6;
const EXTENSION: &str = "vmlinux";

/// The ELF kernel inside the bzImage `file`; `None` if it is packed in a way that we do not know.
pub(super) fn unpacked(file: &File, header: &setup_header, cache: Option<&Path>) -> io::Result<Option<File>> {
    let entry = match cache {
        Some(directory) => Some(directory.join(name(file)?)),
        None => None,
    };
    if let Some(found) = entry.as_deref().and_then(|path| File::open(path).ok()) {
        // Marks it as used; a cache that is not ours to write still serves.
        let _ = found.set_modified(SystemTime::now());
        return Ok(Some(found));
    }
    match unpack::unpack(file, header, temporary()?)? {
        Some(mut elf) => {
            sparse::leave_out_zeros(&mut elf)?;
            if let Some(path) = entry
                && let Err(error) = keep(&mut elf, &path)
            {
                tracing::info!(path = %path.display(), %error, "The unpacked kernel is not kept");
            }
            Ok(Some(elf))
        }
        None => Ok(None),
    }
}

/// The identity of a file's content as the file system tells it: any write changes the times.
fn name(file: &File) -> io::Result<String> {
    let meta = file.metadata()?;
    Ok(format!(
        "{:x}-{:x}-{:x}-{:x}.{:x}-{:x}.{:x}.sparse.{EXTENSION}",
        meta.dev(),
        meta.ino(),
        meta.size(),
        meta.mtime(),
        meta.mtime_nsec(),
        meta.ctime(),
        meta.ctime_nsec(),
    ))
}

fn temporary() -> io::Result<File> {
    Ok(File::from(memfd_create(c"vmlinux", MFdFlags::MFD_CLOEXEC)?))
}

/// Stores `elf` at `path`, whole or not at all, and drops what is old.
fn keep(elf: &mut File, path: &Path) -> io::Result<()> {
    let directory = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    let part = path.with_extension(format!("part{}", std::process::id()));
    elf.seek(SeekFrom::Start(0))?;
    let written = File::create(&part).and_then(|mut file| io::copy(elf, &mut file));
    let kept = written.and_then(|_| fs::rename(&part, path));
    if kept.is_err() {
        let _ = fs::remove_file(&part);
    }
    kept?;
    let mut all: Vec<(SystemTime, PathBuf)> = fs::read_dir(directory)?
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let path = entry.path();
            let ours = path.extension().is_some_and(|extension| extension == EXTENSION);
            ours.then_some((entry.metadata().ok()?.modified().ok()?, path))
        })
        .collect();
    all.sort();
    for (_, old) in all.iter().rev().skip(KEPT) {
        fs::remove_file(old)?;
    }
    Ok(())
}
