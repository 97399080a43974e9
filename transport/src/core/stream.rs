//! Frames out of bytes and bytes out of frames. A byte-stream link (TCP, TLS) is built on these two; a
//! link with messages of its own (RDMA) calls [`Peer`] directly.

use std::collections::VecDeque;

use smallvec::SmallVec;

use crate::buffer::Buffer;
use crate::carrier::Carrier;
use crate::link::tls::handshake::Proven;
use crate::wire::{Fault, HEADER, HELLO_MOST, Header, OLDEST_VERSION, PREFACE, Preface};

/// Bytes taken from the queues ahead of the network. What is ahead goes out before anything more urgent.
pub(crate) const AHEAD: usize = 256 << 10;

/// Frames taken ahead of the network: two segments each, as a rule, and a system call takes 1,024.
const FRAMES_AHEAD: usize = 256;

/// Segments in one system call.
const SEGMENTS: usize = 1024;

/// A frame's header and body; a hello.
pub(crate) type Head = SmallVec<[u8; 96]>;

/// One frame on its way out.
#[derive(Debug)]
pub(crate) struct Outgoing {
    /// Header and body, or a whole hello.
    pub(crate) head: Head,
    /// What follows it.
    pub(crate) payload: Buffer,
    /// The request it belongs to; 0 for none.
    pub(crate) id: u64,
    /// Bytes of credit that come back when it is sent.
    pub(crate) cost: u64,
}

impl Outgoing {
    /// Its bytes on the wire.
    pub(crate) fn len(&self) -> usize {
        self.head.len() + self.payload.len()
    }
}

/// Where an incoming payload goes.
#[derive(Debug)]
pub(crate) enum Place {
    /// Into a buffer of exactly its length.
    Buffer(Buffer),
    /// Nowhere.
    Discard,
}

/// One side of the protocol, as a link sees it.
pub(crate) trait Peer {
    /// The connection is encrypted, and the other side has proven who it is. Comes before everything else.
    fn secured(&mut self, carrier: Carrier, proven: Proven) -> Result<(), Fault>;
    /// The other side's preface came: the newest version that both speak.
    fn version(&mut self, version: u16);
    /// The other side's hello came (what follows the preface).
    fn hello(&mut self, hello: &[u8]) -> Result<(), Fault>;
    /// The other side speaks no version that we do.
    fn other_version(&mut self);
    /// A frame's head came. Says where its payload goes.
    fn begin(&mut self, header: &Header, body: &[u8]) -> Result<Place, Fault>;
    /// The frame that began last is complete. Called for every frame.
    fn end(&mut self);
    /// The next frame to send, the most urgent first.
    fn next(&mut self) -> Option<Outgoing>;
    /// The last byte of the frame was handed to the network.
    fn sent(&mut self, frame: &Outgoing);

    /// A buffer for a request's payload that the link fetches by itself; `None`: not now.
    fn room(&mut self, _len: usize) -> Option<Buffer> {
        None
    }

    /// A request whose payload the link fetched is complete. Stands for `begin` and `end`.
    fn fetched(&mut self, _header: &Header, _body: &[u8], _payload: Buffer) -> Result<(), Fault> {
        Err(Fault::Protocol("a payload to be fetched where nothing is asked"))
    }
}

/// Takes frames apart as bytes come in.
pub(crate) struct Decoder {
    stage: Stage,
    partial: SmallVec<[u8; 128]>,
    place: Place,
    filled: usize,
    len: usize,
    version: u16,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Preface,
    Hello,
    Head,
    Payload,
}

impl Decoder {
    /// At the start of a connection: the first bytes are a hello.
    pub(crate) fn new() -> Self {
        Self {
            stage: Stage::Preface,
            partial: SmallVec::new(),
            place: Place::Discard,
            filled: 0,
            len: 0,
            version: OLDEST_VERSION,
        }
    }

    /// Takes all of `bytes`.
    ///
    /// # Errors
    /// The other side broke the format or a rule; the decoder is of no use any more.
    pub(crate) fn feed(&mut self, mut bytes: &[u8], peer: &mut dyn Peer) -> Result<(), Fault> {
        while !bytes.is_empty() {
            if self.stage == Stage::Payload {
                let (now, rest) = bytes.split_at(bytes.len().min(self.len - self.filled));
                if let Place::Buffer(buffer) = &self.place {
                    buffer.write_at(self.filled, now);
                }
                bytes = rest;
                self.advance(now.len(), peer);
                continue;
            }
            if self.partial.is_empty() {
                // The usual case: the head lies whole in what came.
                let used = self.head(bytes, peer)?;
                if used > 0 {
                    bytes = &bytes[used..];
                    continue;
                }
            }
            let missing = wanted(self.stage, self.len, &self.partial).saturating_sub(self.partial.len());
            let (now, rest) = bytes.split_at(bytes.len().min(missing.max(1)));
            self.partial.extend_from_slice(now);
            bytes = rest;
            let partial = std::mem::take(&mut self.partial);
            if self.head(&partial, peer)? == 0 {
                self.partial = partial;
            }
        }
        Ok(())
    }

    /// Handles the preface, hello or frame head at the start of `bytes`; 0 if it is not all there.
    fn head(&mut self, bytes: &[u8], peer: &mut dyn Peer) -> Result<usize, Fault> {
        if self.stage == Stage::Preface {
            // Something else may be shorter and then wait for us for ever.
            Preface::begins(bytes).inspect_err(|fault| {
                if *fault == Fault::TlsPeer {
                    peer.other_version();
                }
            })?;
        }
        let want = wanted(self.stage, self.len, bytes);
        let Some(whole) = bytes.get(..want) else { return Ok(0) };
        match self.stage {
            Stage::Preface => {
                let Some(preface) = whole.first_chunk::<PREFACE>() else { return Ok(0) };
                let preface = Preface::decode(preface).inspect_err(|fault| {
                    if matches!(fault, Fault::Version { .. }) {
                        peer.other_version();
                    }
                })?;
                self.version = preface.common();
                peer.version(self.version);
                self.stage = Stage::Hello;
                self.len = usize::from(preface.len).min(HELLO_MOST);
                if self.len == 0 {
                    return Err(Fault::Protocol("a hello that is too short"));
                }
            }
            Stage::Hello => {
                peer.hello(whole)?;
                self.stage = Stage::Head;
            }
            Stage::Head | Stage::Payload => {
                let Some((head, body)) = whole.split_first_chunk::<HEADER>() else { return Ok(0) };
                let header = Header::decode(head)?;
                if header.kind.since() > self.version {
                    return Err(Fault::Protocol("a frame of a version that was not agreed on"));
                }
                self.place = peer.begin(&header, body)?;
                (self.len, self.filled) = (header.payload_len as usize, 0);
                if let Place::Buffer(buffer) = &self.place {
                    debug_assert_eq!(buffer.len(), self.len, "the place has the payload's length");
                    if buffer.len() < self.len {
                        self.place = Place::Discard;
                    }
                }
                self.stage = Stage::Payload;
                self.advance(0, peer);
            }
        }
        Ok(want)
    }

    fn advance(&mut self, n: usize, peer: &mut dyn Peer) {
        self.filled += n;
        if self.filled == self.len {
            self.stage = Stage::Head;
            self.place = Place::Discard;
            peer.end();
        }
    }

    /// The rest of the place of the payload that is coming in, to receive straight into.
    pub(crate) fn direct(&self) -> Option<Buffer> {
        match &self.place {
            Place::Buffer(buffer) if self.stage == Stage::Payload => {
                buffer.slice(self.filled, self.len - self.filled)
            }
            _ => None,
        }
    }

    /// `n` bytes of [`direct`](Self::direct) were filled.
    pub(crate) fn filled(&mut self, n: usize, peer: &mut dyn Peer) {
        if self.stage == Stage::Payload {
            self.advance(n.min(self.len - self.filled), peer);
        }
    }

    /// Throws the payload that is coming in away: its place is needed by its owner.
    pub(crate) fn discard(&mut self) {
        self.place = Place::Discard;
    }

    /// Length of the payload that is coming in, or came in last.
    pub(crate) fn payload_len(&self) -> usize {
        self.len
    }

    /// Whether the other side's hello came.
    pub(crate) fn greeted(&self) -> bool {
        matches!(self.stage, Stage::Head | Stage::Payload)
    }
}

/// How many bytes the head that starts with `have` has, as far as is known yet.
fn wanted(stage: Stage, hello_len: usize, have: &[u8]) -> usize {
    match stage {
        Stage::Preface => PREFACE,
        Stage::Hello => hello_len,
        Stage::Head | Stage::Payload => match have {
            [_, _, _, _, _, _, low, high, ..] if have.len() >= HEADER => {
                HEADER + usize::from(u16::from_le_bytes([*low, *high]))
            }
            _ => HEADER,
        },
    }
}

/// Frames that were taken from a [`Peer`] and are not all on the network yet.
#[derive(Default)]
pub(crate) struct Outqueue {
    frames: VecDeque<Outgoing>,
    /// Bytes of the first frame that are on the network.
    offset: usize,
    bytes: usize,
}

impl Outqueue {
    /// Takes frames from `peer`, up to [`AHEAD`] bytes.
    pub(crate) fn fill(&mut self, peer: &mut dyn Peer) {
        while self.bytes < AHEAD && self.frames.len() < FRAMES_AHEAD {
            let Some(frame) = peer.next() else { break };
            self.bytes += frame.len();
            self.frames.push_back(frame);
        }
    }

    /// Whether there is nothing to send.
    pub(crate) fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// How many bytes there are to send.
    pub(crate) fn len(&self) -> usize {
        self.bytes
    }

    /// Copies the first bytes to send to `into`, and returns how many.
    pub(crate) fn read(&self, into: &mut [u8]) -> usize {
        let (mut skip, mut filled) = (self.offset, 0);
        for frame in &self.frames {
            if filled == into.len() {
                break;
            }
            if let Some(head) = frame.head.get(skip..) {
                let n = head.len().min(into.len() - filled);
                into[filled..filled + n].copy_from_slice(&head[..n]);
                filled += n;
            }
            let skipped = skip.saturating_sub(frame.head.len());
            filled += frame.payload.read_at(skipped, &mut into[filled..]);
            skip = 0;
        }
        filled
    }

    /// The bytes to send, as segments. They are valid until this queue changes.
    pub(crate) fn gather(&self, segments: &mut Vec<libc::iovec>) {
        segments.clear();
        let mut skip = self.offset;
        for frame in &self.frames {
            let head =
                libc::iovec { iov_base: frame.head.as_ptr().cast_mut().cast(), iov_len: frame.head.len() };
            for v in std::iter::once(&head).chain(frame.payload.iovecs()) {
                if segments.len() == SEGMENTS {
                    return;
                }
                if skip >= v.iov_len {
                    skip -= v.iov_len;
                    continue;
                }
                let base = v.iov_base.cast::<u8>().wrapping_add(skip).cast();
                segments.push(libc::iovec { iov_base: base, iov_len: v.iov_len - skip });
                skip = 0;
            }
        }
    }

    /// The first `n` bytes are on the network.
    pub(crate) fn wrote(&mut self, n: usize, peer: &mut dyn Peer) {
        self.offset += n;
        self.bytes = self.bytes.saturating_sub(n);
        while let Some(frame) = self.frames.front() {
            if self.offset < frame.len() {
                break;
            }
            self.offset -= frame.len();
            peer.sent(frame);
            self.frames.pop_front();
        }
    }

    /// Drops everything. `true`: no frame was on the network in part.
    pub(crate) fn clear(&mut self) -> bool {
        let whole = self.offset == 0;
        *self = Self::default();
        whole
    }

    /// Copies the payload of the request `id`, if it is here: its owner wants the memory back.
    pub(crate) fn detach(&mut self, id: u64) {
        for frame in self.frames.iter_mut().filter(|f| f.id == id && !f.payload.is_empty()) {
            frame.payload = Buffer::from_vec(frame.payload.to_vec());
        }
    }

    /// Takes up to `most` bytes out, for links in memory.
    #[cfg(test)]
    pub(crate) fn take(&mut self, most: usize, peer: &mut dyn Peer) -> Vec<u8> {
        let mut out = Vec::new();
        let mut skip = self.offset;
        for frame in &self.frames {
            out.extend_from_slice(frame.head.get(skip..).unwrap_or_default());
            let skipped = skip.saturating_sub(frame.head.len());
            let rest = frame.payload.len().saturating_sub(skipped).min(most);
            out.extend(frame.payload.slice(skipped, rest).unwrap_or_default().to_vec());
            skip = 0;
            if out.len() >= most {
                break;
            }
        }
        out.truncate(most);
        self.wrote(out.len(), peer);
        out
    }
}
