//! A guest whose two vCPUs are on two lab PCs, beside the same guest with both of them on one, which has one processor.

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

/// What one guest did.
struct Run {
    /// Seconds from its kernel's start to its first process.
    boot: f64,
    /// Pairs per second: each thread on its own, and all on one page.
    ep: f64,
    shared: f64,
    counters: String,
}

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
    let (ep, shared) =
        computed.split_once("omega-ep: shared").context("the program did not run to its end")?;
    let rate = |text| anyhow::Ok(f64::from(pairs).exp2() / number(text, "seconds=")?);
    Ok(Run { boot: number(&boot, "userspace uptime=")?, ep: rate(ep)?, shared: rate(shared)?, counters })
}

fn run(bench: &Bench, readings: &mut Readings) -> Result<()> {
    ["omega", "omega-agent", "liblab_clock.so"]
        .into_iter()
        .try_for_each(|name| bench.program(name).map(drop))?;
    let pairs = if bench.rounds() > 1 { 27 } else { 24 };
    let scene = Scene::spanning("bench-span", None, 1)?;
    let mini = || Guest::mini("bench", "online,ep");
    bench.progress("span: on one PC");
    let one = compute(&scene, mini().cpus(2), pairs)?;
    bench.progress("span: on two PCs");
    let two = compute(&scene, mini().spans(&scene).cmdline("maxcpus=1"), pairs)?;
    let counted = format!("its counters at the end: {}", two.counters.trim());
    readings.add(Reading::beside("span.ep", two.ep, one.ep).note(&counted));
    readings.add(Reading::beside("span.ep_shared", two.shared, one.shared));
    let later = "the vCPU on the other PC goes online after that";
    readings.add(Reading::beside("span.boot", two.boot, one.boot).note(later));
    Ok(())
}
