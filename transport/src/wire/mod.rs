//! The bytes on the wire: frame header, hello, limits. Drawn in `docs/wire.md`.

pub mod fields;
mod frame;
#[cfg(test)]
mod golden_test;
mod hello;
pub(crate) mod rdma;

pub(crate) use frame::{Flags, HEADER, Header, Kind};
pub(crate) use hello::{HELLO_MOST, Hello, PREFACE, Preface, Role};

use serde::{Deserialize, Serialize};
use smallvec::SmallVec;

/// The first version in which a connection may move to RDMA.
pub(crate) const RDMA_SINCE: u16 = 2;

/// The newest version of the format that this program speaks.
pub const VERSION: u16 = 2;

/// The oldest version of the format that this program speaks.
pub const OLDEST_VERSION: u16 = 1;

/// A frame's structured bytes. Up to 64 of them need no allocation.
pub type Body = SmallVec<[u8; 64]>;

/// Longest body of a frame in bytes.
pub const MAX_BODY: usize = 4096;

/// Longest payload of a frame in bytes.
pub const MAX_PAYLOAD: usize = 1 << 20;

/// How urgent a request is. A lower number goes first; frames of one class keep their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[repr(u8)]
pub enum Class {
    /// Somebody's CPU stands still until the answer is here: page faults, vCPU exits.
    Urgent = 0,
    /// Disk reads and writes.
    Normal = 1,
    /// Leases, inventory, flushes of state.
    Control = 2,
    /// Copies that nobody waits for.
    Bulk = 3,
}

impl Class {
    /// All of them, the most urgent first.
    pub const ALL: [Self; 4] = [Self::Urgent, Self::Normal, Self::Control, Self::Bulk];

    /// Its name: `urgent`, `normal`, `control`, `bulk`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Urgent => "urgent",
            Self::Normal => "normal",
            Self::Control => "control",
            Self::Bulk => "bulk",
        }
    }
}

/// What a request was answered with. 0 is success; the values below 256 belong to the transport, the
/// others to whoever uses it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Status(pub u16);

impl Status {
    /// The request was carried out.
    pub const OK: Self = Self(0);
    /// The peer does not know the operation.
    pub const UNKNOWN_OPERATION: Self = Self(1);
    /// The request's bytes make no sense.
    pub const MALFORMED: Self = Self(2);
    /// The deadline passed before an answer came (made up locally, never sent).
    pub const DEADLINE: Self = Self(3);
    /// The request was cancelled.
    pub const CANCELLED: Self = Self(4);
    /// The peer is stopping and takes no new work.
    pub const STOPPING: Self = Self(5);
}

/// What a peer did that ends its connection, or why there is none. The text is the one reason people see.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// The first bytes are not a hello.
    #[error("The other side does not speak Omega's protocol")]
    NotOmega,
    /// The first bytes are TLS's, and none is spoken here.
    #[error("The other side speaks TLS, and this side has no identity to speak it with")]
    TlsPeer,
    /// The first bytes are a hello, and TLS is spoken here.
    #[error("The other side speaks without TLS, and this side demands it")]
    PlainPeer,
    /// The first bytes are not TLS's.
    #[error("The other side does not speak TLS")]
    NotTls,
    /// This side ended TLS. The text says why.
    #[error("{0}")]
    Tls(String),
    /// The other side ended TLS with an alert. The text says in words which.
    #[error("The peer refused the connection: {0}")]
    Refused(String),
    /// The handshake of TLS took too long.
    #[error("The peer did not finish its TLS handshake in time")]
    HandshakeTimeout,
    /// The keys encrypted as much as they may.
    #[error("The connection's keys are used up; a new connection goes on")]
    KeysUsed,
    /// The end came without TLS's word for it.
    #[error("The connection was cut")]
    Cut,
    /// The peer's certificate was revoked or ended while it was connected, or this PC went to another household.
    #[error("The certificate of {0} was revoked, has ended, or is of another household")]
    Revoked(String),
    /// The address leads to another node than at first.
    #[error("The node here is {1}, and the first connection was to {0}; if that is meant, start anew")]
    OtherNode(String, String),
    /// Another node began the session.
    #[error("The session belongs to another node")]
    NotYours,
    /// There is no version that both sides speak.
    #[error(
        "The peer speaks versions {oldest} to {newest} of the protocol, this program {OLDEST_VERSION} to \
         {VERSION}: install the same release of Omega on both"
    )]
    Version {
        /// The oldest version that the peer speaks.
        oldest: u16,
        /// The newest version that the peer speaks.
        newest: u16,
    },
    /// A frame breaks the format or the rules of its kind.
    #[error("The peer broke the protocol: {0}")]
    Protocol(&'static str),
    /// More requests or bytes at once than granted.
    #[error("The peer asked for more at once than it was granted")]
    OverCredit,
    /// The peer ended the connection and said why.
    #[error("The peer said: {0}")]
    Goodbye(String),
    /// A newer connection of the same session took over.
    #[error("A newer connection of the same session took over")]
    Superseded,
    /// No room for another session.
    #[error("The peer serves as many sessions as it can")]
    Full,
    /// No room for another connection of the same node.
    #[error("The peer serves as many connections of this node as one node may have")]
    Crowded,
    /// Nothing came for too long.
    #[error("Nothing was heard from the peer for {0} ms")]
    Silent(u64),
    /// The other side takes nothing.
    #[error("The peer did not read for {0} s")]
    Stuck(u64),
    /// The hello did not come in time.
    #[error("The peer did not finish its hello in time")]
    HelloTimeout,
    /// The other side closed.
    #[error("The peer closed the connection")]
    Closed,
    /// There is no connection to be had.
    #[error("Cannot connect to {0}: {1}")]
    Unreachable(String, String),
    /// The network failed.
    #[error("The connection failed: {0}")]
    Network(String),
}

impl From<std::io::Error> for Fault {
    fn from(e: std::io::Error) -> Self {
        Self::Network(e.to_string())
    }
}

/// Text of a peer, made harmless: at most 200 bytes, printable.
pub(crate) fn printable(text: &[u8]) -> String {
    String::from_utf8_lossy(&text[..text.len().min(200)])
        .chars()
        .map(|c| if is_invisible(c) { '?' } else { c })
        .collect()
}

/// Whether `c` in a peer's text could change how the text around it is read or shown: control characters, line and
/// paragraph separators, and format characters (Unicode's general category Cf), as those that turn the direction.
#[must_use]
pub fn is_invisible(c: char) -> bool {
    c.is_control()
        || matches!(c,
            '\u{ad}' | '\u{600}'..='\u{605}' | '\u{61c}' | '\u{6dd}' | '\u{70f}' | '\u{890}'..='\u{891}' | '\u{8e2}'
            | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}'
            | '\u{fff9}'..='\u{fffb}' | '\u{110bd}' | '\u{110cd}' | '\u{13430}'..='\u{1343f}'
            | '\u{1bca0}'..='\u{1bca3}' | '\u{1d173}'..='\u{1d17a}' | '\u{e0000}'..='\u{e007f}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peers_text_cannot_turn_hide_or_break_the_line_that_shows_it() {
        let text = "a\nb\u{2028}c\u{202e}d\u{200b}e\u{feff}f\u{85}";
        assert_eq!(printable(text.as_bytes()), "a?b?c?d?e?f?");
        let plain = "Grüße, 机 e\u{301} (node attic)";
        assert_eq!(printable(plain.as_bytes()), plain);
    }
}
