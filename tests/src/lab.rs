//! A lab: some PCs, the networks between them, and the folder with what they said.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread;

use anyhow::{Context, Result};
use tempfile::TempDir;

use crate::host::host;
use crate::images::{Image, target};
use crate::network::Network;
use crate::pc::{Pc, PcBuilder};

/// Every lab of this process, so that Ctrl-C ends them all.
static LABS: Mutex<Vec<Weak<Inner>>> = Mutex::new(Vec::new());

/// PCs and networks that end together.
pub struct Lab {
    inner: Arc<Inner>,
}

pub(crate) struct Inner {
    /// Sockets and disks; gone with the lab.
    pub(crate) scratch: TempDir,
    /// Consoles and commands of the PCs; kept.
    pub(crate) logs: PathBuf,
    pub(crate) image: Image,
    /// A second of its PCs takes so many of ours.
    pub(crate) slower: u32,
    networks: Mutex<Vec<Network>>,
    pcs: Mutex<Vec<Weak<Pc>>>,
}

impl Lab {
    /// An empty lab. Its logs go to `target/lab/NAME/`.
    ///
    /// # Errors
    /// When no PC can run on this machine; the message says what is missing.
    pub fn new(name: &str) -> Result<Self> {
        Self::with_clock(name, 1)
    }

    /// One whose PCs, if they are emulated, have clocks that are `slower` by so much, so that their processors are quick
    /// by their own clock; see the library `lab_clock`.
    ///
    /// # Errors
    /// As of [`Self::new`].
    pub fn with_clock(name: &str, slower: u32) -> Result<Self> {
        let slower = if host()?.kvm { 1 } else { slower };
        let image = Image::get("lab-pc")?;
        let logs = target().join("lab").join(name);
        // Logs of the run before would be read as this one's.
        let _ = fs::remove_dir_all(&logs);
        fs::create_dir_all(&logs).with_context(|| logs.display().to_string())?;
        remove_leftovers();
        // Short, since it holds unix sockets: their paths end at 107 bytes.
        let scratch =
            tempfile::Builder::new().prefix(&format!("omega-lab-{}-", std::process::id())).tempdir()?;
        let inner = Arc::new(Inner {
            scratch,
            logs,
            image,
            slower,
            networks: Mutex::default(),
            pcs: Mutex::default(),
        });
        LABS.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::downgrade(&inner));
        end_labs_on_signals();
        Ok(Self { inner })
    }

    /// A network that PCs can be plugged into.
    pub fn network(&self, name: &str) -> Network {
        let mut networks = self.inner.networks.lock().unwrap_or_else(PoisonError::into_inner);
        let network =
            Network::new(name, u8::try_from(networks.len()).unwrap_or(u8::MAX), self.inner.scratch.path());
        networks.push(network.clone());
        network
    }

    /// A PC to be described and started.
    pub fn pc(&self, name: &str) -> PcBuilder {
        PcBuilder::new(Arc::clone(&self.inner), name)
    }

    /// Starts several PCs at once.
    pub fn start<const N: usize>(&self, pcs: [PcBuilder; N]) -> Result<[Arc<Pc>; N]> {
        let started: Vec<Result<Arc<Pc>>> = thread::scope(|scope| {
            let starting: Vec<_> = pcs.into_iter().map(|pc| scope.spawn(|| pc.start())).collect();
            starting
                .into_iter()
                .map(|t| t.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
                .collect()
        });
        let started: Vec<Arc<Pc>> = started.into_iter().collect::<Result<_>>()?;
        started.try_into().map_err(|_| anyhow::anyhow!("as many PCs as were asked for"))
    }

    /// Where consoles and commands of its PCs are logged.
    pub fn logs(&self) -> &Path {
        &self.inner.logs
    }
}

impl Inner {
    /// Registers a PC; returns its number, from 1.
    pub(crate) fn number(&self) -> u8 {
        static NEXT: Mutex<u8> = Mutex::new(1);
        let mut next = NEXT.lock().unwrap_or_else(PoisonError::into_inner);
        let number = *next;
        *next = next.checked_add(1).unwrap_or(1);
        number
    }

    pub(crate) fn register(&self, pc: &Arc<Pc>) {
        self.pcs.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::downgrade(pc));
    }

    fn shut_down(&self) {
        for pc in self.pcs.lock().unwrap_or_else(PoisonError::into_inner).iter().filter_map(Weak::upgrade) {
            pc.kill();
        }
        for network in self.networks.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            network.shut_down();
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.inner.shut_down();
    }
}

/// On Ctrl-C and its like: PCs die with this process by themselves, but the scratch folders would stay.
fn end_labs_on_signals() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
        let Ok(mut signals) = signal_hook::iterator::Signals::new([SIGINT, SIGTERM, SIGHUP]) else { return };
        thread::spawn(move || {
            if let Some(signal) = signals.forever().next() {
                for lab in
                    LABS.lock().unwrap_or_else(PoisonError::into_inner).iter().filter_map(Weak::upgrade)
                {
                    lab.shut_down();
                    let _ = fs::remove_dir_all(lab.scratch.path());
                }
                std::process::exit(128 + signal);
            }
        });
    });
}

/// Scratch folders of labs whose process was killed outright.
fn remove_leftovers() {
    let Ok(entries) = fs::read_dir(std::env::temp_dir()) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let owner =
            name.to_str().and_then(|n| n.strip_prefix("omega-lab-")).and_then(|rest| rest.split('-').next());
        if owner.is_some_and(|pid| pid.parse::<u32>().is_ok() && !Path::new("/proc").join(pid).exists()) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}
