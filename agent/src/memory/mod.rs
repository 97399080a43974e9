//! Memory that this PC lends to guests on others.
//!
//! A guest takes a *lease*: so many pages of its RAM may be stored here at a time. Each lease has a file in RAM of its
//! own, so that its content can never be another's, and is gone with it. Drawn in `docs/memory-protocol.md`; what an
//! administrator sees is in `docs/agent.md`.

mod handover;
mod lender;
mod loan;
mod mapping;
mod record;
mod serving;
mod store;
mod usage;

use std::io;
use std::time::Duration;

use devices::disk::volume::Refusal;
use nix::sys::resource::{Resource, getrlimit};
use sysinfo::System;
use transport::wire::{Body, Status};
use vmm::memory::store::protocol::{self, Absent, status};
use vmm::units::Bytes;

use crate::Error;
use crate::config::Config;

pub(crate) use lender::{Lender, Sight};
pub(crate) use serving::{Client, Serving};

/// The bytes of a page.
const PAGE: u64 = protocol::PAGE as u64;

/// Why something about memory is not done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    /// Not so much is lent.
    NoMemory {
        /// When some may be free; zero if there is no telling.
        wait: Duration,
        why: String,
    },
    /// The lease is over.
    Gone(String),
    /// This page is not stored.
    Absent(u64),
    /// The lease's quota is used up.
    Full(String),
    /// No such pages.
    OutOfRange(String),
    /// Policy.
    Forbidden(String),
    /// The agent's own limits.
    Busy(&'static str),
    /// Unknown flags.
    Unsupported,
    /// The kernel refused.
    Failed { errno: i32, why: String },
    /// The session has not opened the lease.
    NotOpen,
    /// The request makes no sense.
    Malformed(String),
}

/// After so long a request that is refused for the agent's limits may be sent again.
const AGAIN: Duration = Duration::from_millis(20);

impl From<crate::lease::Refused> for Refused {
    /// Of making an epoch.
    fn from(refused: crate::lease::Refused) -> Self {
        Self::Failed { errno: 0, why: format!("no epoch: {refused:?}") }
    }
}

impl Refused {
    fn failed(what: &str, error: &io::Error) -> Self {
        Self::Failed { errno: error.raw_os_error().unwrap_or(0), why: format!("{what}: {error}") }
    }

    /// As an answer: status and body.
    fn answer(self) -> (Status, Body) {
        let because = |status, why: String| (status, Refusal::because(why).encode());
        match self {
            Self::NoMemory { wait, why } => {
                (status::NO_MEMORY, Refusal { errno: 0, wait, text: why }.encode())
            }
            Self::Gone(why) => because(status::GONE, why),
            Self::Absent(page) => (status::ABSENT, Absent { page }.encode()),
            Self::Full(why) => because(status::FULL, why),
            Self::OutOfRange(why) => because(status::OUT_OF_RANGE, why),
            Self::Forbidden(why) => because(status::FORBIDDEN, why),
            Self::Busy(why) => {
                (status::BUSY, Refusal { errno: 0, wait: AGAIN, text: why.to_owned() }.encode())
            }
            Self::Unsupported => {
                because(status::UNSUPPORTED, "the agent knows none of these flags".to_owned())
            }
            Self::Failed { errno, why } => {
                (status::FAILED, Refusal { errno, wait: Duration::ZERO, text: why }.encode())
            }
            Self::NotOpen => because(status::NOT_OPEN, "this session has not opened the lease".to_owned()),
            Self::Malformed(why) => because(Status::MALFORMED, why),
        }
    }
}

/// Whether memory can be lent as `config` says. Returns what an administrator should know, a line each.
///
/// # Errors
/// What is stored could not be locked into RAM.
pub(crate) fn check(config: &Config) -> Result<Vec<String>, Error> {
    let Some(memory) = &config.memory else { return Ok(Vec::new()) };
    let mut warnings = Vec::new();
    let size = memory.size;
    if memory.lock && !may_lock_anything() {
        let limit = getrlimit(Resource::RLIMIT_MEMLOCK).map_or(u64::MAX, |(soft, _)| soft);
        if limit < size.0 {
            let limit = Bytes(limit);
            return Err(Error::Memory(format!(
                "Cannot lock {size} of lent memory: this process may lock {limit} (RLIMIT_MEMLOCK); set \
                 `LimitMEMLOCK=infinity` in its unit, or write `lock = false` under `[memory]`"
            )));
        }
    }
    let total = System::new().ok().map(|mut system| {
        system.refresh_memory();
        system.total_memory()
    });
    if let Some(total) = total.filter(|total| *total < size.0.saturating_add(size.0 / 16)) {
        let mib = total >> 20;
        let why =
            format!("`[memory]` lends {size}, and this PC has {mib} MiB in all: write a smaller `size`");
        if memory.lock {
            return Err(Error::Memory(why));
        }
        warnings.push(why);
    }
    Ok(warnings)
}

/// Whether no limit counts for what this process locks.
fn may_lock_anything() -> bool {
    const IPC_LOCK: u32 = 14;
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let bits = effective.and_then(|text| u64::from_str_radix(text.trim(), 16).ok());
    bits.is_some_and(|bits| bits & 1 << IPC_LOCK != 0)
}
