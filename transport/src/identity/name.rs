//! Names and roles of nodes, and the DNS names by which certificates carry them.

use std::fmt;
use std::str::FromStr;

use rustls::pki_types::ServerName;

use super::Error;

/// A node's name has at most so many bytes: those of one DNS label (RFC 1035, 2.3.4).
pub const MAX_NAME: usize = 63;

/// A certificate carries `NAME.node.omega.internal`.
const NODES: &str = ".node.omega.internal";
/// And for each role `ROLE.role.omega.internal`.
const ROLES: &str = ".role.omega.internal";
/// The certificate that only the authority itself can show, to those who join.
pub(crate) const JOIN: &str = "join.omega.internal";
/// Everything that the authority certifies is below this domain.
pub(crate) const DOMAIN: &str = "omega.internal";

/// A node's name: 1 to 63 lower-case letters, digits and `-`, which is not first or last.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeName(String);

impl NodeName {
    /// The name that `host` makes: what cannot be in a name is left out or becomes `-`.
    #[must_use]
    pub fn of_host(host: &str) -> Option<Self> {
        let label = host.split('.').next()?.to_ascii_lowercase().replace('_', "-");
        label.parse().ok()
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The DNS name in its certificate.
    pub(crate) fn dns(&self) -> String {
        format!("{}{NODES}", self.0)
    }

    /// The node that `dns` names.
    pub(crate) fn of_dns(dns: &str) -> Option<Self> {
        dns.strip_suffix(NODES)?.parse().ok()
    }
}

impl FromStr for NodeName {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        let whole = (1..=MAX_NAME).contains(&name.len()) && name.bytes().all(plain);
        if whole && !name.starts_with('-') && !name.ends_with('-') {
            return Ok(Self(name.to_owned()));
        }
        let shown: String = name.chars().filter(|c| !c.is_control()).take(MAX_NAME).collect();
        Err(Error::Name(shown))
    }
}

impl fmt::Display for NodeName {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        to.pad(&self.0)
    }
}

/// What a node is there for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// Runs guests and asks others for parts.
    Console,
    /// Lends parts.
    Agent,
}

impl Role {
    const ALL: [Self; 2] = [Self::Console, Self::Agent];

    /// `console` or `agent`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Console => "console",
            Self::Agent => "agent",
        }
    }

    fn bit(self) -> u8 {
        match self {
            Self::Console => 1,
            Self::Agent => 2,
        }
    }

    /// The DNS name in certificates of this role.
    pub(crate) fn dns(self) -> String {
        format!("{}{ROLES}", self.as_str())
    }
}

impl FromStr for Role {
    type Err = Error;

    fn from_str(role: &str) -> Result<Self, Error> {
        let found = Self::ALL.into_iter().find(|r| r.as_str() == role);
        found.ok_or_else(|| Error::Role(role.chars().filter(|c| !c.is_control()).take(MAX_NAME).collect()))
    }
}

impl fmt::Display for Role {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        to.pad(self.as_str())
    }
}

/// The roles of one certificate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Roles(u8);

impl Roles {
    /// None: such a certificate may neither ask nor answer.
    pub const NONE: Self = Self(0);

    /// These and `role`.
    #[must_use]
    pub fn with(self, role: Role) -> Self {
        Self(self.0 | role.bit())
    }

    /// Whether `role` is one of them.
    #[must_use]
    pub fn has(self, role: Role) -> bool {
        self.0 & role.bit() != 0
    }

    /// Each of them.
    pub fn iter(self) -> impl Iterator<Item = Role> {
        Role::ALL.into_iter().filter(move |role| self.has(*role))
    }

    /// With the role that `dns` names, if it names one that is known here.
    pub(crate) fn with_dns(self, dns: &str) -> Self {
        let role = dns.strip_suffix(ROLES).and_then(|role| role.parse().ok());
        role.map_or(self, |role| self.with(role))
    }
}

impl From<Role> for Roles {
    fn from(role: Role) -> Self {
        Self::NONE.with(role)
    }
}

impl FromIterator<Role> for Roles {
    fn from_iter<I: IntoIterator<Item = Role>>(roles: I) -> Self {
        roles.into_iter().fold(Self::NONE, Self::with)
    }
}

impl fmt::Display for Roles {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all: Vec<_> = self.iter().map(Role::as_str).collect();
        to.pad(&if all.is_empty() { "none".to_owned() } else { all.join(", ") })
    }
}

/// The name that a connecting side asks TLS to verify: that of the node `expected`, or that of any agent.
///
/// # Errors
/// `expected` is no name of a node.
pub(crate) fn server_name(expected: Option<&str>) -> Result<ServerName<'static>, Error> {
    let dns = match expected {
        Some(name) => name.parse::<NodeName>()?.dns(),
        None => Role::Agent.dns(),
    };
    ServerName::try_from(dns).map_err(|why| Error::crypto("The node's name cannot be verified", &why))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_dns_labels_are_names() {
        for good in ["a", "desk-2", "0", &"x".repeat(63)] {
            assert_eq!(
                good.parse::<NodeName>().map(|n| n.dns()).ok(),
                Some(format!("{good}.node.omega.internal"))
            );
        }
        for bad in ["", "A", "a.b", "-a", "a-", "ä", "a b", "*", "a\0", "a\n", &"x".repeat(64)] {
            assert!(bad.parse::<NodeName>().is_err(), "{bad:?}");
        }
        assert_eq!(
            NodeName::of_host("Living_Room.example.org").map(|n| n.to_string()).as_deref(),
            Some("living-room")
        );
    }

    #[test]
    fn a_dns_name_of_another_domain_or_depth_names_no_node_or_role() {
        for bad in [
            "node.omega.internal",
            "a.b.node.omega.internal",
            "a.node.omega.internal.x",
            ".node.omega.internal",
        ] {
            assert_eq!(NodeName::of_dns(bad), None, "{bad}");
        }
        assert_eq!(Roles::NONE.with_dns("agent.role.omega.internal").to_string(), "agent");
        for bad in ["agent.role.omega.internal.x", "root.role.omega.internal", "agent"] {
            assert_eq!(Roles::NONE.with_dns(bad), Roles::NONE, "{bad}");
        }
    }
}
