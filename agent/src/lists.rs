//! Lists of revoked certificates that peers bring: verified and stored on a thread of their own, since a signature
//! and two fsyncs are more than a connection's thread may wait for. A list that says of itself that it is old, or
//! that is in force already, never gets here.

use std::io;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread;

use transport::identity::{Error, Reloading, revocation};

use crate::admission::Handle;
use crate::serve::Agent;
use crate::volume::lock;

/// So many lists wait at once.
const WAITING: usize = 32;

/// A list that a connection was sent.
pub(crate) struct Sent {
    pub(crate) id: u64,
    pub(crate) list: Vec<u8>,
    pub(crate) answer_len: usize,
    pub(crate) from: String,
    pub(crate) handle: Arc<Handle>,
    pub(crate) identity: Arc<Reloading>,
}

/// What became of the lists of one connection, until it takes them.
pub(crate) type Answers = Mutex<Vec<(u64, Result<revocation::Answer, Error>)>>;

/// The way to the thread.
pub(crate) struct Lists {
    to: SyncSender<Sent>,
    from: Mutex<Option<Receiver<Sent>>>,
}

impl Lists {
    pub(crate) fn new() -> Self {
        let (to, from) = sync_channel(WAITING);
        Self { to, from: Mutex::new(Some(from)) }
    }

    /// Has `job` looked at; its connection is woken with the answer. `false`: too many wait.
    pub(crate) fn take(&self, job: Sent) -> bool {
        self.to.try_send(job).is_ok()
    }

    /// Starts the thread, once.
    ///
    /// # Errors
    /// There is no thread to be had.
    pub(crate) fn start(agent: &Arc<Agent>) -> io::Result<()> {
        let Some(jobs) = lock(&agent.lists.from).take() else { return Ok(()) };
        let agent = Arc::clone(agent);
        let body = move || jobs.into_iter().for_each(|job| look(&agent, job));
        thread::Builder::new().name("lists".to_owned()).spawn(body).map(drop)
    }
}

fn look(agent: &Agent, job: Sent) {
    let Sent { id, list, answer_len, from, handle, identity } = job;
    let answer = revocation::answer(&identity, &list, answer_len);
    if let Ok(revocation::Answer { taken, .. }) = &answer {
        if taken.newer {
            tracing::info!(%from, number = taken.number, "Took a newer list of revoked certificates");
            agent.cut_revoked();
        }
        if let Some(error) = &taken.not_stored {
            tracing::error!(%error, "The list of revoked certificates could not be stored");
        }
    }
    lock(&handle.lists).push((id, answer));
    handle.wake.write(1).ok();
}
