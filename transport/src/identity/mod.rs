//! Who a PC is, and how it proves that to the others of its household.
//!
//! A household has one certificate authority ([`Authority`](authority::Authority), on the PC where `omega ca
//! init` ran). Each node has a key that never leaves it and a certificate of that authority, which carries the
//! node's name and [`Roles`] as DNS names (RFC 5280, 4.2.1.6), so that the standard verifier of TLS checks
//! them. What was revoked is in the authority's CRL (RFC 5280, 5), which only ever grows newer.
//!
//! An [`Identity`] is what a folder holds, loaded; [`Reloading`] is the handle that connections share, through
//! which a new certificate or CRL reaches them. The files, the join conversation and the threat model are in
//! `docs/identity.md`.

pub mod authority;
mod crl;
mod error;
pub mod folder;
#[cfg(test)]
mod folder_test;
pub(crate) mod fuzzing;
#[cfg(test)]
mod handshake_test;
pub mod join;
mod loaded;
mod name;
mod offers;
mod peer;
mod reloading;
pub mod revocation;
#[doc(hidden)]
pub mod testing;

use std::sync::Arc;

pub use crl::{Crl, MAX_CRL};
pub use error::Error;
pub use loaded::{ALPN, Identity};
pub use name::{MAX_NAME, NodeName, Role, Roles};
pub use peer::{Fingerprint, Peer, Serial};
pub use reloading::{Reloading, Taken};

/// How a connection is protected.
#[derive(Clone, Debug)]
pub enum Security {
    /// Not at all: whoever reaches it may read, change and ask anything.
    Plain,
    /// TLS 1.3, both sides proven.
    Tls(Arc<Reloading>),
}
