//! The agent as a process: accepting, watching over the connections, stopping.

use std::io::{self, Read};
use std::net::TcpListener;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use devices::disk::file::OpenError;
use devices::disk::volume::{self as protocol, Acquire, Lease};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use sd_notify::NotifyState;
use transport::identity::Security;
use transport::metrics::Registry;
use transport::server::{Limits, Sessions};
use vmm::memory::store::protocol::{Lending, Take, Taken};

use crate::admission::{self, Handle};
use crate::config::{Access, Config};
use crate::cpu::Cpus;
use crate::lease::{Activity, Refused, Table};
use crate::lists::Lists;
use crate::memory::{self, Lender};
use crate::policy::{Asker, Policy};
use crate::protection::{Protection, remember};
use crate::renewal::{LOOK_EVERY, Renewal};
use crate::tally::Tally;
use crate::volume::{Grant, User, Volume, lock};
use crate::{Error, inventory, metrics};

/// How long an image that another process has locked is waited for at the start: an agent that was killed
/// may leave I/O behind that the kernel still finishes.
const LOCK_WAIT: Duration = Duration::from_secs(10);
/// So many connections one node may have even where a quarter of all are fewer.
const PER_NODE: usize = 4;
/// So many peers are counted by name.
const PEERS: usize = 64;

/// What all connections share.
pub struct Agent {
    pub(crate) volumes: Vec<Volume>,
    pub(crate) memory: Arc<Lender>,
    pub(crate) cpus: Cpus,
    pub(crate) policy: Policy,
    pub(crate) security: Security,
    pub(crate) leases: Mutex<Table>,
    pub(crate) sessions: Arc<Sessions>,
    /// What the connections count, by peer.
    pub(crate) metrics: Arc<Registry>,
    name: String,
    stopping: AtomicBool,
    pub(crate) born: Instant,
    /// So many connections of peers that are known may be there at once.
    pub(crate) most: usize,
    /// So many requests a connection may have in flight.
    pub(crate) requests: u32,
    /// Connections that ended before their peers were known.
    pub(crate) unserved: Tally,
    /// Lists of revoked certificates that peers brought.
    pub(crate) lists: Lists,
    pub(crate) connections: Mutex<Vec<Arc<Handle>>>,
    /// When the accepting loop last came round: how the agent sees that it stood still itself.
    ticked: Mutex<Instant>,
}

/// What an `open` gave.
#[derive(Debug)]
pub(crate) struct Granted {
    pub(crate) volume: usize,
    /// What policy lets the asker do.
    pub(crate) allowed: Access,
    pub(crate) grant: Arc<Grant>,
    /// Revoked ones that must be idle first.
    pub(crate) earlier: Vec<Arc<Grant>>,
}

impl Agent {
    fn new(config: &Config, protection: Protection) -> Result<Self, Error> {
        let limits = Limits {
            requests: config.limits.requests,
            bytes: config.limits.memory.0,
            sessions: config.limits.connections.saturating_mul(2),
            connections: config.limits.connections,
            per_node: (config.limits.connections / 4).max(PER_NODE),
            rdma: config.rdma,
        };
        Ok(Self {
            volumes: config.volume.iter().cloned().map(Volume::new).collect(),
            memory: Lender::new(config.memory.as_ref(), config.lease_ttl.0),
            cpus: Cpus::new(config.cpu.as_ref()),
            policy: protection.policy,
            security: protection.security,
            leases: Mutex::new(Table::load(&config.state_folder(), config.lease_ttl.0)?),
            metrics: Registry::new(PEERS),
            sessions: Sessions::new(&config.agent_name(), limits),
            name: config.agent_name(),
            stopping: AtomicBool::new(false),
            born: Instant::now(),
            most: config.limits.connections,
            requests: config.limits.requests.max(4),
            unserved: Tally::new("A connection ended before its peer was served"),
            lists: Lists::new(),
            connections: Mutex::new(Vec::new()),
            ticked: Mutex::new(Instant::now()),
        })
    }

    /// Its name for people.
    pub(crate) fn name(&self) -> String {
        self.name.clone()
    }

    /// How many connections are served now, of peers that are known.
    pub(crate) fn connections(&self) -> usize {
        lock(&self.connections).iter().filter(|handle| handle.is_known()).count()
    }

    pub(crate) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }

    /// Gives a lease; `None`: there is no such volume.
    pub(crate) fn acquire(&self, asker: &Asker, asked: &Acquire) -> Result<u64, Option<Refused>> {
        self.permit(asker, &asked.volume)?;
        let volume = self.volumes.iter().find(|v| v.config.name == asked.volume).ok_or(None)?;
        let mut leases = lock(&self.leases);
        if volume.config.read_only {
            let epoch = leases.share(&asked.volume)?;
            if asked.expected != 0 && asked.expected != epoch {
                return Err(Some(Refused::Fenced(format!("volume {} was changed", asked.volume))));
            }
            return Ok(epoch);
        }
        let before = leases.get(&asked.volume).map(|record| record.epoch);
        let activity = self.activity(volume, leases.ttl());
        let epoch = leases.acquire(asked, asker.node(), activity)?;
        if before != Some(epoch) {
            // Under the table's lock, so that no older lease is opened in between.
            volume.revoke();
            let (volume, holder, to) = (&asked.volume, &asked.name, asker);
            tracing::info!(%volume, %holder, %to, epoch, "A lease was given");
        }
        volume.heard();
        Ok(epoch)
    }

    /// What a volume's holder did lately, not counting a time in which the agent could not hear it.
    fn activity(&self, volume: &Volume, ttl: Duration) -> Activity {
        let mut ticked = lock(&self.ticked);
        loop {
            let activity = volume.activity();
            // Looked at afterwards, so that a halt in between is seen too.
            if !self.stood_still(&mut ticked, ttl) {
                return activity;
            }
        }
    }

    /// The accepting loop comes round, at least every sixth of `ttl`.
    fn tick(&self, ttl: Duration) {
        let mut ticked = lock(&self.ticked);
        self.stood_still(&mut ticked, ttl);
        *ticked = Instant::now();
        drop(ticked);
        let overdue = self.overdue(self.memory.keep, ttl);
        self.memory.expire(&overdue);
        self.cpus.tick();
    }

    /// The leases of memory that were not renewed for `span`, not counting a time in which the agent could not hear
    /// their holders.
    fn overdue(&self, span: Duration, ttl: Duration) -> Vec<u64> {
        loop {
            let overdue = self.memory.overdue(span);
            // Looked at afterwards, so that a halt in between is seen too.
            if overdue.is_empty() || !self.stood_still(&mut lock(&self.ticked), ttl) {
                return overdue;
            }
        }
    }

    /// Whether the agent was stopped, frozen or starved for so long that holders' renewals may have been
    /// missed. Then their time starts anew, as after a restart.
    fn stood_still(&self, ticked: &mut Instant, ttl: Duration) -> bool {
        let still = ticked.elapsed();
        if still <= ttl / 3 {
            return false;
        }
        tracing::warn!(?still, "The agent stood still; the time of every lease starts anew");
        self.volumes.iter().for_each(Volume::heard);
        self.memory.heard();
        *ticked = Instant::now();
        true
    }

    /// What policy lets `asker` do with a volume of this name.
    fn permit(&self, asker: &Asker, volume: &str) -> Result<Access, Refused> {
        let access = self.policy.access(asker, volume);
        access.ok_or_else(|| Refused::Forbidden(self.policy.refusal(asker, volume)))
    }

    /// So many bytes `asker` may lease.
    pub(crate) fn permit_memory(&self, asker: &Asker) -> Result<u64, memory::Refused> {
        let allowed = self.policy.memory(asker);
        allowed.ok_or_else(|| memory::Refused::Forbidden(self.policy.memory_refusal(asker)))
    }

    /// Gives a lease of memory.
    pub(crate) fn take_memory(&self, asker: &Asker, asked: &Take) -> Result<Taken, memory::Refused> {
        let allowed = self.permit_memory(asker)?;
        let ttl = lock(&self.leases).ttl();
        let overdue = self.overdue(ttl, ttl);
        let epoch = || lock(&self.leases).fresh_epoch().map_err(memory::Refused::from);
        self.memory.take(asked, asker.node(), allowed, &overdue, epoch)
    }

    /// What is lent, as far as `asker` may know.
    pub(crate) fn lending(&self, asker: &Asker) -> Result<Lending, memory::Refused> {
        if !self.policy.shows_inventory(asker) {
            return Err(memory::Refused::Forbidden(self.policy.memory_refusal(asker)));
        }
        let all = self.policy.shows_memory(asker);
        let shows = |node: Option<&str>| all || asker.node().is_some() && node == asker.node();
        Ok(self.memory.lending(asker.node(), self.policy.memory(asker).unwrap_or(0), shows))
    }

    /// The volume of a lease that is current and `asker`'s, and what may be done with it.
    pub(crate) fn check(&self, asker: &Asker, lease: Lease) -> Result<(usize, Access), Refused> {
        self.check_in(&lock(&self.leases), asker, lease)
    }

    fn check_in(&self, leases: &Table, asker: &Asker, lease: Lease) -> Result<(usize, Access), Refused> {
        let read_only = |name: &str| self.volumes.iter().any(|v| v.config.name == name && v.config.read_only);
        let name = leases.check(lease, asker.node(), read_only)?;
        // A lease outlives the agent, and its policy may be another one since.
        let access = self.permit(asker, name)?;
        let gone = || Refused::Fenced(format!("the agent serves no volume {name} any more"));
        Ok((self.volumes.iter().position(|v| v.config.name == name).ok_or_else(gone)?, access))
    }

    /// Grants the volume of `lease` to a session of `asker`, see [`Volume::grant`]. Under the table's lock, so
    /// that a lease that is over by now revokes nothing of the new holder's.
    pub(crate) fn grant(&self, asker: &Asker, lease: Lease, session: u128) -> Result<Granted, Refused> {
        let leases = lock(&self.leases);
        let (index, allowed) = self.check_in(&leases, asker, lease)?;
        let volume = &self.volumes[index];
        let (grant, earlier) = volume.grant(lease.epoch, user(asker, session));
        volume.heard();
        Ok(Granted { volume: index, allowed, grant, earlier })
    }

    pub(crate) fn release(&self, asker: &Asker, lease: Lease) -> Result<(), Refused> {
        let mut leases = lock(&self.leases);
        let Some(name) = leases.release(lease, asker.node())? else { return Ok(()) };
        if let Some(volume) = self.volumes.iter().find(|v| v.config.name == name) {
            volume.revoke();
        }
        tracing::info!(volume = %name, epoch = lease.epoch, "A lease was given back");
        Ok(())
    }

    /// What a session of `asker` was granted under `epoch` on an earlier connection.
    ///
    /// # Errors
    /// Nothing, or policy does not allow it: the epoch of a volume that anybody may read is easily guessed.
    pub(crate) fn granted(&self, asker: &Asker, epoch: u64, session: u128) -> Result<Granted, Refused> {
        let user = user(asker, session);
        let find = |(index, v): (usize, &Volume)| Some((index, v.granted(epoch, &user)?));
        let found = self.volumes.iter().enumerate().find_map(find);
        let (volume, grant) = found.ok_or_else(|| self.fenced(epoch))?;
        let allowed = self.permit(asker, &self.volumes[volume].config.name)?;
        Ok(Granted { volume, allowed, grant, earlier: Vec::new() })
    }

    /// Why nothing may be done under `epoch`.
    pub(crate) fn fenced(&self, epoch: u64) -> Refused {
        let leases = lock(&self.leases);
        let why = match leases.volume_of(epoch) {
            Some((volume, _)) => format!("volume {volume} is open in another session of the same lease"),
            None => format!("lease {epoch} is over; the volume was given back or taken by another guest"),
        };
        Refused::Fenced(why)
    }

    /// The volumes that `asker` may know of.
    pub(crate) fn volumes_json(&self, asker: &Asker) -> Vec<u8> {
        let leases = lock(&self.leases);
        let list: Vec<protocol::Volume> = self
            .volumes
            .iter()
            .filter(|volume| self.policy.shows(asker, &volume.config.name))
            .map(|volume| {
                let name = volume.config.name.clone();
                let record = leases.get(&name);
                let image = volume.opened();
                protocol::Volume {
                    size: image.as_ref().map(|i| i.geometry().size),
                    read_only: volume.config.read_only,
                    direct: image.is_some_and(|i| i.is_direct()),
                    holder: record.and_then(|r| r.holder.as_ref()).map(ToString::to_string),
                    epoch: record.map(|r| r.epoch),
                    problem: volume.problem(),
                    name,
                }
            })
            .collect();
        serde_json::to_vec(&list).unwrap_or_default()
    }

    pub(crate) fn inventory_json(&self) -> Vec<u8> {
        let [size, leased, used] = self.memory.totals();
        let mut inventory = inventory::take();
        inventory.cpu.lent = self.cpus.lent();
        inventory.memory.lent = (size > 0).then_some(inventory::Lent { size, leased, used });
        serde_json::to_vec(&inventory).unwrap_or_default()
    }

    /// Ends the connections of peers whose certificates are revoked by what is known now, or are not valid any more. Their sessions cannot
    /// go on over new ones, so their leases expire.
    pub(crate) fn cut_revoked(&self) {
        let Security::Tls(identity) = &self.security else { return };
        for node in self.sessions.revoke(|peer| identity.revokes(peer)) {
            tracing::warn!(%node, "The node's certificate was revoked or is not valid any more; its connection is cut");
        }
    }

    /// Takes over the memory of guests from an earlier process, if it was kept.
    fn take_over_memory(&self) {
        let highest = self.memory.take_over();
        // Nothing that is given from now on may have their epochs, even if the table was lost.
        if let Err(why) = lock(&self.leases).at_least(highest) {
            tracing::error!(?why, "The epochs of kept memory could not be noted");
        }
    }

    /// Opens every volume. One that cannot be served does not keep the others from it.
    fn open_volumes(&self) {
        let until = Instant::now() + LOCK_WAIT;
        for volume in &self.volumes {
            let name = &volume.config.name;
            loop {
                match volume.image() {
                    Ok(image) => {
                        let (size, direct) = (image.geometry().size, image.is_direct());
                        tracing::info!(volume = %name, size, direct, path = %image.path().display(), "Serving");
                    }
                    Err(OpenError::Locked { .. }) if Instant::now() < until => {
                        thread::sleep(Duration::from_millis(50));
                        continue;
                    }
                    Err(error) => tracing::error!(volume = %name, %error, "The volume cannot be served"),
                }
                break;
            }
        }
    }

    /// Writes everything to stable storage; `false` if not everything is there.
    fn flush(&self) -> bool {
        let mut flushed = true;
        for volume in &self.volumes {
            let Some(image) = volume.opened() else { continue };
            if image.geometry().read_only {
                continue;
            }
            if let Err(error) = image.flush() {
                tracing::error!(volume = %volume.config.name, %error, "The volume could not be flushed");
                flushed = false;
            }
        }
        flushed
    }
}

fn user(asker: &Asker, session: u128) -> User {
    User { session, node: asker.node().map(str::to_owned) }
}

/// The signals that the agent takes, as something to poll.
struct Signals {
    stop: UnixStream,
    /// The identity's files have changed.
    reload: UnixStream,
}

impl Signals {
    fn catch() -> io::Result<Self> {
        use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
        Ok(Self { stop: caught(&[SIGTERM, SIGINT])?, reload: caught(&[SIGHUP])? })
    }

    /// Whether SIGHUP came since this was asked last.
    fn wants_reload(&mut self) -> bool {
        let mut bytes = [0; 64];
        matches!(self.reload.read(&mut bytes), Ok(1..))
    }
}

fn caught(signals: &[i32]) -> io::Result<UnixStream> {
    let (ours, theirs) = UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    for signal in signals {
        signal_hook::low_level::pipe::register(*signal, theirs.try_clone()?)?;
    }
    Ok(ours)
}

/// Serves until SIGTERM or SIGINT, then ends in order.
///
/// # Errors
/// The address, the state folder or the system does not allow it; or at the end not everything acknowledged is on
/// stable storage.
pub fn run(config: &Config) -> Result<(), Error> {
    let failed = |what| move |source| Error::System { what, source };
    let address = config.address();
    let protection = Protection::of(config)?;
    protection.warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
    tracing::info!("{}", protection.describe());
    let folder = config.state_folder();
    remember(config, &protection.security).map_err(|source| Error::State { path: folder, source })?;
    let mut signals = Signals::catch().map_err(failed("Cannot catch signals"))?;
    memory::check(config)?.iter().for_each(|warning| tracing::warn!("{warning}"));
    let agent = Arc::new(Agent::new(config, protection)?);
    agent.take_over_memory();
    Lists::start(&agent).map_err(failed("Cannot start a thread"))?;
    agent.open_volumes();
    agent.tick(config.lease_ttl.0);
    if let Some(address) = config.metrics_address() {
        metrics::start(address, &agent)?;
    }
    let listener = TcpListener::bind(address).map_err(|source| Error::Listen { address, source })?;
    listener.set_nonblocking(true).map_err(|source| Error::Listen { address, source })?;
    let bound = listener.local_addr().unwrap_or(address);
    tracing::info!(address = %bound, volumes = agent.volumes.len(), "Listening");
    notify(&[NotifyState::Ready, NotifyState::Status(&format!("Listening on {bound}"))]);
    accept_until_stopped(&agent, config, &listener, &mut signals)
        .map_err(failed("Cannot wait for connections"))?;
    drop(listener);
    notify(&[NotifyState::Stopping, NotifyState::Status("Finishing what is in flight")]);
    tracing::info!("Stopping");
    agent.cpus.end();
    if wind_up(&agent, config.stop_timeout.0) { Ok(()) } else { Err(Error::NotFlushed) }
}

/// Tells systemd, where the agent runs under it.
fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!(%error, "systemd cannot be told");
    }
}

fn accept_until_stopped(
    agent: &Arc<Agent>,
    config: &Config,
    listener: &TcpListener,
    signals: &mut Signals,
) -> io::Result<()> {
    let watchdog = sd_notify::watchdog_enabled();
    let pause = watchdog.map_or(Duration::from_secs(5), |limit| limit / 3);
    let ttl = config.lease_ttl.0;
    let mut renewal = Renewal::new();
    let round = pause.min(ttl / 6).min(LOOK_EVERY);
    let timeout = PollTimeout::try_from(round).unwrap_or(PollTimeout::from(1000u16));
    let (mut pinged, mut told) = (Instant::now(), usize::MAX);
    loop {
        let readable = |fd| PollFd::new(fd, PollFlags::POLLIN);
        let mut polled = [listener.as_fd(), signals.stop.as_fd(), signals.reload.as_fd()].map(readable);
        match poll(&mut polled, timeout) {
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
        if polled[1].any().unwrap_or(false) {
            return Ok(());
        }
        agent.tick(ttl);
        renewal.look(agent, signals.wants_reload());
        admission::accept(agent, listener);
        agent.unserved.tell();
        let connections = lock(&agent.connections);
        if connections.len() != told {
            told = connections.len();
            let served = if told == 1 { "connection" } else { "connections" };
            notify(&[NotifyState::Status(&format!("{told} {served}, {} volumes", agent.volumes.len()))]);
        }
        if pinged.elapsed() < pause / 2 {
            continue;
        }
        pinged = Instant::now();
        // The ping says that this loop and every connection's thread come round, not that a timer ticks.
        if connections.iter().all(|c| c.is_alive()) {
            if watchdog.is_some() {
                notify(&[NotifyState::Watchdog]);
            }
        } else {
            tracing::error!("A connection's thread hangs; the watchdog is not told that all is well");
        }
    }
}

/// Lets every connection finish what is in flight and say goodbye, then flushes the volumes. `false`: not all of
/// what was acknowledged is on stable storage.
fn wind_up(agent: &Agent, timeout: Duration) -> bool {
    agent.stopping.store(true, Ordering::SeqCst);
    for handle in &*lock(&agent.connections) {
        handle.wake.write(1).ok();
    }
    let until = Instant::now() + timeout;
    while !lock(&agent.connections).is_empty() && Instant::now() < until {
        thread::sleep(Duration::from_millis(5));
    }
    let left = lock(&agent.connections).len();
    if left > 0 {
        tracing::warn!(left, ?timeout, "Connections did not end in time; their peers will ask again");
    }
    if let Some(lost) = agent.memory.loses() {
        tracing::warn!(%lost, "The memory of guests that is stored here ends with this process: nothing keeps it");
    }
    let flushed = agent.flush();
    match (flushed, left) {
        (true, 0) => tracing::info!("Stopped; everything acknowledged is on stable storage"),
        (true, _) => {
            tracing::warn!("Stopped; what the connections left did last may not be on stable storage");
        }
        (false, _) => tracing::error!("Stopped; not everything acknowledged is on stable storage"),
    }
    flushed
}

#[cfg(test)]
pub(crate) mod testing {
    use vmm::units::Span;

    use super::*;
    use crate::config::{DirectIo, Volume as Configured};

    /// An agent that nobody reaches, with a volume `v` and one `r` to read only.
    pub(crate) fn agent(ttl: Duration) -> (tempfile::TempDir, Agent) {
        let folder = tempfile::tempdir().expect("a folder");
        let volume = |name: &str, read_only| Configured {
            name: name.into(),
            path: folder.path().join(name),
            read_only,
            direct: DirectIo::Off,
            create: None,
        };
        let config = Config {
            state: Some(folder.path().join("state")),
            lease_ttl: Span(ttl),
            volume: vec![volume("v", false), volume("r", true)],
            ..Config::default()
        };
        let agent = Agent::new(&config, Protection::of(&config).expect("loopback")).expect("it starts");
        (folder, agent)
    }
}

#[cfg(test)]
mod tests {
    use super::testing::agent;
    use super::*;

    const PLAIN: Asker = Asker::Unproven;

    fn ask(volume: &str, holder: u128) -> Acquire {
        Acquire { volume: volume.into(), holder, expected: 0, name: format!("guest-{holder}") }
    }

    #[test]
    fn an_open_whose_lease_is_over_revokes_nothing_of_the_new_holders() {
        let (_folder, agent) = agent(Duration::from_secs(10));
        let old = Lease { epoch: agent.acquire(&PLAIN, &ask("v", 1)).expect("free"), holder: 1 };
        assert!(agent.check(&PLAIN, old).is_ok(), "its open begins");
        agent.release(&PLAIN, old).expect("released");
        let new = Lease { epoch: agent.acquire(&PLAIN, &ask("v", 2)).expect("free"), holder: 2 };
        let Granted { grant, .. } = agent.grant(&PLAIN, new, 2).expect("current");
        assert!(matches!(agent.grant(&PLAIN, old, 1), Err(Refused::Fenced(_))));
        assert!(grant.enter(), "the new holder goes on");
    }

    #[test]
    fn a_lease_expires_only_while_the_agent_does_not_stand_still() {
        let ttl = Duration::from_millis(600);
        let (_folder, agent) = agent(ttl);
        agent.acquire(&PLAIN, &ask("v", 1)).expect("free");
        for _ in 0..2 {
            thread::sleep(ttl + Duration::from_millis(50));
            // The first time the asker notices it, the second time the accepting loop.
            let refused = agent.acquire(&PLAIN, &ask("v", 2));
            assert!(matches!(refused, Err(Some(Refused::Leased { .. }))), "{refused:?}");
            thread::sleep(ttl + Duration::from_millis(50));
            agent.tick(ttl);
        }
        let until = Instant::now() + Duration::from_secs(30);
        while agent.acquire(&PLAIN, &ask("v", 2)).is_err() {
            assert!(Instant::now() < until, "it never expires");
            thread::sleep(ttl / 12);
            agent.tick(ttl);
        }
    }

    #[test]
    fn only_a_volume_that_is_read_only_opens_without_a_holder() {
        let (_folder, agent) = agent(Duration::from_secs(10));
        let lease = Lease { epoch: agent.acquire(&PLAIN, &ask("v", 1)).expect("free"), holder: 1 };
        agent.release(&PLAIN, lease).expect("released");
        for epoch in 0..lease.epoch + 5 {
            assert!(agent.grant(&PLAIN, Lease { epoch, holder: 7 }, 7).is_err(), "epoch {epoch}");
        }
        let epoch = agent.acquire(&PLAIN, &ask("r", 1)).expect("shared");
        agent.grant(&PLAIN, Lease { epoch, holder: 7 }, 7).expect("anybody reads it");
    }
}
