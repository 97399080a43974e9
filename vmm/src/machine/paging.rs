//! A guest whose memory is on other PCs too: why it stands still without having been asked to, and how it goes on.
//!
//! When a page is needed that only a helper has which is away, the vCPU that touched it hangs inside a page fault, and
//! others would follow one after the other. So the guest stops as a whole: to itself it looks as if no time had
//! passed. A vCPU in a page fault cannot be made to leave it, but runs no instruction before it pauses.
//!
//! ```text
//!            helper away for a second, and something waits      user pauses
//!   Running ─────────────────────────────────────────────▶ Held ───────────▶ Held, to stay paused
//!      ▲                     it is back                     │                     │ it is back
//!      └────────────────────────────────────────────────────┘                     ▼
//!                                                                               Paused
//! ```

use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, TryLockError};
use std::time::{Duration, Instant};

use devices::thread::{Role, spawn};
use transport::identity::{Reloading, Security};

use super::parts::{Parts, lock};
use super::spanning::Spanning;
use super::{Error, Exit, agents};
use crate::config;
use crate::control::{State, Waiting};
use crate::memory::Ram;
use crate::memory::fault::{self, Engine, Pieces, Shards, handlers};
use crate::memory::store::{
    Connected, Control, Health, Helper, OnLoss, Source, Standing, Stuck, Terms, connect,
};

/// A helper that answers again within this time only made the guest slow.
const GRACE: Duration = Duration::from_secs(1);
/// A vCPU that has not paused by then, while pages are missing, waits for one.
const IN_A_FAULT: Duration = Duration::from_secs(2);
/// How often the watcher looks although nothing changed.
const LOOK: Duration = Duration::from_millis(500);

/// A guest's memory on other PCs.
pub(super) struct Paging {
    /// Closed after everything that touches guest RAM has ended.
    pub(super) engine: Engine,
    pub(super) control: Arc<Control>,
    pub(super) health: Arc<Health>,
    /// To a thread that may open files and start threads, as nobody may who answers the control socket.
    adding: Mutex<Sender<Adding>>,
}

/// A helper to take memory of, and who is told how that went.
type Adding = (config::Helper, Sender<Result<(), String>>);

/// Has the helpers of `guest` lend what it needs, and handles the faults of `ram` from now on; `None` for a guest whose
/// memory is all here. Nobody may have touched `ram` yet.
pub(super) fn start(
    ram: &Ram,
    guest: &config::Guest,
    identity: Option<&Arc<Reloading>>,
) -> Result<Option<Arc<Paging>>, Error> {
    let Some(local) = guest.memory.local else { return Ok(None) };
    let pieces = Pieces::new(guest.memory.size);
    let handlers = (handlers(guest.cpu.count.into()) as u32).min(pieces.count());
    let shards = Shards::new(pieces, handlers);
    let helpers = helpers(guest, identity)?;
    let terms = terms(guest, shards);
    let names: Vec<&str> = helpers.iter().map(|helper| helper.agent.as_str()).collect();
    tracing::info!("Asking {} for memory", names.join(", "));
    let asked = Instant::now();
    let Connected { stores, control, health } = connect(&helpers, &terms)?;
    tracing::info!(
        "The memory asked for is there: {} of RAM, up to {local} of it on this PC (took {} ms)",
        guest.memory.size,
        asked.elapsed().as_millis()
    );
    let sources = stores.into_iter().map(|store| Box::new(store) as Box<dyn Source>).collect();
    let engine = Engine::start(ram, sources, fault::Options { local })?;
    let adding = Mutex::new(adder(&control, identity.cloned())?);
    Ok(Some(Arc::new(Paging { engine, control, health, adding })))
}

/// Starts the thread that meets helpers that join while the guest runs. It ends with the guest.
fn adder(control: &Arc<Control>, identity: Option<Arc<Reloading>>) -> Result<Sender<Adding>, Error> {
    let (send, asked) = channel::<Adding>();
    let control = Arc::clone(control);
    let body = move || {
        for (config, tell) in asked {
            let met = helper(&config, identity.as_ref());
            let added = met.and_then(|helper| control.add(&helper).map_err(|error| error.to_string()));
            // Whoever asked may have given up.
            let _ = tell.send(added);
        }
    };
    let thread = std::thread::Builder::new().name("memory-add".to_owned());
    thread.spawn(body).map(|_| send).map_err(Error::Thread)
}

fn terms(guest: &config::Guest, shards: Shards) -> Terms {
    let on_loss = match guest.memory.on_loss {
        config::OnLoss::None => OnLoss::None,
        config::OnLoss::Mirror => OnLoss::Mirror,
        config::OnLoss::LocalDisk => OnLoss::LocalDisk,
    };
    let mut terms = Terms::new(&guest.name, &agents::client(&guest.name), shards, on_loss);
    terms.local = guest.memory.local.map_or(0, |local| local.0);
    terms.swap_file.clone_from(&guest.memory.swap_file);
    terms.compress = guest.memory.compress;
    if let Some(patience) = guest.memory.patience {
        terms.patience = patience.0;
    }
    terms
}

fn helpers(guest: &config::Guest, identity: Option<&Arc<Reloading>>) -> Result<Vec<Helper>, Error> {
    guest.memory.helper.iter().map(|config| helper(config, identity).map_err(Error::Helper)).collect()
}

/// How a helper of the configuration is reached; or why it cannot be trusted.
fn helper(config: &config::Helper, identity: Option<&Arc<Reloading>>) -> Result<Helper, String> {
    let peer = config::Peer::from(config);
    let security = agents::security(&peer, identity)?;
    if config.insecure {
        tracing::warn!(
            "INSECURE: the guest's memory goes to {} over plain TCP: whoever is on the network between may read and \
             change it",
            config.agent
        );
    }
    let node = matches!(security, Security::Tls(_)).then(|| peer.expected_node()).flatten();
    let transport = agents::transport(&peer);
    Ok(Helper { agent: config.agent.clone(), node, security, transport, size: config.size.0 })
}

impl Paging {
    /// Takes memory of another helper. Returns when it has answered; or why it gives none.
    pub(super) fn add(&self, helper: config::Helper) -> Result<(), String> {
        if let Some(mistake) = config::Peer::from(&helper).mistake() {
            return Err(mistake);
        }
        let known = self.health.report().helpers;
        let left = |standing: &Standing| matches!(standing, Standing::Left { .. });
        if known.iter().any(|known| known.name == helper.agent && !left(&known.standing)) {
            return Err(format!("{} lends the guest memory already", helper.agent));
        }
        let (tell, told) = channel();
        let ended = || "the guest is ending".to_owned();
        let adding = lock(&self.adding).clone();
        adding.send((helper, tell)).map_err(|_| ended())?;
        told.recv().map_err(|_| ended())?
    }

    /// The helper that something has been waiting for, for longer than it may take.
    fn missed(&self) -> Option<Stuck> {
        self.health.report().stuck.filter(|stuck| stuck.since.elapsed() >= GRACE)
    }

    fn lost(&self) -> Option<String> {
        self.health.report().lost.map(|(_, why)| why).or_else(|| self.engine.lost())
    }
}

/// How a guest stands still for a helper.
#[derive(Default)]
pub(super) struct Held {
    /// For whom.
    stuck: Option<Stuck>,
    /// The vCPUs were stopped for it; the devices were not.
    vcpus: bool,
    /// And are to stay so when it is back.
    by_user: bool,
}

impl Held {
    /// Whether the vCPUs will go on by themselves.
    pub(super) fn goes_on(&self) -> bool {
        self.vcpus && !self.by_user
    }

    /// What the guest waits for, for people.
    pub(super) fn waiting(&self) -> Option<Waiting> {
        self.stuck.as_ref().map(|Stuck { helper, since, why }| {
            let for_ms = u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX);
            Waiting { helper: helper.clone(), why: why.clone(), for_ms }
        })
    }

    /// The vCPUs run again, by somebody else's doing.
    pub(super) fn vcpus_run(&mut self) {
        self.vcpus = false;
    }
}

/// Starts the thread that stops the guest while a helper is missed, and ends it when memory is lost.
pub(super) fn watch(parts: &Arc<Parts>) -> Result<(), Error> {
    let Some(paging) = parts.paging.clone() else { return Ok(()) };
    let parts = Arc::downgrade(parts);
    let body = move || {
        let mut version = u64::MAX;
        loop {
            version = paging.health.wait(version, LOOK).version;
            let Some(parts) = parts.upgrade() else { return };
            if parts.state() == State::Ending {
                return;
            }
            if let Some(why) = paging.lost() {
                tracing::error!("Pages of the guest's memory are lost, so that it can only end: {why}");
                return parts.finish(Ok(Exit::MemoryLost));
            }
            match paging.missed() {
                Some(stuck) => parts.hold(stuck),
                None => parts.let_go(),
            }
        }
    };
    spawn(Role::Control, "memory-watch", body).map(drop).map_err(Error::Thread)
}

impl Parts {
    /// What the guest has to stand still for.
    fn missed(&self) -> Option<Stuck> {
        let paging = self.paging.as_ref().and_then(|paging| paging.missed());
        paging.or_else(|| self.spanning.as_ref().and_then(Spanning::missed))
    }

    /// Whether somebody waits for a page or a vCPU that cannot come now.
    pub(super) fn waits_for_memory(&self) -> bool {
        self.missed().is_some()
    }

    /// For a pause that began now: whether to stop waiting for vCPUs, because they hang in page faults.
    pub(super) fn hangs(&self) -> impl Fn() -> bool {
        let begun = Instant::now();
        move || begun.elapsed() >= IN_A_FAULT && self.waits_for_memory()
    }

    /// Stops the vCPUs until [`let_go`](Self::let_go). May be called again.
    pub(super) fn hold(&self, stuck: Stuck) {
        let Stuck { helper, why, .. } = &stuck;
        let mut held = lock(&self.held);
        if held.stuck.as_ref().is_none_or(|known| known.helper != *helper) {
            tracing::warn!(
                %helper,
                "The guest stands still: it needs memory of a helper that is away ({why}); it goes on by itself when \
                 that is back, `omega stop --force` ends it"
            );
        }
        held.stuck = Some(stuck);
        drop(held);
        // Who holds the lock waits for the same memory, or is done soon.
        let _life = match self.life.try_lock() {
            Ok(life) => life,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return,
        };
        if self.state() == State::Running {
            self.set_state(State::Paused);
            lock(&self.held).vcpus = true;
            // Those that hang in a page fault count as paused.
            let _ = self.gang.pause_unless(IN_A_FAULT, &|| !self.waits_for_memory());
        }
    }

    /// The memory is there: lets the vCPUs go on, unless somebody paused the guest meanwhile.
    pub(super) fn let_go(&self) {
        if lock(&self.held).stuck.is_none() {
            return;
        }
        let _life = match self.life.try_lock() {
            Ok(life) => life,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return,
        };
        let was = std::mem::take(&mut *lock(&self.held));
        let helper = was.stuck.map(|stuck| stuck.helper).unwrap_or_default();
        match (was.vcpus, was.by_user) {
            (true, true) => {
                tracing::info!(%helper, "The guest's memory is there again; the guest stays paused");
                if let Err(error) = self.pause() {
                    tracing::error!(%error, "The guest could not be paused and runs on");
                }
            }
            (true, false) => {
                tracing::info!(%helper, "The guest's memory is there again; the guest goes on");
                self.go();
            }
            (false, _) => tracing::info!(%helper, "The guest's memory is there again"),
        }
    }

    /// A pause failed because vCPUs or devices wait for memory: it is made whole when that is back. `false` if they
    /// do not. Called with the life's lock.
    pub(super) fn pause_later(&self) -> bool {
        let Some(stuck) = self.missed() else { return false };
        *lock(&self.held) = Held { stuck: Some(stuck), vcpus: true, by_user: true };
        self.set_state(State::Paused);
        true
    }

    /// Whether the guest will stay paused because a user wants it, though it stands still for a helper: after
    /// `paused` was wanted or not wanted any more. `None`: it does not stand still for a helper.
    pub(super) fn want_paused(&self, paused: bool) -> Option<Waiting> {
        let mut held = lock(&self.held);
        if !held.vcpus {
            return None;
        }
        held.by_user = paused;
        held.waiting()
    }
}
