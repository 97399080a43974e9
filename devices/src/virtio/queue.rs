//! One split virtqueue (section 2.7) as a device sees it: chains that are checked, used buffers,
//! notifications, and the requests that outlive a stop.

use std::collections::VecDeque;
use std::num::Wrapping;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use serde::{Deserialize, Serialize};
use smallvec::SmallVec;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory as _, Permissions};

use crate::GuestMemory;

/// Bytes of a descriptor.
const DESCRIPTOR: u64 = 16;
const AVAIL_F_NO_INTERRUPT: u16 = 1;

/// Why a ring cannot be served any further. Only a reset helps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    /// The rings are not all in RAM, not aligned, or of a size that is not a power of two.
    #[error("the rings do not lie in RAM as they must")]
    Layout,
    /// More chains are available, or in flight, than the ring has entries.
    #[error("the driver made more chains available than the ring holds")]
    Overrun,
    /// A chain loops, leaves its table, is longer than the queue, or nests indirect tables.
    #[error("a descriptor chain loops or leaves its table")]
    Chain,
    /// A chain has a readable part after a writable one.
    #[error("a descriptor chain is readable after being writable")]
    Order,
    /// The device's own worker failed; nothing the driver did.
    #[error("the device's worker failed")]
    Ring,
    /// A chain gives the device no place to answer.
    #[error("a request has no place for its answer")]
    NoAnswer,
}

/// A part of guest memory that a descriptor names. Not yet known to be RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Where.
    pub address: GuestAddress,
    /// How many bytes; never 0.
    pub len: u32,
}

/// One descriptor chain, read once.
#[derive(Debug, Default)]
pub struct Chain {
    /// What names it in the used ring.
    pub head: u16,
    /// The device-readable part.
    pub readable: SmallVec<[Segment; 8]>,
    /// The device-writable part.
    pub writable: SmallVec<[Segment; 8]>,
}

impl Chain {
    /// Bytes in the writable part.
    #[must_use]
    pub fn writable_len(&self) -> u64 {
        self.writable.iter().map(|segment| u64::from(segment.len)).sum()
    }

    /// Bytes in the readable part.
    #[must_use]
    pub fn readable_len(&self) -> u64 {
        self.readable.iter().map(|segment| u64::from(segment.len)).sum()
    }
}

impl Chain {
    /// Copies the first bytes of the readable part into `to` and takes them off; `false` if there are
    /// not as many, or they are not RAM.
    pub fn take_readable(&mut self, memory: &GuestMemory, to: &mut [u8]) -> bool {
        let mut done = 0;
        while done < to.len() {
            let Some(first) = self.readable.first_mut() else { return false };
            let take = (first.len as usize).min(to.len() - done);
            if memory.read_slice(&mut to[done..done + take], first.address).is_err() {
                return false;
            }
            done += take;
            first.address = first.address.unchecked_add(take as u64);
            first.len -= take as u32;
            if first.len == 0 {
                self.readable.remove(0);
            }
        }
        true
    }

    /// Takes the last byte off the writable part and returns where it is, if that is RAM.
    pub fn take_last_writable(&mut self, memory: &GuestMemory) -> Option<GuestAddress> {
        let last = self.writable.last_mut()?;
        let address = last.address.checked_add(u64::from(last.len - 1))?;
        last.len -= 1;
        if last.len == 0 {
            self.writable.pop();
        }
        memory.check_range(address, 1, Permissions::Write).then_some(address)
    }

    /// Copies `from` to the beginning of the writable part; returns how many bytes fitted, or `None` if
    /// it is not RAM.
    pub fn write(&self, memory: &GuestMemory, from: &[u8]) -> Option<u32> {
        let mut done = 0;
        for segment in &self.writable {
            let take = (segment.len as usize).min(from.len() - done);
            memory.write_slice(&from[done..done + take], segment.address).ok()?;
            done += take;
        }
        Some(done as u32)
    }
}

/// Where a queue is and how far it got: its registers and its state as a value.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueLayout {
    /// Entries; a power of two.
    pub size: u16,
    /// The descriptor area.
    pub descriptors: u64,
    /// The driver area: the available ring.
    pub available: u64,
    /// The device area: the used ring.
    pub used: u64,
    /// The next available entry to look at.
    pub next_available: u16,
    /// The next used entry to write.
    pub next_used: u16,
    /// Heads of chains that were taken and not answered: carried out again at the next activation.
    pub unfinished: Vec<u16>,
}

/// A queue in use.
pub struct Virtqueue {
    queue: Queue,
    memory: Arc<GuestMemory>,
    unfinished: VecDeque<u16>,
    outstanding: u16,
    /// Used entries that no interrupt was considered for yet.
    unsignalled: bool,
}

impl Virtqueue {
    /// A queue at `layout` in `memory`.
    ///
    /// # Errors
    /// [`Broken::Layout`].
    pub fn new(layout: &QueueLayout, event_idx: bool, memory: Arc<GuestMemory>) -> Result<Self, Broken> {
        let QueueLayout { size, descriptors, available, used, .. } = *layout;
        let n = usize::from(size);
        let inside = memory.check_range(GuestAddress(descriptors), 16 * n, Permissions::Read)
            && memory.check_range(GuestAddress(available), 6 + 2 * n, Permissions::Read)
            && memory.check_range(GuestAddress(used), 6 + 8 * n, Permissions::Write);
        if !inside || available == 0 || layout.unfinished.len() > n {
            return Err(Broken::Layout);
        }
        let mut queue = Queue::new(size).map_err(|_| Broken::Layout)?;
        queue.try_set_desc_table_address(GuestAddress(descriptors)).map_err(|_| Broken::Layout)?;
        queue.try_set_avail_ring_address(GuestAddress(available)).map_err(|_| Broken::Layout)?;
        queue.try_set_used_ring_address(GuestAddress(used)).map_err(|_| Broken::Layout)?;
        queue.set_next_avail(layout.next_available);
        queue.set_next_used(layout.next_used);
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        let unfinished = layout.unfinished.iter().copied().collect();
        Ok(Self { queue, memory, unfinished, outstanding: 0, unsignalled: false })
    }

    /// Where it is and how far it got. Chains in flight are not in it; [`put_back`](Self::put_back) them.
    #[must_use]
    pub fn layout(&self) -> QueueLayout {
        QueueLayout {
            size: self.queue.size(),
            descriptors: self.queue.desc_table(),
            available: self.queue.avail_ring(),
            used: self.queue.used_ring(),
            next_available: self.queue.next_avail(),
            next_used: self.queue.next_used(),
            unfinished: self.unfinished.iter().copied().collect(),
        }
    }

    /// How many entries the rings have.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Chains that were taken and neither answered nor put back.
    #[must_use]
    pub fn outstanding(&self) -> u16 {
        self.outstanding
    }

    /// Heads that wait to be carried out again.
    #[must_use]
    pub fn unfinished(&self) -> usize {
        self.unfinished.len()
    }

    /// The guest's memory.
    #[must_use]
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// Takes the next available chain into `chain`, whose space is used again. `false`: there is none.
    ///
    /// # Errors
    /// [`Broken::Overrun`], [`Broken::Chain`], [`Broken::Order`].
    pub fn pop(&mut self, chain: &mut Chain) -> Result<bool, Broken> {
        chain.readable.clear();
        chain.writable.clear();
        if self.outstanding >= self.queue.size() {
            // Either nothing is available, or the driver made a chain available twice.
            return if self.has_more()? { Err(Broken::Overrun) } else { Ok(false) };
        }
        let head = if let Some(head) = self.unfinished.pop_front() {
            head
        } else {
            let memory = &*self.memory;
            match self.queue.iter(memory).map_err(|_| Broken::Overrun)?.next() {
                Some(descriptors) => descriptors.head_index(),
                None => return Ok(false),
            }
        };
        chain.head = head;
        self.outstanding += 1;
        self.walk(chain)?;
        Ok(true)
    }

    /// Reads the descriptors of the chain at its head. They are not read through the crate's iterator,
    /// which ends silently at whatever is wrong.
    fn walk(&self, chain: &mut Chain) -> Result<(), Broken> {
        let size = u32::from(self.queue.size());
        let (mut table, mut entries) = (GuestAddress(self.queue.desc_table()), size);
        let (mut index, mut count, mut indirect) = (u32::from(chain.head), 0, false);
        loop {
            if index >= entries || count >= size {
                return Err(Broken::Chain);
            }
            let at = table.checked_add(u64::from(index) * DESCRIPTOR).ok_or(Broken::Chain)?;
            let descriptor: Descriptor = self.memory.read_obj(at).map_err(|_| Broken::Chain)?;
            if descriptor.refers_to_indirect_table() {
                let len = descriptor.len();
                if indirect || descriptor.has_next() || !len.is_multiple_of(DESCRIPTOR as u32) {
                    return Err(Broken::Chain);
                }
                (table, entries, index) = (descriptor.addr(), len / DESCRIPTOR as u32, 0);
                indirect = true;
                continue;
            }
            add(descriptor, chain)?;
            if !descriptor.has_next() {
                return Ok(());
            }
            index = u32::from(descriptor.next());
            count += 1;
        }
    }

    /// Answers the chain at `head`, into whose writable part `len` bytes were written.
    ///
    /// # Errors
    /// The used ring is gone, which cannot happen after [`new`](Self::new).
    pub fn push_used(&mut self, head: u16, len: u32) -> Result<(), Broken> {
        self.outstanding = self.outstanding.saturating_sub(1);
        self.unsignalled = true;
        self.queue.add_used(&*self.memory, head, len).map_err(|_| Broken::Layout)
    }

    /// Leaves the chain at `head` unanswered: it will be [taken](Self::pop) again before new ones.
    pub fn put_back(&mut self, head: u16) {
        self.outstanding = self.outstanding.saturating_sub(1);
        self.unfinished.push_back(head);
    }

    /// Whether the driver wants an interrupt for what was answered since the last call.
    ///
    /// # Errors
    /// The available ring is gone, which cannot happen after [`new`](Self::new).
    pub fn wants_interrupt(&mut self) -> Result<bool, Broken> {
        if !std::mem::take(&mut self.unsignalled) {
            return Ok(false);
        }
        if self.queue.event_idx_enabled() {
            return self.queue.needs_notification(&*self.memory).map_err(|_| Broken::Layout);
        }
        fence(Ordering::SeqCst);
        let flags = self.memory.load::<u16>(GuestAddress(self.queue.avail_ring()), Ordering::Relaxed);
        Ok(u16::from_le(flags.map_err(|_| Broken::Layout)?) & AVAIL_F_NO_INTERRUPT == 0)
    }

    /// Asks the driver to ring the doorbell again. `true`: chains came meanwhile, look again.
    ///
    /// # Errors
    /// The rings are gone, which cannot happen after [`new`](Self::new).
    pub fn enable_doorbell(&mut self) -> Result<bool, Broken> {
        self.queue.enable_notification(&*self.memory).map_err(|_| Broken::Layout)
    }

    /// Tells the driver that the doorbell need not be rung while chains are being taken.
    ///
    /// # Errors
    /// The rings are gone, which cannot happen after [`new`](Self::new).
    pub fn disable_doorbell(&mut self) -> Result<(), Broken> {
        self.queue.disable_notification(&*self.memory).map_err(|_| Broken::Layout)
    }

    fn has_more(&self) -> Result<bool, Broken> {
        let index = self.queue.avail_idx(&*self.memory, Ordering::Acquire).map_err(|_| Broken::Layout)?;
        Ok(index != Wrapping(self.queue.next_avail()))
    }
}

fn add(descriptor: Descriptor, into: &mut Chain) -> Result<(), Broken> {
    let segment = Segment { address: descriptor.addr(), len: descriptor.len() };
    let part = if descriptor.is_write_only() {
        &mut into.writable
    } else if into.writable.is_empty() {
        &mut into.readable
    } else {
        return Err(Broken::Order);
    };
    if segment.len > 0 {
        part.push(segment);
    }
    Ok(())
}
