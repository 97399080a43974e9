//! Files added to an initramfs: the kernel reads one archive after another (`newc` format).

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

/// An archive that is appended to an image's initrd.
#[derive(Default)]
pub struct Initramfs {
    bytes: Vec<u8>,
    inodes: u32,
    folders: Vec<String>,
}

impl Initramfs {
    /// Starts from an image's initrd.
    pub fn from_file(initrd: &Path) -> Result<Self> {
        let bytes = fs::read(initrd).with_context(|| format!("The initramfs {}", initrd.display()))?;
        let mut archive = Self { bytes, ..Self::default() };
        archive.pad(512);
        Ok(archive)
    }

    fn pad(&mut self, to: usize) {
        self.bytes.resize(self.bytes.len().next_multiple_of(to), 0);
    }

    fn entry(&mut self, path: &str, mode: u32, content: &[u8]) {
        self.inodes += 1;
        let fields = [
            0x7000_0000 + self.inodes,
            mode,
            0,
            0,
            1,
            0,
            content.len() as u32,
            0,
            0,
            0,
            0,
            path.len() as u32 + 1,
            0,
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad(4);
        self.bytes.extend_from_slice(content);
        self.pad(4);
    }

    /// Adds a file; folders above it are made.
    pub fn file(mut self, path: &str, mode: u32, content: &[u8]) -> Self {
        let path = path.trim_start_matches('/');
        for (at, _) in path.match_indices('/') {
            let folder = path[..at].to_owned();
            if !self.folders.contains(&folder) {
                self.entry(&folder, 0o040_755, &[]);
                self.folders.push(folder);
            }
        }
        self.entry(path, 0o100_000 | mode, content);
        self
    }

    /// Adds a program of this machine, with the shared libraries that it needs at their own paths.
    pub fn program(mut self, path: &str, program: &Path) -> Result<Self> {
        let content = fs::read(program).with_context(|| format!("The program {}", program.display()))?;
        self = self.file(path, 0o755, &content);
        let listed = Command::new("ldd").arg(program).output().context("ldd")?;
        for library in
            String::from_utf8_lossy(&listed.stdout).split_whitespace().filter(|w| w.starts_with('/'))
        {
            let mode = fs::metadata(library)?.permissions().mode() & 0o777;
            self = self.file(library, mode, &fs::read(library)?);
        }
        Ok(self)
    }

    /// The whole archive.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.pad(512);
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpio_unpacks_what_was_packed() {
        let archive =
            Initramfs::default().file("/a/b/script", 0o755, b"#!/bin/sh\n").file("/a/text", 0o644, b"x");
        let folder = tempfile::tempdir().expect("a folder");
        let packed = folder.path().join("archive");
        fs::write(&packed, archive.finish()).expect("written");
        let status =
            Command::new("sh").arg("-c").arg("cpio -idm <archive 2>/dev/null").current_dir(&folder).status();
        if !status.is_ok_and(|s| s.success()) {
            eprintln!("cannot run: cpio is not installed");
            return;
        }
        assert_eq!(fs::read(folder.path().join("a/b/script")).expect("unpacked"), b"#!/bin/sh\n");
        let mode = fs::metadata(folder.path().join("a/b/script")).expect("there").permissions().mode();
        assert_eq!(mode & 0o777, 0o755);
        assert_eq!(fs::read(folder.path().join("a/text")).expect("unpacked"), b"x");
    }
}
