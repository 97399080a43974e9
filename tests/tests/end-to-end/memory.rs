//! Guests whose memory is on other PCs.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::Guest;
use lab::guest::{PATIENCE, Running};
use lab::pc::Pc;
use lab::scene::{Scene, configure, lends, start_agent, wait_until};

use crate::mistakes::refused;

pub(crate) const TESTS: &[(&str, crate::Test)] = &[
    ("memory::what_is_not_lent_is_said_in_one_line", what_is_not_lent_is_said_in_one_line),
    (
        "memory::a_lost_helper_stops_the_guest_as_a_whole_until_it_is_back",
        a_lost_helper_stops_the_guest_as_a_whole,
    ),
];

/// The mini guest with three quarters of its RAM elsewhere.
fn mini(steps: &str, pattern: &str, on_loss: &str) -> Guest {
    Guest::mini("mini", steps)
        .cpus(2)
        .memory("128M")
        .cmdline(&format!("omega.pattern={pattern}"))
        .paged("32M", &format!("on_loss = \"{on_loss}\""))
}

/// What an agent has stored, in bytes.
fn stored(pc: &Pc) -> Result<u64> {
    let said = pc.run("omega-agent memory --json")?.ok()?;
    let value: serde_json::Value = serde_json::from_str(&said)?;
    value["used"].as_u64().with_context(|| said.clone())
}

/// How many rounds the checker in the guest has finished.
fn rounds(guest: &Running) -> usize {
    guest.console().matches("omega-pattern: round ").count()
}

/// Waits until the checker has finished `more` rounds.
fn rounds_later(guest: &Running, more: usize) -> Result<()> {
    let before = rounds(guest);
    wait_until("the checker goes on", PATIENCE, || {
        ensure!(!guest.ended(), "the guest ended: {}", guest.wait()?.all());
        ensure!(!guest.console().contains("WRONG"), "{}", guest.console());
        Ok(rounds(guest) >= before + more)
    })
}

fn what_is_not_lent_is_said_in_one_line() -> Result<()> {
    let scene = Scene::new("memory-missing", None)?;
    let agent = scene.agent();
    let guest = |size: &str| mini("poweroff", "8", "none").memory_helper(&agent, "helper", size);

    refused(&guest("128M").run(&scene.console)?, &[&agent])?;

    // The agent lends nothing, then too little, then not to this console.
    scene.serve(&[])?;
    refused(&guest("128M").run(&scene.console)?, &[&agent, "memory"])?;
    configure(&scene.helper, &agent, &[], &lends("64M"))?;
    scene.helper.run("systemctl restart omega-agent")?.ok()?;
    refused(&guest("128M").run(&scene.console)?, &[&agent, "64"])?;
    let nobody = lends("256M") + "\n[[allow]]\nnodes = [\"nobody\"]\nmemory = \"256M\"\n";
    configure(&scene.helper, &agent, &[], &nobody)?;
    scene.helper.run("systemctl restart omega-agent")?.ok()?;
    refused(&guest("128M").run(&scene.console)?, &[&agent, "console"])?;

    // What the file itself says cannot work.
    let mistaken = guest("64M").run(&scene.console)?;
    let one_line = mistaken.code == 2 && mistaken.stderr.trim().lines().count() == 1;
    ensure!(
        one_line && mistaken.stderr.contains("64M") && mistaken.stderr.contains("128M"),
        "{}",
        mistaken.all()
    );

    configure(&scene.helper, &agent, &[], &lends("256M"))?;
    scene.helper.run("systemctl restart omega-agent")?.ok()?;
    let output = guest("128M").run(&scene.console)?;
    ensure!(output.code == 0, "{}", output.all());
    wait_until("the memory is given back", PATIENCE, || Ok(stored(&scene.helper)? == 0))
}

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

fn a_lost_helper_stops_the_guest_as_a_whole() -> Result<()> {
    let scene = Scene::new("memory-none", None)?;
    scene.lend(&[], "256M")?;
    let agent = scene.agent();
    let guest = mini("pattern", "36,2,1000000", "none").memory_helper(&agent, "helper", "128M");
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
