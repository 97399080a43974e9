//! `omega run` with a micro-guest, as a process of its own.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::time::{ClockId, clock_gettime};
use vmm::loader::micro;

use crate::bench::Bench;

/// What a micro-guest is given.
#[derive(Clone, Copy, Debug, Default)]
pub struct Parts<'a> {
    /// A raw image on this PC.
    pub disk: Option<&'a Path>,
    /// A TAP interface.
    pub tap: Option<&'a str>,
    /// What it does.
    pub end: End,
}

/// What a micro-guest does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum End {
    /// Powers off at once.
    #[default]
    PowerOff,
    /// Halts for good.
    Halt,
}

/// `omega run` and its guest. Dropping it ends its process.
pub struct Omega {
    child: Child,
    log: PathBuf,
    started_us: i64,
}

fn monotonic_us() -> Result<i64> {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC)?;
    Ok(now.tv_sec() * 1_000_000 + now.tv_nsec() / 1000)
}

impl Omega {
    /// Starts a guest of one vCPU and 512 MiB.
    ///
    /// # Errors
    /// `omega` is not built or cannot be started.
    pub fn start(bench: &Bench, parts: Parts<'_>) -> Result<Self> {
        let folder = tempfile::tempdir_in(bench.directory())?.keep();
        let (kernel, config, log) = (folder.join("kernel"), folder.join("guest.toml"), folder.join("log"));
        let code = if parts.end == End::Halt { micro::halt() } else { micro::power_off() };
        std::fs::write(&kernel, micro::kernel(&code))?;
        let mut text = format!(
            "name = 'bench-{}'\nkernel.image = '{}'\nmemory.size = '512M'\nserial = 'console'\n",
            std::process::id(),
            kernel.display()
        );
        if let Some(disk) = parts.disk {
            writeln!(text, "[[disk]]\npath = '{}'", disk.display())?;
        }
        if let Some(tap) = parts.tap {
            writeln!(text, "[[net]]\ntap = '{tap}'")?;
        }
        std::fs::write(&config, text)?;
        let mut command = Command::new(bench.program("omega")?);
        command.arg("run").arg(&config).arg("--allow-unfit-kvm");
        command.env("OMEGA_LOG", "warn,start=debug").env("XDG_RUNTIME_DIR", &folder);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(std::fs::File::create(&log)?);
        let started_us = monotonic_us()?;
        let child = command.spawn().context("omega cannot be started")?;
        Ok(Self { child, log, started_us })
    }

    /// Waits until the guest's first instruction is about to run, and tells how long that took from before
    /// the process was started.
    ///
    /// # Errors
    /// It does not come so far.
    pub fn first_entry(&mut self) -> Result<Duration> {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let ended = self.child.try_wait()?.is_some();
            let text = std::fs::read_to_string(&self.log)?;
            let number = text.split("monotonic_us=").nth(1).and_then(|rest| rest.split_whitespace().next());
            if let Some(at) = number.and_then(|number| number.parse::<i64>().ok()) {
                return Ok(Duration::from_micros(u64::try_from(at - self.started_us)?));
            }
            if ended || Instant::now() > deadline {
                bail!("omega run did not start its guest: {}", text.trim());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Omega {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
