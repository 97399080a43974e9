//! A disk in memory: for tests, and as the fastest back end that a measurement can have.

use std::time::Instant;

use transport::buffer::Buffer;
use transport::ring::{Completion, Ring};

use super::{Disk, Done, Error, Geometry, Operation, Request, check};

/// A disk whose content is lost with it. Every request is carried out at once.
pub struct MemoryDisk {
    content: Buffer,
    geometry: Geometry,
}

impl MemoryDisk {
    /// A disk of `size` zero bytes, a multiple of 512.
    #[must_use]
    pub fn new(size: usize) -> Self {
        Self::from_vec(vec![0; size])
    }

    /// A disk with this content, whose length is a multiple of 512.
    #[must_use]
    pub fn from_vec(content: Vec<u8>) -> Self {
        let geometry = Geometry {
            size: content.len() as u64 / 512 * 512,
            block_size: 512,
            read_only: false,
            discard: true,
            write_zeroes: true,
        };
        Self { content: Buffer::from_vec(content), geometry }
    }

    /// The same disk, refusing writes.
    #[must_use]
    pub fn read_only(mut self) -> Self {
        self.geometry.read_only = true;
        self
    }

    fn carry_out(&mut self, request: &Request) -> Result<(), Error> {
        check(&self.geometry, request)?;
        let (offset, len) = (request.offset as usize, request.len as usize);
        let out_of_range = Error::OutOfRange { offset: request.offset, len: request.len };
        match request.operation {
            Operation::Read => {
                let part = self.content.slice(offset, len).ok_or(out_of_range)?;
                copy(&part, &request.buffer);
            }
            Operation::Write => {
                let part = self.content.slice(offset, len).ok_or(out_of_range)?;
                copy(&request.buffer, &part);
            }
            Operation::Discard | Operation::WriteZeroes { .. } => {
                self.content.slice(offset, len).ok_or(out_of_range)?.fill(0);
            }
            Operation::Flush => {}
        }
        Ok(())
    }
}

/// Copies all of `from` to `to`, through a small stack buffer: either may be guest memory.
fn copy(from: &Buffer, to: &Buffer) {
    let mut chunk = [0; 4096];
    let mut at = 0;
    while at < from.len() {
        let count = from.read_at(at, &mut chunk);
        to.write_at(at, &chunk[..count]);
        at += count;
    }
}

impl Disk for MemoryDisk {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn attach(&mut self, _ring: &mut Ring) -> Result<(), Error> {
        Ok(())
    }

    fn submit(&mut self, _ring: &mut Ring, request: Request, done: &mut Vec<Done>) {
        let result = self.carry_out(&request);
        done.push(Done { tag: request.tag, result, buffer: request.buffer });
    }

    fn complete(&mut self, _ring: &mut Ring, _completion: Completion, _done: &mut Vec<Done>) -> bool {
        false
    }

    fn tick(&mut self, _ring: &mut Ring, _now: Instant, _done: &mut Vec<Done>) -> Option<Instant> {
        None
    }

    fn abort(&mut self, _ring: &mut Ring, _done: &mut Vec<Done>) {}

    fn describe(&self) -> String {
        format!("{} bytes in memory", self.geometry.size)
    }
}
