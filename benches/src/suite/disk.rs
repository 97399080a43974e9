//! The remote disk over loopback, without a guest: as a disk, through the queue of a virtio block device that
//! is driven directly, and with the device's own thread, where doorbells and interrupts wake threads as well
//! (a guest's are delivered by KVM).

use std::path::Path;

use anyhow::{Context, Result};
use devices::disk::Disk;
use devices::disk::remote::{self, Options};

use super::transport::{ANSWER_BYTES, REQUEST_BYTES};
use crate::agent::Agent;
use crate::bench::{Bench, Readings, Suite};
use crate::drive::{Direct, Load, Queued, Reader};
use crate::figure::{Reading, Spec, Target};
use crate::floor::file::{self, Reads};
use crate::floor::tcp::{PingPong, Stream};
use crate::peer::nbd::{Nbd, Server};
use crate::stats::{median, rate};

const FLOOR: &str = "bare TCP round trip + local read";
const NBD: &str = "the better of qemu-nbd and nbdkit";
const STREAM: &str = "bare TCP stream";

const fn info(name: &'static str, unit: &'static str, baseline: &'static str) -> Spec {
    Spec { name, unit, baseline, target: None }
}

const fn spec(name: &'static str, unit: &'static str, baseline: &'static str, target: Target) -> Spec {
    Spec { name, unit, baseline, target: Some(target) }
}

/// See the [module](self).
pub const SUITE: Suite = Suite {
    name: "disk",
    specs: &[
        spec("disk.direct.read_4k_depth1", "us", FLOOR, Target::AtMost(1.25)),
        spec("disk.direct.read_4k_depth32", "IOPS", NBD, Target::AtLeast(1.5)),
        spec("disk.direct.read_1m", "GB/s", STREAM, Target::AtLeast(0.7)),
        spec("disk.queue.read_4k_depth1", "us", FLOOR, Target::AtMost(1.25)),
        spec("disk.queue.read_4k_depth32", "IOPS", NBD, Target::AtLeast(1.5)),
        spec("disk.queue.read_1m", "GB/s", STREAM, Target::AtLeast(0.7)),
        info("disk.thread.read_4k_depth1", "us", FLOOR),
        info("disk.thread.read_4k_depth32", "IOPS", NBD),
        info("disk.thread.read_1m", "GB/s", STREAM),
    ],
    run,
};

const SINGLE: Load = Load { size: 4096, depth: 1, random: true };
const MANY: Load = Load { size: 4096, depth: 32, random: true };
const LARGE: Load = Load { size: 1 << 20, depth: 8, random: false };

fn run(bench: &Bench, readings: &mut Readings) -> Result<()> {
    let volume = file::make(bench.directory(), if bench.quick { 64 << 20 } else { 256 << 20 })?;
    let agent = Agent::start(bench, &volume, false)?;
    let mut direct = Direct::new(connect(&agent)?)?;
    let mut queue = Queued::inline(connect(&agent)?)?;
    let mut thread = Queued::threaded(connect(&agent)?);
    let mut sides: [(&mut dyn Reader, [&'static str; 3]); 3] = [
        (&mut direct, ["disk.direct.read_4k_depth1", "disk.direct.read_4k_depth32", "disk.direct.read_1m"]),
        (&mut queue, ["disk.queue.read_4k_depth1", "disk.queue.read_4k_depth32", "disk.queue.read_1m"]),
        (&mut thread, ["disk.thread.read_4k_depth1", "disk.thread.read_4k_depth32", "disk.thread.read_1m"]),
    ];
    latency(bench, readings, &mut sides, &volume)?;
    throughput(bench, readings, &mut sides)?;
    operations(bench, readings, &mut sides, &volume)
}

type Sides<'a> = [(&'a mut dyn Reader, [&'static str; 3])];

fn connect(agent: &Agent) -> Result<Box<dyn Disk>> {
    let mut options = Options::new(agent.address(), "bench", "bench")?;
    options.read_only = true;
    Ok(Box::new(remote::connect(options, std::time::Duration::from_secs(10))?))
}

fn latency(bench: &Bench, readings: &mut Readings, sides: &mut Sides<'_>, volume: &Path) -> Result<()> {
    let mut ping = PingPong::new(REQUEST_BYTES, ANSWER_BYTES + 4096)?;
    let mut local = Reads::open(volume, false)?;
    let (mut floor, mut times) = (Vec::new(), vec![Vec::new(); sides.len()]);
    for _ in 0..bench.rounds() {
        floor.push(median(&ping.run(bench.slice())?) + median(&local.run(bench.slice() / 4)?));
        for ((side, _), times) in sides.iter_mut().zip(&mut times) {
            times.push(median(&side.run(SINGLE, bench.slice())?.times));
        }
    }
    for ((_, names), times) in sides.iter().zip(&times) {
        readings.add(Reading::beside(names[0], median(times), median(&floor)));
    }
    Ok(())
}

fn throughput(bench: &Bench, readings: &mut Readings, sides: &mut Sides<'_>) -> Result<()> {
    let mut stream = Stream::new(1 << 20)?;
    let (mut floor, mut rates) = (Vec::new(), vec![Vec::new(); sides.len()]);
    for _ in 0..bench.rounds() {
        floor.push(stream.run(bench.slice())? / 1e9);
        for ((side, _), rates) in sides.iter_mut().zip(&mut rates) {
            rates.push(side.run(LARGE, bench.slice())?.rate() * f64::from(1 << 20) / 1e9);
        }
    }
    for ((_, names), rates) in sides.iter().zip(&rates) {
        readings.add(Reading::beside(names[2], median(rates), median(&floor)));
    }
    Ok(())
}

fn operations(bench: &Bench, readings: &mut Readings, sides: &mut Sides<'_>, volume: &Path) -> Result<()> {
    let servers = [Server::QemuNbd, Server::Nbdkit];
    let peers: Vec<(Server, Nbd)> =
        servers.into_iter().filter_map(|server| Some((server, Nbd::start(server, volume).ok()?))).collect();
    let count = if bench.quick { 10_000 } else { 40_000 };
    let (mut others, mut rates) = (vec![Vec::new(); peers.len()], vec![Vec::new(); sides.len()]);
    for _ in 0..bench.rounds() {
        for ((_, peer), rates) in peers.iter().zip(&mut others) {
            rates.push(rate(count, peer.run(count, 32, 4096)?));
        }
        for ((side, _), rates) in sides.iter_mut().zip(&mut rates) {
            rates.push(side.run(MANY, bench.slice())?.rate());
        }
    }
    let medians = peers.iter().zip(&others).map(|((server, _), rates)| (*server, median(rates)));
    let best = medians.max_by(|a, b| a.1.total_cmp(&b.1));
    let (best, most) = best.context("neither qemu-nbd nor nbdkit can be started")?;
    for ((_, names), rates) in sides.iter().zip(&rates) {
        readings.add(
            Reading::beside(names[1], median(rates), most).note(format!("the better peer was {best:?}")),
        );
    }
    Ok(())
}
