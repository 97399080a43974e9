//! The state machine behind the registers: feature negotiation, queue set-up, status, reset (section 3.1).
//!
//! ```text
//!          DRIVER_OK            status := 0 (driver), stop (machine)
//!  idle ────────────▶ active ───────────────▶ leaving ──device hands the queues back──▶ idle
//! ```
//!
//! While a device is leaving because of its driver, status keeps its old value; the driver polls it. No
//! vCPU waits in here.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;

use super::super::features::{RING_EVENT_IDX, RING_INDIRECT_DESC, VERSION_1};
use super::super::{Activation, ActiveQueue, Interrupts, QueueLayout, VirtioDevice, Virtqueue};
use crate::GuestMemory;

/// Device status bits (section 2.1).
pub(crate) const FEATURES_OK: u8 = 8;
pub(crate) const DRIVER_OK: u8 = 4;
pub(crate) const NEEDS_RESET: u8 = 64;

/// How long requests in flight may take when the driver resets the device, before they are given up.
const RESET_PATIENCE: Duration = Duration::from_secs(5);
/// How long they may take when the machine stops, before they are left for the next start.
const STOP_PATIENCE: Duration = Duration::from_secs(2);
/// How long a device may take to hand its queues back after its patience: the kernel has to let go of
/// what it was given.
const RETURN_LIMIT: Duration = Duration::from_secs(30);

/// One queue's registers.
#[derive(Clone, Debug)]
pub(super) struct QueueSetup {
    pub(super) max_size: u16,
    pub(super) enabled: bool,
    pub(super) layout: QueueLayout,
}

impl QueueSetup {
    fn new(max_size: u16) -> Self {
        Self { max_size, enabled: false, layout: QueueLayout { size: max_size, ..QueueLayout::default() } }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Idle,
    Active,
    /// `reset`: the registers are reset once the queues are back.
    Leaving {
        reset: bool,
    },
}

/// The device and the registers through which the driver sees it.
pub(super) struct Device {
    pub(super) device: Box<dyn VirtioDevice>,
    doorbells: Vec<Arc<EventFd>>,
    pub(super) status: u8,
    pub(super) device_feature_select: u32,
    pub(super) driver_feature_select: u32,
    pub(super) driver_features: u64,
    pub(super) queue_select: u16,
    pub(super) queues: Vec<QueueSetup>,
    pub(super) phase: Phase,
    /// Whether the machine runs.
    pub(super) running: bool,
    started: bool,
}

impl Device {
    pub(super) fn new(device: Box<dyn VirtioDevice>, doorbells: Vec<Arc<EventFd>>) -> Self {
        let queues = device.queue_sizes().into_iter().map(QueueSetup::new).collect();
        Self {
            device,
            doorbells,
            status: 0,
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            queue_select: 0,
            queues,
            phase: Phase::Idle,
            running: false,
            started: false,
        }
    }

    /// All features that the driver may accept.
    pub(super) fn offered(&self) -> u64 {
        self.device.features() | RING_INDIRECT_DESC | RING_EVENT_IDX | VERSION_1
    }

    /// Whether the driver accepted what it may, and what it must.
    pub(super) fn features_fit(&self) -> bool {
        let accepted = self.driver_features;
        accepted & !self.offered() == 0 && accepted & VERSION_1 != 0 && self.device.accepts(accepted)
    }

    pub(super) fn reset_registers(&mut self) {
        self.status = 0;
        self.device_feature_select = 0;
        self.driver_feature_select = 0;
        self.driver_features = 0;
        self.queue_select = 0;
        for queue in &mut self.queues {
            *queue = QueueSetup::new(queue.max_size);
        }
        self.device.reset();
    }
}

/// What the registers, the lifecycle and a leaving device's worker share.
pub(super) struct Shared {
    device: Mutex<Device>,
    returned: Condvar,
    memory: Arc<GuestMemory>,
    pub(super) interrupts: Arc<Interrupts>,
}

/// The device did not hand its queues back.
#[derive(Debug)]
pub(super) struct Stuck;

impl Shared {
    pub(super) fn new(device: Device, memory: Arc<GuestMemory>, interrupts: Arc<Interrupts>) -> Arc<Self> {
        Arc::new(Self { device: Mutex::new(device), returned: Condvar::new(), memory, interrupts })
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Device> {
        self.device.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// A write to the status register.
    pub(super) fn set_status(self: &Arc<Self>, device: &mut Device, status: u8) {
        if status == 0 {
            return self.reset(device);
        }
        // Bits are only ever added (section 2.1.1), and NEEDS_RESET is not the driver's.
        let mut added = status & !device.status & !NEEDS_RESET;
        if added & FEATURES_OK != 0 && !device.features_fit() {
            added &= !FEATURES_OK;
        }
        if added & DRIVER_OK != 0 && (device.status | added) & FEATURES_OK == 0 {
            added &= !DRIVER_OK;
            self.interrupts.fail(device.device.kind(), &"the driver was ready before its features were");
        }
        device.status |= added;
        if added & DRIVER_OK != 0 {
            self.interrupts.set_live(true);
            if device.running {
                self.activate(device);
            }
        }
    }

    /// The driver's reset.
    fn reset(self: &Arc<Self>, device: &mut Device) {
        match device.phase {
            Phase::Idle => {
                device.reset_registers();
                self.interrupts.reset();
            }
            Phase::Active => {
                self.interrupts.set_live(false);
                self.deactivate(device, true, RESET_PATIENCE);
            }
            Phase::Leaving { .. } => device.phase = Phase::Leaving { reset: true },
        }
    }

    /// Hands the enabled queues to the device.
    pub(super) fn activate(self: &Arc<Self>, device: &mut Device) {
        let event_idx = device.driver_features & RING_EVENT_IDX != 0;
        let mut queues = Vec::new();
        for (index, setup) in device.queues.iter().enumerate().filter(|(_, setup)| setup.enabled) {
            match Virtqueue::new(&setup.layout, event_idx, self.memory.clone()) {
                Ok(queue) => {
                    let doorbell = device.doorbells[index].clone();
                    queues.push(ActiveQueue { index: index as u16, queue, doorbell });
                }
                Err(broken) => return self.interrupts.fail(device.device.kind(), &broken),
            }
        }
        let interrupts = self.interrupts.clone();
        let activation = Activation { features: device.driver_features, queues, interrupts };
        match device.device.activate(activation) {
            Ok(()) => device.phase = Phase::Active,
            Err(error) => self.interrupts.fail(device.device.kind(), &error),
        }
    }

    /// Starts the device's threads, the first time. Not for vCPU threads, which may not start any.
    pub(super) fn start_device(device: &mut Device, interrupts: &Arc<Interrupts>) -> std::io::Result<()> {
        if !device.started {
            device.device.start(interrupts)?;
            device.started = true;
        }
        Ok(())
    }

    /// Asks the device for its queues.
    pub(super) fn deactivate(self: &Arc<Self>, device: &mut Device, reset: bool, patience: Duration) {
        device.phase = Phase::Leaving { reset };
        let shared = Arc::downgrade(self);
        device.device.deactivate(patience, Box::new(move |queues| Self::take_back(&shared, queues)));
    }

    /// The device let go of its queues. Runs on the device's thread.
    fn take_back(shared: &Weak<Self>, queues: Vec<(u16, Virtqueue)>) {
        let Some(shared) = shared.upgrade() else { return };
        let mut device = shared.lock();
        for (index, queue) in queues {
            if let Some(setup) = device.queues.get_mut(usize::from(index)) {
                setup.layout = queue.layout();
            }
        }
        if device.phase == (Phase::Leaving { reset: true }) {
            device.reset_registers();
            shared.interrupts.reset();
        }
        device.phase = Phase::Idle;
        drop(device);
        shared.returned.notify_all();
    }

    /// Stops the device and waits until its queues are back. Not for vCPU threads.
    pub(super) fn stop(self: &Arc<Self>, reset: bool) -> Result<(), Stuck> {
        let mut device = self.lock();
        device.running = false;
        let patience = if reset { RESET_PATIENCE } else { STOP_PATIENCE };
        match device.phase {
            Phase::Active => self.deactivate(&mut device, reset, patience),
            Phase::Leaving { .. } if reset => device.phase = Phase::Leaving { reset },
            Phase::Idle | Phase::Leaving { .. } => {}
        }
        let deadline = Instant::now() + RESET_PATIENCE + RETURN_LIMIT;
        while device.phase != Phase::Idle {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Stuck);
            }
            device = self.returned.wait_timeout(device, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }
}
