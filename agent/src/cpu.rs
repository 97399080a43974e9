//! vCPUs that this PC lends to guests on others: who has how many, and the lines that drive them.
//!
//! A guest takes a lease with the opening of its vCPU line, and the line's session is what keeps it: when that is gone, or
//! silent for the patience that the guest asked for (at most `keep`), the lease ends and with it the vCPUs. Drawn in
//! `docs/span-protocol.md`.

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use sysinfo::System;
use transport::line::{Answering, Sender};
use transport::wire::fields::Malformed;
use vmm::span::host::{Host, HostEar, Terms};
use vmm::span::protocol::Purpose;
use vmm::units::Bytes;

use crate::config;
use crate::policy::Asker;
use crate::serve::Agent;
use crate::volume::lock;

/// A guest's lease.
struct Part {
    host: Arc<Host>,
    holder: u128,
    node: Option<String>,
    guest: String,
    count: u8,
    patience: Duration,
}

/// A line of a session, and of which lease it is.
struct Line {
    epoch: u64,
    line: Arc<Answering>,
}

#[derive(Default)]
struct Parts {
    by_epoch: HashMap<u64, Part>,
    by_session: HashMap<u128, Line>,
}

impl Parts {
    fn lent(&self) -> u32 {
        self.by_epoch.values().map(|part| u32::from(part.count)).sum()
    }

    fn of_node(&self, node: Option<&str>) -> u32 {
        let theirs = self.by_epoch.values().filter(|part| part.node.as_deref() == node);
        theirs.map(|part| u32::from(part.count)).sum()
    }

    /// Forgets the leases that have ended.
    fn sweep(&mut self) {
        self.by_epoch.retain(|_, part| !part.host.is_over());
        let leases = &self.by_epoch;
        self.by_session.retain(|_, line| leases.contains_key(&line.epoch));
    }
}

/// vCPUs that are lent, in the inventory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lent {
    /// So many may be leased.
    pub count: u32,
    /// By whom so many are: guests, their nodes and how many vCPUs.
    pub leases: Vec<Lease>,
}

/// A guest's lease of vCPUs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// The guest's name, as its console calls it.
    pub guest: String,
    /// The node that it proved to be on.
    pub node: Option<String>,
    /// How many.
    pub vcpus: u8,
}

/// All vCPUs that are lent.
pub(crate) struct Cpus {
    count: u32,
    keep: Duration,
    parts: Mutex<Parts>,
}

impl Cpus {
    /// Lends what `config` says; nothing without one.
    pub(crate) fn new(config: Option<&config::Cpu>) -> Self {
        let (count, keep) = config.map_or((0, Duration::ZERO), |cpu| (cpu.count, cpu.keep.0));
        Self { count, keep, parts: Mutex::default() }
    }

    /// What is lent to whom, if something is.
    pub(crate) fn lent(&self) -> Option<Lent> {
        let parts = lock(&self.parts);
        let lease = |part: &Part| {
            let (guest, node, vcpus) = (part.guest.clone(), part.node.clone(), part.count);
            Lease { guest, node, vcpus }
        };
        let leases = parts.by_epoch.values().map(lease).collect();
        (self.count > 0).then_some(Lent { count: self.count, leases })
    }

    /// The line of a session that opened one.
    pub(crate) fn line(&self, session: u128) -> Option<Arc<Answering>> {
        lock(&self.parts).by_session.get(&session).map(|line| Arc::clone(&line.line))
    }

    /// Ends the leases whose guests are not heard any more.
    pub(crate) fn tick(&self) {
        let mut parts = lock(&self.parts);
        for part in parts.by_epoch.values() {
            let silence = part.host.silence();
            if silence >= part.patience {
                let why = format!("the console node was not heard for {} s", silence.as_secs());
                tracing::info!(guest = %part.guest, %why, "A lease of vCPUs ends");
                part.host.end(&why);
            }
        }
        parts.sweep();
    }

    /// Ends all leases, before the agent does.
    pub(crate) fn end(&self) {
        for part in lock(&self.parts).by_epoch.values() {
            part.host.end("the agent is stopping");
        }
    }

    /// Takes the opening of a line by a session of `asker`.
    ///
    /// # Errors
    /// Why not, in words for both logs.
    pub(crate) fn open(
        &self,
        agent: &Agent,
        asker: &Asker,
        session: u128,
        body: &[u8],
    ) -> Result<(), String> {
        let purpose = Purpose::decode(body).map_err(|why: Malformed| why.to_string())?;
        let mut parts = lock(&self.parts);
        if parts.by_session.contains_key(&session) {
            // It is asked again after a cut.
            return Ok(());
        }
        match purpose {
            Purpose::Cpus { holder, count, ram, patience, guest } => {
                let patience = patience.map_or(self.keep, |patience| patience.min(self.keep));
                let node = asker.node().map(str::to_owned);
                parts
                    .by_epoch
                    .values()
                    .filter(|part| part.holder == holder && part.node == node)
                    .for_each(|earlier| earlier.host.end("its guest took another lease"));
                parts.sweep();
                self.permit(agent, asker, &parts, count, ram)?;
                let fresh = lock(&agent.leases).fresh_epoch();
                let epoch = fresh.map_err(|why| format!("no epoch: {why:?}"))?;
                let failed = |error: io::Error| format!("a line cannot be had: {error}");
                let (sender, memory) = (Sender::new().map_err(failed)?, Sender::new().map_err(failed)?);
                let host = Host::new(Terms { epoch, cpus: count, ram }, sender.clone(), memory);
                let line = Answering::new(sender, Arc::new(HostEar(Arc::clone(&host))));
                tracing::info!(%guest, to = %asker, vcpus = count, epoch, "A lease of vCPUs was given");
                parts.by_session.insert(session, Line { epoch, line });
                parts.by_epoch.insert(epoch, Part { host, holder, node, guest, count, patience });
            }
            Purpose::Memory { epoch, holder, shard } => {
                let part = parts.by_epoch.get(&epoch).filter(|part| {
                    part.holder == holder && part.node.as_deref() == asker.node() && !part.host.is_over()
                });
                let over = || format!("lease {epoch} of vCPUs is over");
                let host = &part.ok_or_else(over)?.host;
                if shard != 0 || parts.by_session.values().filter(|line| line.epoch == epoch).count() > 1 {
                    return Err("this memory has a line already".to_owned());
                }
                let line = Answering::new(host.memory(), host.memory_ear());
                parts.by_session.insert(session, Line { epoch, line });
            }
        }
        Ok(())
    }

    /// Whether `asker` may have so many vCPUs with so much RAM now.
    fn permit(&self, agent: &Agent, asker: &Asker, parts: &Parts, count: u8, ram: u64) -> Result<(), String> {
        let allowed = agent.policy.vcpus(asker).ok_or_else(|| agent.policy.vcpus_refusal(asker))?;
        if self.count == 0 {
            return Err("it lends no vCPUs: its agent.toml has no `[cpu]`".to_owned());
        }
        let wanted = u32::from(count);
        let theirs = parts.of_node(asker.node());
        if theirs + wanted > allowed {
            return Err(format!("{asker} may use {allowed} vCPUs here, has {theirs} and asks for {wanted}"));
        }
        let lent = parts.lent();
        if lent + wanted > self.count {
            return Err(format!(
                "it lends {} vCPUs, {lent} are in use, and {wanted} are asked for",
                self.count
            ));
        }
        missing().map_or(Ok(()), Err)?;
        let free = available();
        if free < ram {
            return Err(format!(
                "the guest has {} of RAM, for all of which there must be room on each of its PCs, and {} are free",
                Bytes(ram),
                Bytes(free)
            ));
        }
        Ok(())
    }
}

fn available() -> u64 {
    System::new().ok().map_or(0, |mut system| {
        system.refresh_memory();
        system.available_memory()
    })
}

/// What keeps this PC from running others' vCPUs, with the mend.
pub(crate) fn missing() -> Option<String> {
    for (path, mend) in [
        (
            "/dev/kvm",
            "give the agent's user the device (group `kvm`), or switch virtualization on in the firmware",
        ),
        (
            "/dev/userfaultfd",
            "give the agent's user the device (`setfacl -m u:USER:rw`, or a udev rule); it is there from Linux 6.1 on",
        ),
    ] {
        let opened = std::fs::OpenOptions::new().read(true).write(true).open(Path::new(path));
        if let Err(error) = opened {
            return Some(format!("it cannot run vCPUs: {path} cannot be opened ({error}); {mend}"));
        }
    }
    None
}
