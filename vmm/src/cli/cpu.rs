//! `omega cpu`: on which PCs a running guest's vCPUs are.

use std::time::Duration;

use super::human::harmless;
use super::{Failure, args, runtime, show};
use crate::control::client::Client;
use crate::control::protocol::Command;

/// How long a move may take: the guest pauses, which its devices may delay, and states go to and fro.
const PATIENCE: Duration = Duration::from_secs(120);

pub(super) fn obey(args: &args::Cpu) -> Result<(), Failure> {
    match args {
        args::Cpu::Move(args::CpuMove { guest, vcpu, node }) => {
            let name = ask(guest, Command::CpuMove { vcpu: *vcpu, node: node.clone() })?.0;
            show(&format!("{name}: vCPU {vcpu} is on {}\n", harmless(node)))
        }
        args::Cpu::Drain(args::CpuDrain { guest, node }) => {
            let (name, moved) = ask(guest, Command::CpuDrain { node: node.clone() })?;
            show(&format!("{name}: {moved} vCPUs moved away from {}\n", harmless(node)))
        }
    }
}

/// The guest's name, and what it answers.
fn ask(guest: &str, command: Command) -> Result<(String, serde_json::Value), Failure> {
    let folder = runtime::find(guest)?;
    let name = folder.name().to_owned();
    let failed = |why: &dyn std::fmt::Display| Failure::failed(format!("The guest `{name}`: {why}"));
    let mut client = Client::connect(&folder.control(), Some(PATIENCE)).map_err(|why| failed(&why))?;
    let answer = client.ask(command).map_err(|why| failed(&why))?;
    Ok((name, answer))
}
