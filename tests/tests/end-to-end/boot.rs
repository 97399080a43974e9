//! Guests boot, restart and end as PCs do.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use lab::images::Image;
use lab::scene::{install_image, install_omega};
use lab::{Guest, Lab, Pc};

pub(crate) const TESTS: &[(&str, crate::Test)] = &[
    (
        "boot::guests_with_1_2_and_4_processors_reach_userspace",
        guests_with_1_2_and_4_processors_reach_userspace,
    ),
    ("boot::a_reboot_starts_the_guest_again", a_reboot_starts_the_guest_again),
    (
        "boot::two_processors_on_userspace_interrupt_controllers_work_and_reboot",
        two_processors_on_userspace_interrupt_controllers_work_and_reboot,
    ),
    ("boot::each_end_has_its_exit_code", each_end_has_its_exit_code),
    ("boot::sigterm_presses_the_power_button_and_a_second_one_ends_it", sigterm_presses_the_power_button),
    ("boot::two_guests_run_at_once_and_are_listed_paused_and_stopped", two_guests_run_at_once),
    ("boot::a_local_disk_is_read_written_and_protected", a_local_disk_is_read_written_and_protected),
    ("boot::an_ordinary_user_runs_a_guest", an_ordinary_user_runs_a_guest),
];

/// A lab with one PC that runs mini guests.
fn one_pc(name: &str) -> Result<(Arc<Pc>, Lab)> {
    let lab = Lab::new(name)?;
    let pc = lab.pc("pc").start()?;
    install_omega(&pc)?;
    install_image(&pc, &Image::get("mini")?, "mini")?;
    Ok((pc, lab))
}

fn guests_with_1_2_and_4_processors_reach_userspace() -> Result<()> {
    let (pc, _lab) = one_pc("processors")?;
    for cpus in [1, 2, 4] {
        let mut guest = Guest::mini("mini", "cpus,random").cpus(cpus);
        if cpus == 2 {
            // What guests on several PCs are compared with: all tests in a few seconds.
            guest = Guest::mini("mini", "cpus,random,litmus,ep").cpus(cpus);
            guest = guest.cmdline("omega.litmus=20000,1 omega.ep=2,16");
        }
        let output = guest.run(&pc)?;
        let console = output.text();
        ensure!(output.code == 0, "{cpus} processors: exit code {}\n{}", output.code, output.all());
        ensure!(console.contains(&format!("omega-mini: ok: cpus {cpus} worked {cpus}")), "{}", output.all());
        ensure!(console.contains("omega-mini: ok: random"), "{}", output.all());
        if cpus == 2 {
            sharing_is_as_promised(&console).with_context(|| output.all())?;
        }
        let up = console.split("userspace uptime=").nth(1).and_then(|rest| rest.split_whitespace().next());
        println!("{cpus} processors: userspace after {} s of the guest's time", up.context("no uptime")?);
    }
    Ok(())
}

/// Every litmus test was tried and found nothing, and the parallel program's sums are right.
fn sharing_is_as_promised(console: &str) -> Result<()> {
    let tests: Vec<_> = console.lines().filter(|line| line.contains(" forbidden=")).collect();
    ensure!(tests.len() == 13, "{} litmus tests instead of 13", tests.len());
    for test in &tests {
        let runs = test.split("runs=").nth(1).and_then(|rest| rest.split(' ').next()).context("no count")?;
        ensure!(runs.parse::<u64>()? > 0 && test.contains(" forbidden=0 "), "{test}");
        println!("{}", test.trim());
    }
    ensure!(console.contains("omega-litmus: ok: 13 tests on 2 processors"), "no end");
    let sums = console.lines().filter(|line| line.starts_with("omega-ep: ") && line.contains(" verified"));
    ensure!(sums.clone().count() == 3 && console.contains("omega-mini: ok: ep"), "the sums are wrong");
    sums.for_each(|line| println!("{}", line.trim()));
    Ok(())
}

fn a_reboot_starts_the_guest_again() -> Result<()> {
    let (pc, _lab) = one_pc("reboot")?;
    let guest = Guest::mini("mini", "reboot").start(&pc)?;
    for _ in 0..2 {
        guest.expect("omega-mini: userspace")?;
        guest.expect("omega-mini: rebooting")?;
    }
    guest.expect("omega-mini: userspace")?;
    guest.end()
}

fn two_processors_on_userspace_interrupt_controllers_work_and_reboot() -> Result<()> {
    let (pc, _lab) = one_pc("userspace-irq")?;
    let guest = Guest::mini("mini", "cpus,reboot").cpus(2).userspace_controllers().start(&pc)?;
    for _ in 0..2 {
        guest.expect("omega-mini: ok: cpus 2 worked 2")?;
        guest.expect("omega-mini: rebooting")?;
    }
    guest.expect("omega-mini: userspace")?;
    pc.run("omega pause mini && omega resume mini")?.ok()?;
    guest.expect("omega-mini: ok: cpus 2 worked 2")?;
    guest.end()
}

fn each_end_has_its_exit_code() -> Result<()> {
    let (pc, _lab) = one_pc("exit-codes")?;
    let exit = "[on]\nreboot = \"exit\"";
    for (what, guest, code) in [
        ("power-off", Guest::mini("mini", "poweroff"), 0),
        ("reboot", Guest::mini("mini", "reboot").with(exit), 10),
        ("panic", Guest::mini("mini", "panic"), 11),
        ("triple fault", Guest::mini("mini", "reboot").cmdline("reboot=triple"), 12),
    ] {
        let output = guest.run(&pc)?;
        ensure!(output.code == code, "{what}: exit code {} instead of {code}\n{}", output.code, output.all());
    }
    Ok(())
}

fn sigterm_presses_the_power_button() -> Result<()> {
    let (pc, _lab) = one_pc("sigterm")?;
    let guest = Guest::mini("mini", "button,poweroff").start(&pc)?;
    guest.expect("omega-mini: waiting for the power button")?;
    guest.signal(libc::SIGTERM)?;
    guest.expect("omega-mini: ok: the power button was pressed")?;
    let output = guest.wait()?;
    ensure!(output.code == 0, "after one SIGTERM: exit code {}\n{}", output.code, output.all());

    let guest = Guest::mini("mini", "hang").start(&pc)?;
    guest.expect("omega-mini: hanging")?;
    guest.signal(libc::SIGTERM)?;
    // Two signals of one kind are one until the first was taken.
    guest.says("power button")?;
    ensure!(!guest.ended(), "one SIGTERM ended a guest that does not listen to its power button");
    guest.signal(libc::SIGTERM)?;
    let output = guest.wait()?;
    ensure!(output.code == 13, "after two SIGTERM: exit code {}\n{}", output.code, output.all());
    Ok(())
}

fn two_guests_run_at_once() -> Result<()> {
    let (pc, _lab) = one_pc("two-guests")?;
    let first = Guest::mini("first", "hang").memory("128M").start(&pc)?;
    let second = Guest::mini("second", "button").memory("128M").start(&pc)?;
    first.expect("omega-mini: hanging")?;
    second.expect("omega-mini: waiting for the power button")?;
    let listed = pc.run("omega ps --json")?.ok()?;
    ensure!(listed.contains("\"first\"") && listed.contains("\"second\""), "{listed}");
    let again = pc.run("omega run /root/first.toml </dev/null")?;
    ensure!(
        again.code != 0 && again.stderr.contains("first"),
        "a second guest of that name: {}",
        again.all()
    );
    pc.run("omega pause second")?.ok()?;
    ensure!(pc.run("omega status second --json")?.ok()?.contains("paused"), "it is not paused");
    pc.run("omega resume second")?.ok()?;
    pc.run("omega stop second")?.ok()?;
    second.expect("omega-mini: ok: the power button was pressed")?;
    ensure!(second.wait()?.code == 0, "stopped: {}", second.console());
    pc.run("omega stop --force first")?.ok()?;
    ensure!(first.wait()?.code == 13, "forced: {}", first.console());
    ensure!(!pc.run("omega ps --json")?.ok()?.contains("first"), "guests that ended are listed");
    Ok(())
}

fn a_local_disk_is_read_written_and_protected() -> Result<()> {
    let (pc, _lab) = one_pc("local-disk")?;
    pc.run("head -c 8M /dev/urandom >/root/a.raw; cp /root/a.raw /root/b.raw")?.ok()?;
    let sum = pc.run("sha256sum </root/a.raw")?.ok()?;
    let guest = Guest::mini("mini", "disks,write")
        .cpus(2)
        .disk("/root/a.raw")
        .with("[[disk]]\npath = \"/root/b.raw\"\nread_only = true\nserial = \"second\"\n");
    let output = guest.run(&pc)?;
    let text = output.text();
    let sum = sum.split_whitespace().next().unwrap_or_default();
    ensure!(text.contains("ro 1 serial second"), "the read-only disk: {text}");
    ensure!(
        text.matches(&format!("sha256 {sum}")).count() == 2,
        "the guest reads something else than {sum}: {text}"
    );
    ensure!(text.contains("omega-mini: ok: write") && output.code == 0, "{}", output.all());
    ensure!(!pc.run("cmp -s /root/a.raw /root/b.raw")?.success(), "nothing was written to the file");
    Ok(())
}

fn an_ordinary_user_runs_a_guest() -> Result<()> {
    let (pc, _lab) = one_pc("user")?;
    pc.run("useradd -m -G kvm user")?.ok()?;
    pc.put_bytes(Guest::mini("mini", "poweroff").toml().as_bytes(), "/home/user/mini.toml", 0o644)?;
    let output = pc.run("setpriv --reuid user --regid user --init-groups env HOME=/home/user omega run /home/user/mini.toml </dev/null")?;
    ensure!(output.code == 0 && output.text().contains("omega-mini: powering off"), "{}", output.all());
    Ok(())
}
