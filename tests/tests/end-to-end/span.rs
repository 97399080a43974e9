//! One guest, its vCPUs on two PCs. Its second processor is switched on when it is up, since two that boot an emulated Linux
//! stand in each other's way.

use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::guest::{Guest, PATIENCE, Running};
use lab::images::{Image, own_binary};
use lab::initramfs::Initramfs;
use lab::scene::{Scene, configure, wait_until};

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

/// Where the helper keeps the disk of a guest that writes to it all the while, and how large that is.
const VOLUME: &str = "/srv/omega/v.raw";
const MIB: u64 = 1;

fn spanning(scene: &Scene, steps: &str) -> Guest {
    Guest::mini("mini", &format!("online,{steps}")).spans(scene)
}

fn mini(scene: &Scene, steps: &str, words: &str) -> Result<Running> {
    let guest = spanning(scene, steps).cmdline(&format!("maxcpus=1 {words}")).start(&scene.console)?;
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
    // While both compute, the second one comes to this PC and goes back.
    for (node, places) in [("console", "on console: 0, 1"), ("helper", "on helper: 1")] {
        let moved = scene.console.run(&format!("omega cpu move mini 1 {node} && omega status mini"))?.ok()?;
        ensure!(moved.contains(places), "{moved}");
    }
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

/// What the checker of a disk in the guest counted last, by what it calls it.
fn counted(guest: &Running, key: &str) -> u64 {
    let console = guest.console();
    let line = console
        .lines()
        .rev()
        .find(|line| line.contains("lab-checker: progress") && line.contains("longest_ms"));
    let value = line.and_then(|line| line.split_whitespace().find_map(|word| word.strip_prefix(key)));
    value.and_then(|value| value.parse().ok()).unwrap_or(0)
}

fn requests(guest: &Running) -> u64 {
    counted(guest, "writes=") + counted(guest, "reads=")
}

/// Waits until the checker of the disk has done more than `before`.
fn requests_after(guest: &Running, before: u64) -> Result<()> {
    wait_until("the checker of the disk goes on", PATIENCE, || {
        ensure!(!guest.ended(), "the guest ended: {}", guest.wait()?.all());
        Ok(requests(guest) > before)
    })
}

fn a_cut_helper_makes_the_guest_wait() -> Result<()> {
    let scene = Scene::spanning("span-loss", None, 1)?;
    scene.helper.run(&format!("mkdir -p /srv/omega && truncate -s {MIB}M {VOLUME} && sync"))?.ok()?;
    scene.helper.run("systemctl stop omega-agent")?.ok()?;
    configure(&scene.helper, &scene.agent(), &[("v", VOLUME)], "\n[cpu]\ncount = 1\n")?;
    let script = format!("#!/bin/sh\nomega-pattern 2 2 1000000 &\n/lab/lab-checker run /dev/vda {MIB}\n");
    let initrd = Initramfs::from_file(&Image::get("mini")?.file("initrd"))?
        .program("lab/lab-checker", &own_binary("lab-checker")?)?
        .file("lab/run", 0o755, script.as_bytes())
        .finish();
    scene.console.put_bytes(&initrd, "/images/checkers/initrd", 0o644)?;
    let guest = spanning(&scene, "run")
        .initrd("/images/checkers/initrd")
        .remote_disk(&scene.agent(), "v", "")
        .cmdline("maxcpus=1")
        .start(&scene.console)?;
    guest.expect("omega-mini: ok: online 0-1")?;
    guest.expect("omega-pattern: round 1 ")?;
    requests_after(&guest, 20)?;
    scene.lan.cut("helper");
    thread::sleep(Duration::from_secs(20));
    let before = (rounds(&guest), requests(&guest));
    thread::sleep(Duration::from_secs(25));
    ensure!((rounds(&guest), requests(&guest)) == before, "a guest goes on whose helper is away");
    scene.lan.heal("helper");
    rounds_later(&guest, 1)?;
    requests_after(&guest, before.1)?;
    // What the helper had of the guest dies with its agent: the guest cannot go on, and says so.
    scene.helper.run("systemctl kill -s KILL omega-agent")?.ok()?;
    let output = guest.wait()?;
    ensure!(output.code == MEMORY_LOST, "{}: {}", output.code, output.all());
    ensure!(!guest.console().contains("WRONG"), "{}", guest.console());
    ensure!(counted(&guest, "lost=") == 0 && counted(&guest, "errors=") == 0, "{}", guest.console());
    // Whatever was being written when the guest ended, each block is a whole one of its own.
    scene.helper.put(&own_binary("lab-checker")?, "/root/lab-checker", 0o755)?;
    let there = scene.helper.run(&format!("/root/lab-checker check {VOLUME} {MIB}"))?.ok()?;
    println!("{} requests before the guest ended; then {}", requests(&guest), there.trim());
    ensure!(there.contains(" torn=0") && !there.contains("whole=0 "), "{there}");
    Ok(())
}
