//! The guest stands still while a helper is away, and ends when one is gone.

use std::sync::Arc;

use devices::thread::{Role, spawn};

use super::helper::{GRACE, Helper, PROBE};
use super::{Error, Spanning};
use crate::control::State;
use crate::machine::Exit;
use crate::machine::parts::Parts;
use crate::memory::store::Stuck;

impl Spanning {
    /// The helper, if the guest has to stand still for one.
    pub(in crate::machine) fn missed(&self) -> Option<Stuck> {
        self.helpers.iter().find_map(Helper::missed)
    }

    /// Which helper is gone, and why, if the guest has to end for it.
    fn over(&self) -> Option<(&str, String)> {
        self.helpers.iter().find_map(|helper| Some((helper.name(), helper.over()?)))
    }

    /// Until something changes, or the next probe is due. Soon again while a helper is away.
    fn wait(&self) {
        let away = self.helpers.iter().any(|helper| helper.desk.is_away());
        self.bell.wait(if away { GRACE / 4 } else { PROBE });
    }
}

/// Starts the thread that does it.
pub(in crate::machine) fn watch(parts: &Arc<Parts>) -> Result<(), Error> {
    if parts.spanning.is_none() {
        return Ok(());
    }
    let parts = Arc::downgrade(parts);
    let body = move || {
        loop {
            let Some(parts) = parts.upgrade() else { return };
            let Some(spanning) = &parts.spanning else { return };
            if parts.state() == State::Ending {
                return;
            }
            if let Some((helper, why)) = spanning.over() {
                tracing::error!(
                    "{helper}, which runs some of the guest's vCPUs, is lost, so that the guest ends: {why}"
                );
                return parts.finish(Ok(Exit::MemoryLost));
            }
            match spanning.missed() {
                Some(stuck) => parts.hold(stuck),
                None => parts.let_go(),
            }
            spanning.helpers.iter().for_each(Helper::probe);
            spanning.wait();
        }
    };
    spawn(Role::Control, "span-watch", body).map(drop).map_err(Error::Thread)
}
