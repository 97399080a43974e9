//! One helper of a guest: the lines to it, whether it is heard, and what its clocks say.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, Weak};
use std::time::{Duration, Instant};

use devices::interrupt::{Message, Nanos, Targets, View};
use devices::thread::{Role, confine};
use transport::channel::{self, Names};
use transport::identity::{Reloading, Security};
use transport::line::{Hear, Sender, thread::Driven};

use super::time::{Ahead, Clocks};
use super::{Bell, Error};
use crate::config;
use crate::control::ClockStatus;
use crate::cpu::{Elsewhere, Fabric, monotonic};
use crate::interrupt::Board;
use crate::kvm::tsc::Rate;
use crate::machine::agents;
use crate::machine::parts::lock;
use crate::memory::coherence::message::Member;
use crate::memory::store::Stuck;
use crate::span::protocol::{Moment, Purpose};
use crate::span::share::{Console, Granted, Share};

/// A connection that carries nothing for so long is dead.
const DEAD_AFTER: Duration = Duration::from_secs(2);
/// How often the clocks are compared.
pub(super) const PROBE: Duration = Duration::from_millis(100);
/// A probe that was not answered for so long is not waited for any more: its connection was cut.
const LOST: Duration = Duration::from_secs(2);
/// A helper that is back within this time was not away.
pub(super) const GRACE: Duration = Duration::from_millis(200);

/// What a helper is asked for.
pub(super) struct Request<'a> {
    pub(super) member: Member,
    pub(super) place: &'a config::Place,
    pub(super) guest: &'a config::Guest,
    pub(super) holder: u128,
}

/// A PC that runs vCPUs of the guest.
pub(super) struct Helper {
    pub(super) member: Member,
    pub(super) share: Arc<Share>,
    pub(super) desk: Arc<Desk>,
    /// How the other lines reach it.
    pub(super) config: channel::Config,
    /// Down the memory line.
    pub(super) memory: Sender,
    /// The lease's, once it was granted.
    pub(super) epoch: u64,
    /// It runs so many vCPUs at most.
    pub(super) room: u8,
    khz: u32,
    patience: Option<Duration>,
    _line: Driven,
}

/// Hears what a helper says to the machine.
pub(super) struct Desk {
    share: OnceLock<Weak<Share>>,
    board: OnceLock<Arc<Board>>,
    /// The other helpers.
    others: OnceLock<Vec<Arc<Share>>>,
    news: Mutex<News>,
    bell: Arc<Bell>,
    /// The number of the last probe.
    probes: AtomicU32,
}

#[derive(Default)]
struct News {
    /// Since when the helper is away, and why.
    away: Option<(Instant, String)>,
    /// Why the guest has to end.
    over: Option<String>,
    /// The last probe, and when it was sent.
    sent: (u32, Moment),
    /// It was not answered yet.
    asked: bool,
    clocks: Clocks,
}

impl Helper {
    /// Asks for a share; [`granted`](Self::granted) waits for the answer.
    pub(super) fn ask(
        request: &Request<'_>,
        identity: Option<&Arc<Reloading>>,
        bell: &Arc<Bell>,
    ) -> Result<Self, Error> {
        let Request { member, place, guest, holder } = *request;
        let config = channel_config(place, guest, identity).map_err(Error::Helper)?;
        let failed = |error: std::io::Error| Error::Helper(format!("{}: {error}", place.node));
        let (sender, memory) = (Sender::new().map_err(failed)?, Sender::new().map_err(failed)?);
        let here: Vec<u8> = guest.placement().cpus_of(member).collect();
        let share = Share::new(&place.node, sender.clone(), guest.cpu.count, &here);
        let desk = Desk::new(&share, bell);
        let (patience, room) = (place.patience.map(|patience| patience.0), place.room());
        let purpose = Purpose::Cpus {
            holder,
            count: room,
            ram: guest.memory.size.0,
            patience,
            guest: guest.name.clone(),
        };
        tracing::info!("Asking {} for {room} vCPUs", place.node);
        let hear = Arc::clone(&share) as Arc<dyn Hear>;
        let begin = || {
            if let Err(error) = confine(Role::Memory) {
                tracing::error!(%error, "The thread of the vCPUs' line is not confined");
            }
        };
        let asked = purpose.encode();
        let line = transport::line::thread::start("vcpu-line", config.clone(), asked, sender, hear, begin);
        let line = line.map_err(failed)?;
        let (epoch, khz) = (0, 0);
        Ok(Self { member, share, desk, config, memory, epoch, room, khz, patience, _line: line })
    }

    /// What it lent.
    pub(super) fn granted(&mut self, patience: Duration) -> Result<Granted, Error> {
        let granted = self.share.granted(patience).map_err(|why| self.failed(&why))?;
        (self.epoch, self.khz) = (granted.epoch, granted.tsc_khz);
        Ok(granted)
    }

    /// What it is called.
    pub(super) fn name(&self) -> &str {
        self.share.helper()
    }

    pub(super) fn failed(&self, why: &dyn std::fmt::Display) -> Error {
        Error::Helper(format!("{}: {why}", self.name()))
    }

    pub(super) fn names(&self) -> Result<Names, Error> {
        Names::of(&self.config.address).map_err(|why| self.failed(&why))
    }

    /// Its vCPUs read what this PC's time stamp counter reads, `offset` ticks ahead.
    pub(super) fn aim(&self, offset: u64, guest_khz: u32) {
        self.desk.lock().clocks.aim(offset, Rate { host_khz: self.khz, guest_khz });
    }

    /// Asks what its clocks say.
    pub(super) fn probe(&self) {
        self.desk.probe(&self.share);
    }

    /// Lets its local APICs hear of `board` and of the `others`'.
    pub(super) fn connect(&self, board: &Arc<Board>, others: Vec<Arc<Share>>) {
        // Once.
        let _ = (self.desk.board.set(Arc::clone(board)), self.desk.others.set(others));
        self.share.connect(Arc::clone(&self.desk) as Arc<dyn Console>);
    }

    /// Whether the guest has to stand still for it.
    pub(super) fn missed(&self) -> Option<Stuck> {
        let news = self.desk.lock();
        let (since, why) = news.away.as_ref().filter(|(since, _)| since.elapsed() >= GRACE)?;
        Some(Stuck { helper: self.name().to_owned(), since: *since, why: why.clone() })
    }

    /// Why the guest has to end because of it, if it has.
    pub(super) fn over(&self) -> Option<String> {
        let news = self.desk.lock();
        let gone = |(since, why): &(Instant, String)| {
            let late = self.patience.is_some_and(|patience| since.elapsed() >= patience);
            late.then(|| format!("it was away for longer than the guest's patience: {why}"))
        };
        news.over.clone().or_else(|| news.away.as_ref().and_then(gone))
    }
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

impl Desk {
    fn new(share: &Arc<Share>, bell: &Arc<Bell>) -> Arc<Self> {
        let (board, others) = (OnceLock::new(), OnceLock::new());
        let (news, probes, bell) = (Mutex::default(), AtomicU32::new(0), Arc::clone(bell));
        let share = OnceLock::from(Arc::downgrade(share));
        Arc::new(Self { share, board, others, news, bell, probes })
    }

    fn lock(&self) -> MutexGuard<'_, News> {
        lock(&self.news)
    }

    /// The guest has to end.
    pub(super) fn ends(&self, why: &str) {
        self.lock().over.get_or_insert_with(|| why.to_owned());
        self.bell.ring();
    }

    pub(super) fn is_away(&self) -> bool {
        self.lock().away.is_some()
    }

    /// Whether its clocks are known well enough for nothing to arrive there before it was sent.
    pub(super) fn in_order(&self) -> bool {
        self.lock().clocks.status().is_some_and(|clock| clock.in_order)
    }

    /// Whether its clocks are known.
    pub(super) fn measured(&self) -> bool {
        self.lock().clocks.measured()
    }

    /// The shortest round trip so far.
    pub(super) fn shortest(&self) -> Option<Duration> {
        self.lock().clocks.shortest()
    }

    /// How well its counters are known.
    pub(super) fn clock(&self) -> Option<ClockStatus> {
        self.lock().clocks.status()
    }

    fn probe(&self, share: &Share) {
        let (mut news, now) = (self.lock(), Moment::here());
        // A second one would make the answer to the first worthless.
        let late = u128::from(now.monotonic.since(news.sent.1.monotonic)) >= LOST.as_nanos();
        if news.away.is_none() && (!news.asked || late) {
            let number = self.probes.fetch_add(1, Ordering::Relaxed);
            (news.sent, news.asked) = ((number, now), true);
            share.probe(number, now.monotonic);
        }
    }

    fn share(&self) -> Option<Arc<Share>> {
        self.share.get()?.upgrade()
    }
}

impl Console for Desk {
    fn interrupt(&self, targets: Targets, message: Message) {
        if let (Some(board), Some(share)) = (self.board.get(), self.share()) {
            let from = share as Arc<dyn Elsewhere>;
            board.switch().pass_on(targets, &message, &from);
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
        self.others.get().into_iter().flatten().for_each(|other| other.view(view));
        if let Some(board) = self.board.get() {
            Fabric::view(&**board, view);
        }
    }

    fn answered(&self, number: u32, _sent: Nanos, there: Moment) {
        let (Some(board), Some(share)) = (self.board.get(), self.share()) else { return };
        let now = Moment::here();
        let mut news = self.lock();
        let (last, sent) = news.sent;
        if last != number {
            return;
        }
        news.asked = false;
        let trip = now.monotonic.since(sent.monotonic);
        let halfway =
            board.clock().now().0.wrapping_sub(monotonic().wrapping_sub(sent.monotonic.0 + trip / 2));
        let (starts, ahead) = (!news.clocks.measured(), news.clocks.answered(sent, there, now, halfway));
        drop(news);
        if starts {
            // Somebody waits for it.
            self.bell.ring();
        }
        if let Some(Ahead { nanos, tsc }) = ahead {
            share.set_clock(nanos, tsc);
        }
    }

    fn away(&self, why: &str) {
        self.lock().away.get_or_insert_with(|| (Instant::now(), why.to_owned()));
        self.bell.ring();
    }

    fn back(&self) {
        self.lock().away = None;
        self.bell.ring();
    }

    fn over(&self, why: &str) {
        self.ends(why);
    }
}
