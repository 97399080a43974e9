//! A running machine under the control of others.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde::Serialize;

use super::paging::Paging;
use super::parts::{Parts, lock};
use super::processor::VcpuState;
use super::spanning::{Refused, Spanning};
use super::{Error, Exit};
use crate::config;
use crate::control::{
    self, Controlled, Counters, DeviceStatus, HelperStatus, MemoryStatus, Peers, State, Status, Waiting,
};
use crate::kvm::PartitionState;
use crate::memory::coherence::{self, message::Member};
use crate::units::Bytes;

/// The version of the saved state's layout.
const STATE_VERSION: u32 = 2;

/// Controls one machine.
pub struct Controller {
    parts: Arc<Parts>,
}

#[derive(Serialize)]
struct Saved {
    version: u32,
    vcpus: Vec<VcpuState>,
    partition: PartitionState,
    devices: BTreeMap<String, devices::lifecycle::DeviceState>,
}

impl Controller {
    pub(super) fn new(parts: Arc<Parts>) -> Self {
        Self { parts }
    }

    fn paging(&self) -> Result<&Paging, control::Error> {
        let none = || control::Error::Unsupported("the guest's memory is all on this PC".into());
        self.parts.paging.as_deref().ok_or_else(none)
    }

    fn not_now(&self) -> control::Error {
        let doing = match self.parts.state() {
            State::Starting => "starting",
            State::Running => "running",
            State::Paused => "paused",
            State::Ending => "ending",
        };
        if let Some(waiting) = lock(&self.parts.held).waiting() {
            return stands_still(&waiting);
        }
        control::Error::NotNow(format!("the guest is {doing}"))
    }
}

impl Controller {
    /// Moves vCPUs as `plan` says, while the guest stands still; how many that are.
    fn move_vcpus(
        &self,
        plan: impl FnOnce(&Spanning) -> Result<Vec<(u8, Member)>, Refused>,
    ) -> Result<usize, control::Error> {
        let parts = &self.parts;
        let Some(spanning) = &parts.spanning else {
            return Err(control::Error::Unsupported(
                "its vCPUs are all on this PC (`[[cpu.place]]` in its configuration names others that may run them)"
                    .into(),
            ));
        };
        let _life = lock(&parts.life);
        let plan = plan(spanning).map_err(failed)?;
        let runs = parts.state() == State::Running;
        if runs {
            parts.pause().map_err(failed)?;
        }
        let waiting = lock(&parts.held).waiting();
        if let Some(waiting) = waiting {
            // It stands still for a helper, and goes on by itself if it did before.
            if runs {
                let _ = parts.want_paused(false);
            }
            return Err(stands_still(&waiting));
        }
        if parts.state() != State::Paused {
            return Err(self.not_now());
        }
        let moved = parts.move_vcpus(&plan);
        if runs {
            parts.resume().map_err(failed)?;
        }
        moved.map(|()| plan.len()).map_err(failed)
    }
}

fn stands_still(waiting: &Waiting) -> control::Error {
    let Waiting { helper, why, .. } = waiting;
    control::Error::NotNow(format!(
        "the guest stands still for its memory on {helper}, which is away ({why}), and goes on when that is back"
    ))
}

#[allow(clippy::needless_pass_by_value)] // the form that `map_err` takes
fn failed(error: impl ToString) -> control::Error {
    control::Error::Failed(error.to_string())
}

impl Controlled for Controller {
    fn status(&self) -> Status {
        let parts = &self.parts;
        let describe = |device: &super::parts::Device| DeviceStatus {
            name: device.name.clone(),
            kind: device.life.kind().into(),
            about: (device.about)(),
        };
        Status {
            name: parts.guest.name.clone(),
            pid: std::process::id(),
            state: parts.state(),
            vcpus: parts.vcpus.len() as u8,
            memory: parts.guest.memory.size,
            balloon: parts.balloon.as_ref().map(|balloon| Bytes(balloon.target())),
            uptime_ms: parts.started.elapsed().as_millis() as u64,
            resets: parts.resets.load(Ordering::Relaxed),
            waits_for: lock(&parts.held).waiting(),
            places: parts.spanning.as_ref().map(Spanning::places).unwrap_or_default(),
            devices: parts.devices.iter().map(describe).collect(),
        }
    }

    fn pause(&self) -> Result<(), control::Error> {
        let _life = lock(&self.parts.life);
        match self.parts.state() {
            State::Running => self.parts.pause().map_err(failed),
            State::Paused => {
                // Should it stand still for a helper, it stays paused afterwards.
                let _ = self.parts.want_paused(true);
                Ok(())
            }
            State::Starting | State::Ending => Err(self.not_now()),
        }
    }

    fn resume(&self) -> Result<(), control::Error> {
        let _life = lock(&self.parts.life);
        match self.parts.state() {
            State::Paused => match self.parts.want_paused(false) {
                Some(waiting) => Err(stands_still(&waiting)),
                None => self.parts.resume().map_err(failed),
            },
            State::Running => Ok(()),
            State::Starting | State::Ending => Err(self.not_now()),
        }
    }

    fn power_off(&self) -> Result<(), control::Error> {
        if self.parts.state() != State::Running {
            return Err(self.not_now());
        }
        match self.parts.pm.press_power_button() {
            Ok(true) => Ok(()),
            Ok(false) => {
                Err(control::Error::NotNow("the guest does not listen to its power button (yet)".into()))
            }
            Err(error) => Err(failed(error)),
        }
    }

    fn kill(&self) {
        self.parts.finish(Ok(Exit::Killed));
    }

    fn counters(&self) -> Counters {
        let mut groups = Counters::new();
        for (index, exits) in self.parts.exits.iter().enumerate() {
            let exits = BTreeMap::from([("exits".to_owned(), exits.load(Ordering::Relaxed))]);
            groups.insert(format!("vcpu{index}"), exits);
        }
        for device in &self.parts.devices {
            if let Some(counters) = &device.counters {
                let group = counters().into_iter().map(|(name, value)| (name.to_owned(), value));
                groups.insert(device.name.clone(), group.collect());
            }
        }
        if let Some(paging) = &self.parts.paging {
            groups.extend(paging.counters());
        }
        if let Some(spanning) = &self.parts.spanning {
            groups.insert("coherence".to_owned(), spanning.counters());
        }
        groups
    }

    fn peers(&self) -> Peers {
        let peer =
            |device: &super::parts::Device| Some((device.name.clone(), device.peer.as_ref()?.snapshot()));
        let mut peers: Peers = self.parts.devices.iter().filter_map(peer).collect();
        peers.extend(self.parts.paging.iter().flat_map(|paging| paging.peers()));
        peers
    }

    fn memory(&self) -> Result<MemoryStatus, control::Error> {
        Ok(self.paging()?.memory())
    }

    fn coherence(&self) -> Result<coherence::Counters, control::Error> {
        let none = || control::Error::Unsupported("the guest's vCPUs are all on this PC".into());
        Ok(self.parts.spanning.as_ref().ok_or_else(none)?.engine.counters())
    }

    fn helpers(&self) -> Result<Vec<HelperStatus>, control::Error> {
        Ok(self.paging()?.helpers())
    }

    fn drain_helper(&self, helper: &str) -> Result<String, control::Error> {
        let paging = self.paging()?;
        let known = paging.named(helper, &self.parts.guest);
        let agent = known.ok_or_else(|| failed(format!("the guest has no memory on {helper}")))?;
        let lacks = Bytes(paging.control.lacks_without(&agent));
        if lacks > Bytes(0) {
            return Err(control::Error::NotNow(format!(
                "the other helpers lack {lacks} of room for the guest's memory without {agent}; add a helper with \
                 `omega memory add {} --agent ADDRESS --size {lacks}`",
                self.parts.guest.name
            )));
        }
        paging.control.drain(&agent).map_err(failed)?;
        Ok(agent)
    }

    fn add_helper(&self, helper: &config::Helper) -> Result<(), control::Error> {
        self.paging()?.add(helper.clone()).map_err(control::Error::Failed)
    }

    fn move_vcpu(&self, vcpu: u8, node: &str) -> Result<(), control::Error> {
        self.move_vcpus(|spanning| {
            let to = spanning.member(node)?;
            spanning.may_go(vcpu, to)?;
            Ok(vec![(vcpu, to)])
        })
        .map(drop)
    }

    fn drain_vcpus(&self, node: &str) -> Result<usize, control::Error> {
        self.move_vcpus(|spanning| {
            if node == config::CONSOLE {
                return Err(Refused::First);
            }
            Ok(spanning.without(spanning.member(node)?))
        })
    }

    fn set_balloon(&self, target: Bytes) -> Result<(), control::Error> {
        let size = self.parts.guest.memory.size;
        let Some(balloon) = &self.parts.balloon else {
            return Err(control::Error::Unsupported(
                "the guest has no balloon (`[balloon]` in its configuration gives it one)".into(),
            ));
        };
        if target > size {
            return Err(control::Error::Failed(format!("{target} is more than the guest's {size}")));
        }
        balloon.set_target(target.0);
        Ok(())
    }

    fn save_state(&self) -> Result<serde_json::Value, control::Error> {
        let _life = lock(&self.parts.life);
        if self.parts.state() != State::Paused || lock(&self.parts.held).waiting().is_some() {
            return Err(self.not_now());
        }
        save(&self.parts).map_err(failed)
    }
}

fn save(parts: &Parts) -> Result<serde_json::Value, Error> {
    let mut devices = BTreeMap::new();
    for device in &parts.devices {
        let state =
            device.life.save().map_err(|source| Error::Lifecycle { name: device.name.clone(), source })?;
        devices.insert(device.name.clone(), state);
    }
    let vcpus = parts.vcpus.iter().map(|vcpu| lock(vcpu).save()).collect::<Result<_, _>>()?;
    let saved = Saved { version: STATE_VERSION, vcpus, partition: parts.partition.save()?, devices };
    serde_json::to_value(saved)
        .map_err(|error| Error::Device { name: "machine".into(), why: error.to_string() })
}
