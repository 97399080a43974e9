//! What is not there, not right or full: a clear line, and nothing lost.

use anyhow::{Result, ensure};
use lab::guest::PATIENCE;
use lab::images::Image;
use lab::initramfs::Initramfs;
use lab::scene::{Scene, start_agent, wait_until};
use lab::{Guest, Output};

pub(crate) const TESTS: &[(&str, crate::Test)] = &[
    ("mistakes::a_missing_agent_volume_or_lease_is_said_in_one_line", a_missing_agent_volume_or_lease),
    ("mistakes::a_volume_file_that_is_too_short_is_refused", a_volume_file_that_is_too_short_is_refused),
    (
        "mistakes::a_full_disk_under_the_agent_pauses_the_guests_writes_until_there_is_room",
        a_full_disk_under_the_agent,
    ),
];

/// It did not start, and said so in one line with these words.
pub(crate) fn refused(output: &Output, words: &[&str]) -> Result<()> {
    ensure!(output.code == 1 || output.code == 2, "exit code {}: {}", output.code, output.all());
    let said: Vec<&str> = output.stderr.lines().filter(|line| line.starts_with("omega: ")).collect();
    ensure!(said.len() == 1, "not one line but {}: {}", said.len(), output.all());
    for word in words {
        ensure!(said[0].contains(word), "`{word}` is not in: {}", said[0]);
    }
    ensure!(!output.text().contains("omega-mini"), "a guest ran: {}", output.all());
    Ok(())
}

fn a_missing_agent_volume_or_lease() -> Result<()> {
    let scene = Scene::new("missing", None)?;
    let mini =
        |volume: &str, more: &str| Guest::mini("mini", "hang").remote_disk(&scene.agent(), volume, more);

    refused(&mini("v", "").run(&scene.console)?, &[&scene.agent()])?;

    scene.serve(&[("v", "/srv/omega/v.raw")])?;
    refused(&mini("w", "").run(&scene.console)?, &["no volume named w", "it serves v"])?;

    let holder = mini("v", "").start(&scene.console)?;
    holder.expect("omega-mini: hanging")?;
    let second = Guest::mini("second", "hang").remote_disk(&scene.agent(), "v", "");
    refused(&second.run(&scene.console)?, &["volume v", "leased"])?;
    ensure!(!holder.ended(), "the holder lost its volume: {}", holder.console());
    scene.console.run("omega stop --force mini")?.ok()?;
    holder.wait()?;
    let next = Guest::mini("second", "write").remote_disk(&scene.agent(), "v", "").run(&scene.console)?;
    ensure!(
        next.code == 0 && next.text().contains("omega-mini: ok: write"),
        "after the holder's end: {}",
        next.all()
    );
    Ok(())
}

fn a_volume_file_that_is_too_short_is_refused() -> Result<()> {
    let scene = Scene::new("short", None)?;
    scene.helper.run("mkdir -p /srv/omega && head -c 700 /dev/urandom >/srv/omega/short.raw")?.ok()?;
    scene.serve(&[("v", "/srv/omega/v.raw")])?;
    scene.helper.run("cp /etc/omega/agent.toml /root/good.toml")?.ok()?;
    let bad = "printf '\\n[[volume]]\\nname = \"short\"\\npath = \"/srv/omega/short.raw\"\\n' >>/etc/omega/agent.toml";
    scene.helper.run(bad)?.ok()?;
    scene.helper.run("systemctl restart omega-agent")?;
    let said =
        scene.helper.run("journalctl --no-pager -o cat -u omega-agent; omega-agent validate 2>&1")?.text();
    let refused =
        Guest::mini("mini", "disks").remote_disk(&scene.agent(), "short", "").run(&scene.console)?;
    ensure!(refused.code != 0, "a guest has a disk of 700 bytes: {}", refused.all());
    ensure!(said.contains("short"), "the agent says nothing of it: {said}");
    scene.helper.run("cp /root/good.toml /etc/omega/agent.toml")?.ok()?;
    start_agent(&scene.helper)?;

    // A file that shrinks while it is served: reads behind its end are errors, not zeros.
    let guest =
        Guest::mini("mini", "button,disks").remote_disk(&scene.agent(), "v", "").start(&scene.console)?;
    guest.expect("omega-mini: waiting")?;
    scene.helper.run("truncate -s 1M /srv/omega/v.raw")?.ok()?;
    guest.signal(libc::SIGTERM)?;
    guest.expect("omega-mini: failed: disk vda cannot be read")?;
    guest.wait().map(drop)
}

fn a_full_disk_under_the_agent() -> Result<()> {
    let scene = Scene::new("full", None)?;
    // A sparse volume of 64 MiB on a file system of 24 MiB, half of which something else fills.
    let helper = &scene.helper;
    helper
        .run(
            "truncate -s 24M /root/small && mkfs.ext4 -q -m 0 /root/small && mkdir -p /srv/omega && \
             mount -o loop /root/small /srv/omega && truncate -s 64M /srv/omega/v.raw && \
             head -c 10M /dev/urandom >/srv/omega/other",
        )?
        .ok()?;
    scene.serve(&[("v", "/srv/omega/v.raw")])?;
    let script = "#!/bin/sh\n\
        dd if=/dev/zero bs=64k count=32 | tr '\\0' A >/run/a\n\
        dd if=/dev/urandom bs=64k count=192 of=/run/b\n\
        dd if=/run/a of=/dev/vda bs=64k conv=fsync || exit 1\n\
        dd if=/run/b of=/dev/vda bs=64k seek=32 conv=fsync || exit 2\n\
        echo 3 >/proc/sys/vm/drop_caches\n\
        dd if=/dev/vda bs=64k count=32 | cmp - /run/a || exit 3\n\
        dd if=/dev/vda bs=64k skip=32 count=192 | cmp - /run/b || exit 4\n";
    let initrd = Initramfs::from_file(&Image::get("mini")?.file("initrd"))?
        .file("lab/run", 0o755, script.as_bytes())
        .finish();
    scene.console.put_bytes(&initrd, "/images/full/initrd", 0o644)?;
    let guest = Guest::mini("mini", "run")
        .initrd("/images/full/initrd")
        .remote_disk(&scene.agent(), "v", "")
        .start(&scene.console)?;
    wait_until("`omega run` says that the agent's disk is full", PATIENCE, || {
        ensure!(!guest.ended(), "the guest ended: {}", guest.wait()?.all());
        Ok(guest.process().errors_so_far().contains("No space is left"))
    })?;
    ensure!(helper.run("systemctl is-active omega-agent")?.success(), "the agent ended");
    helper.run("rm /srv/omega/other")?.ok()?;
    let output = guest.wait()?;
    ensure!(output.code == 0 && output.text().contains("omega-mini: ok: run"), "{}", output.all());
    ensure!(!output.text().contains("I/O error"), "the guest met an error: {}", output.all());
    Ok(())
}
