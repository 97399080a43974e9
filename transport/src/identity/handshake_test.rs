//! Who gets through a handshake, in memory.

use std::sync::Arc;

use rustls::pki_types::ServerName;
use rustls::{ClientConnection, ServerConnection};

use super::testing::Household;
use super::{ALPN, Identity, Peer, Reloading, Role, Roles};

/// What each side says of the other, or what is wrong for the client and for the server.
type Shaken = Result<(Peer, Peer), Box<(Option<rustls::Error>, Option<rustls::Error>)>>;

fn shake(client: &Identity, server: &Identity, expected: Option<&str>) -> Shaken {
    let name = Identity::server_name(expected).expect("a name");
    shake_as(client, server, name)
}

fn shake_as(client: &Identity, server: &Identity, name: ServerName<'static>) -> Shaken {
    let mut client = ClientConnection::new(client.client_config(), name).expect("a client");
    let mut server = ServerConnection::new(server.server_config()).expect("a server");
    let mut wrong = (None, None);
    for _ in 0..10 {
        let mut bytes = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut bytes).expect("memory");
        }
        server.read_tls(&mut bytes.as_slice()).expect("memory");
        wrong.1 = wrong.1.or(server.process_new_packets().err());
        let mut bytes = Vec::new();
        while server.wants_write() {
            server.write_tls(&mut bytes).expect("memory");
        }
        client.read_tls(&mut bytes.as_slice()).expect("memory");
        wrong.0 = wrong.0.or(client.process_new_packets().err());
    }
    if wrong != (None, None) {
        return Err(Box::new(wrong));
    }
    assert!(!client.is_handshaking() && !server.is_handshaking());
    assert_eq!((client.alpn_protocol(), server.alpn_protocol()), (Some(ALPN), Some(ALPN)));
    assert_eq!(client.handshake_kind(), Some(rustls::HandshakeKind::Full));
    let peer = |certificates: Option<&[_]>| Peer::of(&certificates.expect("proven")[0]).expect("a node");
    Ok((peer(client.peer_certificates()), peer(server.peer_certificates())))
}

#[test]
fn two_nodes_of_a_household_prove_their_names_and_roles_to_each_other() {
    let house = Household::new();
    let (desk, attic) = (house.console("desk"), house.agent("attic"));
    for expected in [None, Some("attic")] {
        let (server, client) = shake(&desk, &attic, expected).expect("both are of the house");
        assert_eq!((server.name.as_str(), server.roles), ("attic", Role::Agent.into()));
        assert_eq!((client.name.as_str(), client.roles), ("desk", Role::Console.into()));
        assert_eq!(&client.serial, desk.serial());
        assert_eq!(client.expires, desk.expires());
    }
}

#[test]
fn another_node_than_the_expected_one_or_one_without_the_role_does_not_answer() {
    let house = Household::new();
    let (desk, attic) = (house.console("desk"), house.agent("attic"));
    let refused =
        |client: &Identity, server: &Identity, expected| shake(client, server, expected).unwrap_err().0;
    assert!(refused(&desk, &attic, Some("cellar")).is_some());
    assert!(refused(&desk, &house.console("attic"), None).is_some(), "a console is no agent");
    assert!(refused(&desk, &house.node("attic", Roles::NONE), None).is_some(), "it has no role");
}

#[test]
fn nobody_gets_in_by_another_expired_future_self_signed_or_revoked_certificate() {
    let (mut house, other) = (Household::new(), Household::new());
    let revoked = [house.console("lost"), house.agent("stolen")];
    revoked.iter().for_each(|node| house.revoke(node.serial()));
    let (desk, attic) = (house.console("desk"), house.agent("attic"));
    let (console, agent) = (Role::Console.into(), Role::Agent.into());
    let clients: [(&str, Arc<Identity>); 6] = [
        ("another authority", other.console("desk")),
        ("another authority, unnoticed by itself", house.stranger(&other, "desk", console)),
        ("expired", house.expired("desk", console)),
        ("not yet valid", house.not_yet_valid("desk", console)),
        ("self-signed", house.self_signed("desk", console)),
        ("revoked", Arc::clone(&revoked[0])),
    ];
    for (why, client) in clients {
        let (by_client, by_server) = *shake(&client, &attic, None).expect_err(why);
        // One of another house gives up first; the others are refused by the server, who decides.
        assert!(by_server.is_some(), "{why}: {by_client:?}");
    }
    let servers: [(&str, Arc<Identity>); 6] = [
        ("another authority", other.agent("attic")),
        ("another authority, unnoticed by itself", house.stranger(&other, "attic", agent)),
        ("expired", house.expired("attic", agent)),
        ("not yet valid", house.not_yet_valid("attic", agent)),
        ("self-signed", house.self_signed("attic", agent)),
        ("revoked", Arc::clone(&revoked[1])),
    ];
    for (why, server) in servers {
        let (by_client, _) = *shake(&desk, &server, None).expect_err(why);
        assert!(by_client.is_some(), "{why}");
    }
}

#[test]
fn a_certificate_is_refused_as_soon_as_the_other_side_takes_the_newer_list() {
    let mut house = Household::new();
    let (lost, attic) = (house.console("lost"), Reloading::in_memory(house.agent("attic")));
    let (_, peer) = shake(&lost, &attic.current(), None).expect("not revoked yet");
    assert!(!attic.revokes(&peer));
    house.revoke(lost.serial());
    let taken = attic.take_crl(&house.crl()).expect("the household's");
    assert!(taken.newer && taken.not_stored.is_none());
    assert!(attic.revokes(&peer), "the live connection is to end");
    shake(&lost, &attic.current(), None).expect_err("and a new one is refused");
}

#[test]
fn a_server_that_has_only_older_tls_or_no_common_suite_is_refused() {
    // rustls is built without TLS 1.2, so there is no configuration that would speak it.
    let house = Household::new();
    let desk = house.console("desk");
    let mut client =
        ClientConnection::new(desk.client_config(), Identity::server_name(None).unwrap()).unwrap();
    client.write_tls(&mut Vec::new()).expect("memory");
    // ServerHello of TLS 1.2 with TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256 and no extension.
    let mut hello = vec![22, 3, 3, 0, 42, 2, 0, 0, 38, 3, 3];
    hello.extend([7; 32]);
    hello.extend([0, 0xc0, 0x2b, 0]);
    client.read_tls(&mut hello.as_slice()).expect("memory");
    let why = client.process_new_packets().expect_err("a downgrade");
    assert!(matches!(why, rustls::Error::PeerIncompatible(_) | rustls::Error::PeerMisbehaved(_)), "{why:?}");
}
