//! A guest's disk on another PC.

use anyhow::{Context, Result, ensure};
use lab::Guest;
use lab::images::Image;
use lab::scene::{Role, Scene, install_agent, join, serve};

pub(crate) const TESTS: &[(&str, crate::Test)] = &[
    ("disk::debian_boots_from_the_second_pc_and_fio_verifies_its_disk", debian_boots_from_the_second_pc),
    ("disk::a_volume_on_the_second_pc_is_read_and_written", a_volume_on_the_second_pc_is_read_and_written),
    ("disk::the_agent_may_be_on_the_same_pc", the_agent_may_be_on_the_same_pc),
    ("disk::patience_that_ends_is_an_io_error_where_that_was_asked_for", patience_that_ends_is_an_io_error),
];

fn a_volume_on_the_second_pc_is_read_and_written() -> Result<()> {
    let scene = Scene::new("remote-disk", None)?;
    scene.helper.run("mkdir -p /srv/omega && head -c 8M /dev/urandom >/srv/omega/v.raw")?.ok()?;
    let sum = scene.helper.run("sha256sum </srv/omega/v.raw")?.ok()?;
    scene.serve(&[("v", "/srv/omega/v.raw")])?;
    let output = Guest::mini("mini", "disks,write")
        .cpus(2)
        .remote_disk(&scene.agent(), "v", "")
        .run(&scene.console)?;
    let text = output.text();
    ensure!(output.code == 0, "{}", output.all());
    let sum = sum.split_whitespace().next().unwrap_or_default();
    ensure!(
        text.contains(&format!("disk vda sectors 16384 ro 0 serial v sha256 {sum}")),
        "not {sum}: {}",
        output.all()
    );
    ensure!(text.contains("omega-mini: ok: write"), "{}", output.all());
    let after = scene.helper.run("sha256sum </srv/omega/v.raw")?.ok()?;
    ensure!(!after.starts_with(sum), "nothing was written to the volume");
    Ok(())
}

fn the_agent_may_be_on_the_same_pc() -> Result<()> {
    let scene = Scene::new("same-pc", None)?;
    install_agent(&scene.console)?;
    // The PC is two nodes: root's console, and the agent, whose service has an identity of its own.
    join(&scene.console, &scene.console, "console-disks", Role::Agent)?;
    serve(&scene.console, "127.0.0.1", &[("v", "/srv/omega/v.raw")])?;
    let output = Guest::mini("mini", "write")
        .remote_disk("127.0.0.1", "v", "node = \"console-disks\"")
        .run(&scene.console)?;
    ensure!(output.code == 0 && output.text().contains("omega-mini: ok: write"), "{}", output.all());
    Ok(())
}

fn patience_that_ends_is_an_io_error() -> Result<()> {
    let scene = Scene::new("patience", None)?;
    scene.serve(&[("v", "/srv/omega/v.raw")])?;
    let guest = Guest::mini("mini", "button,write,poweroff")
        .remote_disk(&scene.agent(), "v", "patience = \"5s\", on_timeout = \"error\"")
        .start(&scene.console)?;
    guest.expect("omega-mini: waiting for the power button")?;
    scene.lan.cut("helper");
    guest.signal(libc::SIGTERM)?;
    // Step by step, so that a failure says which one did not come.
    guest.says("Pressed the guest's power button")?;
    guest.expect("omega-mini: ok: the power button was pressed")?;
    guest.says("The connection was lost")?;
    guest.says("The agent is away")?;
    guest.expect("omega-mini: failed: write")?;
    scene.lan.heal("helper");
    let output = guest.wait()?;
    ensure!(output.code == 0, "{}", output.all());
    Ok(())
}

fn debian_boots_from_the_second_pc() -> Result<()> {
    let scene = Scene::with_debian("debian")?;
    scene.serve(&[("root", "/dev/vdb")])?;
    let debian = Guest::debian("debian").cpus(2).remote_disk(&scene.agent(), "root", "");

    let guest = debian.start(&scene.console)?;
    guest.log_in().context("The first boot")?;
    let kernel = guest.shell("uname -r")?;
    ensure!(kernel == Image::get("debian")?.kernel_version()?, "another kernel: {kernel}");
    ensure!(guest.shell("findmnt -no SOURCE /")? == "/dev/vda", "another root");
    let fio = "fio --name=verify --filename=/root/fio --size=16M --rw=randrw --bs=4k --bsrange=4k-64k --direct=1 \
               --ioengine=libaio --iodepth=16 --fsync=64 --verify=crc32c --verify_fatal=1 --do_verify=1 \
               --verify_backlog=512 --output-format=terse >/root/fio.out 2>&1 || { cat /root/fio.out; false; }";
    guest.shell(fio)?;
    guest.shell("echo written by the first boot >/root/kept; sync")?;
    let errors =
        guest.shell("dmesg | grep -i -E 'error|vda.*(fail|reset|timeout)' | grep -v -i 'errors=' || true")?;
    ensure!(errors.is_empty(), "the guest's kernel complains: {errors}");
    guest.types("systemctl poweroff\n")?;
    let output = guest.wait()?;
    ensure!(output.code == 0, "power-off: exit code {}\n{}", output.code, output.all());

    // Who powers off gives the lease back: the next start need not wait until it expires.
    let guest = debian.start(&scene.console)?;
    guest.log_in().context("The second boot")?;
    let said = guest.process().errors_so_far();
    ensure!(!said.contains("expires"), "the first run did not give its lease back: {said}");
    ensure!(guest.shell("cat /root/kept")? == "written by the first boot");
    guest.signal(libc::SIGTERM)?;
    let output = guest.wait()?;
    ensure!(output.code == 0, "SIGTERM: exit code {}\n{}", output.code, output.all());
    Ok(())
}
