//! What other threads ask of a handler.

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::mpsc::Sender;
use std::sync::{Mutex, PoisonError};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// A request, and where its answer goes.
pub(super) enum Message {
    /// The content of these pages, all of the handler's, is worthless. Answered with how many took up memory
    /// here, when none does any more.
    Discard(Range<u64>, Sender<u64>),
    /// All pages are zeros.
    Clear(Sender<u64>),
    /// End.
    Stop,
}

/// A queue with a bell.
pub(super) struct Mailbox {
    /// None: nobody looks any more.
    queue: Mutex<Option<Vec<Message>>>,
    bell: EventFd,
}

impl Mailbox {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self { queue: Mutex::new(Some(Vec::new())), bell: EventFd::new(EFD_NONBLOCK)? })
    }

    /// Hands over `message`; `false` if nobody looks any more.
    pub(super) fn send(&self, message: Message) -> bool {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(queue) = queue.as_mut() else { return false };
        queue.push(message);
        // It can only refuse when the count is about to overflow, and then it has been rung.
        let _ = self.bell.write(1);
        true
    }

    /// What was sent since the last call. Also makes the bell silent.
    pub(super) fn take(&self) -> Vec<Message> {
        let _ = self.bell.read();
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        queue.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// From now on nobody looks; what waits for an answer gets none.
    pub(super) fn close(&self) {
        *self.queue.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

impl AsRawFd for Mailbox {
    fn as_raw_fd(&self) -> RawFd {
        self.bell.as_raw_fd()
    }
}
