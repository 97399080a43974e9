//! What carries the bytes between the PCs.

use anyhow::{Context, Result, ensure};
use lab::scene::{Scene, UNIT};
use lab::{Guest, Pc};

pub(crate) const TESTS: &[(&str, crate::Test)] = &[
    ("transport::kernel_tls_carries_a_disk", kernel_tls_carries_a_disk),
    (
        "transport::a_pc_without_kernel_tls_uses_the_disk_of_one_with_it",
        a_pc_without_kernel_tls_meets_one_with_it,
    ),
];

/// A guest that reads its whole disk on the second PC, checks it, writes and reads back.
fn guest_uses_the_disk(scene: &Scene) -> Result<()> {
    scene.helper.run("mkdir -p /srv/omega && head -c 8M /dev/urandom >/srv/omega/v.raw")?.ok()?;
    let sum = scene.helper.run("sha256sum </srv/omega/v.raw")?.ok()?;
    let sum = sum.split_whitespace().next().context("no sum")?;
    scene.serve(&[("v", "/srv/omega/v.raw")])?;
    let output = Guest::mini("mini", "disks,write")
        .cpus(2)
        .remote_disk(&scene.agent(), "v", "")
        .run(&scene.console)?;
    ensure!(output.code == 0, "{}", output.all());
    ensure!(output.text().contains(sum), "the guest did not read what is there: {}", output.all());
    ensure!(output.text().contains("omega-mini: ok: write"), "{}", output.all());
    Ok(())
}

/// One of the kernel's counters of TLS; 0 where it has none.
fn counter(pc: &Pc, name: &str) -> Result<u64> {
    let all = pc.run("cat /proc/net/tls_stat 2>/dev/null; true")?.ok()?;
    let line = all.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok());
    Ok(line.unwrap_or(0))
}

/// How the agent says that its peers were connected.
fn connections(scene: &Scene) -> Result<String> {
    scene.helper.run(&format!("journalctl --no-pager -o cat -u {UNIT} | grep 'A peer is connected'"))?.ok()
}

fn kernel_tls_carries_a_disk() -> Result<()> {
    let scene = Scene::new("kernel-tls", None)?;
    // The packages have it loaded at boot; the agent's unit asks for it, too.
    scene.console.run("modprobe tls")?.ok()?;
    guest_uses_the_disk(&scene)?;
    let said = connections(&scene)?;
    ensure!(said.lines().all(|line| line.contains("carrier=kernel-tls")), "{said}");
    for pc in [&scene.console, &scene.helper] {
        for direction in ["TlsTxSw", "TlsRxSw"] {
            ensure!(counter(pc, direction)? > 0, "{}: the kernel's {direction} counts nothing", pc.name());
        }
        ensure!(counter(pc, "TlsDecryptError")? == 0, "{}: records did not decrypt", pc.name());
    }
    Ok(())
}

fn a_pc_without_kernel_tls_meets_one_with_it() -> Result<()> {
    let scene = Scene::new("mixed-tls", None)?;
    // Neither asked for nor loaded by itself, as on a kernel that was built without it.
    scene.console.run("echo 'install tls /bin/false' >/etc/modprobe.d/no-tls.conf")?.ok()?;
    scene.console.run("! grep -q '^tls ' /proc/modules || rmmod tls")?.ok()?;
    guest_uses_the_disk(&scene)?;
    let said = connections(&scene)?;
    ensure!(said.lines().all(|line| line.contains("carrier=kernel-tls")), "the agent has it: {said}");
    ensure!(counter(&scene.helper, "TlsRxSw")? > 0, "the agent's kernel decrypted nothing");
    ensure!(scene.console.run("test -e /proc/net/tls_stat")?.code != 0, "the console's kernel has TLS");
    Ok(())
}
