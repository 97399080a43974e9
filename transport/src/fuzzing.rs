//! Entry points for fuzzers: every byte a peer sends comes through here.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::buffer::Buffer;
use crate::channel::Call;
use crate::core::answerer::Answerer;
use crate::core::asker::{Asker, Identity};
use crate::core::stream::{Decoder, Outqueue};
use crate::line;
use crate::server::{Event, Limits, Sessions};
use crate::sessions::Claimant;
use crate::wire::{Body, Class, HEADER, Header, Hello, PREFACE, Preface, Status, VERSION, rdma};

pub use crate::identity::fuzzing::fuzz_identity;

const LIMITS: Limits =
    Limits { requests: 4, bytes: 4 << 20, sessions: 2, connections: 2, per_node: 2, rdma: false };

/// What an asking side sends, to an answering side. The first byte says in what pieces it comes.
pub fn fuzz_requests(data: &[u8]) {
    let Some((piece, data)) = data.split_first() else { return };
    let sessions = Sessions::new("fuzz", LIMITS);
    let claimant = Claimant { number: sessions.number(), cut: Arc::new(|| ()), wake: Arc::new(|| ()) };
    let mut core = Answerer::new(sessions, claimant, Instant::now());
    let (mut decoder, mut out, mut events) = (Decoder::new(), Outqueue::default(), Vec::new());
    for piece in data.chunks(usize::from(*piece) + 1) {
        if decoder.feed(piece, &mut core).is_err() {
            break;
        }
        core.take_events(&mut events);
        for event in events.drain(..) {
            if let Event::Request(request) = event
                && request.opcode % 2 == 0
            {
                let answer = core.pool.take(request.answer_len);
                core.answer(request.id, Status::OK, &request.body, answer);
            }
        }
        assert!(core.in_flight() <= LIMITS.requests as usize, "credit bounds what is in flight");
        // The peer never reads: what waits for it is bounded all the same.
        out.fill(&mut core);
    }
}

/// What an answering side sends, to an asking side with calls in flight.
pub fn fuzz_replies(data: &[u8]) {
    let Some((piece, data)) = data.split_first() else { return };
    let now = Instant::now();
    let identity = Identity { name: "fuzz".into(), instance: 1, boot: 2 };
    let mut core = Asker::new(identity, 3, Duration::from_secs(1), now);
    for tag in 0..4u64 {
        core.submit(Call {
            answer: Buffer::zeroed(tag as usize * 100),
            once: tag == 0,
            ..Call::new(tag, 256, Class::Normal, Body::new())
        });
    }
    core.connected(now);
    let (mut decoder, mut out, mut events) = (Decoder::new(), Outqueue::default(), Vec::new());
    let mut answers = 0;
    for piece in data.chunks(usize::from(*piece) + 1) {
        let broken = decoder.feed(piece, &mut core).is_err();
        core.take_events(&mut events);
        answers += events.drain(..).filter(|e| matches!(e, crate::channel::Event::Answer(_))).count();
        if broken {
            core.disconnected();
            break;
        }
        core.ready();
        out.fill(&mut core);
    }
    assert_eq!(answers + core.close().len(), 4, "each call is answered or given back");
}

/// Headers and hellos: what decodes encodes to the same bytes.
pub fn fuzz_wire(data: &[u8]) {
    if let Some(bytes) = data.first_chunk::<HEADER>()
        && let Ok(header) = Header::decode(bytes)
    {
        assert_eq!(header.encode(), *bytes);
    }
    if let Some((preface, hello)) = data.split_first_chunk::<PREFACE>() {
        let _ = Preface::decode(preface);
        if let Ok(hello) = Hello::decode(hello) {
            let again = hello.encode(VERSION);
            assert!(Hello::decode(&again[PREFACE..]).is_ok());
        }
    }
}

/// Records of TLS from a peer that has the keys.
pub fn fuzz_tls_records(data: &[u8]) {
    crate::link::tls::records::exercise(data);
}

/// What comes over RDMA, or is agreed on before: what decodes makes sense, and encodes to the same bytes.
pub fn fuzz_rdma(data: &[u8]) {
    if let Ok(place) = rdma::Place::decode(data) {
        let again = place.encode();
        assert_eq!(rdma::Place::decode(&again), Ok(place));
    }
    let Ok((credits, message)) = rdma::decode(data) else { return };
    let rdma::Message::Frame { header, body, inline, payload, answer } = message else { return };
    assert!(
        payload.len() <= rdma::SEGMENTS && answer.len() <= rdma::SEGMENTS && inline.len() <= rdma::INLINE
    );
    let sum = |list: &[rdma::Segment]| list.iter().map(|s| s.len as usize).sum::<usize>();
    assert!(payload.is_empty() || sum(&payload) == header.payload_len as usize);
    assert!(answer.is_empty() || sum(&answer) == header.answer_len as usize);
    let mut head = header.encode().to_vec();
    head.extend_from_slice(body);
    let mut again = vec![0; data.len()];
    let len = rdma::encode_frame(&mut again, credits, &head, inline, &payload, &answer);
    assert_eq!((len, &again[..]), (Some(data.len()), data));
}

/// What the other end of a line sends: bodies, and numbers in any order.
pub fn fuzz_line(data: &[u8]) {
    if let Ok((header, message)) = line::protocol::Header::decode(data) {
        assert_eq!(header.encode(message).as_slice(), data);
    }
    if let Ok(held) = line::protocol::welcomed(data) {
        assert_eq!(line::protocol::welcome(held).as_slice(), data);
    }
    let _ = line::protocol::reason_of(line::protocol::status::ENDED, data);
    line::exercise(data);
}

/// A well-formed conversation of each side, to start from.
#[must_use]
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    use crate::core::asker::frame;
    use crate::wire::{Flags, Kind, Role};
    let hello = |role, requests| Hello {
        role,
        resumed: false,
        requests,
        bytes: 4 << 20,
        window: 32,
        keepalive_ms: 1000,
        serial: u64::from(requests != 0),
        session: 3,
        instance: 1,
        boot: 2,
        name: "seed".into(),
    };
    let frames = |frames: &[(Header, &[u8], usize)], start: Vec<u8>| {
        let mut bytes = vec![200];
        bytes.extend(start);
        for (header, body, payload) in frames {
            let out = frame(header, body, Buffer::zeroed(*payload), 0);
            bytes.extend_from_slice(&out.head);
            bytes.extend(out.payload.to_vec());
        }
        bytes
    };
    let request = |id, flags, answer_len, acked| Header {
        class: Class::Normal,
        code: 256,
        flags,
        answer_len,
        id,
        acked,
        ..Header::new(Kind::Request)
    };
    let id = |kind, id| Header { id, ..Header::new(kind) };
    let goodbye = Header { flags: Flags::FORGET, ..Header::new(Kind::Goodbye) };
    let requests = frames(
        &[
            (request(1, Flags::ONCE, 0, 1), b"body", 700),
            (request(2, 0, 4096, 2), b"", 0),
            (id(Kind::Ping, 9), b"", 0),
            (id(Kind::Cancel, 2), b"", 0),
            (request(3, Flags::ONCE, 0, 2), b"", 0),
            (goodbye, b"done", 0),
        ],
        hello(Role::Asking, 0).encode(1),
    );
    let replies = frames(
        &[
            (id(Kind::Reply, 3), b"body", 200),
            (id(Kind::Pong, 9), b"", 0),
            (id(Kind::Ping, 5), b"", 0),
            (id(Kind::Reply, 1), b"", 0),
            (id(Kind::Reply, 4), b"", 17),
            (Header::new(Kind::Goodbye), b"stopping", 0),
        ],
        hello(Role::Answering, 4).encode(1),
    );
    let wire = request(7, Flags::ONCE, 0, 5).encode().to_vec();
    let mut greeting = hello(Role::Asking, 0).encode(1);
    greeting.extend([0; 16]);
    let inside: &[&[u8]] =
        &[b"content\x17", b"padded\x17\0\0", b"\x17", &[4, 0, 0, 0, 22], &[7; 3000], &[1, 0, 21]];
    let mut records = vec![1];
    for inner in inside {
        records.push(1);
        records.extend((inner.len() as u16).to_le_bytes());
        records.extend_from_slice(inner);
    }
    records.extend([0, 9, 0, 23, 3, 3, 0, 4, 1, 2, 3, 4]);
    let place = rdma::Place {
        gid: [1; 16],
        queue_pair: 17,
        packet: 99,
        lid: 0,
        mtu: 3,
        infiniband: false,
        reads: 16,
        slots: 64,
        slot: rdma::SLOT as u32,
    };
    let segment = |len| rdma::Segment { address: 0x7000_0000_0000, len, key: 5 };
    let header = Header { body_len: 4, payload_len: 4096, ..request(7, 0, 8192, 5) };
    let head = [&header.encode()[..], b"body"].concat();
    let mut message = vec![0; rdma::SLOT];
    let len = rdma::encode_frame(&mut message, 3, &head, &[], &[segment(4096)], &[segment(8192)]);
    message.truncate(len.unwrap_or(0));
    // Two come, the second first; three are sent, shown, confirmed in part, and shown again.
    let step = |what: u8, number: u64| [&[what][..], &number.to_le_bytes()].concat();
    let steps = [(0, 2), (0, 1), (1, 0), (1, 0), (1, 0), (2, 0), (2, 0), (3, 1), (4, 0), (2, 0), (3, 2)];
    let steps = steps.map(|(what, number)| step(what, number));
    vec![
        ("requests", requests),
        ("replies", replies),
        ("wire", wire),
        ("wire", greeting),
        ("tls_records", records),
        ("rdma", place.encode().to_vec()),
        ("rdma", message),
        ("line", line::protocol::Header { number: 1, acked: 2 }.encode(b"message").to_vec()),
        ("line", line::protocol::welcome(32).to_vec()),
        ("line", line::protocol::reason("the node is being drained").to_vec()),
        ("line", steps.concat()),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dice::{Dice, run_edges};
    use std::path::Path;

    fn target(name: &str) -> fn(&[u8]) {
        match name {
            "requests" => fuzz_requests,
            "replies" => fuzz_replies,
            "tls_records" => fuzz_tls_records,
            "rdma" => fuzz_rdma,
            "line" => fuzz_line,
            _ => fuzz_wire,
        }
    }

    #[test]
    fn no_value_of_any_byte_of_a_conversation_does_harm() {
        for (name, seed) in seeds() {
            run_edges(&seed, 600, target(name));
        }
    }

    #[test]
    fn no_random_mutation_of_the_corpus_does_harm() {
        let mut dice = Dice(0x1234_5678_9ABC_DEF1);
        let mut ran = 0;
        for name in ["requests", "replies", "wire", "rdma", "tls_records", "line"] {
            let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fuzz/corpus").join(name);
            let files = std::fs::read_dir(&folder).expect("the corpus is there");
            let mut corpus: Vec<Vec<u8>> =
                files.map(|file| std::fs::read(file.expect("a file").path()).expect("it reads")).collect();
            assert!(!corpus.is_empty(), "{}", folder.display());
            corpus.extend(seeds().into_iter().filter(|(seed, _)| *seed == name).map(|(_, bytes)| bytes));
            let run = target(name);
            for bytes in &corpus {
                run(bytes);
                ran += 1;
            }
            for _ in 0..5000 {
                run(&dice.mutate(&corpus, 4));
            }
        }
        eprintln!("fuzz corpus: {ran} inputs");
    }

    /// `OMEGA_WRITE_SEEDS=1 cargo test -p omega-transport seeds` writes them again.
    #[test]
    fn the_fuzz_corpus_holds_the_seeds() {
        for (at, (name, bytes)) in seeds().into_iter().enumerate() {
            let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fuzz/corpus").join(name);
            let file = folder.join(format!("seed-{at}"));
            if std::env::var_os("OMEGA_WRITE_SEEDS").is_some() {
                std::fs::create_dir_all(&folder).expect("a folder");
                std::fs::write(&file, &bytes).expect("a file");
            }
            assert_eq!(std::fs::read(&file).expect("a file"), bytes, "{}", file.display());
        }
    }
}
