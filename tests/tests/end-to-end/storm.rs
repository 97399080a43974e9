//! The agent is killed, frozen, cut off and loses its power, again and again, under verified I/O: the guest
//! notices pauses, and nothing else.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lab::Guest;
use lab::guest::Running;
use lab::images::{Image, own_binary};
use lab::initramfs::Initramfs;
use lab::scene::{Scene, start_agent, wait_until};

pub(crate) const TESTS: &[(&str, crate::Test)] = &[(
    "storm::no_write_is_lost_while_the_agent_fails_in_every_way",
    no_write_is_lost_while_the_agent_fails_in_every_way,
)];

/// What the checker writes to and reads from.
const MIB: u32 = 16;
/// How long the guest's I/O may need to go on after a fault is over.
const RECOVERY: Duration = Duration::from_secs(360);

/// What happens to the helper PC or its agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// The agent's process is killed; systemd starts it again.
    Kill,
    /// The agent is stopped in order and started.
    Restart,
    /// The agent's process stands still.
    Stall,
    /// The whole PC stands still.
    Freeze,
    /// The network cable is pulled.
    Cut,
    /// One frame in ten is lost.
    Lossy,
    /// Each frame takes long.
    Slow,
    /// The PC loses its power and boots again; its page cache is gone.
    PowerCut,
}

/// 56 faults in an order that mixes them; the same in every run.
fn faults() -> Vec<Fault> {
    use Fault::{Cut, Freeze, Kill, Lossy, PowerCut, Restart, Slow, Stall};
    let counts =
        [(Kill, 16), (Restart, 4), (Stall, 8), (Freeze, 10), (Cut, 12), (Lossy, 2), (Slow, 2), (PowerCut, 2)];
    let total: u32 = counts.iter().map(|(_, count)| count).sum();
    // Each kind is spread evenly over the storm.
    let mut all: Vec<(u32, Fault)> = Vec::new();
    for (kind, (fault, count)) in (0..).zip(counts) {
        all.extend((0..count).map(|i| ((2 * i + 1) * total * 10 / (2 * count) + kind, fault)));
    }
    all.sort_by_key(|(when, _)| *when);
    all.into_iter().map(|(_, fault)| fault).collect()
}

impl Fault {
    fn strike(self, scene: &Scene, lasts: Duration) -> Result<()> {
        let Scene { helper, lan, .. } = scene;
        let pause = || std::thread::sleep(lasts);
        match self {
            Self::Kill => {
                helper.run("systemctl kill -s KILL omega-agent")?.ok()?;
                pause();
                // By itself, or now.
                start_agent(helper)?;
            }
            Self::Restart => helper.run("systemctl restart omega-agent")?.ok().map(drop)?,
            Self::Stall => {
                helper.run("systemctl kill -s STOP omega-agent")?.ok()?;
                pause();
                helper.run("systemctl kill -s CONT omega-agent")?.ok()?;
            }
            Self::Freeze => {
                helper.freeze()?;
                pause();
                helper.thaw()?;
            }
            Self::Cut => {
                lan.cut("helper");
                pause();
                lan.heal("helper");
            }
            Self::Lossy => {
                lan.lose("helper", 0.1);
                pause();
                lan.heal("helper");
            }
            Self::Slow => {
                lan.delay("helper", Duration::from_millis(50));
                pause();
                lan.heal("helper");
            }
            Self::PowerCut => {
                helper.kill();
                helper.start()?;
                start_agent(helper)?;
            }
        }
        Ok(())
    }
}

/// How many requests the checker in the guest has finished.
fn finished(guest: &Running) -> u64 {
    let console = guest.console();
    let Some(line) = console
        .lines()
        .rev()
        .find(|line| line.starts_with("lab-checker: progress") && line.contains("longest_ms"))
    else {
        return 0;
    };
    number(line, "writes=") + number(line, "reads=")
}

fn number(line: &str, key: &str) -> u64 {
    let digits = line.split(key).nth(1).unwrap_or_default();
    digits.chars().take_while(char::is_ascii_digit).collect::<String>().parse().unwrap_or(0)
}

fn no_write_is_lost_while_the_agent_fails_in_every_way() -> Result<()> {
    let scene = Scene::new("storm", None)?;
    // A file in the helper's page cache: a power cut loses what was not flushed.
    scene.helper.run(&format!("mkdir -p /srv/omega && truncate -s {MIB}M /srv/omega/v.raw && sync"))?.ok()?;
    scene.serve(&[("v", "/srv/omega/v.raw")])?;
    let script = format!(
        "#!/bin/sh\n/lab/lab-checker run /dev/vda {MIB}\ncode=$?\necho kernel-errors $(dmesg | grep -c -i 'error')\nexit $code\n"
    );
    let initrd = Initramfs::from_file(&Image::get("mini")?.file("initrd"))?
        .program("lab/lab-checker", &own_binary("lab-checker")?)?
        .file("lab/run", 0o755, script.as_bytes())
        .finish();
    scene.console.put_bytes(&initrd, "/images/storm/initrd", 0o644)?;

    let guest = Guest::mini("storm", "run")
        .initrd("/images/storm/initrd")
        .remote_disk(&scene.agent(), "v", "")
        .start(&scene.console)?;
    wait_until("The first verified I/O", RECOVERY, || {
        ensure!(!guest.ended(), "the guest ended: {:?}", guest.wait()?);
        Ok(finished(&guest) > 100)
    })?;

    let faults = faults();
    let start = Instant::now();
    for (number, fault) in faults.iter().enumerate() {
        // From a blink to longer than any keepalive.
        let lasts = Duration::from_millis([100, 600, 1500, 300, 2500, 7000][number % 6]);
        let before = finished(&guest);
        fault.strike(&scene, lasts).with_context(|| format!("Fault {number}, {fault:?}"))?;
        let after_fault = finished(&guest).max(before);
        wait_until(&format!("I/O after fault {number}, {fault:?} of {lasts:?}"), RECOVERY, || {
            ensure!(!guest.ended(), "the guest ended:\n{}", guest.console());
            Ok(finished(&guest) > after_fault)
        })?;
    }
    let storm = start.elapsed();
    guest.types("\n")?;
    guest.expect("lab-checker: done")?;
    let done = guest.expect("digest=")?;
    let digest = guest.expect("\n")?;
    guest.expect("kernel-errors ")?;
    let errors: u64 = guest.expect("\n")?.trim().parse().context("the count of kernel errors")?;
    let output = guest.wait()?;
    println!("{} faults in {:.0} s;{done}{}", faults.len(), storm.as_secs_f32(), digest.trim());
    ensure!(output.code == 0 && output.text().contains("omega-mini: ok: run"), "{}", output.all());
    ensure!(faults.len() >= 50);
    ensure!(number(&done, "lost=") == 0 && done.contains("lost=0 "), "lost writes: {done}");
    ensure!(number(&done, "errors=") == 0 && done.contains("errors=0 "), "I/O errors in the guest: {done}");
    ensure!(errors == 0, "the guest's kernel complains: {}", output.text());

    // And it is really there, on the second PC.
    scene.helper.run("systemctl stop omega-agent; sync; echo 3 >/proc/sys/vm/drop_caches")?.ok()?;
    scene.helper.put(&own_binary("lab-checker")?, "/root/lab-checker", 0o755)?;
    let there = scene.helper.run(&format!("/root/lab-checker digest /srv/omega/v.raw {MIB}"))?.ok()?;
    ensure!(
        there.contains(digest.trim()),
        "the volume's file holds something else: {there} instead of {digest}"
    );
    Ok(())
}
