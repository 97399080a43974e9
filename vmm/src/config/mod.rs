//! A guest's configuration: the shape of `guest.toml`.

mod cpu;
mod memory;
#[cfg(test)]
mod mistakes_test;
mod peer;
mod shape;
pub mod toml_file;
mod validate;

use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::units::{Bytes, Span};

pub use cpu::{CONSOLE, Cpu, InterruptControllers, MOST_CPUS, Place, Placement};
pub use memory::{Compress, Helper, Memory, NumaNode, OnLoss};
pub use peer::Peer;
pub use toml_file::{Mistake, Mistakes};
pub use validate::{LONGEST_CMDLINE, LONGEST_SERIAL, MOST_DEVICES, name_mistake, parse_mac};

/// A guest: everything in `guest.toml`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Guest {
    /// The name under which `omega ps`, `omega console` and `omega stop` know it: letters, digits, `-`, `_`, `.`.
    pub name: String,
    /// What to boot.
    pub kernel: Kernel,
    /// Its processors.
    #[serde(default)]
    pub cpu: Cpu,
    /// Its RAM.
    #[serde(default)]
    pub memory: Memory,
    /// Its disks, in the order in which the guest sees them (`/dev/vda`, `/dev/vdb`, …).
    #[serde(default)]
    pub disk: Vec<Disk>,
    /// Its network cards.
    #[serde(default)]
    pub net: Vec<Net>,
    /// Where its serial port is connected.
    #[serde(default)]
    pub serial: Serial,
    /// A virtio console beside the serial port.
    #[serde(default)]
    pub console: Option<Console>,
    /// An entropy device.
    #[serde(default)]
    pub rng: Rng,
    /// A memory balloon.
    #[serde(default)]
    pub balloon: Option<Balloon>,
    /// What ends or restarts it.
    #[serde(default)]
    pub on: On,
}

impl Guest {
    /// Reads and checks `path`. Relative paths in it become relative to where it is. The files that it
    /// names are not looked at.
    ///
    /// # Errors
    /// All mistakes at once, each with its line, column and key.
    pub fn load(path: &Path) -> Result<Self, Mistakes> {
        toml_file::load(path, validate::check).map(|guest: Self| guest.rooted(path))
    }

    /// As [`Guest::load`], and reports files that are named but cannot be read as mistakes.
    ///
    /// # Errors
    /// All mistakes at once, each with its line, column and key.
    pub fn load_with_files(path: &Path) -> Result<Self, Mistakes> {
        let check = |guest: &Self, checker: &mut toml_file::Checker<'_>| {
            validate::check(guest, checker);
            validate::check_files(guest, path, checker);
        };
        toml_file::load(path, check).map(|guest: Self| guest.rooted(path))
    }

    /// As [`Guest::load`], of a text; `path` stands in messages and is what relative paths start from.
    ///
    /// # Errors
    /// All mistakes at once, each with its line, column and key.
    pub fn parse(path: &Path, text: &str) -> Result<Self, Mistakes> {
        toml_file::parse(path, text, validate::check).map(|guest: Self| guest.rooted(path))
    }

    /// Checks a guest that was changed after it was read; `from` says by what, in messages.
    ///
    /// # Errors
    /// All mistakes at once, each with its key.
    pub fn check(&self, from: &str) -> Result<(), Mistakes> {
        toml_file::validate(Path::new(from), |checker| validate::check(self, checker))
    }

    fn rooted(mut self, config: &Path) -> Self {
        let root = |path: &mut PathBuf| *path = toml_file::beside(config, path);
        root(&mut self.kernel.image);
        self.kernel.initrd.as_mut().map(root);
        self.disk.iter_mut().filter_map(|disk| disk.path.as_mut()).for_each(root);
        self.memory.swap_file.as_mut().map(root);
        if let Serial::File(path) = &mut self.serial {
            root(path);
        }
        self
    }
}

/// What to boot.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Kernel {
    /// A bzImage (a distribution's `vmlinuz`) or an ELF kernel with a PVH entry (`vmlinux`).
    pub image: PathBuf,
    /// The initial RAM disk.
    #[serde(default)]
    pub initrd: Option<PathBuf>,
    /// The kernel's command line.
    #[serde(default)]
    pub cmdline: String,
}

/// A disk: either `path` or `remote` is given.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// A raw image or block device on this PC.
    #[serde(default)]
    pub path: Option<PathBuf>,
    /// A volume on another PC.
    #[serde(default)]
    pub remote: Option<RemoteDisk>,
    /// The serial number that the guest reads, at most 20 bytes.
    #[serde(default)]
    pub serial: Option<String>,
    /// Whether the guest may only read.
    #[serde(default)]
    pub read_only: bool,
    /// How many request queues, 1 to 16; by default one for each vCPU, at most 4.
    #[serde(default)]
    #[schemars(range(min = 1, max = 16))]
    pub queues: Option<u16>,
    /// Bypass this PC's page cache (`O_DIRECT`) for a local disk.
    #[serde(default)]
    pub direct: bool,
}

/// A volume that an agent serves.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RemoteDisk {
    /// The agent, `host` or `host:port`; the port is 7420 by default.
    pub agent: String,
    /// The volume's name on that agent.
    pub volume: String,
    /// The name in the agent's certificate. By default `agent`, if that is a host's name without dots; an address
    /// may belong to any agent of the household.
    #[serde(default)]
    pub node: Option<String>,
    /// Speak plain TCP, neither encrypted nor authenticated, with an agent that has no identity.
    #[serde(default)]
    pub insecure: bool,
    /// What may carry the connection. RDMA does not encrypt what it carries.
    #[serde(default)]
    pub transport: Transport,
    /// Nothing of this disk may cross the network unencrypted: no RDMA, no plain TCP.
    #[serde(default)]
    pub require_encryption: bool,
    /// How long the guest's requests wait for an agent that cannot be reached; for ever by default.
    #[serde(default)]
    pub patience: Option<Span>,
    /// What happens then.
    #[serde(default)]
    pub on_timeout: OnTimeout,
}

/// What may carry the connection to an agent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Transport {
    /// RDMA where both PCs have it, else TCP.
    #[default]
    Auto,
    /// RDMA; TCP stands in while it cannot be had, and the log says why.
    Rdma,
    /// TCP.
    Tcp,
}

/// What a guest's request meets when the agent was away for longer than its patience.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum OnTimeout {
    /// It waits on; only the log says so.
    #[default]
    Wait,
    /// An I/O error.
    Error,
}

/// A network card.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Net {
    /// The TAP interface on this PC; it must exist and belong to the user, or be creatable.
    pub tap: String,
    /// Its MAC address; derived from the guest's name by default.
    #[serde(default)]
    pub mac: Option<String>,
    /// How many pairs of queues, 1 to 16; 1 by default.
    #[serde(default)]
    #[schemars(range(min = 1, max = 16))]
    pub queues: Option<u16>,
}

/// Where the serial port is connected.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Serial {
    /// The terminal that `omega run` was started in (and `omega console`).
    #[default]
    Terminal,
    /// `omega console` only.
    Console,
    /// A file that output is appended to.
    File(PathBuf),
    /// Nowhere.
    Off,
}

/// A virtio console, reached by `omega console --virtio`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Console {}

/// The entropy device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Rng {
    /// Whether there is one.
    pub enabled: bool,
}

impl Default for Rng {
    fn default() -> Self {
        Self { enabled: true }
    }
}

/// The balloon.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Balloon {
    /// How much RAM the guest is asked to give up at the start.
    pub size: Bytes,
    /// Pages that the guest frees go back to this PC.
    pub free_page_reporting: bool,
}

/// What the guest's own acts do.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct On {
    /// The guest restarts itself.
    pub reboot: OnReboot,
    /// The guest's kernel panics.
    pub panic: OnPanic,
}

/// What a reboot of the guest does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum OnReboot {
    /// The guest starts again.
    #[default]
    Restart,
    /// `omega run` ends.
    Exit,
}

/// What a panic of the guest does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum OnPanic {
    /// `omega run` ends with its own exit code.
    #[default]
    Exit,
    /// The guest starts again.
    Restart,
}
