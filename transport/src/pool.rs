//! Page-aligned buffers that are used again and again, registered with the ring where the kernel lets us.

use std::sync::{Arc, Mutex, PoisonError};

use crate::buffer::{Buffer, Region};
use crate::ring::Ring;
use crate::wire::MAX_PAYLOAD;

/// Smallest buffer in bytes. Sizes double from here to [`MAX_PAYLOAD`].
const SMALLEST: usize = 4096;

/// How many sizes there are.
const SIZES: usize = (MAX_PAYLOAD / SMALLEST).ilog2() as usize + 1;

/// One megabyte, carved into buffers of one size.
#[derive(Debug)]
struct Chunk {
    memory: Buffer,
    region: Option<Arc<Region>>,
    size: usize,
    registered: Option<u16>,
    used: usize,
}

/// A place in a chunk.
#[derive(Clone, Copy, Debug)]
struct Slot {
    chunk: usize,
    offset: usize,
}

#[derive(Debug, Default)]
struct State {
    chunks: Vec<Chunk>,
    free: [Vec<Slot>; SIZES],
}

/// See the [module](self).
#[derive(Debug)]
pub struct Pool {
    state: Arc<Mutex<State>>,
    most: usize,
    /// Chunks that the ring was asked to register.
    asked: usize,
}

/// Brings a buffer back when its last user drops it.
struct Guard {
    state: Arc<Mutex<State>>,
    size: usize,
    slot: Slot,
}

impl Drop for Guard {
    fn drop(&mut self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(chunk) = state.chunks.get_mut(self.slot.chunk) {
            chunk.used -= 1;
        }
        state.free[self.size].push(self.slot);
    }
}

impl Pool {
    /// A pool that grows to about `bytes`; beyond, buffers come from the heap.
    #[must_use]
    pub fn new(bytes: u64) -> Self {
        let most = usize::try_from(bytes).unwrap_or(usize::MAX).div_ceil(MAX_PAYLOAD);
        Self { state: Arc::default(), most, asked: 0 }
    }

    /// A buffer of `len` bytes, aligned to a page. Its content is whatever an earlier user left there. It comes back
    /// when the last buffer that shares its memory is dropped, on whatever thread.
    #[must_use]
    pub fn take(&self, len: usize) -> Buffer {
        if len == 0 {
            return Buffer::empty();
        }
        self.pooled(len).unwrap_or_else(|| Buffer::zeroed(len))
    }

    /// A buffer of `len` bytes from the pool's own memory; `None` if that is all in use.
    pub(crate) fn pooled(&self, len: usize) -> Option<Buffer> {
        if len > MAX_PAYLOAD {
            return None;
        }
        let size = (len.next_power_of_two().max(SMALLEST) / SMALLEST).ilog2() as usize;
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.free[size].is_empty() {
            state.carve(size, self.most)?;
        }
        let slot = state.free[size].pop()?;
        let chunk = state.chunks.get_mut(slot.chunk)?;
        chunk.used += 1;
        let buffer = chunk.memory.slice(slot.offset, len)?.registered_as(chunk.registered);
        let buffer = match &chunk.region {
            Some(region) => buffer.within(region.clone()),
            None => buffer,
        };
        Some(buffer.guarded(Guard { state: self.state.clone(), size, slot }))
    }

    /// Registers what the pool has grown by.
    pub(crate) fn register(&mut self, ring: &mut Ring) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        for chunk in state.chunks.iter_mut().skip(self.asked) {
            chunk.registered = chunk.memory.slice(0, MAX_PAYLOAD).and_then(|memory| ring.register(memory));
        }
        self.asked = state.chunks.len();
    }

    /// Takes everything out of the ring's table again.
    pub(crate) fn unregister(&mut self, ring: &mut Ring) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        for chunk in &mut state.chunks {
            if let Some(index) = chunk.registered.take() {
                ring.unregister(index);
            }
        }
    }
}

impl State {
    /// Makes room for buffers of `size`: a new chunk, or one of another size that nobody uses.
    fn carve(&mut self, size: usize, most: usize) -> Option<()> {
        let at = if self.chunks.len() < most {
            let memory = Buffer::zeroed(MAX_PAYLOAD);
            let region = memory.to_region();
            self.chunks.push(Chunk { memory, region, size, registered: None, used: 0 });
            self.chunks.len() - 1
        } else {
            let at = self.chunks.iter().position(|chunk| chunk.used == 0)?;
            let old = self.chunks[at].size;
            self.free[old].retain(|slot| slot.chunk != at);
            self.chunks[at].size = size;
            at
        };
        let slots = (0..MAX_PAYLOAD).step_by(SMALLEST << size).map(|offset| Slot { chunk: at, offset });
        self.free[size].extend(slots);
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_buffer_is_used_again_and_sizes_share_the_memory() {
        let pool = Pool::new(2 << 20);
        let first = pool.take(5000);
        let at = first.iovecs()[0].iov_base;
        assert_eq!(at as usize % 4096, 0);
        assert_eq!(first.len(), 5000);
        drop(first);
        assert_eq!(pool.take(8192).iovecs()[0].iov_base, at);
        let (a, b) = (pool.take(1 << 20), pool.take(1 << 20));
        let pooled = |b: &Buffer| {
            pool.state
                .lock()
                .unwrap()
                .chunks
                .iter()
                .any(|c| c.memory.iovecs()[0].iov_base == b.iovecs()[0].iov_base)
        };
        assert!(pooled(&a) && pooled(&b), "both chunks serve the new size");
        assert!(!pooled(&pool.take(1 << 20)), "beyond the bound the heap serves");
    }

    #[test]
    fn a_chunk_is_registered_with_the_ring_or_refused_by_the_kernel() {
        let mut ring = Ring::new(4).expect("io_uring works here");
        let mut pool = Pool::new(4 << 20);
        drop(pool.take(4096));
        pool.register(&mut ring);
        let buffer = pool.take(4096);
        if buffer.registered().is_none() {
            eprintln!("cannot run: the kernel does not let us lock memory");
            return;
        }
        assert_eq!(buffer.slice(0, 512).expect("inside").registered(), buffer.registered());
        pool.unregister(&mut ring);
        assert!(pool.take(4096).registered().is_none());
    }
}
