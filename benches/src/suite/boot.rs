//! How long a guest takes to its first user process, beside Debian's QEMU in the same lab PC.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use lab::images::Image;
use lab::scene::{install_image, install_omega};
use lab::{Lab, Pc};

use crate::bench::{Bench, Readings, Suite};
use crate::figure::{Reading, Spec, Target};
use crate::stats::median;

/// See the [module](self).
pub const SUITE: Suite = Suite {
    name: "boot",
    specs: &[Spec {
        name: "boot.first_process",
        unit: "s",
        baseline: "Debian's QEMU, the better of q35 and microvm",
        target: Some(Target::AtMost(0.8)),
    }],
    run,
};

const PATIENCE: Duration = Duration::from_secs(240);
/// The mini guest's first process says this.
const FIRST_PROCESS: &str = "omega-mini: userspace";
const CMDLINE: &str = "console=ttyS0 quiet omega.test=poweroff";

fn run(bench: &Bench, readings: &mut Readings) -> Result<()> {
    bench.program("omega")?;
    let lab = Lab::new("bench")?;
    let pc = lab.pc("bench").start().context("The lab PC does not start")?;
    install_omega(&pc)?;
    install_image(&pc, &Image::get("mini")?, "mini")?;
    let toml = format!(
        "name = 'bench'\nkernel = {{ image = '/images/mini/vmlinuz', initrd = '/images/mini/initrd', \
         cmdline = '{CMDLINE}' }}\nmemory.size = '192M'\n"
    );
    pc.put_bytes(toml.as_bytes(), "/root/bench.toml", 0o644)?;
    let qemu = |machine: &str| {
        format!(
            "exec qemu-system-x86_64 -M {machine} -accel kvm -cpu host -smp 1 -m 192 -nodefaults -no-user-config \
             -display none -no-reboot -serial stdio -kernel /images/mini/vmlinuz -initrd /images/mini/initrd \
             -append '{CMDLINE}'"
        )
    };
    let sides = [
        ("omega", "exec omega run /root/bench.toml".to_owned()),
        ("q35", qemu("q35")),
        ("microvm", qemu("microvm,rtc=on")),
    ];
    // Once each, so that all programs and files are in the PC's page cache and the kernel is unpacked.
    let mut first = None;
    let mut usable = Vec::new();
    for (name, command) in sides {
        match boot(&pc, &command) {
            Ok(time) if name == "omega" => {
                first = Some(time);
                usable.push((name, command, Vec::new()));
            }
            Ok(_) => usable.push((name, command, Vec::new())),
            Err(error) if name == "omega" => {
                return Err(error.context("omega run does not boot the mini guest"));
            }
            Err(error) => bench.progress(&format!("boot: QEMU's {name} cannot be measured: {error:#}")),
        }
    }
    for round in 0..if bench.quick { 1 } else { 3 } {
        bench.progress(&format!("boot: round {}", round + 1));
        for (_, command, times) in &mut usable {
            times.push(boot(&pc, command)?.as_secs_f64());
        }
    }
    let mut medians = usable.iter().map(|(name, _, times)| (*name, median(times)));
    let (_, own) = medians.next().context("nothing was measured")?;
    let peers: Vec<(&str, f64)> = medians.collect();
    let best = peers.iter().copied().min_by(|a, b| a.1.total_cmp(&b.1));
    let (best, time) = best.context("QEMU boots neither as q35 nor as microvm in the lab PC")?;
    let all = peers.iter().map(|(name, time)| format!("{name} {time:.2} s")).collect::<Vec<_>>().join(", ");
    let cold = first.unwrap_or_default().as_secs_f64();
    let note = format!(
        "1 vCPU, 192 MiB; {all} (taken: {best}); omega's first run, which unpacks the kernel: {cold:.2} s"
    );
    readings.add(Reading::beside("boot.first_process", own, time).note(note));
    Ok(())
}

/// From starting `command` in the PC to the guest's first process.
fn boot(pc: &Pc, command: &str) -> Result<Duration> {
    let start = Instant::now();
    let process = pc.spawn(command)?;
    process.expect(FIRST_PROCESS, PATIENCE)?;
    let time = start.elapsed();
    let output = process.wait(PATIENCE)?;
    if !output.success() {
        bail!("`{command}` ended with {}", output.all());
    }
    Ok(time)
}
