//! Console device (section 5.3): one port. Output goes into a writer; input and size come through
//! [`Input`].

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use transport::ring::Ring;

use super::worker::{Backend, Caller, Queues, Worker};
use super::{Activation, Broken, Chain, Interrupts, Returned, VirtioDevice};
use crate::thread::Role;

const QUEUE_SIZE: u16 = 64;
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
const F_SIZE: u64 = 1;
/// Input that the guest has not taken yet; more is refused.
const INPUT_MAX: usize = 64 << 10;
/// Most bytes that are taken from one chain of output; the rest of a larger one is dropped.
const OUTPUT_MAX: usize = 1 << 20;

/// A virtio console.
pub struct Console {
    worker: Worker<ConsoleBackend>,
    shared: Arc<Shared>,
}

struct Shared {
    input: Mutex<VecDeque<u8>>,
    /// Columns and, in the upper half, rows.
    size: AtomicU32,
    interrupts: OnceLock<Arc<Interrupts>>,
    caller: OnceLock<Arc<Caller<ConsoleBackend>>>,
}

/// The keyboard and window of a console: input, and how large it is.
#[derive(Clone)]
pub struct Input(Arc<Shared>);

impl Shared {
    fn input(&self) -> MutexGuard<'_, VecDeque<u8>> {
        self.input.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Console {
    /// A console that writes what the guest prints to `output`, which must not block for long.
    #[must_use]
    pub fn new(output: Box<dyn io::Write + Send>) -> (Self, Input) {
        let shared = Arc::new(Shared {
            input: Mutex::default(),
            size: AtomicU32::new(24 << 16 | 80),
            interrupts: OnceLock::new(),
            caller: OnceLock::new(),
        });
        let backend = ConsoleBackend { output, shared: shared.clone(), chain: Chain::default() };
        let input = Input(shared.clone());
        (Self { worker: Worker::new(backend), shared }, input)
    }
}

impl Input {
    /// Hands bytes to the guest; returns how many were taken (fewer if the guest reads none of them).
    #[must_use]
    pub fn enqueue(&self, bytes: &[u8]) -> usize {
        let mut input = self.0.input();
        let take = bytes.len().min(INPUT_MAX - input.len());
        input.extend(&bytes[..take]);
        drop(input);
        if let Some(caller) = self.0.caller.get().filter(|_| take > 0) {
            caller.call(|_, queues| {
                if let Some(queues) = queues {
                    queues.ring(RECEIVE);
                }
            });
        }
        take
    }

    /// Tells the guest how large its terminal is.
    pub fn resize(&self, columns: u16, rows: u16) {
        let size = u32::from(rows) << 16 | u32::from(columns);
        if self.0.size.swap(size, Ordering::AcqRel) != size
            && let Some(interrupts) = self.0.interrupts.get()
        {
            interrupts.signal_config();
        }
    }
}

struct ConsoleBackend {
    output: Box<dyn io::Write + Send>,
    shared: Arc<Shared>,
    chain: Chain,
}

impl ConsoleBackend {
    fn receive(&mut self, queues: &mut Queues) -> Result<bool, Broken> {
        let Some(queue) = queues.get(RECEIVE) else { return Ok(false) };
        queue.disable_doorbell()?;
        let mut input = self.shared.input();
        while !input.is_empty() {
            if !queue.pop(&mut self.chain)? {
                return queue.enable_doorbell();
            }
            let room = usize::try_from(self.chain.writable_len()).unwrap_or(usize::MAX);
            let bytes: Vec<u8> = input.iter().take(room).copied().collect();
            let written = self.chain.write(queue.memory(), &bytes).unwrap_or(0);
            input.drain(..written as usize);
            queue.push_used(self.chain.head, written)?;
        }
        Ok(false)
    }

    fn transmit(&mut self, queues: &mut Queues) -> Result<bool, Broken> {
        let Some(queue) = queues.get(TRANSMIT) else { return Ok(false) };
        queue.disable_doorbell()?;
        for _ in 0..queue.size() {
            if !queue.pop(&mut self.chain)? {
                return queue.enable_doorbell();
            }
            let mut left = self.chain.readable_len().min(OUTPUT_MAX as u64) as usize;
            let mut chunk = [0; 4096];
            while left > 0 {
                let take = left.min(chunk.len());
                if !self.chain.take_readable(queue.memory(), &mut chunk[..take]) {
                    break;
                }
                // A console that nobody can read any more is no reason to stop the guest.
                let _ = self.output.write_all(&chunk[..take]);
                left -= take;
            }
            queue.push_used(self.chain.head, 0)?;
        }
        let _ = self.output.flush();
        Ok(true)
    }
}

impl Backend for ConsoleBackend {
    fn attach(&mut self, _ring: &mut Ring) -> io::Result<()> {
        Ok(())
    }

    fn serve(&mut self, _ring: &mut Ring, queues: &mut Queues, index: u16) -> Result<bool, Broken> {
        match index {
            RECEIVE => self.receive(queues),
            _ => self.transmit(queues),
        }
    }
}

impl VirtioDevice for Console {
    fn kind(&self) -> &'static str {
        "virtio-console"
    }

    fn device_type(&self) -> u16 {
        3
    }

    fn pci_class(&self) -> u32 {
        0x07_80_00
    }

    fn features(&self) -> u64 {
        F_SIZE
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 2]
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        // cols, rows, max_nr_ports
        let mut config = [0; 8];
        config[..4].copy_from_slice(&self.shared.size.load(Ordering::Acquire).to_le_bytes());
        config[4] = 1;
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = config.get(offset + i).copied().unwrap_or(0);
        }
    }

    fn start(&mut self, interrupts: &Arc<Interrupts>) -> io::Result<()> {
        self.worker.start(Role::Device, self.kind(), 8)?;
        let _ = self.shared.interrupts.set(interrupts.clone());
        if let Some(caller) = self.worker.caller() {
            let _ = self.shared.caller.set(caller.clone());
        }
        Ok(())
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
    use std::sync::mpsc::{Receiver, Sender, channel};

    use vm_memory::Bytes;

    use super::super::testing::Harness;
    use super::*;

    struct Screen(Sender<Vec<u8>>);
    impl io::Write for Screen {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.send(bytes.to_vec()).expect("the test listens");
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn machine() -> (Harness, Input, Receiver<Vec<u8>>) {
        let (screen, seen) = channel();
        let (console, input) = Console::new(Box::new(Screen(screen)));
        (Harness::new(Box::new(console), 16 << 20), input, seen)
    }

    #[test]
    fn what_the_guest_prints_comes_out_in_order() {
        let (machine, _input, seen) = machine();
        let mut queues = machine.run(2, 16);
        machine.memory.write_slice(b"hello, world", machine.data(0)).expect("RAM");
        queues[1].add(&[(machine.data(0), 7), (machine.data(7), 5)], &[]);
        queues[1].kick();
        assert_eq!(queues[1].wait().len, 0);
        let printed: Vec<u8> = seen.try_iter().flatten().collect();
        assert_eq!(printed, b"hello, world");
    }

    #[test]
    fn input_waits_for_buffers_and_buffers_wait_for_input() {
        let (machine, input, _seen) = machine();
        assert_eq!(input.enqueue(b"abcdef"), 6, "input before the driver is there is kept");
        let mut queues = machine.run(2, 16);
        let queue = &mut queues[0];
        queue.add(&[], &[(machine.data(0), 4)]);
        queue.kick();
        assert_eq!(queue.wait().len, 4);
        queue.add(&[], &[(machine.data(8), 4)]);
        queue.kick();
        assert_eq!(queue.wait().len, 2);
        queue.add(&[], &[(machine.data(16), 4)]);
        queue.kick();
        assert_eq!(queue.wait_up_to(Duration::from_millis(20)), None);
        assert_eq!(input.enqueue(b"xyz"), 3);
        assert_eq!(queue.wait().len, 3);
        let mut got = [0; 19];
        machine.memory.read_slice(&mut got, machine.data(0)).expect("RAM");
        assert_eq!(&got, b"abcd\0\0\0\0ef\0\0\0\0\0\0xyz");
    }

    #[test]
    fn input_that_the_guest_never_reads_is_bounded() {
        let (_machine, input, _seen) = machine();
        assert_eq!(input.enqueue(&vec![0; INPUT_MAX + 1]), INPUT_MAX);
        assert_eq!(input.enqueue(b"x"), 0);
    }

    #[test]
    fn a_new_size_raises_a_configuration_interrupt() {
        let (machine, input, _seen) = machine();
        let _queues = machine.run(2, 16);
        let before = machine.routes.get(0).count();
        input.resize(132, 50);
        input.resize(132, 50);
        assert_eq!(machine.routes.get(0).count(), before + 1);
        assert_eq!(machine.read(0x2000, 4), 50 << 16 | 132);
    }
}
