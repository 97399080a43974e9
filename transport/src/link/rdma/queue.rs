//! A queue pair, as the link sees it: the device's, or one in memory for tests.

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use crate::buffer::Region;
use crate::wire::rdma::Place;

/// Messages that a side has room for, and that it has under way at most.
pub(crate) const SLOTS: u16 = 64;

/// Operations that a queue pair takes at once.
pub(crate) const WORKS: u32 = 512;

/// Names registered memory: to this side's device, and to the other side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Keys {
    pub(crate) local: u32,
    pub(crate) remote: u32,
}

/// One operation. All keep their order, except that a [`Read`](Self::Read) may still be under way when what
/// follows it is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Work {
    /// The first `len` bytes of the sending slot `slot`, to the other side's next room.
    Send { slot: u16, len: u32 },
    /// From the other side's memory to ours.
    Read(Transfer),
    /// From our memory to the other side's.
    Write(Transfer),
}

/// Bytes that go between registered memory of both sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Transfer {
    pub(crate) local: u64,
    pub(crate) local_key: u32,
    pub(crate) len: u32,
    pub(crate) remote: u64,
    pub(crate) remote_key: u32,
}

/// What the completion queue said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Done {
    /// A message of `len` bytes is in the receiving slot `slot`.
    Received { slot: u16, len: u32 },
    /// The oldest operation that was posted as the last of a group is done, and all before it.
    Group,
    /// Nothing more will work; the text says what did not.
    Failed(String),
}

/// A reliable connection of the device and the slots that messages lie in. Dropping it ends every access
/// to memory that was registered with it before the drop returns.
pub(crate) trait Queue: Send {
    /// Where the other side reaches it.
    fn place(&self) -> Place;

    /// A sending slot, to write a message into. Only one that is not under way may be asked for.
    fn slot(&mut self, slot: u16) -> &mut [u8];

    /// The first `len` bytes of a receiving slot that a message came into.
    fn received(&self, slot: u16, len: u32) -> &[u8];

    /// The message in this receiving slot was taken: the slot may be filled again.
    ///
    /// # Errors
    /// The device refuses.
    fn repost(&mut self, slot: u16) -> io::Result<()>;

    /// Hands operations to the device. Those whose flag is set end a group.
    ///
    /// # Errors
    /// The device refuses; nothing more will work.
    fn post(&mut self, works: &[(Work, bool)]) -> io::Result<()>;

    /// Appends what happened since.
    fn poll(&mut self, done: &mut Vec<Done>);

    /// Makes the next completion readable on [`completions`](Self::completions). One that is there already
    /// does not show: poll once more afterwards.
    ///
    /// # Errors
    /// The device refuses.
    fn notify(&mut self) -> io::Result<()>;

    /// The descriptor that shows completions, after [`notify`](Self::notify).
    fn completions(&self) -> RawFd;

    /// The descriptor was readable: takes what made it so.
    fn woken(&mut self);

    /// The descriptor that shows what happens to the device and its port.
    fn events(&self) -> RawFd;

    /// That one was readable: says what broke the connection, if something did.
    fn take_event(&mut self) -> Option<String>;

    /// Registers `region`, or finds it registered. `None`: it cannot be.
    fn register(&mut self, region: &Arc<Region>) -> Option<Keys>;
}
