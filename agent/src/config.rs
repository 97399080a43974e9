//! The shape of `agent.toml`.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use devices::disk::file::Direct;
use devices::disk::volume::MAX_NAME;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use vmm::config::Mistakes;
use vmm::config::toml_file::{self, Checker, KeyPath, beside};
use vmm::units::{Bytes, Span};

use crate::policy::matches;

/// Where the configuration is looked for.
pub const DEFAULT_PATH: &str = "/etc/omega/agent.toml";

/// Everything in `agent.toml`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Address and port to listen on.
    pub listen: String,
    /// Listen on a network although this PC has no identity: whoever reaches it may use every volume.
    pub insecure: bool,
    /// The folder of this PC's identity, which `omega-agent join` fills; by default `identity` in the state
    /// folder. With an identity every connection is mutual TLS, on loopback too.
    pub identity: Option<PathBuf>,
    /// Where to serve metrics for Prometheus, as `127.0.0.1:9742`; nowhere by default.
    pub metrics: Option<String>,
    /// The name that guests' logs show for this PC; its host name by default.
    pub name: Option<String>,
    /// Where leases are stored; by default systemd's state folder, or `/var/lib/omega-agent`.
    pub state: Option<PathBuf>,
    /// A lease that was not renewed for so long may be taken by another guest.
    pub lease_ttl: Span,
    /// How long a stop waits for requests in flight.
    pub stop_timeout: Span,
    /// Let peers move to RDMA, where this PC has it. RDMA payloads are not encrypted.
    pub rdma: bool,
    /// Bounds against peers that want too much.
    pub limits: Limits,
    /// How much memory is lent to guests on other PCs; none without it.
    pub memory: Option<Memory>,
    /// How many vCPUs are lent to guests on other PCs; none without it.
    pub cpu: Option<Cpu>,
    /// The volumes.
    pub volume: Vec<Volume>,
    /// Which nodes may use what. Without one, the household's consoles may use every volume.
    pub allow: Vec<Allow>,
}

/// Bounds against peers that want too much.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Connections at once.
    pub connections: usize,
    /// Requests in flight on one connection.
    pub requests: u32,
    /// Memory for the data of one connection's requests.
    pub memory: Bytes,
}

/// Memory that guests on other PCs may lease.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Memory {
    /// So much in all.
    pub size: Bytes,
    /// Lock what is stored into RAM, so that this PC never swaps it out.
    #[serde(default = "yes")]
    pub lock: bool,
    /// A lease that was not renewed for so long ends, and what is stored under it is gone. After `lease_ttl` it does
    /// so already if another guest needs the memory.
    #[serde(default = "ten_minutes")]
    pub keep: Span,
}

/// vCPUs that guests on other PCs may run here.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Cpu {
    /// So many in all.
    pub count: u32,
    /// The vCPUs and the memory of a guest whose console was not heard for so long are given up.
    #[serde(default = "ten_minutes")]
    pub keep: Span,
}

fn yes() -> bool {
    true
}

fn ten_minutes() -> Span {
    Span(Duration::from_secs(600))
}

/// A disk that guests may lease.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Volume {
    /// Its name: letters, digits, `-`, `_`, `.`.
    pub name: String,
    /// A raw image file or a block device.
    pub path: PathBuf,
    /// Refuse writes; then any number of guests may read it at once.
    #[serde(default)]
    pub read_only: bool,
    /// Whether I/O goes past this PC's page cache: `auto` does so for block devices.
    #[serde(default)]
    pub direct: DirectIo,
    /// Make a sparse file of this size if there is none.
    #[serde(default)]
    pub create: Option<Bytes>,
}

/// What some nodes may use. Their names are those of their certificates.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Allow {
    /// Which nodes: names, in which `*` stands for any characters of a console's. A node that is no console needs
    /// its whole name here.
    pub nodes: Vec<String>,
    /// Which volumes, in the same way.
    #[serde(default)]
    pub volumes: Vec<String>,
    /// What they may do with these volumes.
    #[serde(default)]
    pub access: Access,
    /// How much of the memory that is lent their guests may lease, each node by itself.
    #[serde(default)]
    pub memory: Option<Bytes>,
    /// How many vCPUs their guests may run here, those of each node together.
    #[serde(default)]
    pub vcpus: Option<u32>,
}

/// What may be done with a volume.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Access {
    /// Hold its lease and read it.
    #[default]
    Read,
    /// That, and write it.
    Write,
}

/// Whether I/O goes past the page cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum DirectIo {
    /// For block devices that allow it; image files are cached.
    #[default]
    Auto,
    /// Always, or the volume cannot be served.
    On,
    /// Never.
    Off,
}

impl From<DirectIo> for Direct {
    fn from(direct: DirectIo) -> Self {
        match direct {
            DirectIo::Auto => Self::Auto,
            DirectIo::On => Self::On,
            DirectIo::Off => Self::Off,
        }
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: "127.0.0.1:7420".to_owned(),
            insecure: false,
            identity: None,
            metrics: None,
            name: None,
            state: None,
            lease_ttl: Span(Duration::from_secs(15)),
            stop_timeout: Span(Duration::from_secs(10)),
            rdma: true,
            limits: Limits::default(),
            memory: None,
            cpu: None,
            volume: Vec::new(),
            allow: Vec::new(),
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self { connections: 256, requests: 256, memory: Bytes(16 << 20) }
    }
}

impl Config {
    /// Reads and checks `path`. Relative paths in it become relative to where it is.
    ///
    /// # Errors
    /// All mistakes at once, each with its line, column and key.
    pub fn load(path: &Path) -> Result<Self, Mistakes> {
        toml_file::load(path, check).map(|config: Self| config.rooted(path))
    }

    /// As [`Config::load`], of a text.
    ///
    /// # Errors
    /// All mistakes at once.
    pub fn parse(path: &Path, text: &str) -> Result<Self, Mistakes> {
        toml_file::parse(path, text, check).map(|config: Self| config.rooted(path))
    }

    fn rooted(mut self, path: &Path) -> Self {
        for volume in &mut self.volume {
            volume.path = beside(path, &volume.path);
        }
        self.state = self.state.map(|state| beside(path, &state));
        self.identity = self.identity.map(|identity| beside(path, &identity));
        self
    }

    /// The address to listen on. A configuration that was checked has one.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.listen.parse().unwrap_or(SocketAddr::from(([127, 0, 0, 1], 7420)))
    }

    /// The address to serve metrics on, if any.
    #[must_use]
    pub fn metrics_address(&self) -> Option<SocketAddr> {
        self.metrics.as_ref().and_then(|address| address.parse().ok())
    }

    /// The name for guests' logs.
    #[must_use]
    pub fn agent_name(&self) -> String {
        let host = || std::fs::read_to_string("/proc/sys/kernel/hostname").ok().map(|h| h.trim().to_owned());
        self.name.clone().or_else(host).unwrap_or_else(|| "omega-agent".to_owned())
    }

    /// Where leases are stored.
    #[must_use]
    pub fn state_folder(&self) -> PathBuf {
        let systemd = || std::env::var_os("STATE_DIRECTORY").map(PathBuf::from);
        self.state.clone().or_else(systemd).unwrap_or_else(|| PathBuf::from("/var/lib/omega-agent"))
    }

    /// Whether somebody said where the identity is: then there must be one.
    #[must_use]
    pub fn names_identity(&self) -> bool {
        self.identity.is_some() || std::env::var_os("OMEGA_IDENTITY").is_some_and(|path| !path.is_empty())
    }

    /// Where this PC's identity is, if it has one. Beside the leases, in the one folder that is the service's
    /// own whatever user it runs as, and that nobody else can look into.
    #[must_use]
    pub fn identity_folder(&self) -> PathBuf {
        let set = || std::env::var_os("OMEGA_IDENTITY").filter(|p| !p.is_empty()).map(PathBuf::from);
        self.identity.clone().or_else(set).unwrap_or_else(|| self.state_folder().join("identity"))
    }
}

fn check(config: &Config, checker: &mut Checker<'_>) {
    let root = KeyPath::root();
    if config.listen.parse::<SocketAddr>().is_err() {
        checker.wrong(
            &root.key("listen"),
            format!("`{}` is no address with a port; write for example `127.0.0.1:7420`", config.listen),
        );
    }
    if config.metrics.is_some() && config.metrics_address().is_none() {
        checker.wrong(
            &root.key("metrics"),
            "this is no address with a port; write for example `127.0.0.1:9742`",
        );
    }
    if config.lease_ttl.0 < Duration::from_secs(1) {
        checker.wrong(&root.key("lease_ttl"), "a lease lasts at least one second, `1s`");
    }
    let limits = root.key("limits");
    if config.limits.connections == 0 {
        checker.wrong(&limits.key("connections"), "with no connection nobody is served; write at least 1");
    }
    if !(1..=4096).contains(&config.limits.requests) {
        checker.wrong(&limits.key("requests"), "write a number between 1 and 4096");
    }
    if config.limits.memory.0 < 4 << 20 {
        checker.wrong(&limits.key("memory"), "a connection needs at least `4M`");
    }
    if let Some(memory) = &config.memory {
        check_memory(memory, config.lease_ttl, &root.key("memory"), checker);
    }
    if let Some(cpu) = &config.cpu {
        let key = root.key("cpu");
        if !(1..=1024).contains(&cpu.count) {
            checker
                .wrong(&key.key("count"), "write a number from 1 to 1024; leave the table out to lend none");
        }
        if cpu.keep.0 < config.lease_ttl.0 {
            let ttl = config.lease_ttl;
            checker.wrong(&key.key("keep"), format!("a lease lives at least as long as any other, {ttl}"));
        }
    }
    for (index, volume) in config.volume.iter().enumerate() {
        check_volume(volume, &config.volume[..index], &root.key("volume").index(index), checker);
    }
    for (index, allow) in config.allow.iter().enumerate() {
        check_allow(allow, &config.volume, &root.key("allow").index(index), checker);
    }
}

fn check_memory(memory: &Memory, ttl: Span, key: &KeyPath, checker: &mut Checker<'_>) {
    if memory.size.0 < 1 << 20 {
        checker.wrong(&key.key("size"), "less than `1M` helps no guest; leave the table out to lend none");
    }
    if !memory.size.0.is_multiple_of(4096) {
        checker.wrong(&key.key("size"), "memory is lent in pages: write a multiple of `4K`");
    }
    if memory.keep.0 < ttl.0 {
        let why = format!("a lease lives at least as long as it may go without being renewed, {ttl}");
        checker.wrong(&key.key("keep"), why);
    }
}

fn check_allow(allow: &Allow, volumes: &[Volume], key: &KeyPath, checker: &mut Checker<'_>) {
    let form = "write letters, digits, `-`, `_`, `.`, and `*` for any of them";
    let fits = |c: char| c.is_ascii_alphanumeric() || "-_.*".contains(c);
    for (patterns, name) in [(&allow.nodes, "nodes"), (&allow.volumes, "volumes")] {
        for (index, pattern) in patterns.iter().enumerate() {
            if pattern.is_empty() || pattern.len() > MAX_NAME || !pattern.chars().all(fits) {
                checker.wrong(&key.key(name).index(index), format!("`{pattern}` is no name; {form}"));
            }
        }
    }
    if allow.nodes.is_empty() {
        checker.wrong(&key.key("nodes"), "names nobody; write names, or `[\"*\"]` for every node");
    }
    for (index, pattern) in allow.volumes.iter().enumerate() {
        if !volumes.iter().any(|volume| matches(pattern, &volume.name)) {
            checker.wrong(&key.key("volumes").index(index), format!("there is no volume named `{pattern}`"));
        }
    }
    if allow.volumes.is_empty() && allow.memory.is_none() && allow.vcpus.is_none() {
        checker.wrong(key, "allows nothing; give `volumes`, `memory` or `vcpus`");
    }
    if allow.memory.is_some_and(|memory| memory.0 < 1 << 20) {
        checker.wrong(&key.key("memory"), "less than `1M` helps no guest; leave the key out to lend none");
    }
    if allow.vcpus == Some(0) {
        checker.wrong(&key.key("vcpus"), "write at least 1; leave the key out to lend none");
    }
}

fn check_volume(volume: &Volume, earlier: &[Volume], key: &KeyPath, checker: &mut Checker<'_>) {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if volume.name.is_empty() || volume.name.len() > MAX_NAME || !volume.name.chars().all(plain) {
        checker.wrong(&key.key("name"), "a name has 1 to 255 letters, digits, `-`, `_` or `.`");
    }
    if earlier.iter().any(|v| v.name == volume.name) {
        checker.wrong(&key.key("name"), format!("there is another volume named `{}`", volume.name));
    }
    if earlier.iter().any(|v| v.path == volume.path && !(v.read_only && volume.read_only)) {
        checker.wrong(&key.key("path"), "another volume has this path, and one of them is written");
    }
    if let Some(size) = volume.create {
        if size.0 == 0 || size.0 % 512 != 0 {
            checker.wrong(&key.key("create"), "a disk's size is a multiple of 512 bytes, and not zero");
        }
        if volume.read_only {
            checker.wrong(&key.key("create"), "a new volume that is read-only would stay empty");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mistakes(text: &str) -> String {
        Config::parse(Path::new("/etc/omega/agent.toml"), text).expect_err("there is a mistake").to_string()
    }

    #[test]
    fn the_sample_configuration_is_valid() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging/agent.toml");
        let config = Config::load(&path).unwrap_or_else(|e| panic!("{e}"));
        assert!(config.address().ip().is_loopback());
    }

    #[test]
    fn the_sample_guest_is_valid() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging/guest.toml");
        let guest = vmm::config::Guest::load(&path).unwrap_or_else(|e| panic!("{e}"));
        assert!(guest.disk[0].remote.is_some());
    }

    #[test]
    fn an_empty_configuration_listens_on_loopback_only() {
        let config = Config::parse(Path::new("a.toml"), "").expect("valid");
        assert_eq!(config, Config::default());
        assert_eq!(config.address().to_string(), "127.0.0.1:7420");
    }

    #[test]
    fn paths_are_relative_to_the_file() {
        let text = "[[volume]]\nname = 'a'\npath = 'a.img'";
        let config = Config::parse(Path::new("/etc/omega/agent.toml"), text).expect("valid");
        assert_eq!(config.volume[0].path, Path::new("/etc/omega/a.img"));
    }

    #[test]
    fn a_table_of_what_nodes_may_use_names_nodes_and_volumes_that_there_are() {
        let volumes = "[[volume]]\nname = 'root'\npath = '/a'\n";
        let good = "[[allow]]\nnodes = ['desk', 'lap-*']\nvolumes = ['r*']\naccess = 'write'\nmemory = '8G'\nvcpus = 4\n";
        let config = Config::parse(Path::new("a"), &format!("{volumes}{good}")).expect("valid");
        let expected = Allow {
            nodes: vec!["desk".into(), "lap-*".into()],
            volumes: vec!["r*".into()],
            access: Access::Write,
            memory: Some(Bytes(8 << 30)),
            vcpus: Some(4),
        };
        assert_eq!(config.allow, [expected]);
        let read =
            Config::parse(Path::new("a"), &format!("{volumes}[[allow]]\nnodes = ['*']\nvolumes = ['*']"));
        assert_eq!(
            read.expect("valid").allow[0].access,
            Access::Read,
            "who does not say `write` means reading"
        );
        for (text, line, what) in [
            ("[[allow]]\nvolumes = ['root']\n", 4, "nodes"),
            ("[[allow]]\nnodes = []\nvolumes = ['root']\n", 5, "names nobody"),
            ("[[allow]]\nnodes = ['*']\n", 4, "allows nothing"),
            ("[[allow]]\nnodes = ['*']\nvolumes = ['roof']\n", 6, "no volume named `roof`"),
            ("[[allow]]\nnodes = ['a b']\nvolumes = ['*']\n", 5, "`a b` is no name"),
            ("[[allow]]\nnodes = ['*']\nvcpus = 0\n", 6, "at least 1"),
            ("[[allow]]\nnodes = ['*']\nmemory = '4K'\n", 6, "1M"),
            ("[[allow]]\nnodes = ['*']\nvolumes = ['*']\naccess = 'all'\n", 7, "`read`"),
        ] {
            let text = mistakes(&format!("{volumes}{text}"));
            assert!(text.contains(what) && text.contains(&format!("agent.toml:{line}:")), "{text}");
        }
    }

    #[test]
    fn memory_is_lent_as_a_table_says_and_a_table_says_how_much() {
        let config = Config::parse(Path::new("a"), "[memory]\nsize = '24G'").expect("valid");
        let expected = Memory { size: Bytes(24 << 30), lock: true, keep: Span(Duration::from_secs(600)) };
        assert_eq!(config.memory, Some(expected));
        let config = Config::parse(Path::new("a"), "[memory]\nsize = '1M'\nlock = false\nkeep = '15s'");
        assert!(!config.expect("valid").memory.expect("a table").lock);
        for (text, what) in [
            ("[memory]\nlock = true\n", "size"),
            ("[memory]\nsize = '4K'\n", "1M"),
            ("[memory]\nsize = '2000000'\n", "4K"),
            ("[memory]\nsize = '1G'\nkeep = '14s'\n", "15s"),
            ("[memory]\nsize = '1G'\nkepe = '20s'\n", "`keep`"),
        ] {
            let text = mistakes(text);
            assert!(text.contains(what), "{text}");
        }
    }

    #[test]
    fn vcpus_are_lent_as_a_table_says() {
        let config = Config::parse(Path::new("a"), "[cpu]\ncount = 2").expect("valid");
        assert_eq!(config.cpu, Some(Cpu { count: 2, keep: Span(Duration::from_secs(600)) }));
        for (text, what) in [
            ("[cpu]\ncount = 0\n", "from 1 to 1024"),
            ("[cpu]\n", "count"),
            ("[cpu]\ncount = 1\nkeep = '1s'\n", "15s"),
        ] {
            assert!(mistakes(text).contains(what), "{text}");
        }
    }

    #[test]
    fn the_identity_is_beside_the_leases_unless_said_otherwise() {
        let config = Config { state: Some("/s".into()), ..Config::default() };
        assert_eq!(config.identity_folder(), Path::new("/s/identity"));
        let config = Config::parse(Path::new("/etc/omega/agent.toml"), "identity = 'id'").expect("valid");
        assert_eq!(config.identity_folder(), Path::new("/etc/omega/id"));
    }

    #[test]
    fn mistakes_name_their_line_their_key_and_the_nearest_name() {
        let text = mistakes("[[volume]]\nname = 'a'\npath = '/a'\nread_onyl = true\n");
        assert!(text.contains("agent.toml:4:1") && text.contains("read_only"), "{text}");
        let twice = "[[volume]]\nname = 'a'\npath = '/a'\n[[volume]]\nname = 'a'\npath = '/a'\n";
        let text = mistakes(twice);
        assert!(text.contains("agent.toml:5:") && text.contains("agent.toml:6:"), "{text}");
        assert!(mistakes("metrics = '9742'").contains("127.0.0.1:9742"));
        assert!(mistakes("listen = 'pc2'").contains("127.0.0.1:7420"));
        assert!(mistakes("[[volume]]\nname = 'a b'\npath = '/a'").contains("letters"));
        assert!(mistakes("[[volume]]\nname = 'a'\npath = '/a'\ncreate = '100'").contains("512"));
    }
}
