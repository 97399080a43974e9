//! A guest some of whose vCPUs run on another PC: the lines to it, the memory that is shared with it, and what happens
//! when it is away. Drawn in `docs/span-protocol.md`.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use devices::interrupt::{ApicId, LocalApic, Message, Nanos, Targets, View};
use devices::thread::{Role, confine, spawn};
use smallvec::SmallVec;
use transport::buffer::Buffer;
use transport::channel::{self, Names};
use transport::identity::{Reloading, Security};
use transport::line::{Asking, Hear, Sender, thread::Driven};
use transport::ring::Ring;

use super::parts::{Parts, lock};
use super::processor::{Vcpu, VcpuState};
use super::{Error, Exit, agents};
use crate::config::{self, Placement};
use crate::control::State;
use crate::cpu::{Elsewhere, Fabric, Kick, Place, Processor, monotonic};
use crate::interrupt::Board;
use crate::kvm::tsc::{Abilities, Rate};
use crate::kvm::{Attached, Partition};
use crate::loader::Entry;
use crate::memory::Ram;
use crate::memory::coherence::message::{Member, Members};
use crate::memory::coherence::{self, Ear, Engine, Homes, Lines, Rider};
use crate::memory::frames::Pieces;
use crate::memory::store::{Stuck, random};
use crate::span::features::{Candidate, Features, intersection};
use crate::span::numa;
use crate::span::protocol::{Create, Moment, Purpose};
use crate::span::remote::Remote;
use crate::span::share::{Console, Granted, Share};

/// How long the helper may take for each step of the start.
const START: Duration = Duration::from_secs(30);
/// How long a vCPU's state may take to come or go.
const STATE: Duration = Duration::from_secs(10);
/// A connection that carries nothing for so long is dead.
const DEAD_AFTER: Duration = Duration::from_secs(2);
/// How often the clocks are compared.
const PROBE: Duration = Duration::from_millis(500);
/// A helper that is back within this time was not away.
const GRACE: Duration = Duration::from_millis(200);
/// So many round trips of probes are looked at before the guest begins.
const TRIPS: u32 = 16;
/// Threads that read faults.
const SHARDS: u8 = 1;

/// A guest's part on another PC, as its machine has it.
pub(super) struct Spanning {
    /// Closed after everything that touches guest RAM has ended.
    pub(super) engine: Engine,
    pub(super) share: Arc<Share>,
    /// The processor that all members can be.
    shown: Features,
    tsc_khz: u32,
    helper_khz: u32,
    desk: Arc<Desk>,
    placement: Placement,
    patience: Option<Duration>,
    _line: Driven,
}

/// Hears what the helper says to the machine.
struct Desk {
    board: OnceLock<Arc<Board>>,
    share: OnceLock<Arc<Share>>,
    news: Mutex<News>,
    changed: Condvar,
    /// The number of the last probe.
    probes: AtomicU32,
}

#[derive(Default)]
struct News {
    /// Since when the helper is away, and why.
    away: Option<(Instant, String)>,
    /// Why the guest has to end.
    over: Option<String>,
    /// The shortest round trip of a probe so far.
    shortest: Option<u64>,
    /// The last probe, and when it was sent.
    sent: (u32, Moment),
    /// By how much the guest's time stamp counter is ahead of this PC's, once that is known.
    offset: Option<u64>,
    /// How the helper's counter is turned into the guest's.
    rate: Option<Rate>,
    /// So many round trips were measured.
    trips: u32,
    measured: bool,
}

fn members() -> Option<(Member, Member)> {
    Some((Member::new(0)?, Member::new(1)?))
}

/// Has the helper of `guest` run its share of the vCPUs, and shares `ram` with it from now on; `None` for a guest that is
/// all here. Nobody may have touched `ram` yet.
pub(super) fn start(
    ram: &Ram,
    layout_bits: u8,
    guest: &config::Guest,
    identity: Option<&Arc<Reloading>>,
) -> Result<Option<Spanning>, Error> {
    let placement = guest.placement();
    let (Some(place), Some((console, helper))) = (guest.cpu.place.first(), members()) else {
        return Ok(None);
    };
    let here: SmallVec<[u8; 16]> = placement.cpus_of(helper).collect();
    let config = channel_config(place, guest, identity).map_err(Error::Helper)?;
    let failed = |error: std::io::Error| Error::Helper(format!("{}: {error}", place.node));
    let (sender, memory) = (Sender::new().map_err(failed)?, Sender::new().map_err(failed)?);
    let share = Share::new(&place.node, sender.clone(), &here);
    let desk = Desk::new(&share);
    let holder = random().map_err(failed)?;
    let purpose = Purpose::Cpus {
        holder,
        count: here.len() as u8,
        ram: guest.memory.size.0,
        patience: place.patience.map(|patience| patience.0),
        guest: guest.name.clone(),
    };
    tracing::info!("Asking {} for {} vCPUs", place.node, here.len());
    let hear = Arc::clone(&share) as Arc<dyn Hear>;
    let begin = || {
        if let Err(error) = confine(Role::Memory) {
            tracing::error!(%error, "The thread of the vCPUs' line is not confined");
        }
    };
    let line =
        transport::line::thread::start("vcpu-line", config.clone(), purpose.encode(), sender, hear, begin);
    let line = line.map_err(failed)?;
    let said = |error: crate::span::share::Error| Error::Helper(format!("{}: {error}", place.node));
    let granted = share.granted(START).map_err(said)?;
    let shown = shown(&granted, &place.node, layout_bits)?;
    let abilities = Abilities::of_this_pc()?;
    if let Some(why) = abilities.refusal("this PC", abilities.khz) {
        return Err(Error::Helper(why));
    }
    let pieces = Pieces::new(guest.memory.size);
    // Where the guest's kernel finds each node's memory: what is near a vCPU is at home with it.
    let shares = numa::split(guest.memory.size, &placement.counts());
    let create = Create {
        member: helper,
        members: 2,
        shards: SHARDS,
        address_bits: layout_bits,
        cpus: guest.cpu.count,
        here,
        ram: guest.memory.size.0,
        homes: shares.iter().map(|(_, pages)| *pages).collect(),
        tsc_khz: abilities.khz,
    };
    share.create(create, &shown.encode(), START).map_err(said)?;
    let unfit = || Error::Helper("the guest's memory has no homes".to_owned());
    let options = coherence::Options {
        me: console,
        members: Members::of(console).with(helper),
        homes: Homes::sliced(pieces, &shares).ok_or_else(unfit)?,
        shards: SHARDS.into(),
    };
    let names = Names::of(&config.address).map_err(failed)?;
    let purpose = Purpose::Memory { epoch: granted.epoch, holder, shard: 0 }.encode();
    let down = memory.clone();
    let board = Box::new(move |ring: &mut Ring, ear: Ear| {
        let hear = Arc::new(MemoryEar { ear, helper });
        Ok(Box::new(Asking::new(config, names, purpose, memory, hear, ring)) as Box<dyn Rider>)
    });
    let broken = {
        let desk = Arc::clone(&desk);
        Box::new(move |why: &str| desk.ends(why))
    };
    let engine = Engine::start(ram, &options, Arc::new(Down(down)), broken, vec![board])?;
    tracing::info!("{} runs vCPUs of the guest (lease {})", place.node, granted.epoch);
    let patience = place.patience.map(|patience| patience.0);
    let (tsc_khz, helper_khz) = (abilities.khz, granted.tsc_khz);
    Ok(Some(Spanning { engine, share, shown, tsc_khz, helper_khz, desk, placement, patience, _line: line }))
}

/// The processor that both members can be.
fn shown(granted: &Granted, node: &str, bits: u8) -> Result<Features, Error> {
    let failed = |why: &dyn std::fmt::Display| Error::Helper(format!("{node}: {why}"));
    let theirs = Features::decode(&granted.features).map_err(|why| failed(&why))?;
    let ours = Partition::host_features()?;
    let members = [Candidate { node: "this PC", features: &ours }, Candidate { node, features: &theirs }];
    let shown = intersection(&members, &[]).map_err(|why| Error::Helper(why.to_string()))?;
    if shown.features.address_bits() < bits {
        return Err(failed(
            &"its processor has narrower guest addresses than this PC's; begin the guest there",
        ));
    }
    for hidden in &shown.hidden {
        tracing::debug!(feature = %hidden.feature, why = %hidden.why, "The guest is not shown a feature");
    }
    Ok(shown.features)
}

/// How the helper is reached.
fn channel_config(
    place: &config::Place,
    guest: &config::Guest,
    identity: Option<&Arc<Reloading>>,
) -> Result<channel::Config, String> {
    let peer = config::Peer::from(place);
    let security = agents::security(&peer, identity)?;
    if place.insecure {
        tracing::warn!(
            "INSECURE: the guest's vCPUs and memory go to {} over plain TCP: whoever is on the network between may \
             read and change them",
            place.node
        );
    }
    let node = matches!(security, Security::Tls(_)).then(|| peer.expected_node()).flatten();
    Ok(channel::Config {
        address: devices::disk::remote::with_port(place.agent()),
        name: agents::client(&guest.name),
        security,
        node,
        dead_after: DEAD_AFTER,
        retry_first: Duration::from_millis(20),
        retry_most: Duration::from_secs(1),
        transport: agents::transport(&peer),
    })
}

impl Spanning {
    /// The console node's own part of the guest.
    pub(super) fn partition(&self, ram: &Ram) -> Result<Partition, Error> {
        Ok(Partition::spanning(ram.memory().clone(), &self.shown, &self.placement.counts(), self.tsc_khz)?)
    }

    /// The rate of the guest's time stamp counters.
    pub(super) fn tsc_khz(&self) -> u32 {
        self.tsc_khz
    }

    /// Has the helper's vCPUs read the time stamp counter of the console node's, `offset` ticks ahead of this PC's.
    pub(super) fn keep_time(&self, offset: u64) -> Result<(), Error> {
        let rate = Rate { host_khz: self.helper_khz, guest_khz: self.tsc_khz };
        {
            let mut news = self.desk.lock();
            (news.offset, news.rate) = (Some(offset), Some(rate));
        }
        let begun = Instant::now();
        while !self.desk.lock().measured {
            self.desk.probe(&self.share);
            self.desk.wait_for(PROBE / 50);
            if begun.elapsed() > START {
                let helper = self.share.helper();
                return Err(Error::Helper(format!("{helper} does not say what its clocks say")));
            }
        }
        Ok(())
    }

    /// Lets the helper's local APICs and the chipset hear of each other.
    pub(super) fn connect(&self, board: &Arc<Board>) {
        // Once.
        let _ = self.desk.board.set(Arc::clone(board));
        self.share.connect(Arc::clone(&self.desk) as Arc<dyn Console>);
    }

    /// What the local APICs here reach others by.
    pub(super) fn fabric(&self, board: &Arc<Board>) -> Arc<dyn Fabric> {
        let (board, share, ear) = (Arc::clone(board), Arc::clone(&self.share), self.engine.ear());
        Arc::new(Border { board, share, ear })
    }

    /// The vCPU `index`, if it is elsewhere.
    pub(super) fn vcpu(&self, index: u8, board: &Board) -> Option<Box<dyn Vcpu>> {
        let member = self.placement.members().get(usize::from(index))?;
        if member.number() == 0 {
            return None;
        }
        let way = Arc::clone(&self.share) as Arc<dyn Elsewhere>;
        board.switch().put(LocalApic::new(ApicId(index), false).view(), Place::Elsewhere(way));
        Some(Box::new(Far { remote: Remote::new(Arc::clone(&self.share), index), index }))
    }

    /// The helper, if the guest has to stand still for it.
    pub(super) fn missed(&self) -> Option<Stuck> {
        let news = self.desk.lock();
        let (since, why) = news.away.as_ref().filter(|(since, _)| since.elapsed() >= GRACE)?;
        Some(Stuck { helper: self.share.helper().to_owned(), since: *since, why: why.clone() })
    }

    /// Why the guest has to end, if it has.
    fn over(&self) -> Option<String> {
        let news = self.desk.lock();
        let gone = |(since, why): &(Instant, String)| {
            let late = self.patience.is_some_and(|patience| since.elapsed() >= patience);
            late.then(|| format!("it was away for longer than the guest's patience: {why}"))
        };
        news.over.clone().or_else(|| news.away.as_ref().and_then(gone))
    }

    /// After the last access to guest RAM.
    pub(super) fn close(&self) {
        self.share.end("the guest has ended");
        self.engine.close();
    }

    /// What was counted.
    pub(super) fn counters(&self) -> BTreeMap<String, u64> {
        let counters = self.engine.counters();
        let all = serde_json::to_value(&counters).unwrap_or_default();
        let numbers = all.as_object().into_iter().flatten();
        let numbers = numbers.filter_map(|(name, value)| Some((name.clone(), value.as_u64()?)));
        numbers.chain(super::lent::fetches(&counters.latency)).collect()
    }
}

/// Starts the thread that stops the guest while its helper is away, and ends it when that is gone.
pub(super) fn watch(parts: &Arc<Parts>) -> Result<(), Error> {
    if parts.spanning.is_none() {
        return Ok(());
    }
    let parts = Arc::downgrade(parts);
    let body = move || {
        loop {
            let Some(parts) = parts.upgrade() else { return };
            let Some(spanning) = &parts.spanning else { return };
            if parts.state() == State::Ending {
                return;
            }
            if let Some(why) = spanning.over() {
                let helper = spanning.share.helper();
                tracing::error!(
                    "{helper}, which runs some of the guest's vCPUs, is lost, so that the guest ends: {why}"
                );
                return parts.finish(Ok(Exit::MemoryLost));
            }
            match spanning.missed() {
                Some(stuck) => parts.hold(stuck),
                None => parts.let_go(),
            }
            let desk = Arc::clone(&spanning.desk);
            desk.probe(&spanning.share);
            drop(parts);
            desk.wait();
        }
    };
    spawn(Role::Control, "span-watch", body).map(drop).map_err(Error::Thread)
}

impl Desk {
    fn new(share: &Arc<Share>) -> Arc<Self> {
        let (news, changed, probes) = (Mutex::default(), Condvar::new(), AtomicU32::new(0));
        let known = OnceLock::new();
        let _ = known.set(Arc::clone(share));
        Arc::new(Self { board: OnceLock::new(), share: known, news, changed, probes })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, News> {
        lock(&self.news)
    }

    fn ends(&self, why: &str) {
        self.lock().over.get_or_insert_with(|| why.to_owned());
        self.changed.notify_all();
    }

    fn probe(&self, share: &Share) {
        let mut news = self.lock();
        if news.away.is_none() {
            let (number, now) = (self.probes.fetch_add(1, Ordering::Relaxed), Moment::here());
            news.sent = (number, now);
            share.probe(number, now.monotonic);
        }
    }

    /// Until something changes, or the next probe is due. Soon again while the helper is away.
    fn wait(&self) {
        let patience = if self.lock().away.is_some() { GRACE / 4 } else { PROBE };
        self.wait_for(patience);
    }

    fn wait_for(&self, patience: Duration) {
        let news = self.lock();
        drop(self.changed.wait_timeout(news, patience).unwrap_or_else(PoisonError::into_inner));
    }
}

impl Console for Desk {
    fn interrupt(&self, targets: Targets, message: Message) {
        if let Some(board) = self.board.get() {
            board.switch().post_here(targets, &message);
        }
    }

    fn end_of_interrupt(&self, vector: u8) {
        if let Some(board) = self.board.get() {
            board.end_of_interrupt(vector);
        }
    }

    fn refused(&self, vector: u8) {
        if let Some(board) = self.board.get() {
            board.refused(vector);
        }
    }

    fn view(&self, view: View) {
        if let Some(board) = self.board.get() {
            Fabric::view(&**board, view);
        }
    }

    fn answered(&self, number: u32, _sent: Nanos, there: Moment) {
        let (Some(board), Some(share)) = (self.board.get(), self.share.get()) else { return };
        let now = Moment::here();
        let mut news = self.lock();
        let (last, sent) = news.sent;
        if last != number {
            return;
        }
        let trip = now.monotonic.since(sent.monotonic);
        news.trips += 1;
        news.measured = news.trips >= TRIPS;
        if news.shortest.is_some_and(|shortest| trip > shortest + shortest / 4) {
            return;
        }
        // It may get slower for good: what was shortest is believed less and less.
        news.shortest = Some(news.shortest.map_or(trip, |shortest| trip.min(shortest + shortest / 64)));
        let (offset, rate) = (news.offset, news.rate);
        drop(news);
        self.changed.notify_all();
        // The answer was made in the middle of the trip, give or take half of it.
        let middle = sent.monotonic.0 + trip / 2;
        let guest = board.clock().now().0.wrapping_sub(monotonic().wrapping_sub(middle));
        let ticks = sent.tsc.0 + now.tsc.0.wrapping_sub(sent.tsc.0) / 2;
        let Some((offset, rate)) = offset.zip(rate) else { return };
        let tsc = ticks.wrapping_add(offset).wrapping_sub(rate.to_guest(there.tsc).0);
        share.set_clock(guest.wrapping_sub(there.monotonic.0), tsc);
    }

    fn away(&self, why: &str) {
        self.lock().away.get_or_insert_with(|| (Instant::now(), why.to_owned()));
        self.changed.notify_all();
    }

    fn back(&self) {
        self.lock().away = None;
        self.changed.notify_all();
    }

    fn over(&self, why: &str) {
        self.ends(why);
    }
}

/// What the local APICs of the console node reach others by: all of them hear of their views.
struct Border {
    board: Arc<Board>,
    share: Arc<Share>,
    ear: Ear,
}

impl Fabric for Border {
    fn send(&self, message: Message) {
        Fabric::send(&*self.board, message);
    }

    fn end_of_interrupt(&self, vector: u8) {
        self.board.end_of_interrupt(vector);
    }

    fn view(&self, view: View) {
        self.share.view(view);
        Fabric::view(&*self.board, view);
    }

    fn refused(&self, vector: u8) {
        self.board.refused(vector);
    }

    fn acknowledge(&self) -> Option<u8> {
        self.board.acknowledge()
    }

    fn halted(&self) {
        self.ear.rests();
    }
}

/// The way to the other member's memory.
struct Down(Sender);

impl Lines for Down {
    fn send(&self, _to: Member, body: &[u8], content: Option<Buffer>) {
        self.0.send(body, content);
    }
}

/// Hears the memory line.
struct MemoryEar {
    ear: Ear,
    helper: Member,
}

impl Hear for MemoryEar {
    fn hear(&self, body: &[u8], payload: Option<Buffer>) {
        self.ear.hear(self.helper, body, payload);
    }

    fn away(&self, _why: &str) {}

    fn back(&self) {}

    fn over(&self, why: &str) {
        self.ear.lost(why);
    }
}

/// A vCPU elsewhere, as the machine has it.
struct Far {
    remote: Remote,
    index: u8,
}

impl Far {
    fn failed(&self, why: &impl ToString) -> Error {
        Error::Cpu { index: self.index, why: why.to_string() }
    }
}

impl Processor for Far {
    fn enter(&mut self, entry: crate::cpu::VmEntry) -> crate::cpu::VmExit {
        self.remote.enter(entry)
    }

    fn interrupt(&mut self) {
        self.remote.interrupt();
    }
}

impl Vcpu for Far {
    fn attach(&mut self) -> Option<Attached> {
        None
    }

    fn kick(&self) -> Option<Kick> {
        let (share, index) = (Arc::clone(self.remote.share()), self.index);
        Some(Box::new(move || share.kick(index)))
    }

    fn save(&mut self) -> Result<VcpuState, Error> {
        let bytes = self.remote.share().save(self.index, STATE).map_err(|why| self.failed(&why))?;
        serde_json::from_slice(&bytes).map_err(|why| self.failed(&why))
    }

    fn restore(&mut self, state: &VcpuState) -> Result<(), Error> {
        let bytes = serde_json::to_vec(state).map_err(|why| self.failed(&why))?;
        self.remote.share().restore(self.index, &bytes, STATE).map_err(|why| self.failed(&why))
    }

    fn set_up(&mut self) -> Result<(), Error> {
        // Its helper did, and it is in the state of power-on.
        Ok(())
    }

    fn boot(&mut self, _entry: &Entry, _memory: &devices::GuestMemory) -> Result<(), Error> {
        Err(self.failed(&"a guest begins on its console node"))
    }
}
