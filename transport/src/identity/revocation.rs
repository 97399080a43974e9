//! How a CRL travels: the one operation that every service of Omega answers, whatever else it does.
//!
//! A request has class [`Control`](crate::wire::Class::Control), an empty body and the DER of a CRL as its
//! payload, or none, which only asks. It is answered with the number of the CRL in force afterwards, eight
//! little-endian bytes, as its body. If that is newer than what was sent and the asker left room for it, its
//! DER is the payload: so a CRL reaches everybody, whoever of two that meet has the newer one.

use std::time::Duration;

use super::{Error, MAX_CRL, Reloading, Taken};
use crate::blocking::{self, Client};
use crate::wire::{Body, Class, Status};

/// The operation.
pub const OPCODE: u16 = 0x0130;

/// What to answer to a request.
#[derive(Debug)]
pub struct Answer {
    /// The answer's body.
    pub body: Body,
    /// The answer's payload.
    pub payload: Vec<u8>,
    /// What became of the CRL that was sent: if it was newer, live connections are to be looked at.
    pub taken: Taken,
}

/// Takes the CRL in `payload` and says what to answer, with at most `answer_len` bytes of payload.
///
/// # Errors
/// It is damaged or another authority's.
pub fn answer(held: &Reloading, payload: &[u8], answer_len: usize) -> Result<Answer, Error> {
    let taken = if payload.is_empty() {
        Taken { number: held.current().crl().number(), newer: false, not_stored: None }
    } else {
        held.take_crl(payload)?
    };
    let identity = held.current();
    let der = identity.crl().der().as_ref();
    let payload = if der != payload && der.len() <= answer_len { der.to_vec() } else { Vec::new() };
    let body = Body::from_slice(&identity.crl().number().to_le_bytes());
    Ok(Answer { body, payload, taken })
}

/// Brings this side's list and that of `client`'s peer to the newer of the two. Returns the number of the list
/// that this side learned, if the peer's was newer. A peer that does not answer the operation changes nothing.
///
/// # Errors
/// The peer does not answer in time.
pub fn exchange(
    client: &mut Client,
    held: &Reloading,
    timeout: Duration,
) -> Result<Option<u64>, blocking::Error> {
    let ours = held.current().crl().der().to_vec();
    let reply = client.call(Class::Control, OPCODE, &[], ours, MAX_CRL, timeout)?;
    if reply.status != Status::OK || reply.payload.is_empty() {
        return Ok(None);
    }
    match held.take_crl(&reply.payload) {
        Ok(taken) => Ok(taken.newer.then_some(taken.number)),
        Err(why) => {
            tracing::warn!(%why, "The peer's list of revoked certificates is refused");
            Ok(None)
        }
    }
}

/// The number in an answer's body.
#[must_use]
pub fn number(body: &[u8]) -> Option<u64> {
    Some(u64::from_le_bytes(body.try_into().ok()?))
}
