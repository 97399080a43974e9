//! Network device (section 5.1) on a TAP interface: one worker for each pair of queues.

mod backend;
mod control;
mod tap;

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde_json::Value;

use self::backend::NetBackend;
pub use self::backend::{Counters, Snapshot};
pub use self::tap::{Error, Tap};
use super::worker::Worker;
use super::{Activation, ActiveQueue, Interrupts, Returned, VirtioDevice, Virtqueue};
use crate::thread::Role;

const QUEUE_SIZE: u16 = 256;
const CONTROL_QUEUE_SIZE: u16 = 16;
/// Most pairs of queues: what the kernel has for one interface is more.
pub const MAX_PAIRS: u16 = 16;

pub(crate) mod feature {
    pub(crate) const CSUM: u64 = 1 << 0;
    pub(crate) const GUEST_CSUM: u64 = 1 << 1;
    pub(crate) const MAC: u64 = 1 << 5;
    pub(crate) const GUEST_TSO4: u64 = 1 << 7;
    pub(crate) const GUEST_TSO6: u64 = 1 << 8;
    pub(crate) const HOST_TSO4: u64 = 1 << 11;
    pub(crate) const HOST_TSO6: u64 = 1 << 12;
    pub(crate) const MRG_RXBUF: u64 = 1 << 15;
    pub(crate) const STATUS: u64 = 1 << 16;
    pub(crate) const CTRL_VQ: u64 = 1 << 17;
    pub(crate) const MQ: u64 = 1 << 22;
}

/// A virtio network card.
pub struct Net {
    mac: [u8; 6],
    pairs: u16,
    workers: Vec<Worker<NetBackend>>,
    /// Which workers have queues now.
    active: Vec<usize>,
    counters: Arc<Counters>,
}

impl Net {
    /// A card with one pair of queues for each of `taps` (at least 1, at most [`MAX_PAIRS`] count), which
    /// belong to one interface.
    #[must_use]
    pub fn new(mut taps: Vec<Tap>, mac: [u8; 6]) -> Self {
        taps.truncate(MAX_PAIRS.into());
        let taps: Arc<[Tap]> = taps.into();
        let counters = Arc::new(Counters::default());
        let backend = |pair| NetBackend::new(taps.clone(), pair, counters.clone());
        let workers = (0..taps.len()).map(|pair| Worker::new(backend(pair))).collect();
        Self { mac, pairs: taps.len() as u16, workers, active: Vec::new(), counters }
    }

    /// What went through the card, counted as it happens.
    #[must_use]
    pub fn counters(&self) -> Arc<Counters> {
        self.counters.clone()
    }

    /// The pair that serves queue `index`; the control queue is the first one's.
    fn pair_of(&self, index: u16, features: u64) -> usize {
        if Some(index) == control::queue(features, self.pairs) { 0 } else { usize::from(index / 2) }
    }
}

impl VirtioDevice for Net {
    fn kind(&self) -> &'static str {
        "virtio-net"
    }

    fn device_type(&self) -> u16 {
        1
    }

    fn pci_class(&self) -> u32 {
        0x02_00_00
    }

    fn features(&self) -> u64 {
        let checksums = feature::CSUM | feature::GUEST_CSUM;
        let segmentation =
            feature::GUEST_TSO4 | feature::GUEST_TSO6 | feature::HOST_TSO4 | feature::HOST_TSO6;
        let several = if self.pairs > 1 { feature::CTRL_VQ | feature::MQ } else { 0 };
        checksums | segmentation | several | feature::MAC | feature::MRG_RXBUF | feature::STATUS
    }

    /// What one feature needs of others (section 5.1.3.1).
    fn accepts(&self, features: u64) -> bool {
        let needs = |feature: u64, other: u64| features & feature == 0 || features & other != 0;
        needs(feature::GUEST_TSO4 | feature::GUEST_TSO6, feature::GUEST_CSUM)
            && needs(feature::HOST_TSO4 | feature::HOST_TSO6, feature::CSUM)
            && needs(feature::MQ, feature::CTRL_VQ)
    }

    fn queue_sizes(&self) -> Vec<u16> {
        let mut sizes = vec![QUEUE_SIZE; 2 * usize::from(self.pairs)];
        if self.pairs > 1 {
            sizes.push(CONTROL_QUEUE_SIZE);
        }
        sizes
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        // mac, status (link up), max_virtqueue_pairs
        let mut config = [0; 10];
        config[..6].copy_from_slice(&self.mac);
        config[6] = 1;
        config[8..].copy_from_slice(&self.pairs.to_le_bytes());
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = config.get(offset + i).copied().unwrap_or(0);
        }
    }

    fn start(&mut self, _interrupts: &Arc<Interrupts>) -> io::Result<()> {
        self.workers.iter_mut().try_for_each(|worker| worker.start(Role::Net, "virtio-net", 16))
    }

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        let Activation { features, queues, interrupts } = activation;
        let mut shares: Vec<Vec<ActiveQueue>> = self.workers.iter().map(|_| Vec::new()).collect();
        for queue in queues {
            if let Some(share) = shares.get_mut(self.pair_of(queue.index, features)) {
                share.push(queue);
            }
        }
        self.active.clear();
        for (at, queues) in shares.into_iter().enumerate().filter(|(_, queues)| !queues.is_empty()) {
            self.workers[at].activate(Activation { features, queues, interrupts: interrupts.clone() })?;
            self.active.push(at);
        }
        Ok(())
    }

    fn deactivate(&mut self, patience: Duration, returned: Returned) {
        if self.active.is_empty() {
            // Nobody has queues; the caller's lock is held, so the answer comes from a worker anyway.
            if let Some(worker) = self.workers.first() {
                worker.deactivate(patience, returned);
            }
            return;
        }
        let gather = Arc::new(Mutex::new((self.active.len(), Vec::new(), Some(returned))));
        for at in self.active.drain(..) {
            let gather = gather.clone();
            self.workers[at].deactivate(
                patience,
                Box::new(move |queues: Vec<(u16, Virtqueue)>| {
                    let mut guard = gather.lock().unwrap_or_else(PoisonError::into_inner);
                    let (left, all, returned) = &mut *guard;
                    all.extend(queues);
                    *left -= 1;
                    if *left == 0
                        && let Some(returned) = returned.take()
                    {
                        let all = std::mem::take(all);
                        drop(guard);
                        returned(all);
                    }
                }),
            );
        }
    }

    fn save(&self) -> Value {
        serde_json::json!({ "pairs": self.pairs, "active": self.counters.pairs() })
    }

    fn restore(&mut self, state: &Value) -> Result<(), String> {
        let number = |name| state.get(name).and_then(Value::as_u64).ok_or(format!("`{name}` is missing"));
        let (pairs, active) = (number("pairs")?, number("active")?);
        if pairs != u64::from(self.pairs) || active > pairs {
            return Err(format!("its card has {pairs} pairs of queues, this one has {}", self.pairs));
        }
        self.counters.set_pairs(active as u16);
        Ok(())
    }

    fn reset(&mut self) {
        self.counters.set_pairs(0);
    }
}

#[cfg(test)]
mod net_test;
