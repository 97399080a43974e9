//! How the helpers are: who is away, since when and why, and what each keeps and did. Written by the fault handlers,
//! read by whoever shows it or has to stop the guest for it.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::eventfd::{EfdFlags, EventFd};
use transport::metrics::{Metrics, Snapshot};

use super::compress::{Compression, Tally};

/// How a helper is, as one handler sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It answers.
    Here,
    /// It cannot be reached, or refuses; what it keeps is not lost.
    Away {
        /// Since when.
        since: Instant,
        /// Why, for people.
        why: String,
    },
    /// Everything was moved away and its memory given back; or it failed for good.
    Left {
        /// Why, for people.
        why: String,
    },
}

/// What one handler has at one helper.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) pages: AtomicU64,
    pub(super) fetched: AtomicU64,
    pub(super) stored: AtomicU64,
    pub(super) copied: AtomicU64,
    pub(super) lost: AtomicU64,
    /// Pieces of which something is kept here.
    pub(super) pieces: AtomicU64,
    /// Pages for which there is room in all.
    pub(super) room: AtomicU64,
    /// Pieces that are to move away and have not.
    pub(super) leaving: AtomicU64,
    pub(super) compression: Arc<Tally>,
}

/// What a handler tells about one helper.
struct View {
    standing: Standing,
    draining: bool,
    counters: Arc<Counters>,
    metrics: Option<Arc<Metrics>>,
}

/// A helper, or the local file.
struct Place {
    name: String,
    views: Vec<View>,
}

/// What one handler tells about all of its pieces.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Shard {
    /// Fetches or stores wait for this place to come back, since then.
    stuck: Option<(usize, Instant)>,
    /// Pieces with fewer copies than the policy asks for.
    degraded: u64,
    /// Pages that no copy is left of.
    lost: u64,
    why_lost: String,
}

#[derive(Default)]
struct State {
    version: u64,
    places: Vec<Place>,
    shards: Vec<Shard>,
}

/// A helper at one moment, all handlers together.
#[derive(Clone, Debug)]
pub struct HelperReport {
    /// Its name: the agent's address, or the local file's path.
    pub name: String,
    /// The worst that a handler sees.
    pub standing: Standing,
    /// It is being emptied.
    pub draining: bool,
    /// Pages that it keeps now.
    pub pages: u64,
    /// Pages that were read from it.
    pub fetched: u64,
    /// Pages that were written to it, copies between helpers among them.
    pub stored: u64,
    /// Of these, copies of what another helper had.
    pub copied: u64,
    /// Pages whose copies here were lost with it.
    pub lost: u64,
    /// Pieces of which it keeps something.
    pub pieces: u64,
    /// Pages that it has room for in all.
    pub room: u64,
    /// Pieces that are still to move away.
    pub leaving: u64,
    /// What packing its pages came to.
    pub compression: Compression,
    /// What the connections count, one for each handler; none for the local file.
    pub connections: Vec<Snapshot>,
}

/// Why the guest stands still.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stuck {
    /// The helper that is missed.
    pub helper: String,
    /// Since when something waits for it.
    pub since: Instant,
    /// Why it is away, for people.
    pub why: String,
}

/// Everything at one moment.
#[derive(Clone, Debug)]
pub struct Report {
    /// Grows with every change of a standing, of [`stuck`](Self::stuck), [`degraded`](Self::degraded) or
    /// [`lost`](Self::lost).
    pub version: u64,
    /// All helpers, in the order of the configuration, then the local file if there is one, then what was added.
    pub helpers: Vec<HelperReport>,
    /// A page is wanted, or has to be kept, and can only be so by a helper that is away.
    pub stuck: Option<Stuck>,
    /// Pieces with fewer copies than the policy asks for.
    pub degraded: u64,
    /// Pages that no copy is left of, and why: the guest can only end.
    pub lost: Option<(u64, String)>,
}

/// How the helpers of a guest are, for whoever watches over it.
pub struct Health {
    state: Mutex<State>,
    changed: Condvar,
    bell: EventFd,
}

impl Health {
    /// For so many handlers.
    pub(super) fn new(handlers: usize) -> std::io::Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let state = State { shards: vec![Shard::default(); handlers], ..State::default() };
        let bell = EventFd::from_value_and_flags(0, flags)?;
        Ok(Self { state: Mutex::new(state), changed: Condvar::new(), bell })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a place, with one view for each handler; returns its number.
    pub(super) fn add(&self, name: &str, views: Vec<(Arc<Counters>, Option<Arc<Metrics>>)>) -> usize {
        let mut state = self.state();
        let away = || Standing::Away { since: Instant::now(), why: "not connected yet".to_owned() };
        let view = |(counters, metrics)| View { standing: away(), draining: false, counters, metrics };
        let views = views.into_iter().map(view).collect();
        state.places.push(Place { name: name.to_owned(), views });
        state.places.len() - 1
    }

    fn change(&self, change: impl FnOnce(&mut State) -> bool) {
        let mut state = self.state();
        if !change(&mut state) {
            return;
        }
        state.version += 1;
        drop(state);
        self.changed.notify_all();
        // A counter that is full rings already.
        let _ = self.bell.write(1);
    }

    pub(super) fn stands(&self, place: usize, shard: usize, standing: &Standing) {
        self.change(|state| {
            let view = state.places.get_mut(place).and_then(|place| place.views.get_mut(shard));
            view.is_some_and(|view| std::mem::replace(&mut view.standing, standing.clone()) != *standing)
        });
    }

    pub(super) fn drains(&self, place: usize, shard: usize) {
        self.change(|state| {
            let view = state.places.get_mut(place).and_then(|place| place.views.get_mut(shard));
            view.is_some_and(|view| !std::mem::replace(&mut view.draining, true))
        });
    }

    pub(super) fn stuck(&self, shard: usize, on: Option<usize>, now: Instant) {
        self.change(|state| {
            let Some(shard) = state.shards.get_mut(shard) else { return false };
            let changes = shard.stuck.map(|(place, _)| place) != on;
            let since = shard.stuck.map_or(now, |(_, since)| since);
            shard.stuck = on.map(|place| (place, since));
            changes
        });
    }

    pub(super) fn degraded(&self, shard: usize, pieces: u64) {
        self.change(|state| {
            let shard = state.shards.get_mut(shard);
            shard.is_some_and(|shard| std::mem::replace(&mut shard.degraded, pieces) != pieces)
        });
    }

    pub(super) fn lost(&self, shard: usize, pages: u64, why: &str) {
        self.change(|state| {
            let Some(shard) = state.shards.get_mut(shard) else { return false };
            shard.lost += pages;
            why.clone_into(&mut shard.why_lost);
            pages > 0
        });
    }

    /// Becomes readable when something changed; to be read by whoever waits for it.
    #[must_use]
    pub fn bell(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }

    /// Takes the [bell](Self::bell)'s ringing away.
    pub fn hush(&self) {
        // It did not ring.
        let _ = self.bell.read();
    }

    /// Waits until something is different from what it was at `version`, for `timeout` at most.
    #[must_use]
    pub fn wait(&self, version: u64, timeout: Duration) -> Report {
        let state = self.state();
        let same = |state: &mut State| state.version == version;
        let waited = self.changed.wait_timeout_while(state, timeout, same);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
        self.report()
    }

    /// Everything as it is now.
    #[must_use]
    pub fn report(&self) -> Report {
        let state = self.state();
        let stuck = state.shards.iter().filter_map(|shard| shard.stuck).min_by_key(|(_, since)| *since);
        let stuck = stuck.and_then(|(place, since)| {
            let place = state.places.get(place)?;
            let why = match worst(&place.views) {
                Standing::Away { why, .. } | Standing::Left { why } => why,
                Standing::Here => "it is slow".to_owned(),
            };
            Some(Stuck { helper: place.name.clone(), since, why })
        });
        let lost: u64 = state.shards.iter().map(|shard| shard.lost).sum();
        let why_lost = state.shards.iter().find(|shard| shard.lost > 0).map(|shard| shard.why_lost.clone());
        Report {
            version: state.version,
            helpers: state.places.iter().map(helper).collect(),
            stuck,
            degraded: state.shards.iter().map(|shard| shard.degraded).sum(),
            lost: why_lost.map(|why| (lost, why)),
        }
    }

    /// The number of the helper called `name` that has not left.
    pub(super) fn number(&self, name: &str) -> Option<usize> {
        let state = self.state();
        let stays = |place: &Place| !matches!(worst(&place.views), Standing::Left { .. });
        state.places.iter().position(|place| place.name == name && stays(place))
    }
}

fn helper(place: &Place) -> HelperReport {
    let sum = |get: fn(&Counters) -> &AtomicU64| {
        place.views.iter().map(|view| get(&view.counters).load(Ordering::Relaxed)).sum()
    };
    let mut compression = Compression::default();
    place.views.iter().for_each(|view| compression.add(&view.counters.compression));
    HelperReport {
        name: place.name.clone(),
        standing: worst(&place.views),
        draining: place.views.iter().any(|view| view.draining),
        pages: sum(|c| &c.pages),
        fetched: sum(|c| &c.fetched),
        stored: sum(|c| &c.stored),
        copied: sum(|c| &c.copied),
        lost: sum(|c| &c.lost),
        pieces: sum(|c| &c.pieces),
        room: sum(|c| &c.room),
        leaving: sum(|c| &c.leaving),
        compression,
        connections: place.views.iter().filter_map(|view| Some(view.metrics.as_ref()?.snapshot())).collect(),
    }
}

/// Away before here, the longest first; left only if it left everybody.
fn worst(views: &[View]) -> Standing {
    let standings = || views.iter().map(|view| &view.standing);
    let away = standings().filter_map(|standing| match standing {
        Standing::Away { since, .. } => Some((*since, standing)),
        Standing::Here | Standing::Left { .. } => None,
    });
    let away = away.min_by_key(|(since, _)| *since).map(|(_, standing)| standing);
    let here = standings().find(|standing| **standing == Standing::Here);
    away.or(here).or(standings().next()).cloned().unwrap_or(Standing::Here)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn health() -> Health {
        let health = Health::new(2).expect("an eventfd");
        let views = || (0..2).map(|_| (Arc::default(), None)).collect();
        assert_eq!((health.add("a", views()), health.add("b", views())), (0, 1));
        (0..2).for_each(|place| (0..2).for_each(|shard| health.stands(place, shard, &Standing::Here)));
        health
    }

    #[test]
    fn a_helper_is_away_if_one_handler_misses_it() {
        let health = health();
        let since = Instant::now();
        health.stands(1, 0, &Standing::Away { since, why: "cut".to_owned() });
        health.stuck(0, Some(1), since);
        let report = health.report();
        assert_eq!(report.helpers[0].standing, Standing::Here);
        assert!(matches!(report.helpers[1].standing, Standing::Away { .. }));
        let why = "cut".to_owned();
        assert_eq!(report.stuck, Some(Stuck { helper: "b".to_owned(), since, why }));
        health.stands(1, 0, &Standing::Here);
        health.stuck(0, None, since);
        assert_eq!(health.report().stuck, None);
    }

    #[test]
    fn a_watcher_is_told_of_what_changed_and_of_nothing_else() {
        let health = health();
        let version = health.report().version;
        health.hush();
        health.stands(0, 0, &Standing::Here);
        assert_eq!(health.wait(version, Duration::ZERO).version, version);
        assert!(health.bell.read().is_err(), "nothing rang");
        health.lost(1, 3, "killed");
        let report = health.wait(version, Duration::from_secs(60));
        assert_eq!(report.lost, Some((3, "killed".to_owned())));
        assert_eq!(health.bell.read().ok(), Some(1));
    }
}
