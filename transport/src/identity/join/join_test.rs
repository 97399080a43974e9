//! Joins over real sockets, and everything that must not become one.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use rcgen::CertificateParams;
use rustls::pki_types::PrivateKeyDer;
use rustls::{ServerConfig, ServerConnection};

use super::joiner::connect;
use super::token::{SECRET, Secret};
use super::wire::{Answer, Request};
use super::{ALPN, Error, Invitation, Joined, MAX_TRIES, Outcome, PATIENCE, Token, join};
use crate::identity::authority::{Authority, new_key};
use crate::identity::testing::Household;
use crate::identity::{Fingerprint, Identity, NodeName, Peer, Reloading, Role, Roles, loaded};

const LIFE: Duration = Duration::from_secs(600);

struct Home {
    /// Only for its folder.
    house: Household,
    authority: Authority,
}

impl Home {
    fn new() -> Self {
        let house = Household::new();
        let authority = Authority::init(&house.path().join("ca"), "home").expect("an authority");
        Self { house, authority }
    }

    fn folder(&self, name: &str) -> PathBuf {
        self.house.path().join(name)
    }

    fn invitation(&self, name: &str, life: Duration) -> Invitation<'_> {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address");
        let name: NodeName = name.parse().expect("a name");
        Invitation::new(&self.authority, &name, Role::Agent.into(), life, listener, vec![address])
            .expect("an invitation")
    }

    /// Waits for `name` while `body` runs, and stops afterwards if nobody joined.
    fn while_waiting<T>(&self, name: &str, body: impl FnOnce(&Token) -> T) -> (Outcome, T) {
        let invitation = self.invitation(name, LIFE);
        let token = invitation.token().clone();
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            let waiting = scope.spawn(|| invitation.wait(&|| done.load(Ordering::SeqCst)));
            let result = body(&token);
            done.store(true, Ordering::SeqCst);
            (waiting.join().expect("it waits"), result)
        })
    }

    fn names(&self) -> Vec<String> {
        self.authority.nodes().expect("the registry").into_iter().map(|node| node.name).collect()
    }
}

fn joined(outcome: Outcome) -> Joined {
    match outcome {
        Outcome::Joined(joined) => *joined,
        other => panic!("nobody joined: {other:?}"),
    }
}

fn refused(result: Result<Arc<Identity>, Error>) -> String {
    match result {
        Err(Error::Refused(why)) => why,
        other => panic!("not refused: {other:?}"),
    }
}

/// Sends `csr` with the token's secret.
fn send(token: &Token, csr: Vec<u8>) -> std::io::Result<Answer> {
    let (mut stream, _) = connect(token).expect("the authority");
    let request = Request { secret: token.secret.clone(), port: 0, csr };
    stream.write_all(&request.encode())?;
    stream.flush()?;
    Answer::read(&mut stream)
}

fn csr() -> Vec<u8> {
    CertificateParams::default().serialize_request(&new_key().unwrap()).unwrap().der().to_vec()
}

#[test]
fn a_token_makes_a_node_whose_key_only_its_owner_can_read() {
    let home = Home::new();
    let folder = home.folder("attic");
    let (outcome, identity) = home.while_waiting("attic", |token| join(token, &folder, Some(7420)));
    let identity = identity.expect("joined");
    assert_eq!((identity.name(), identity.roles()), ("attic", Role::Agent.into()));
    let joined = joined(outcome);
    assert!(joined.confirmed);
    assert_eq!(joined.node.serial, identity.serial().to_string());
    assert_eq!(joined.node.address, Some("127.0.0.1:7420".parse().unwrap()));
    assert_eq!(home.names(), ["attic"]);

    let mode = |name: &str| folder.join(name).metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!((mode("node.key"), mode("node.pem"), mode("")), (0o600, 0o644, 0o700));
    let loaded = Identity::load(&folder).expect("stored whole");
    assert_eq!(loaded.serial(), identity.serial());
    let ca = home.folder("ca");
    let mode = |name: &str| ca.join(name).metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!((mode("ca.key"), mode("nodes.json"), mode("")), (0o600, 0o600, 0o700));
}

#[test]
fn a_token_that_was_used_makes_no_second_node() {
    let home = Home::new();
    let (first, used) = home.while_waiting("attic", |token| {
        join(token, &home.folder("attic"), None).expect("joined");
        token.clone()
    });
    joined(first);
    assert!(matches!(join(&used, &home.folder("b"), None), Err(Error::Unreachable { .. })), "nobody waits");
    let (outcome, why) = home.while_waiting("cellar", |token| {
        let again = Token { addresses: token.addresses.clone(), ..used.clone() };
        (0..3).map(|_| refused(join(&again, &home.folder("b"), None))).next_back()
    });
    assert!(why.unwrap().contains("used already"));
    assert!(matches!(outcome, Outcome::Stopped), "an old token is no guess and voids no other: {outcome:?}");
    assert_eq!(home.names(), ["attic"]);
    assert!(!home.folder("b").join("node.pem").exists());
}

#[test]
fn of_two_who_come_with_one_token_at_once_one_joins() {
    let home = Home::new();
    let (outcome, results) = home.while_waiting("attic", |token| {
        thread::scope(|scope| {
            let both = ["a", "b"].map(|name| {
                let folder = home.folder(name);
                scope.spawn(move || join(token, &folder, None).is_ok())
            });
            both.map(|one| one.join().expect("it ends"))
        })
    });
    joined(outcome);
    assert_eq!(results.iter().filter(|joined| **joined).count(), 1, "{results:?}");
    assert_eq!(home.names(), ["attic"]);
}

#[test]
fn an_expired_token_is_refused_by_both_sides() {
    let home = Home::new();
    let invitation = home.invitation("attic", Duration::from_millis(50));
    let old = invitation.token().clone();
    assert!(matches!(invitation.wait(&|| false), Outcome::Expired));
    // What is over by the whole seconds of the registry.
    let until = SystemTime::now() + Duration::from_secs(30);
    let (outcome, why) = home.while_waiting("cellar", |token| {
        loop {
            let again = Token { addresses: token.addresses.clone(), ..old.clone() };
            let why = refused(join(&again, &home.folder("attic"), None));
            if why.contains("expired") || SystemTime::now() > until {
                return why;
            }
        }
    });
    assert!(why.contains("expired"), "{why}");
    assert!(!matches!(outcome, Outcome::Joined(_)));
    let long_ago = Token { expires: SystemTime::now() - Duration::from_secs(7200), ..old };
    let why = join(&long_ago, &home.folder("attic"), None).unwrap_err();
    assert!(matches!(why, Error::Expired(_)), "{why}");
    assert!(
        why.to_string().contains("expired 2 hours ago") || why.to_string().contains("121 minutes"),
        "{why}"
    );
    assert!(home.names().is_empty());
}

#[test]
fn a_token_changed_by_somebody_who_mends_the_checksum_makes_no_node() {
    let home = Home::new();
    let (outcome, ()) = home.while_waiting("attic", |token| {
        let mut changed = token.clone();
        changed.authority = Fingerprint([7; 32]);
        let why = join(&changed, &home.folder("a"), None);
        assert!(matches!(why, Err(Error::Impostor(_))), "another authority: {why:?}");
        let changed = Token { secret: Secret::of([7; SECRET]), ..token.clone() };
        assert!(refused(join(&changed, &home.folder("a"), None)).contains("not valid"));
        // The expiry in the token is for people; the authority knows its own.
        let changed = Token { expires: token.expires + LIFE, ..token.clone() };
        join(&changed, &home.folder("a"), None).expect("the secret is right and in time");
    });
    joined(outcome);
}

#[test]
fn a_few_wrong_secrets_do_no_harm_and_very_many_void_the_invitation() {
    let home = Home::new();
    let guess = |token: &Token| {
        let wrong = Token { secret: Secret::of([7; SECRET]), ..token.clone() };
        join(&wrong, &home.folder("a"), None)
    };
    let (outcome, _) = home.while_waiting("attic", |token| {
        for _ in 0..8 {
            assert!(refused(guess(token)).contains("not valid"));
        }
        join(token, &home.folder("attic"), None).expect("the right one is still good")
    });
    joined(outcome);

    let invitation = home.invitation("cellar", LIFE);
    invitation.wrong.store(MAX_TRIES - 2, Ordering::SeqCst);
    let token = invitation.token().clone();
    let outcome = thread::scope(|scope| {
        let waiting = scope.spawn(|| invitation.wait(&|| false));
        for _ in 0..2 {
            assert!(refused(guess(&token)).contains("not valid"));
        }
        waiting.join().expect("it waits")
    });
    assert!(matches!(outcome, Outcome::Void), "{outcome:?}");
    assert!(matches!(join(&token, &home.folder("a"), None), Err(Error::Unreachable { .. })));
    assert!(home.authority.why_not(&token.secret).to_string().contains("withdrawn"));
    assert_eq!(home.names(), ["attic"]);
}

#[test]
fn who_joins_with_a_stolen_token_cannot_hide_it() {
    // He says nothing more, and lets the connection stand; the token's owner loses patience, or strangers guess.
    let silent = |token: &Token| {
        let (mut stream, _) = connect(token).expect("the authority");
        let request = Request { secret: token.secret.clone(), port: 0, csr: csr() };
        stream.write_all(&request.encode()).and_then(|()| stream.flush()).expect("it goes out");
        assert!(matches!(Answer::read(&mut stream), Ok(Answer::Welcome { .. })));
        stream
    };
    let home = Home::new();
    let began = Instant::now();
    let (outcome, open) = home.while_waiting("attic", silent);
    assert!(began.elapsed() < PATIENCE, "Ctrl-C need not wait for him");
    let told = joined(outcome);
    assert!(told.node.name == "attic" && !told.confirmed, "{told:?}");
    drop(open);

    // The last guess comes after him.
    let invitation = home.invitation("cellar", LIFE);
    invitation.wrong.store(MAX_TRIES - 1, Ordering::SeqCst);
    let token = invitation.token().clone();
    let outcome = thread::scope(|scope| {
        let waiting = scope.spawn(|| invitation.wait(&|| false));
        let open = silent(&token);
        let wrong = Token { secret: Secret::of([7; SECRET]), ..token.clone() };
        // Perhaps nobody listens any more.
        join(&wrong, &home.folder("a"), None).expect_err("wrong");
        drop(open);
        waiting.join().expect("it waits")
    });
    assert_eq!(joined(outcome).node.name, "cellar");
}

#[test]
fn a_token_for_a_name_that_is_revoked_is_void() {
    let home = Home::new();
    let (_, why) = home.while_waiting("attic", |token| {
        home.authority.revoke("attic").expect("it is invited");
        refused(join(token, &home.folder("attic"), None))
    });
    assert!(why.contains("withdrawn"), "{why}");
    assert!(home.names().is_empty());
    assert!(home.authority.revoke("attic").is_err(), "nothing is left");
}

#[test]
fn whoever_asks_for_another_name_or_role_gets_those_of_the_invitation() {
    let home = Home::new();
    let (outcome, answer) = home.while_waiting("attic", |token| {
        let names = ["desk.node.omega.internal", "console.role.omega.internal", "join.omega.internal"];
        let mut params = CertificateParams::new(names.map(String::from)).unwrap();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        params.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign, rcgen::KeyUsagePurpose::CrlSign];
        send(token, params.serialize_request(&new_key().unwrap()).unwrap().der().to_vec())
    });
    let Answer::Welcome { node, .. } = answer.expect("an answer") else { panic!("refused") };
    let peer = Peer::of(&node.clone().into()).expect("a node");
    assert_eq!((peer.name.as_str(), peer.roles), ("attic", Roles::from(Role::Agent)));
    use x509_parser::prelude::FromDer;
    let (_, parsed) = x509_parser::certificate::X509Certificate::from_der(&node).unwrap();
    assert!(!parsed.is_ca() && !parsed.key_usage().unwrap().unwrap().value.key_cert_sign());
    assert!(!joined(outcome).confirmed, "it never said that it stored it");
}

#[test]
fn a_request_without_its_key_or_for_another_kind_of_key_is_refused() {
    let home = Home::new();
    let mut unsigned = csr();
    *unsigned.last_mut().unwrap() ^= 1;
    let other = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
    let other = CertificateParams::default().serialize_request(&other).unwrap().der().to_vec();
    let (outcome, ()) = home.while_waiting("attic", |token| {
        for bad in [unsigned, other, vec![0x30; 100]] {
            let answer = send(token, bad).expect("an answer");
            assert!(matches!(&answer, Answer::Refused(why) if why.contains("malformed")), "{answer:?}");
        }
        assert!(send(token, vec![0; 3000]).is_err(), "too long");
        assert!(matches!(send(token, csr()), Ok(Answer::Welcome { .. })), "the secret is still good");
    });
    joined(outcome);
}

/// Answers one connection as `config` says, and returns whatever it is told inside TLS.
fn impostor(config: ServerConfig) -> (SocketAddr, thread::JoinHandle<Vec<u8>>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address");
    let answer = thread::spawn(move || {
        let (mut socket, _) = listener.accept().expect("a victim");
        let mut tls = ServerConnection::new(Arc::new(config)).expect("a server");
        let mut told = Vec::new();
        while told.is_empty()
            && let Ok((1.., _)) = tls.complete_io(&mut socket)
        {
            tls.reader().read_to_end(&mut told).ok();
        }
        told
    });
    (address, answer)
}

/// TLS with the certificate of `identity`, and behind it that of its authority.
fn as_node(identity: &Identity, ca: Option<&Identity>) -> ServerConfig {
    let (parts, ca) = (identity.parts(), ca.unwrap_or(identity).parts().ca.clone());
    let mut config = ServerConfig::builder_with_provider(loaded::provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![parts.node.clone(), ca], PrivateKeyDer::Pkcs8(parts.key.clone_key()))
        .unwrap();
    config.alpn_protocols = vec![ALPN.to_vec()];
    config
}

#[test]
fn nobody_but_the_authority_is_told_the_secret() {
    let (home, other) = (Home::new(), Household::new());
    let (_, helper) =
        home.while_waiting("helper", |token| join(token, &home.folder("helper"), None).unwrap());
    let stranger = other.agent("desk");
    let impostors = [
        ("a node of the household", as_node(&helper, None)),
        ("another household", as_node(&stranger, None)),
        ("another household that shows the right authority", as_node(&stranger, Some(&helper))),
    ];
    let (outcome, ()) = home.while_waiting("attic", |token| {
        for (who, config) in impostors {
            let (address, answer) = impostor(config);
            let misled = Token { addresses: vec![address], ..token.clone() };
            let why = join(&misled, &home.folder("attic"), None).expect_err(who);
            assert!(matches!(why, Error::Impostor(at) if at == address), "{who}: {why:?}");
            assert_eq!(answer.join().expect("it listened"), b"", "{who}");
        }
        // One who is no TLS at all, and then the true one.
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mute = listener.local_addr().unwrap();
        let closer =
            thread::spawn(move || listener.accept().unwrap().0.write_all(b"HTTP/1.1 400 No\r\n\r\n"));
        let addresses = [vec![mute], token.addresses.clone()].concat();
        join(&Token { addresses, ..token.clone() }, &home.folder("attic"), None).expect("the second answers");
        closer.join().unwrap().ok();
    });
    assert!(joined(outcome).confirmed);
}

#[test]
fn a_recorded_conversation_sent_again_makes_no_node() {
    let home = Home::new();
    let (outcome, (recorded, secret)) = home.while_waiting("attic", |token| {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let between = listener.local_addr().unwrap();
        let to = token.addresses[0];
        let recorder = thread::spawn(move || {
            let (mut near, _) = listener.accept().unwrap();
            let mut far = TcpStream::connect(to).unwrap();
            let (mut near2, mut far2) = (near.try_clone().unwrap(), far.try_clone().unwrap());
            let back = thread::spawn(move || {
                std::io::copy(&mut far2, &mut near2).ok();
                near2.shutdown(Shutdown::Write).ok();
            });
            let (mut recorded, mut buffer) = (Vec::new(), [0; 4096]);
            while let Ok(count @ 1..) = near.read(&mut buffer) {
                recorded.extend(&buffer[..count]);
                far.write_all(&buffer[..count]).ok();
            }
            far.shutdown(Shutdown::Write).ok();
            back.join().unwrap();
            recorded
        });
        let token = Token { addresses: vec![between], ..token.clone() };
        join(&token, &home.folder("attic"), None).expect("joined through the recorder");
        (recorder.join().expect("recorded"), token.secret)
    });
    joined(outcome);
    assert!(!recorded.windows(SECRET).any(|bytes| bytes == secret.bytes()), "it is encrypted");
    let (outcome, answer) = home.while_waiting("cellar", |token| {
        let mut socket = TcpStream::connect(token.addresses[0]).unwrap();
        socket.write_all(&recorded).ok();
        socket.shutdown(Shutdown::Write).ok();
        let mut answer = Vec::new();
        socket.read_to_end(&mut answer).ok();
        answer
    });
    assert!(matches!(outcome, Outcome::Stopped), "{outcome:?}");
    assert!(answer.len() < 4096, "a handshake that leads nowhere");
    assert_eq!(home.names(), ["attic"]);
}

#[test]
fn who_says_nothing_keeps_nobody_from_joining() {
    let home = Home::new();
    let (outcome, _silent) = home.while_waiting("attic", |token| {
        let silent: Vec<_> = (0..20).map(|_| TcpStream::connect(token.addresses[0]).unwrap()).collect();
        join(token, &home.folder("attic"), None).expect("joined beside them");
        silent
    });
    joined(outcome);
}

#[test]
fn joining_again_replaces_the_identity_and_its_handle_takes_it() {
    let home = Home::new();
    let folder = home.folder("attic");
    home.while_waiting("attic", |token| join(token, &folder, None).unwrap());
    let handle = Reloading::load(&folder).expect("an identity");
    let first = handle.current();
    assert!(!handle.reload().expect("readable"), "nothing changed");
    let (_, second) = home.while_waiting("attic", |token| join(token, &folder, None).unwrap());
    assert!(handle.reload().expect("readable"));
    assert_eq!(handle.current().serial(), second.serial());
    assert_ne!(first.serial(), second.serial());
    assert!(!handle.current().crl().revokes(first.serial()), "the old one is good until it is revoked");
    let crl = home.authority.revoke("attic").expect("known");
    assert!(crl.revokes(first.serial()) && crl.revokes(second.serial()), "a name is revoked wholly");
}

#[test]
fn a_pc_whose_clock_is_wrong_is_told_so() {
    let home = Home::new();
    let (certificate, key) = home.authority.signer().inviter(Duration::ZERO).expect("over at once");
    let until = SystemTime::now() + Duration::from_secs(60);
    let why = loop {
        let chain = vec![certificate.clone(), home.authority.signer().certificate().clone()];
        let mut config = ServerConfig::builder_with_provider(loaded::provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(chain, PrivateKeyDer::Pkcs8(key.clone_key()))
            .unwrap();
        config.alpn_protocols = vec![ALPN.to_vec()];
        let (address, answer) = impostor(config);
        let token = Token {
            addresses: vec![address],
            authority: home.authority.fingerprint(),
            secret: Secret::of([7; SECRET]),
            expires: SystemTime::now() + LIFE,
        };
        // Until its last second is over it is the authority, which here says nothing.
        match join(&token, &home.folder("attic"), None) {
            Err(Error::Broken { .. }) if SystemTime::now() < until => answer.join().map(drop).unwrap_or(()),
            other => break other,
        }
    };
    assert!(matches!(why, Err(Error::Clock)), "{why:?}");
}
