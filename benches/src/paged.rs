//! Guest RAM under the fault engine, touched by plain threads instead of a guest.
#![allow(unsafe_code)] // Its mapping is touched directly.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use transport::channel::Transport;
use transport::identity::Security;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};
use vmm::memory::fault::{Counters, Engine, Options, Pieces, Shards};
use vmm::memory::store::{Connected, Health, Helper, OnLoss, Terms, connect};
use vmm::memory::{Backing, Layout, Ram};
use vmm::units::Bytes;

use crate::agent::Agent;
use crate::bench::Bench;
use crate::floor::fault::scattered;
use crate::region::{PAGE, Region};
use crate::stats::micros;

/// What to make.
#[derive(Clone, Debug)]
pub struct Setting {
    /// Pages of RAM, a multiple of those in a piece for each handler.
    pub pages: u64,
    /// Pages of them that may be in memory.
    pub local: u64,
    /// Threads that answer faults.
    pub handlers: u32,
    /// How connections to the agent are protected.
    pub security: Security,
}

/// RAM whose other pages are at an agent of our own or of somebody else.
pub struct Paged {
    // Dropped in this order: nobody touches RAM without its engine.
    engine: Engine,
    _health: Arc<Health>,
    region: Region,
    _ram: Ram,
    _agent: Option<Agent>,
}

impl Paged {
    /// With an agent of its own on this machine; `identity` is the folder of the agent's.
    ///
    /// # Errors
    /// The agent does not start, or there is no userfaultfd.
    pub fn start(bench: &Bench, setting: &Setting, identity: Option<&Path>) -> Result<Self> {
        let agent = Agent::lend(bench, setting.pages * PAGE as u64, identity)?;
        let mut paged = Self::connect(setting, agent.address())?;
        paged._agent = Some(agent);
        Ok(paged)
    }

    /// With the agent at `address`.
    ///
    /// # Errors
    /// It does not lend so much memory, or there is no userfaultfd.
    pub fn connect(setting: &Setting, address: &str) -> Result<Self> {
        let size = Bytes(setting.pages * PAGE as u64);
        let shards = Shards::new(Pieces::new(size), setting.handlers);
        let ram = Ram::new(&Layout::new(size, 40).context("RAM is too large")?, Backing::Shared)?;
        let first = ram.memory().iter().next().context("no RAM")?;
        if first.start_addr() != GuestAddress(0) || first.len() != size.0 {
            bail!("RAM is not one region");
        }
        let base = first.get_host_address(MemoryRegionAddress(0))?;
        let base = std::ptr::NonNull::new(base).context("RAM is nowhere")?;
        // SAFETY: the region lives no longer than `ram`, and nobody trusts what is in it.
        let region = unsafe { Region::new(base, setting.pages) };
        let helper = Helper {
            agent: address.to_owned(),
            node: None,
            security: setting.security.clone(),
            transport: Transport::Tcp,
            size: size.0,
        };
        let terms = Terms::new("bench", "bench", shards, OnLoss::None);
        let Connected { stores, health, .. } = connect(&[helper], &terms)?;
        let sources = stores.into_iter().map(|store| Box::new(store) as _).collect();
        let engine = Engine::start(&ram, sources, Options { local: Bytes(setting.local * PAGE as u64) })?;
        Ok(Self { engine, _health: health, region, _ram: ram, _agent: None })
    }

    /// Its pages.
    #[must_use]
    pub fn region(&self) -> &Region {
        &self.region
    }

    /// What its handlers have counted.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.engine.counters()
    }

    /// Writes to all pages of `range`, each something else.
    pub fn fill(&self, range: std::ops::Range<u64>) {
        range.for_each(|page| self.region.fill(page));
    }

    /// Drives the first `pages` pages out by filling those behind them, as often as it takes, and gives those back:
    /// then most of the first are elsewhere, and memory is free for them.
    ///
    /// # Errors
    /// The engine is closed, or pages do not leave.
    pub fn chill(&self, pages: u64) -> Result<()> {
        let rest = pages..self.region.pages();
        let until = Instant::now() + Duration::from_secs(60);
        loop {
            self.fill(rest.clone());
            let mut here = 0;
            for page in 0..pages {
                here += u64::from(self.region.present(page)?);
            }
            if here <= pages / 3 {
                break;
            }
            if Instant::now() > until {
                bail!("{here} of {pages} pages do not leave: {:?}", self.counters());
            }
        }
        let (start, len) = (rest.start * PAGE as u64, (rest.end - rest.start) * PAGE as u64);
        self.engine.discard(GuestAddress(start), len)?;
        Ok(())
    }

    /// Reads missing ones among the first `pages` pages in no order, for `slice` at most, one thread for each of
    /// `threads` parts; how long each touch took, in microseconds, and all of them together.
    ///
    /// # Errors
    /// A page is not what was written.
    pub fn touch(&self, pages: u64, threads: u64, slice: Duration, seed: u64) -> Result<Touched> {
        let order = scattered(pages, seed);
        let parts: Vec<&[u64]> = order.chunks(order.len().div_ceil(threads as usize)).collect();
        let start = Instant::now();
        let times = std::thread::scope(|scope| {
            let work = |part: &'_ [u64]| -> Result<Vec<f64>> {
                let mut times = Vec::with_capacity(part.len());
                for page in part {
                    if self.region.present(*page)? {
                        continue;
                    }
                    let before = Instant::now();
                    let word = self.region.read(*page);
                    times.push(micros(before.elapsed()));
                    if word != *page {
                        bail!("page {page} holds {word:#x}");
                    }
                    if start.elapsed() > slice {
                        break;
                    }
                }
                Ok(times)
            };
            let threads: Vec<_> = parts.into_iter().map(|part| scope.spawn(move || work(part))).collect();
            threads
                .into_iter()
                .map(|thread| thread.join().expect("it does not panic"))
                .collect::<Result<Vec<_>>>()
        })?;
        Ok(Touched { times: times.concat(), elapsed: start.elapsed() })
    }

    /// Reads the first `pages` pages in order; how long that took.
    ///
    /// # Errors
    /// A page is not what was written.
    pub fn sweep(&self, pages: u64) -> Result<Duration> {
        let start = Instant::now();
        for page in 0..pages {
            let word = self.region.read(page);
            if word != page {
                bail!("page {page} holds {word:#x}");
            }
        }
        Ok(start.elapsed())
    }
}

/// What came of touching pages.
pub struct Touched {
    /// Of each touch, in microseconds.
    pub times: Vec<f64>,
    /// Of all, with all threads.
    pub elapsed: Duration,
}
