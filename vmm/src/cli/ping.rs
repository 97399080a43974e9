//! `omega ping`: how far away an agent is, and what carries the way.

use std::fmt::Write as _;
use std::io;
use std::sync::Arc;

use devices::disk::remote::with_port;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use transport::identity::authority::Authority;
use transport::identity::{NodeName, Reloading, Security};
use transport::wire::{Class, MAX_PAYLOAD};

use super::human::{harmless, latency, mebibytes};
use super::{Failure, args, json, show};
use crate::config::Peer;
use crate::ping::{self, Measured, Options, Report};

/// More round trips of one class are a test, not a look.
const MOST: u32 = 1_000_000;

pub(super) fn ping(args: &args::Ping) -> Result<(), Failure> {
    let size = usize::try_from(args.size.0).unwrap_or(usize::MAX);
    if size > MAX_PAYLOAD {
        return Err(Failure::usage("--size is at most 1M: more is cut into several requests".to_owned()));
    }
    if !(1..=MOST).contains(&args.count) {
        return Err(Failure::usage(format!("--count is between 1 and {MOST}")));
    }
    if args.timeout.0.is_zero() {
        return Err(Failure::usage("--timeout: write a time that is longer than nothing".to_owned()));
    }
    let (address, security, node) = target(args)?;
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let options = Options {
        address,
        name: format!("omega ping on {}", host.trim()),
        security,
        node,
        classes: if args.classes.is_empty() { Class::ALL.to_vec() } else { classes(&args.classes) },
        count: args.count,
        size,
        pause: args.pause.0,
        bandwidth: args.bandwidth.0,
        timeout: args.timeout.0,
    };
    // From here on Ctrl-C ends the measuring and shows what came of it.
    let signals: SigSet = [Signal::SIGINT, Signal::SIGTERM].into_iter().collect();
    signals.thread_block().map_err(io::Error::from)?;
    let flags = SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC;
    let signals = SignalFd::with_flags(&signals, flags).map_err(io::Error::from)?;
    let interrupted = std::cell::Cell::new(false);
    let stop = || {
        let now = interrupted.get() || signals.read_signal().is_ok_and(|signal| signal.is_some());
        interrupted.set(now);
        now
    };
    let report = ping::run(&options, &stop).map_err(|why| {
        Failure::failed(match why {
            ping::Error::Unreachable { .. } => {
                format!("{why}; is omega-agent running there and the address right?")
            }
            why => why.to_string(),
        })
    })?;
    show(&if args.json { format!("{}\n", json(&report)?) } else { table(&report) })?;
    if report.is_whole() { Ok(()) } else { Err(Failure::silent(1)) }
}

fn classes(wanted: &[args::ClassName]) -> Vec<Class> {
    wanted.iter().map(|name| Class::from(*name)).collect()
}

/// Where the agent is, how the connection is protected, and who the agent must prove to be.
fn target(args: &args::Ping) -> Result<(String, Security, Option<String>), Failure> {
    let identity = match &args.identity.identity {
        Some(folder) if !folder.as_os_str().is_empty() => Some(Reloading::load(folder)?),
        _ => args.identity.path().ok().map(|folder| Reloading::find(&folder)).transpose()?.flatten(),
    };
    let known = known_address(args);
    let node = args.node.clone().or_else(|| known.is_some().then(|| args.target.clone()));
    let agent = known.unwrap_or_else(|| args.target.clone());
    let peer = Peer {
        agent: &agent,
        node: node.as_deref(),
        insecure: args.insecure,
        transport: crate::config::Transport::Rdma,
        require_encryption: false,
    };
    let security = match identity {
        _ if args.insecure => Security::Plain,
        Some(identity) => Security::Tls(Arc::clone(&identity)),
        None if peer.is_on_this_pc() => Security::Plain,
        None => {
            return Err(Failure::failed(format!(
                "{agent} can only be trusted by an identity, and this PC has none; `omega join TOKEN` gets one, \
                 or measure plain TCP by --insecure"
            )));
        }
    };
    let node = matches!(security, Security::Tls(_)).then(|| peer.expected_node()).flatten();
    Ok((with_port(&agent), security, node))
}

/// Where a node said it listens when it joined, if this PC keeps the household's register.
fn known_address(args: &args::Ping) -> Option<String> {
    NodeName::of_host(&args.target)?;
    let authority = Authority::open(&args.identity.authority().ok()?).ok()?;
    let nodes = authority.nodes().ok()?;
    let alive = nodes.iter().rev().filter(|node| node.name == args.target && node.revoked.is_none());
    alive.filter_map(|node| node.address).map(|address| address.to_string()).next()
}

fn table(report: &Report) -> String {
    let Report { address, name, proven, carrier, why_not_rdma, losses, classes, .. } = report;
    let who = match proven {
        Some(proven) => format!("{proven} ({address}), proven by its certificate"),
        None => format!("{} ({address}), not authenticated", harmless(name)),
    };
    let size = classes.first().map_or(0, |measured| measured.size);
    let mut text = format!("{who}, carried by {carrier}, {size} bytes each way\n");
    if let Some(why) = why_not_rdma {
        // Writing to a text cannot fail.
        let _ = writeln!(text, "no RDMA: {}", harmless(why));
    }
    if *losses > 0 {
        let _ = writeln!(text, "the connection was lost {losses} times");
    }
    let _ = writeln!(
        text,
        "{:<8}{:>7}{:>6}{:>9}{:>9}{:>9}{:>9}{:>9}{:>7}{:>7}",
        "CLASS", "SENT", "LOST", "MIN", "P50", "P99", "MAX", "JITTER", "UP", "DOWN"
    );
    for Measured { class, round_trips: trips, up_bytes_per_s, down_bytes_per_s, .. } in classes {
        let [min, p50, p99, max, jitter] =
            [trips.min_us, trips.p50_us, trips.p99_us, trips.max_us, trips.jitter_us].map(latency);
        let [up, down] = [up_bytes_per_s, down_bytes_per_s].map(|rate| rate.map_or("-".into(), mebibytes));
        let (sent, lost) = (trips.sent, trips.sent.saturating_sub(trips.answered));
        let name = class.name();
        let _ = writeln!(
            text,
            "{name:<8}{sent:>7}{lost:>6}{min:>9}{p50:>9}{p99:>9}{max:>9}{jitter:>9}{up:>7}{down:>7}"
        );
    }
    if classes.iter().any(|measured| measured.up_bytes_per_s.is_some()) {
        text.push_str("UP and DOWN are MiB/s to and from the agent\n");
    }
    text
}
