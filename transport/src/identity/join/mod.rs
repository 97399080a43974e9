//! Joining a household: a PC becomes a node.
//!
//! The [`Invitation`] is the authority's side, [`join`] the new node's; between them a [`Token`] went by hand.
//! Drawn in `docs/identity.md`.

pub mod token;

mod invitation;
#[cfg(test)]
mod join_test;
mod joiner;
mod timed;
pub(crate) mod wire;

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

pub use invitation::{Invitation, Joined, MAX_TRIES, Outcome, addresses, listen};
pub use joiner::join;
pub use token::Token;

/// What is spoken inside TLS while joining (RFC 7301).
pub const ALPN: &[u8] = b"omega-join/1";

/// Where invitations are answered, if nothing else is asked for.
pub const PORT: u16 = 7421;

/// One conversation takes at most so long.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

/// Why joining failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The token is not one.
    #[error("The token is damaged: {0}; copy it again, whole")]
    Token(&'static str),
    /// The token is over.
    #[error("The token expired {} ago; ask for a new one with `omega node invite`", ago(.0))]
    Expired(Duration),
    /// Nobody answers at any of the token's addresses.
    #[error(
        "Nobody answers at {addresses}: {source}; is `omega node invite` still waiting, and its port open in the \
         firewall?"
    )]
    Unreachable {
        /// The addresses.
        addresses: String,
        /// What happened at the last one.
        source: io::Error,
    },
    /// Whoever answers is not the authority.
    #[error(
        "Whoever answers at {0} is not the authority that made the token; nothing was told to it. Another PC may \
         have this address now, or somebody listens in between"
    )]
    Impostor(SocketAddr),
    /// The two clocks differ too much.
    #[error("The authority's certificate is not valid at this PC's time; set the clock of this PC right")]
    Clock,
    /// The conversation broke off.
    #[error("The conversation with {address} broke off: {source}; ask for a new token and try again")]
    Broken {
        /// With whom.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// The authority said no.
    #[error("{0}")]
    Refused(String),
    /// The authority's answer is not what it should be.
    #[error("The answer is wrong: {0}; nothing was stored")]
    Answer(String),
    /// The identity cannot be made or stored.
    #[error("{0}")]
    Identity(#[from] super::Error),
}

fn ago(since: &Duration) -> String {
    let minutes = since.as_secs().div_ceil(60);
    match minutes {
        0..=1 => "a minute".to_owned(),
        2..=119 => format!("{minutes} minutes"),
        120..=2879 => format!("{} hours", minutes / 60),
        _ => format!("{} days", minutes / 1440),
    }
}
