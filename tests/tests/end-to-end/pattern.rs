//! The checker of memory (`omega-pattern`) in a guest, as its console tells of it.

use anyhow::{Result, ensure};
use lab::guest::{PATIENCE, Running};
use lab::scene::wait_until;

/// How many rounds the checker in the guest has finished.
pub(crate) fn rounds(guest: &Running) -> usize {
    guest.console().matches("omega-pattern: round ").count()
}

/// Waits until the checker has finished `more` rounds.
pub(crate) fn rounds_later(guest: &Running, more: usize) -> Result<()> {
    let before = rounds(guest);
    wait_until("the checker goes on", PATIENCE, || {
        ensure!(!guest.ended(), "the guest ended: {}", guest.wait()?.all());
        ensure!(!guest.console().contains("WRONG"), "{}", guest.console());
        Ok(rounds(guest) >= before + more)
    })
}
