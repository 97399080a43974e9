//! Starting a guest: how long until its first instruction, and what the VMM needs beside guest RAM.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::Result;
use kvm_ioctls::Kvm;

use crate::bench::{Bench, Readings, Suite};
use crate::figure::{Reading, Spec, Target};
use crate::omega::{End, Omega, Parts};
use crate::smaps;
use crate::stats::{median, percentile};

/// See the [module](self).
pub const SUITE: Suite = Suite {
    name: "start",
    specs: &[
        Spec {
            name: "start.first_kvm_run",
            unit: "ms",
            baseline: "the limit of 15 ms",
            target: Some(Target::AtMost(1.0)),
        },
        Spec { name: "start.bare_kvm", unit: "ms", baseline: "", target: None },
        Spec {
            name: "start.memory",
            unit: "MiB",
            baseline: "the limit of 5 MiB",
            target: Some(Target::AtMost(1.0)),
        },
    ],
    run,
};

/// The TAP interface that the measurement makes for itself.
const TAP: &str = "omegabench0";

fn run(bench: &Bench, readings: &mut Readings) -> Result<()> {
    if let Err(why) = Kvm::new() {
        readings.missing("start.", format!("/dev/kvm cannot be used: {why}"));
        return Ok(());
    }
    let disk = bench.directory().join("disk.raw");
    std::fs::File::create(&disk)?.set_len(64 << 20)?;
    let tap = Tap::new();
    let name = tap.as_ref().map(|_| TAP);
    let parts = Parts { disk: Some(&disk), tap: name, end: End::PowerOff };
    let without = match &name {
        Some(_) => "one disk, one network card",
        None => "one disk; no network card, since no TAP interface can be made here",
    };
    let (mut starts, mut bare) = (Vec::new(), Vec::new());
    for _ in 0..bench.rounds() * 3 {
        starts.push(millis(Omega::start(bench, parts)?.first_entry()?));
        bare.push(millis(bare_kvm()?));
    }
    let worst = percentile(&starts, 1.0);
    let note =
        format!("1 vCPU, 512 MiB, {without}; from before fork to before KVM_RUN; the slowest {worst:.1} ms");
    readings.add(Reading::beside("start.first_kvm_run", median(&starts), 15.0).note(note));
    let about = "a process that does nothing, then a VM with interrupt controllers, timer and one vCPU";
    readings.add(Reading::floor("start.bare_kvm", median(&bare)).note(about));
    memory(bench, readings, Parts { end: End::Halt, ..parts }, without)
}

/// The guest's RAM, as its configuration gives it.
const RAM: u64 = 512 << 20;

fn memory(bench: &Bench, readings: &mut Readings, parts: Parts<'_>, without: &str) -> Result<()> {
    let mut omega = Omega::start(bench, parts)?;
    omega.first_entry()?;
    std::thread::sleep(Duration::from_millis(300));
    let held = smaps::held(omega.pid(), RAM)?;
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let note = format!(
        "proportional set size beside the guest's RAM, a micro-guest that halts, {without}; resident {:.1} MiB",
        mib(held.rss)
    );
    readings.add(Reading::beside("start.memory", mib(held.pss), 5.0).note(note));
    Ok(())
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// What no VMM can do without: a process, and the machine that KVM makes.
fn bare_kvm() -> Result<Duration> {
    let start = Instant::now();
    Command::new("/bin/true").status()?;
    let vm = Kvm::new()?.create_vm()?;
    vm.create_irq_chip()?;
    vm.create_pit2(kvm_bindings::kvm_pit_config::default())?;
    let _vcpu = vm.create_vcpu(0)?;
    Ok(start.elapsed())
}

/// A TAP interface that goes away when it is dropped.
struct Tap;

impl Tap {
    fn new() -> Option<Self> {
        let made = Command::new("ip").args(["tuntap", "add", TAP, "mode", "tap"]).output().ok()?;
        made.status.success().then_some(Self)
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["link", "delete", TAP]).output();
    }
}
