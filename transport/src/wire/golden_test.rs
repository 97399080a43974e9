//! The bytes of version 1, recorded. A change here is a change of the wire format and needs a new version.

use super::{Class, Fault, Flags, Header, Hello, Kind, PREFACE, Preface, Role, rdma};

const HELLO: [u8; 109] = *b"omega\r\n\x1a\
    \x01\x00\x01\x00\x5d\x00\x00\x00\
    \x02\x01\x05\x00\
    \x00\x01\x00\x00\
    \x00\x00\x00\x01\x00\x00\x00\x00\
    \x00\x08\x00\x00\
    \xe8\x03\x00\x00\
    \x08\x07\x06\x05\x04\x03\x02\x01\
    \x00\x00\x00\x00\x00\x00\x00\x00\
    \x11\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\xaa\
    \x22\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\xbb\
    \x33\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\xcc\
    agent";

const REQUEST: [u8; 32] = *b"\x01\x03\x02\x01\x01\x00\x04\x00\
    \x00\x10\x00\x00\x00\x00\x00\x00\
    \x88\x77\x66\x55\x44\x33\x22\x11\
    \x05\x00\x00\x00\x00\x00\x00\x00";

const REPLY: [u8; 32] = *b"\x02\x01\x05\x00\x00\x00\x00\x00\
    \x00\x00\x10\x00\x00\x00\x00\x00\
    \x09\x00\x00\x00\x00\x00\x00\x00\
    \x00\x00\x00\x00\x00\x00\x00\x00";

fn hello() -> Hello {
    Hello {
        role: Role::Answering,
        resumed: true,
        requests: 256,
        bytes: 16 << 20,
        window: 2048,
        keepalive_ms: 1000,
        serial: 0x0102_0304_0506_0708,
        session: 0xaa << 120 | 0x11,
        instance: 0xbb << 120 | 0x22,
        boot: 0xcc << 120 | 0x33,
        name: "agent".into(),
    }
}

#[test]
fn a_hello_has_the_recorded_bytes() {
    assert_eq!(hello().encode(1), HELLO);
    let mut second = HELLO;
    (second[8], second[10]) = (2, 2);
    assert_eq!(hello().encode(2), second, "version 2 changed nothing in the hello");
    let asking = Hello { role: Role::Asking, ..hello() }.encode(1);
    assert_eq!(asking[8..12], [1, 0, 2, 0], "the asking side names all that it speaks");
    let (preface, rest) = HELLO.split_first_chunk::<PREFACE>().expect("it is longer");
    assert_eq!(Preface::decode(preface), Ok(Preface { oldest: 1, newest: 1, len: 93 }));
    assert_eq!(Hello::decode(rest), Ok(hello()));
    let mut later = rest.to_vec();
    later.extend(b"fields of a later version");
    assert_eq!(Hello::decode(&later), Ok(hello()), "what is appended is skipped");
}

#[test]
fn frames_have_the_recorded_bytes() {
    let request = Header {
        class: Class::Bulk,
        code: 0x0102,
        flags: Flags::ONCE,
        body_len: 4,
        payload_len: 4096,
        id: 0x1122_3344_5566_7788,
        acked: 5,
        ..Header::new(Kind::Request)
    };
    assert_eq!(request.encode(), REQUEST);
    assert_eq!(Header::decode(&REQUEST), Ok(request));
    let reply =
        Header { class: Class::Normal, code: 5, payload_len: 1 << 20, id: 9, ..Header::new(Kind::Reply) };
    assert_eq!(reply.encode(), REPLY);
    assert_eq!(Header::decode(&REPLY), Ok(reply));
    for (kind, byte) in [
        (Kind::Cancel, 3),
        (Kind::Ping, 4),
        (Kind::Pong, 5),
        (Kind::Goodbye, 6),
        (Kind::Offer, 7),
        (Kind::Accept, 8),
        (Kind::Switch, 9),
    ] {
        assert_eq!(Header::new(kind).encode()[0], byte);
    }
}

const PLACE: [u8; 48] = *b"\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\xff\xff\x0a\x4d\x00\x02\
    \x11\x00\x00\x00\x56\x34\x12\x00\
    \x00\x00\x03\x00\x10\x00\x40\x00\x00\x12\x00\x00\
    \x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00";

const MESSAGE: [u8; 60] = *b"\x01\x00\x07\x00\x01\x00\x00\x00\
    \x01\x03\x02\x01\x01\x00\x04\x00\
    \x00\x10\x00\x00\x00\x00\x00\x00\
    \x88\x77\x66\x55\x44\x33\x22\x11\
    \x05\x00\x00\x00\x00\x00\x00\x00\
    \x00\x00\xad\xde\x00\x7f\x00\x00\x00\x10\x00\x00\x0d\x0c\x0b\x0a\
    body";

#[test]
fn what_version_2_says_about_rdma_has_the_recorded_bytes() {
    let place = rdma::Place {
        gid: [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 77, 0, 2],
        queue_pair: 17,
        packet: 0x0012_3456,
        lid: 0,
        mtu: 3,
        infiniband: false,
        reads: 16,
        slots: 64,
        slot: 4608,
    };
    assert_eq!(place.encode(), PLACE);
    assert_eq!(rdma::Place::decode(&PLACE), Ok(place));
    let segment = rdma::Segment { address: 0x7f00_dead_0000, len: 4096, key: 0x0a0b_0c0d };
    let head = [&REQUEST[..], b"body"].concat();
    let mut slot = [0; rdma::SLOT];
    let len = rdma::encode_frame(&mut slot, 7, &head, &[], &[segment], &[]).expect("it fits");
    assert_eq!(slot[..len], MESSAGE);
    let (credits, message) = rdma::decode(&MESSAGE).expect("it makes sense");
    let rdma::Message::Frame { header, body, payload, .. } = message else { panic!("a frame") };
    assert_eq!((credits, header.encode(), body), (7, REQUEST, &b"body"[..]));
    assert_eq!(payload[..], [segment]);
    for (at, byte) in [(0, 4), (1, 1), (4, 2), (4, 200), (6, 1), (8, 7), (16, 1), (48, 1), (51, 0xff)] {
        let mut wrong = MESSAGE;
        wrong[at] = byte;
        assert!(rdma::decode(&wrong).is_err(), "byte {at} is {byte}");
    }
    for (at, byte) in [(19, 1), (23, 1), (26, 0), (26, 6), (27, 2), (30, 3), (33, 1)] {
        let mut wrong = PLACE;
        wrong[at] = byte;
        assert!(rdma::Place::decode(&wrong).is_err(), "byte {at} is {byte}");
    }
    assert!(rdma::decode(&MESSAGE[..59]).is_err() && rdma::Place::decode(&PLACE[..47]).is_err());
}

#[test]
fn each_field_beyond_its_limit_is_refused() {
    let with = |at: usize, bytes: &[u8]| {
        let mut frame = REQUEST;
        frame[at..at + bytes.len()].copy_from_slice(bytes);
        Header::decode(&frame)
    };
    for (at, bytes, why) in [
        (0, &[0][..], "kind"),
        (0, &[10], "kind"),
        (1, &[4], "class"),
        (4, &[2, 0], "flags"),
        (5, &[0x80], "flags"),
        (6, &[1, 0x10], "body"),
        (8, &[1, 0, 0x10, 0], "payload"),
        (12, &[1, 0, 0, 0], "answer length"),
    ] {
        let error = with(at, bytes).expect_err("it is refused").to_string();
        assert!(error.contains(why), "byte {at}: {error}");
    }
    // A ping has no payload, no body and no answer.
    for at in [6, 8, 12] {
        let mut ping = Header::new(Kind::Ping).encode();
        ping[at] = 1;
        assert!(Header::decode(&ping).is_err(), "byte {at}");
    }
    let mut preface = *HELLO.first_chunk::<PREFACE>().expect("it is longer");
    preface[8..12].copy_from_slice(&[3, 0, 4, 0]);
    assert_eq!(Preface::decode(&preface), Err(Fault::Version { oldest: 3, newest: 4 }));
    preface[7] = 0;
    assert_eq!(Preface::decode(&preface), Err(Fault::NotOmega));
}
