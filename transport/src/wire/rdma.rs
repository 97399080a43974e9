//! What moving a connection to RDMA adds to the format in version 2: the bodies of
//! [`Offer`](super::Kind::Offer) and [`Accept`](super::Kind::Accept), and the message that carries one frame
//! over a queue pair. Drawn in `docs/wire.md`.

use smallvec::SmallVec;

use super::{Fault, HEADER, Header, Kind, MAX_BODY, MAX_PAYLOAD};

/// Length of [`Place`] in bytes.
const PLACE: usize = 48;

/// Length of a message's head in bytes.
pub(crate) const PREFIX: usize = 8;

/// Length of one segment in bytes.
pub(crate) const SEGMENT: usize = 16;

/// Longest message in bytes: a head, a header, a body, and room for segments or a small payload.
pub(crate) const SLOT: usize = PREFIX + HEADER + MAX_BODY + 472;

/// The longest payload that travels inside its message; longer ones are read and written by the answering
/// side where they lie.
pub(crate) const INLINE: usize = 256;

/// Most segments that one payload lies in.
pub(crate) const SEGMENTS: usize = 16;

/// Code of an [`Accept`](super::Kind::Accept).
pub(crate) mod code {
    /// The body is a [`Place`](super::Place).
    pub(crate) const OK: u16 = 0;
    /// Not now: the body says why. It may be offered again later.
    pub(crate) const LATER: u16 = 1;
    /// Never on this connection: the body says why.
    pub(crate) const NEVER: u16 = 2;
}

/// Where one side's queue pair is, and what it takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// Global identifier of the port: on RoCE its IP address.
    pub(crate) gid: [u8; 16],
    /// Number of the queue pair, 24 bits.
    pub(crate) queue_pair: u32,
    /// The number of the first packet that it sends, 24 bits.
    pub(crate) packet: u32,
    /// Local identifier of the port; 0 on Ethernet.
    pub(crate) lid: u16,
    /// Largest payload of a packet, as InfiniBand numbers it: 1 (256 bytes) to 5 (4,096).
    pub(crate) mtu: u8,
    /// Whether the link is InfiniBand and not Ethernet.
    pub(crate) infiniband: bool,
    /// How many READs it answers at once.
    pub(crate) reads: u8,
    /// How many messages it has room for.
    pub(crate) slots: u16,
    /// Length of that room in bytes.
    pub(crate) slot: u32,
}

impl Place {
    /// The bytes on the wire.
    pub(crate) fn encode(&self) -> [u8; PLACE] {
        let mut bytes = [0; PLACE];
        bytes[..16].copy_from_slice(&self.gid);
        bytes[16..20].copy_from_slice(&self.queue_pair.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.packet.to_le_bytes());
        bytes[24..26].copy_from_slice(&self.lid.to_le_bytes());
        bytes[26] = self.mtu;
        bytes[27] = u8::from(self.infiniband);
        bytes[28] = self.reads;
        bytes[30..32].copy_from_slice(&self.slots.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.slot.to_le_bytes());
        bytes
    }

    /// Reads and checks a place. What later versions append is skipped.
    ///
    /// # Errors
    /// It is too short, or a field has a value that no queue pair has.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, Fault> {
        let bytes: &[u8; PLACE] =
            bytes.first_chunk().ok_or(Fault::Protocol("an RDMA address that is too short"))?;
        let [gid @ .., q0, q1, q2, q3, p0, p1, p2, p3, l0, l1, mtu, link, reads, _, n0, n1, s0, s1, s2, s3] =
            bytes.first_chunk::<36>().ok_or(Fault::Protocol("an RDMA address that is too short"))?;
        let place = Self {
            gid: *gid,
            queue_pair: u32::from_le_bytes([*q0, *q1, *q2, *q3]),
            packet: u32::from_le_bytes([*p0, *p1, *p2, *p3]),
            lid: u16::from_le_bytes([*l0, *l1]),
            mtu: *mtu,
            infiniband: *link == 1,
            reads: *reads,
            slots: u16::from_le_bytes([*n0, *n1]),
            slot: u32::from_le_bytes([*s0, *s1, *s2, *s3]),
        };
        let numbers = place.queue_pair < 1 << 24 && place.packet < 1 << 24;
        let sizes = (1..=5).contains(&place.mtu) && place.slots >= 4 && place.slot as usize >= SLOT;
        if !numbers || !sizes || *link > 1 {
            return Err(Fault::Protocol("an RDMA address that makes no sense"));
        }
        Ok(place)
    }
}

/// A range of the asking side's memory that the answering side may reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) address: u64,
    pub(crate) len: u32,
    pub(crate) key: u32,
}

/// The segments of one payload.
pub(crate) type Segments = SmallVec<[Segment; 1]>;

/// What a message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum What {
    /// It carries a frame.
    Frame = 1,
    /// It gives credit back and carries nothing.
    Credit = 2,
    /// It shows that the way works, and carries nothing of meaning.
    Probe = 3,
}

/// A message that came in.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Message<'a> {
    /// A frame.
    Frame {
        /// Its header.
        header: Header,
        /// Its body.
        body: &'a [u8],
        /// Its payload, if that is small.
        inline: &'a [u8],
        /// A request's payload, if it is not.
        payload: Segments,
        /// Where a request's answer goes, if it is not small.
        answer: Segments,
    },
    /// Credit alone.
    Credit,
    /// A probe.
    Probe,
}

/// Writes a message into `slot` and returns its length. `None`: it does not fit.
pub(crate) fn encode_frame(
    slot: &mut [u8],
    credits: u16,
    head: &[u8],
    inline: &[u8],
    payload: &[Segment],
    answer: &[Segment],
) -> Option<usize> {
    let (header, body) = head.split_first_chunk::<HEADER>()?;
    let mut at = 0;
    let mut put = |bytes: &[u8]| {
        slot.get_mut(at..at + bytes.len())?.copy_from_slice(bytes);
        at += bytes.len();
        Some(())
    };
    put(&prefix(What::Frame, credits, payload.len() as u8, answer.len() as u8))?;
    put(header)?;
    for segment in payload.iter().chain(answer) {
        put(&segment.address.to_le_bytes())?;
        put(&segment.len.to_le_bytes())?;
        put(&segment.key.to_le_bytes())?;
    }
    put(body)?;
    put(inline)?;
    Some(at)
}

/// Writes a message that carries no frame, and returns its length.
pub(crate) fn encode_credit(slot: &mut [u8], credits: u16) -> Option<usize> {
    slot.get_mut(..PREFIX)?.copy_from_slice(&prefix(What::Credit, credits, 0, 0));
    Some(PREFIX)
}

/// Makes all of `slot` a probe: as long as the longest message, so that it needs what that needs of the way.
pub(crate) fn encode_probe(slot: &mut [u8]) -> Option<usize> {
    slot.fill(0);
    slot.get_mut(..PREFIX)?.copy_from_slice(&prefix(What::Probe, 0, 0, 0));
    Some(slot.len())
}

fn prefix(what: What, credits: u16, payload: u8, answer: u8) -> [u8; PREFIX] {
    let [low, high] = credits.to_le_bytes();
    [what as u8, 0, low, high, payload, answer, 0, 0]
}

/// Takes a message apart: the credits that it gives back, and what it is.
///
/// # Errors
/// It breaks the format.
pub(crate) fn decode(bytes: &[u8]) -> Result<(u16, Message<'_>), Fault> {
    let short = Fault::Protocol("an RDMA message that is too short");
    let (prefix, rest) = bytes.split_first_chunk::<PREFIX>().ok_or(short.clone())?;
    let [what, zero, c0, c1, payloads, answers, z0, z1] = *prefix;
    if zero | z0 | z1 != 0 {
        return Err(Fault::Protocol("an RDMA message with unknown fields"));
    }
    let credits = u16::from_le_bytes([c0, c1]);
    if what == What::Credit as u8 || what == What::Probe as u8 {
        let message = if what == What::Credit as u8 { Message::Credit } else { Message::Probe };
        if payloads | answers != 0 || message == Message::Credit && !rest.is_empty() {
            return Err(Fault::Protocol("an RDMA message with more than it may have"));
        }
        return Ok((credits, message));
    }
    if what != What::Frame as u8 {
        return Err(Fault::Protocol("an RDMA message of an unknown kind"));
    }
    let (header, rest) = rest.split_first_chunk::<HEADER>().ok_or(short.clone())?;
    let header = Header::decode(header)?;
    if header.kind.since() > 1 {
        return Err(Fault::Protocol("a frame that has no meaning over RDMA"));
    }
    let (payload, rest) = segments(rest, payloads)?;
    let (answer, rest) = segments(rest, answers)?;
    let (body, inline) = rest.split_at_checked(header.body_len.into()).ok_or(short)?;
    check(&header, inline, &payload, &answer)?;
    Ok((credits, Message::Frame { header, body, inline, payload, answer }))
}

fn segments(bytes: &[u8], count: u8) -> Result<(Segments, &[u8]), Fault> {
    let count = usize::from(count);
    if count > SEGMENTS {
        return Err(Fault::Protocol("an RDMA message with too many segments"));
    }
    let (list, rest) = bytes
        .split_at_checked(count * SEGMENT)
        .ok_or(Fault::Protocol("an RDMA message that is too short"))?;
    let mut found = Segments::new();
    for bytes in list.chunks_exact(SEGMENT) {
        let [a0, a1, a2, a3, a4, a5, a6, a7, l0, l1, l2, l3, k0, k1, k2, k3] = *bytes else { continue };
        let segment = Segment {
            address: u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
            len: u32::from_le_bytes([l0, l1, l2, l3]),
            key: u32::from_le_bytes([k0, k1, k2, k3]),
        };
        if segment.len == 0
            || segment.len as usize > MAX_PAYLOAD
            || segment.address.checked_add(segment.len.into()).is_none()
        {
            return Err(Fault::Protocol("an RDMA segment that makes no sense"));
        }
        found.push(segment);
    }
    Ok((found, rest))
}

/// What a header and the rest of its message say about each other.
fn check(header: &Header, inline: &[u8], payload: &[Segment], answer: &[Segment]) -> Result<(), Fault> {
    let sum = |list: &[Segment]| list.iter().map(|s| u64::from(s.len)).sum::<u64>();
    let (has, wants) = (header.payload_len as usize, header.answer_len as usize);
    let carried = match header.kind {
        _ if has <= INLINE => inline.len() == has && payload.is_empty(),
        // It was put where the request said.
        Kind::Reply => inline.is_empty() && payload.is_empty(),
        _ => inline.is_empty() && sum(payload) == has as u64,
    };
    let wanted = match header.kind {
        Kind::Request if wants > INLINE => sum(answer) == wants as u64,
        _ => answer.is_empty(),
    };
    if carried && wanted { Ok(()) } else { Err(Fault::Protocol("an RDMA message of a wrong length")) }
}
