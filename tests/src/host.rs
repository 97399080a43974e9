//! What this machine offers to a lab.

use std::fs;
use std::process::Command;
use std::sync::OnceLock;

use anyhow::{Result, bail};

/// How lab PCs run here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    /// QEMU's version line.
    pub qemu: String,
    /// Whether KVM with nesting runs the PCs, instead of emulation.
    pub kvm: bool,
}

/// This machine, or why no PC can run on it.
pub fn host() -> Result<&'static Host> {
    static HOST: OnceLock<Result<Host, String>> = OnceLock::new();
    match HOST.get_or_init(|| look().map_err(|error| error.to_string())) {
        Ok(host) => Ok(host),
        Err(why) => bail!("{why}"),
    }
}

fn look() -> Result<Host> {
    for tool in ["qemu-system-x86_64", "qemu-img"] {
        if Command::new(tool).arg("--version").output().is_err() {
            bail!("`{tool}` is not installed; run packaging/setup");
        }
    }
    let version = Command::new("qemu-system-x86_64").arg("--version").output()?;
    let qemu = String::from_utf8_lossy(&version.stdout).lines().next().unwrap_or_default().to_owned();
    Ok(Host { qemu, kvm: can_nest() })
}

/// Whether this machine's KVM runs whole PCs that have KVM themselves. `LAB_ACCEL=tcg` denies it.
fn can_nest() -> bool {
    if std::env::var("LAB_ACCEL").is_ok_and(|accel| accel == "tcg") {
        return false;
    }
    let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flag = |name| cpu.split_whitespace().any(|word| word == name);
    let nested = |module: &str| {
        fs::read_to_string(format!("/sys/module/{module}/parameters/nested"))
            .is_ok_and(|value| matches!(value.trim(), "1" | "Y"))
    };
    let usable = fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok();
    usable && ((flag("svm") && nested("kvm_amd")) || (flag("vmx") && nested("kvm_intel")))
}
