//! How a guest reaches an agent: what disks, memory and vCPUs on other PCs have in common.

use std::net::IpAddr;

use transport::identity::NodeName;

use super::toml_file::{Checker, KeyPath};
use super::{Helper, Place, RemoteDisk, Transport};

/// An agent, and how to reach it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer<'a> {
    /// `host` or `host:port`.
    pub agent: &'a str,
    /// The name in its certificate, where the configuration has one.
    pub node: Option<&'a str>,
    /// Speak plain TCP.
    pub insecure: bool,
    /// What may carry the connection.
    pub transport: Transport,
    /// Nothing may cross the network unencrypted.
    pub require_encryption: bool,
}

impl<'a> From<&'a RemoteDisk> for Peer<'a> {
    fn from(disk: &'a RemoteDisk) -> Self {
        let RemoteDisk { agent, node, insecure, transport, require_encryption, .. } = disk;
        let (insecure, transport, require_encryption) = (*insecure, *transport, *require_encryption);
        Self { agent, node: node.as_deref(), insecure, transport, require_encryption }
    }
}

impl<'a> From<&'a Helper> for Peer<'a> {
    fn from(helper: &'a Helper) -> Self {
        let Helper { agent, node, insecure, transport, require_encryption, .. } = helper;
        let (insecure, transport, require_encryption) = (*insecure, *transport, *require_encryption);
        Self { agent, node: node.as_deref(), insecure, transport, require_encryption }
    }
}

impl<'a> From<&'a Place> for Peer<'a> {
    fn from(place: &'a Place) -> Self {
        let Place { node, insecure, transport, require_encryption, .. } = place;
        // Over plain TCP the name is only what the place is called here.
        let node = (!insecure).then_some(node.as_str());
        let (insecure, transport, require_encryption) = (*insecure, *transport, *require_encryption);
        Self { agent: place.agent(), node, insecure, transport, require_encryption }
    }
}

impl Peer<'_> {
    /// The agent's host, without its port.
    #[must_use]
    pub fn host(&self) -> &str {
        match self.agent.strip_prefix('[') {
            Some(rest) => rest.split(']').next().unwrap_or(rest),
            None => self.agent.split(':').next().unwrap_or(self.agent),
        }
    }

    /// What is wrong with it, where it is no part of a file.
    #[must_use]
    pub fn mistake(&self) -> Option<String> {
        match self.node {
            _ if address_mistake(self.agent).is_some() => {
                address_mistake(self.agent).map(|why| why.to_string())
            }
            Some(_) if self.insecure => Some("nobody proves a node's name over plain TCP".to_owned()),
            Some(node) => node.parse::<NodeName>().err().map(|why| why.to_string()),
            None => None,
        }
    }

    /// Whether the agent is on this PC, by its address: nothing between here and there can be listened to.
    #[must_use]
    pub fn is_on_this_pc(&self) -> bool {
        let is_loopback = |host: &str| host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback());
        self.host() == "localhost" || is_loopback(self.host())
    }

    /// The node that the agent has to prove to be; `None`: any agent of the household.
    #[must_use]
    pub fn expected_node(&self) -> Option<String> {
        let host = self.host();
        let is_name = !host.contains(['.', ':']) && host != "localhost";
        let named = || NodeName::of_host(host).filter(|_| is_name).map(|name| name.to_string());
        self.node.map(ToOwned::to_owned).or_else(named)
    }
}

/// Finds what is wrong with the keys of `peer`, which are in the table `key`.
pub(super) fn check(peer: &Peer<'_>, key: &KeyPath, checker: &mut Checker<'_>) {
    if let Some(why) = address_mistake(peer.agent) {
        checker.wrong(&key.key("agent"), why);
    }
    match peer.node {
        Some(_) if peer.insecure => {
            checker.wrong(
                &key.key("node"),
                "nobody proves a name over plain TCP; leave out `insecure`, or this",
            );
        }
        Some(node) => node_name(node, key, checker),
        None => {}
    }
    protection(peer, key, checker);
}

/// As [`check`], of a place: its node's name is there also where nobody proves it.
pub(super) fn check_place(place: &Place, key: &KeyPath, checker: &mut Checker<'_>) {
    node_name(&place.node, key, checker);
    // The name, where it stands for the address, has had its say.
    if let Some(why) = place.agent.as_deref().and_then(address_mistake) {
        checker.wrong(&key.key("agent"), why);
    }
    protection(&place.into(), key, checker);
}

fn node_name(node: &str, key: &KeyPath, checker: &mut Checker<'_>) {
    if node.parse::<NodeName>().is_err() {
        let what = format!("`{node}` is no node's name: lower-case letters, digits and `-`, at most 63");
        checker.wrong(&key.key("node"), what);
    }
}

/// Finds what contradicts itself in how a connection is protected.
fn protection(peer: &Peer<'_>, key: &KeyPath, checker: &mut Checker<'_>) {
    if peer.require_encryption && peer.insecure {
        checker.wrong(
            &key.key("require_encryption"),
            "plain TCP is not encrypted; leave out `insecure`, or this",
        );
    }
    if peer.require_encryption && peer.transport == Transport::Rdma {
        let what = "RDMA does not encrypt what it carries; leave out `require_encryption`, or this";
        checker.wrong(&key.key("transport"), what);
    }
}

/// Why `address` is not `host` or `host:port`.
fn address_mistake(address: &str) -> Option<String> {
    let form = "write `host`, `host:port` or `[IPv6 address]:port`";
    let (host, port) = if let Some(rest) = address.strip_prefix('[') {
        let Some((host, rest)) = rest.split_once(']') else {
            return Some(format!("lacks a `]`; {form}"));
        };
        if host.parse::<std::net::Ipv6Addr>().is_err() {
            return Some(format!("`{host}` is not an IPv6 address; {form}"));
        }
        match rest.strip_prefix(':') {
            None if rest.is_empty() => (host, None),
            None => return Some(format!("has `{rest}` behind the address; {form}")),
            port => (host, port),
        }
    } else {
        match address.split_once(':') {
            Some((_, port)) if port.contains(':') => {
                return Some(format!("is an IPv6 address without brackets; {form}"));
            }
            Some((host, port)) => (host, Some(port)),
            None => (address, None),
        }
    };
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_' | ':' | '%');
    if host.is_empty() || !host.chars().all(fits) {
        return Some(format!("is not a host; {form}"));
    }
    match port.map(str::parse::<u16>) {
        Some(Err(_) | Ok(0)) => Some(format!("its port must be from 1 to 65535; {form}")),
        _ => None,
    }
}
