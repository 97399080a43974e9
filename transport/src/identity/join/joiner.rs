//! The new node's side of a join.

use std::io::{self, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rcgen::CertificateParams;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, ServerName, UnixTime};
use rustls::version::TLS13;
use rustls::{
    CertificateError, ClientConfig, ClientConnection, DigitallySignedStruct, SignatureScheme, StreamOwned,
};

use super::timed::Timed;
use super::token::Token;
use super::wire::{Answer, Request};
use super::{ALPN, Error, PATIENCE};
use crate::identity::authority::{SKEW, new_key, pkcs8};
use crate::identity::folder::{self, Parts};
use crate::identity::name::JOIN;
use crate::identity::{Fingerprint, Identity, loaded};

/// How long to wait for each of a token's addresses to answer.
const CONNECT_WITHIN: Duration = Duration::from_secs(3);

/// Joins the household that made `token`: makes a key, has it certified, and stores the new identity in
/// `folder`, in place of any earlier one. `port` is where this node is going to listen, if it is.
///
/// # Errors
/// See [`Error`]. Unless the last step fails, an earlier identity in `folder` stays as it was.
pub fn join(token: &Token, folder: &Path, port: Option<u16>) -> Result<Arc<Identity>, Error> {
    // Clocks differ: the authority knows better, so only what is long over need not be tried.
    if let Ok(since) = SystemTime::now().duration_since(token.expires)
        && since > SKEW
    {
        return Err(Error::Expired(since));
    }
    // A token is not to be used up for a certificate that cannot be stored.
    folder::try_out(folder)?;
    let key = new_key()?;
    let csr = CertificateParams::default()
        .serialize_request(&key)
        .map_err(|why| crate::identity::Error::crypto("No request for a certificate can be made", &why))?;
    let request = Request { secret: token.secret.clone(), port: port.unwrap_or(0), csr: csr.der().to_vec() };

    let (mut stream, address) = connect(token)?;
    let broken = |source| Error::Broken { address, source };
    stream.write_all(&request.encode()).and_then(|()| stream.flush()).map_err(broken)?;
    let (ca, node, crl) = match Answer::read(&mut stream).map_err(broken)? {
        Answer::Welcome { ca, node, crl } => (ca, node, crl),
        Answer::Refused(why) => return Err(Error::Refused(why)),
    };
    let parts = Parts {
        ca: CertificateDer::from(ca),
        node: CertificateDer::from(node),
        key: pkcs8(&key),
        crl: CertificateRevocationListDer::from(crl),
    };
    if Fingerprint::of(&parts.ca) != token.authority {
        return Err(Error::Answer("the certificate of another authority came".to_owned()));
    }
    let identity = Identity::of(parts.clone()).map_err(|why| Error::Answer(why.to_string()))?;
    folder::write(folder, &parts)?;
    // The node is made; that the other side does not hear so changes nothing.
    stream.write_all(&[1]).and_then(|()| stream.flush()).ok();
    Ok(identity)
}

/// Finds the authority behind one of the token's addresses. It is proven before this returns, and has been told
/// nothing.
pub(super) fn connect(token: &Token) -> Result<(StreamOwned<ClientConnection, Timed>, SocketAddr), Error> {
    let config = config(token.authority)?;
    let (mut last, mut worse) = (io::Error::from(io::ErrorKind::NotFound), None);
    for &address in &token.addresses {
        let socket = match TcpStream::connect_timeout(&address, CONNECT_WITHIN) {
            Ok(socket) => socket,
            Err(why) => {
                last = why;
                continue;
            }
        };
        socket.set_nodelay(true).ok();
        match greet(socket, &config) {
            Ok(stream) => return Ok((stream, address)),
            Err(why) => match judge(&why) {
                Some(Judgement::Clock) => worse = Some(Error::Clock),
                Some(Judgement::Impostor) => worse = worse.or(Some(Error::Impostor(address))),
                None => last = why,
            },
        }
    }
    let addresses: Vec<_> = token.addresses.iter().map(ToString::to_string).collect();
    Err(worse.unwrap_or(Error::Unreachable { addresses: addresses.join(", "), source: last }))
}

fn greet(socket: TcpStream, config: &Arc<ClientConfig>) -> io::Result<StreamOwned<ClientConnection, Timed>> {
    let name = ServerName::try_from(JOIN).map_err(io::Error::other)?;
    let tls = ClientConnection::new(Arc::clone(config), name).map_err(io::Error::other)?;
    let mut stream = StreamOwned::new(tls, Timed::new(socket, PATIENCE));
    while stream.conn.is_handshaking() {
        stream.conn.complete_io(&mut stream.sock)?;
    }
    if stream.conn.alpn_protocol() != Some(ALPN) {
        return Err(io::Error::other(rustls::Error::NoApplicationProtocol));
    }
    Ok(stream)
}

enum Judgement {
    Clock,
    Impostor,
}

/// What a handshake that failed says of the other side, if it failed by what that said.
fn judge(why: &io::Error) -> Option<Judgement> {
    let why = why.get_ref()?.downcast_ref::<rustls::Error>()?;
    Some(match why {
        rustls::Error::InvalidCertificate(
            CertificateError::Expired
            | CertificateError::ExpiredContext { .. }
            | CertificateError::NotValidYet
            | CertificateError::NotValidYetContext { .. },
        ) => Judgement::Clock,
        _ => Judgement::Impostor,
    })
}

fn config(authority: Fingerprint) -> Result<Arc<ClientConfig>, crate::identity::Error> {
    let mut config = ClientConfig::builder_with_provider(loaded::provider())
        .with_protocol_versions(&[&TLS13])
        .map_err(|why| crate::identity::Error::crypto("TLS cannot be set up to join", &why))?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Pinned(authority)))
        .with_no_client_auth();
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.resumption = rustls::client::Resumption::disabled();
    config.enable_sni = false;
    Ok(Arc::new(config))
}

/// Takes only who shows the authority's certificate, which is known by its fingerprint, and one for
/// [`JOIN`] that this authority signed. No node has that one.
#[derive(Debug)]
struct Pinned(Fingerprint);

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let unknown = || rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer);
        let ca = others.iter().find(|other| Fingerprint::of(other) == self.0).ok_or_else(unknown)?;
        let roots = loaded::roots(ca).map_err(|_| unknown())?;
        WebPkiServerVerifier::builder_with_provider(roots, loaded::provider())
            .build()
            .map_err(|_| unknown())?
            .verify_server_cert(end_entity, &[], server_name, ocsp, now)
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::PeerIncompatible(rustls::PeerIncompatible::Tls12NotOffered))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = loaded::provider().signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, &algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        loaded::provider().signature_verification_algorithms.supported_schemes()
    }
}
