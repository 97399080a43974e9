//! The household's certificate revocation list (RFC 5280, 5).

use std::collections::BTreeSet;

use rustls::pki_types::{CertificateDer, CertificateRevocationListDer};
use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer;
use x509_parser::revocation_list::CertificateRevocationList;

use super::{Error, Serial};

/// A CRL has at most so many bytes: some thousand revoked certificates.
pub const MAX_CRL: usize = 256 << 10;

/// A CRL that the household's authority signed. Its number only ever grows, and a newer one names every
/// certificate that an older one does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Crl {
    der: CertificateRevocationListDer<'static>,
    number: u64,
    revoked: BTreeSet<Serial>,
}

impl Crl {
    /// Takes `der` if it is a CRL of the authority with the certificate `ca`. Anybody may have carried it.
    ///
    /// # Errors
    /// It is damaged, too long, or another authority's.
    pub fn verify(der: &[u8], ca: &CertificateDer<'_>) -> Result<Self, Error> {
        let wrong = |why: &str| Error::malformed("The revocation list", &why);
        if der.len() > MAX_CRL {
            return Err(wrong("it is too long"));
        }
        let (rest, crl) = CertificateRevocationList::from_der(der).map_err(|_| wrong("it is no X.509"))?;
        let (_, ca) = X509Certificate::from_der(ca).map_err(|_| wrong("the authority's certificate is"))?;
        if !rest.is_empty() {
            return Err(wrong("something follows it"));
        }
        let issued = crl.issuer().as_raw() == ca.subject().as_raw();
        if !issued || crl.verify_signature(ca.public_key()).is_err() {
            return Err(Error::Unrelated {
                what: "The revocation list".to_owned(),
                whose: "this household's authority",
            });
        }
        let number = crl.crl_number().and_then(|number| u64::try_from(number).ok());
        let number = number.ok_or_else(|| wrong("it has no number"))?;
        let revoked = crl
            .iter_revoked_certificates()
            .map(|revoked| {
                Serial::of(revoked.raw_serial()).ok_or_else(|| wrong("it names an impossible serial"))
            })
            .collect::<Result<_, _>>()?;
        Ok(Self { der: CertificateRevocationListDer::from(der.to_vec()), number, revoked })
    }

    /// The number that `der` claims to have, whoever made it; `None` if it is no CRL or is too long.
    pub(crate) fn claimed_number(der: &[u8]) -> Option<u64> {
        if der.len() > MAX_CRL {
            return None;
        }
        let (_, crl) = CertificateRevocationList::from_der(der).ok()?;
        crl.crl_number().and_then(|number| u64::try_from(number).ok())
    }

    /// Grows with each CRL of the authority.
    #[must_use]
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Whether the certificate with this serial number is revoked.
    #[must_use]
    pub fn revokes(&self, serial: &Serial) -> bool {
        self.revoked.contains(serial)
    }

    /// Every revoked certificate's serial number, in their order.
    pub fn serials(&self) -> impl Iterator<Item = &Serial> {
        self.revoked.iter()
    }

    /// How many certificates are revoked.
    #[must_use]
    pub fn len(&self) -> usize {
        self.revoked.len()
    }

    /// Whether nothing is revoked.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.revoked.is_empty()
    }

    /// The bytes that are signed and handed on.
    #[must_use]
    pub fn der(&self) -> &CertificateRevocationListDer<'static> {
        &self.der
    }
}
