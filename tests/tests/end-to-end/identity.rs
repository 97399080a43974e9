//! Who is not of the household can do nothing, who no longer is cannot go on, and who is renewed goes on.

use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use lab::guest::PATIENCE;
use lab::images::own_binary;
use lab::scene::{Role, Scene, install_image, install_omega, join, start_agent, wait_until};
use lab::{Guest, Pc};

pub(crate) const TESTS: &[(&str, crate::Test)] = &[
    (
        "identity::a_node_without_a_certificate_of_the_household_can_do_nothing",
        a_node_without_a_certificate_can_do_nothing,
    ),
    (
        "identity::a_console_that_is_revoked_while_its_guest_runs_is_cut_and_can_do_nothing_more",
        a_console_that_is_revoked_is_cut,
    ),
    (
        "identity::an_agents_identity_is_renewed_while_its_guest_runs",
        an_agents_identity_is_renewed_while_its_guest_runs,
    ),
    ("identity::a_token_works_once", a_token_works_once),
    ("identity::policy_refuses_with_the_reason_in_both_logs", policy_refuses_with_the_reason_in_both_logs),
];

/// Every kind of request, as `lab-prober` names them.
const KINDS: usize = 12;
const PROBER: &str = "/usr/bin/lab-prober";

fn install_prober(pc: &Pc) -> Result<()> {
    pc.put(&own_binary("lab-prober")?, PROBER, 0o755)
}

/// What the prober says, a line for each kind of request.
fn probe(pc: &Pc, scene: &Scene, who: &str) -> Result<Vec<String>> {
    let said = pc.run(&format!("{PROBER} {}:7420 v {who}", scene.agent()))?.ok()?;
    Ok(said.lines().map(str::to_owned).collect())
}

/// Nobody of these was even asked what it wants.
fn nothing(who: &str, said: &[String], expected: usize) -> Result<()> {
    ensure!(said.len() == expected, "{who}: {} kinds of request instead of {expected}: {said:?}", said.len());
    for line in said {
        ensure!(line.contains(" unanswered: "), "{who}: {line}");
    }
    Ok(())
}

/// The lease of volume `v` as the agent stores it: epoch and holder.
fn lease(helper: &Pc) -> Result<String> {
    let table = helper.run("cat /var/lib/omega-agent/leases.json")?.ok()?;
    let number = |key: &str| {
        let rest =
            table.split(&format!("\"{key}\": ")).nth(1).with_context(|| format!("no {key} in {table}"))?;
        Ok::<_, anyhow::Error>(
            rest.split([',', '\n']).next().unwrap_or_default().trim_matches('"').to_owned(),
        )
    };
    Ok(format!("{} {}", number("epoch")?, number("id")?))
}

fn a_node_without_a_certificate_can_do_nothing() -> Result<()> {
    let scene = Scene::new("strangers", None)?;
    let (console, helper) = (&scene.console, &scene.helper);
    scene.serve(&[("v", "/srv/omega/v.raw")])?;
    install_prober(console)?;
    helper.run("head -c 64K /dev/urandom | dd of=/srv/omega/v.raw conv=notrunc status=none")?.ok()?;
    // First that the prober finds out: the household's console may do everything.
    let said = probe(console, &scene, "as /etc/omega/identity")?;
    ensure!(said.len() == KINDS && said.iter().all(|line| line.ends_with(" answered")), "{said:#?}");

    // A guest holds the volume; the strangers even know its lease.
    let guest =
        Guest::mini("mini", "button,write,poweroff").remote_disk(&scene.agent(), "v", "").start(console)?;
    guest.expect("omega-mini: waiting for the power button")?;
    let lease = lease(helper)?;
    let sum = || helper.run("sync; sha256sum </srv/omega/v.raw")?.ok();
    let before = sum()?;
    // Another household, whose names are the same.
    console.run("omega ca init --name other --node console --identity /root/other/identity")?.ok()?;
    for (who, kinds) in [
        (format!("plain {lease}"), KINDS),
        ("bare /etc/omega/identity/ca.pem".to_owned(), 1),
        (format!("as /root/other/identity {lease}"), KINDS),
    ] {
        nothing(&who, &probe(console, &scene, &who)?, kinds)?;
    }
    ensure!(sum()? == before, "the volume was changed");
    let log = helper.run("journalctl --no-pager -o cat -u omega-agent")?.ok()?;
    ensure!(!log.contains("prober (node") || log.matches("prober (node").count() < KINDS, "{log}");
    // Nobody took the lease either.
    guest.signal(libc::SIGTERM)?;
    guest.expect("omega-mini: ok: write")?;
    let output = guest.wait()?;
    ensure!(output.code == 0, "{}", output.all());
    Ok(())
}

/// A third PC that joins as a console.
fn laptop(scene: &Scene) -> Result<Arc<Pc>> {
    let laptop = scene.lab.pc("laptop").on(&scene.lan).start()?;
    install_omega(&laptop)?;
    install_image(&laptop, &lab::images::Image::get("mini")?, "mini")?;
    join(&scene.console, &laptop, "laptop", Role::Console)?;
    Ok(laptop)
}

fn a_console_that_is_revoked_is_cut() -> Result<()> {
    let scene = Scene::new("revoked", None)?;
    let helper = &scene.helper;
    scene.serve(&[("v", "/srv/omega/v.raw")])?;
    let laptop = laptop(&scene)?;
    install_prober(&laptop)?;
    let guest =
        Guest::mini("mini", "button,write,poweroff").remote_disk(&scene.agent(), "v", "").start(&laptop)?;
    guest.expect("omega-mini: waiting for the power button")?;
    let lease = lease(helper)?;
    ensure!(helper.run("cat /var/lib/omega-agent/leases.json")?.ok()?.contains("\"node\": \"laptop\""));

    let told = scene.console.run("omega node revoke laptop")?.ok()?;
    ensure!(told.contains("helper") && told.contains("knows it"), "the agent was not told: {told}");
    wait_until("`omega run` says why its disk waits", PATIENCE, || {
        ensure!(!guest.ended(), "the guest ended: {}", guest.wait()?.all());
        Ok(guest.process().errors_so_far().contains("revoked"))
    })?;
    let journal = || helper.run("journalctl --no-pager -o cat -u omega-agent")?.ok();
    ensure!(journal()?.contains("certificate was revoked"), "{}", journal()?);
    // The guest waits: it sees no error, and what it writes does not get there.
    guest.signal(libc::SIGTERM)?;
    // A reset by the agent's kernel may overtake a reason, on a slow PC. What was answered would fail at once.
    wait_until("every refusal tells the reason", PATIENCE, || {
        let said = probe(&laptop, &scene, &format!("as /etc/omega/identity {lease}"))?;
        nothing("revoked", &said, KINDS)?;
        Ok(said.iter().all(|line| line.contains("revoked")))
    })?;

    // Its lease expires as any other, and then the volume is somebody else's.
    let next = Guest::mini("next", "write").remote_disk(&scene.agent(), "v", "").run(&scene.console)?;
    ensure!(next.code == 0 && next.text().contains("omega-mini: ok: write"), "{}", next.all());
    ensure!(!guest.ended(), "the guest ended: {}", guest.wait()?.all());
    ensure!(!guest.console().contains("ok: write"), "the revoked guest wrote: {}", guest.console());

    // An agent that is started anew has not forgotten.
    helper.run("systemctl stop omega-agent")?.ok()?;
    start_agent(helper)?;
    nothing(
        "revoked, after a restart",
        &probe(&laptop, &scene, &format!("as /etc/omega/identity {lease}"))?,
        KINDS,
    )?;
    guest.end()
}

fn an_agents_identity_is_renewed_while_its_guest_runs() -> Result<()> {
    let scene = Scene::new("renewed", None)?;
    let (console, helper) = (&scene.console, &scene.helper);
    scene.serve(&[("v", "/srv/omega/v.raw")])?;
    let guest = Guest::mini("mini", "button,write,poweroff")
        .remote_disk(&scene.agent(), "v", "node = \"helper\"")
        .start(console)?;
    guest.expect("omega-mini: waiting for the power button")?;
    let serial = || {
        let list = console.run("omega node list --json")?.ok()?;
        Ok::<_, anyhow::Error>(list.matches("\"helper\"").count())
    };
    let before = serial()?;
    join(console, helper, "helper", Role::Agent)?;
    ensure!(serial()? == before + 1, "no new certificate was made");
    helper.run("systemctl reload omega-agent")?.ok()?;
    let journal = || helper.run("journalctl --no-pager -o cat -u omega-agent")?.ok();
    wait_until("the agent takes its new identity", PATIENCE, || {
        Ok(journal()?.contains("Looked at the identity"))
    })?;
    ensure!(!journal()?.contains("cannot be used"), "{}", journal()?);
    // The old connection goes on, and a new one meets the new certificate.
    ensure!(!guest.process().errors_so_far().contains("away"), "{}", guest.process().errors_so_far());
    helper.run("systemctl restart omega-agent")?.ok()?;
    guest.signal(libc::SIGTERM)?;
    guest.expect("omega-mini: ok: write")?;
    let output = guest.wait()?;
    ensure!(output.code == 0 && !output.text().contains("I/O error"), "{}", output.all());
    Ok(())
}

fn a_token_works_once() -> Result<()> {
    let scene = Scene::new("token", None)?;
    let laptop = scene.lab.pc("laptop").on(&scene.lan).start()?;
    install_omega(&laptop)?;
    let invitation = lab::scene::Invitation::new(&scene.console, "laptop", Role::Console)?;
    let joined = laptop.run(&format!("omega join {}", invitation.token))?.ok()?;
    ensure!(joined.contains("laptop"), "{joined}");
    ensure!(invitation.process.wait(PATIENCE)?.success(), "the invitation failed");
    let again = laptop.run(&format!("omega join --identity /root/again {}", invitation.token))?;
    ensure!(!again.success() && !laptop.run("test -e /root/again/node.pem")?.success(), "{}", again.all());
    let key = laptop.run("stat -c '%a %U' /etc/omega/identity/node.key /etc/omega/identity")?.ok()?;
    ensure!(key == "600 root\n700 root", "{key}");
    // The agent's is its service's own, and nobody else's.
    scene.serve(&[("v", "/srv/omega/v.raw")])?;
    let folder = "/var/lib/omega-agent/identity";
    let owners = "stat -Lc '%a %u' FOLDER FOLDER/node.key; stat -c '%u' /proc/$(systemctl show -P MainPID omega-agent)";
    let owners = scene.helper.run(&owners.replace("FOLDER", folder))?.ok()?;
    let lines: Vec<&str> = owners.lines().collect();
    let [folder, key, service] = lines.as_slice() else { bail!("{owners}") };
    ensure!(*service != "0", "the service runs as root");
    ensure!(*folder == format!("700 {service}") && *key == format!("600 {service}"), "{owners}");
    ensure!(scene.helper.run("stat -c '%a %u' /var/lib/private")?.ok()? == "700 0", "others may look in");
    Ok(())
}

fn policy_refuses_with_the_reason_in_both_logs() -> Result<()> {
    let scene = Scene::new("policy", None)?;
    let (console, helper) = (&scene.console, &scene.helper);
    scene.serve(&[("v", "/srv/omega/v.raw"), ("w", "/srv/omega/w.raw")])?;
    let allow = "printf '\\n[[allow]]\\nnodes = [\"console\"]\\nvolumes = [\"w\"]\\naccess = \"read\"\\n' >>/etc/omega/agent.toml";
    helper.run(&format!("{allow}; systemctl restart omega-agent"))?.ok()?;
    let guest =
        |volume: &str, steps: &str| Guest::mini("mini", steps).remote_disk(&scene.agent(), volume, "");
    let refused = guest("v", "hang").run(console)?;
    let why = "node console may not use volume v";
    ensure!(refused.code == 1 && refused.stderr.contains(why), "{}", refused.all());
    let journal = helper.run("journalctl --no-pager -o cat -u omega-agent")?.ok()?;
    ensure!(journal.contains(why), "{journal}");
    let writing = guest("w", "hang").run(console)?;
    ensure!(writing.code == 1 && writing.stderr.contains("is read-only"), "{}", writing.all());
    let reading = Guest::mini("mini", "disks")
        .with(&format!(
            "[[disk]]\nread_only = true\nremote = {{ agent = \"{}\", volume = \"w\" }}\n",
            scene.agent()
        ))
        .run(console)?;
    ensure!(reading.code == 0 && reading.text().contains("disk vda"), "{}", reading.all());
    // It is not even shown the other one; the agent's own administrator is.
    install_prober(console)?;
    let shown = console.run(&format!("{PROBER} {}:7420 v as /etc/omega/identity", scene.agent()))?.ok()?;
    ensure!(shown.contains("ACQUIRE refused 0x010a"), "{shown}");
    let all = helper.run("omega-agent volumes")?.ok()?;
    ensure!(all.lines().count() == 3, "{all}");
    Ok(())
}
