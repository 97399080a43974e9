//! A guest whose two vCPUs are on two lab PCs, beside the same guest with both of them on one, which has one processor.
//!
//! What an emulated PC computes is some twenty times slower than here, but what it takes to move a page, a hundred system calls and
//! exits, is much slower still. What a guest loses by sharing memory is what moving pages takes of the time between two of
//! its timer ticks. So the clock of these PCs is slowed until a page takes about as long as between two processes of this machine
//! (suite `coherence`), which is shown beside the figures.

use std::time::Duration;

use anyhow::{Context, Result};
use lab::guest::Guest;
use lab::scene::Scene;

use crate::bench::{Bench, Readings, Suite};
use crate::figure::{Reading, Spec, Target};

const ONE_PC: &str = "both vCPUs on one PC with one processor";

/// See the [module](self).
pub const SUITE: Suite = Suite {
    name: "span",
    specs: &[
        Spec { name: "span.ep", unit: "pairs/s", baseline: ONE_PC, target: Some(Target::AtLeast(1.8)) },
        Spec { name: "span.ep_threads", unit: "pairs/s", baseline: ONE_PC, target: None },
        Spec { name: "span.ep_shared", unit: "pairs/s", baseline: ONE_PC, target: None },
        Spec {
            name: "span.boot",
            unit: "s",
            baseline: "one PC, interrupt controllers in the kernel",
            target: Some(Target::AtMost(3.0)),
        },
    ],
    run,
};

const PATIENCE: Duration = Duration::from_secs(1200);

/// How many times slower the PCs' clocks are.
const SLOWER: u32 = 100;

/// What one guest did.
struct Run {
    /// Seconds from its kernel's start to its first process.
    boot: f64,
    /// Pairs per second, by [`MODES`].
    ep: [f64; MODES.len()],
    counters: String,
}

/// What omega-ep computes with, one after the other: nothing is shared; page tables are; all write to one page.
const MODES: [&str; 3] = ["processes", "threads", "shared"];

/// The number after `key` in what the guest said.
fn number(text: &str, key: &str) -> Result<f64> {
    let at = text.find(key).with_context(|| format!("no {key} in {text}"))? + key.len();
    let number: String = text[at..].chars().take_while(|c| c.is_ascii_digit() || *c == '.').collect();
    number.parse().with_context(|| format!("{key} in {text}"))
}

/// Boots the guest, has both of its processors compute, and waits until it powers off.
fn compute(scene: &Scene, guest: Guest, pairs: u32) -> Result<Run> {
    let guest = guest.cmdline(&format!("omega.ep=2,{pairs}")).start(&scene.console)?;
    let boot = guest.expect_for("omega-mini: ready", PATIENCE)?;
    let computed = guest.expect_for("omega-mini: ok: ep", PATIENCE)?;
    let counters = scene.console.run("omega status bench | grep '^coherence' | tr '\\n' ' '")?.text();
    guest.process().wait(PATIENCE)?.ok()?;
    let mut ep = [0.0; MODES.len()];
    for (rate, mode) in ep.iter_mut().zip(MODES) {
        let begin = format!("omega-ep: {mode} ");
        let line = computed.lines().find(|line| line.contains(&begin) && line.contains("verified"));
        let line = line.with_context(|| format!("omega-ep did not run to its end: {computed}"))?;
        *rate = f64::from(pairs).exp2() / number(line, "seconds=")?;
    }
    Ok(Run { boot: number(&boot, "userspace uptime=")?, ep, counters })
}

fn run(bench: &Bench, readings: &mut Readings) -> Result<()> {
    ["omega", "omega-agent", "liblab_clock.so"]
        .into_iter()
        .try_for_each(|name| bench.program(name).map(drop))?;
    // NPB's class A, and S.
    let pairs = if bench.rounds() > 1 { 28 } else { 24 };
    let scene = Scene::spanning_slower(SLOWER, "bench-span", None, 1)?;
    let mini = || Guest::mini("bench", "online,ep");
    bench.progress("span: on one PC");
    let one = compute(&scene, mini().cpus(2), pairs)?;
    bench.progress("span: on two PCs");
    let two = compute(&scene, mini().spans(&scene).cmdline("maxcpus=1"), pairs)?;
    let counted = format!("its counters at the end: {}", two.counters.trim());
    for ((name, two), one) in
        ["span.ep", "span.ep_threads", "span.ep_shared"].into_iter().zip(two.ep).zip(one.ep)
    {
        let reading = Reading::beside(name, two, one);
        readings.add(if name == "span.ep" { reading.note(&counted) } else { reading });
    }
    let later = "the vCPU on the other PC goes online after that";
    readings.add(Reading::beside("span.boot", two.boot, one.boot).note(later));
    Ok(())
}
