//! How the agents that a guest needs are reached, be it for a disk or for memory.

use std::fs;
use std::sync::Arc;

use transport::channel::Transport;
use transport::identity::{Reloading, Security};

use crate::config::{self, Peer};

/// What this client is called at agents: for their owners, not trusted.
pub(super) fn client(guest: &str) -> String {
    let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    format!("{guest} on {}", host.trim())
}

/// How the connection to an agent is protected: plain TCP only where that was asked for, or where this PC has
/// no identity and the agent is on it too.
pub(super) fn security(peer: &Peer<'_>, identity: Option<&Arc<Reloading>>) -> Result<Security, String> {
    match identity {
        _ if peer.insecure => Ok(Security::Plain),
        Some(identity) => Ok(Security::Tls(Arc::clone(identity))),
        None if peer.is_on_this_pc() && !peer.require_encryption => Ok(Security::Plain),
        None => Err(format!(
            "The agent at {} can only be trusted by an identity, and this PC has none; get a token by `omega node \
             invite NAME --role console` on the household's first console and run `omega join TOKEN` here, or \
             begin a household by `omega ca init`, or write `insecure = true` on a network where you trust everybody",
            peer.agent
        )),
    }
}

/// What may carry it.
pub(super) fn transport(peer: &Peer<'_>) -> Transport {
    match peer.transport {
        _ if peer.require_encryption => Transport::Tcp,
        config::Transport::Auto => Transport::Auto,
        config::Transport::Rdma => Transport::Rdma,
        config::Transport::Tcp => Transport::Tcp,
    }
}

#[cfg(test)]
mod tests {
    use transport::identity::testing::Household;

    use super::*;

    #[test]
    fn an_agent_is_reached_by_plain_tcp_only_where_that_was_said_or_without_an_identity_on_this_pc() {
        let house = Household::new();
        let identity = Reloading::in_memory(house.console("desk"));
        for (agent, insecure, has_identity, plain) in [
            ("10.0.0.2", false, true, Some(false)),
            ("127.0.0.1", false, true, Some(false)),
            ("attic", true, true, Some(true)),
            ("attic", true, false, Some(true)),
            ("127.0.0.1", false, false, Some(true)),
            ("localhost:99", false, false, Some(true)),
            ("attic", false, false, None),
            ("10.0.0.2", false, false, None),
        ] {
            let transport = config::Transport::Auto;
            let peer = Peer { agent, node: None, insecure, transport, require_encryption: false };
            let found = security(&peer, has_identity.then_some(&identity));
            let is_plain = found.as_ref().ok().map(|s| matches!(s, Security::Plain));
            assert_eq!(is_plain, plain, "{agent} insecure {insecure} identity {has_identity}: {found:?}");
            if let Err(why) = found {
                assert!(why.contains(agent) && why.contains("omega join TOKEN"), "{why}");
            }
        }
    }
}
