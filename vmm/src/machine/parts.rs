//! What a machine consists of, and the steps of its life.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use devices::lifecycle::Lifecycle;
use devices::platform::Pm;
use devices::virtio::balloon;
use transport::metrics::Metrics;

use super::controllers::Vcpus;
use super::paging::{Held, Paging};
use super::processor::VcpuState;
use super::spanning::Spanning;
use super::vcpus::Threads;
use super::{Error, Exit};
use crate::acpi;
use crate::config;
use crate::control::State;
use crate::cpu::{Buses, Event, Gang, Stuck};
use crate::kvm::{Partition, PartitionState};
use crate::loader::Kernel;
use crate::memory::{Layout, Ram};
use crate::span::numa;

/// How long vCPUs may take to pause. They leave guest code within microseconds; only a host that is
/// overloaded or stopped takes longer.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);

/// A device and what it is called.
pub(super) struct Device {
    pub(super) name: String,
    pub(super) about: Box<dyn Fn() -> String + Send + Sync>,
    pub(super) life: Arc<dyn Lifecycle>,
    pub(super) counters: Option<Counters>,
    /// What is counted with its peer, if it has one.
    pub(super) peer: Option<Arc<Metrics>>,
}

/// Reads a device's counters.
pub(super) type Counters = Box<dyn Fn() -> Vec<(&'static str, u64)> + Send + Sync>;

/// A machine's parts, shared by its threads.
pub(super) struct Parts {
    pub(super) guest: config::Guest,
    pub(super) layout: Layout,
    pub(super) vcpus: Vcpus,
    pub(super) exits: Vec<AtomicU64>,
    pub(super) buses: Buses,
    pub(super) gang: Gang,
    pub(super) threads: Threads,
    pub(super) devices: Vec<Device>,
    pub(super) pm: Arc<Pm>,
    pub(super) balloon: Option<balloon::Control>,
    pub(super) kernel: Mutex<Kernel>,
    pub(super) events: Sender<Event>,
    pub(super) end: Sender<Result<Exit, Error>>,
    pub(super) started: Instant,
    pub(super) resets: AtomicU64,
    /// What a reset goes back to.
    pub(super) power_on: (Vec<VcpuState>, PartitionState),
    /// Held by whoever starts, pauses, resumes, resets or saves.
    pub(super) life: Mutex<()>,
    pub(super) state: AtomicU8,
    /// Whether it stands still for a helper. Never locked around `life`.
    pub(super) held: Mutex<Held>,
    /// Memory on other PCs.
    pub(super) paging: Option<Arc<Paging>>,
    /// vCPUs on another PC.
    pub(super) spanning: Option<Spanning>,
    // Last, so that the VM goes before the RAM that it uses.
    pub(super) partition: Partition,
    pub(super) ram: Ram,
}

/// Locks, whatever happened to another holder: these hold handles, whose state is the kernel's.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

const STATES: [State; 4] = [State::Starting, State::Running, State::Paused, State::Ending];

impl Parts {
    pub(super) fn state(&self) -> State {
        STATES[usize::from(self.state.load(Ordering::Acquire))]
    }

    /// Goes to `state`; nothing leaves [`State::Ending`].
    pub(super) fn set_state(&self, state: State) {
        let number = STATES.iter().position(|known| *known == state).unwrap_or_default() as u8;
        let _ = self.state.fetch_update(Ordering::AcqRel, Ordering::Acquire, |old| {
            (STATES[usize::from(old)] != State::Ending).then_some(number)
        });
    }

    /// Ends the machine; only the first end counts.
    pub(super) fn finish(&self, exit: Result<Exit, Error>) {
        self.set_state(State::Ending);
        let _ = self.end.send(exit);
    }

    /// Loads the kernel into RAM that is all zeros, and lets it run.
    pub(super) fn boot(&self) -> Result<(), Error> {
        let _life = lock(&self.life);
        self.gang.pause(PATIENCE)?;
        self.load()?;
        self.each(|device| device.start())?;
        self.go();
        Ok(())
    }

    fn load(&self) -> Result<(), Error> {
        let memory = self.ram.memory();
        let count = self.vcpus.len() as u8;
        let begun = Instant::now();
        let trip = |one, other| self.spanning.as_ref()?.round_trip(one, other);
        let (nodes, distances) = numa::seen(&self.guest, trip);
        let rsdp = acpi::write(memory, &self.layout, count, &nodes, &distances)?;
        let entry = lock(&self.kernel).load(memory, &self.layout, rsdp)?;
        if let Some(first) = self.vcpus.first() {
            lock(first).boot(&entry, memory)?;
        }
        tracing::debug!(took = ?begun.elapsed(), "The kernel is in place");
        Ok(())
    }

    pub(super) fn go(&self) {
        self.set_state(State::Running);
        if self.state() == State::Running {
            self.gang.resume();
        }
    }

    fn each(
        &self,
        call: impl Fn(&dyn Lifecycle) -> Result<(), devices::lifecycle::Error>,
    ) -> Result<(), Error> {
        for device in &self.devices {
            call(&*device.life).map_err(|source| Error::Lifecycle { name: device.name.clone(), source })?;
        }
        Ok(())
    }

    /// Stops vCPUs and devices. If one of them does not stop, the guest runs on; if that is because its memory is on
    /// a PC that is away, it stands still, and the pause is made whole when that is back.
    pub(super) fn pause(&self) -> Result<(), Error> {
        let Err(why) = self.halt() else {
            self.set_state(State::Paused);
            return Ok(());
        };
        for device in &self.devices {
            if let Err(error) = device.life.start() {
                tracing::error!(device = device.name, %error, "The device cannot go on after a failed pause");
            }
        }
        if self.pause_later() {
            return Ok(());
        }
        self.go();
        Err(why)
    }

    fn halt(&self) -> Result<(), Error> {
        let hangs = self.hangs();
        self.gang.pause_unless(PATIENCE, &hangs)?;
        for device in &self.devices {
            if self.waits_for_memory() {
                // The device may hang in a page fault itself.
                return Err(self.gang.settle(Duration::ZERO).err().map_or(Error::AwaitsMemory, Error::Stuck));
            }
            device.life.stop().map_err(|source| Error::Lifecycle { name: device.name.clone(), source })?;
        }
        Ok(self.gang.settle_unless(PATIENCE, &hangs)?)
    }

    /// Waits until no vCPU runs guest code, however long its memory is away.
    fn still(&self, paused: impl Fn() -> Result<(), Stuck>) -> Result<(), Error> {
        loop {
            match paused() {
                Err(_) if self.waits_for_memory() && self.state() != State::Ending => {}
                result => return Ok(result?),
            }
        }
    }

    /// Lets devices and vCPUs go on after a pause.
    pub(super) fn resume(&self) -> Result<(), Error> {
        self.each(|device| device.start())?;
        self.go();
        Ok(())
    }

    /// Back to power-on: devices, RAM, interrupt controllers and vCPUs; then the kernel begins again, unless
    /// the guest was paused meanwhile: then a resume lets it.
    pub(super) fn reset(&self) -> Result<(), Error> {
        let _life = lock(&self.life);
        self.still(|| self.gang.pause(PATIENCE))?;
        self.each(|device| device.reset())?;
        self.still(|| self.gang.settle(PATIENCE))?;
        match &self.paging {
            Some(paging) => paging.engine.clear()?,
            None => match &self.spanning {
                Some(spanning) => spanning.engine.clear()?,
                None => self.ram.clear()?,
            },
        }
        let (cpus, partition) = &self.power_on;
        self.partition.restore(partition)?;
        for (vcpu, state) in self.vcpus.iter().zip(cpus) {
            lock(vcpu).restore(state)?;
        }
        self.resets.fetch_add(1, Ordering::Relaxed);
        self.load()?;
        let mut held = lock(&self.held);
        let paused = self.state() == State::Paused && !held.goes_on();
        if paused {
            return Ok(());
        }
        // If its memory is still away, it is held again.
        held.vcpus_run();
        drop(held);
        self.resume()
    }
}
