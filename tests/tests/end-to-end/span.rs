//! One guest, its vCPUs on two PCs. Its second processor is switched on when it is up, since two that boot an emulated Linux
//! stand in each other's way.

use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::guest::{Guest, Running};
use lab::scene::Scene;

use crate::pattern::{rounds, rounds_later};

pub(crate) const TESTS: &[(&str, crate::Test)] = &[
    ("span::linux_computes_on_two_pcs_at_once_and_sees_memory_as_on_one", linux_computes_on_two_pcs),
    (
        "span::a_cut_helper_makes_the_guest_wait_and_a_dead_one_ends_it_and_no_byte_is_wrong",
        a_cut_helper_makes_the_guest_wait,
    ),
];

/// What `omega run` ends with when a part of the guest's memory is gone.
const MEMORY_LOST: i32 = 14;

fn mini(scene: &Scene, steps: &str, words: &str) -> Result<Running> {
    let guest = Guest::mini("mini", &format!("online,{steps}")).spans(scene);
    let guest = guest.cmdline(&format!("maxcpus=1 {words}")).start(&scene.console)?;
    guest.expect("omega-mini: ok: online 0-1")?;
    Ok(guest)
}

/// The number of runs and of forbidden outcomes of the litmus tests on the console.
fn litmus(console: &str) -> (u64, u64) {
    let number = |line: &str, key: &str| {
        let value = line.split_whitespace().find_map(|word| word.strip_prefix(key));
        value.and_then(|value| value.parse::<u64>().ok()).unwrap_or(0)
    };
    let tests = console.lines().filter(|line| line.starts_with("omega-litmus: ") && line.contains(" runs="));
    tests.fold((0, 0), |(runs, forbidden), line| {
        (runs + number(line, "runs="), forbidden + number(line, "forbidden="))
    })
}

fn linux_computes_on_two_pcs() -> Result<()> {
    let scene = Scene::spanning("span", None, 1)?;
    // All of the litmus tests take minutes here; this one meets the most conflicts.
    let litmus_test = "omega.litmus=1000,0,atomic-increments";
    let guest = mini(&scene, "numa,cpus,ep,litmus", &format!("omega.ep=2,20 {litmus_test}"))?;
    guest.expect("omega-mini: ok: numa nodes 2")?;
    guest.expect("omega-mini: ok: cpus 2 worked 2")?;
    guest.expect("omega-mini: ok: ep")?;
    let status = scene.console.run("omega status mini")?.ok()?;
    let counted = |key: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(key)?.trim().parse::<u64>().ok());
        line.with_context(|| status.clone())
    };
    ensure!(counted("coherence.fetched")? > 100 && counted("coherence.sent")? > 100, "{status}");
    guest.expect("omega-mini: ok: litmus")?;
    let output = guest.wait()?;
    ensure!(output.code == 0, "{}", output.all());
    let (runs, forbidden) = litmus(&guest.console());
    println!("litmus test in a guest on two PCs: {runs} runs, {forbidden} forbidden outcomes");
    ensure!(runs > 1000 && forbidden == 0 && !guest.console().contains("WRONG"), "{}", guest.console());
    Ok(())
}

fn a_cut_helper_makes_the_guest_wait() -> Result<()> {
    let scene = Scene::spanning("span-loss", None, 1)?;
    let guest = mini(&scene, "pattern", "omega.pattern=2,2,1000000")?;
    guest.expect("omega-pattern: round 1 ")?;
    scene.lan.cut("helper");
    thread::sleep(Duration::from_secs(20));
    let before = rounds(&guest);
    thread::sleep(Duration::from_secs(10));
    ensure!(rounds(&guest) == before, "a guest goes on whose helper is away");
    scene.lan.heal("helper");
    rounds_later(&guest, 2)?;
    // What the helper had of the guest dies with its agent: the guest cannot go on, and says so.
    scene.helper.run("systemctl kill -s KILL omega-agent")?.ok()?;
    let output = guest.wait()?;
    ensure!(output.code == MEMORY_LOST, "{}: {}", output.code, output.all());
    ensure!(!guest.console().contains("WRONG"), "{}", guest.console());
    Ok(())
}
