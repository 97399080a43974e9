//! The guest's disks.

use std::fs;
use std::time::Duration;

use devices::disk::Disk;
use devices::disk::file::{Direct, FileDisk, Options as FileOptions};
use devices::disk::remote::{self, OnTimeout, Options as RemoteOptions};
use devices::virtio::blk::{self, Blk, OperationCounters};

use super::Error;
use super::assembly::Assembly;
use super::parts::Counters;
use crate::config::{self, Guest};

/// More request queues than this help no disk.
const MAX_QUEUES: u16 = 4;
/// How long an agent may take to hand a volume out: longer than a lease, whose last holder may be gone.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(40);

/// Opens every disk of `guest` and puts it on the PCI bus.
pub(super) fn add(assembly: &mut Assembly, guest: &Guest) -> Result<(), Error> {
    for (index, config) in guest.disk.iter().enumerate() {
        let (disk, more) = open(config, &guest.name).map_err(|why| Error::Disk { index, why })?;
        let queues = config.queues.unwrap_or(MAX_QUEUES.min(guest.cpu.count.into()));
        let serial = config.serial.clone().unwrap_or_default();
        let about = disk.describe();
        let blk = Blk::new(disk, &blk::Options { serial, queues });
        let counters = blk.counters();
        let counters: Counters = Box::new(move || {
            let mut all = blk_counters(&counters);
            all.extend(more());
            all
        });
        assembly.add_virtio(&format!("disk{index}"), about, Box::new(blk), Some(counters))?;
    }
    Ok(())
}

fn blk_counters(counters: &blk::Counters) -> Vec<(&'static str, u64)> {
    let mut all = Vec::new();
    let mut add = |names: [&'static str; 3], operation: &OperationCounters| {
        let now = operation.snapshot();
        all.extend(names.into_iter().zip([now.requests, now.bytes, now.errors]));
    };
    add(["reads", "read_bytes", "read_errors"], &counters.reads);
    add(["writes", "written_bytes", "write_errors"], &counters.writes);
    add(["flushes", "flushed_bytes", "flush_errors"], &counters.flushes);
    add(["discards", "discarded_bytes", "discard_errors"], &counters.discards);
    all
}

type Opened = (Box<dyn Disk>, Counters);

fn open(config: &config::Disk, guest: &str) -> Result<Opened, String> {
    match (&config.path, &config.remote) {
        (Some(path), None) => {
            let options = FileOptions {
                path: path.clone(),
                read_only: config.read_only,
                direct: if config.direct { Direct::On } else { Direct::Auto },
            };
            let disk = FileDisk::open(&options).map_err(|error| error.to_string())?;
            Ok((Box::new(disk), Box::new(Vec::new)))
        }
        (None, Some(remote)) => open_remote(remote, config.read_only, guest),
        _ => Err("give either `path` or `remote`".into()),
    }
}

fn open_remote(config: &config::RemoteDisk, read_only: bool, guest: &str) -> Result<Opened, String> {
    let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name = format!("{guest} on {}", host.trim());
    let options =
        RemoteOptions::new(&config.agent, &config.volume, &name).map_err(|error| error.to_string())?;
    let options = RemoteOptions {
        read_only,
        patience: config.patience.map(|span| span.0),
        on_timeout: match config.on_timeout {
            config::OnTimeout::Wait => OnTimeout::Wait,
            config::OnTimeout::Error => OnTimeout::Error,
        },
        ..options
    };
    let disk = remote::connect(options, CONNECT_TIMEOUT).map_err(|error| error.to_string())?;
    let counters = disk.counters();
    Ok((Box::new(disk), Box::new(move || remote_counters(&counters.snapshot()))))
}

fn remote_counters(now: &remote::Snapshot) -> Vec<(&'static str, u64)> {
    vec![
        ("sessions", now.sessions),
        ("resumptions", now.resumptions),
        ("cuts", now.cuts),
        ("rewritten", now.rewritten),
        ("background_flushes", now.background_flushes),
        ("agent_full", now.full),
        ("conflicts", now.conflicts),
        ("disk_errors", now.errors),
    ]
}
