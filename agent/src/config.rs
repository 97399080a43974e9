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

/// Where the configuration is looked for.
pub const DEFAULT_PATH: &str = "/etc/omega/agent.toml";

/// Everything in `agent.toml`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Address and port to listen on.
    pub listen: String,
    /// Listen on a network although connections are neither encrypted nor authenticated yet.
    pub insecure: bool,
    /// The name that guests' logs show for this PC; its host name by default.
    pub name: Option<String>,
    /// Where leases are stored; by default systemd's state folder, or `/var/lib/omega-agent`.
    pub state: Option<PathBuf>,
    /// A lease that was not renewed for so long may be taken by another guest.
    pub lease_ttl: Span,
    /// How long a stop waits for requests in flight.
    pub stop_timeout: Span,
    /// Bounds against peers that want too much.
    pub limits: Limits,
    /// The volumes.
    pub volume: Vec<Volume>,
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
            name: None,
            state: None,
            lease_ttl: Span(Duration::from_secs(15)),
            stop_timeout: Span(Duration::from_secs(10)),
            limits: Limits::default(),
            volume: Vec::new(),
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self { connections: 64, requests: 256, memory: Bytes(16 << 20) }
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
        self
    }

    /// The address to listen on. A configuration that was checked has one.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.listen.parse().unwrap_or(SocketAddr::from(([127, 0, 0, 1], 7420)))
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
}

fn check(config: &Config, checker: &mut Checker<'_>) {
    let root = KeyPath::root();
    match config.listen.parse::<SocketAddr>() {
        Err(_) => checker.wrong(
            &root.key("listen"),
            format!("`{}` is no address with a port; write for example `127.0.0.1:7420`", config.listen),
        ),
        Ok(address) if !address.ip().is_loopback() && !config.insecure => checker.wrong(
            &root.key("listen"),
            "connections are neither encrypted nor authenticated yet, so whoever reaches this address can read \
             and write the volumes; listen on 127.0.0.1, or write `insecure = true` on a network that you trust",
        ),
        Ok(_) => {}
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
    for (index, volume) in config.volume.iter().enumerate() {
        check_volume(volume, &config.volume[..index], &root.key("volume").index(index), checker);
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
    fn a_network_address_needs_a_word_that_it_is_insecure() {
        let text = mistakes("listen = '0.0.0.0:7420'");
        assert!(text.contains("agent.toml:1:") && text.contains("key `listen`"), "{text}");
        assert!(Config::parse(Path::new("a"), "listen = '0.0.0.0:7420'\ninsecure = true").is_ok());
    }

    #[test]
    fn mistakes_name_their_line_their_key_and_the_nearest_name() {
        let text = mistakes("[[volume]]\nname = 'a'\npath = '/a'\nread_onyl = true\n");
        assert!(text.contains("agent.toml:4:1") && text.contains("read_only"), "{text}");
        let twice = "[[volume]]\nname = 'a'\npath = '/a'\n[[volume]]\nname = 'a'\npath = '/a'\n";
        let text = mistakes(twice);
        assert!(text.contains("agent.toml:5:") && text.contains("agent.toml:6:"), "{text}");
        assert!(mistakes("listen = 'pc2'").contains("127.0.0.1:7420"));
        assert!(mistakes("[[volume]]\nname = 'a b'\npath = '/a'").contains("letters"));
        assert!(mistakes("[[volume]]\nname = 'a'\npath = '/a'\ncreate = '100'").contains("512"));
    }
}
