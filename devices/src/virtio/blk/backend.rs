//! The worker's half: chains in, disk requests out; completions in, used buffers out.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use slab::Slab;
use transport::buffer::Buffer;
use transport::ring::{Completion, Ring};
use vm_memory::{Bytes, GuestAddress};

use super::request::{Parsed, Status, Wanted, parse};
use super::{Counters, ID_LEN, OperationCounters, feature};
use crate::disk::{self, Disk, Done, Geometry, Operation, Request};
use crate::virtio::memory::buffer;
use crate::virtio::worker::{Backend, Queues};
use crate::virtio::{Broken, Chain, Virtqueue};

/// A request that the disk has.
struct InFlight {
    queue: u16,
    head: u16,
    status: GuestAddress,
    operation: Operation,
    len: u64,
    begun: Instant,
    /// The driver did not ask for a flush command, so it expects each write to be stable.
    flush_after: bool,
}

pub(crate) struct BlkBackend {
    disk: Box<dyn Disk>,
    geometry: Geometry,
    id: [u8; ID_LEN],
    counters: Arc<Counters>,
    in_flight: Slab<InFlight>,
    /// Space that is used again for each chain and each batch of answers.
    chain: Chain,
    done: Vec<Done>,
}

impl BlkBackend {
    pub(super) fn new(disk: Box<dyn Disk>, id: [u8; ID_LEN], counters: Arc<Counters>) -> Self {
        let geometry = disk.geometry();
        let (in_flight, chain, done) = (Slab::new(), Chain::default(), Vec::new());
        Self { disk, geometry, id, counters, in_flight, chain, done }
    }

    /// Carries out the request in `self.chain`, or answers it at once.
    fn begin(
        &mut self,
        ring: &mut Ring,
        queues: &mut Queues,
        index: u16,
        now: Instant,
    ) -> Result<(), Broken> {
        let features = queues.features;
        let Some(queue) = queues.get(index) else { return Ok(()) };
        let chain = &mut self.chain;
        let head = chain.head;
        let Parsed { status, kind, wanted } = parse(chain, queue.memory(), &self.geometry, features)?;
        let (operation, offset, len) = match wanted {
            Ok(Wanted::Disk { operation, offset, len }) => (operation, offset, len),
            Ok(Wanted::Id) => {
                let written = chain.write(queue.memory(), &self.id);
                let status_byte = if written.is_some() { Status::Ok } else { Status::IoError };
                return answer(queue, head, status, status_byte, written.unwrap_or(0));
            }
            Err(failed) => {
                if let Some(counters) = kind.map(|kind| of(&self.counters, kind)) {
                    counters.count(0, false, now.elapsed());
                }
                return answer(queue, head, status, failed, 0);
            }
        };
        let data = match operation {
            Operation::Read => buffer(queue.memory(), &chain.writable),
            Operation::Write => buffer(queue.memory(), &chain.readable),
            Operation::Flush | Operation::Discard | Operation::WriteZeroes { .. } => Some(Buffer::empty()),
        };
        let Some(data) = data else {
            of(&self.counters, operation).count(0, false, now.elapsed());
            return answer(queue, head, status, Status::IoError, 0);
        };
        let changes = !matches!(operation, Operation::Read | Operation::Flush);
        let flush_after = changes && features & feature::FLUSH == 0;
        let tag = self.in_flight.insert(InFlight {
            queue: index,
            head,
            status,
            operation,
            len,
            begun: now,
            flush_after,
        });
        let request = Request { tag: tag as u64, operation, offset, len, buffer: data };
        self.disk.submit(ring, request, &mut self.done);
        Ok(())
    }

    /// Answers everything in `self.done`.
    fn finish(&mut self, ring: &mut Ring, queues: &mut Queues) -> Result<(), Broken> {
        let mut at = 0;
        let mut now = None;
        let mut result = Ok(());
        // Submitting a flush may append to `done`.
        while let Some(done) = self.done.get_mut(at) {
            at += 1;
            let tag = done.tag as usize;
            let outcome = std::mem::replace(&mut done.result, Ok(()));
            let Some(request) = self.in_flight.get_mut(tag) else { continue };
            if outcome.is_ok() && std::mem::take(&mut request.flush_after) {
                let flush = Request {
                    tag: tag as u64,
                    operation: Operation::Flush,
                    offset: 0,
                    len: 0,
                    buffer: Buffer::empty(),
                };
                self.disk.submit(ring, flush, &mut self.done);
                continue;
            }
            let request = self.in_flight.remove(tag);
            let now = *now.get_or_insert_with(Instant::now);
            let counters = of(&self.counters, request.operation);
            counters.count(request.len, outcome.is_ok(), now.saturating_duration_since(request.begun));
            let written =
                if request.operation == Operation::Read && outcome.is_ok() { request.len as u32 } else { 0 };
            let status = status_of(&outcome);
            if let Some(queue) = queues.get(request.queue) {
                result = result.and(answer(queue, request.head, request.status, status, written));
            }
        }
        self.done.clear();
        result
    }
}

fn status_of(outcome: &Result<(), disk::Error>) -> Status {
    match outcome {
        Ok(()) => Status::Ok,
        Err(disk::Error::Unsupported) => Status::Unsupported,
        Err(_) => Status::IoError,
    }
}

fn of(counters: &Counters, operation: Operation) -> &OperationCounters {
    match operation {
        Operation::Read => &counters.reads,
        Operation::Write => &counters.writes,
        Operation::Flush => &counters.flushes,
        Operation::Discard | Operation::WriteZeroes { .. } => &counters.discards,
    }
}

/// Writes the status byte and hands the chain back; `written` bytes of data precede the status.
fn answer(
    queue: &mut Virtqueue,
    head: u16,
    at: GuestAddress,
    status: Status,
    written: u32,
) -> Result<(), Broken> {
    queue.memory().write_obj(status as u8, at).map_err(|_| Broken::NoAnswer)?;
    queue.push_used(head, written.saturating_add(1))
}

impl Backend for BlkBackend {
    fn attach(&mut self, ring: &mut Ring) -> io::Result<()> {
        self.disk.attach(ring).map_err(|error| match error {
            disk::Error::Io(error) => error,
            error => io::Error::other(error),
        })
    }

    fn serve(&mut self, ring: &mut Ring, queues: &mut Queues, index: u16) -> Result<bool, Broken> {
        let now = Instant::now();
        let Some(queue) = queues.get(index) else { return Ok(false) };
        queue.disable_doorbell()?;
        let mut more = true;
        // At most a queue's worth at a time, so that no queue starves the others or the back end.
        for _ in 0..queue.size() {
            let Some(queue) = queues.get(index) else { break };
            if !queue.pop(&mut self.chain)? {
                more = queue.enable_doorbell()?;
                break;
            }
            self.begin(ring, queues, index, now)?;
        }
        self.finish(ring, queues)?;
        Ok(more)
    }

    fn complete(
        &mut self,
        ring: &mut Ring,
        queues: Option<&mut Queues>,
        completion: Completion,
    ) -> Result<(), Broken> {
        self.disk.complete(ring, completion, &mut self.done);
        let Some(queues) = queues else {
            self.done.clear();
            return Ok(());
        };
        self.finish(ring, queues)
    }

    fn tick(
        &mut self,
        ring: &mut Ring,
        queues: Option<&mut Queues>,
        now: Instant,
    ) -> Result<Option<Instant>, Broken> {
        let next = self.disk.tick(ring, now, &mut self.done);
        match queues {
            Some(queues) => self.finish(ring, queues)?,
            None => self.done.clear(),
        }
        Ok(next)
    }

    fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    fn close(&mut self, ring: &mut Ring) {
        self.disk.close(ring);
    }

    fn abort(&mut self, ring: &mut Ring, queues: &mut Queues) {
        self.disk.abort(ring, &mut self.done);
        // What was finished in the end is answered; the rest stays with the queue.
        self.done.retain(|done| done.result.is_ok());
        let mut finished = std::mem::take(&mut self.done);
        finished.retain(|done| self.in_flight.get(done.tag as usize).is_some_and(|r| !r.flush_after));
        self.done = finished;
        let _ = self.finish(ring, queues);
        for request in self.in_flight.drain() {
            if let Some(queue) = queues.get(request.queue) {
                queue.put_back(request.head);
            }
        }
    }
}
