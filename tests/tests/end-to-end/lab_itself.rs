//! The lab keeps its own promises.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use lab::Lab;

pub(crate) const TESTS: &[(&str, crate::Test)] = &[
    ("lab::commands_and_files_come_back_as_they_went", commands_and_files_come_back_as_they_went),
    ("lab::links_are_cut_delayed_and_healed", links_are_cut_delayed_and_healed),
    ("lab::a_frozen_pc_goes_on_where_it_stopped", a_frozen_pc_goes_on_where_it_stopped),
    (
        "lab::a_power_cut_loses_what_was_not_synced_and_no_more",
        a_power_cut_loses_what_was_not_synced_and_no_more,
    ),
];

fn commands_and_files_come_back_as_they_went() -> Result<()> {
    let lab = Lab::new("commands")?;
    let lan = lab.network("lan");
    let [a, b] = lab.start([lab.pc("a").on(&lan), lab.pc("b").on(&lan)])?;
    let output = a.run("echo out; echo err >&2; exit 7")?;
    ensure!((output.code, output.text().as_str(), output.stderr.trim()) == (7, "out", "err"), "{output:?}");
    ensure!(a.run("kill -9 $$")?.code == -9, "a signal is told from an exit code");
    let content: Vec<u8> = (0..3_000_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    a.put_bytes(&content, "/tmp/content", 0o600)?;
    ensure!(a.get("/tmp/content")? == content, "a file came back changed");
    let cat = a.spawn("cat; echo end")?;
    cat.write(b"typed\n")?;
    cat.expect("typed", Duration::from_secs(60))?;
    cat.close_stdin()?;
    ensure!(cat.wait(Duration::from_secs(60))?.text() == "typed\nend");
    // Both came from one snapshot, and yet they are two PCs.
    let random = "od -An -N16 -tx1 /dev/urandom; hostname; cat /sys/class/net/eth0/address";
    let (of_a, of_b) = (a.run(random)?.ok()?, b.run(random)?.ok()?);
    ensure!(of_a.lines().zip(of_b.lines()).all(|(x, y)| x != y), "{of_a}\n{of_b}");
    ensure!(a.run("grep -c -w svm /proc/cpuinfo; test -c /dev/kvm")?.success(), "a PC has KVM");
    Ok(())
}

fn links_are_cut_delayed_and_healed() -> Result<()> {
    let lab = Lab::new("links")?;
    let lan = lab.network("lan");
    let [a, b] = lab.start([lab.pc("a").on(&lan), lab.pc("b").on(&lan)])?;
    let ping = |count: u32| a.run(&format!("ping -q -c {count} -i 0.2 -W 2 {}", b.address()));
    ping(1)?.ok()?;
    lan.cut("b");
    ensure!(!ping(2)?.success(), "a cut link passes pings");
    lan.heal("b");
    ping(1)?.ok()?;
    lan.delay("b", Duration::from_millis(100));
    let slow = ping(3)?.ok()?;
    let least = slow.rsplit("= ").next().and_then(|times| times.split('/').next()?.parse::<f64>().ok());
    ensure!(least.is_some_and(|ms| ms >= 200.0), "100 ms each way: {slow}");
    Ok(())
}

fn a_frozen_pc_goes_on_where_it_stopped() -> Result<()> {
    let lab = Lab::new("freeze")?;
    let lan = lab.network("lan");
    let [a, b] = lab.start([lab.pc("a").on(&lan), lab.pc("b").on(&lan)])?;
    let counter = b.spawn("i=0; while :; do i=$((i+1)); echo $i; sleep 0.1; done")?;
    counter.expect("\n5\n", Duration::from_secs(60))?;
    b.freeze()?;
    ensure!(!a.run(&format!("ping -c 1 -W 2 {}", b.address()))?.success(), "a frozen PC answers");
    let then = counter.so_far().len();
    std::thread::sleep(Duration::from_millis(500));
    ensure!(counter.so_far().len() == then, "a frozen PC works");
    b.thaw()?;
    counter.expect("\n", Duration::from_secs(60))?;
    a.run(&format!("ping -c 1 -W 60 {}", b.address()))?.ok()?;
    counter.signal(9)
}

fn a_power_cut_loses_what_was_not_synced_and_no_more() -> Result<()> {
    let lab = Lab::new("power")?;
    let pc = lab.pc("pc").start()?;
    pc.run("echo kept >/root/kept; sync; echo lost >/root/lost")?.ok()?;
    let boot = "cat /proc/sys/kernel/random/boot_id";
    let before = pc.run(boot)?.ok()?;
    let waiting = pc.spawn("sleep 1000")?;
    pc.kill();
    ensure!(waiting.wait(Duration::from_secs(10)).is_err(), "a command ended well in a PC without power");
    ensure!(pc.run("true").is_err(), "a PC without power runs commands");
    let start = Instant::now();
    pc.start()?;
    println!("booted in {:.1} s", start.elapsed().as_secs_f32());
    ensure!(pc.run(boot)?.ok()? != before, "it is the same boot");
    ensure!(pc.run("cat /root/kept")?.ok()? == "kept");
    ensure!(!pc.run("test -e /root/lost")?.success(), "what was only in its memory is there");
    Ok(())
}
