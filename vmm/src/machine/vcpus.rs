//! The vCPUs' threads.

use std::mem;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use devices::thread::{Role, spawn};
use vmm_sys_util::signal::Killable;

use super::Error;
use super::parts::{Parts, lock};
use crate::cpu::{self, Kick};
use crate::kvm::{install_kick_handler, kick_signal};

/// The threads of a machine's vCPUs. Clones are the same.
#[derive(Clone, Default)]
pub(super) struct Threads(Arc<Mutex<Vec<JoinHandle<()>>>>);

impl Threads {
    /// Takes the threads out, to be joined; no kick reaches them any more.
    pub(super) fn take(&self) -> Vec<JoinHandle<()>> {
        mem::take(&mut *lock(&self.0))
    }

    /// Whether all of them have ended.
    pub(super) fn ended(&self) -> bool {
        lock(&self.0).iter().all(JoinHandle::is_finished)
    }
}

/// Says how vCPUs are made to leave guest code: to be said again when one of them is run by something else.
pub(super) fn set_kick(parts: &Parts) {
    let kicks: Vec<Option<Kick>> = parts.vcpus.iter().map(|vcpu| lock(vcpu).kick()).collect();
    let kicked = parts.threads.clone();
    parts.gang.set_kick(Box::new(move || {
        kicks.iter().flatten().for_each(|kick| kick());
        for (thread, _) in lock(&kicked.0).iter().zip(&kicks).filter(|(_, kick)| kick.is_none()) {
            // A thread that has ended needs no kick.
            let _ = thread.kill(kick_signal());
        }
    }));
}

/// Starts one thread for each vCPU; they wait until the gang runs.
pub(super) fn start(parts: &Arc<Parts>) -> Result<(), Error> {
    install_kick_handler().map_err(Error::Thread)?;
    set_kick(parts);
    for index in 0..parts.vcpus.len() {
        let theirs = Arc::clone(parts);
        let thread = spawn(Role::Vcpu, &format!("vcpu{index}"), move || body(&theirs, index))
            .map_err(Error::Thread)?;
        lock(&parts.threads.0).push(thread);
    }
    Ok(())
}

/// Tells the log when the guest's first instruction is about to run (`OMEGA_LOG=start=debug`): on the
/// monotonic clock, so that whoever started this process can subtract. The benchmarks do.
fn report_first_entry() {
    if tracing::enabled!(target: "start", tracing::Level::DEBUG) {
        let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC);
        let monotonic_us = now.map_or(0, |now| now.tv_sec() * 1_000_000 + now.tv_nsec() / 1000);
        tracing::debug!(target: "start", monotonic_us, "The guest is about to run");
    }
}

fn body(parts: &Parts, index: usize) {
    let mut first = index == 0;
    while parts.gang.park() {
        let mut vcpu = lock(&parts.vcpus[index]);
        let _attached = vcpu.attach();
        if !parts.gang.may_run() {
            continue; // the kick came before it could reach this vCPU
        }
        if mem::take(&mut first) {
            report_first_entry();
        }
        cpu::run(index as u8, &mut **vcpu, &parts.buses, &parts.gang, &parts.events, &parts.exits[index]);
    }
}
