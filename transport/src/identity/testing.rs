//! Households for tests: every kind of certificate that a handshake may meet.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use rustls::pki_types::CertificateRevocationListDer;

use super::authority::{LIFE, Revoked, Signer, Validity, new_key, node_params, pkcs8};
use super::folder::{self, Parts};
use super::{Identity, Reloading, Role, Roles, Security, Serial};

const DAY: Duration = Duration::from_secs(24 * 3600);

/// A household with an authority of its own, gone when it is dropped.
pub struct Household {
    signer: Signer,
    folder: PathBuf,
    revoked: Vec<Revoked>,
    number: u64,
}

impl Default for Household {
    fn default() -> Self {
        Self::new()
    }
}

#[expect(clippy::expect_used, reason = "a test that cannot begin fails")]
impl Household {
    /// A new one, in a new folder of the system's temporary one.
    #[must_use]
    pub fn new() -> Self {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let (process, count) = (std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let folder = std::env::temp_dir().join(format!("omega-household-{process}-{count}"));
        fs::create_dir_all(&folder).expect("a folder");
        let signer = Signer::new("test").expect("an authority");
        Self { signer, folder, revoked: Vec::new(), number: 1 }
    }

    /// A console, valid.
    #[must_use]
    pub fn console(&self, name: &str) -> Arc<Identity> {
        self.node(name, Role::Console.into())
    }

    /// An agent, valid.
    #[must_use]
    pub fn agent(&self, name: &str) -> Arc<Identity> {
        self.node(name, Role::Agent.into())
    }

    /// A node with these roles (or [`Roles::NONE`]), valid.
    #[must_use]
    pub fn node(&self, name: &str, roles: Roles) -> Arc<Identity> {
        Identity::of(self.parts(name, roles, Validity::from_now(LIFE))).expect("an identity")
    }

    /// A node whose certificate ends after `life`.
    #[must_use]
    pub fn short_lived(&self, name: &str, roles: Roles, life: Duration) -> Arc<Identity> {
        Identity::of(self.parts(name, roles, Validity::from_now(life))).expect("an identity")
    }

    /// A node whose certificate ended yesterday.
    #[must_use]
    pub fn expired(&self, name: &str, roles: Roles) -> Arc<Identity> {
        let now = SystemTime::now();
        let validity = Validity { from: now - 3 * DAY, until: now - DAY };
        Identity::of(self.parts(name, roles, validity)).expect("an identity")
    }

    /// A node whose certificate begins tomorrow.
    #[must_use]
    pub fn not_yet_valid(&self, name: &str, roles: Roles) -> Arc<Identity> {
        let now = SystemTime::now();
        let validity = Validity { from: now + DAY, until: now + 3 * DAY };
        Identity::of(self.parts(name, roles, validity)).expect("an identity")
    }

    /// Somebody who signed a certificate with this name and these roles for itself, and trusts the household.
    #[must_use]
    pub fn self_signed(&self, name: &str, roles: Roles) -> Arc<Identity> {
        let mut parts = self.parts(name, roles, Validity::from_now(LIFE));
        let key = new_key().expect("a key");
        let name = name.parse().expect("a name");
        let params = node_params(&name, roles, Validity::from_now(LIFE)).expect("a name");
        parts.node = params.self_signed(&key).expect("a certificate").der().clone();
        parts.key = pkcs8(&key);
        Identity::unchecked(parts).expect("an identity")
    }

    /// Somebody with a certificate of `other`, who trusts this household: its own side of a handshake finds
    /// nothing wrong.
    #[must_use]
    pub fn stranger(&self, other: &Self, name: &str, roles: Roles) -> Arc<Identity> {
        let mut parts = self.parts(name, roles, Validity::from_now(LIFE));
        let theirs = other.parts(name, roles, Validity::from_now(LIFE));
        (parts.node, parts.key) = (theirs.node, theirs.key);
        Identity::unchecked(parts).expect("an identity")
    }

    /// Revokes a certificate. Nodes made from now on know it; others learn it by [`crl`](Self::crl).
    pub fn revoke(&mut self, serial: &Serial) {
        self.revoked.push(Revoked { serial: serial.clone(), at: SystemTime::now() });
        self.number += 1;
    }

    /// The newest CRL.
    #[must_use]
    pub fn crl(&self) -> CertificateRevocationListDer<'static> {
        self.crl_numbered(self.number)
    }

    /// A CRL of this household with any number, and all that was revoked until now.
    #[must_use]
    pub fn crl_numbered(&self, number: u64) -> CertificateRevocationListDer<'static> {
        self.signer.crl(number, &self.revoked).expect("a revocation list")
    }

    /// Writes `identity` into a folder, as joining would, and says where.
    #[must_use]
    pub fn folder(&self, identity: &Identity) -> PathBuf {
        let folder = self.folder.join(format!("{}-{}", identity.name(), identity.serial()));
        folder::write(&folder, identity.parts()).expect("a folder");
        folder
    }

    /// A place for more of a test's files.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.folder
    }

    fn parts(&self, name: &str, roles: Roles, validity: Validity) -> Parts {
        let key = new_key().expect("a key");
        let name = name.parse().expect("a name");
        let node = self.signer.node(&name, roles, &key, validity).expect("a certificate");
        Parts { ca: self.signer.certificate().clone(), node, key: pkcs8(&key), crl: self.crl() }
    }
}

impl Drop for Household {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.folder).ok();
    }
}

/// How a connection is protected that uses `identity`.
#[must_use]
pub fn security(identity: &Arc<Identity>) -> Security {
    Security::Tls(Reloading::in_memory(Arc::clone(identity)))
}
