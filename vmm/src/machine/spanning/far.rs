//! A vCPU elsewhere, as the machine has it.

use std::sync::Arc;
use std::time::Duration;

use crate::cpu::{Kick, Place, Processor, VmEntry, VmExit};
use crate::kvm::Attached;
use crate::loader::Entry;
use crate::machine::Error;
use crate::machine::processor::{Vcpu, VcpuState};
use crate::span::remote::Remote;
use crate::span::share::Share;

/// How long a vCPU's state may take to come or go.
const STATE: Duration = Duration::from_secs(10);

/// See the [module](self).
pub(super) struct Far {
    remote: Remote,
    index: u8,
}

impl Far {
    /// The vCPU `index` at `share`.
    pub(super) fn new(share: &Arc<Share>, index: u8) -> Self {
        Self { remote: Remote::new(Arc::clone(share), index), index }
    }

    fn failed(&self, why: &impl ToString) -> Error {
        Error::Cpu { index: self.index, why: why.to_string() }
    }
}

impl Processor for Far {
    fn enter(&mut self, entry: VmEntry) -> VmExit {
        self.remote.enter(entry)
    }

    fn interrupt(&mut self) {
        self.remote.interrupt();
    }
}

impl Vcpu for Far {
    fn attach(&mut self) -> Option<Attached> {
        None
    }

    fn kick(&self) -> Option<Kick> {
        let (share, index) = (Arc::clone(self.remote.share()), self.index);
        Some(Box::new(move || share.kick(index)))
    }

    fn save(&mut self) -> Result<VcpuState, Error> {
        let bytes = self.remote.share().save(self.index, STATE).map_err(|why| self.failed(&why))?;
        serde_json::from_slice(&bytes).map_err(|why| self.failed(&why))
    }

    fn restore(&mut self, state: &VcpuState) -> Result<(), Error> {
        let bytes = serde_json::to_vec(state).map_err(|why| self.failed(&why))?;
        self.remote.share().restore(self.index, &bytes, STATE).map_err(|why| self.failed(&why))
    }

    fn place(&self) -> Option<Place> {
        Some(Place::Elsewhere(Arc::clone(self.remote.share()) as _))
    }

    fn leave(&mut self) {
        self.remote.share().leave(self.index);
    }

    fn set_up(&mut self) -> Result<(), Error> {
        // Its helper did, or its state came from where it was done.
        Ok(())
    }

    fn boot(&mut self, _entry: &Entry, _memory: &devices::GuestMemory) -> Result<(), Error> {
        Err(self.failed(&"a guest begins on its console node"))
    }
}
