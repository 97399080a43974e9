//! A guest's disk over RDMA, between two PCs with soft-RoCE (`rdma_rxe`).

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lab::guest::Running;
use lab::pc::Pc;
use lab::scene::{Scene, wait_until};
use lab::{Guest, Output};

pub(crate) const TESTS: &[(&str, crate::Test)] = &[(
    "rdma::debian_runs_from_a_disk_over_rdma_while_rdma_is_cut_and_comes_back",
    debian_runs_from_a_disk_over_rdma,
)];

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(600);

/// What the log of `omega run` says when RDMA takes over.
const TAKES_OVER: &str = "carrier=rdma";

/// Times that RDMA is cut.
const CUTS: usize = 2;

/// Gives a PC a soft-RoCE device on its network card. `false`: this image's kernel has none.
fn soft_roce(pc: &Pc) -> Result<bool> {
    let done: Output = pc.run(
        "modprobe rdma_rxe && rdma link add rxe0 type rxe netdev $(ls /sys/class/net | grep -v -x lo | head -1) \
         && rdma link show",
    )?;
    if !done.success() {
        eprintln!("cannot run: this PC's kernel has no soft-RoCE: {}", done.all());
    }
    Ok(done.success())
}

/// Drops, or lets through, what RoCE sends. TCP is not touched.
fn cut(pc: &Pc, cut: bool) -> Result<()> {
    let command = if cut {
        "nft add table inet cut && nft add chain inet cut c '{ type filter hook input priority 0 ; }' && \
         nft add rule inet cut c udp dport 4791 counter drop"
    } else {
        "nft list table inet cut | grep counter; nft delete table inet cut"
    };
    let output = pc.run(command)?.ok()?;
    if !cut {
        println!("  RoCE packets dropped meanwhile: {}", output.trim());
    }
    Ok(())
}

/// How often the log of `omega run` says this.
fn times(guest: &Running, what: &str) -> usize {
    guest.process().errors_so_far().matches(what).count()
}

fn debian_runs_from_a_disk_over_rdma() -> Result<()> {
    let scene = Scene::with_debian("rdma")?;
    for pc in [&scene.console, &scene.helper] {
        if !soft_roce(pc)? {
            return Ok(());
        }
    }
    scene.helper.run("mkdir -p /srv/omega && truncate -s 16M /srv/omega/v.raw && sync")?.ok()?;
    scene.serve(&[("root", "/dev/vdb"), ("v", "/srv/omega/v.raw")])?;
    let start = Instant::now();
    let seconds = || start.elapsed().as_secs_f32();
    let guest = Guest::debian("rdma")
        .remote_disk(&scene.agent(), "root", "transport = \"rdma\"")
        .remote_disk(&scene.agent(), "v", "transport = \"rdma\"")
        .start(&scene.console)?;
    guest.log_in().context("The boot over RDMA")?;
    let both = || Ok(times(&guest, TAKES_OVER) >= 2);
    wait_until("RDMA on both disks", PATIENCE, both)?;
    println!("  {:.0} s: logged in, both disks over RDMA", seconds());

    // Run after run, each verified to its end, until it is told to stop.
    let fio = "fio --name=v --filename=/dev/vdb --size=8M --rw=randrw --bs=4k --bsrange=4k-128k --direct=1 \
               --ioengine=libaio --iodepth=8 --fsync=64 --verify=crc32c --verify_fatal=1 --do_verify=1 \
               --verify_backlog=256 --output-format=terse";
    guest.shell(&format!(
        "(while [ ! -e /run/stop ]; do {fio} >/run/fio.out 2>&1 || {{ echo failed >/run/code; exit; }}; echo >>/run/runs; \
         done; echo ok >/run/code) >/dev/null 2>&1 & echo started"
    ))?;
    let written = |guest: &Running| -> Result<u64> {
        let stat = guest.shell("awk '{print $5}' /sys/block/vdb/stat")?;
        stat.trim().parse().with_context(|| format!("the count of writes: {stat}"))
    };
    let goes_on = |what: &str| -> Result<()> {
        let before = written(&guest)?;
        wait_until(what, PATIENCE, || {
            ensure!(!guest.ended(), "the guest ended:\n{}", guest.console());
            Ok(written(&guest)? > before + 20)
        })
    };
    goes_on("Verified I/O over RDMA")?;
    for number in 1..=CUTS {
        let (lost, over) = (times(&guest, "The connection was lost"), times(&guest, TAKES_OVER));
        cut(&scene.helper, true)?;
        println!("  {:.0} s: cut {number}: RoCE is dropped", seconds());
        wait_until("The loss of RDMA is seen", PATIENCE, || {
            Ok(times(&guest, "The connection was lost") > lost)
        })?;
        goes_on("Verified I/O over TCP, without RDMA")?;
        ensure!(times(&guest, TAKES_OVER) == over, "RDMA took over though it was cut");
        println!("  {:.0} s: TCP took over, verified I/O goes on", seconds());
        cut(&scene.helper, false)?;
        wait_until("RDMA comes back", PATIENCE, || Ok(times(&guest, TAKES_OVER) > over))?;
        goes_on("Verified I/O over RDMA again")?;
        println!("  {:.0} s: RDMA is back, verified I/O goes on", seconds());
    }
    let end =
        "touch /run/stop; while [ ! -e /run/code ]; do sleep 0.5; done; cat /run/code; wc -l </run/runs";
    let ended = guest.shell(end)?;
    ensure!(ended.starts_with("ok"), "fio found something: {ended}: {}", guest.shell("cat /run/fio.out")?);
    let errors = guest
        .shell("dmesg | grep -i -E 'error|vd[ab].*(fail|reset|timeout)' | grep -v -i 'errors=' || true")?;
    ensure!(errors.is_empty(), "the guest's kernel complains: {errors}");
    let writes = written(&guest)?;
    guest.types("systemctl poweroff\n")?;
    let output = guest.wait()?;
    ensure!(output.code == 0, "power-off: exit code {}\n{}", output.code, output.all());
    println!(
        "  {CUTS} cuts under verified I/O, {writes} writes: none lost, no error in the guest, fio: {ended:?}"
    );
    let said = scene.helper.run("journalctl --no-pager -o cat -u omega-agent | grep -c 'carrier=rdma'")?;
    println!("  the agent saw RDMA take over {} times", said.text().trim());
    Ok(())
}
