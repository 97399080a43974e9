//! Channels and connections over real sockets with TLS.

#![allow(clippy::unwrap_used)]

mod common;

use common::{Client, ECHO, Server, call};
use transport::buffer::Buffer;
use transport::identity::testing::{Household, security};
use transport::server::Limits;
use transport::wire::Status;

#[test]
fn both_sides_prove_who_they_are_and_bytes_of_any_size_come_back() {
    let house = Household::new();
    let server = Server::secured(Limits::default(), security(&house.agent("attic")));
    let mut client = Client::secured(server.address, security(&house.console("desk")), Some("attic"));
    let sizes = [0, 1, 511, 4096, 5000, 16_384, 65_536, 100_001, 1 << 20];
    let mut asked = 0;
    for round in 0..10 {
        for (i, size) in sizes.into_iter().enumerate() {
            let fill = (round * 16 + i) as u8;
            let payload = Buffer::zeroed(size);
            payload.fill(fill);
            client.channel.submit(call(asked, ECHO, &[fill], payload, size));
            client.channel.submit(call(asked + 1, ECHO, &[fill], Buffer::empty(), size));
            asked += 2;
        }
    }
    client.until("all answers", |c| c.answers.len() as u64 == asked);
    for answer in &client.answers {
        assert_eq!(answer.status, Status::OK);
        assert_eq!(answer.received, answer.answer.len());
        assert!(answer.answer.to_vec().iter().all(|byte| *byte == answer.body[0]));
    }
    assert_eq!((client.opened, client.resumed), (1, 0));
    let (peer, carrier) = client.met.clone().unwrap();
    assert_eq!(peer.unwrap().name, "attic");
    let opened = server.opened.lock().unwrap().clone();
    let (peer, theirs) = &opened[0];
    assert_eq!((peer.as_ref().unwrap().name.as_str(), *theirs), ("desk", carrier));
    eprintln!("carried by {carrier}");
}
