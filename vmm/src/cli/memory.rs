//! `omega memory add`: has a running guest take memory of another PC.

use std::time::Duration;

use super::human::harmless;
use super::{Failure, args, runtime, show};
use crate::config::{Helper, Peer, Transport};
use crate::control::client::Client;
use crate::control::protocol::Command;

/// How long the helper may take: as long as one of the configuration may at the start, and a little more.
const PATIENCE: Duration = Duration::from_secs(60);

pub(super) fn add(args: &args::MemoryAdd) -> Result<(), Failure> {
    let helper = Helper {
        agent: args.agent.clone(),
        size: args.size,
        node: args.node.clone(),
        insecure: args.insecure,
        transport: Transport::default(),
        require_encryption: false,
    };
    if let Some(mistake) = Peer::from(&helper).mistake() {
        return Err(Failure::usage(format!("The helper {}: {mistake}", harmless(&args.agent))));
    }
    let folder = runtime::find(&args.guest)?;
    let guest = folder.name().to_owned();
    let failed = |why: &dyn std::fmt::Display| Failure::failed(format!("The guest `{guest}`: {why}"));
    let mut client = Client::connect(&folder.control(), Some(PATIENCE)).map_err(|why| failed(&why))?;
    client.ask(Command::MemoryAdd { helper: Box::new(helper) }).map_err(|why| failed(&why))?;
    show(&format!("{guest}: {} lends it {} of memory\n", harmless(&args.agent), args.size))
}
