//! Unpacked kernels, kept under the identity of the file that they came from.

use std::fs::{self, File};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use linux_loader::loader::bootparam::setup_header;
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::{sparse, unpack};

/// How many unpacked kernels are kept; the longest unused go first.
const KEPT: usize = 6;
/// Another one whenever entries of before cannot be trusted: those are not found any more, and go.
const EXTENSION: &str = "kernel2";
const OLD_EXTENSION: &str = "vmlinux";
/// What a writer that was cut short left goes after so long; nobody takes as long to write an entry.
const ABANDONED: Duration = Duration::from_secs(3600);

/// The ELF kernel inside the bzImage `file`; `None` if it is packed in a way that we do not know.
pub(super) fn unpacked(file: &File, header: &setup_header, cache: Option<&Path>) -> io::Result<Option<File>> {
    let entry = match cache {
        Some(directory) => Some(directory.join(name(file)?)),
        None => None,
    };
    if let Some(found) = entry.as_deref().and_then(find) {
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

/// The entry at `path`. One that is cut short or no kernel at all is removed: it is made anew.
fn find(path: &Path) -> Option<File> {
    let mut found = File::open(path).ok()?;
    if !sparse::is_whole(&mut found).unwrap_or(false) {
        tracing::warn!(path = %path.display(), "The kept unpacked kernel is damaged; it is unpacked anew");
        let _ = fs::remove_file(path);
        return None;
    }
    // Marks it as used; a cache that is not ours to write still serves.
    let _ = found.set_modified(SystemTime::now());
    Some(found)
}

/// The identity of a file's content as the file system tells it: any write changes the times.
fn name(file: &File) -> io::Result<String> {
    let meta = file.metadata()?;
    Ok(format!(
        "{:x}-{:x}-{:x}-{:x}.{:x}-{:x}.{:x}.{EXTENSION}",
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

/// Stores `elf` at `path`, whole or not at all, whenever the power fails, and drops what is old.
fn keep(elf: &mut File, path: &Path) -> io::Result<()> {
    if !sparse::is_whole(elf)? {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "it is no sound ELF file"));
    }
    let directory = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    let part = path.with_extension(format!("part{}", std::process::id()));
    elf.seek(SeekFrom::Start(0))?;
    let written = File::create(&part).and_then(|mut file| {
        io::copy(elf, &mut file)?;
        // The name may reach the disk before the content: a file system promises no order between the two.
        file.sync_data()
    });
    let kept = written.and_then(|()| fs::rename(&part, path));
    if kept.is_err() {
        let _ = fs::remove_file(&part);
    }
    kept?;
    tidy(directory)
}

/// Drops the longest unused entries, those of older versions, and what was left half written.
fn tidy(directory: &Path) -> io::Result<()> {
    let mut entries: Vec<(SystemTime, PathBuf)> = Vec::new();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let (path, modified) = (entry.path(), entry.metadata()?.modified()?);
        let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
        let abandoned = || modified.elapsed().is_ok_and(|age| age > ABANDONED);
        if extension == EXTENSION {
            entries.push((modified, path));
        } else if extension == OLD_EXTENSION || extension.starts_with("part") && abandoned() {
            fs::remove_file(path)?;
        }
    }
    entries.sort();
    for (_, old) in entries.iter().rev().skip(KEPT) {
        fs::remove_file(old)?;
    }
    Ok(())
}

#[cfg(test)]
#[path = "cache_test.rs"]
mod tests;
