//! On this machine itself, whatever its KVM is.

use std::fs;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lab::images::{Image, binary};

pub(crate) const TESTS: &[(&str, crate::Test)] = &[(
    "native::a_kvm_that_cannot_run_stock_kernels_is_named_and_refused",
    an_unfit_kvm_is_named_and_refused,
)];

fn an_unfit_kvm_is_named_and_refused() -> Result<()> {
    let omega = binary("omega")?;
    let check = Command::new(&omega).args(["check", "--json"]).output()?;
    let found = String::from_utf8_lossy(&check.stdout);
    let report: serde_json::Value =
        serde_json::from_str(&found).with_context(|| found.clone().into_owned())?;
    ensure!(report.is_object() || report.is_array(), "{found}");

    let mini = Image::get("mini")?;
    let folder = tempfile::tempdir()?;
    let config = folder.path().join("mini.toml");
    let toml = format!(
        "name = \"unfit\"\n[kernel]\nimage = \"{}\"\ninitrd = \"{}\"\ncmdline = \"console=ttyS0 omega.test=poweroff\"\n",
        mini.file("vmlinuz").display(),
        mini.file("initrd").display()
    );
    fs::write(&config, toml)?;
    let start = Instant::now();
    let run = Command::new(&omega)
        .arg("run")
        .arg(&config)
        .env("OMEGA_RUNTIME_DIR", folder.path())
        .stdin(Stdio::null())
        .output()?;
    let said = String::from_utf8_lossy(&run.stderr);
    if check.status.success() {
        ensure!(run.status.success(), "omega check says that guests can run here, and yet: {said}");
        return Ok(());
    }
    ensure!(start.elapsed() < Duration::from_secs(20), "the refusal took {:?}", start.elapsed());
    ensure!(run.status.code() == Some(1), "{:?}: {said}", run.status);
    let lines: Vec<&str> = said.lines().filter(|line| line.starts_with("omega: ")).collect();
    ensure!(lines.len() == 1, "not one line: {said}");
    ensure!(lines[0].contains("KVM") || lines[0].contains("kvm"), "{}", lines[0]);
    let plain = Command::new(&omega).arg("check").output()?;
    let plain = String::from_utf8_lossy(&plain.stdout);
    if fs::metadata("/dev/kvm").is_ok() {
        ensure!(
            plain.contains("stock kernels"),
            "omega check does not say that this KVM runs no stock kernels: {plain}"
        );
    }
    println!("refused: {}", lines[0]);
    Ok(())
}
