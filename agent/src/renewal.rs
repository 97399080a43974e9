//! Taking a renewed identity and lists of revoked certificates while the agent runs.

use std::time::{Duration, Instant};

use transport::identity::Security;

use crate::protection::expiry;
use crate::serve::Agent;

/// How often the identity's files are looked at.
pub(crate) const LOOK_EVERY: Duration = Duration::from_secs(2);

/// What was seen of the identity's folder.
pub(crate) struct Renewal {
    looked: Instant,
    /// What was wrong with it the last time, which is told once.
    said: String,
}

impl Renewal {
    pub(crate) fn new() -> Self {
        Self { looked: Instant::now(), said: String::new() }
    }

    /// Takes what changed in the identity's folder, if it is time to look or somebody asked for it. A renewed
    /// certificate counts for new connections; of those that are there only those are cut whose peers are revoked,
    /// past their certificate's end, or of a household that this PC has left.
    pub(crate) fn look(&mut self, agent: &Agent, asked: bool) {
        let Security::Tls(identity) = &agent.security else { return };
        if !asked && self.looked.elapsed() < LOOK_EVERY {
            return;
        }
        self.looked = Instant::now();
        match identity.reload() {
            Ok(false) if !asked => {}
            Ok(changed) => {
                self.said.clear();
                let current = identity.current();
                let (node, crl) = (current.name(), current.crl().number());
                tracing::info!(%node, crl, changed, "Looked at the identity; new connections use what is there");
                if let Some(warning) = expiry(&current) {
                    tracing::warn!("{warning}");
                }
            }
            Err(why) if why.to_string() == self.said => {}
            Err(why) => {
                self.said = why.to_string();
                tracing::error!("The identity changed and cannot be used; the old one stays: {}", self.said);
            }
        }
        // Also of itself a certificate ends.
        agent.cut_revoked();
    }
}
