//! What the authority signs: certificates (RFC 5280, 4) and CRLs (RFC 5280, 5), ECDSA on P-256.

use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, GeneralSubtree, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose,
    NameConstraints, PKCS_ECDSA_P256_SHA256, PublicKeyData, RevokedCertParams, SanType, SerialNumber,
    date_time_ymd,
};
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivatePkcs8KeyDer};

use crate::identity::name::{DOMAIN, JOIN};
use crate::identity::{Error, NodeName, Role, Roles, Serial};

/// The clocks of a household's PCs may differ by so much.
pub(crate) const SKEW: Duration = Duration::from_secs(3600);
/// How long a node's certificate lives.
pub(crate) const LIFE: Duration = Duration::from_secs(365 * 24 * 3600);
/// How long the authority's own certificate, and what a CRL says, live.
const AGE: Duration = Duration::from_secs(25 * 365 * 24 * 3600);

/// From when to when a certificate is valid.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Validity {
    pub(crate) from: SystemTime,
    pub(crate) until: SystemTime,
}

impl Validity {
    /// From now on, for `life`; it begins earlier, for PCs whose clock is behind.
    pub(crate) fn from_now(life: Duration) -> Self {
        let now = SystemTime::now();
        Self { from: now.checked_sub(SKEW).unwrap_or(now), until: now.checked_add(life).unwrap_or(now) }
    }
}

/// A certificate that was revoked.
#[derive(Clone, Debug)]
pub(crate) struct Revoked {
    pub(crate) serial: Serial,
    pub(crate) at: SystemTime,
}

/// The authority's key and certificate.
pub(crate) struct Signer {
    certificate: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

impl Signer {
    /// A new authority, named for people.
    pub(crate) fn new(house: &str) -> Result<Self, Error> {
        let key = new_key()?;
        let mut params = params(&format!("{house} (Omega)"), Validity::from_now(AGE))?;
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        // Who takes this authority for more than it is, in a browser, risks no other site.
        params.name_constraints = Some(NameConstraints {
            permitted_subtrees: vec![GeneralSubtree::DnsName(DOMAIN.to_owned())],
            excluded_subtrees: Vec::new(),
        });
        let certificate = params.self_signed(&key).map_err(|why| failed(&why))?.der().clone();
        Ok(Self { certificate, issuer: Issuer::new(params, key) })
    }

    /// The authority with this certificate and key.
    pub(crate) fn of(
        certificate: CertificateDer<'static>,
        key: &PrivatePkcs8KeyDer<'_>,
    ) -> Result<Self, Error> {
        let key = key_pair(key)?;
        let issuer = Issuer::from_ca_cert_der(&certificate, key).map_err(|why| failed(&why))?;
        Ok(Self { certificate, issuer })
    }

    pub(crate) fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    pub(crate) fn key(&self) -> PrivatePkcs8KeyDer<'static> {
        pkcs8(self.issuer.key())
    }

    /// A node's certificate for the key that is `public`.
    pub(crate) fn node(
        &self,
        name: &NodeName,
        roles: Roles,
        public: &impl PublicKeyData,
        validity: Validity,
    ) -> Result<CertificateDer<'static>, Error> {
        let params = node_params(name, roles, validity)?;
        Ok(params.signed_by(public, &self.issuer).map_err(|why| failed(&why))?.der().clone())
    }

    /// The certificate of who lets others join. No node has one, so none can stand in the authority's place.
    pub(crate) fn inviter(
        &self,
        life: Duration,
    ) -> Result<(CertificateDer<'static>, PrivatePkcs8KeyDer<'static>), Error> {
        let key = new_key()?;
        let mut params = params("join", Validity::from_now(life))?;
        params.subject_alt_names = vec![dns(JOIN.to_owned())?];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        let certificate = params.signed_by(&key, &self.issuer).map_err(|why| failed(&why))?.der().clone();
        Ok((certificate, pkcs8(&key)))
    }

    /// The CRL with this number.
    pub(crate) fn crl(
        &self,
        number: u64,
        revoked: &[Revoked],
    ) -> Result<CertificateRevocationListDer<'static>, Error> {
        let Validity { from, until } = Validity::from_now(AGE);
        let revoked_certs = revoked.iter().map(|revoked| RevokedCertParams {
            serial_number: SerialNumber::from_slice(revoked.serial.as_bytes()),
            revocation_time: date_time_ymd(1970, 1, 1) + since_1970(revoked.at),
            reason_code: None,
            invalidity_date: None,
        });
        let params = CertificateRevocationListParams {
            this_update: date_time_ymd(1970, 1, 1) + since_1970(from),
            next_update: date_time_ymd(1970, 1, 1) + since_1970(until),
            crl_number: SerialNumber::from(number),
            issuing_distribution_point: None,
            revoked_certs: revoked_certs.collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        Ok(params.signed_by(&self.issuer).map_err(|why| failed(&why))?.into())
    }
}

/// A key, new for whoever needs one. It is made on the PC that uses it.
pub(crate) fn new_key() -> Result<KeyPair, Error> {
    KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(|why| Error::crypto("No key can be made", &why))
}

pub(crate) fn pkcs8(key: &KeyPair) -> PrivatePkcs8KeyDer<'static> {
    PrivatePkcs8KeyDer::from(key.serialize_der())
}

pub(crate) fn key_pair(key: &PrivatePkcs8KeyDer<'_>) -> Result<KeyPair, Error> {
    KeyPair::from_pkcs8_der_and_sign_algo(key, &PKCS_ECDSA_P256_SHA256)
        .map_err(|why| Error::malformed("The key", &why))
}

pub(crate) fn node_params(
    name: &NodeName,
    roles: Roles,
    validity: Validity,
) -> Result<CertificateParams, Error> {
    let mut params = params(name.as_str(), validity)?;
    let names = std::iter::once(name.dns()).chain(roles.iter().map(Role::dns));
    params.subject_alt_names = names.map(dns).collect::<Result<_, _>>()?;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}

fn params(common_name: &str, validity: Validity) -> Result<CertificateParams, Error> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, common_name);
    params.not_before = date_time_ymd(1970, 1, 1) + since_1970(validity.from);
    params.not_after = date_time_ymd(1970, 1, 1) + since_1970(validity.until);
    let mut serial = [0; 16];
    getrandom::fill(&mut serial).map_err(|why| Error::crypto("There is no randomness", &why))?;
    // Positive, and never shorter.
    serial[0] = serial[0] & 0x7f | 0x40;
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    Ok(params)
}

fn dns(name: String) -> Result<SanType, Error> {
    Ok(SanType::DnsName(name.try_into().map_err(|why: rcgen::Error| failed(&why))?))
}

/// X.509 counts whole seconds.
fn since_1970(at: SystemTime) -> Duration {
    Duration::from_secs(at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs())
}

fn failed(why: &rcgen::Error) -> Error {
    Error::crypto("The authority cannot sign", &why)
}
