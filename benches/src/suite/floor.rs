//! The floors on their own, and the peers beside each other.

use anyhow::Result;

use crate::bench::{Bench, Readings, Suite};
use crate::figure::{Reading, Spec};
use crate::floor::file::{self, Reads};
use crate::floor::tcp::{PingPong, Stream};
use crate::peer::nbd::{Nbd, Server};
use crate::stats::{median, rate};

const fn floor(name: &'static str, unit: &'static str) -> Spec {
    Spec { name, unit, baseline: "", target: None }
}

/// See the [module](self).
pub const SUITE: Suite = Suite {
    name: "floor",
    specs: &[
        floor("floor.tcp_round_trip_4k", "us"),
        floor("floor.tcp_stream_1m", "GB/s"),
        floor("floor.file_read_4k_cached", "us"),
        floor("floor.file_read_4k_direct", "us"),
        floor("floor.qemu_nbd_read_4k_depth1", "us"),
        floor("floor.qemu_nbd_read_4k_depth32", "IOPS"),
        floor("floor.qemu_nbd_read_1m", "GB/s"),
        floor("floor.nbdkit_read_4k_depth1", "us"),
        floor("floor.nbdkit_read_4k_depth32", "IOPS"),
        floor("floor.nbdkit_read_1m", "GB/s"),
    ],
    run,
};

fn run(bench: &Bench, readings: &mut Readings) -> Result<()> {
    let volume = file::make(bench.directory(), if bench.quick { 64 << 20 } else { 256 << 20 })?;
    let (mut pings, mut stream) = (PingPong::new(8, 4096)?, Stream::new(1 << 20)?);
    let mut cached = Reads::open(&volume, false)?;
    let mut direct = Reads::open(&volume, true).ok();
    let (mut ping, mut flow, mut read, mut read_direct) = (vec![], vec![], vec![], vec![]);
    for _ in 0..bench.rounds() {
        ping.push(median(&pings.run(bench.slice())?));
        flow.push(stream.run(bench.slice())? / 1e9);
        read.push(median(&cached.run(bench.slice())?));
        if let Some(times) = direct.as_mut().and_then(|direct| direct.run(bench.slice()).ok()) {
            read_direct.push(median(&times));
        }
    }
    readings.add(Reading::floor("floor.tcp_round_trip_4k", median(&ping)));
    readings.add(Reading::floor("floor.tcp_stream_1m", median(&flow)));
    readings.add(Reading::floor("floor.file_read_4k_cached", median(&read)));
    if read_direct.is_empty() {
        readings.missing("floor.file_read_4k_direct", "this file system knows no O_DIRECT");
    } else {
        readings.add(Reading::floor("floor.file_read_4k_direct", median(&read_direct)));
    }
    for (server, names) in [
        (
            Server::QemuNbd,
            ["floor.qemu_nbd_read_4k_depth1", "floor.qemu_nbd_read_4k_depth32", "floor.qemu_nbd_read_1m"],
        ),
        (
            Server::Nbdkit,
            ["floor.nbdkit_read_4k_depth1", "floor.nbdkit_read_4k_depth32", "floor.nbdkit_read_1m"],
        ),
    ] {
        if let Err(error) = peer(bench, readings, server, names, &volume) {
            for name in names {
                readings.missing(name, format!("{error:#}"));
            }
        }
    }
    Ok(())
}

fn peer(
    bench: &Bench,
    readings: &mut Readings,
    server: Server,
    [depth1, depth32, bulk]: [&'static str; 3],
    volume: &std::path::Path,
) -> Result<()> {
    let nbd = Nbd::start(server, volume)?;
    let count = if bench.quick { 4_000 } else { 20_000 };
    let (mut single, mut many, mut large) = (vec![], vec![], vec![]);
    for _ in 0..bench.rounds() {
        single.push(1e6 / rate(count, nbd.run(count, 1, 4096)?));
        many.push(rate(count * 2, nbd.run(count * 2, 32, 4096)?));
        large.push(rate((count / 20) << 20, nbd.run(count / 20, 8, 1 << 20)?) / 1e9);
    }
    readings.add(Reading::floor(depth1, median(&single)));
    readings.add(Reading::floor(depth32, median(&many)));
    readings.add(Reading::floor(bulk, median(&large)));
    Ok(())
}
