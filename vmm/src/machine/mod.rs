//! The machine: built from a guest's configuration, started, paused, reset and ended.
//!
//! ```text
//!           run                     pause
//! Starting ─────▶ Running ◀────────────────────▶ Paused
//!                  │   ▲            resume         │
//!    reset, panic  └───┘                           │
//!                  │                               │
//!                  └──▶ Ending ◀── kill, power-off ┘
//! ```
//!
//! Who does what: each vCPU has a thread, which answers its own exits; the *keeper* thread carries out
//! what vCPUs ask for (reset, power-off); a controller's thread pauses and resumes under the same lock as
//! the keeper. The thread in [`Machine::run`] only waits for the end, so that a kill always gets through,
//! whatever a device waits for.

mod agents;
mod assembly;
mod cards;
mod controller;
mod controllers;
mod disks;
mod ending;
mod keeper;
mod lenders;
mod lent;
mod paging;
mod parts;
mod peripherals;
pub(crate) mod processor;
mod spanning;
mod startup;
mod vcpus;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::Receiver;

pub use controller::Controller;
use devices::thread::{Role, confine};
use transport::identity::Reloading;

use crate::acpi;
use crate::config;
use crate::console::Hub;
use crate::cpu::{Event, Stuck};
use crate::kvm;
use crate::loader;
use crate::memory;

/// What is not part of the guest's configuration.
pub struct Options {
    /// Start although this PC's KVM cannot run stock kernels.
    pub allow_unfit_kvm: bool,
    /// Who this PC is to the agents of the guest's disks and memory, if it has an identity.
    pub identity: Option<Arc<Reloading>>,
    /// Where unpacked kernels are kept; nowhere: they are unpacked at each start.
    pub cache: Option<PathBuf>,
    /// Where the serial port is connected.
    pub serial: Hub,
    /// Where the virtio console is connected, where the guest has one.
    pub console: Option<Hub>,
}

/// How a guest ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// It powered itself off.
    PoweredOff,
    /// It asked for a reset, and its configuration says that this ends it.
    Rebooted,
    /// Its kernel panicked.
    Panicked,
    /// A triple fault.
    TripleFault,
    /// It was killed.
    Killed,
    /// Pages of its memory were lost with a helper.
    MemoryLost,
}

impl Exit {
    /// The exit code of `omega run`.
    #[must_use]
    pub fn code(self) -> u8 {
        match self {
            Self::PoweredOff => 0,
            Self::Rebooted => 10,
            Self::Panicked => 11,
            Self::TripleFault => 12,
            Self::Killed => 13,
            Self::MemoryLost => 14,
        }
    }
}

/// A machine could not be built or could not go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// KVM is missing or unfit.
    #[error("{0}")]
    Unfit(kvm::Fitness),
    /// KVM refuses.
    #[error(transparent)]
    Kvm(#[from] kvm::Error),
    /// RAM cannot be had.
    #[error(transparent)]
    Memory(#[from] memory::Error),
    /// RAM does not fit into the guest's address space.
    #[error("{size} of RAM do not fit into this processor's {bits}-bit guest addresses; lower `memory.size`")]
    TooMuchMemory {
        /// How much was asked for.
        size: crate::units::Bytes,
        /// How wide addresses are.
        bits: u8,
    },
    /// The kernel cannot be loaded.
    #[error(transparent)]
    Kernel(#[from] loader::Error),
    /// The ACPI tables cannot be written.
    #[error(transparent)]
    Acpi(#[from] acpi::TooLarge),
    /// A disk cannot be had.
    #[error("Disk {index}: {why}")]
    Disk {
        /// Which, from 0.
        index: usize,
        /// Why not.
        why: String,
    },
    /// A device cannot be built.
    #[error("The device {name} cannot be built: {why}")]
    Device {
        /// Which.
        name: String,
        /// Why not.
        why: String,
    },
    /// A device failed in its life.
    #[error("The device {name}: {source}")]
    Lifecycle {
        /// Which.
        name: String,
        /// What failed.
        source: devices::lifecycle::Error,
    },
    /// A thread cannot be started.
    #[error("A thread cannot be started: {0}")]
    Thread(std::io::Error),
    /// Memory on other PCs cannot be handled.
    #[error(transparent)]
    Paging(#[from] memory::fault::Error),
    /// RAM cannot be shared with other PCs.
    #[error(transparent)]
    Coherence(#[from] memory::coherence::Error),
    /// A helper cannot be trusted, or does not do its part.
    #[error("{0}")]
    Helper(String),
    /// The helpers do not lend what the guest needs.
    #[error(transparent)]
    Lend(#[from] memory::store::ConnectError),
    /// It stands still for its memory.
    #[error("The guest waits for memory on a PC that is away")]
    AwaitsMemory,
    /// vCPUs do not pause.
    #[error(transparent)]
    Stuck(#[from] Stuck),
    /// A vCPU cannot go on.
    #[error("vCPU {index} cannot go on: {why}")]
    Cpu {
        /// Which.
        index: u8,
        /// Why not.
        why: String,
    },
}

/// A guest, ready to run.
pub struct Machine {
    parts: Arc<parts::Parts>,
    events: Receiver<Event>,
    end: Receiver<Result<Exit, Error>>,
}

impl Machine {
    /// Builds the machine that `guest` describes: everything that can fail before its first instruction
    /// fails here.
    ///
    /// # Errors
    /// Each names what is missing and, where there is one, the mend.
    #[allow(clippy::needless_pass_by_value)] // the consoles are the machine's from here on
    pub fn new(guest: &config::Guest, options: Options) -> Result<Self, Error> {
        if !options.allow_unfit_kvm {
            match kvm::fitness() {
                kvm::Fitness::Fit => {}
                unfit => return Err(Error::Unfit(unfit)),
            }
        }
        assembly::assemble(guest, &options)
    }

    /// What controls the machine while it runs, from any thread.
    #[must_use]
    pub fn controller(&self) -> Arc<Controller> {
        Arc::new(Controller::new(Arc::clone(&self.parts)))
    }

    /// Starts the guest and returns when it has ended.
    ///
    /// # Errors
    /// The guest cannot be started or go on.
    pub fn run(self) -> Result<Exit, Error> {
        let Self { parts, events, end } = self;
        vcpus::start(&parts)?;
        let keeper = keeper::start(&parts, events)?;
        paging::watch(&parts)?;
        spanning::watch(&parts)?;
        parts.boot()?;
        startup::give_back();
        // Last, since threads inherit it, and those started above may do more.
        confine(Role::Main).map_err(Error::Thread)?;
        // The sender lives in `parts`.
        let exit = end.recv().unwrap_or(Ok(Exit::Killed));
        ending::end(&parts, keeper, &exit);
        exit
    }
}
