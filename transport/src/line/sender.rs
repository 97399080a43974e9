//! Where messages wait to be sent.

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::sys::eventfd::EventFd;

use super::order::Full;
use super::{MOST_BODY, MOST_PAYLOAD, Message, Sending};
use crate::buffer::Buffer;
use crate::link::connect::eventfd;
use crate::pool::Pool;
use crate::wire::Body;

/// Memory for payloads; more comes from the heap.
const PAYLOADS: u64 = 4 << 20;

/// Sends down a line, from any thread. Clones are the same.
#[derive(Clone)]
pub struct Sender(Arc<Outbox>);

struct Outbox {
    state: Mutex<State>,
    bell: EventFd,
    /// The thread that drives the line's end may be waiting.
    asleep: AtomicBool,
    pool: Pool,
}

struct State {
    sending: Sending,
    /// The line has to end, for this reason.
    ending: Option<String>,
    /// It ended.
    over: bool,
}

impl Sender {
    /// Of a line whose end gets a clone of it.
    ///
    /// # Errors
    /// There is no descriptor to be had.
    pub fn new() -> io::Result<Self> {
        let state = State { sending: Sending::new(), ending: None, over: false };
        let (bell, asleep) = (eventfd()?, AtomicBool::new(true));
        Ok(Self(Arc::new(Outbox { state: Mutex::new(state), bell, asleep, pool: Pool::new(PAYLOADS) })))
    }

    /// Sends `body`, at most [`MOST_BODY`] bytes, and `payload`, at most [`MOST_PAYLOAD`], after everything that was
    /// sent before. Never blocks. What is sent after the line is over goes nowhere; if more waits than there is room
    /// for, or a message is too long, the line ends with that reason.
    pub fn send(&self, body: &[u8], payload: Option<Buffer>) {
        let message = Message { body: Body::from_slice(body), payload: payload.unwrap_or_default() };
        let fits = body.len() <= MOST_BODY && message.payload.len() <= MOST_PAYLOAD;
        let mut state = self.state();
        if state.over || state.ending.is_some() {
            return;
        }
        if !fits {
            state.ending = Some("a message was too long to be sent".to_owned());
        } else if state.sending.push(message) == Err(Full) {
            state.ending = Some("more was to be sent than the peer takes".to_owned());
        }
        drop(state);
        self.ring();
    }

    /// A copy of `content`, to be sent as a payload.
    #[must_use]
    pub fn payload(&self, content: &[u8]) -> Buffer {
        let buffer = self.0.pool.take(content.len());
        buffer.write_at(0, content);
        buffer
    }

    /// How many messages wait to go: who can do with less may send less.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.state().sending.waiting()
    }

    /// Ends the line when what was sent before has gone, as far as the network takes it at once. The other end hears
    /// `why`, if it is the asking one.
    pub fn end(&self, why: &str) {
        self.state().ending.get_or_insert_with(|| why.to_owned());
        self.ring();
    }

    /// Whether the line ended.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.state().over
    }

    fn ring(&self) {
        if self.0.asleep.swap(false, Ordering::SeqCst) {
            // It fails only if it has been rung for ever, and then it is heard anyway.
            let _ = self.0.bell.write(1);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The thread that drives the line's end looks before it waits.
    pub(super) fn awake(&self) {
        self.0.asleep.store(false, Ordering::SeqCst);
    }

    /// The thread that drives the line's end is about to wait. `false`: something came since it looked.
    pub(super) fn asleep(&self, may_send: bool) -> bool {
        self.0.asleep.store(true, Ordering::SeqCst);
        let state = self.state();
        state.over || state.ending.is_none() && !(may_send && state.sending.waiting() > 0)
    }

    /// The descriptor that is readable when something was sent.
    pub(super) fn bell(&self) -> RawFd {
        self.0.bell.as_fd().as_raw_fd()
    }

    pub(super) fn hushed(&self) {
        // It fails only if nobody rang.
        let _ = self.0.bell.read();
    }

    /// Why the line has to end, when nothing waits any more that could go.
    pub(super) fn ending(&self) -> Option<String> {
        self.state().ending.clone()
    }

    /// The line is over: nothing goes any more.
    pub(super) fn over(&self) {
        let mut state = self.state();
        state.over = true;
        state.sending.clear();
    }

    /// Does something with what waits.
    pub(super) fn with<T>(&self, look: impl FnOnce(&mut Sending) -> T) -> T {
        look(&mut self.state().sending)
    }
}
