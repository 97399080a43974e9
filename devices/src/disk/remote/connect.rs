//! The first meeting with the agent, before the guest starts: everything that cannot work is said here, in
//! one line.

use std::time::{Duration, Instant};

use transport::blocking::{self, Client, Reply};
use transport::channel::Names;
use transport::metrics::Recorder;
use transport::wire::{Class, Status};

use super::core::Core;
use super::{Options, RemoteDisk, Revocations, revocations};
use crate::disk::volume::{
    Acquire, Acquired, Lease, Malformed, OPERATIONS, Open, Opened, Refusal, opcode, status,
};

/// The port at which agents listen.
pub const DEFAULT_PORT: u16 = 7420;

/// How long giving a lease back may take at the end.
pub(super) const RELEASE_TIMEOUT: Duration = Duration::from_secs(2);

/// How long the first answer may take. Whoever waits for a lease has been answered already; of an agent that
/// is not there nothing is gained by waiting longer.
const FIRST_ANSWER: Duration = Duration::from_secs(15);

/// A holder that was just killed may look connected for so long.
const GRACE: Duration = Duration::from_secs(1);

/// The volume cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Nobody answers at the agent's address.
    #[error(
        "The agent at {agent} cannot be reached: {source}; is omega-agent running there and the address right?"
    )]
    Unreachable {
        /// The address.
        agent: String,
        /// What was tried and for how long.
        source: blocking::Error,
    },
    /// The agent has no volume of this name.
    #[error("The agent at {agent} serves no volume named {volume}: {why}")]
    NoSuchVolume {
        /// The address.
        agent: String,
        /// The name.
        volume: String,
        /// What it serves.
        why: String,
    },
    /// The agent's policy does not let this PC have the volume.
    #[error("The agent at {agent} refuses: {why}; add an `[[allow]]` there, then restart it")]
    Forbidden {
        /// The address.
        agent: String,
        /// Who may not have what.
        why: String,
    },
    /// Somebody else has the volume.
    #[error("The volume {volume} on {agent} is leased: {why}")]
    Leased {
        /// The address.
        agent: String,
        /// The volume.
        volume: String,
        /// By whom.
        why: String,
    },
    /// The volume's file is missing, too short, locked or the like.
    #[error("The volume {volume} on {agent} cannot be served: {why}")]
    Unfit {
        /// The address.
        agent: String,
        /// The volume.
        volume: String,
        /// Why not.
        why: String,
    },
    /// The guest wants to write.
    #[error(
        "The volume {volume} on {agent} is read-only; give this disk `read_only = true` in the guest's configuration"
    )]
    ReadOnly {
        /// The address.
        agent: String,
        /// The volume.
        volume: String,
    },
    /// There is no thread or descriptor to be had.
    #[error("No thread can be started that finds the agent at {agent}: {source}")]
    Names {
        /// The address.
        agent: String,
        /// Why not.
        source: std::io::Error,
    },
    /// The peer does not speak the volume protocol.
    #[error("The peer at {agent} is no agent that this Omega understands: {source}")]
    Protocol {
        /// The address.
        agent: String,
        /// What was wrong.
        source: Malformed,
    },
}

/// `host:port` of an agent that was given with or without its port.
#[must_use]
pub fn with_port(agent: &str) -> String {
    let has_port = match (agent.rfind(':'), agent.rfind(']')) {
        (Some(colon), Some(bracket)) => colon > bracket,
        (Some(colon), None) => agent.find(':') == Some(colon),
        (None, _) => false,
    };
    let bare_v6 = !has_port && agent.contains(':') && !agent.contains(']');
    match (has_port, bare_v6) {
        (true, _) => agent.to_owned(),
        (false, true) => format!("[{agent}]:{DEFAULT_PORT}"),
        (false, false) => format!("{agent}:{DEFAULT_PORT}"),
    }
}

/// A call and the moment at which all calls together must be done.
struct Meeting<'a> {
    options: &'a Options,
    client: Client,
    until: Instant,
    /// Whether the agent has answered at all.
    heard: bool,
}

impl Meeting<'_> {
    fn call(&mut self, opcode: u16, body: &[u8]) -> Result<Reply, ConnectError> {
        let left = self.until.saturating_duration_since(Instant::now()).max(Duration::from_millis(100));
        let left = if self.heard { left } else { left.min(FIRST_ANSWER) };
        let reply = self.client.call(Class::Control, opcode, body, Vec::new(), 0, left);
        self.heard |= reply.is_ok();
        reply.map_err(|source| ConnectError::Unreachable { agent: self.options.agent.clone(), source })
    }

    fn refused(&self, reply: &Reply) -> ConnectError {
        let (agent, volume) = (self.options.agent.clone(), self.options.volume.clone());
        let why = Refusal::decode(&reply.body).map_or_else(
            |_| {
                let Status(code) = reply.status;
                format!("the agent answered with status {code}")
            },
            |refusal| refusal.text,
        );
        match reply.status {
            status::NO_SUCH_VOLUME => ConnectError::NoSuchVolume { agent, volume, why },
            status::LEASED => ConnectError::Leased { agent, volume, why },
            status::FORBIDDEN => ConnectError::Forbidden { agent, why },
            _ => ConnectError::Unfit { agent, volume, why },
        }
    }

    fn malformed(&self, source: Malformed) -> ConnectError {
        ConnectError::Protocol { agent: self.options.agent.clone(), source }
    }

    /// Takes the lease. One whose holder went away without giving it back is waited for.
    fn acquire(&mut self) -> Result<Acquired, ConnectError> {
        let Options { volume, holder, name, .. } = self.options;
        let acquire = Acquire { volume: volume.clone(), holder: *holder, expected: 0, name: name.clone() };
        let (started, mut told) = (Instant::now(), false);
        loop {
            let reply = self.call(opcode::ACQUIRE, &acquire.encode())?;
            if reply.status == Status::OK {
                return Acquired::decode(&reply.body).map_err(|e| self.malformed(e));
            }
            let wait = Refusal::decode(&reply.body).map_or(Duration::ZERO, |r| r.wait);
            let left = self.until.saturating_duration_since(Instant::now());
            let given_grace = wait.is_zero() && started.elapsed() < GRACE;
            if reply.status != status::LEASED || (wait.is_zero() && !given_grace) || wait > left {
                return Err(self.refused(&reply));
            }
            if given_grace {
                std::thread::sleep(GRACE / 10);
                continue;
            }
            if !told {
                tracing::info!(%volume, ?wait, "The lease's last holder is gone; waiting until it expires");
                told = true;
            }
            std::thread::sleep(wait.min(Duration::from_secs(1)) + Duration::from_millis(10));
        }
    }

    fn open(&mut self, lease: Lease) -> Result<Opened, ConnectError> {
        let open = Open { epoch: lease.epoch, holder: lease.holder };
        let reply = self.call(opcode::OPEN, &open.encode())?;
        if reply.status != Status::OK {
            return Err(self.refused(&reply));
        }
        Opened::decode(&reply.body).map_err(|e| self.malformed(e))
    }
}

/// Takes the lease of a volume and opens it, before the guest starts. Blocks for up to `timeout`.
///
/// # Errors
/// Each [`ConnectError`]: one line that says what is wrong and where.
pub fn connect(options: Options, timeout: Duration) -> Result<RemoteDisk, ConnectError> {
    let options = Options { agent: with_port(&options.agent), ..options };
    let client = options
        .client()
        .map_err(|source| ConnectError::Unreachable { agent: options.agent.clone(), source })?;
    let mut meeting = Meeting { options: &options, client, until: Instant::now() + timeout, heard: false };
    let acquired = meeting.acquire()?;
    revocations::exchange(&mut meeting.client, &options.security, FIRST_ANSWER);
    let lease = Lease { epoch: acquired.epoch, holder: options.holder };
    let opened = meeting.open(lease).and_then(|opened| {
        if opened.geometry.read_only && !options.read_only {
            let (agent, volume) = (options.agent.clone(), options.volume.clone());
            return Err(ConnectError::ReadOnly { agent, volume });
        }
        Ok(opened)
    });
    let opened = opened.inspect_err(|_| release(&options, lease))?;
    // The address may lead elsewhere later, and an agent is trusted with what the guest wrote: it stays this one.
    let met = meeting.client.proven().map(|peer| peer.name.clone());
    let options = Options { node: options.node.clone().or(met), ..options.clone() };
    let mut geometry = opened.geometry;
    geometry.read_only |= options.read_only;
    let agent = &options.agent;
    let names = Names::of(agent).map_err(|source| ConnectError::Names { agent: agent.clone(), source })?;
    let core = Core::new(options, geometry, opened.identity, lease, acquired.ttl);
    let recorder = Recorder::new(OPERATIONS);
    Ok(RemoteDisk {
        core,
        channel: None,
        names: Some(names),
        metrics: recorder.metrics(),
        recorder: Some(recorder),
        events: Vec::new(),
        revocations: Revocations::default(),
        reachable: true,
    })
}

/// Gives a lease back, so that another holder need not wait until it expires.
pub(super) fn release(options: &Options, lease: Lease) {
    let result = options.client().and_then(|mut client| {
        client.call(Class::Control, opcode::RELEASE, &lease.encode(), Vec::new(), 0, RELEASE_TIMEOUT)
    });
    if let Err(error) = result {
        tracing::info!(volume = %options.volume, %error, "The lease could not be given back; it will expire");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_without_a_port_gets_the_agents_port() {
        for (given, expected) in [
            ("pc2", "pc2:7420"),
            ("pc2:99", "pc2:99"),
            ("10.0.0.2", "10.0.0.2:7420"),
            ("[fe80::1]:99", "[fe80::1]:99"),
            ("[fe80::1]", "[fe80::1]:7420"),
            ("fe80::1", "[fe80::1]:7420"),
        ] {
            assert_eq!(with_port(given), expected);
        }
    }
}
