//! Whether pages are packed on their way to a helper and back: where the link is slower than the processors, by what was
//! measured on this connection.
//!
//! ```text
//!  not packing                                        packing
//!   link:  pages that cross as they are        pays    link:  after 32 MiB, 1 MiB as they are
//!   pages: one of a transfer is packed here   ──────►  pages: each transfer
//!          now and then, and thrown away      ◄──────
//!                                             does not
//! ```

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use smallvec::SmallVec;
use transport::buffer::Buffer;
use transport::channel::Answer;
use transport::wire::Status;

use super::Urgency;
use super::packed::Packer;
use super::protocol::{PAGE, Packing, flag, status};

/// Whether pages are packed between a guest and those who lend it memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Compress {
    /// While it pays, by what is measured.
    #[default]
    Auto,
    /// With every helper that knows it.
    On,
    /// Never.
    Off,
}

/// What was measured, in nanoseconds for each byte of pages.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Figures {
    /// How long the link takes.
    link: f64,
    /// How long packing takes.
    pack: f64,
    /// How long unpacking takes.
    unpack: f64,
    /// How many bytes are left of one.
    ratio: f64,
}

/// How transfers follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Load {
    /// Somebody waits for this one: packing, the link and unpacking come one after the other.
    Alone,
    /// There are more: while one is packed here, another is on the link and a third is unpacked there.
    Row,
}

/// Whether pages are to be packed from now on; `packs` says whether they are now. It has to gain a fifth to begin and a
/// twentieth to go on.
fn pays(figures: &Figures, load: Load, packs: bool) -> bool {
    let Figures { link, pack, unpack, ratio } = *figures;
    let packed = match load {
        Load::Alone => pack + ratio * link + unpack,
        Load::Row => pack.max(ratio * link).max(unpack),
    };
    packed < link * if packs { 0.95 } else { 0.8 }
}

/// The middle one of the last few: one that was held up by something else counts for nothing.
#[derive(Clone, Copy, Debug, Default)]
struct Median {
    last: [f64; 9],
    samples: usize,
}

impl Median {
    fn note(&mut self, value: f64) {
        self.last[self.samples % self.last.len()] = value;
        // Once it is full, only the remainder matters.
        self.samples =
            if self.samples + 1 == 2 * self.last.len() { self.last.len() } else { self.samples + 1 };
    }

    /// Known from a few samples on.
    fn get(&self) -> Option<f64> {
        let mut last = self.last;
        let known = &mut last[..self.samples.min(self.last.len())];
        known.sort_unstable_by(f64::total_cmp);
        known.get(known.len() / 2).copied().filter(|_| known.len() >= 4)
    }
}

/// A mean that forgets: the last eight count most.
#[derive(Clone, Copy, Debug, Default)]
struct Mean {
    value: f64,
    samples: u32,
}

impl Mean {
    fn note(&mut self, value: f64) {
        self.samples = self.samples.saturating_add(1);
        self.value += (value - self.value) / f64::from(self.samples.min(8));
    }

    /// Known from a few samples on.
    fn get(&self) -> Option<f64> {
        (self.samples >= 4).then_some(self.value)
    }
}

/// How much is measured before the link's speed counts as known.
const WINDOW: u64 = 1 << 20;
/// Transfers of less, at least, say more of the way than of the link.
const LARGE: usize = 32 << 10;

/// What goes one way, while something is under way all the time.
#[derive(Debug, Default)]
struct Way {
    last: Option<Instant>,
    bytes: u64,
    busy: Duration,
}

impl Way {
    /// A transfer of `bytes` that began at `sent` ended; `floor`: what the smallest one would have taken. Returns
    /// nanoseconds for each byte when a window is full. What was packed counts for nothing here.
    fn ended(
        &mut self,
        bytes: usize,
        sent: Instant,
        now: Instant,
        floor: Duration,
        packed: bool,
    ) -> Option<f64> {
        let last = self.last.replace(now);
        let follows = last.filter(|last| sent < *last);
        let busy = match follows {
            // It was under way when the one before it ended.
            Some(last) => now.saturating_duration_since(last),
            None => now.saturating_duration_since(sent).saturating_sub(floor),
        };
        if packed || bytes < LARGE && follows.is_none() {
            return None;
        }
        self.bytes += bytes as u64;
        self.busy += busy;
        if self.bytes < WINDOW {
            return None;
        }
        let rate = self.busy.as_nanos() as f64 / self.bytes as f64;
        (self.bytes, self.busy) = (0, Duration::ZERO);
        Some(rate)
    }
}

/// How fast the link is: the best of the last few windows, since all that disturbs only makes it slower.
#[derive(Debug, Default)]
struct Link {
    fetches: Way,
    stores: Way,
    floor: Option<Duration>,
    windows: [Option<f64>; 4],
    next: usize,
}

impl Link {
    /// Something small, or large, went there and back in this time.
    fn took(&mut self, took: Duration, small: bool) {
        self.floor = match self.floor {
            Some(floor) if took < floor => Some(took),
            // It follows slowly when the way gets longer.
            Some(floor) if small => Some(floor + (took - floor) / 256),
            None if small => Some(took),
            floor => floor,
        };
    }

    fn ended(&mut self, sent: &Sent, now: Instant, packed: bool) {
        self.took(now.saturating_duration_since(sent.at), sent.bytes < LARGE);
        let floor = self.floor.unwrap_or_default();
        let way = if sent.fetch { &mut self.fetches } else { &mut self.stores };
        if let Some(rate) = way.ended(sent.bytes, sent.at, now, floor, packed) {
            self.windows[self.next] = Some(rate);
            self.next = (self.next + 1) % self.windows.len();
        }
    }

    /// Known once there are as many: the first one alone may have been disturbed.
    fn get(&self) -> Option<f64> {
        let all = self.windows.iter().copied().collect::<Option<SmallVec<[f64; 4]>>>()?;
        all.into_iter().min_by(f64::total_cmp)
    }
}

/// A fetch or store under way.
#[derive(Clone, Copy, Debug)]
struct Sent {
    fetch: bool,
    /// Of pages.
    bytes: usize,
    at: Instant,
}

/// So many transfers are looked at at first, and then one of so many.
const LOOKS: (u64, u64) = (16, 64);
/// After so many bytes of pages that were packed, the link is measured again.
const PACKED: u64 = 32 << 20;
/// With so many bytes, at most.
const TRIAL: u64 = 2 * WINDOW;
/// Transfers whose time is taken at once, at most.
const MOST_SENT: usize = 4096;

/// What a connection's packing came to: written by its handler, read by anybody.
#[derive(Debug, Default)]
pub(super) struct Tally {
    packs: AtomicU64,
    pages: AtomicU64,
    raw_bytes: AtomicU64,
    packed_bytes: AtomicU64,
    switches: AtomicU64,
    link: AtomicU64,
    per_mille: AtomicU64,
}

/// What packing pages on the way to a helper and back came to, over all connections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Compression {
    /// Connections that pack now.
    pub connections: u64,
    /// Pages that crossed packed, both ways.
    pub pages: u64,
    /// Their bytes.
    pub raw_bytes: u64,
    /// What crossed in their place.
    pub packed_bytes: u64,
    /// How often it was begun or ended.
    pub switches: u64,
    /// What was measured of the slowest connection's link, in bytes per second; 0 if nothing was.
    pub link: u64,
    /// How much pages shrink, as far as is known: what is left of 1000 bytes on the connection where most is; 0 if
    /// nothing is known.
    pub per_mille: u64,
}

impl Compression {
    /// Adds another connection.
    pub(super) fn add(&mut self, tally: &Tally) {
        let get = |number: &AtomicU64| number.load(Ordering::Relaxed);
        self.connections += get(&tally.packs);
        self.pages += get(&tally.pages);
        self.raw_bytes += get(&tally.raw_bytes);
        self.packed_bytes += get(&tally.packed_bytes);
        self.switches += get(&tally.switches);
        self.link = [self.link, get(&tally.link)].into_iter().filter(|n| *n > 0).min().unwrap_or(0);
        self.per_mille = self.per_mille.max(get(&tally.per_mille));
    }
}

/// Packs the pages of one connection, while it pays.
pub(super) struct Compressor {
    mode: Compress,
    /// The helper knows how.
    able: bool,
    /// What others follow, and what somebody waits for, is packed.
    packs: bool,
    packs_alone: bool,
    opening: Option<Instant>,
    link: Link,
    pack: Median,
    unpack: Median,
    ratio: Mean,
    /// By the numbers of the core's flights.
    sent: Vec<Option<Sent>>,
    looks: u64,
    /// Bytes of pages since packing began, or was begun again.
    since: u64,
    packer: Packer,
    tally: Arc<Tally>,
}

impl Compressor {
    pub(super) fn new(mode: Compress) -> Self {
        Self {
            mode,
            able: false,
            packs: false,
            packs_alone: false,
            opening: None,
            link: Link::default(),
            pack: Median::default(),
            unpack: Median::default(),
            ratio: Mean::default(),
            sent: Vec::new(),
            looks: 0,
            since: 0,
            packer: Packer::default(),
            tally: Arc::default(),
        }
    }

    pub(super) fn tally(&self) -> Arc<Tally> {
        Arc::clone(&self.tally)
    }

    /// A session is being opened.
    pub(super) fn opening(&mut self) {
        self.opening = Some(Instant::now());
    }

    /// It was opened, with a helper that knows these flags.
    pub(super) fn opened(&mut self, flags: u32) {
        if let Some(begun) = self.opening.take() {
            self.link.took(begun.elapsed(), true);
        }
        self.able = flags & flag::PACKED != 0;
        self.decide();
    }

    /// The connection was lost: what is under way takes as long as it is away.
    pub(super) fn lost(&mut self) {
        self.sent.clear();
        self.opening = None;
        (self.link.fetches, self.link.stores) = Default::default();
    }

    /// Notes a fetch of so many bytes that goes out; returns its flags.
    pub(super) fn fetch(&mut self, tag: u64, bytes: usize, urgency: Urgency) -> u32 {
        self.note(tag, true, bytes);
        let load = if urgency == Urgency::Fault { Load::Alone } else { Load::Row };
        if self.packs_now(bytes, load) { flag::PACKED } else { 0 }
    }

    /// Notes a store that goes out; returns what to send, and its flags.
    pub(super) fn store(&mut self, tag: u64, content: Buffer) -> (Buffer, u32) {
        let bytes = content.len();
        let packs = self.packs_now(bytes, Load::Row);
        let packed = if packs { self.pack(&content) } else { None };
        if !packs {
            self.look(&content);
        }
        // Packing is no part of what the link takes.
        self.note(tag, false, bytes);
        match packed {
            Some(packed) => (packed, flag::PACKED),
            None => (content, 0),
        }
    }

    fn note(&mut self, tag: u64, fetch: bool, bytes: usize) {
        let index = tag as u32 as usize;
        if index < MOST_SENT {
            if self.sent.len() <= index {
                self.sent.resize(index + 1, None);
            }
            self.sent[index] = Some(Sent { fetch, bytes, at: Instant::now() });
        }
    }

    /// Whether the next transfer is to be packed: now and then one is not, to see how fast the link is.
    fn packs_now(&mut self, bytes: usize, load: Load) -> bool {
        let packs = if load == Load::Alone { self.packs_alone } else { self.packs };
        if !packs {
            return false;
        }
        self.since += bytes as u64;
        if self.since > PACKED + TRIAL {
            self.since = 0;
        }
        self.mode == Compress::On || self.since <= PACKED
    }

    fn pack(&mut self, content: &Buffer) -> Option<Buffer> {
        let begun = Instant::now();
        let packed = self.packer.pack(content);
        let left = packed.as_ref().map_or(content.len(), Buffer::len);
        self.packed(content.len(), left, begun.elapsed());
        if packed.is_some() {
            self.count(content.len(), left);
        }
        packed
    }

    /// So many bytes became so many.
    fn packed(&mut self, bytes: usize, left: usize, took: Duration) {
        self.pack.note(took.as_nanos() as f64 / bytes.max(1) as f64);
        self.ratio.note(left as f64 / bytes.max(1) as f64);
        self.decide();
    }

    fn count(&self, bytes: usize, left: usize) {
        // Only this thread writes.
        self.tally.pages.fetch_add((bytes / PAGE) as u64, Ordering::Relaxed);
        self.tally.raw_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        self.tally.packed_bytes.fetch_add(left as u64, Ordering::Relaxed);
    }

    /// Now and then, packs and unpacks one of these pages to see what that would come to.
    fn look(&mut self, content: &Buffer) {
        if self.mode != Compress::Auto || !self.able || content.len() < PAGE {
            return;
        }
        self.looks += 1;
        let (first, each) = LOOKS;
        if self.looks > first && !self.looks.is_multiple_of(each) {
            return;
        }
        let at = self.looks as usize % (content.len() / PAGE) * PAGE;
        let Some(page) = content.slice(at, PAGE) else { return };
        let begun = Instant::now();
        let packed = self.packer.pack(&page);
        let took = begun.elapsed();
        if let Some(packed) = &packed {
            let again = Buffer::zeroed(PAGE);
            let begun = Instant::now();
            if self.packer.unpack(packed, packed.len(), &again).is_ok() {
                self.unpack.note(begun.elapsed().as_nanos() as f64 / PAGE as f64);
            }
        }
        self.packed(PAGE, packed.as_ref().map_or(PAGE, Buffer::len), took);
    }

    /// A fetch or store was answered: pages that came packed are unpacked where they are.
    ///
    /// # Errors
    /// What came is no pages. Nothing is packed with this helper from here on.
    pub(super) fn answered(&mut self, answer: &mut Answer) -> Result<(), String> {
        let now = Instant::now();
        let sent = self.sent.get_mut(answer.tag as u32 as usize).and_then(Option::take);
        if matches!(answer.status, Status::MALFORMED | status::UNSUPPORTED) {
            // It is asked again, for pages as they are.
            self.able = false;
            self.decide();
        }
        if answer.status != Status::OK {
            return Ok(());
        }
        let fetched = !answer.answer.is_empty();
        let mut packed = !fetched && sent.is_some_and(|sent| answer.payload.len() < sent.bytes);
        if fetched && !answer.body.is_empty() {
            let took = sent.map_or(Duration::ZERO, |sent| now.saturating_duration_since(sent.at));
            packed = match self.unpack(answer, took) {
                Ok(packed) => packed,
                Err(why) => {
                    self.able = false;
                    self.decide();
                    return Err(why);
                }
            };
        }
        if let Some(sent) = sent {
            self.link.ended(&sent, now, packed);
            if fetched && !packed && answer.answer.len() > PAGE {
                self.look(&answer.answer);
            }
            self.decide();
        }
        Ok(())
    }

    /// Whether it came packed; `most`: how long all of it took.
    fn unpack(&mut self, answer: &mut Answer, most: Duration) -> Result<bool, String> {
        let Packing { packed, took } = Packing::decode(&answer.body).map_err(|why| why.to_string())?;
        let (all, came) = (answer.answer.len(), answer.received);
        if packed {
            let begun = Instant::now();
            self.packer.unpack(&answer.answer, came, &answer.answer).map_err(|why| why.to_string())?;
            answer.received = all;
            self.unpack.note(begun.elapsed().as_nanos() as f64 / all as f64);
            self.count(all, came);
        }
        // The helper may say anything, but not that it took longer than everything did.
        self.packed(all, came, took.min(most));
        Ok(packed)
    }

    fn figures(&self) -> Option<Figures> {
        let (link, pack) = (self.link.get()?, self.pack.get()?);
        // Nothing is unpacked where nothing shrinks.
        let unpack = self.unpack.get().unwrap_or(pack);
        Some(Figures { link, pack, unpack, ratio: self.ratio.get()? })
    }

    fn decide(&mut self) {
        let figures = self.figures();
        let decide = |load, packs| {
            self.able
                && match self.mode {
                    Compress::On => true,
                    Compress::Off => false,
                    Compress::Auto => figures.is_some_and(|figures| pays(&figures, load, packs)),
                }
        };
        let packs = decide(Load::Row, self.packs);
        self.packs_alone = decide(Load::Alone, self.packs_alone);
        if packs != self.packs {
            (self.packs, self.since) = (packs, 0);
            self.tally.switches.fetch_add(1, Ordering::Relaxed);
            self.tally.packs.store(packs.into(), Ordering::Relaxed);
            tracing::debug!(packs, ?figures, "Pages are packed from now on, or not any more");
        }
        let per_second = self.link.get().map_or(0.0, |link| 1e9 / link.max(1e-3));
        self.tally.link.store(per_second as u64, Ordering::Relaxed);
        let per_mille = self.ratio.get().map_or(0.0, |ratio| ratio * 1000.0);
        self.tally.per_mille.store(per_mille as u64, Ordering::Relaxed);
    }
}

#[cfg(test)]
#[path = "compress_test.rs"]
mod compress_test;
