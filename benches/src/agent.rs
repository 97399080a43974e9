//! A real agent, as its own process.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::bench::Bench;
use crate::peer::{answers, free_port};

/// An agent that serves one volume, `bench`, read-only, or lends memory. Dropping it ends its process.
pub struct Agent {
    child: Child,
    address: String,
    log: std::path::PathBuf,
}

impl Agent {
    /// Serves `volume` on a free port of loopback; `direct` goes past the page cache.
    ///
    /// # Errors
    /// The agent is not built or does not come up.
    pub fn start(bench: &Bench, volume: &Path, direct: bool) -> Result<Self> {
        let text = format!(
            "[[volume]]\nname = 'bench'\npath = '{}'\nread_only = true\ndirect = '{}'\n",
            volume.display(),
            if direct { "on" } else { "off" },
        );
        Self::with(bench, &text)
    }

    /// Lends `size` bytes of memory on a free port of loopback; `identity` is the folder of its identity.
    ///
    /// # Errors
    /// The agent is not built or does not come up.
    pub fn lend(bench: &Bench, size: u64, identity: Option<&Path>) -> Result<Self> {
        let identity = identity.map(|folder| format!("identity = '{}'\n", folder.display()));
        let text = format!("{}[memory]\nsize = '{size}'\nlock = false\n", identity.unwrap_or_default());
        Self::with(bench, &text)
    }

    fn with(bench: &Bench, rest: &str) -> Result<Self> {
        let port = free_port()?;
        let address = format!("127.0.0.1:{port}");
        let folder = tempfile::tempdir_in(bench.directory())?.keep();
        let (config, log) = (folder.join("agent.toml"), folder.join("agent.log"));
        let text = format!("listen = '{address}'\nstate = '{}'\n{rest}", folder.join("state").display());
        std::fs::write(&config, text)?;
        let child = Command::new(bench.program("omega-agent")?)
            .arg("--config")
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(&log)?)
            .spawn()
            .context("omega-agent cannot be started")?;
        let mut agent = Self { child, address, log };
        let deadline = Instant::now() + Duration::from_secs(10);
        while !answers(port) {
            let ended = agent.child.try_wait()?.is_some();
            if ended || Instant::now() > deadline {
                bail!("omega-agent does not come up: {}", std::fs::read_to_string(&agent.log)?.trim());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(agent)
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
