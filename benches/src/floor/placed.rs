//! Where threads run.

use anyhow::{Context, Result};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

/// Does `work` while the calling thread and `others` share one CPU.
///
/// # Errors
/// Threads may not be placed.
pub(super) fn together<T>(others: &[Pid], work: impl FnOnce() -> T) -> Result<T> {
    let ours = sched_getaffinity(Pid::from_raw(0))?;
    let theirs = others.iter().map(|other| sched_getaffinity(*other)).collect::<Result<Vec<_>, _>>()?;
    let one = (0..CpuSet::count()).find(|cpu| ours.is_set(*cpu).unwrap_or(false)).context("No CPU")?;
    let mut together = CpuSet::new();
    together.set(one)?;
    sched_setaffinity(Pid::from_raw(0), &together)?;
    for other in others {
        sched_setaffinity(*other, &together)?;
    }
    let result = work();
    sched_setaffinity(Pid::from_raw(0), &ours)?;
    for (other, before) in others.iter().zip(&theirs) {
        sched_setaffinity(*other, before)?;
    }
    Ok(result)
}
