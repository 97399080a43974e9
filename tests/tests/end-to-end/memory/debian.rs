//! Debian with most of its memory on other PCs.

use anyhow::{Context, Result, ensure};
use lab::Guest;
use lab::guest::PATIENCE;
use lab::scene::Scene;

use super::stored;

pub(super) fn debian_compiles_while_a_helper_dies() -> Result<()> {
    let scene = Scene::with_debian_and_lenders("memory-debian", 1)?;
    scene.lend(&[("root", "/dev/vdb")], "512M")?;
    let second = &scene.lenders[0];
    // A quarter of its RAM is here at most, and the other PCs have room for all of it, twice.
    let guest = Guest::debian("debian")
        .cpus(2)
        .memory("448M")
        .paged("112M", "on_loss = \"mirror\"")
        .memory_helper(&scene.agent(), "helper", "448M")
        .memory_helper(&second.address(), "helper2", "448M")
        .remote_disk(&scene.agent(), "root", "")
        .start(&scene.console)?;
    guest.log_in().context("The boot")?;
    let compile = |program: &str| format!("gcc -pthread -o /tmp/{program} /usr/src/omega-pattern.c");
    guest.shell(&compile("before"))?;

    // The compiler goes first: what the checker looks at is elsewhere most of the time anyway.
    guest.shell(": >/tmp/said; nice /tmp/before 56 2 1000000 >>/tmp/said 2>&1 & echo $! >/tmp/pid")?;
    // The checker says nothing but its rounds, unless something is wrong.
    let go_on = |more: usize| {
        let wait = format!(
            "rounds() {{ grep -c 'round ' /tmp/said; }}; want=$(($(rounds) + {more})); \
             while kill -0 $(cat /tmp/pid) && [ $(rounds) -lt $want ]; do sleep 2; done; \
             grep -v 'round ' /tmp/said; [ $(rounds) -ge $want ]"
        );
        let said = guest.shell_for(&wait, PATIENCE)?;
        ensure!(said.is_empty(), "{said}");
        Ok(())
    };
    go_on(1)?;
    for pc in [&scene.helper, second] {
        let bytes = stored(pc)?;
        println!("{} keeps {} MiB", pc.name(), bytes >> 20);
        ensure!(bytes > 112 << 20, "{} keeps {bytes} bytes only", pc.name());
    }

    // In the middle of all this the second PC loses its power.
    guest.types(&format!("({}; echo $? >/tmp/compiled) >/tmp/errors 2>&1 &\n", compile("during")))?;
    guest.shell("until pgrep cc1 || [ -e /tmp/compiled ]; do sleep 0.2; done")?;
    second.kill();
    let compiled = "until [ -e /tmp/compiled ]; do sleep 0.5; done; [ $(cat /tmp/compiled) = 0 ] || { cat /tmp/errors; false; }";
    guest.shell(compiled)?;
    // All of the last of these rounds is after that.
    go_on(2)?;
    guest.shell("cmp /tmp/before /tmp/during && kill $(cat /tmp/pid)")?;
    let last = guest.shell("/tmp/during 4 2 2 | tail -n 1")?;
    ensure!(last.starts_with("omega-pattern: ok"), "{last}");
    let complaints = guest.shell(
        "dmesg | grep -i -E 'bug:|oops|segfault|corrupt|bad page|i/o error|hung task|stall' || true",
    )?;
    ensure!(complaints.is_empty(), "the kernel complains: {complaints}");
    guest.types("systemctl poweroff\n")?;
    let output = guest.wait()?;
    ensure!(output.code == 0, "power-off: exit code {}\n{}", output.code, output.all());
    Ok(())
}
