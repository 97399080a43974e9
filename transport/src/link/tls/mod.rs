//! TLS 1.3 (RFC 8446) on a TCP link: the [`handshake`] by rustls, driven by the ring; after it the records,
//! by the kernel ([`kernel`]) where it can, else in this process ([`records`]). Drawn in `docs/tls.md`.

pub(crate) mod handshake;
pub(crate) mod kernel;
pub(crate) mod records;
mod words;

/// Longest plaintext of a record in bytes (RFC 8446, 5.1).
pub(crate) const PLAINTEXT: usize = 1 << 14;

/// Longest encrypted content of a record in bytes (RFC 8446, 5.2).
pub(crate) const CIPHERTEXT: usize = PLAINTEXT + 256;

/// Length of a record's header in bytes.
pub(crate) const HEADER: usize = 5;

/// Records after which the asking side replaces a connection. AES-GCM is good for 2^24.5 full records under
/// one key (RFC 8446, 5.5).
pub(crate) const RECORDS: u64 = 1 << 23;

/// What a record carries (RFC 8446, 5.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Content {
    /// Change cipher spec: only for the sake of middleboxes, and only in a handshake.
    ChangeCipherSpec = 20,
    /// Why a side ends, or that it does.
    Alert = 21,
    /// A handshake message.
    Handshake = 22,
    /// Omega's bytes; on the wire also everything that is encrypted.
    Data = 23,
}

impl Content {
    pub(crate) fn of(byte: u8) -> Option<Self> {
        match byte {
            20 => Some(Self::ChangeCipherSpec),
            21 => Some(Self::Alert),
            22 => Some(Self::Handshake),
            23 => Some(Self::Data),
            _ => None,
        }
    }
}

/// A record that carries no data, after the handshake. `Ok`: it may be ignored.
///
/// # Errors
/// What it means for the connection, which is its end.
pub(crate) fn control(content: u8, bytes: &[u8]) -> Result<(), Fault> {
    match (Content::of(content), bytes) {
        (Some(Content::Alert), [_, 0]) => Err(Fault::Closed),
        (Some(Content::Alert), [_, description]) => Err(words::refused((*description).into())),
        // A ticket to resume with, which nobody asked for.
        (Some(Content::Handshake), [4, ..]) => Ok(()),
        (Some(Content::Handshake), [24, ..]) => {
            Err(Fault::Protocol("a TLS key update, where a new connection takes its place"))
        }
        _ => Err(Fault::Protocol("a TLS record that belongs into no open connection")),
    }
}

/// The alert that says that nothing more comes (RFC 8446, 6.1).
pub(crate) const CLOSE_NOTIFY: [u8; 2] = [1, 0];

use crate::wire::Fault;
