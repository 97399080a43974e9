//! The PCs that lend a guest memory, as those see them who control the machine.

use super::paging::Paging;
use crate::config;
use crate::control::{HelperStatus, MemoryStatus};
use crate::memory::store::{HelperReport, Standing};

impl Paging {
    /// Where the guest's memory is.
    pub(super) fn memory(&self) -> MemoryStatus {
        let report = self.health.report();
        let helpers = report.helpers.iter().map(status).collect();
        MemoryStatus { counters: self.engine.counters(), degraded_pieces: report.degraded, helpers }
    }

    /// How each of them is.
    pub(super) fn helpers(&self) -> Vec<HelperStatus> {
        self.health.report().helpers.iter().map(status).collect()
    }

    /// The helper that somebody means by `name`: its agent as it is configured, its host, or its node.
    pub(super) fn named(&self, name: &str, guest: &config::Guest) -> Option<String> {
        let helpers = self.helpers();
        let configured = |agent: &str| {
            let helper = guest.memory.helper.iter().find(|helper| helper.agent == agent);
            helper.is_some_and(|helper| {
                let peer = config::Peer::from(helper);
                peer.host() == name || peer.expected_node().as_deref() == Some(name)
            })
        };
        let exact = helpers.iter().find(|helper| helper.name == name);
        let meant = || helpers.iter().find(|helper| helper.node == name || configured(&helper.name));
        exact.or_else(meant).map(|helper| helper.name.clone())
    }
}

fn status(helper: &HelperReport) -> HelperStatus {
    let (standing, why) = match &helper.standing {
        Standing::Here => ("here", None),
        Standing::Away { why, .. } => ("away", Some(why.clone())),
        Standing::Left { why } => ("left", Some(why.clone())),
    };
    HelperStatus {
        name: helper.name.clone(),
        node: helper.connections.first().map(|connection| connection.peer.clone()).unwrap_or_default(),
        standing: standing.to_owned(),
        why,
        draining: helper.draining,
        pages: helper.pages,
        fetched: helper.fetched,
        stored: helper.stored,
        copied: helper.copied,
        lost: helper.lost,
        pieces: helper.pieces,
        room: helper.room,
        leaving: helper.leaving,
        compression: helper.compression,
    }
}
