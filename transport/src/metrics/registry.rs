//! The metrics of a server's connections, by peer.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Metrics, Snapshot};

/// The peers beyond a registry's bound are counted together under this name.
pub const OTHERS: &str = "others";

/// What a server's connections count, by peer. A connection that ends stays in its peer's numbers, so they
/// only grow.
pub struct Registry {
    most: usize,
    peers: Mutex<BTreeMap<String, Peer>>,
}

#[derive(Default)]
struct Peer {
    /// What connections counted that are over.
    over: Snapshot,
    live: Vec<Arc<Metrics>>,
}

/// A connection's place in a [`Registry`], which it leaves when this is dropped.
pub struct Registration {
    registry: Arc<Registry>,
    peer: String,
    metrics: Arc<Metrics>,
}

impl Registry {
    /// For `most` peers by name; those that come later share the name [`OTHERS`], so that peers with ever new
    /// names cost no memory.
    #[must_use]
    pub fn new(most: usize) -> Arc<Self> {
        Arc::new(Self { most, peers: Mutex::default() })
    }

    fn peers(&self) -> MutexGuard<'_, BTreeMap<String, Peer>> {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts `metrics`, of a connection, among those of `peer`.
    #[must_use]
    pub fn add(self: &Arc<Self>, peer: &str, metrics: Arc<Metrics>) -> Registration {
        let mut peers = self.peers();
        let known = peers.contains_key(peer) || peers.len() < self.most;
        let name = if known { peer } else { OTHERS };
        peers.entry(name.to_owned()).or_default().live.push(Arc::clone(&metrics));
        Registration { registry: Arc::clone(self), peer: name.to_owned(), metrics }
    }

    /// Each peer's numbers, by name.
    #[must_use]
    pub fn snapshot(&self) -> Vec<Snapshot> {
        let peers = self.peers();
        let all = peers.iter().map(|(name, peer)| {
            let mut sum = peer.over.clone();
            peer.live.iter().for_each(|metrics| sum.merge(&metrics.snapshot()));
            Snapshot { peer: name.clone(), ..sum }
        });
        all.collect()
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        let mut peers = self.registry.peers();
        let Some(peer) = peers.get_mut(&self.peer) else { return };
        peer.live.retain(|metrics| !Arc::ptr_eq(metrics, &self.metrics));
        let mut last = self.metrics.snapshot();
        last.connections = 0;
        last.credit = super::Credit::default();
        last.series.iter_mut().for_each(|series| series.in_flight = 0);
        peer.over.merge(&last);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::{Operations, Recorder};

    #[test]
    fn a_peers_numbers_stay_when_its_connections_end() {
        let registry = Registry::new(2);
        let mut total = 0;
        for round in 1..=3u32 {
            let mut recorders = [Recorder::new(Operations::default()), Recorder::new(Operations::default())];
            let places: Vec<Registration> =
                recorders.iter().map(|recorder| registry.add("pc1", recorder.metrics())).collect();
            for recorder in &mut recorders {
                recorder.connected("pc1", round > 1, (4, 4));
                recorder.sent_frame(100);
                total += 100;
            }
            let [seen] = &registry.snapshot()[..] else { panic!("there is one peer") };
            assert_eq!((seen.sent_bytes, seen.connections, seen.connects), (total, 2, u64::from(round) * 2));
            drop(places);
            let [seen] = &registry.snapshot()[..] else { panic!("there is one peer") };
            assert_eq!((seen.sent_bytes, seen.connections, seen.credit.requests_granted), (total, 0, 0));
        }
    }

    #[test]
    fn peers_beyond_the_bound_share_a_name() {
        let registry = Registry::new(2);
        for number in 0..100 {
            let mut recorder = Recorder::new(Operations::default());
            let _place = registry.add(&format!("pc{number}"), recorder.metrics());
            recorder.sent_frame(1);
        }
        let seen: Vec<_> = registry.snapshot().into_iter().map(|s| (s.peer, s.sent_bytes)).collect();
        assert_eq!(seen, [("others".to_owned(), 98), ("pc0".to_owned(), 1), ("pc1".to_owned(), 1)]);
    }
}
