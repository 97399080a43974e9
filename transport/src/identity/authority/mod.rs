//! The household's authority: the one PC that makes nodes out of PCs.

#[allow(dead_code, reason = "the store of the authority follows")]
mod signing;

pub(crate) use signing::{LIFE, Revoked, Signer, Validity, new_key, node_params, pkcs8};
