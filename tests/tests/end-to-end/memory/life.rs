//! What happens in a guest's life happens to one whose memory is elsewhere too.

use anyhow::{Context, Result, ensure};
use lab::guest::PATIENCE;
use lab::scene::{Scene, wait_until};

use super::{mini, stored};
use crate::pattern::rounds;

/// What the guest's pages take up that have any content, here or on the helper, in bytes.
fn kept(scene: &Scene) -> Result<u64> {
    let sum = "omega status mini | awk '$1 ~ /^memory.(resident|remote)$/ { n += $2 } END { print n }'";
    let said = scene.console.run(sum)?.ok()?;
    Ok(said.trim().parse::<u64>().context(said)? * 4096)
}

pub(super) fn a_paged_guest_is_paused_and_reboots() -> Result<()> {
    let scene = Scene::new("memory-life", None)?;
    scene.lend(&[], "256M")?;
    let guest = mini("cpus,pattern,button,reboot", "40,2,2", "none")
        .memory_helper(&scene.agent(), "helper", "192M")
        .with("[balloon]\nfree_page_reporting = true\n")
        .start(&scene.console)?;
    guest.expect("omega-mini: ok: cpus 2 worked 2")?;
    guest.expect("omega-pattern: round 1 ")?;
    let full = kept(&scene)?;
    let there = stored(&scene.helper)?;
    ensure!(there > 32 << 20, "too little is on the helper: {there} bytes");

    scene.console.run("omega pause mini")?.ok()?;
    let status = scene.console.run("omega status mini --json")?.ok()?;
    ensure!(status.contains("paused"), "{status}");
    // What it said before the pause is here when these have been answered.
    let before = rounds(&guest);
    scene.console.run("omega status mini; sleep 2")?.ok()?;
    ensure!(rounds(&guest) == before, "a paused guest goes on");
    scene.console.run("omega resume mini")?.ok()?;
    guest.expect("omega-mini: ok: pattern")?;
    guest.expect("omega-mini: waiting for the power button")?;
    // The checker had 40 MiB and is gone. The guest's kernel reports what is free in blocks of 2 MiB and more.
    wait_until("what the guest freed is nowhere any more", PATIENCE, || {
        let there = stored(&scene.helper)?;
        let all = kept(&scene)?;
        Ok(all < full.saturating_sub(8 << 20) && there <= all)
    })?;

    guest.signal(libc::SIGTERM)?;
    guest.expect("omega-mini: rebooting")?;
    guest.expect("omega-mini: ok: pattern")?;
    ensure!(!guest.console().contains("WRONG"), "{}", guest.console());
    scene.console.run("omega stop --force mini")?.ok()?;
    ensure!(guest.wait()?.code == 13, "{}", guest.console());
    wait_until("the memory is given back", PATIENCE, || Ok(stored(&scene.helper)? == 0))
}
