use super::*;

/// Pages that shrink to about a quarter.
fn soft(pages: usize) -> Buffer {
    let words =
        (0..(pages * PAGE / 16) as u64).flat_map(|n| [n.wrapping_mul(0x9e37_79b9) >> 16 & 0xffff, 0x7f32]);
    Buffer::from_vec(words.flat_map(u64::to_le_bytes).collect())
}

/// Pages that do not shrink.
fn hard(pages: usize) -> Buffer {
    let mut x = 88_172_645_463_325_252u64;
    let words = std::iter::repeat_with(|| {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x
    });
    Buffer::from_vec(words.take(pages * PAGE / 8).flat_map(u64::to_le_bytes).collect())
}

const MIB: f64 = 1e9 / (1 << 20) as f64;

fn figures(link: f64, pack: f64, unpack: f64, ratio: f64) -> Figures {
    Figures { link: MIB / link, pack: MIB / pack, unpack: MIB / unpack, ratio }
}

#[test]
fn packing_pays_where_the_link_is_slower_than_the_processors_and_pages_shrink() {
    // MiB/s of the link, packing, unpacking; what is left of a byte; whether it pays alone, and in a row.
    let cases = [
        ("1 Gbit/s", 112.0, 600.0, 2000.0, 0.4, true, true),
        ("1 Gbit/s, a slow processor", 112.0, 200.0, 800.0, 0.4, false, true),
        ("1 Gbit/s, a very slow one", 112.0, 80.0, 400.0, 0.4, false, false),
        ("2.5 Gbit/s", 280.0, 600.0, 2000.0, 0.4, false, true),
        ("100 Mbit/s", 11.0, 600.0, 2000.0, 0.7, true, true),
        ("100 Mbit/s, nothing shrinks", 11.0, 600.0, 2000.0, 1.0, false, false),
        ("10 Gbit/s", 1100.0, 600.0, 2000.0, 0.2, false, false),
        ("40 Gbit/s, even for zeros", 4500.0, 3000.0, 4000.0, 0.01, false, false),
    ];
    for (what, link, pack, unpack, ratio, alone, row) in cases {
        let it = figures(link, pack, unpack, ratio);
        assert_eq!((pays(&it, Load::Alone, false), pays(&it, Load::Row, false)), (alone, row), "{what}");
    }
}

#[test]
fn a_close_decision_stays_as_it_was() {
    for load in [Load::Alone, Load::Row] {
        // Gains a tenth.
        let close = figures(100.0, 1e9, 1e9, 0.9);
        assert!(pays(&close, load, true) && !pays(&close, load, false));
        let worse = Figures { ratio: 0.96, ..close };
        assert!(!pays(&worse, load, true) && !pays(&worse, load, false));
    }
}

#[test]
fn packing_that_pays_never_makes_a_page_that_somebody_waits_for_take_longer() {
    for link in [1.0, 10.0, 50.0, 112.0, 300.0, 1000.0, 5000.0] {
        for pack in [50.0, 300.0, 1000.0, 4000.0] {
            for ratio in [0.0, 0.1, 0.5, 0.9, 1.0] {
                let it = figures(link, pack, 2.0 * pack, ratio);
                let packed = it.pack + it.ratio * it.link + it.unpack;
                assert!(!pays(&it, Load::Alone, true) || packed < it.link, "{it:?}");
                assert!(!pays(&it, Load::Alone, false) || pays(&it, Load::Row, false), "{it:?}");
            }
        }
    }
}

#[test]
fn a_measurement_that_was_held_up_changes_no_figure() {
    let mut figure = Median::default();
    (0..3).for_each(|_| figure.note(2.0));
    assert_eq!(figure.get(), None, "three are too few");
    for n in 0..100 {
        figure.note(if n % 3 == 0 { 5000.0 } else { 2.0 });
        assert_eq!(figure.get(), Some(2.0));
    }
    (0..9).for_each(|_| figure.note(3.0));
    assert_eq!(figure.get(), Some(3.0));
}

const START: Duration = Duration::from_secs(1);

/// Has `count` transfers of `bytes` cross a link of `rate` bytes per second, `deep` at once, `delay` there and back;
/// returns the measured bytes per second.
fn measured(count: u64, bytes: usize, deep: u64, rate: f64, delay: Duration) -> Option<f64> {
    let mut link = Link::default();
    link.took(delay, true);
    let zero = Instant::now() + START;
    let each = Duration::from_secs_f64(bytes as f64 / rate);
    let mut ended: Vec<Instant> = Vec::new();
    for n in 0..count {
        // It goes out when the one `deep` before it is back, and waits for those before it.
        let at = n.checked_sub(deep).map_or(zero, |n| ended[n as usize]);
        let begins = ended.last().map_or(at, |last| at.max(*last - delay));
        let now = begins + each + delay;
        link.ended(&Sent { fetch: true, bytes, at }, now, false);
        ended.push(now);
    }
    link.get().map(|ns| 1e9 / ns)
}

#[test]
fn the_links_speed_is_found_whether_one_transfer_is_under_way_or_many() {
    let delay = Duration::from_micros(150);
    for rate in [12e6, 118e6, 1.2e9] {
        for (bytes, deep) in [(64 << 10, 1), (64 << 10, 8), (256 << 10, 1), (256 << 10, 4), (4096, 256)] {
            let found = measured(2000, bytes, deep, rate, delay).expect("enough crossed");
            assert!((found / rate - 1.0).abs() < 0.15, "{rate} by {deep} of {bytes}: {found}");
        }
    }
}

#[test]
fn single_pages_one_after_the_other_say_nothing_of_the_link() {
    assert_eq!(measured(5000, 4096, 1, 1.2e9, Duration::from_micros(60)), None);
}

#[test]
fn a_transfer_that_was_held_up_does_not_make_the_link_slow() {
    let mut link = Link::default();
    link.took(Duration::from_micros(50), true);
    let mut at = Instant::now();
    for n in 0..64u32 {
        let took = Duration::from_micros(if n % 40 == 3 { 20_000 } else { 100 });
        link.ended(&Sent { fetch: false, bytes: 64 << 10, at }, at + took, false);
        at += took;
    }
    let found = 1e9 / link.get().expect("4 MiB crossed");
    assert!(found > 3e8, "{found}");
}

/// A helper at the end of a made-up link, which packs as the agent does.
struct Peer {
    compressor: Compressor,
    packer: Packer,
    tag: u64,
}

impl Peer {
    fn new(mode: Compress, flags: u32) -> Self {
        let mut compressor = Compressor::new(mode);
        compressor.opened(flags);
        Self { compressor, packer: Packer::default(), tag: 0 }
    }

    /// As if a link of so many bytes per second had been seen.
    fn link(&mut self, rate: f64) {
        self.compressor.link.windows = [Some(1e9 / rate); 4];
    }

    /// Stores `content`; returns the bytes that crossed.
    fn store(&mut self, content: &Buffer) -> usize {
        self.tag += 1 << 32;
        let sent = content.slice(0, content.len()).expect("it is all of it");
        let (payload, flags) = self.compressor.store(self.tag, sent);
        let crossed = payload.len();
        if flags & flag::PACKED != 0 {
            let back = Buffer::zeroed(content.len());
            self.packer.unpack(&payload, crossed, &back).expect("the agent unpacks it");
            assert!(back.to_vec() == content.to_vec());
        } else {
            assert_eq!(crossed, content.len());
        }
        let mut answer = answer(self.tag, payload, Buffer::empty(), 0, None);
        self.compressor.answered(&mut answer).expect("it is stored");
        crossed
    }

    /// Fetches `content`; returns the bytes that crossed.
    fn fetch(&mut self, content: &Buffer) -> usize {
        self.tag += 1 << 32;
        let flags = self.compressor.fetch(self.tag, content.len(), Urgency::Ahead);
        let into = Buffer::zeroed(content.len());
        let asked = flags & flag::PACKED != 0;
        let packed = if asked { self.packer.pack(content) } else { None };
        let packing = asked.then(|| Packing { packed: packed.is_some(), took: Duration::from_micros(5) });
        let crosses = packed.map_or_else(|| content.to_vec(), |packed| packed.to_vec());
        into.write_at(0, &crosses);
        let mut answer = answer(self.tag, Buffer::empty(), into, crosses.len(), packing);
        self.compressor.answered(&mut answer).expect("it is fetched");
        assert_eq!(answer.received, content.len());
        assert!(answer.answer.to_vec() == content.to_vec());
        crosses.len()
    }
}

fn answer(tag: u64, payload: Buffer, answer: Buffer, received: usize, packing: Option<Packing>) -> Answer {
    let body = packing.map(|packing| packing.encode()).unwrap_or_default();
    Answer { tag, status: Status::OK, body, payload, answer, received }
}

#[test]
fn pages_are_packed_once_the_link_is_known_to_be_slow_and_they_shrink() {
    let mut peer = Peer::new(Compress::Auto, flag::PACKED);
    let raw = 16 * PAGE;
    for _ in 0..20 {
        assert_eq!(peer.store(&soft(16)), raw, "nothing is known of the link");
    }
    // Slower than any processor.
    peer.link(1e3);
    peer.store(&soft(16));
    assert!(peer.store(&soft(16)) < raw / 2);
    assert!(peer.fetch(&soft(16)) < raw / 2);
    let mut all = Compression::default();
    all.add(&peer.compressor.tally());
    assert!(all.connections == 1 && all.pages >= 32 && all.packed_bytes < all.raw_bytes / 2, "{all:?}");
    assert!(all.per_mille < 500 && all.link > 0, "{all:?}");
    // Faster than any.
    peer.link(1e12);
    peer.store(&soft(16));
    assert_eq!((peer.store(&soft(16)), peer.fetch(&soft(16))), (raw, raw));
}

#[test]
fn pages_that_stop_shrinking_go_as_they_are_until_they_shrink_again() {
    let mut peer = Peer::new(Compress::Auto, flag::PACKED);
    peer.link(1e3);
    for _ in 0..20 {
        peer.store(&soft(16));
    }
    assert!(peer.compressor.packs);
    for _ in 0..40 {
        peer.link(1e3);
        peer.fetch(&hard(16));
    }
    assert!(!peer.compressor.packs, "{:?}", peer.compressor.figures());
    // One page of many transfers is looked at.
    peer.link(1e3);
    for _ in 0..64 * 20 {
        peer.store(&soft(1));
    }
    assert!(peer.compressor.packs, "{:?}", peer.compressor.figures());
}

#[test]
fn now_and_then_pages_cross_as_they_are_so_that_a_faster_link_is_noticed() {
    let mut peer = Peer::new(Compress::Auto, flag::PACKED);
    peer.link(1e3);
    for _ in 0..20 {
        peer.store(&soft(16));
    }
    assert!(peer.compressor.packs);
    // What these transfers show from here on is a link without any delay.
    let (content, mut packed, mut raw) = (soft(256), 0, 0);
    while peer.compressor.packs {
        let crossed = peer.store(&content);
        packed += u64::from(crossed < content.len());
        raw += u64::from(crossed == content.len());
        assert!(packed + raw <= 2 * (PACKED + TRIAL) / content.len() as u64, "{packed} MiB and {raw} MiB");
    }
    assert!((30..=33).contains(&packed) && (1..=2).contains(&raw), "{packed} MiB and {raw} MiB");
}

#[test]
fn nothing_is_packed_with_a_helper_that_does_not_know_it_or_where_it_is_switched_off() {
    for (mode, flags) in [(Compress::On, 0), (Compress::Auto, 0), (Compress::Off, flag::PACKED)] {
        let mut peer = Peer::new(mode, flags);
        peer.link(1e3);
        for _ in 0..100 {
            assert_eq!((peer.store(&soft(2)), peer.fetch(&soft(2))), (2 * PAGE, 2 * PAGE));
        }
    }
    let mut always = Peer::new(Compress::On, flag::PACKED);
    always.link(1e12);
    assert!(always.store(&soft(2)) < PAGE && always.fetch(&soft(2)) < PAGE);
    assert_eq!(always.fetch(&hard(2)), 2 * PAGE, "what does not shrink goes as it is");
}

#[test]
fn a_helper_that_sends_what_cannot_be_unpacked_is_refused_and_asked_for_pages_as_they_are() {
    let packing = Some(Packing { packed: true, took: Duration::MAX });
    let mut peer = Peer::new(Compress::On, flag::PACKED);
    assert_eq!(peer.compressor.fetch(1, PAGE, Urgency::Fault), flag::PACKED);
    let mut bad = answer(1, Buffer::empty(), Buffer::zeroed(PAGE), 40, packing);
    assert!(peer.compressor.answered(&mut bad).is_err());
    assert_eq!(peer.fetch(&soft(1)), PAGE);
    for status in [Status::MALFORMED, status::UNSUPPORTED] {
        let mut peer = Peer::new(Compress::On, flag::PACKED);
        let (payload, flags) = peer.compressor.store(1, soft(1));
        assert_eq!(flags, flag::PACKED);
        let mut refused = answer(1, payload, Buffer::empty(), 0, None);
        refused.status = status;
        assert_eq!(peer.compressor.answered(&mut refused), Ok(()));
        assert_eq!(peer.store(&soft(1)), PAGE);
    }
    let mut peer = Peer::new(Compress::On, flag::PACKED);
    peer.compressor.fetch(1, PAGE, Urgency::Fault);
    let mut bad = answer(1, Buffer::empty(), Buffer::zeroed(PAGE), PAGE, None);
    bad.body = transport::wire::Body::from_slice(&[7; 3]);
    assert!(peer.compressor.answered(&mut bad).is_err());
}
