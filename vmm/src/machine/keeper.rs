//! The keeper: carries out what vCPUs ask for.

use std::sync::mpsc::Receiver;
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;

use devices::bus::Action;
use devices::thread::{Role, spawn};

use super::parts::Parts;
use super::{Error, Exit};
use crate::config::{OnPanic, OnReboot};
use crate::cpu::Event;

/// Starts the keeper's thread, which ends with the machine.
pub(super) fn start(parts: &Arc<Parts>, events: Receiver<Event>) -> Result<JoinHandle<()>, Error> {
    let parts = Arc::downgrade(parts);
    spawn(Role::Main, "keeper", move || keep(&parts, &events)).map_err(Error::Thread)
}

fn keep(parts: &Weak<Parts>, events: &Receiver<Event>) {
    while let Ok(event) = events.recv() {
        let Some(parts) = parts.upgrade() else { return };
        // Several vCPUs may have asked for the same before all were paused.
        while events.try_recv().is_ok() {}
        match outcome(&event, &parts) {
            Next::End(exit) => return parts.finish(exit),
            Next::Reset => {
                if let Err(error) = parts.reset() {
                    return parts.finish(Err(error));
                }
            }
        }
    }
}

enum Next {
    End(Result<Exit, Error>),
    Reset,
}

fn outcome(event: &Event, parts: &Parts) -> Next {
    let on = &parts.guest.on;
    match event {
        Event::Action(Action::PowerOff) => Next::End(Ok(Exit::PoweredOff)),
        Event::Action(Action::Reset) => match on.reboot {
            OnReboot::Restart => Next::Reset,
            OnReboot::Exit => Next::End(Ok(Exit::Rebooted)),
        },
        Event::Action(Action::Panic) => match on.panic {
            OnPanic::Restart => Next::Reset,
            OnPanic::Exit => Next::End(Ok(Exit::Panicked)),
        },
        Event::TripleFault(index) => {
            tracing::error!(vcpu = index, "The guest ran into a triple fault");
            Next::End(Ok(Exit::TripleFault))
        }
        Event::Failed(index, why) => Next::End(Err(Error::Cpu { index: *index, why: why.clone() })),
    }
}
