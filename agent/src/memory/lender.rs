//! Who has leased how much of the memory that is lent.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use devices::disk::volume::Lease;
use vmm::memory::store::protocol::{Lending, Lent, Open, Take, Taken};
use vmm::units::Bytes;

use super::loan::{Clock, Loan};
use super::mapping::Mapping;
use super::record::{Record, VERSION};
use super::store::Store;
use super::{PAGE, Refused, handover, usage};
use crate::config;
use crate::lease::Holder;
use crate::volume::{User, lock};

/// Leases at once, and of one node.
const LOANS: usize = 256;
const PER_NODE: usize = 64;
/// A lease is of so many pages of RAM at most, 1 TiB: also numbers cost the agent a little.
const RAM: u64 = (1 << 40) / PAGE;
/// So many pages are given back at once; more take a thread their time.
const FEW: u64 = 4096;
/// Clearing is asked after so often.
const CLEARING: Duration = Duration::from_millis(50);

/// What is counted of a lease.
pub(crate) struct Sight {
    pub(crate) lent: Lent,
    pub(crate) fetched: u64,
    pub(crate) stored: u64,
}

#[derive(Debug, Default)]
struct Loans {
    by_epoch: HashMap<u64, Arc<Loan>>,
    /// Pages of leases that have ended and are not all given back.
    clearing: u64,
}

impl Loans {
    fn leased(&self) -> u64 {
        self.by_epoch.values().map(|loan| loan.store.quota()).sum()
    }

    /// The pages that `node` has leased, and in how many leases.
    fn of_node(&self, node: Option<&str>) -> (u64, usize) {
        let theirs = self.by_epoch.values().filter(|loan| loan.record.holder.node.as_deref() == node);
        theirs.fold((0, 0), |(pages, count), loan| (pages + loan.store.quota(), count + 1))
    }
}

/// All memory that is lent.
#[derive(Debug)]
pub(crate) struct Lender {
    /// Pages that may be leased.
    size: u64,
    locked: bool,
    ttl: Duration,
    /// A lease that was not renewed for so long ends, even if nobody wants its memory.
    pub(crate) keep: Duration,
    loans: Mutex<Loans>,
    clock: Arc<Clock>,
}

impl Lender {
    /// Lends what `config` says; nothing without one.
    pub(crate) fn new(config: Option<&config::Memory>, ttl: Duration) -> Arc<Self> {
        let (size, locked, keep) = config.map_or((0, false, ttl), |m| (m.size.0, m.lock, m.keep.0));
        let clock = Clock::start();
        let (size, keep, loans) = ((size / PAGE).min(usage::MOST), keep.max(ttl), Mutex::default());
        Arc::new(Self { size, locked, ttl, keep, loans, clock })
    }

    /// Takes over what an earlier process of the agent held, if systemd kept it. Returns the highest epoch: new ones
    /// must be above.
    pub(crate) fn take_over(&self) -> u64 {
        let mut highest = 0;
        for kept in handover::kept() {
            highest = highest.max(kept.epoch().unwrap_or(0));
            let epoch = kept.epoch();
            if self.size == 0 {
                tracing::warn!(epoch, "The memory of a guest is given up: no `[memory]` is lent any more");
                kept.discard();
                continue;
            }
            let adopted = kept.file.try_clone().and_then(Mapping::of);
            match adopted.and_then(|mapping| Store::adopt(mapping, self.locked)) {
                Ok(Some((record, store))) if Some(record.epoch) == epoch => self.adopt(record, store),
                Ok(Some(_)) => {
                    tracing::error!(epoch, "A guest's memory was kept under another's name; it is given up");
                    kept.discard();
                }
                Ok(None) => kept.discard(),
                Err(error) => {
                    tracing::error!(%error, epoch, "A guest's memory was kept and cannot be used; it is given up");
                    kept.discard();
                }
            }
        }
        let leased = lock(&self.loans).leased();
        if leased > self.size {
            let (leased, size) = (Bytes(leased * PAGE), Bytes(self.size * PAGE));
            tracing::warn!(%leased, %size, "More memory is leased than is lent now; nobody gets any until guests end");
        }
        highest
    }

    fn adopt(&self, record: Record, store: Store) {
        let (epoch, used) = (record.epoch, Bytes(store.used() * PAGE));
        tracing::info!(holder = %record.holder, epoch, %used, "The memory of a guest is here still");
        lock(&self.loans).by_epoch.insert(epoch, Loan::new(record, store, &self.clock));
    }

    /// Gives, confirms or resizes a lease for a node that may lease `allowed` bytes. Of the leases `overdue` as many end as it
    /// takes. `next` makes an epoch.
    ///
    /// # Errors
    /// [`Refused`]; nothing has changed then, but that overdue leases may have ended.
    pub(crate) fn take(
        self: &Arc<Self>,
        asked: &Take,
        node: Option<&str>,
        allowed: u64,
        overdue: &[u64],
        next: impl FnOnce() -> Result<u64, Refused>,
    ) -> Result<Taken, Refused> {
        if self.size == 0 {
            let why = "it lends no memory: its agent.toml has no `[memory]`".to_owned();
            return Err(Refused::NoMemory { wait: Duration::ZERO, why });
        }
        let quota = asked.quota.min(usage::MOST);
        let mut loans = lock(&self.loans);
        if asked.expected != 0 {
            let loan = self.confirm(&mut loans, asked, node, (quota, allowed), overdue)?;
            return Ok(self.taken(&loan));
        }
        if asked.pages > RAM {
            let why = format!("it lends memory to guests with {} of RAM at most", Bytes(RAM * PAGE));
            return Err(Refused::NoMemory { wait: Duration::ZERO, why });
        }
        // A new lease of the same holder is in place of the one that it had.
        let is_theirs = |loan: &&Arc<Loan>| loan.record.holder.is(asked.holder, node);
        let earlier: Vec<Arc<Loan>> = loans.by_epoch.values().filter(is_theirs).cloned().collect();
        for loan in earlier {
            self.end(&mut loans, &loan, "its holder took a new one");
        }
        let (_, count) = loans.of_node(node);
        if loans.by_epoch.len() >= LOANS || count >= PER_NODE {
            let why = "as many leases are given as can be, in all or to this node".to_owned();
            return Err(Refused::NoMemory { wait: Duration::ZERO, why });
        }
        self.make_room(&mut loans, node, quota, allowed, overdue)?;
        let holder = Holder { id: asked.holder, name: asked.guest.clone(), node: node.map(str::to_owned) };
        let instance = instance()?;
        let record = Record { version: VERSION, epoch: next()?, instance, pages: asked.pages, holder };
        let store = Store::create(&record, quota, self.locked)
            .map_err(|error| Refused::failed("no memory can be set aside for the lease", &error))?;
        let (epoch, holder) = (record.epoch, record.holder.clone());
        tracing::info!(%holder, epoch, quota = %Bytes(quota * PAGE), "Memory was leased");
        let loan = Loan::new(record, store, &self.clock);
        handover::keep(epoch, loan.store.mapping().fd());
        loans.by_epoch.insert(epoch, Arc::clone(&loan));
        Ok(self.taken(&loan))
    }

    fn taken(&self, loan: &Loan) -> Taken {
        loan.heard();
        Taken { epoch: loan.record.epoch, instance: loan.record.instance, ttl: self.ttl }
    }

    /// A lease that its holder has: with the quota that it wants now.
    fn confirm(
        self: &Arc<Self>,
        loans: &mut Loans,
        asked: &Take,
        node: Option<&str>,
        (quota, allowed): (u64, u64),
        overdue: &[u64],
    ) -> Result<Arc<Loan>, Refused> {
        let lease = Lease { epoch: asked.expected, holder: asked.holder };
        let loan = find(loans, lease, node)?;
        if loan.record.pages != asked.pages {
            return Err(Refused::OutOfRange(format!("the lease is of {} pages of RAM", loan.record.pages)));
        }
        // It is heard of now, so it does not make room for itself.
        loan.heard();
        let more = quota.saturating_sub(loan.store.quota());
        if more > 0 {
            self.make_room(loans, node, more, allowed, overdue)?;
        }
        let full = |used| Refused::Full(format!("{} are stored already", Bytes(used * PAGE)));
        loan.store.resize(quota).map_err(full)?;
        Ok(loan)
    }

    /// Sees to it that `quota` pages are free for `node`, and ends overdue leases for that.
    fn make_room(
        self: &Arc<Self>,
        loans: &mut Loans,
        node: Option<&str>,
        quota: u64,
        allowed: u64,
        overdue: &[u64],
    ) -> Result<(), Refused> {
        let (theirs, _) = loans.of_node(node);
        let theirs_after = theirs.saturating_add(quota).saturating_mul(PAGE);
        if theirs_after > allowed {
            let (allowed, theirs) = (Bytes(allowed), Bytes(theirs * PAGE));
            return Err(Refused::Forbidden(format!(
                "{} of memory are asked for, and its `[[allow]]` gives this node's guests {allowed}, of which they \
                 have {theirs}",
                Bytes(quota * PAGE)
            )));
        }
        let mut free = self.size.saturating_sub(loans.leased());
        let ended = overdue.iter().filter_map(|epoch| loans.by_epoch.get(epoch).cloned());
        let mut ended: Vec<Arc<Loan>> = ended.filter(|loan| loan.idle() >= self.ttl).collect();
        ended.sort_by_key(|loan| std::cmp::Reverse(loan.idle()));
        let possible: u64 = ended.iter().map(|loan| loan.store.quota()).sum();
        if free + possible < quota {
            return Err(self.no_memory(loans, quota, free));
        }
        for loan in ended {
            if free >= quota {
                break;
            }
            free += loan.store.quota();
            self.end(loans, &loan, "it was not renewed, and its memory is wanted");
        }
        if free - loans.clearing.min(free) < quota {
            let why = "the memory of a guest that has ended is being cleared".to_owned();
            return Err(Refused::NoMemory { wait: CLEARING, why });
        }
        Ok(())
    }

    fn no_memory(&self, loans: &Loans, quota: u64, free: u64) -> Refused {
        // When those expire whose guests seem to be gone, if that is enough.
        let silent = loans.by_epoch.values().filter(|loan| loan.idle() > self.ttl / 2);
        let mut silent: Vec<(Duration, u64)> =
            silent.map(|loan| (self.ttl.saturating_sub(loan.idle()), loan.store.quota())).collect();
        silent.sort_unstable();
        let mut later = free;
        let enough = silent.into_iter().find(|(_, pages)| {
            later += pages;
            later >= quota
        });
        let [asked, size, free] = [quota, self.size, free].map(|pages| Bytes(pages * PAGE));
        let why = format!("{asked} of memory are asked for, and of {size} that it lends {free} are free");
        Refused::NoMemory { wait: enough.map_or(Duration::ZERO, |(wait, _)| wait.max(CLEARING)), why }
    }

    /// Ends a lease: no request finds it any more, and its memory is given back.
    fn end(self: &Arc<Self>, loans: &mut Loans, loan: &Arc<Loan>, why: &str) {
        let epoch = loan.epoch();
        if loans.by_epoch.remove(&epoch).is_none() {
            return;
        }
        loan.store.end();
        handover::drop_kept(epoch);
        let used = Bytes(loan.store.used() * PAGE);
        tracing::info!(holder = %loan.record.holder, epoch, %used, why, "A lease of memory is over; it is cleared");
        if loan.store.used() <= FEW {
            loan.store.clear();
        }
        let pages = loan.store.used();
        if pages == 0 {
            return;
        }
        loans.clearing += pages;
        let (lender, store) = (Arc::clone(self), Arc::clone(&loan.store));
        let clear = move || {
            store.clear();
            // What is still on its way out follows within a moment, bounded by what its connection may have.
            lock(&lender.loans).clearing -= pages;
        };
        if thread::Builder::new().name("clear-memory".to_owned()).spawn(clear).is_err() {
            // Without a thread, here and now.
            loan.store.clear();
            loans.clearing -= pages;
        }
    }

    /// The lease that `asked` names, opened for a session.
    ///
    /// # Errors
    /// It is not the holder's, or its content is lost.
    pub(super) fn open(&self, asked: &Open, user: User) -> Result<Arc<Loan>, Refused> {
        let loan = find(&lock(&self.loans), asked.lease(), user.node.as_deref())?;
        if loan.record.instance != asked.instance {
            return Err(Refused::Gone(
                "the lease has other memory by now; what was stored is gone".to_owned(),
            ));
        }
        loan.open(user)?;
        loan.heard();
        Ok(loan)
    }

    /// The lease `epoch`, which a session uses again over a new connection.
    ///
    /// # Errors
    /// It is over, or this session has not opened it.
    pub(super) fn opened(&self, epoch: u64, user: &User) -> Result<Arc<Loan>, Refused> {
        let loan = lock(&self.loans).by_epoch.get(&epoch).cloned().ok_or_else(|| gone(epoch))?;
        if loan.record.holder.node != user.node {
            return Err(gone(epoch));
        }
        Ok(loan)
    }

    /// Keeps a lease.
    ///
    /// # Errors
    /// It is over.
    pub(super) fn renew(&self, lease: Lease, node: Option<&str>) -> Result<(), Refused> {
        find(&lock(&self.loans), lease, node)?.heard();
        Ok(())
    }

    /// Ends a lease of `node`; one that is over already is no error.
    pub(super) fn release(self: &Arc<Self>, lease: Lease, node: Option<&str>) {
        let mut loans = lock(&self.loans);
        if let Ok(loan) = find(&loans, lease, node) {
            self.end(&mut loans, &loan, "it was given back");
        }
    }

    /// The leases that were not renewed for `span`.
    pub(crate) fn overdue(&self, span: Duration) -> Vec<u64> {
        lock(&self.loans).by_epoch.values().filter(|l| l.idle() >= span).map(|l| l.epoch()).collect()
    }

    /// Ends these leases, unless they were renewed since.
    pub(crate) fn expire(self: &Arc<Self>, overdue: &[u64]) {
        let mut loans = lock(&self.loans);
        for epoch in overdue {
            if let Some(loan) = loans.by_epoch.get(epoch).filter(|loan| loan.idle() >= self.keep).cloned() {
                self.end(&mut loans, &loan, "it was not renewed");
            }
        }
    }

    /// Every holder counts as heard of just now: the agent could not hear them.
    pub(crate) fn heard(&self) {
        self.clock.was_deaf();
    }

    /// What is lent, for an asker of `node` that may lease `allowed` bytes and know of the leases that `shows` says.
    pub(crate) fn lending(
        &self,
        node: Option<&str>,
        allowed: u64,
        shows: impl Fn(Option<&str>) -> bool,
    ) -> Lending {
        let loans = lock(&self.loans);
        let leased = loans.leased();
        let (theirs, _) = loans.of_node(node);
        let free = self.size.saturating_sub(leased + loans.clearing).saturating_mul(PAGE);
        let shown = loans.by_epoch.values().filter(|loan| shows(loan.record.holder.node.as_deref()));
        let mut leases: Vec<Lent> = shown.map(|loan| loan.to_lent()).collect();
        leases.sort_by_key(|lent| lent.epoch);
        Lending {
            version: 1,
            size: self.size * PAGE,
            leased: leased * PAGE,
            used: loans.by_epoch.values().map(|loan| loan.store.used()).sum::<u64>() * PAGE,
            free: free.min(allowed.saturating_sub(theirs * PAGE)),
            locked: self.locked,
            survives: handover::is_possible(),
            leases,
        }
    }

    /// What is lost when the process ends, if something is.
    pub(crate) fn loses(&self) -> Option<Bytes> {
        let [.., used] = self.totals();
        (used > 0 && !handover::is_possible()).then_some(Bytes(used))
    }

    /// Bytes lent, leased, and held.
    pub(crate) fn totals(&self) -> [u64; 3] {
        let loans = lock(&self.loans);
        let used: u64 = loans.by_epoch.values().map(|loan| loan.store.used()).sum();
        [self.size, loans.leased(), used].map(|pages| pages * PAGE)
    }

    /// Every lease, for what counts them.
    pub(crate) fn sights(&self) -> Vec<Sight> {
        let loans = lock(&self.loans);
        let sight = |loan: &Arc<Loan>| Sight {
            lent: loan.to_lent(),
            fetched: loan.store.fetched.load(Ordering::Relaxed),
            stored: loan.store.stored.load(Ordering::Relaxed),
        };
        let mut sights: Vec<Sight> = loans.by_epoch.values().map(sight).collect();
        sights.sort_by_key(|sight| sight.lent.epoch);
        sights
    }
}

fn gone(epoch: u64) -> Refused {
    Refused::Gone(format!("lease {epoch} is over; what was stored under it is gone"))
}

/// The lease, if it is of this holder and node.
fn find(loans: &Loans, lease: Lease, node: Option<&str>) -> Result<Arc<Loan>, Refused> {
    let found = loans.by_epoch.get(&lease.epoch).filter(|loan| loan.record.holder.is(lease.holder, node));
    found.cloned().ok_or_else(|| gone(lease.epoch))
}

/// A name for memory that nothing else has.
fn instance() -> Result<u128, Refused> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes)
        .map_err(|error| Refused::failed("no random bytes", &io::Error::other(error)))?;
    Ok(u128::from_le_bytes(bytes))
}
