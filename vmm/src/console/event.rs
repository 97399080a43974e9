//! An event that a poll set can hold.

// `vmm_sys_util`'s EventFd hands out its descriptor as a number only.
#![allow(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

/// A shared [`EventFd`] whose descriptor can be borrowed.
#[derive(Clone)]
pub(super) struct Event(pub(super) Arc<EventFd>);

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the EventFd keeps its descriptor open for as long as it lives, and `self` holds it.
        unsafe { BorrowedFd::borrow_raw(self.0.as_raw_fd()) }
    }
}
