//! What the authority remembers.

use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use subtle::ConstantTimeEq;

use super::Revoked;
use crate::identity::join::token::Secret;
use crate::identity::peer::{Serial, sha256};
use crate::identity::{Error, NodeName, Peer, Role, Roles};

/// An invitation that is over is kept so long, to be able to say why it is.
const REMEMBER: Duration = Duration::from_secs(30 * 24 * 3600);

/// All of `nodes.json`.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Registry {
    /// The newest CRL's number.
    pub(super) crl: u64,
    /// Every certificate, oldest first.
    #[serde(default)]
    pub(super) nodes: Vec<Node>,
    #[serde(default)]
    pub(super) invitations: Vec<Invitation>,
    /// Serial numbers of certificates that are revoked, though this registry does not know them: it was put
    /// back from a copy that is older than they are.
    #[serde(default)]
    pub(super) lost: Vec<Lost>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Lost {
    serial: String,
    revoked: u64,
}

/// A certificate that the authority made for a node. Times are seconds since 1970.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Node {
    /// The node's name.
    pub name: String,
    /// What it is there for: `console`, `agent`.
    pub roles: Vec<String>,
    /// The certificate's serial number, in hexadecimal.
    pub serial: String,
    /// When it was made.
    pub issued: u64,
    /// When it ends.
    pub expires: u64,
    /// When it was revoked.
    pub revoked: Option<u64>,
    /// Where an agent said it listens, when it joined.
    pub address: Option<SocketAddr>,
}

impl Node {
    pub(super) fn new(peer: &Peer, address: Option<SocketAddr>) -> Self {
        Self {
            name: peer.name.clone(),
            roles: words(peer.roles),
            serial: peer.serial.to_string(),
            issued: seconds(SystemTime::now()),
            expires: seconds(peer.expires),
            revoked: None,
            address,
        }
    }
}

/// Somebody may become a node.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Invitation {
    /// SHA-256 of the secret, in hexadecimal. The secret itself is stored nowhere.
    secret_sha256: String,
    pub(super) name: String,
    roles: Vec<String>,
    pub(super) expires: u64,
    pub(super) state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum State {
    Open,
    Used,
    Void,
}

impl Invitation {
    pub(super) fn new(secret: &Secret, name: &NodeName, roles: Roles, expires: SystemTime) -> Self {
        Self {
            secret_sha256: hash(secret),
            name: name.to_string(),
            roles: words(roles),
            expires: seconds(expires),
            state: State::Open,
        }
    }

    pub(super) fn roles(&self) -> Result<Roles, Error> {
        self.roles.iter().map(|role| role.parse::<Role>()).collect()
    }
}

impl Registry {
    /// The invitation with this secret. How long this takes says nothing of the hashes.
    pub(super) fn invitation(&mut self, secret: &Secret) -> Option<&mut Invitation> {
        let hash = hash(secret);
        let mut found = None;
        for invitation in &mut self.invitations {
            if bool::from(invitation.secret_sha256.as_bytes().ct_eq(hash.as_bytes())) {
                found = Some(invitation);
            }
        }
        found
    }

    pub(super) fn forget_old_invitations(&mut self, now: SystemTime) {
        let oldest = seconds(now).saturating_sub(REMEMBER.as_secs());
        self.invitations.retain(|invitation| invitation.expires >= oldest);
    }

    pub(super) fn revoked(&self) -> Result<Vec<Revoked>, Error> {
        let known = self.nodes.iter().filter_map(|node| Some((&node.serial, node.revoked?)));
        let all = known.chain(self.lost.iter().map(|lost| (&lost.serial, lost.revoked)));
        all.map(|(serial, at)| {
            let wrong = || Error::malformed("nodes.json", &format!("the serial number {serial}"));
            let serial = unhex(serial).and_then(|bytes| Serial::of(&bytes)).ok_or_else(wrong)?;
            let at = SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(at)).ok_or_else(wrong)?;
            Ok(Revoked { serial, at })
        })
        .collect()
    }

    /// Revokes the certificate with this serial number, whether it is known or not.
    pub(super) fn revoke(&mut self, serial: &Serial, now: u64) {
        let serial = serial.to_string();
        match self.nodes.iter_mut().find(|node| node.serial == serial) {
            Some(node) => _ = node.revoked.get_or_insert(now),
            None if self.lost.iter().any(|lost| lost.serial == serial) => {}
            None => self.lost.push(Lost { serial, revoked: now }),
        }
    }
}

pub(super) fn seconds(at: SystemTime) -> u64 {
    at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
}

fn words(roles: Roles) -> Vec<String> {
    roles.iter().map(|role| role.to_string()).collect()
}

fn hash(secret: &Secret) -> String {
    use std::fmt::Write as _;
    sha256(secret.bytes()).iter().fold(String::with_capacity(64), |mut text, byte| {
        // Writing to a text cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    if !text.len().is_multiple_of(2) || !text.is_ascii() {
        return None;
    }
    let pairs = text.as_bytes().chunks_exact(2);
    pairs.map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()).collect()
}
