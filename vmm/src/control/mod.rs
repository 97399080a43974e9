//! What may be asked of a running guest from outside, and the socket that carries it. `docs/control.md`
//! describes the protocol.

pub mod client;
pub mod protocol;
mod server;
pub(crate) mod socket;

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::memory::store::Compression;
use crate::memory::{coherence, fault};
use crate::units::Bytes;

pub use client::Client;
pub use server::{Resize, Server};

/// A running machine, as whoever controls it sees it. Every call may come from any thread and several at
/// once; one that waits (pause, save) must not hold up [`Controlled::status`], [`Controlled::counters`]
/// or [`Controlled::kill`].
pub trait Controlled: Send + Sync {
    /// What the machine is and does. Answers at once in every state.
    fn status(&self) -> Status;

    /// Stops all vCPUs together and drains the devices; returns when nothing touches guest memory any
    /// more. Of a guest that is paused already: does nothing.
    ///
    /// # Errors
    /// [`Error::NotNow`] while it starts or ends; [`Error::Failed`] when a device cannot be drained: then
    /// the guest runs on.
    fn pause(&self) -> Result<(), Error>;

    /// Lets devices and vCPUs go on. Of a guest that runs already: does nothing.
    ///
    /// # Errors
    /// [`Error::NotNow`] while it starts or ends; [`Error::Failed`] when a device cannot go on.
    fn resume(&self) -> Result<(), Error>;

    /// Presses the ACPI power button. The guest decides what follows; returns at once.
    ///
    /// # Errors
    /// [`Error::NotNow`] while the guest cannot notice it (starting, paused, ending).
    fn power_off(&self) -> Result<(), Error>;

    /// Ends the guest without asking it, in any state, as pulling the plug would. Returns at once;
    /// `Machine::run` then returns its exit.
    fn kill(&self);

    /// What was counted since the start. Answers at once in every state.
    fn counters(&self) -> Counters;

    /// What was counted with the peers of its devices. Answers at once in every state.
    fn peers(&self) -> Peers;

    /// Where the guest's memory is, and what its fault handlers counted. Answers at once in every state.
    ///
    /// # Errors
    /// [`Error::Unsupported`] of a guest whose memory is all on this PC.
    fn memory(&self) -> Result<MemoryStatus, Error>;

    /// What it cost the vCPUs of this PC to share memory with those of others. Answers at once in every state.
    ///
    /// # Errors
    /// [`Error::Unsupported`] of a guest whose vCPUs are all here for good.
    fn coherence(&self) -> Result<coherence::Counters, Error>;

    /// How the helpers are that lend the guest memory. Answers at once in every state.
    ///
    /// # Errors
    /// [`Error::Unsupported`] of a guest whose memory is all on this PC.
    fn helpers(&self) -> Result<Vec<HelperStatus>, Error>;

    /// Has everything moved away from `helper` (its agent as it is configured, its host, or its node) while the guest
    /// runs; then its memory is given back. Returns its name among [`Controlled::helpers`] at once; those say how far
    /// that is.
    ///
    /// # Errors
    /// [`Error::Unsupported`] of a guest whose memory is all on this PC; [`Error::Failed`] without such a helper.
    fn drain_helper(&self, helper: &str) -> Result<String, Error>;

    /// Takes memory of another helper while the guest runs: what lacks a copy gets one there, and what has to leave
    /// another. Returns when it has given it.
    ///
    /// # Errors
    /// [`Error::Unsupported`] of a guest whose memory is all on this PC; [`Error::Failed`] if the helper lends none, with
    /// one line that says why.
    fn add_helper(&self, helper: &crate::config::Helper) -> Result<(), Error>;

    /// Moves the vCPU `vcpu` to the PC `node` (as in [`Status::places`]); the guest stands still meanwhile. Does nothing if
    /// it is there.
    ///
    /// # Errors
    /// [`Error::Unsupported`] of a guest whose vCPUs are all here for good; [`Error::Failed`] if it cannot be there: it is
    /// where it was.
    fn move_vcpu(&self, vcpu: u8, node: &str) -> Result<(), Error>;

    /// Moves all vCPUs of the PC `node` to others of the guest's. Returns how many.
    ///
    /// # Errors
    /// As [`Controlled::move_vcpu`].
    fn drain_vcpus(&self, node: &str) -> Result<usize, Error>;

    /// Asks the guest to give up `target` bytes of its RAM through the balloon. Returns at once.
    ///
    /// # Errors
    /// [`Error::Unsupported`] without a balloon; [`Error::Failed`] when `target` is more than its RAM.
    fn set_balloon(&self, target: Bytes) -> Result<(), Error>;

    /// The state of vCPUs and devices as a value, without RAM. Only while paused.
    ///
    /// # Errors
    /// [`Error::NotNow`] unless paused; [`Error::Failed`] when a device cannot save.
    fn save_state(&self) -> Result<serde_json::Value, Error>;
}

/// What was counted: group (`vcpu0`, `disk0`, `net0`, `vmm`) → counter (`exits`, `read_bytes`) → value.
/// Values only grow while the machine lives.
pub type Counters = BTreeMap<String, BTreeMap<String, u64>>;

/// What was counted with each device's peer: device (`disk0`) → its numbers, of which those that are no gauges
/// only grow while the machine lives.
pub type Peers = BTreeMap<String, transport::metrics::Snapshot>;

/// Where a machine is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// It is being built; no guest instruction has run.
    Starting,
    /// Its vCPUs run.
    Running,
    /// Its vCPUs stand still and its devices are drained.
    Paused,
    /// It is ending.
    Ending,
}

/// What a machine is and does.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// The guest's name.
    pub name: String,
    /// The process that runs it.
    pub pid: u32,
    /// Where it is in its life.
    pub state: State,
    /// Its vCPUs.
    pub vcpus: u8,
    /// Its RAM.
    pub memory: Bytes,
    /// What the balloon was asked to take of it; none without a balloon.
    #[serde(default)]
    pub balloon: Option<Bytes>,
    /// Milliseconds since the start.
    pub uptime_ms: u64,
    /// How often the guest was reset.
    pub resets: u64,
    /// The helper that the guest stands still for, without having been asked to; none of a guest that does not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waits_for: Option<Waiting>,
    /// Which PCs run its vCPUs; nothing of a guest all of whose vCPUs are here for good.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub places: Vec<VcpuPlace>,
    /// Its devices, in the order in which the guest sees them.
    #[serde(default)]
    pub devices: Vec<DeviceStatus>,
}

/// A PC that may run vCPUs of a guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuPlace {
    /// What it is called in the configuration; `console` is the PC that runs the guest's devices.
    pub node: String,
    /// The vCPUs that it runs now.
    pub vcpus: Vec<u8>,
    /// How many it may run; none: any number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub room: Option<u8>,
    /// How well its time stamp counter is known; none of the console, whose it is measured against.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clock: Option<ClockStatus>,
}

/// How well a PC's time stamp counter is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClockStatus {
    /// How far it may be off, if the shortest ways there and back are equally long.
    pub error_ns: u64,
    /// The shortest time that anything takes there.
    pub latency_ns: u64,
    /// Nothing arrives there, by the guest's clock, before it was sent.
    pub in_order: bool,
}

/// Why a guest stands still: it needs memory that is on a PC which is away. It goes on by itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Waiting {
    /// The agent that is away, as in the configuration.
    pub helper: String,
    /// Why, for people.
    pub why: String,
    /// Milliseconds since something waits for it.
    pub for_ms: u64,
}

/// The memory of a guest that has some of it on other PCs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryStatus {
    /// What its fault handlers counted, all together.
    pub counters: fault::Counters,
    /// Pieces with fewer copies than the policy asks for.
    pub degraded_pieces: u64,
    /// The PCs that lend it, in the order in which counters and peers number them: `helper0` and so on.
    pub helpers: Vec<HelperStatus>,
}

/// A PC that lends a guest memory, or the local file that keeps a copy of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HelperStatus {
    /// The agent, as in the configuration; the file's path.
    pub name: String,
    /// How the agent calls itself; empty before it was met.
    pub node: String,
    /// `here`, `away` or `left`.
    pub standing: String,
    /// Why it is away or has left, for people.
    pub why: Option<String>,
    /// It is being emptied.
    pub draining: bool,
    /// Pages of 4 KiB that it keeps now.
    pub pages: u64,
    /// Pages that were read from it.
    pub fetched: u64,
    /// Pages that were written to it.
    pub stored: u64,
    /// Of these, copies of what another helper had.
    pub copied: u64,
    /// Pages whose copies here were lost with it.
    pub lost: u64,
    /// Pieces of the guest's memory that have their place here.
    pub pieces: u64,
    /// Pieces that there is room for.
    pub room: u64,
    /// Pieces that are still to move away.
    pub leaving: u64,
    /// What compressing its pages on their way came to.
    #[serde(default)]
    pub compression: Compression,
}

/// One device of a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceStatus {
    /// What it is called in messages and counters: `disk0`, `net0`, `serial`.
    pub name: String,
    /// Its kind, as in its state: `virtio-blk`.
    pub kind: String,
    /// One line for people: what stands behind it and how it does.
    pub about: String,
}

/// A control call was refused or failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[serde(tag = "kind", content = "message", rename_all = "kebab-case")]
pub enum Error {
    /// The machine is in a state in which this cannot be done.
    #[error("Not now: {0}")]
    NotNow(String),
    /// The machine lacks what this needs.
    #[error("Not possible: {0}")]
    Unsupported(String),
    /// It was tried and failed.
    #[error("{0}")]
    Failed(String),
    /// The request cannot be understood.
    #[error("Invalid request: {0}")]
    Invalid(String),
    /// The guest serves as many control connections as it can.
    #[error("Busy: {0}")]
    Busy(String),
}
