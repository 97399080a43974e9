//! Lists of revoked certificates that came to a thread that may not store them.

use std::sync::{Mutex, PoisonError};

use super::{Error, MAX_CRL, Reloading, Taken};

/// Most of them that wait: each connection offers one at a time, and they are looked at every few seconds.
const MOST: usize = 8;

/// Waits for the thread that looks after the identity.
#[derive(Debug, Default)]
pub(super) struct Offers(Mutex<Vec<Vec<u8>>>);

impl Reloading {
    /// Leaves the CRL `der`, whoever sent it, for [`take_offered`](Self::take_offered): opens no file, verifies
    /// nothing and waits for nobody who does. One too many or too long is forgotten; a peer sends it again.
    pub fn offer(&self, der: &[u8]) {
        let mut waiting = self.offers.0.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.len() < MOST && der.len() <= MAX_CRL && !waiting.iter().any(|other| other == der) {
            waiting.push(der.to_vec());
        }
    }

    /// Takes what was [offered](Self::offer) since, and says what became of each.
    pub fn take_offered(&self) -> Vec<Result<Taken, Error>> {
        let waiting = std::mem::take(&mut *self.offers.0.lock().unwrap_or_else(PoisonError::into_inner));
        waiting.iter().map(|der| self.take_crl(der)).collect()
    }
}
