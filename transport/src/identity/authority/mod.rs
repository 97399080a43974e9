//! The household's authority: the one PC that makes nodes out of PCs.
//!
//! It is a folder: `ca.pem` and `ca.key`, `nodes.json` (every certificate that was made, and the invitations),
//! and `crl.pem`. Each change is one atomic replacement of `nodes.json`, under a lock; the CRL follows from it.

mod registry;
mod signing;

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use nix::fcntl::{Flock, FlockArg};
use rcgen::{CertificateSigningRequestParams, PKCS_ECDSA_P256_SHA256, PublicKeyData};
use rustls::pki_types::{
    CertificateDer, CertificateRevocationListDer, CertificateSigningRequestDer, PrivatePkcs8KeyDer,
};

use super::folder::{self, Parts};
use super::join::token::Secret;
use super::{Crl, Error, Fingerprint, Identity, NodeName, Peer, Role, Roles, Serial};

use registry::{Invitation, Registry, State};

pub use registry::Node;
pub(crate) use signing::{LIFE, Revoked, SKEW, Signer, Validity, new_key, node_params, pkcs8};

/// The authority's certificate, key, registry, lock and CRL.
const CA: &str = "ca.pem";
const KEY: &str = "ca.key";
const REGISTRY: &str = "nodes.json";
const LOCK: &str = "lock";
const CRL: &str = "crl.pem";

/// The name of who brings lists to agents.
const MESSENGER: &str = "authority";

/// An uncompressed point on P-256 (SEC 1, 2.3.3).
const POINT: usize = 65;

/// See the [module](self).
pub struct Authority {
    folder: PathBuf,
    signer: Signer,
}

/// What a new node gets.
#[derive(Debug)]
pub(crate) struct Admitted {
    pub(crate) ca: CertificateDer<'static>,
    pub(crate) node: CertificateDer<'static>,
    pub(crate) crl: CertificateRevocationListDer<'static>,
}

/// Why somebody does not become a node.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refused {
    #[error("The token is not valid here")]
    Unknown,
    #[error("The token was used already; ask for a new one")]
    Used,
    #[error("The token has expired; ask for a new one")]
    Expired,
    #[error("The token was withdrawn, or guessed at too often; ask for a new one")]
    Void,
    #[error("The request for a certificate is malformed")]
    Request,
    #[error("The authority cannot store its nodes")]
    Store(#[source] Error),
}

impl Authority {
    /// Makes a new authority in `folder`, which is named `house` for people.
    ///
    /// # Errors
    /// There is one already, or the folder cannot be written.
    pub fn init(folder: &Path, house: &str) -> Result<Self, Error> {
        folder::make(folder)?;
        let made = Self { folder: folder.to_owned(), signer: Signer::new(house)? };
        let _lock = made.lock()?;
        if folder.join(CA).exists() {
            return Err(Error::AuthorityExists(folder.to_owned()));
        }
        let key = folder::text("PRIVATE KEY", made.signer.key().secret_pkcs8_der());
        folder::replace(&folder.join(KEY), key.as_bytes(), 0o600)?;
        made.store(&Registry { crl: 1, ..Registry::default() })?;
        // Last: with it the authority is whole.
        let ca = folder::text("CERTIFICATE", made.signer.certificate());
        folder::replace(&folder.join(CA), ca.as_bytes(), 0o644)?;
        Ok(made)
    }

    /// Opens the authority in `folder`.
    ///
    /// # Errors
    /// There is none, or a file is damaged or open to others.
    pub fn open(folder: &Path) -> Result<Self, Error> {
        let (ca, key) = (folder.join(CA), folder.join(KEY));
        if !ca.exists() {
            return Err(Error::NoAuthority(folder.to_owned()));
        }
        folder::guard(folder, 0o077, 0o700)?;
        let certificate = folder::decode(&ca, &folder::content(&ca, 0o022, 0o644)?)?;
        let secret: PrivatePkcs8KeyDer<'_> = folder::decode(&key, &folder::content(&key, 0o077, 0o600)?)?;
        let signer = Signer::of(certificate, &secret)?;
        Ok(Self { folder: folder.to_owned(), signer })
    }

    /// Which household it is.
    #[must_use]
    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint::of(self.signer.certificate())
    }

    pub(crate) fn signer(&self) -> &Signer {
        &self.signer
    }

    /// Every certificate that was made, oldest first.
    ///
    /// # Errors
    /// The registry cannot be read.
    pub fn nodes(&self) -> Result<Vec<Node>, Error> {
        let _lock = self.lock()?;
        Ok(self.registry()?.nodes)
    }

    /// The newest CRL.
    ///
    /// # Errors
    /// It cannot be read, signed or stored.
    pub fn crl(&self) -> Result<Crl, Error> {
        let _lock = self.lock()?;
        self.current_crl(&self.registry()?)
    }

    /// Makes an identity for this PC itself and stores it in `identity`.
    ///
    /// # Errors
    /// A folder cannot be written.
    pub fn make_own(&self, name: &NodeName, roles: Roles, identity: &Path) -> Result<(), Error> {
        let key = new_key()?;
        let Admitted { ca, node, crl } = {
            let _lock = self.lock()?;
            let mut registry = self.registry()?;
            let admitted = self.certify(&mut registry, name, roles, &key, None)?;
            self.store(&registry)?;
            admitted
        };
        folder::write(identity, &Parts { ca, node, key: pkcs8(&key), crl })
    }

    /// Takes the newest CRL into the identity in the folder `identity`.
    ///
    /// # Errors
    /// There is no identity of this household, or a file cannot be written.
    pub fn hand_crl_to(&self, identity: &Path) -> Result<(), Error> {
        let (crl, held) = (self.crl()?, Identity::load(identity)?);
        if held.authority() != self.fingerprint() {
            let what = format!("The identity in {}", identity.display());
            return Err(Error::Unrelated { what, whose: "this household's authority" });
        }
        if !self.catch_up(held.crl().der())? && held.crl().number() >= crl.number() {
            return Ok(());
        }
        folder::write_crl(identity, self.crl()?.der())
    }

    /// Revokes every certificate of the node `name`, makes its open invitations void, and returns the new CRL.
    ///
    /// # Errors
    /// There is no such node or invitation, or the registry cannot be written.
    pub fn revoke(&self, name: &str) -> Result<Crl, Error> {
        let _lock = self.lock()?;
        let mut registry = self.registry()?;
        let now = registry::seconds(SystemTime::now());
        let mut found = false;
        for node in registry.nodes.iter_mut().filter(|node| node.name == name) {
            found = true;
            node.revoked.get_or_insert(now);
        }
        // A token that is on its way would give the name to whoever has it.
        for invitation in registry.invitations.iter_mut().filter(|invitation| invitation.name == name) {
            if invitation.state == State::Open {
                found = true;
                invitation.state = State::Void;
            }
        }
        if !found {
            return Err(Error::NoNode(name.chars().filter(|c| !c.is_control()).collect()));
        }
        if let Ok(stored) = self.stored_crl() {
            // Of the files, `nodes.json` alone may have been put back.
            stored.serials().for_each(|serial| registry.revoke(serial, now));
        }
        registry.crl = self.next_number(registry.crl);
        self.store(&registry)?;
        self.current_crl(&registry)
    }

    /// Learns from a list that this authority itself once signed and no longer knows, because its folder was put
    /// back from an older copy: nodes keep that one instead of a list that is no newer or does not name all that
    /// it does. `true`: there is a still newer one now that names what both do.
    ///
    /// # Errors
    /// It is not this authority's, or the registry cannot be written.
    pub fn catch_up(&self, list: &[u8]) -> Result<bool, Error> {
        let found = Crl::verify(list, self.signer.certificate())?;
        let _lock = self.lock()?;
        let mut registry = self.registry()?;
        let known = self.current_crl(&registry)?;
        let forgotten = found.serials().any(|serial| !known.revokes(serial));
        let same = found.number() == known.number() && found.serials().eq(known.serials());
        if !forgotten && (same || found.number() < known.number()) {
            return Ok(false);
        }
        let now = registry::seconds(SystemTime::now());
        found.serials().for_each(|serial| registry.revoke(serial, now));
        registry.crl = self.next_number(registry.crl.max(found.number()));
        self.store(&registry)?;
        self.current_crl(&registry).map(|_| true)
    }

    /// The next list's number: higher than `last`, than the stored list's and than the time in seconds, so that it
    /// grows even if all files were put back from an old copy.
    fn next_number(&self, last: u64) -> u64 {
        let stored = self.stored_crl().map_or(0, |crl| crl.number());
        last.max(stored).max(registry::seconds(SystemTime::now())).saturating_add(1)
    }

    /// An identity to bring lists to agents with: a console's, of this process alone, for the next hour. So what
    /// was revoked is told even if this PC's own identity is damaged, or is what was revoked.
    ///
    /// # Errors
    /// The authority cannot sign or read its registry.
    pub fn messenger(&self) -> Result<Arc<Identity>, Error> {
        let key = new_key()?;
        let validity = Validity::from_now(SKEW);
        let node = self.signer.node(&MESSENGER.parse()?, Role::Console.into(), &key, validity)?;
        let (ca, crl) = (self.signer.certificate().clone(), self.crl()?.der().clone());
        Identity::of(Parts { ca, node, key: pkcs8(&key), crl })
    }

    /// Invites somebody to become the node `name`. Only the secret's hash is stored.
    ///
    /// # Errors
    /// The registry cannot be written.
    pub fn invite(&self, name: &NodeName, roles: Roles, life: Duration) -> Result<Secret, Error> {
        let secret = Secret::new()?;
        let expires = SystemTime::now().checked_add(life).unwrap_or_else(SystemTime::now);
        let _lock = self.lock()?;
        let mut registry = self.registry()?;
        registry.forget_old_invitations(SystemTime::now());
        registry.invitations.push(Invitation::new(&secret, name, roles, expires));
        self.store(&registry)?;
        Ok(secret)
    }

    /// Makes an invitation void that was not used.
    ///
    /// # Errors
    /// The registry cannot be written.
    pub fn withdraw(&self, secret: &Secret) -> Result<(), Error> {
        let _lock = self.lock()?;
        let mut registry = self.registry()?;
        let now = registry::seconds(SystemTime::now());
        match registry.invitation(secret) {
            // One that is over by its time stays what it is: who comes with it learns why.
            Some(invitation) if invitation.state == State::Open && invitation.expires > now => {
                invitation.state = State::Void;
            }
            _ => return Ok(()),
        }
        self.store(&registry)
    }

    /// Makes a node of whoever knows `secret`, once. Its name and roles are the invitation's; of the `request`
    /// (PKCS #10, RFC 2986) only the key counts, and that its owner signed it. The invitation is used up, on
    /// stable storage, before the certificate is out of this function.
    pub(crate) fn admit(
        &self,
        secret: &Secret,
        request: &[u8],
        address: Option<std::net::SocketAddr>,
    ) -> Result<(Node, Admitted), Refused> {
        let _lock = self.lock().map_err(Refused::Store)?;
        let mut registry = self.registry().map_err(Refused::Store)?;
        let invitation = registry.invitation(secret).ok_or(Refused::Unknown)?;
        match invitation.state {
            State::Used => return Err(Refused::Used),
            State::Void => return Err(Refused::Void),
            State::Open if invitation.expires <= registry::seconds(SystemTime::now()) => {
                return Err(Refused::Expired);
            }
            State::Open => {}
        }
        let key = requested_key(request).ok_or(Refused::Request)?;
        let name: NodeName = invitation.name.parse().map_err(Refused::Store)?;
        let roles = invitation.roles().map_err(Refused::Store)?;
        invitation.state = State::Used;
        let admitted = self.certify(&mut registry, &name, roles, &key, address).map_err(Refused::Store)?;
        self.store(&registry).map_err(Refused::Store)?;
        let node = registry.nodes.pop().ok_or(Refused::Unknown)?;
        Ok((node, admitted))
    }

    /// Why this secret is not the one that is waited for.
    pub(crate) fn why_not(&self, secret: &Secret) -> Refused {
        let _lock = match self.lock() {
            Ok(lock) => lock,
            Err(why) => return Refused::Store(why),
        };
        let mut registry = match self.registry() {
            Ok(registry) => registry,
            Err(why) => return Refused::Store(why),
        };
        let now = registry::seconds(SystemTime::now());
        match registry.invitation(secret).map(|invitation| (invitation.state, invitation.expires)) {
            Some((State::Used, _)) => Refused::Used,
            Some((State::Void, _)) => Refused::Void,
            Some((State::Open, expires)) if expires <= now => Refused::Expired,
            // Somebody else's, or nobody's.
            Some((State::Open, _)) | None => Refused::Unknown,
        }
    }

    fn certify(
        &self,
        registry: &mut Registry,
        name: &NodeName,
        roles: Roles,
        key: &impl PublicKeyData,
        address: Option<std::net::SocketAddr>,
    ) -> Result<Admitted, Error> {
        let node = self.signer.node(name, roles, key, Validity::from_now(LIFE))?;
        let crl = self.current_crl(registry)?.der().clone();
        registry.nodes.push(Node::new(&Peer::of(&node)?, address));
        Ok(Admitted { ca: self.signer.certificate().clone(), node, crl })
    }

    /// The stored CRL if it is the registry's, else a new one: the last change may have been cut short.
    fn current_crl(&self, registry: &Registry) -> Result<Crl, Error> {
        let stored = self.stored_crl();
        let revoked = registry.revoked()?;
        let named: BTreeSet<&Serial> = revoked.iter().map(|revoked| &revoked.serial).collect();
        if let Ok(crl) = stored
            && crl.number() == registry.crl
            && crl.serials().eq(named)
        {
            return Ok(crl);
        }
        let der = self.signer.crl(registry.crl, &revoked)?;
        folder::write_crl(&self.folder, &der)?;
        Crl::verify(&der, self.signer.certificate())
    }

    fn stored_crl(&self) -> Result<Crl, Error> {
        let path = self.folder.join(CRL);
        let bytes = folder::content(&path, 0o022, 0o644)?;
        let der: CertificateRevocationListDer<'_> = folder::decode(&path, &bytes)?;
        Crl::verify(&der, self.signer.certificate())
    }

    fn registry(&self) -> Result<Registry, Error> {
        let path = self.folder.join(REGISTRY);
        let bytes = folder::content(&path, 0o077, 0o600)?;
        serde_json::from_slice(&bytes).map_err(|why| Error::malformed(path.display().to_string(), &why))
    }

    fn store(&self, registry: &Registry) -> Result<(), Error> {
        let path = self.folder.join(REGISTRY);
        let text = serde_json::to_string_pretty(registry)
            .map_err(|why| Error::malformed(path.display().to_string(), &why))?;
        folder::replace(&path, text.as_bytes(), 0o600)
    }

    /// Keeps other processes out until it is dropped.
    fn lock(&self) -> Result<Flock<File>, Error> {
        let path = self.folder.join(LOCK);
        let failed = |source| Error::File { path: path.clone(), source };
        let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&path);
        let locked = Flock::lock(file.map_err(failed)?, FlockArg::LockExclusive);
        locked.map_err(|(_, why)| failed(why.into()))
    }
}

/// The key in a request for a certificate, if whoever made the request has it and it is one on P-256.
pub(crate) fn requested_key(request: &[u8]) -> Option<rcgen::PublicKey> {
    let request = CertificateSigningRequestDer::from(request);
    let key = CertificateSigningRequestParams::from_der(&request).ok()?.public_key;
    let point = key.der_bytes();
    let whole = point.len() == POINT && point.first() == Some(&4);
    (whole && key.algorithm() == &PKCS_ECDSA_P256_SHA256).then_some(key)
}
