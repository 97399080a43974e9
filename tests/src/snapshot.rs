//! Booted PCs, saved: a PC that starts from one skips its boot.
//!
//! A snapshot is the PC's state as QEMU would send it to another machine, and its root disk at that moment.
//! It fits exactly one image, machine, QEMU and runner; the key says which. It is only ever loaded with a copy
//! of the disk that belongs to it: a PC that lost its power boots.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::fcntl::{Flock, FlockArg};
use serde_json::json;

use crate::host::host;
use crate::images::{own_binary, target};
use crate::pc::Pc;
use crate::qmp::Qmp;

const PATIENCE: Duration = Duration::from_secs(600);
/// How many snapshots are kept beside a new one, 100 to 200 MB each.
const KEPT: usize = 5;

/// A saved PC.
pub(crate) struct Snapshot {
    folder: PathBuf,
}

/// The snapshot that fits this PC, which is switched off; made now if there is none yet. `None` where
/// snapshots are switched off (`LAB_SNAPSHOTS=0`) or do not work (nested KVM cannot save its state everywhere; QEMU hands
/// it to another program, which cannot live with a slower clock).
pub(crate) fn of(pc: &Pc) -> Result<Option<Snapshot>> {
    if host()?.kvm || pc.lab.slower > 1 || std::env::var("LAB_SNAPSHOTS").is_ok_and(|v| v == "0") {
        return Ok(None);
    }
    let cache = target().join("lab/.snapshots");
    let folder = cache.join(key(pc)?);
    fs::create_dir_all(&cache)?;
    // One process makes it, others wait.
    let _guard = Flock::lock(fs::File::create(cache.join("lock"))?, FlockArg::LockExclusive)
        .map_err(|(_, error)| error)
        .context("The snapshots' lock")?;
    if !folder.join("done").exists() {
        remove_all_but(KEPT, &cache)?;
        make(pc, &folder)?;
    }
    Ok(Some(Snapshot { folder }))
}

/// Removes the oldest snapshots: those of programs and images that have changed since.
fn remove_all_but(kept: usize, cache: &Path) -> Result<()> {
    let mut folders = Vec::new();
    for entry in fs::read_dir(cache)?.flatten() {
        let about = entry.metadata()?;
        if about.is_dir() {
            folders.push((about.modified()?, entry.path()));
        }
    }
    folders.sort();
    for (_, old) in folders.iter().rev().skip(kept) {
        fs::remove_dir_all(old)?;
    }
    Ok(())
}

fn key(pc: &Pc) -> Result<String> {
    let runner = own_binary("lab-runner")?;
    let sum = Command::new("sha256sum").arg(&runner).output().context("sha256sum")?;
    let parts = [
        pc.lab.image.key(),
        &host()?.qemu,
        &pc.machine()?.join(" "),
        String::from_utf8_lossy(&sum.stdout).split(' ').next().unwrap_or_default(),
    ]
    .join("\n");
    // Only a name: a collision would need a machine that is described by the same text.
    let mut hash = 0xcbf2_9ce4_8422_2325_u128;
    for byte in parts.bytes() {
        hash = (hash ^ u128::from(byte)).wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b);
    }
    Ok(format!("{hash:032x}"))
}

fn make(pc: &Pc, folder: &Path) -> Result<()> {
    let _ = fs::remove_dir_all(folder);
    fs::create_dir_all(folder)?;
    pc.new_root()?;
    pc.power_up(None)?;
    pc.run("sync; echo 3 >/proc/sys/vm/drop_caches")?.ok()?;
    let (runner, qmp) = pc.connections()?;
    // The connection is closed between two frames, so that the next lab finds the port in order.
    runner.close();
    let mut qmp = qmp.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    qmp.run("stop", &json!({}))?;
    let state = folder.join("state");
    qmp.run("migrate-set-parameters", &json!({ "max-bandwidth": 1u64 << 40 }))?;
    qmp.run("migrate", &json!({ "uri": format!("exec:cat >'{}'", state.display()) }))?;
    qmp.wait_for_migration(PATIENCE)?;
    drop(qmp);
    pc.kill();
    copy(&pc.folder.join("root.qcow2"), &folder.join("root.qcow2"))?;
    fs::write(folder.join("done"), "")?;
    pc.note("saved as a snapshot");
    Ok(())
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    let status = Command::new("cp").args(["--reflink=auto", "--sparse=always"]).arg(from).arg(to).status()?;
    if !status.success() {
        bail!("{} cannot be copied to {}", from.display(), to.display());
    }
    Ok(())
}

impl Snapshot {
    pub(crate) fn copy_root(&self, to: &Path) -> Result<()> {
        copy(&self.folder.join("root.qcow2"), to)
    }

    /// Brings a QEMU that waits for it to the saved state and lets it run.
    pub(crate) fn load(&self, qmp: &mut Qmp) -> Result<()> {
        let state = self.folder.join("state");
        qmp.run("migrate-incoming", &json!({ "uri": format!("exec:cat '{}'", state.display()) }))?;
        qmp.wait_for_migration(PATIENCE)?;
        qmp.run("cont", &json!({})).map(drop)
    }
}
