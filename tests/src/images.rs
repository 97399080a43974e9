//! The images that PCs and guests start from, made by `guest-images/build`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// The project's folder.
pub fn project() -> PathBuf {
    if let Ok(path) = std::env::var("OMEGA_PROJECT") {
        return path.into();
    }
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("/")).to_owned()
}

/// Where things are built.
pub fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| project().join("target"), PathBuf::from)
}

/// Where the Omega programs under test are, and what else is built with them: `OMEGA_BIN_DIR`, or the release build.
pub fn binary(name: &str) -> Result<PathBuf> {
    let folder = std::env::var_os("OMEGA_BIN_DIR").map_or_else(|| target().join("release"), PathBuf::from);
    let path = folder.join(name);
    if !path.is_file() {
        bail!("There is no {}; run `make build`", path.display());
    }
    Ok(path)
}

/// One of the lab's own programs, which cargo built beside this one.
pub fn own_binary(name: &str) -> Result<PathBuf> {
    let me = std::env::current_exe()?;
    let found = me.ancestors().skip(1).take(2).map(|folder| folder.join(name)).find(|path| path.is_file());
    found.with_context(|| {
        format!("There is no `{name}` beside {}; run `cargo build -p omega-lab`", me.display())
    })
}

/// An image: a folder of files and the key of what it was made from.
#[derive(Clone, Debug)]
pub struct Image {
    folder: PathBuf,
    key: String,
}

impl Image {
    /// The image of this name; made now if it is missing or its recipe has changed.
    pub fn get(name: &str) -> Result<Self> {
        let build = project().join("guest-images/build");
        // Its messages go to standard error: what takes a minute should say so.
        let status = Command::new(&build).arg(name).status().with_context(|| build.display().to_string())?;
        if !status.success() {
            bail!("The image `{name}` could not be made; the lines above say why");
        }
        let folder = std::env::var_os("OMEGA_IMAGES")
            .map_or_else(|| target().join("images"), PathBuf::from)
            .join(name);
        let key = fs::read_to_string(folder.join("key")).with_context(|| folder.display().to_string())?;
        Ok(Self { folder, key: key.trim().to_owned() })
    }

    /// A file of it.
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// What it was made from, as a hash.
    pub fn key(&self) -> &str {
        &self.key
    }

    /// The version of its kernel.
    pub fn kernel_version(&self) -> Result<String> {
        Ok(fs::read_to_string(self.file("version"))?.trim().to_owned())
    }
}

/// Makes a qcow2 disk of this size that starts as `base` (a raw image) or empty.
pub fn overlay(path: &Path, base: Option<&Path>, size: &str) -> Result<()> {
    let mut command = Command::new("qemu-img");
    command.args(["create", "-q", "-f", "qcow2"]);
    if let Some(base) = base {
        command.args(["-F", "raw", "-b"]).arg(base);
    }
    let output = command.arg(path).arg(size).output().context("qemu-img")?;
    if !output.status.success() {
        bail!("qemu-img create: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}
