//! How a CRL travels: the one operation that every service of Omega answers, whatever else it does.
//!
//! A request has class [`Control`](crate::wire::Class::Control), an empty body and the DER of a CRL as its
//! payload, or none, which only asks. It is answered with the number of the CRL in force afterwards, eight
//! little-endian bytes, as its body. If that is another than what was sent and the asker left room for it, its
//! DER is the payload: so a CRL reaches everybody, whoever of two that meet has the newer one.

use super::{Crl, Error, Reloading, Taken};
use crate::wire::Body;

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
        Taken { number: held.current().crl().number(), newer: false, conflicting: false, not_stored: None }
    } else {
        held.take_crl(payload)?
    };
    let identity = held.current();
    let der = identity.crl().der().as_ref();
    let payload = if der != payload && der.len() <= answer_len { der.to_vec() } else { Vec::new() };
    let body = Body::from_slice(&identity.crl().number().to_le_bytes());
    Ok(Answer { body, payload, taken })
}

/// As [`answer`], if it can be said without looking at a signature and without storing anything: nothing was sent,
/// what is in force, or what says of itself that it is older. So it is fit for a thread that must not wait.
#[must_use]
pub fn answer_at_once(held: &Reloading, payload: &[u8], answer_len: usize) -> Option<Answer> {
    let identity = held.current();
    let (der, number) = (identity.crl().der().as_ref(), identity.crl().number());
    let known = payload.is_empty() || payload == der;
    if !known && Crl::claimed_number(payload).is_none_or(|claimed| claimed >= number) {
        return None;
    }
    let taken = Taken { number, newer: false, conflicting: false, not_stored: None };
    let payload = if der != payload && der.len() <= answer_len { der.to_vec() } else { Vec::new() };
    Some(Answer { body: Body::from_slice(&number.to_le_bytes()), payload, taken })
}

/// The number in an answer's body.
#[must_use]
pub fn number(body: &[u8]) -> Option<u64> {
    Some(u64::from_le_bytes(body.try_into().ok()?))
}
