//! What went wrong in TLS, in words that say what to do.

use rustls::{AlertDescription, CertificateError, Error, PeerIncompatible};

use crate::wire::{Fault, printable};

/// The other side ended the connection with an alert (RFC 8446, 6.2).
pub(super) fn refused(alert: AlertDescription) -> Fault {
    use AlertDescription as A;
    let words = match alert {
        A::UnknownCA => {
            "it does not know this node's CA, or has no list of what that CA revoked (unknown CA)"
        }
        A::CertificateExpired => {
            "this node's certificate has expired or is not valid yet; compare both PCs' clocks (certificate expired)"
        }
        A::CertificateRevoked => "this node's certificate was revoked (certificate revoked)",
        A::BadCertificate => "this node's certificate is not of the name or role it wants (bad certificate)",
        A::UnsupportedCertificate => {
            "this node's certificate is not made for this purpose (unsupported certificate)"
        }
        A::CertificateRequired => "this node showed no certificate (certificate required)",
        A::CertificateUnknown => "it does not accept this node's certificate (certificate unknown)",
        A::AccessDenied => "this node may not connect (access denied)",
        A::NoApplicationProtocol => "it speaks TLS, but not Omega's protocol (no application protocol)",
        A::ProtocolVersion => "it does not speak TLS 1.3, or no TLS at all (protocol version)",
        A::UnexpectedMessage => "something else than TLS came to it (unexpected message)",
        A::HandshakeFailure => "both sides have no cipher in common (handshake failure)",
        A::DecryptError => "a signature of this node is wrong, perhaps that of another CA (decrypt error)",
        A::BadRecordMac => "what came to it was changed on the way (bad record MAC)",
        other => return Fault::Refused(format!("alert {other:?}")),
    };
    Fault::Refused(words.to_owned())
}

/// Why the handshake failed on this side.
pub(super) fn failed(error: &Error) -> Fault {
    let words = match error {
        Error::AlertReceived(alert) => return refused(*alert),
        Error::InvalidCertificate(error) => return Fault::Tls(certificate(error)),
        Error::NoCertificatesPresented => "The peer showed no certificate",
        Error::NoApplicationProtocol => "The peer speaks TLS, but not Omega's protocol",
        Error::PeerIncompatible(why) => return Fault::Tls(incompatible(why)),
        Error::DecryptError => "What came from the peer was changed on the way",
        Error::InvalidMessage(_) => "The peer's handshake makes no sense",
        Error::PeerMisbehaved(_) => "The peer broke the rules of TLS",
        Error::InappropriateMessage { .. } | Error::InappropriateHandshakeMessage { .. } => {
            "The peer's handshake is out of order"
        }
        other => return Fault::Tls(format!("TLS failed: {}", printable(other.to_string().as_bytes()))),
    };
    Fault::Tls(words.to_owned())
}

fn incompatible(why: &PeerIncompatible) -> String {
    use PeerIncompatible as P;
    match why {
        P::Tls12NotOffered
        | P::Tls12NotOfferedOrEnabled
        | P::Tls13RequiredForQuic
        | P::SupportedVersionsExtensionRequired
        | P::ServerDoesNotSupportTls12Or13
        | P::ServerTlsVersionIsDisabledByOurConfig => "The peer does not speak TLS 1.3".to_owned(),
        other => format!("The peer's TLS does not fit: {other:?}"),
    }
}

fn certificate(error: &CertificateError) -> String {
    use CertificateError as C;
    let words = match error {
        C::UnknownIssuer => "The peer's certificate is not of this household's CA",
        C::Revoked => "The peer's certificate was revoked",
        C::Expired | C::ExpiredContext { .. } => {
            "The peer's certificate has expired; compare both PCs' clocks"
        }
        C::NotValidYet | C::NotValidYetContext { .. } => {
            "The peer's certificate is not valid yet; compare both PCs' clocks"
        }
        C::UnknownRevocationStatus => "The CA's list says nothing of the peer's certificate",
        C::ExpiredRevocationList | C::ExpiredRevocationListContext { .. } => {
            "This node's list of revoked certificates is too old"
        }
        // Of a CA with the name of ours.
        C::BadSignature => "The peer's certificate is not of this household's CA: its signature is another's",
        other => {
            let detail = printable(other.to_string().as_bytes());
            return format!("The peer's certificate was refused: {detail}");
        }
    };
    words.to_owned()
}
