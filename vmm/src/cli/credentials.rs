//! The identity by which `omega run` meets the agents of its guest's disks, memory and vCPUs.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use transport::identity::{Reloading, Role, folder};

use super::Failure;
use crate::config::{Guest, Peer};

/// How often the identity's files are looked at: a new certificate or list of revoked ones counts soon.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// This PC's identity, if `guest` has a disk, memory or vCPUs elsewhere that needs one and there is one.
///
/// # Errors
/// `chosen` holds none, or the one that there is cannot be used.
pub(super) fn find(guest: &Guest, chosen: Option<&Path>) -> Result<Option<Arc<Reloading>>, Failure> {
    let disks = guest.disk.iter().filter_map(|disk| disk.remote.as_ref()).map(Peer::from);
    let lent = guest.memory.helper.iter().map(Peer::from).chain(guest.cpu.place.iter().map(Peer::from));
    let mut peers = disks.chain(lent);
    if peers.all(|peer| peer.insecure) {
        return Ok(None);
    }
    let failed = |why: transport::identity::Error| Failure::failed(why.to_string());
    let identity = match chosen.filter(|path| !path.as_os_str().is_empty()) {
        Some(folder) => Some(Reloading::load(folder).map_err(failed)?),
        None => match folder::of_this_user() {
            Some(folder) => Reloading::find(&folder).map_err(failed)?,
            None => None,
        },
    };
    if let Some(identity) = &identity {
        let current = identity.current();
        if !current.roles().has(Role::Console) {
            tracing::warn!(
                node = current.name(),
                "This node is no console by its certificate; agents may refuse it"
            );
        }
        watch(Arc::clone(identity))?;
    }
    Ok(identity)
}

/// Takes what becomes new in the identity's folder, on a thread of its own: those that connect may open no file.
fn watch(identity: Arc<Reloading>) -> Result<(), Failure> {
    let body = move || {
        let (mut said, mut refused) = (String::new(), String::new());
        loop {
            std::thread::sleep(LOOK_EVERY);
            take_offered(&identity, &mut refused);
            match identity.reload() {
                Ok(true) => {
                    let current = identity.current();
                    let (node, crl) = (current.name(), current.crl().number());
                    tracing::info!(%node, crl, "The identity was renewed; new connections use it");
                    said.clear();
                }
                Ok(false) => {}
                Err(why) if why.to_string() == said => {}
                Err(why) => {
                    said = why.to_string();
                    tracing::warn!("The identity changed and cannot be used; the old one stays: {said}");
                }
            }
        }
    };
    std::thread::Builder::new().name("identity".to_owned()).spawn(body)?;
    Ok(())
}

/// Takes the lists of revoked certificates that agents had, which their disks' threads may not store.
fn take_offered(identity: &Reloading, said: &mut String) {
    for taken in identity.take_offered() {
        match taken {
            Ok(taken) if taken.newer => {
                tracing::info!(number = taken.number, "An agent knew a newer list of revoked certificates");
                if let Some(why) = taken.not_stored {
                    tracing::warn!(%why, "The list of revoked certificates is in force, but not stored");
                }
            }
            Ok(_) => {}
            Err(why) if why.to_string() == *said => {}
            Err(why) => {
                *said = why.to_string();
                tracing::warn!("An agent sent a list of revoked certificates that is none: {said}");
            }
        }
    }
}
