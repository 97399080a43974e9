//! An identity that is loaded, and the TLS configurations that it makes.

use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::CryptoProvider;
use rustls::crypto::ring as suites;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::version::TLS13;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer;

use super::folder::{self, Parts};
use super::{Crl, Error, Fingerprint, Peer, Roles, Serial, name};

/// What is spoken inside TLS (RFC 7301).
pub const ALPN: &[u8] = b"omega/1";

/// An identity: immutable, so a connection keeps the one that it began with. See the [module](super).
pub struct Identity {
    parts: Parts,
    me: Peer,
    authority: Fingerprint,
    crl: Crl,
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
}

impl Identity {
    /// Loads the identity in `folder` and checks that its parts belong together. A certificate that is over,
    /// not yet valid or revoked is loaded all the same: that is for the other side to judge.
    ///
    /// # Errors
    /// A file is missing, damaged, open to others, or does not belong to the others.
    pub fn load(folder: &Path) -> Result<Arc<Self>, Error> {
        match Self::of(folder::read(folder)?) {
            // Another process may be replacing the files: the second look sees them all old or all new.
            Err(Error::Unrelated { .. }) => Self::of(folder::read(folder)?),
            other => other,
        }
    }

    /// Checks that `parts` belong together.
    pub(crate) fn of(parts: Parts) -> Result<Arc<Self>, Error> {
        let unreadable = |what: &str| Error::malformed(what, "it is no X.509");
        let (_, ca) =
            X509Certificate::from_der(&parts.ca).map_err(|_| unreadable("The authority's certificate"))?;
        let (_, node) =
            X509Certificate::from_der(&parts.node).map_err(|_| unreadable("The node's certificate"))?;
        let issued = node.issuer().as_raw() == ca.subject().as_raw();
        if !ca.is_ca() || !issued || node.verify_signature(Some(ca.public_key())).is_err() {
            let what = "The node's certificate".to_owned();
            return Err(Error::Unrelated { what, whose: "this household's authority" });
        }
        Self::unchecked(parts)
    }

    /// As [`of`](Self::of), but the authority need not have made the certificate.
    pub(crate) fn unchecked(parts: Parts) -> Result<Arc<Self>, Error> {
        let crl = Crl::verify(&parts.crl, &parts.ca)?;
        Ok(Arc::new(Self {
            me: Peer::of(&parts.node)?,
            authority: Fingerprint::of(&parts.ca),
            client: client(&parts)?,
            server: server(&parts)?,
            crl,
            parts,
        }))
    }

    /// This identity with a newer CRL.
    pub(crate) fn with_crl(&self, crl: &Crl) -> Result<Arc<Self>, Error> {
        Self::unchecked(Parts { crl: crl.der().clone(), ..self.parts.clone() })
    }

    /// This node's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.me.name
    }

    /// What this node is there for.
    #[must_use]
    pub fn roles(&self) -> Roles {
        self.me.roles
    }

    /// Its certificate's serial number.
    #[must_use]
    pub fn serial(&self) -> &Serial {
        &self.me.serial
    }

    /// When its certificate ends.
    #[must_use]
    pub fn expires(&self) -> SystemTime {
        self.me.expires
    }

    /// Which household it belongs to.
    #[must_use]
    pub fn authority(&self) -> Fingerprint {
        self.authority
    }

    /// What the household's authority has revoked.
    #[must_use]
    pub fn crl(&self) -> &Crl {
        &self.crl
    }

    /// For who connects. Verify the name that [`server_name`](Self::server_name) gives.
    ///
    /// TLS 1.3 only, with this node's certificate, without resumption and early data. The connection's secrets
    /// can be taken out, for kernel TLS.
    #[must_use]
    pub fn client_config(&self) -> Arc<ClientConfig> {
        Arc::clone(&self.client)
    }

    /// For who accepts: the other side must show a certificate of the household that is not revoked. What its
    /// name and roles may do is for the caller to judge, see [`Peer::of`].
    #[must_use]
    pub fn server_config(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.server)
    }

    /// What a connecting side has TLS verify: that the other side is the node `expected`, or, without one, that
    /// it is any agent.
    ///
    /// # Errors
    /// `expected` cannot be a node's name.
    pub fn server_name(expected: Option<&str>) -> Result<ServerName<'static>, Error> {
        name::server_name(expected)
    }

    pub(crate) fn parts(&self) -> &Parts {
        &self.parts
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        to.debug_struct("Identity")
            .field("me", &self.me)
            .field("authority", &self.authority)
            .field("crl", &self.crl.number())
            .finish_non_exhaustive()
    }
}

/// The cryptography of this tree: three suites of TLS 1.3, the one that processors are fastest at first.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    use suites::cipher_suite::{
        TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384, TLS13_CHACHA20_POLY1305_SHA256,
    };
    let cipher_suites =
        vec![TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384, TLS13_CHACHA20_POLY1305_SHA256];
    Arc::new(CryptoProvider { cipher_suites, ..suites::default_provider() })
}

/// Only what `ca` has signed.
pub(crate) fn roots(ca: &CertificateDer<'_>) -> Result<Arc<RootCertStore>, Error> {
    let mut roots = RootCertStore::empty();
    roots
        .add(ca.clone().into_owned())
        .map_err(|why| Error::crypto("The authority cannot be trusted", &why))?;
    Ok(Arc::new(roots))
}

fn client(parts: &Parts) -> Result<Arc<ClientConfig>, Error> {
    let failed = |why: &dyn fmt::Display| Error::crypto("TLS cannot be set up to connect", &why);
    let verifier = WebPkiServerVerifier::builder_with_provider(roots(&parts.ca)?, provider())
        .with_crls([parts.crl.clone()])
        .build()
        .map_err(|why| failed(&why))?;
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .map_err(|why| failed(&why))?
        .with_webpki_verifier(verifier)
        .with_client_auth_cert(vec![parts.node.clone()], PrivateKeyDer::Pkcs8(parts.key.clone_key()))
        .map_err(|why| mismatch(why, "TLS cannot be set up to connect"))?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.resumption = Resumption::disabled();
    // Which node is meant is nobody's business on the way there.
    config.enable_sni = false;
    config.enable_secret_extraction = true;
    Ok(Arc::new(config))
}

fn server(parts: &Parts) -> Result<Arc<ServerConfig>, Error> {
    let failed = |why: &dyn fmt::Display| Error::crypto("TLS cannot be set up to accept", &why);
    let verifier = WebPkiClientVerifier::builder_with_provider(roots(&parts.ca)?, provider())
        .with_crls([parts.crl.clone()])
        .build()
        .map_err(|why| failed(&why))?;
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .map_err(|why| failed(&why))?
        .with_client_cert_verifier(verifier)
        .with_single_cert(vec![parts.node.clone()], PrivateKeyDer::Pkcs8(parts.key.clone_key()))
        .map_err(|why| mismatch(why, "TLS cannot be set up to accept"))?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.max_early_data_size = 0;
    config.enable_secret_extraction = true;
    Ok(Arc::new(config))
}

fn mismatch(why: rustls::Error, what: &'static str) -> Error {
    match why {
        rustls::Error::InconsistentKeys(_) => {
            Error::Unrelated { what: "The node's key".to_owned(), whose: "its certificate" }
        }
        other => Error::crypto(what, &other),
    }
}
