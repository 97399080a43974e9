//! Who the other side proved to be.

use std::fmt;
use std::time::{Duration, SystemTime};

use rustls::pki_types::CertificateDer;
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::FromDer;

use super::{Error, NodeName, Roles};

/// What a certificate's serial number may have at most (RFC 5280, 4.1.2.2).
const MAX_SERIAL: usize = 20;

/// A certificate's serial number: what a CRL names it by.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Serial(Vec<u8>);

impl Serial {
    /// Of the big-endian `bytes` of a DER integer.
    pub(crate) fn of(bytes: &[u8]) -> Option<Self> {
        let first = bytes.iter().position(|b| *b != 0)?;
        let significant = bytes.get(first..)?;
        (significant.len() <= MAX_SERIAL).then(|| Self(significant.to_vec()))
    }

    /// Big endian, without leading zeros.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Display for Serial {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        hex(&self.0, to)
    }
}

impl fmt::Debug for Serial {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        hex(&self.0, to)
    }
}

/// The SHA-256 of a certificate's DER.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fingerprint(pub [u8; 32]);

impl Fingerprint {
    /// Of `certificate`.
    #[must_use]
    pub fn of(certificate: &CertificateDer<'_>) -> Self {
        Self(sha256(certificate))
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        hex(&self.0, to)
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        hex(&self.0, to)
    }
}

pub(crate) fn sha256(bytes: &[u8]) -> [u8; 32] {
    let digest = ring::digest::digest(&ring::digest::SHA256, bytes);
    let mut hash = [0; 32];
    hash.copy_from_slice(digest.as_ref());
    hash
}

fn hex(bytes: &[u8], to: &mut fmt::Formatter<'_>) -> fmt::Result {
    bytes.iter().try_for_each(|byte| write!(to, "{byte:02x}"))
}

/// Who the other side of a connection is, by a certificate that TLS has verified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// The node's name: a [`NodeName`], so safe to show.
    pub name: String,
    /// What it is there for.
    pub roles: Roles,
    /// Its certificate's serial number, to find it in a [`Crl`](super::Crl).
    pub serial: Serial,
    /// Its certificate's end.
    pub expires: SystemTime,
    /// The authority by whose certificate TLS verified all this; `None` if it did not.
    pub authority: Option<Fingerprint>,
}

impl Peer {
    /// Reads what `certificate` says. It verifies nothing: that is TLS's part and comes before.
    ///
    /// # Errors
    /// It is no certificate of a node.
    pub fn of(certificate: &CertificateDer<'_>) -> Result<Self, Error> {
        let wrong = |why: &str| Error::malformed("The certificate", &why);
        let (rest, parsed) = X509Certificate::from_der(certificate).map_err(|_| wrong("it is no X.509"))?;
        if !rest.is_empty() {
            return Err(wrong("something follows it"));
        }
        Self::read(&parsed)
    }

    pub(crate) fn read(certificate: &X509Certificate<'_>) -> Result<Self, Error> {
        let wrong = |why: &str| Error::malformed("The certificate", &why);
        let names = certificate.subject_alternative_name().map_err(|_| wrong("its names cannot be read"))?;
        let (mut node, mut roles) = (None, Roles::NONE);
        for name in names.iter().flat_map(|names| &names.value.general_names) {
            let GeneralName::DNSName(dns) = name else { continue };
            roles = roles.with_dns(dns);
            if let Some(found) = NodeName::of_dns(dns)
                && node.replace(found).is_some()
            {
                return Err(wrong("it names more than one node"));
            }
        }
        let node = node.ok_or_else(|| wrong("it names no node"))?;
        let serial =
            Serial::of(certificate.raw_serial()).ok_or_else(|| wrong("its serial number is wrong"))?;
        let end = u64::try_from(certificate.validity().not_after.timestamp()).unwrap_or(0);
        let expires = SystemTime::UNIX_EPOCH
            .checked_add(Duration::from_secs(end))
            .ok_or_else(|| wrong("its end is out of range"))?;
        Ok(Self { name: node.to_string(), roles, serial, expires, authority: None })
    }
}
