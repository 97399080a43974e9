//! Helpers are lost, and drained.

use std::time::Duration;

use anyhow::{Result, ensure};
use lab::guest::{PATIENCE, Running};
use lab::scene::{Scene, start_agent, wait_until};

use super::{mini, stored};
use crate::pattern::{rounds, rounds_later};

/// Waits until the guest stands still for this helper, and says so.
fn stands_still(scene: &Scene, guest: &Running, helper: &str) -> Result<()> {
    wait_until("the guest stands still and says why", PATIENCE, || {
        ensure!(!guest.ended(), "the guest ended: {}", guest.wait()?.all());
        let status = scene.console.run(&format!("omega status {} --json", guest.name()))?.ok()?;
        let status: serde_json::Value = serde_json::from_str(&status)?;
        Ok(status["waits_for"]["helper"].as_str().is_some_and(|named| named.contains(helper)))
    })?;
    let listed = scene.console.run("omega ps")?.ok()?;
    ensure!(listed.contains("waits for") && listed.contains(helper), "{listed}");
    Ok(())
}

pub(super) fn a_lost_helper_stops_the_guest_as_a_whole() -> Result<()> {
    let scene = Scene::new("memory-none", None)?;
    scene.lend(&[], "256M")?;
    let agent = scene.agent();
    let guest = mini("pattern", "16,2,1000000", "none").memory_helper(&agent, "helper", "192M");
    let guest = guest.start(&scene.console)?;
    guest.expect("omega-pattern: round 1 ")?;

    // The agent's process dies; systemd starts it, and it finds what it kept.
    scene.helper.run("systemctl kill -s KILL omega-agent")?.ok()?;
    start_agent(&scene.helper)?;
    rounds_later(&guest, 1)?;

    scene.lan.cut("helper");
    stands_still(&scene, &guest, &agent)?;
    scene.lan.heal("helper");
    rounds_later(&guest, 1)?;

    scene.helper.freeze()?;
    stands_still(&scene, &guest, &agent)?;
    let before = rounds(&guest);
    std::thread::sleep(Duration::from_secs(2));
    ensure!(rounds(&guest) == before, "a guest goes on whose memory is away");
    scene.helper.thaw()?;
    // The second of them begins after all that.
    rounds_later(&guest, 2)?;
    scene.console.run("omega stop --force mini")?.ok()?;
    ensure!(guest.wait()?.code == 13 && !guest.console().contains("WRONG"), "{}", guest.console());
    Ok(())
}

pub(super) fn a_helper_is_drained_and_switched_off() -> Result<()> {
    let scene = Scene::with_lenders("memory-drain", None, 1)?;
    scene.lend(&[], "256M")?;
    let second = &scene.lenders[0];
    let guest = mini("pattern", "16,2,1000000", "none")
        .memory_helper(&scene.agent(), "helper", "192M")
        .memory_helper(&second.address(), "helper2", "192M")
        .start(&scene.console)?;
    guest.expect("omega-pattern: round 1 ")?;
    let [here, there] = [stored(&scene.helper)?, stored(second)?];
    ensure!(here > 4 << 20 && there > 4 << 20, "not both keep something: {here} and {there} bytes");

    let said = scene.console.run("omega node drain helper")?.ok()?;
    ensure!(said.contains("keeps nothing any more"), "{said}");
    wait_until("the memory is given back", PATIENCE, || Ok(stored(&scene.helper)? == 0))?;
    scene.helper.kill();
    // The second of them begins after that.
    rounds_later(&guest, 2)?;
    scene.console.run("omega stop --force mini")?.ok()?;
    ensure!(guest.wait()?.code == 13 && !guest.console().contains("WRONG"), "{}", guest.console());
    wait_until("the other memory is given back too", PATIENCE, || Ok(stored(second)? == 0))
}
