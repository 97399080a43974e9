//! The guest's disks.

use std::sync::Arc;
use std::time::Duration;

use devices::disk::Disk;
use devices::disk::file::{Direct, FileDisk, Options as FileOptions};
use devices::disk::remote::{self, OnTimeout, Options as RemoteOptions};
use devices::virtio::blk::{self, Blk, OperationCounters};
use transport::identity::{Reloading, Security};
use transport::metrics::{Metrics, Snapshot};

use super::assembly::Assembly;
use super::parts::Counters;
use super::{Error, agents};
use crate::config::{self, Guest};

/// More request queues than this help no disk.
const MAX_QUEUES: u16 = 4;
/// How long an agent may take to hand a volume out: longer than a lease, whose last holder may be gone.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(40);

/// Opens every disk of `guest` and puts it on the PCI bus.
pub(super) fn add(
    assembly: &mut Assembly,
    guest: &Guest,
    identity: Option<&Arc<Reloading>>,
) -> Result<(), Error> {
    for (index, config) in guest.disk.iter().enumerate() {
        let (disk, more, peer) = open(config, guest, identity).map_err(|why| Error::Disk { index, why })?;
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
        peer.into_iter().for_each(|metrics| assembly.has_peer(metrics));
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

type Opened = (Box<dyn Disk>, Counters, Option<Arc<Metrics>>);

fn open(config: &config::Disk, guest: &Guest, identity: Option<&Arc<Reloading>>) -> Result<Opened, String> {
    match (&config.path, &config.remote) {
        (Some(path), None) => {
            let options = FileOptions {
                path: path.clone(),
                read_only: config.read_only,
                direct: if config.direct { Direct::On } else { Direct::Auto },
            };
            let mut disk = FileDisk::open(&options).map_err(|error| error.to_string())?;
            if guest.memory.local.is_some() || guest.placement().spans() {
                disk = disk.for_memory_that_moves();
            }
            Ok((Box::new(disk), Box::new(Vec::new), None))
        }
        (None, Some(remote)) => open_remote(remote, config.read_only, &guest.name, identity),
        _ => Err("give either `path` or `remote`".into()),
    }
}

fn open_remote(
    config: &config::RemoteDisk,
    read_only: bool,
    guest: &str,
    identity: Option<&Arc<Reloading>>,
) -> Result<Opened, String> {
    let name = agents::client(guest);
    let peer = config::Peer::from(config);
    let options =
        RemoteOptions::new(&config.agent, &config.volume, &name).map_err(|error| error.to_string())?;
    let security = agents::security(&peer, identity)?;
    if config.insecure {
        tracing::warn!(
            "INSECURE: volume {} of {} goes over plain TCP: whoever is on the network between may read and change it",
            config.volume,
            config.agent
        );
    }
    let node = matches!(security, Security::Tls(_)).then(|| peer.expected_node()).flatten();
    let options = RemoteOptions {
        security,
        node,
        read_only,
        patience: config.patience.map(|span| span.0),
        on_timeout: match config.on_timeout {
            config::OnTimeout::Wait => OnTimeout::Wait,
            config::OnTimeout::Error => OnTimeout::Error,
        },
        transport: agents::transport(&peer),
        ..options
    };
    let disk = remote::connect(options, CONNECT_TIMEOUT).map_err(|error| error.to_string())?;
    let (counters, metrics) = (disk.counters(), disk.metrics());
    let peer = Arc::clone(&metrics);
    let all = move || {
        let mut all = remote_counters(&counters.snapshot());
        all.extend(peer_counters(&peer.snapshot()));
        all
    };
    Ok((Box::new(disk), Box::new(all), Some(metrics)))
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
        ("over_rdma", u64::from(now.over_rdma)),
        ("rdma_switches", now.rdma_switches),
    ]
}

/// What only grows of what was counted with the agent; the command `peers` has all of it.
fn peer_counters(now: &Snapshot) -> Vec<(&'static str, u64)> {
    vec![
        ("peer_connects", now.connects),
        ("peer_losses", now.losses),
        ("peer_failed_attempts", now.failed_attempts),
        ("peer_sent_bytes", now.sent_bytes),
        ("peer_received_bytes", now.received_bytes),
        ("peer_replays", now.replays),
        ("peer_expired", now.expired()),
        ("peer_requests", now.series.iter().map(|series| series.latency.count).sum()),
    ]
}
