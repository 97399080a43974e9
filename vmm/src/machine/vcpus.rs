//! The vCPUs' threads.

use std::mem;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use devices::thread::{Role, spawn};
use vmm_sys_util::signal::Killable;

use super::Error;
use super::parts::{Parts, lock};
use crate::cpu;
use crate::kvm::{install_kick_handler, kick_signal};

/// The threads of a machine's vCPUs.
#[derive(Clone)]
pub(super) struct Threads(Arc<Mutex<Vec<JoinHandle<()>>>>);

impl Threads {
    /// Takes the threads out, to be joined; no kick reaches them any more.
    pub(super) fn take(&self) -> Vec<JoinHandle<()>> {
        mem::take(&mut *lock(&self.0))
    }
}

/// Starts one thread for each vCPU; they wait until the gang runs.
pub(super) fn start(parts: &Arc<Parts>) -> Result<Threads, Error> {
    install_kick_handler().map_err(Error::Thread)?;
    let threads = Threads(Arc::default());
    for index in 0..parts.vcpus.len() {
        let parts = Arc::clone(parts);
        let thread =
            spawn(Role::Vcpu, &format!("vcpu{index}"), move || body(&parts, index)).map_err(Error::Thread)?;
        lock(&threads.0).push(thread);
    }
    let kicked = threads.clone();
    parts.gang.set_kick(Box::new(move || {
        for thread in &*lock(&kicked.0) {
            // A thread that has ended needs no kick.
            let _ = thread.kill(kick_signal());
        }
    }));
    Ok(threads)
}

fn body(parts: &Parts, index: usize) {
    while parts.gang.park() {
        let mut vcpu = lock(&parts.vcpus[index]);
        let _attached = vcpu.attach();
        if !parts.gang.may_run() {
            continue; // the kick came before it could reach this vCPU
        }
        cpu::run(index as u8, &mut *vcpu, &parts.buses, &parts.gang, &parts.events, &parts.exits[index]);
    }
}
