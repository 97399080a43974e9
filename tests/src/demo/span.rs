//! `make demo-span`: Debian, unmodified, with one vCPU on each of two PCs.

use std::time::Instant;

use anyhow::{Context, Result, ensure};

use super::{boot, how_they_run, power_off, say, show};
use crate::guest::Guest;
use crate::images::Image;
use crate::scene::{ROOT, Scene, install_image};

/// How many pairs of numbers are drawn, as a power of two.
const PAIRS: &str = "22";

/// Shows it all; ends with the line `demo: ok`, or an error.
pub fn span() -> Result<()> {
    let start = Instant::now();
    say(&format!("Starting two lab PCs, {}", how_they_run()?));
    let image = Image::get("debian")?;
    let scene = Scene::spanning("demo-span", Some(&image.file("disk.raw")), 1)?;
    install_image(&scene.console, &image, "debian")?;
    show(&scene)?;

    say("`helper` lends a vCPU, and its second disk");
    println!("{}", scene.helper.run("cat /etc/omega/agent.toml")?.ok()?);

    // Its second processor is switched on when it is up: two that boot an emulated Linux stand in each other's way.
    let debian =
        Guest::debian("span").remote_disk(&scene.agent(), ROOT, "").spans(&scene).cmdline("maxcpus=1");
    say("The guest, on `console`: /root/span.toml");
    println!("{}", debian.toml().trim());

    say("omega run span.toml: the guest's console");
    let guest = boot(&debian, &scene)?;
    guest.shell("gcc -O2 -pthread -o /root/omega-ep /usr/src/omega-ep.c -lm")?;

    say("The processor on `helper` goes online");
    guest.shell("echo 1 >/sys/devices/system/cpu/cpu1/online")?;
    let processors =
        guest.shell("lscpu | grep -E '^(CPU\\(s\\)|On-line|Thread|Core|Socket|NUMA|Model name)'")?;
    let nodes = guest
        .shell("grep . /sys/devices/system/node/node*/cpulist /sys/devices/system/node/node*/distance")?;

    say("omega-ep (NPB EP) on both");
    let computed = guest.shell(&format!("/root/omega-ep 2 {PAIRS}"))?;
    let status = scene.console.run("omega status span")?.ok()?;
    say("The processor on `helper` goes offline, and the guest powers off");
    guest.shell("echo 0 >/sys/devices/system/cpu/cpu1/online")?;
    power_off(&guest).context("After it computed")?;

    say("What the guest said of its processors");
    println!("{processors}\n{nodes}");
    ensure!(processors.contains("NUMA node1 CPU(s)") && nodes.contains("node1/cpulist:1"), "No second node");
    say("What it computed on both PCs");
    println!("{computed}");
    ensure!(computed.contains("workers=2") && computed.contains("verified"), "It computed something else");
    say("omega status span, before it powered off");
    println!("{}", status.trim());
    println!("\n({:.0} s)\ndemo: ok", start.elapsed().as_secs_f32());
    Ok(())
}
