//! A remote disk's requests: split into frames, kept in order where they overlap, logged, finished.

use std::io;
use std::time::Instant;

use transport::channel::Answer;
use transport::wire::{MAX_PAYLOAD, Status};

use super::core::{Changing, Core, Frame, Link, Pending, refusal};
use super::counters::Counters;
use super::log::{Change, cost};
use crate::disk::volume::{Access, status};
use crate::disk::{Done, Error, Operation, Request, check};

/// Whether it changes the volume.
fn changes(operation: Operation) -> bool {
    !matches!(operation, Operation::Read | Operation::Flush)
}

/// A longer read is asked for in pieces: the agent's processor still has a piece of this size in its cache when
/// it sends what it has just read, and sends one while it reads the next.
const READ_FRAME: u64 = 256 << 10;

impl Core {
    /// Takes a request of the guest.
    pub(super) fn submit(
        &mut self,
        link: &mut impl Link,
        request: Request,
        now: Instant,
        done: &mut Vec<Done>,
    ) {
        let refused = check(&self.geometry, &request).err().or_else(|| self.refusing(now));
        let nothing = request.len == 0 && request.operation != Operation::Flush;
        if refused.is_some() || nothing {
            done.push(Done { tag: request.tag, result: refused.map_or(Ok(()), Err), buffer: request.buffer });
            return;
        }
        let operation = request.operation;
        let index = self.requests.insert(Pending { request, frames: 0, error: None, started: now });
        match operation {
            Operation::Read => self.send(link, index),
            Operation::Flush => {
                self.requests[index].frames = 1;
                self.send_flush(link, Some(index));
            }
            Operation::Write | Operation::Discard | Operation::WriteZeroes { .. } => {
                self.waiting.push_back(index);
                self.pump(link, now, done);
            }
        }
    }

    /// Sends the changes that may go, oldest first.
    pub(super) fn pump(&mut self, link: &mut impl Link, now: Instant, done: &mut Vec<Done>) {
        while let Some(&index) = self.waiting.front() {
            if let Some(error) = self.refusing(now) {
                self.waiting.pop_front();
                self.requests[index].error = Some(error);
                self.finish(index, now, done);
                continue;
            }
            let request = &self.requests[index].request;
            let (start, end) = (request.offset, request.offset + request.len);
            let cost = cost(request.len, request.operation == Operation::Write);
            if self.changing.iter().any(|c| c.start < end && start < c.end) {
                Counters::add(&self.counters.conflicts);
                return;
            }
            let used = self.log.bytes() + self.reserved;
            if used + cost > self.options.log_bytes && used > 0 {
                self.flush_by_itself(link);
                return;
            }
            self.waiting.pop_front();
            self.reserved += cost;
            self.changing.push(Changing { start, end, request: index });
            self.send(link, index);
            if self.log.bytes() > self.options.log_bytes / 2 {
                self.flush_by_itself(link);
            }
        }
    }

    /// Sends a request's frames.
    fn send(&mut self, link: &mut impl Link, index: usize) {
        let Request { operation, offset, len, .. } = self.requests[index].request;
        let most = match operation {
            Operation::Read => READ_FRAME,
            Operation::Write => MAX_PAYLOAD as u64,
            _ => len,
        };
        let epoch = self.lease.epoch;
        let unmap = operation == Operation::WriteZeroes { unmap: true };
        let mut from = 0;
        while from < len {
            let part = most.min(len - from);
            let access = Access { epoch, offset: offset + from, len: part, unmap };
            let covers = self.log.next();
            let request = Some(index);
            let frame = Frame { request, operation, access, from: from as usize, covers, full_since: None };
            let frame = self.frames.insert(frame);
            self.requests[index].frames += 1;
            self.send_frame(link, frame);
            from += part;
        }
    }

    /// The agent answered a frame.
    pub(super) fn frame_answered(
        &mut self,
        link: &mut impl Link,
        index: usize,
        answer: &Answer,
        now: Instant,
        done: &mut Vec<Done>,
    ) {
        let Some(frame) = self.frames.get(index) else { return };
        let error = match answer.status {
            Status::OK
                if frame.operation == Operation::Read && answer.received as u64 != frame.access.len =>
            {
                Some(io::Error::other("The agent's answer is too short").into())
            }
            Status::OK => None,
            status::FENCED => {
                // The request ends with all others, once the connection has given its buffers back.
                self.fenced(refusal(answer).text);
                return;
            }
            Status::STOPPING | status::BUSY => return self.hold(index, now),
            status::FULL => {
                if self.waits_for_room(index, now) {
                    return self.hold(index, now);
                }
                Some(Error::Full)
            }
            other => Some(refusal(answer).into_error(other, &frame.access)),
        };
        let frame = self.frames.remove(index);
        if error.is_none() {
            self.note_change(&frame, answer, now);
        }
        if frame.operation == Operation::Flush {
            self.flush_ended();
        }
        match (frame.request, error) {
            (None, Some(error)) => self.own_flush_failed(&error, now, done),
            (None, None) => {}
            (Some(request), error) => {
                let Some(pending) = self.requests.get_mut(request) else { return };
                pending.frames -= 1;
                pending.error = pending.error.take().or(error);
                if pending.frames == 0 {
                    self.finish(request, now, done);
                }
            }
        }
        self.pump(link, now, done);
    }

    /// Keeps a change until a flush covers it, or lets go what a flush covers.
    fn note_change(&mut self, frame: &Frame, answer: &Answer, now: Instant) {
        let change = match frame.operation {
            Operation::Read => return,
            Operation::Flush => {
                self.log.flushed(frame.covers, now);
                return self.note_log();
            }
            Operation::Write => Change::Data(answer.payload.to_vec().into()),
            Operation::Discard => Change::Discard,
            Operation::WriteZeroes { unmap } => Change::Zeroes { unmap },
        };
        self.log.add(frame.access.offset, frame.access.len, change, now);
        self.note_log();
    }

    /// Without a flush the log cannot shrink, so what waits for room in it would wait for ever.
    fn own_flush_failed(&mut self, error: &Error, now: Instant, done: &mut Vec<Done>) {
        tracing::error!(disk = %self.place(), %error, "The agent cannot flush the volume");
        self.log.postpone(now);
        while let Some(index) = self.waiting.pop_front() {
            self.requests[index].error = Some(io::Error::other("The agent cannot flush the volume").into());
            self.finish(index, now, done);
        }
    }

    /// Reports a request's result.
    pub(super) fn finish(&mut self, index: usize, now: Instant, done: &mut Vec<Done>) {
        let Pending { request, error, started, .. } = self.requests.remove(index);
        if changes(request.operation)
            && let Some(at) = self.changing.iter().position(|c| c.request == index)
        {
            self.changing.swap_remove(at);
            self.reserved -= cost(request.len, request.operation == Operation::Write);
        }
        let latency = now.saturating_duration_since(started);
        match request.operation {
            Operation::Read => self.counters.reads.note(latency),
            Operation::Flush => self.counters.flushes.note(latency),
            Operation::Write | Operation::Discard | Operation::WriteZeroes { .. } => {
                self.counters.writes.note(latency);
            }
        }
        if error.is_some() {
            Counters::add(&self.counters.errors);
        }
        done.push(Done { tag: request.tag, result: error.map_or(Ok(()), Err), buffer: request.buffer });
    }
}
