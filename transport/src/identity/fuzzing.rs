//! Entry point for fuzzers: every byte that somebody who is not proven yet can send to an identity's code, or
//! that a proven node can send about others.

use std::sync::OnceLock;

use rustls::pki_types::CertificateDer;

use super::authority::{Signer, requested_key};
use super::join::wire::{Answer, Request};
use super::{Crl, MAX_CRL, NodeName, Peer, join};

/// The first byte says what the others are: a token, what either side of a join says, a request for a
/// certificate, a certificate, a list of revoked ones.
pub fn fuzz_identity(data: &[u8]) {
    let Some((kind, data)) = data.split_first() else { return };
    match kind % 6 {
        0 => token(data),
        1 => request(data),
        2 => answer(data),
        3 => drop(requested_key(data)),
        4 => certificate(data),
        _ => list(data),
    }
}

fn token(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(token) = text.parse::<join::Token>() {
        assert_eq!(token.to_string(), text, "a token is written in one way");
        assert!(!token.addresses.is_empty());
    }
}

fn request(data: &[u8]) {
    let mut rest = data;
    if let Ok(request) = Request::read(&mut rest) {
        let read = data.len() - rest.len();
        assert_eq!(request.encode(), &data[..read], "what decodes encodes to the same bytes");
    }
}

fn answer(data: &[u8]) {
    let mut rest = data;
    match Answer::read(&mut rest) {
        Ok(Answer::Refused(why)) => assert!(!why.contains(char::is_control)),
        Ok(welcome) => assert_eq!(welcome.encode(), &data[..data.len() - rest.len()]),
        Err(_) => {}
    }
}

fn certificate(data: &[u8]) {
    if let Ok(peer) = Peer::of(&CertificateDer::from(data)) {
        assert!(peer.name.parse::<NodeName>().is_ok(), "names that get anywhere are names");
        assert!((1..=20).contains(&peer.serial.as_bytes().len()));
    }
}

fn list(data: &[u8]) {
    static AUTHORITY: OnceLock<Option<Signer>> = OnceLock::new();
    let Some(authority) = AUTHORITY.get_or_init(|| Signer::new("fuzz").ok()) else { return };
    assert!(
        data.len() > MAX_CRL || Crl::verify(data, authority.certificate()).is_err(),
        "nobody signs for it"
    );
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::path::{Path, PathBuf};
    use std::time::{Duration, SystemTime};

    use rcgen::CertificateParams;

    use super::super::authority::new_key;
    use super::super::join::token::{SECRET, Secret};
    use super::super::testing::Household;
    use super::super::{Fingerprint, Role};
    use super::*;
    use crate::dice::{Dice, run_edges};

    fn folder() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fuzz/corpus/identity")
    }

    /// One of each, as the code of today makes it; keys and times are new each time.
    fn fresh() -> Vec<(&'static str, Vec<u8>)> {
        let mut house = Household::new();
        let node = house.node("attic", [Role::Agent, Role::Console].into_iter().collect());
        house.revoke(node.serial());
        let addresses: Vec<SocketAddr> =
            ["192.168.1.5:7421", "[fd00::1]:7421"].map(|a| a.parse().unwrap()).into();
        let token = join::Token {
            addresses,
            authority: Fingerprint([0xa5; 32]),
            secret: Secret::of([0x3c; SECRET]),
            expires: SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000),
        };
        let names = ["attic.node.omega.internal".to_owned()];
        let csr = CertificateParams::new(names).unwrap().serialize_request(&new_key().unwrap()).unwrap();
        let (csr, crl) = (csr.der().to_vec(), house.crl().to_vec());
        let request = Request { secret: token.secret.clone(), port: 7420, csr: csr.clone() };
        let (ca, certificate) = (node.parts().ca.to_vec(), node.parts().node.to_vec());
        let welcome = Answer::Welcome { ca: ca.clone(), node: certificate.clone(), crl: crl.clone() };
        let of = |kind: u8, bytes: Vec<u8>| [vec![kind], bytes].concat();
        vec![
            ("token", of(0, token.to_string().into_bytes())),
            ("request", of(1, request.encode())),
            ("welcome", of(2, welcome.encode())),
            ("refused", of(2, Answer::Refused("The token was used already".into()).encode())),
            ("csr", of(3, csr)),
            ("certificate", of(4, certificate)),
            ("authority", of(4, ca)),
            ("list", of(5, crl)),
        ]
    }

    fn corpus() -> Vec<Vec<u8>> {
        if std::env::var_os("OMEGA_WRITE_SEEDS").is_some() {
            std::fs::create_dir_all(folder()).expect("a folder");
            for (name, bytes) in fresh() {
                std::fs::write(folder().join(name), bytes).expect("a file");
            }
        }
        let files = std::fs::read_dir(folder()).expect("the corpus is there");
        files.map(|file| std::fs::read(file.expect("a file").path()).expect("it reads")).collect()
    }

    #[test]
    fn no_value_of_any_byte_that_a_stranger_sends_does_harm() {
        let mut all = corpus();
        assert!(all.len() >= 8, "{} files", all.len());
        all.extend(fresh().into_iter().map(|(_, bytes)| bytes));
        for seed in &all {
            run_edges(seed, usize::MAX, fuzz_identity);
        }
    }

    #[test]
    fn no_random_mutation_of_what_strangers_send_does_harm() {
        let mut dice = Dice(0x0DDB_1A5E_5BAD_5EED);
        let corpus = corpus();
        for _ in 0..20_000 {
            fuzz_identity(&dice.mutate(&corpus, 5));
        }
    }
}
