//! NBD servers with `qemu-img bench` as their client.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::{answers, free_port};

/// Which server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Server {
    /// QEMU's.
    QemuNbd,
    /// nbdkit with its file plugin.
    Nbdkit,
}

/// A server of one file. Dropping it ends its process.
pub struct Nbd {
    child: Child,
    port: u16,
}

impl Nbd {
    /// Serves `file`, read-only, through the page cache (both servers' default).
    ///
    /// # Errors
    /// The program is missing or does not come up.
    pub fn start(server: Server, file: &Path) -> Result<Self> {
        let port = free_port()?;
        let mut command = match server {
            Server::QemuNbd => Command::new("qemu-nbd"),
            Server::Nbdkit => Command::new("nbdkit"),
        };
        match server {
            Server::QemuNbd => command
                .args(["--format=raw", "--persistent", "--read-only", "--shared=4", "--bind=127.0.0.1"])
                .arg(format!("--port={port}"))
                .arg(file),
            Server::Nbdkit => command
                .args(["--foreground", "--readonly", "--ipaddr=127.0.0.1"])
                .arg(format!("--port={port}"))
                .arg("file")
                .arg(file),
        };
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let child = child.with_context(|| format!("{server:?} cannot be started (is it installed?)"))?;
        let nbd = Self { child, port };
        let deadline = Instant::now() + Duration::from_secs(10);
        while !answers(port) {
            if Instant::now() > deadline {
                bail!("{server:?} does not come up");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(nbd)
    }

    /// Runs `count` reads of `size` bytes, `depth` at once; how long they took.
    ///
    /// # Errors
    /// `qemu-img` is missing or fails.
    pub fn run(&self, count: u64, depth: u32, size: u64) -> Result<Duration> {
        let output = Command::new("qemu-img")
            .args(["bench", "-f", "raw", "-c", &count.to_string(), "-d", &depth.to_string()])
            .args(["-s", &size.to_string(), &format!("nbd://127.0.0.1:{}", self.port)])
            .output()
            .context("qemu-img cannot be started (is it installed?)")?;
        let text = String::from_utf8_lossy(&output.stdout);
        let seconds =
            text.split("Run completed in ").nth(1).and_then(|rest| rest.split(' ').next()?.parse().ok());
        let errors = String::from_utf8_lossy(&output.stderr);
        let seconds: f64 = seconds.with_context(|| format!("qemu-img bench failed: {errors}"))?;
        Ok(Duration::from_secs_f64(seconds))
    }
}

impl Drop for Nbd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
