//! The driver's side of a split virtqueue.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::{PATIENCE, Route};
use crate::GuestMemory;

/// The descriptor goes on in `next`.
pub const NEXT: u16 = 1;
/// The device may write.
pub const WRITE: u16 = 2;
/// The descriptor names a table of descriptors.
pub const INDIRECT: u16 = 4;

/// One used buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// The chain's head.
    pub head: u16,
    /// How many bytes the device says it wrote.
    pub len: u32,
}

/// A queue as its driver works it: the descriptors are given out in order of a free list.
pub struct DriverQueue {
    memory: Arc<GuestMemory>,
    /// The descriptor table.
    pub descriptors: GuestAddress,
    /// The available ring.
    pub available: GuestAddress,
    /// The used ring.
    pub used: GuestAddress,
    size: u16,
    free: Vec<u16>,
    next_available: u16,
    /// What the device was last told of.
    announced: u16,
    next_used: u16,
    event_idx: bool,
    doorbell: Option<Arc<EventFd>>,
    route: Option<Arc<Route>>,
}

impl DriverQueue {
    pub(super) fn new(memory: Arc<GuestMemory>, at: GuestAddress, size: u16) -> Self {
        let n = u64::from(size);
        let available = at.unchecked_add(16 * n);
        let used = GuestAddress((available.0 + 6 + 2 * n).next_multiple_of(4096));
        let end = used.0 + 6 + 8 * n;
        let zeros = vec![0; (end - at.0) as usize];
        memory.write_slice(&zeros, at).expect("the rings lie in RAM");
        Self {
            memory,
            descriptors: at,
            available,
            used,
            size,
            free: (0..size).rev().collect(),
            next_available: 0,
            announced: 0,
            next_used: 0,
            event_idx: false,
            doorbell: None,
            route: None,
        }
    }

    pub(super) fn connect(mut self, doorbell: Option<Arc<EventFd>>, route: Arc<Route>) -> Self {
        self.doorbell = doorbell;
        self.route = Some(route);
        self
    }

    /// Whether EVENT_IDX was negotiated.
    #[must_use]
    pub fn event_idx(mut self, on: bool) -> Self {
        self.event_idx = on;
        self
    }

    /// Without a doorbell: whoever drives the device knows when there is something.
    #[must_use]
    pub fn silent(mut self) -> Self {
        self.doorbell = None;
        self
    }

    /// The vector.
    ///
    /// # Panics
    /// The queue is not connected.
    #[must_use]
    pub fn route(&self) -> &Route {
        self.route.as_ref().expect("the queue is connected")
    }

    /// How many descriptors are free.
    #[must_use]
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Writes descriptor `index` as it is.
    pub fn describe(&self, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        let at = self.descriptors.unchecked_add(16 * u64::from(index));
        self.memory.write_obj(Descriptor::new(address, len, flags, next), at).expect("the table lies in RAM");
    }

    /// Makes the chain at `head` available, whatever it is; the device sees it at [`kick`](Self::kick).
    pub fn offer(&mut self, head: u16) {
        let slot = u64::from(self.next_available % self.size);
        let at = self.available.unchecked_add(4 + 2 * slot);
        self.memory.write_obj(head.to_le(), at).expect("the ring lies in RAM");
        self.next_available = self.next_available.wrapping_add(1);
    }

    /// Makes a chain of these readable and writable parts available; returns its head.
    ///
    /// # Panics
    /// No descriptors are free.
    pub fn add(&mut self, readable: &[(GuestAddress, u32)], writable: &[(GuestAddress, u32)]) -> u16 {
        let readable = readable.iter().map(|part| (part, 0));
        let parts: Vec<_> = readable.chain(writable.iter().map(|part| (part, WRITE))).collect();
        let indices: Vec<u16> =
            parts.iter().map(|_| self.free.pop().expect("a descriptor is free")).collect();
        for (i, &(&(address, len), flags)) in parts.iter().enumerate() {
            let next = indices.get(i + 1);
            let flags = flags | if next.is_some() { NEXT } else { 0 };
            self.describe(indices[i], address.0, len, flags, next.copied().unwrap_or(0));
        }
        self.offer(indices[0]);
        indices[0]
    }

    /// Publishes what was offered, and rings the doorbell if the device wants that. Whether it was rung.
    pub fn kick(&mut self) -> bool {
        let at = self.available.unchecked_add(2);
        self.memory.store(self.next_available.to_le(), at, Ordering::Release).expect("it lies in RAM");
        fence(Ordering::SeqCst);
        let old = std::mem::replace(&mut self.announced, self.next_available);
        let wanted = if self.event_idx {
            let event = self.read(self.used.unchecked_add(4 + 8 * u64::from(self.size)));
            self.next_available.wrapping_sub(event).wrapping_sub(1) < self.next_available.wrapping_sub(old)
        } else {
            self.read(self.used) & 1 == 0
        };
        if wanted {
            self.ring();
        }
        wanted
    }

    /// Rings the doorbell.
    pub fn ring(&self) {
        if let Some(doorbell) = &self.doorbell {
            doorbell.write(1).expect("an eventfd takes a signal");
        }
    }

    fn read(&self, at: GuestAddress) -> u16 {
        u16::from_le(self.memory.load(at, Ordering::Acquire).expect("the ring lies in RAM"))
    }

    /// The next used buffer, if there is one. Its descriptors are free again.
    pub fn poll(&mut self) -> Option<Used> {
        if self.read(self.used.unchecked_add(2)) == self.next_used {
            return None;
        }
        let at = self.used.unchecked_add(4 + 8 * u64::from(self.next_used % self.size));
        let [head, len]: [u32; 2] = self.memory.read_obj(at).expect("the ring lies in RAM");
        self.next_used = self.next_used.wrapping_add(1);
        if self.event_idx {
            let event = self.available.unchecked_add(4 + 2 * u64::from(self.size));
            self.memory.store(self.next_used.to_le(), event, Ordering::Relaxed).expect("it lies in RAM");
            fence(Ordering::SeqCst);
        }
        let head = u32::from_le(head) as u16;
        self.release(head);
        Some(Used { head, len: u32::from_le(len) })
    }

    fn release(&mut self, head: u16) {
        let mut index = head;
        for _ in 0..self.size {
            let at = self.descriptors.unchecked_add(16 * u64::from(index));
            let descriptor: Descriptor = self.memory.read_obj(at).expect("the table lies in RAM");
            if !self.free.contains(&index) {
                self.free.push(index);
            }
            if !descriptor.has_next() || descriptor.next() >= self.size {
                break;
            }
            index = descriptor.next();
        }
    }

    /// Waits for the next used buffer, for as long as `timeout`, sleeping on the vector.
    pub fn wait_up_to(&mut self, timeout: Duration) -> Option<Used> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(used) = self.poll() {
                return Some(used);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            self.route().wait(left);
        }
    }

    /// Waits for the next used buffer.
    ///
    /// # Panics
    /// None comes for 20 s.
    pub fn wait(&mut self) -> Used {
        self.wait_up_to(PATIENCE).expect("the device answers")
    }
}
