//! Queue pairs are made and connected on a thread of their own: opening a device opens files, and the kernel
//! may wait for a neighbour's hardware address. A confined thread may do neither.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Arc, OnceLock};

use nix::sys::eventfd::EventFd;

use super::{Queue, device};
use crate::link::connect::eventfd;
use crate::wire::rdma::Place;

/// What is to be done.
enum Task {
    /// Make a queue pair at the port of this address, for the asking side.
    Make(IpAddr),
    /// Connect it to the answering side's.
    Connect(Box<device::Endpoint>, Place),
    /// Make one for the answering side and connect it.
    Answer(IpAddr, Place),
}

/// What came of it.
pub(super) enum Made {
    /// It is not connected yet.
    Open(Box<device::Endpoint>),
    /// It is connected.
    Ready(Box<dyn Queue>),
}

struct Job {
    task: Task,
    answer: Sender<Result<Made, String>>,
    bell: Arc<EventFd>,
}

/// The one thread of this process.
static OPENER: OnceLock<Sender<Job>> = OnceLock::new();

/// Starts the thread, if it does not run yet. A thread that will be confined calls this before.
///
/// # Errors
/// There is no thread to be had.
pub(crate) fn start() -> io::Result<()> {
    if OPENER.get().is_some() {
        return Ok(());
    }
    let (jobs, queue) = channel::<Job>();
    std::thread::Builder::new().name("rdma-opener".into()).spawn(move || {
        for Job { task, answer, bell } in queue {
            // Who asked may be gone; then what was made is dropped here.
            let _ = answer.send(carry_out(task));
            let _ = bell.write(1);
        }
    })?;
    // Of two that start at once, the second's thread ends as its queue is dropped.
    let _ = OPENER.set(jobs);
    Ok(())
}

fn carry_out(task: Task) -> Result<Made, String> {
    match task {
        Task::Make(local) => device::open(local, true).map(|endpoint| Made::Open(Box::new(endpoint))),
        Task::Connect(mut endpoint, other) => {
            endpoint.connect(&other)?;
            Ok(Made::Ready(endpoint.boxed()))
        }
        Task::Answer(local, other) => {
            let mut endpoint = device::open(local, false)?;
            endpoint.connect(&other)?;
            Ok(Made::Ready(endpoint.boxed()))
        }
    }
}

/// A task that was handed over.
pub(super) struct Ticket {
    answers: Receiver<Result<Made, String>>,
    bell: Arc<EventFd>,
}

impl Ticket {
    fn new(task: Task) -> Result<Self, String> {
        let failed = |e: io::Error| format!("there is no descriptor to be had: {e}");
        let bell = Arc::new(eventfd().map_err(failed)?);
        let (answer, answers) = channel();
        let gone = || "the thread that opens RDMA devices does not run".to_owned();
        let jobs = OPENER.get().ok_or_else(gone)?;
        jobs.send(Job { task, answer, bell: bell.clone() }).map_err(|_| gone())?;
        Ok(Self { answers, bell })
    }

    /// See [`Task::Make`].
    pub(super) fn make(local: IpAddr) -> Result<Self, String> {
        Self::new(Task::Make(local))
    }

    /// See [`Task::Connect`].
    pub(super) fn connect(endpoint: Box<device::Endpoint>, other: Place) -> Result<Self, String> {
        Self::new(Task::Connect(endpoint, other))
    }

    /// See [`Task::Answer`].
    pub(super) fn answer(local: IpAddr, other: Place) -> Result<Self, String> {
        Self::new(Task::Answer(local, other))
    }

    /// What came of it, once it is there.
    pub(super) fn poll(&self) -> Option<Result<Made, String>> {
        let _ = self.bell.read();
        match self.answers.try_recv() {
            Ok(made) => Some(made),
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => Some(Err("an RDMA device failed".to_owned())),
        }
    }

    /// Readable when [`poll`](Self::poll) has something.
    pub(super) fn bell(&self) -> RawFd {
        self.bell.as_fd().as_raw_fd()
    }
}
