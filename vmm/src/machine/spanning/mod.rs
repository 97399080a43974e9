//! A guest some of whose vCPUs run on other PCs: the lines to them, the memory that is shared with them, and what happens
//! when one is away. Drawn in `docs/span-protocol.md`.

mod fabric;
mod far;
mod helper;
mod moving;
mod time;
mod watch;

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use smallvec::SmallVec;
use transport::identity::Reloading;
use transport::line::Asking;
use transport::ring::Ring;

use super::Error;
use super::parts::lock;
use super::processor::Vcpu;
use crate::config::{self, CONSOLE, Placement};
use crate::control::{ClockStatus, VcpuPlace};
use crate::interrupt::Board;
use crate::kvm::Partition;
use crate::kvm::tsc::Abilities;
use crate::memory::Ram;
use crate::memory::coherence::message::{Member, Members};
use crate::memory::coherence::{self, Ear, Engine, Homes, Rider};
use crate::memory::frames::Pieces;
use crate::memory::store::random;
use crate::span::features::{Candidate, Features, intersection};
use crate::span::numa;
use crate::span::protocol::{Create, Purpose};
use crate::span::relay::{Hub, HubEar};
use crate::span::share::Granted;

use helper::{Helper, Request};

pub(super) use moving::Refused;
pub(super) use watch::watch;

/// How long a helper may take for each step of the start.
const START: Duration = Duration::from_secs(30);
/// How long the guest waits for clocks that are known, but not well enough.
const ORDER: Duration = Duration::from_secs(1);
/// Threads that read faults.
const SHARDS: u8 = 1;

/// A guest's parts on other PCs, as its machine has them.
pub(super) struct Spanning {
    /// Closed after everything that touches guest RAM has ended.
    pub(super) engine: Engine,
    /// Members 1, 2, …
    helpers: Vec<Helper>,
    bell: Arc<Bell>,
    /// The processor that all members can be.
    shown: Features,
    tsc_khz: u32,
    placement: Placement,
    board: OnceLock<Arc<Board>>,
    /// The member that runs each vCPU now.
    places: Mutex<Vec<Member>>,
    /// This PC's processors for vCPUs that are elsewhere: KVM makes each once.
    spare: Mutex<BTreeMap<u8, Box<dyn Vcpu>>>,
}

/// Wakes who waits for news of helpers.
#[derive(Default)]
struct Bell {
    rung: Mutex<bool>,
    changed: Condvar,
}

impl Bell {
    fn ring(&self) {
        *lock(&self.rung) = true;
        self.changed.notify_all();
    }

    fn wait(&self, patience: Duration) {
        let waited = self.changed.wait_timeout_while(lock(&self.rung), patience, |rung| !*rung);
        *waited.unwrap_or_else(PoisonError::into_inner).0 = false;
    }
}

fn console() -> Result<Member, Error> {
    Member::new(0).ok_or_else(|| Error::Helper("there is no console node".to_owned()))
}

/// Has the helpers of `guest` run their shares of the vCPUs, and shares `ram` with them from now on; `None` for a guest
/// that is all here. Nobody may have touched `ram` yet.
pub(super) fn start(
    ram: &Ram,
    layout_bits: u8,
    guest: &config::Guest,
    identity: Option<&Arc<Reloading>>,
) -> Result<Option<Spanning>, Error> {
    let placement = guest.placement();
    if !placement.spans() {
        return Ok(None);
    }
    let bell = Arc::new(Bell::default());
    let holder = random().map_err(Error::Thread)?;
    let ask = |(number, place): (u8, &config::Place)| {
        let member = Member::new(number).ok_or_else(|| Error::Helper("too many PCs".to_owned()))?;
        Helper::ask(&Request { member, place, guest, holder }, identity, &bell)
    };
    // All are asked before the first answer is waited for.
    let mut helpers = (1..).zip(&guest.cpu.place).map(ask).collect::<Result<Vec<_>, _>>()?;
    let granted = helpers.iter_mut().map(|helper| helper.granted(START)).collect::<Result<Vec<_>, _>>()?;
    let shown = shown(&helpers, &granted, layout_bits)?;
    let abilities = Abilities::of_this_pc()?;
    if let Some(why) = abilities.refusal("this PC", abilities.khz) {
        return Err(Error::Helper(why));
    }
    // Where the guest's kernel finds each node's memory: what is near a vCPU is at home with it.
    let counts = placement.counts();
    let homes = numa::split(guest.memory.size, &counts);
    for helper in &helpers {
        let create = Create {
            member: helper.member,
            shards: SHARDS,
            address_bits: layout_bits,
            counts: SmallVec::from_slice(&counts),
            ram: guest.memory.size.0,
            homes: homes.iter().map(|(_, pages)| *pages).collect(),
            tsc_khz: abilities.khz,
        };
        let made = helper.share.create(create, &shown.encode(), START);
        made.map_err(|why| helper.failed(&why))?;
    }
    let engine = share(ram, guest, &homes, &helpers, holder, &bell)?;
    for (helper, granted) in helpers.iter().zip(&granted) {
        tracing::info!("{} runs vCPUs of the guest (lease {})", helper.name(), granted.epoch);
    }
    let (board, tsc_khz) = (OnceLock::new(), abilities.khz);
    let places = Mutex::new(placement.members().to_vec());
    let spare = Mutex::default();
    Ok(Some(Spanning { engine, helpers, bell, shown, tsc_khz, placement, board, places, spare }))
}

/// Shares `ram` with all helpers.
fn share(
    ram: &Ram,
    guest: &config::Guest,
    homes: &[(Member, u64)],
    helpers: &[Helper],
    holder: u128,
    bell: &Arc<Bell>,
) -> Result<Engine, Error> {
    let console = console()?;
    let unfit = || Error::Helper("the guest's memory has no homes".to_owned());
    let options = coherence::Options {
        me: console,
        members: homes.iter().fold(Members::default(), |all, (member, _)| all.with(*member)),
        homes: Homes::sliced(Pieces::new(guest.memory.size), homes).ok_or_else(unfit)?,
        shards: SHARDS.into(),
    };
    let lines: Vec<_> = helpers.iter().map(|helper| helper.memory.clone()).collect();
    let hub = Hub::new(&lines);
    let mut boards = Vec::new();
    for helper in helpers {
        let names = helper.names()?;
        let purpose = Purpose::Memory { epoch: helper.epoch, holder, shard: 0 }.encode();
        let (config, memory, member) = (helper.config.clone(), helper.memory.clone(), helper.member);
        let hub = Arc::clone(&hub);
        boards.push(Box::new(move |ring: &mut Ring, ear: Ear| {
            let hear = HubEar::new(&hub, member, ear);
            Ok(Box::new(Asking::new(config, names, purpose, memory, hear, ring)) as Box<dyn Rider>)
        }) as coherence::Board);
    }
    let broken = {
        let desks: Vec<_> = helpers.iter().map(|helper| Arc::clone(&helper.desk)).collect();
        let bell = Arc::clone(bell);
        // Which one it is the reason says.
        Box::new(move |why: &str| {
            desks.iter().take(1).for_each(|desk| desk.ends(why));
            bell.ring();
        })
    };
    Ok(Engine::start(ram, &options, hub, broken, boards)?)
}

/// The processor that all members can be.
fn shown(helpers: &[Helper], granted: &[Granted], bits: u8) -> Result<Features, Error> {
    let ours = Partition::host_features()?;
    let mut theirs = Vec::new();
    for (helper, granted) in helpers.iter().zip(granted) {
        theirs.push(Features::decode(&granted.features).map_err(|why| helper.failed(&why))?);
    }
    let others = helpers.iter().zip(&theirs);
    let others = others.map(|(helper, features)| Candidate { node: helper.name(), features });
    let members: Vec<_> =
        std::iter::once(Candidate { node: "this PC", features: &ours }).chain(others).collect();
    let shown = intersection(&members, &[]).map_err(|why| Error::Helper(why.to_string()))?;
    if let Some((helper, _)) =
        helpers.iter().zip(&theirs).find(|(_, features)| features.address_bits() < bits)
    {
        return Err(helper
            .failed(&"its processor has narrower guest addresses than this PC's; begin the guest there"));
    }
    for hidden in &shown.hidden {
        tracing::debug!(feature = %hidden.feature, why = %hidden.why, "The guest is not shown a feature");
    }
    Ok(shown.features)
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

    /// Has the helpers' vCPUs read the time stamp counter of the console node's, `offset` ticks ahead of this PC's.
    pub(super) fn keep_time(&self, offset: u64) -> Result<(), Error> {
        self.helpers.iter().for_each(|helper| helper.aim(offset, self.tsc_khz));
        let begun = Instant::now();
        while let Some(helper) = self.helpers.iter().find(|helper| !helper.desk.in_order()) {
            let measured = self.helpers.iter().all(|helper| helper.desk.measured());
            if measured && begun.elapsed() > ORDER {
                tracing::warn!(clock = ?helper.desk.clock(), "{}'s clock is not known well enough yet", helper.name());
                break;
            }
            if begun.elapsed() > START {
                return Err(helper.failed(&"it does not say what its clocks say"));
            }
            self.helpers.iter().for_each(Helper::probe);
            self.bell.wait(helper::PROBE / 50);
        }
        Ok(())
    }

    /// The shortest round trip that was seen between two members; those of two helpers go by way of the console node.
    pub(super) fn round_trip(&self, one: Member, other: Member) -> Option<Duration> {
        let trip = |member: Member| match usize::from(member.number()).checked_sub(1) {
            None => Some(Duration::ZERO),
            Some(at) => self.helpers.get(at)?.desk.shortest(),
        };
        Some(trip(one)? + trip(other)?)
    }

    /// Lets the helpers' local APICs and the chipset hear of each other.
    pub(super) fn connect(&self, board: &Arc<Board>) {
        // Once.
        let _ = self.board.set(Arc::clone(board));
        for helper in &self.helpers {
            let others = self.helpers.iter().filter(|other| other.member != helper.member);
            helper.connect(board, others.map(|other| Arc::clone(&other.share)).collect());
        }
    }

    fn helper(&self, member: Member) -> Option<&Helper> {
        self.helpers.get(usize::from(member.number()).checked_sub(1)?)
    }

    fn lock_places(&self) -> std::sync::MutexGuard<'_, Vec<Member>> {
        lock(&self.places)
    }

    /// Which vCPUs are on which PC.
    pub(super) fn places(&self) -> Vec<VcpuPlace> {
        let places = self.lock_places();
        let of = |member: Member, node: &str, room: Option<u8>, clock: Option<ClockStatus>| {
            let vcpus = (0..).zip(places.iter()).filter(|(_, at)| **at == member).map(|(vcpu, _)| vcpu);
            VcpuPlace { node: node.to_owned(), vcpus: vcpus.collect(), room, clock }
        };
        let here = console().ok().map(|member| of(member, CONSOLE, None, None));
        let helpers = self.helpers.iter();
        let helpers =
            helpers.map(|helper| of(helper.member, helper.name(), Some(helper.room), helper.desk.clock()));
        here.into_iter().chain(helpers).collect()
    }

    /// After the last access to guest RAM.
    pub(super) fn close(&self) {
        self.helpers.iter().for_each(|helper| helper.share.end("the guest has ended"));
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
