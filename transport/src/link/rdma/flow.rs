//! Frames over a queue pair. A frame is one message; a payload that is not small is read or written by the
//! answering side in the asking side's *staging memory*, the only memory that it can reach: guest memory
//! is copied to and from there and never registered, because its pages may leave it (a balloon, a page that
//! moves to another PC), which a registered page cannot.

use std::collections::{HashMap, VecDeque};
use std::time::Instant;

use smallvec::SmallVec;

use super::queue::{Done, Queue, SLOTS, Transfer, WORKS, Work};
use crate::buffer::Buffer;
use crate::core::stream::{Outgoing, Peer, Place};
use crate::pool::Pool;
use crate::wire::rdma::{self, INLINE, Message, SEGMENTS, Segment, Segments};
use crate::wire::{Body, Fault, HEADER, Header, Kind};

/// Bytes of staging memory.
const STAGING: u64 = 8 << 20;

/// Payload bytes that are fetched at once.
const FETCHES: usize = 4 << 20;

/// Requests whose answer's place is remembered: more than any asking side is granted.
const PLACES: usize = 1 << 16;

/// Operations of one frame at most.
const WORKS_OF_ONE: u32 = SEGMENTS as u32 + 1;

/// A payload of a message.
type Inline = SmallVec<[u8; INLINE]>;

/// What lies in staging memory for a request that has no reply.
struct Staged {
    /// The other side may read it until it has replied.
    _payload: Option<Buffer>,
    /// Where the reply's payload comes to lie.
    answer: Option<Buffer>,
}

/// A request whose payload waits to be fetched, in a receiving slot that is not given back yet.
struct Waiting {
    slot: u16,
    header: Header,
    body: Body,
    payload: Segments,
    answer: Segments,
}

/// A group of operations that is under way.
enum Group {
    /// A frame; with the copy that the device reads.
    Frame { frame: Outgoing, slot: u16, _staged: Option<Buffer>, works: u32 },
    /// A message without one.
    Message { slot: u16, probe: bool },
    /// A payload that is fetched, by way of staging memory if that is what the device can reach.
    Fetch { header: Header, body: Body, answer: Segments, buffer: Buffer, staged: Option<Buffer>, works: u32 },
}

/// Whether a frame could be launched.
#[expect(clippy::large_enum_variant, reason = "it is looked at once, where it is made")]
enum Launch {
    /// It is under way.
    Done,
    /// Staging memory is missing for now.
    Later(Outgoing),
}

/// See the [module](self).
pub(super) struct Flow {
    queue: Box<dyn Queue>,
    /// Messages that the other side has room for.
    credit: u16,
    most_credit: u16,
    /// Room of ours that was made free and not said yet.
    owed: u16,
    free: Vec<u16>,
    /// Operations that the queue still takes.
    room: u32,
    groups: VecDeque<Group>,
    works: Vec<(Work, bool)>,
    stalled: Option<Outgoing>,
    /// Asking side: by request.
    staged: HashMap<u64, Staged>,
    /// Answering side: where the answers of requests go.
    places: HashMap<u64, Segments>,
    staging: Pool,
    waiting: VecDeque<Waiting>,
    fetching: usize,
    done: Vec<Done>,
    /// Messages that came before the other side said that they count.
    early: VecDeque<(u16, u32)>,
    blocked: Option<Instant>,
    /// The probe came through.
    proved: bool,
}

impl Flow {
    /// A flow over a connected queue pair whose other side has room for `slots` messages.
    pub(super) fn new(queue: Box<dyn Queue>, slots: u16) -> Self {
        Self {
            queue,
            credit: slots,
            most_credit: slots,
            owed: 0,
            free: (0..SLOTS).collect(),
            room: WORKS,
            groups: VecDeque::new(),
            works: Vec::new(),
            stalled: None,
            staged: HashMap::new(),
            places: HashMap::new(),
            staging: Pool::new(STAGING),
            waiting: VecDeque::new(),
            fetching: 0,
            done: Vec::new(),
            early: VecDeque::new(),
            blocked: None,
            proved: false,
        }
    }

    pub(super) fn queue(&mut self) -> &mut dyn Queue {
        self.queue.as_mut()
    }

    /// Whether completions were taken from the queue and not handled yet.
    pub(super) fn stirs(&mut self) -> bool {
        self.queue.poll(&mut self.done);
        !self.done.is_empty()
    }

    /// Whether everything that was handed over is with the other side.
    pub(super) fn is_flushed(&self) -> bool {
        self.stalled.is_none() && self.groups.is_empty()
    }

    pub(super) fn blocked_since(&self) -> Option<Instant> {
        self.blocked
    }

    pub(super) fn has_proved(&self) -> bool {
        self.proved
    }

    /// Sends a message as long as the longest.
    pub(super) fn probe(&mut self) -> Result<(), Fault> {
        let slot = self.free.pop().ok_or_else(|| broke("there is no slot"))?;
        let len = rdma::encode_probe(self.queue.slot(slot)).ok_or_else(|| broke("a slot is too small"))?;
        self.message(slot, len, true);
        self.flush()
    }

    fn message(&mut self, slot: u16, len: usize, probe: bool) {
        self.credit = self.credit.saturating_sub(1);
        self.works.push((Work::Send { slot, len: len as u32 }, true));
        self.room = self.room.saturating_sub(1);
        self.groups.push_back(Group::Message { slot, probe });
    }

    /// Hands what was gathered to the device.
    fn flush(&mut self) -> Result<(), Fault> {
        let result = self.queue.post(&self.works);
        self.works.clear();
        result.map_err(|e| broke(&e.to_string()))
    }

    /// Handles what completed. `counts`: the other side said that its messages count by now.
    ///
    /// # Errors
    /// The queue pair broke, or the other side broke the protocol.
    pub(super) fn progress(&mut self, counts: bool, peer: &mut dyn Peer) -> Result<bool, Fault> {
        let mut heard = false;
        loop {
            if counts {
                while let Some((slot, len)) = self.early.pop_front() {
                    self.message_came(slot, len, peer)?;
                    heard = true;
                }
            }
            self.queue.poll(&mut self.done);
            if self.done.is_empty() {
                break;
            }
            let mut done = std::mem::take(&mut self.done);
            for what in done.drain(..) {
                match what {
                    Done::Received { slot, len } if counts => {
                        self.message_came(slot, len, peer)?;
                        heard = true;
                    }
                    Done::Received { slot, len } => self.early.push_back((slot, len)),
                    Done::Group => self.group_done(peer)?,
                    Done::Failed(why) => return Err(broke(&why)),
                }
            }
            self.done = done;
        }
        self.fetch(peer)?;
        self.flush()?;
        Ok(heard)
    }

    fn group_done(&mut self, peer: &mut dyn Peer) -> Result<(), Fault> {
        match self.groups.pop_front().ok_or_else(|| broke("it did more than it was asked"))? {
            Group::Frame { frame, slot, works, .. } => {
                self.free.push(slot);
                self.room += works;
                peer.sent(&frame);
            }
            Group::Message { slot, probe } => {
                self.free.push(slot);
                self.room += 1;
                self.proved |= probe;
            }
            Group::Fetch { header, body, answer, buffer, staged, works } => {
                self.room += works;
                self.fetching = self.fetching.saturating_sub(buffer.len());
                if let Some(staged) = staged {
                    buffer.copy_from(&staged, buffer.len());
                }
                self.note_place(header.id, answer)?;
                peer.fetched(&header, &body, buffer)?;
            }
        }
        Ok(())
    }

    /// Remembers where the answer of request `id` goes.
    fn note_place(&mut self, id: u64, answer: Segments) -> Result<(), Fault> {
        if answer.is_empty() {
            return Ok(());
        }
        if self.places.len() >= PLACES {
            return Err(Fault::OverCredit);
        }
        self.places.insert(id, answer);
        Ok(())
    }

    fn message_came(&mut self, slot: u16, len: u32, peer: &mut dyn Peer) -> Result<(), Fault> {
        let (credits, frame) = match rdma::decode(self.queue.received(slot, len))? {
            (credits, Message::Frame { header, body, inline, payload, answer }) => {
                let (body, inline) = (Body::from_slice(body), Inline::from_slice(inline));
                (credits, Some((header, body, inline, payload, answer)))
            }
            (credits, Message::Credit | Message::Probe) => (credits, None),
        };
        let credit = self.credit.checked_add(credits).filter(|sum| *sum <= self.most_credit);
        self.credit = credit.ok_or(Fault::Protocol("more RDMA credit than there is"))?;
        let Some((header, body, inline, payload, answer)) = frame else { return self.give_back(slot) };
        if !payload.is_empty() {
            self.waiting.push_back(Waiting { slot, header, body, payload, answer });
            return Ok(());
        }
        self.give_back(slot)?;
        match header.kind {
            Kind::Reply => self.reply_came(&header, &body, &inline, peer),
            _ => {
                self.note_place(header.id, answer)?;
                let place = peer.begin(&header, &body)?;
                if let Place::Buffer(buffer) = place {
                    buffer.write_at(0, &inline);
                }
                peer.end();
                Ok(())
            }
        }
    }

    fn reply_came(
        &mut self,
        header: &Header,
        body: &[u8],
        inline: &[u8],
        peer: &mut dyn Peer,
    ) -> Result<(), Fault> {
        let place = peer.begin(header, body)?;
        let staged = self.staged.remove(&header.id);
        let len = header.payload_len as usize;
        match place {
            Place::Discard => {}
            Place::Buffer(buffer) if !inline.is_empty() => {
                buffer.write_at(0, inline);
            }
            Place::Buffer(buffer) => {
                let answer = staged.as_ref().and_then(|staged| staged.answer.as_ref());
                let answer = answer.filter(|answer| answer.len() >= len);
                let answer = answer.ok_or(Fault::Protocol("a reply whose payload has no place"))?;
                buffer.copy_from(answer, len);
            }
        }
        peer.end();
        Ok(())
    }

    /// The message in `slot` was taken.
    fn give_back(&mut self, slot: u16) -> Result<(), Fault> {
        self.queue.repost(slot).map_err(|e| broke(&e.to_string()))?;
        self.owed += 1;
        Ok(())
    }

    /// Starts to fetch payloads, in the order of their requests, as far as there is room.
    fn fetch(&mut self, peer: &mut dyn Peer) -> Result<(), Fault> {
        while let Some(next) = self.waiting.front() {
            let (len, works) = (next.header.payload_len as usize, next.payload.len() as u32);
            if self.room < works || self.fetching > 0 && self.fetching + len > FETCHES {
                break;
            }
            let Some(buffer) = peer.room(len) else { break };
            let (at, key, staged) = match self.reach(&buffer) {
                Some((at, key)) => (at, key, None),
                None => match self.stage(len) {
                    Some((staged, at, key)) => (at, key.local, Some(staged)),
                    None => break,
                },
            };
            let Some(Waiting { slot, header, body, payload, answer }) = self.waiting.pop_front() else {
                break;
            };
            self.give_back(slot)?;
            transfers(at, key, &payload, len, Work::Read, &mut self.works);
            if let Some((_, ends)) = self.works.last_mut() {
                *ends = true;
            }
            self.room -= works;
            self.fetching += len;
            self.groups.push_back(Group::Fetch { header, body, answer, buffer, staged, works });
        }
        Ok(())
    }

    /// Where the device finds `buffer`, if it can reach it.
    fn reach(&mut self, buffer: &Buffer) -> Option<(u64, u32)> {
        let (region, at) = buffer.region()?;
        let keys = self.queue.register(region)?;
        Some((at, keys.local))
    }

    /// Staging memory of `len` bytes; `None`: not now.
    fn stage(&mut self, len: usize) -> Option<(Buffer, u64, super::queue::Keys)> {
        let buffer = self.staging.pooled(len)?;
        let (region, at) = buffer.region()?;
        let keys = self.queue.register(region)?;
        Some((buffer, at, keys))
    }

    /// Sends what `peer` has ready, as far as there is room for it.
    ///
    /// # Errors
    /// The queue pair broke.
    pub(super) fn send(&mut self, peer: &mut dyn Peer) -> Result<(), Fault> {
        self.fetch(peer)?;
        loop {
            // The last credit is kept for a message that gives credit back, or both sides could wait.
            let fits = self.credit >= 2 && self.room >= WORKS_OF_ONE && !self.free.is_empty();
            if !fits {
                self.blocked.get_or_insert_with(Instant::now);
                break;
            }
            let Some(frame) = self.stalled.take().or_else(|| peer.next()) else {
                self.blocked = None;
                break;
            };
            if let Launch::Later(frame) = self.launch(frame)? {
                if self.staged.is_empty() && self.groups.is_empty() {
                    return Err(broke("no memory can be locked for it (see `ulimit -l`)"));
                }
                self.stalled = Some(frame);
                self.blocked.get_or_insert_with(Instant::now);
                break;
            }
            self.blocked = None;
        }
        if self.owed >= SLOTS / 2
            && self.credit >= 1
            && self.room >= 1
            && let Some(slot) = self.free.pop()
        {
            let owed = std::mem::take(&mut self.owed);
            let len = rdma::encode_credit(self.queue.slot(slot), owed).unwrap_or(0);
            self.message(slot, len, false);
        }
        self.flush()
    }

    /// Encodes a frame and gathers its operations.
    fn launch(&mut self, frame: Outgoing) -> Result<Launch, Fault> {
        let header = frame.head.first_chunk::<HEADER>().ok_or_else(|| broke("a frame without a header"))?;
        let header = Header::decode(header)?;
        let len = frame.payload.len();
        let (mut payload, mut answer) = (Segments::new(), Segments::new());
        let (mut staged, mut works) = (None, 1);
        let inline = if len <= INLINE { frame.payload.to_vec() } else { Vec::new() };
        match header.kind {
            Kind::Request => {
                let Some(entry) = self.stage_request(&header, &frame, &mut payload, &mut answer) else {
                    return Ok(Launch::Later(frame));
                };
                if entry._payload.is_some() || entry.answer.is_some() {
                    self.staged.insert(header.id, entry);
                }
            }
            Kind::Reply if len > INLINE => {
                let (at, key) = match self.reach(&frame.payload) {
                    Some(found) => found,
                    None => {
                        let Some((copy, at, key)) = self.stage(len) else {
                            return Ok(Launch::Later(frame));
                        };
                        copy.copy_from(&frame.payload, len);
                        staged = Some(copy);
                        (at, key.local)
                    }
                };
                let to = self.places.remove(&header.id).unwrap_or_default();
                let before = self.works.len();
                let placed = transfers(at, key, &to, len, Work::Write, &mut self.works);
                if placed < len {
                    return Err(broke("a reply is longer than its place"));
                }
                works += (self.works.len() - before) as u32;
            }
            Kind::Reply => drop(self.places.remove(&header.id)),
            _ => {}
        }
        let slot = self.free.pop().ok_or_else(|| broke("there is no slot"))?;
        let owed = std::mem::take(&mut self.owed);
        let encoded =
            rdma::encode_frame(self.queue.slot(slot), owed, &frame.head, &inline, &payload, &answer);
        let len = encoded.ok_or_else(|| broke("a frame does not fit"))?;
        self.works.push((Work::Send { slot, len: len as u32 }, true));
        self.room = self.room.saturating_sub(works);
        self.credit -= 1;
        // A copy was made of a request's payload; a reply's may be what the device reads.
        let frame = match header.kind {
            Kind::Request => Outgoing { payload: Buffer::empty(), ..frame },
            _ => frame,
        };
        self.groups.push_back(Group::Frame { frame, slot, _staged: staged, works });
        Ok(Launch::Done)
    }

    /// Puts a request's payload into staging memory, and finds a place there for its answer.
    fn stage_request(
        &mut self,
        header: &Header,
        frame: &Outgoing,
        payload: &mut Segments,
        answer: &mut Segments,
    ) -> Option<Staged> {
        let (has, wants) = (frame.payload.len(), header.answer_len as usize);
        let segment = |at, len: usize, keys: super::queue::Keys| Segment {
            address: at,
            len: len as u32,
            key: keys.remote,
        };
        let mut staged = Staged { _payload: None, answer: None };
        if has > INLINE {
            let (copy, at, keys) = self.stage(has)?;
            copy.copy_from(&frame.payload, has);
            payload.push(segment(at, has, keys));
            staged._payload = Some(copy);
        }
        if wants > INLINE {
            let (place, at, keys) = self.stage(wants)?;
            answer.push(segment(at, wants, keys));
            staged.answer = Some(place);
        }
        Some(staged)
    }

    /// The memory of request `id` is wanted by its owner. What is under way lies in copies.
    pub(super) fn let_go(&mut self, id: u64) {
        if let Some(frame) = self.stalled.as_mut().filter(|frame| frame.id == id) {
            frame.payload = Buffer::from_vec(frame.payload.to_vec());
        }
    }
}

/// Appends the operations that move `len` bytes between local memory at `at` and `segments`; returns how many
/// bytes found a place.
fn transfers(
    at: u64,
    local_key: u32,
    segments: &[Segment],
    len: usize,
    work: impl Fn(Transfer) -> Work,
    works: &mut Vec<(Work, bool)>,
) -> usize {
    let mut placed = 0;
    for segment in segments {
        let now = (len - placed).min(segment.len as usize);
        if now == 0 {
            break;
        }
        let local = at + placed as u64;
        let transfer =
            Transfer { local, local_key, len: now as u32, remote: segment.address, remote_key: segment.key };
        works.push((work(transfer), false));
        placed += now;
    }
    placed
}

/// The queue pair is of no use any more.
pub(super) fn broke(why: &str) -> Fault {
    Fault::Network(format!("RDMA: {why}"))
}
