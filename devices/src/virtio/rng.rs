//! Entropy device (section 5.4): random bytes from the kernel of this PC.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use transport::ring::Ring;

use super::worker::{Backend, Queues, Worker};
use super::{Activation, Broken, Chain, Interrupts, Returned, VirtioDevice};
use crate::thread::Role;

const QUEUE_SIZE: u16 = 64;
/// Most bytes for one request; a driver that wants more asks again.
const REQUEST_MAX: usize = 4096;

/// A virtio entropy device.
pub struct Rng {
    worker: Worker<RngBackend>,
}

impl Rng {
    /// An entropy device.
    #[must_use]
    pub fn new() -> Self {
        Self { worker: Worker::new(RngBackend { chain: Chain::default() }) }
    }
}

impl Default for Rng {
    fn default() -> Self {
        Self::new()
    }
}

struct RngBackend {
    chain: Chain,
}

impl Backend for RngBackend {
    fn attach(&mut self, _ring: &mut Ring) -> io::Result<()> {
        Ok(())
    }

    fn serve(&mut self, _ring: &mut Ring, queues: &mut Queues, index: u16) -> Result<bool, Broken> {
        let Some(queue) = queues.get(index) else { return Ok(false) };
        queue.disable_doorbell()?;
        for _ in 0..queue.size() {
            if !queue.pop(&mut self.chain)? {
                return queue.enable_doorbell();
            }
            let mut bytes = [0; REQUEST_MAX];
            let wanted = self.chain.writable_len().min(REQUEST_MAX as u64) as usize;
            let filled = getrandom::fill(&mut bytes[..wanted]).is_ok();
            let written = self.chain.write(queue.memory(), &bytes[..wanted]).filter(|_| filled);
            queue.push_used(self.chain.head, written.unwrap_or(0))?;
        }
        Ok(true)
    }
}

impl VirtioDevice for Rng {
    fn kind(&self) -> &'static str {
        "virtio-rng"
    }

    fn device_type(&self) -> u16 {
        4
    }

    fn pci_class(&self) -> u32 {
        0xff_00_00
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn read_config(&self, _offset: usize, data: &mut [u8]) {
        data.fill(0);
    }

    fn start(&mut self, _interrupts: &Arc<Interrupts>) -> io::Result<()> {
        self.worker.start(Role::Device, self.kind(), 8)
    }

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        self.worker.activate(activation)
    }

    fn deactivate(&mut self, patience: Duration, returned: Returned) {
        self.worker.deactivate(patience, returned);
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::super::testing::Harness;
    use super::*;

    #[test]
    fn a_request_is_filled_with_bytes_that_differ_each_time() {
        let machine = Harness::new(Box::new(Rng::new()), 16 << 20);
        let mut queue = machine.run(1, 16).remove(0);
        let mut seen = std::collections::HashSet::new();
        for _ in 0..100 {
            queue.add(&[], &[(machine.data(0), 8), (machine.data(0x100), 8)]);
            queue.kick();
            assert_eq!(queue.wait().len, 16);
            for at in [0, 0x100] {
                seen.insert(machine.memory.read_obj::<u64>(machine.data(at)).expect("RAM"));
            }
        }
        assert_eq!(seen.len(), 200);
    }

    #[test]
    fn a_request_outside_of_ram_or_too_large_is_answered_short() {
        let machine = Harness::new(Box::new(Rng::new()), 16 << 20);
        let mut queue = machine.run(1, 16).remove(0);
        queue.add(&[], &[(GuestAddress(1 << 40), 64)]);
        queue.add(&[], &[(machine.data(0), 1 << 20)]);
        queue.add(&[(machine.data(0), 64)], &[]);
        queue.kick();
        let lens: Vec<u32> = (0..3).map(|_| queue.wait().len).collect();
        assert_eq!(lens, [0, REQUEST_MAX as u32, 0]);
    }
}
