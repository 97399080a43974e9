//! Start, stop, save, restore and reset of a virtio function. The contract is in `docs/devices.md`.

use std::io;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::super::Virtqueue;
use super::state::{DRIVER_OK, Phase, Shared};
use super::{QueueLayout, VirtioPci};
use crate::lifecycle::{DeviceState, Error, Lifecycle};
use crate::pci::{ConfigState, MsixState};

const VERSION: u32 = 1;

#[derive(Serialize, Deserialize)]
struct QueueState {
    enabled: bool,
    vector: u16,
    layout: QueueLayout,
}

#[derive(Serialize, Deserialize)]
struct State {
    config: ConfigState,
    msix: MsixState,
    status: u8,
    needs_reset: bool,
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    queue_select: u16,
    config_vector: u16,
    queues: Vec<QueueState>,
    device: Value,
}

impl VirtioPci {
    fn error(&self, what: &'static str, source: io::Error) -> Error {
        Error::Device { kind: self.kind, what, source }
    }

    fn stuck(&self) -> Error {
        self.error("stop", io::Error::new(io::ErrorKind::TimedOut, "its requests in flight did not end"))
    }

    /// What is wrong with `state` for this device, if anything.
    fn check(&self, state: &State) -> Result<(), &'static str> {
        // Never both locks at once: an access through configuration space takes them the other way round.
        if !self.config().space.accepts(&state.config) {
            return Err("its configuration space is of another function");
        }
        let device = self.shared.lock();
        if device.phase != Phase::Idle || device.running {
            return Err("the device is in use");
        }
        if state.queues.len() != device.queues.len()
            || state.msix.vectors.len() != usize::from(self.msix.count())
        {
            return Err("it has another number of queues");
        }
        if state.driver_features & !device.offered() != 0 {
            return Err("its driver uses features that this device does not have");
        }
        for (saved, own) in state.queues.iter().zip(&device.queues) {
            if saved.layout.size > own.max_size {
                return Err("a queue is larger than this device allows");
            }
            if saved.enabled && Virtqueue::new(&saved.layout, false, self.shared.memory().clone()).is_err() {
                return Err("a queue does not lie in RAM");
            }
        }
        Ok(())
    }
}

impl Lifecycle for VirtioPci {
    fn kind(&self) -> &'static str {
        self.kind
    }

    fn start(&self) -> Result<(), Error> {
        let mut device = self.shared.lock();
        Shared::start_device(&mut device, &self.interrupts).map_err(|e| self.error("start", e))?;
        if !device.running {
            device.running = true;
            if device.status & DRIVER_OK != 0 && device.phase == Phase::Idle && !self.interrupts.needs_reset()
            {
                self.shared.activate(&mut device);
            }
        }
        Ok(())
    }

    fn stop(&self) -> Result<(), Error> {
        self.shared.stop(false).map_err(|_| self.stuck())
    }

    fn end(&self) {
        self.shared.lock().device.end();
    }

    fn save(&self) -> Result<DeviceState, Error> {
        let config = self.config().space.save();
        let device = self.shared.lock();
        if device.phase != Phase::Idle || device.running {
            return Err(self.error("save", io::Error::other("the device runs")));
        }
        let queues = device.queues.iter().zip(0..).map(|(queue, index)| QueueState {
            enabled: queue.enabled,
            vector: self.interrupts.vector(Some(index)),
            layout: queue.layout.clone(),
        });
        let state = State {
            config,
            msix: self.msix.save(),
            status: device.status,
            needs_reset: self.interrupts.needs_reset(),
            device_feature_select: device.device_feature_select,
            driver_feature_select: device.driver_feature_select,
            driver_features: device.driver_features,
            queue_select: device.queue_select,
            config_vector: self.interrupts.vector(None),
            queues: queues.collect(),
            device: device.device.save(),
        };
        DeviceState::of(self.kind, VERSION, &state)
    }

    fn restore(&self, state: &DeviceState) -> Result<(), Error> {
        let state: State = state.value(self.kind, VERSION)?;
        self.check(&state).map_err(|why| Error::invalid(self.kind, why))?;
        let mut device = self.shared.lock();
        device.device.restore(&state.device).map_err(|why| Error::invalid(self.kind, why))?;
        device.status = state.status;
        device.device_feature_select = state.device_feature_select;
        device.driver_feature_select = state.driver_feature_select;
        device.driver_features = state.driver_features;
        device.queue_select = state.queue_select;
        self.interrupts.set_live(state.status & DRIVER_OK != 0);
        self.interrupts.set_needs_reset(state.needs_reset);
        self.interrupts.set_vector(None, state.config_vector);
        for ((queue, saved), index) in device.queues.iter_mut().zip(state.queues).zip(0..) {
            self.interrupts.set_vector(Some(index), saved.vector);
            queue.enabled = saved.enabled;
            queue.layout = saved.layout;
        }
        drop(device);
        let mut config = self.config();
        config.space.restore(&state.config);
        self.apply(&mut config);
        // After `apply`, so that vectors which were pending and open are delivered once.
        if self.msix.restore(&state.msix) {
            Ok(())
        } else {
            Err(Error::invalid(self.kind, "it has another number of vectors"))
        }
    }

    fn reset(&self) -> Result<(), Error> {
        self.shared.stop(true).map_err(|_| self.stuck())?;
        let mut device = self.shared.lock();
        device.reset_registers();
        self.interrupts.reset();
        drop(device);
        self.msix.reset();
        let mut config = self.config();
        config.space.reset();
        self.apply(&mut config);
        Ok(())
    }
}
