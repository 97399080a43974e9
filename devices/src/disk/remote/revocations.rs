//! What the household revoked travels with whoever connects: an agent that was away when a node was revoked
//! learns it from the next console, and a console whose guest runs learns it from its agents.

use std::time::{Duration, Instant};

use transport::blocking::Client;
use transport::buffer::Buffer;
use transport::channel::{Answer, Call};
use transport::identity::{MAX_CRL, Security, revocation};
use transport::wire::{Body, Class, Status};

use super::core::{Tag, call};

/// How often it is looked whether this side has a newer list.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// How often the agent is asked which list it has: a few bytes each way.
const ASK_EVERY: Duration = Duration::from_secs(5);

/// What this connection's agent was told and asked.
#[derive(Default)]
pub(super) struct Revocations {
    /// The number of the list that was sent over this connection.
    sent: Option<u64>,
    look_at: Option<Instant>,
    ask_at: Option<Instant>,
    /// A call has no answer yet.
    waiting: bool,
    /// The agent has a newer list.
    newer: bool,
}

impl Revocations {
    /// The connection is another: what the agent knows is unknown.
    pub(super) fn forget(&mut self) {
        *self = Self::default();
    }

    /// What is to be asked now: the newest list is sent if that was not done yet, and fetched if the agent has
    /// a newer one.
    pub(super) fn tick(&mut self, security: &Security, now: Instant) -> Option<Call> {
        let Security::Tls(identity) = security else { return None };
        if self.waiting || self.look_at.is_some_and(|at| now < at) {
            return None;
        }
        self.look_at = now.checked_add(LOOK_EVERY);
        let identity = identity.current();
        let number = identity.crl().number();
        let bare = call(Tag::Revocations, revocation::OPCODE, Class::Control, Body::new());
        let call = if self.sent.is_none_or(|sent| sent < number) {
            self.sent = Some(number);
            let payload = Buffer::from_vec(identity.crl().der().to_vec());
            Call { payload, ..bare }
        } else if std::mem::take(&mut self.newer) {
            Call { answer: Buffer::zeroed(MAX_CRL), ..bare }
        } else if self.ask_at.is_none_or(|at| at <= now) {
            bare
        } else {
            return None;
        };
        self.ask_at = now.checked_add(ASK_EVERY);
        self.waiting = true;
        Some(call)
    }

    /// The agent answered. This thread may neither verify a list, which takes long, nor store it: that is for
    /// the one that looks after the identity.
    pub(super) fn answered(&mut self, security: &Security, answer: &Answer) {
        self.waiting = false;
        let Security::Tls(identity) = security else { return };
        if answer.status != Status::OK {
            return;
        }
        if answer.received > 0 {
            let mut der = vec![0; answer.received.min(answer.answer.len())];
            answer.answer.read_at(0, &mut der);
            identity.offer(&der);
        } else if let Some(number) = revocation::number(&answer.body) {
            // An agent that only says so is asked at most every few seconds.
            self.newer = answer.answer.is_empty() && number > identity.current().crl().number();
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use transport::identity::Reloading;
    use transport::identity::testing::Household;

    /// Has `agent` answer, as it does on the wire.
    fn answered(asked: &mut Revocations, console: &Security, agent: &Reloading, now: Instant) -> bool {
        let Some(call) = asked.tick(console, now) else { return false };
        assert_eq!((call.opcode, call.class), (revocation::OPCODE, Class::Control));
        let room = call.answer.len();
        let said = revocation::answer(agent, &call.payload.to_vec(), room).expect("the authority's");
        let answer = Buffer::zeroed(room);
        answer.write_at(0, &said.payload);
        let received = said.payload.len();
        let (tag, status, body) = (call.tag, Status::OK, said.body);
        asked.answered(console, &Answer { tag, status, body, payload: call.payload, answer, received });
        true
    }

    #[test]
    fn a_running_guests_console_learns_from_an_agent_that_another_was_revoked() {
        let mut house = Household::new();
        let (cellar, desk) = (house.agent("cellar"), house.console("desk"));
        let folder = house.folder(&desk);
        let console = Reloading::load(&folder).expect("an identity");
        let agent = Reloading::in_memory(house.agent("attic"));
        let security = Security::Tls(Arc::clone(&console));
        let (mut asked, mut now) = (Revocations::default(), Instant::now());
        for _ in 0..10 {
            now += LOOK_EVERY;
            answered(&mut asked, &security, &agent, now);
        }
        assert!(console.take_offered().is_empty(), "both know the same");
        house.revoke(cellar.serial());
        agent.take_crl(&house.crl()).expect("the authority's");
        for _ in 0..10 {
            now += LOOK_EVERY;
            answered(&mut asked, &security, &agent, now);
        }
        let taken = console.take_offered();
        assert!(matches!(&taken[..], [Ok(taken)] if taken.newer && taken.not_stored.is_none()), "{taken:?}");
        let knows = |held: &Reloading| held.current().crl().revokes(cellar.serial());
        assert!(knows(&console), "its connections to the cellar end");
        assert!(knows(&Reloading::load(&folder).expect("an identity")), "after a restart too");
    }

    #[test]
    fn an_agent_that_boasts_of_a_newer_list_and_sends_none_is_asked_seldom() {
        let house = Household::new();
        let security = Security::Tls(Reloading::in_memory(house.console("desk")));
        let (mut asked, mut now, mut calls) = (Revocations::default(), Instant::now(), 0);
        for _ in 0..600 {
            now += Duration::from_millis(100);
            let Some(Call { tag, payload, answer, .. }) = asked.tick(&security, now) else { continue };
            let (status, body) = (Status::OK, Body::from_slice(&u64::MAX.to_le_bytes()));
            asked.answered(&security, &Answer { tag, status, body, payload, answer, received: 0 });
            calls += 1;
        }
        assert!((2..=24).contains(&calls), "{calls} calls in a minute");
    }
}
