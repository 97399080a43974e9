//! What the household revoked travels with whoever connects: an agent that was away when a node was revoked
//! learns it from the next console.

use std::time::{Duration, Instant};

use transport::blocking::Client;
use transport::buffer::Buffer;
use transport::channel::{Call, Channel};
use transport::identity::{MAX_CRL, Security, revocation};
use transport::wire::{Body, Class, Status};

use super::core::{Tag, call};

/// How often it is looked whether there is a newer list.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// What this connection's agent was told.
#[derive(Default)]
pub(super) struct Revocations {
    /// The number of the list that was sent over this connection.
    sent: Option<u64>,
    look_at: Option<Instant>,
}

impl Revocations {
    /// The connection is another: what the agent knows is unknown.
    pub(super) fn forget(&mut self) {
        *self = Self::default();
    }

    /// Sends the newest list over `channel`, if that was not done yet.
    pub(super) fn tick(&mut self, security: &Security, channel: &mut Channel, now: Instant) {
        let Security::Tls(identity) = security else { return };
        if self.look_at.is_some_and(|at| now < at) {
            return;
        }
        self.look_at = now.checked_add(LOOK_EVERY);
        let identity = identity.current();
        let number = identity.crl().number();
        if self.sent.is_none_or(|sent| sent < number) {
            self.sent = Some(number);
            let payload = Buffer::from_vec(identity.crl().der().to_vec());
            let bare = call(Tag::Revocations, revocation::OPCODE, Class::Control, Body::new());
            channel.submit(Call { payload, ..bare });
        }
    }
}

/// Exchanges lists with the agent before the guest starts: afterwards both know the newer one. This thread may
/// write files, so what is learned is stored.
pub(super) fn exchange(client: &mut Client, security: &Security, timeout: Duration) {
    let Security::Tls(identity) = security else { return };
    let der = identity.current().crl().der().to_vec();
    let reply = match client.call(Class::Control, revocation::OPCODE, &[], der, MAX_CRL, timeout) {
        Ok(reply) if reply.status == Status::OK => reply,
        Ok(reply) => {
            let Status(status) = reply.status;
            tracing::warn!(status, "The agent does not take the list of revoked certificates");
            return;
        }
        // The next call says why.
        Err(_) => return,
    };
    if reply.payload.is_empty() {
        return;
    }
    match identity.take_crl(&reply.payload) {
        Ok(taken) if taken.newer => {
            tracing::info!(number = taken.number, "The agent knew a newer list of revoked certificates");
            if let Some(why) = taken.not_stored {
                tracing::warn!(%why, "The list of revoked certificates is in force, but not stored");
            }
        }
        Ok(_) => {}
        Err(why) => tracing::warn!(%why, "The agent sent a list of revoked certificates that is none"),
    }
}
