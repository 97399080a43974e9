//! Who gets how much memory, and when it is free again.

use anyhow::{Context, Result, ensure};
use lab::Guest;
use lab::guest::PATIENCE;
use lab::pc::Pc;
use lab::scene::{Scene, configure, lends, wait_until};

use super::{lent, mini, stored};
use crate::mistakes::refused;
use crate::pattern::rounds_later;

pub(super) fn what_is_not_lent_is_said_in_one_line() -> Result<()> {
    let scene = Scene::new("memory-missing", None)?;
    let agent = scene.agent();
    let guest = |size: &str| mini("poweroff", "8", "none").memory_helper(&agent, "helper", size);

    refused(&guest("192M").run(&scene.console)?, &[&agent])?;

    // The agent lends nothing, then too little, then not to this console.
    scene.serve(&[])?;
    refused(&guest("192M").run(&scene.console)?, &[&agent, "memory"])?;
    configure(&scene.helper, &agent, &[], &lends("64M"))?;
    scene.helper.run("systemctl restart omega-agent")?.ok()?;
    refused(&guest("192M").run(&scene.console)?, &[&agent, "64"])?;
    let nobody = lends("256M") + "\n[[allow]]\nnodes = [\"nobody\"]\nmemory = \"256M\"\n";
    configure(&scene.helper, &agent, &[], &nobody)?;
    scene.helper.run("systemctl restart omega-agent")?.ok()?;
    refused(&guest("192M").run(&scene.console)?, &[&agent, "console"])?;

    // What the file itself says cannot work.
    let mistaken = guest("64M").run(&scene.console)?;
    let one_line = mistaken.code == 2 && mistaken.stderr.trim().lines().count() == 1;
    ensure!(
        one_line && mistaken.stderr.contains("64M") && mistaken.stderr.contains("156M"),
        "{}",
        mistaken.all()
    );

    configure(&scene.helper, &agent, &[], &lends("256M"))?;
    scene.helper.run("systemctl restart omega-agent")?.ok()?;
    let output = guest("192M").run(&scene.console)?;
    ensure!(output.code == 0, "{}", output.all());
    wait_until("the memory is given back", PATIENCE, || Ok(stored(&scene.helper)? == 0))
}

pub(super) fn a_helper_with_no_memory_to_spare() -> Result<()> {
    let scene = Scene::new("memory-pressure", None)?;
    scene.lend(&[], "256M")?;
    let agent = scene.agent();
    let guest = mini("pattern", "16,2,1000000", "none").memory_helper(&agent, "helper", "192M");
    let guest = guest.start(&scene.console)?;
    guest.expect("omega-pattern: round 1 ")?;

    // Another guest wants more than is left.
    let second = Guest::mini("second", "poweroff")
        .memory("192M")
        .paged("48M", "on_loss = \"none\"")
        .memory_helper(&agent, "helper", "192M");
    refused(&second.run(&scene.console)?, &[&agent, "192M", "64M"])?;

    // Somebody on the helper takes all the memory that there is, until the kernel ends that program.
    let greedy = "echo 1000 >/proc/self/oom_score_adj; exec dd if=/dev/zero of=/dev/null bs=1900M count=1";
    let ended = scene.helper.run(greedy)?;
    ensure!(ended.code == -libc::SIGKILL, "memory was not short: {}", ended.all());
    rounds_later(&guest, 2)?;
    let restarts = scene.helper.run("systemctl show -P NRestarts omega-agent")?.ok()?;
    ensure!(restarts.trim() == "0", "the agent was ended {restarts} times");
    let lent = lent(&scene.helper)?;
    let used = lent.used;
    ensure!(used > 12 << 20 && used <= lent.leased && lent.leased <= 192 << 20, "{used} of {}", lent.leased);

    scene.console.run("omega stop --force mini")?.ok()?;
    ensure!(guest.wait()?.code == 13 && !guest.console().contains("WRONG"), "{}", guest.console());
    let output = second.run(&scene.console)?;
    ensure!(output.code == 0, "there is room now: {}", output.all());
    Ok(())
}

/// The memory of a PC that files without a disk have, in KiB: what is lent is such a file.
fn shared_kib(pc: &Pc) -> Result<u64> {
    let said = pc.run("awk '$1 == \"Shmem:\" { print $2 }' /proc/meminfo")?.ok()?;
    said.trim().parse().context(said)
}

pub(super) fn what_a_dead_console_had_leased() -> Result<()> {
    let scene = Scene::new("memory-expiry", None)?;
    let agent = scene.agent();
    let memory = "lease_ttl = \"10s\"\n[memory]\nsize = \"192M\"\nkeep = \"20s\"\n";
    configure(&scene.helper, &agent, &[], memory)?;
    let before = shared_kib(&scene.helper)?;
    let guest = |pattern: &str| mini("pattern", pattern, "none").memory_helper(&agent, "helper", "192M");
    let running = guest("16,2,1000000").start(&scene.console)?;
    running.expect("omega-pattern: round 1 ")?;
    let full = stored(&scene.helper)?;
    ensure!(full > 12 << 20, "too little is on the helper: {full} bytes");
    ensure!(shared_kib(&scene.helper)? > before + (12 << 10), "what is stored is nowhere");

    // It cannot give anything back any more.
    scene.console.kill();
    wait_until("the lease is over", PATIENCE, || {
        let lent = lent(&scene.helper)?;
        Ok(lent.leased == 0 && lent.used == 0)
    })?;
    wait_until("what it had is gone", PATIENCE, || Ok(shared_kib(&scene.helper)? < before + (4 << 10)))?;

    scene.console.start()?;
    let output = guest("8,2,1").run(&scene.console)?;
    ensure!(output.code == 0 && output.text().contains("omega-mini: ok: pattern"), "{}", output.all());
    Ok(())
}
