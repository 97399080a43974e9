//! Memory balloon (section 5.5): pages that the guest gives up, or reports as free, go back to this PC.

use std::io;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use transport::ring::Ring;
use vm_memory::GuestAddress;

use super::memory::{PAGE, release};
use super::worker::{Backend, Queues, Worker};
use super::{Activation, Broken, Chain, Interrupts, Returned, VirtioDevice};
use crate::GuestMemory;
use crate::thread::Role;

const QUEUE_SIZE: u16 = 128;
const QUEUES: usize = 5;
const INFLATE: u16 = 0;
const DEFLATE: u16 = 1;
/// The reporting queue's number in the specification. Drivers that leave out the queues of features
/// that they do not have use the first free number instead.
const REPORTING: u16 = 4;
const REPORTING_COMPACT: u16 = 2;

const F_MUST_TELL_HOST: u64 = 1 << 0;
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
const F_REPORTING: u64 = 1 << 5;

/// Most page numbers that are taken from one chain: what Linux sends at once, four times.
const PAGES_MAX: usize = 1024;

/// How a balloon begins.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// How many bytes the guest is asked to give up.
    pub size: u64,
    /// Whether the guest reports the pages that it frees.
    pub free_page_reporting: bool,
}

/// A virtio balloon.
pub struct Balloon {
    worker: Worker<BalloonBackend>,
    options: Options,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    /// In pages.
    target: AtomicU32,
    /// In pages, as the driver says.
    actual: AtomicU32,
    /// In bytes.
    released: AtomicU64,
    interrupts: OnceLock<Arc<Interrupts>>,
}

/// Steers a balloon while the guest runs.
#[derive(Clone)]
pub struct Control(Arc<Shared>);

fn pages(bytes: u64) -> u32 {
    u32::try_from(bytes / PAGE).unwrap_or(u32::MAX)
}

impl Balloon {
    /// A balloon whose pages go back to this PC.
    #[must_use]
    pub fn new(options: Options) -> Self {
        Self::with_release(options, release)
    }

    /// A balloon whose pages `release` takes back from the guest: memory, address and length to bytes freed. When it
    /// returns, their content is worthless to everybody and they read as zeros. It may be asked for what is no RAM,
    /// or no whole pages, which it passes over.
    #[must_use]
    pub fn with_release(
        options: Options,
        release: impl Fn(&GuestMemory, GuestAddress, u64) -> io::Result<u64> + Send + 'static,
    ) -> Self {
        let shared = Arc::new(Shared::default());
        shared.target.store(pages(options.size), Ordering::Release);
        let release = Box::new(release);
        let backend = BalloonBackend { shared: shared.clone(), chain: Chain::default(), release };
        Self { worker: Worker::new(backend), options, shared }
    }

    /// What steers it.
    #[must_use]
    pub fn control(&self) -> Control {
        Control(self.shared.clone())
    }
}

impl Control {
    /// Asks the guest to give up `bytes` of its RAM, rounded down to pages.
    pub fn set_target(&self, bytes: u64) {
        if self.0.target.swap(pages(bytes), Ordering::AcqRel) != pages(bytes)
            && let Some(interrupts) = self.0.interrupts.get()
        {
            interrupts.signal_config();
        }
    }

    /// What the guest is asked to give up, in bytes.
    #[must_use]
    pub fn target(&self) -> u64 {
        u64::from(self.0.target.load(Ordering::Acquire)) * PAGE
    }

    /// What the guest says it has given up, in bytes.
    #[must_use]
    pub fn actual(&self) -> u64 {
        u64::from(self.0.actual.load(Ordering::Acquire)) * PAGE
    }

    /// Bytes that went back to this PC since the start, by inflation and by reports.
    #[must_use]
    pub fn released(&self) -> u64 {
        self.0.released.load(Ordering::Acquire)
    }
}

/// Takes pages back from the guest; see [`Balloon::with_release`].
type Release = Box<dyn Fn(&GuestMemory, GuestAddress, u64) -> io::Result<u64> + Send>;

struct BalloonBackend {
    shared: Arc<Shared>,
    chain: Chain,
    release: Release,
}

impl BalloonBackend {
    fn release(&self, memory: &GuestMemory, address: GuestAddress, len: u64) {
        match (self.release)(memory, address, len) {
            Ok(released) => {
                self.shared.released.fetch_add(released, Ordering::AcqRel);
            }
            // The guest may go on; this PC just keeps the memory.
            Err(error) => tracing::debug!(%error, "pages could not be released"),
        }
    }

    /// The chain lists page numbers, which are often next to each other but in no order.
    fn inflate(&mut self, memory: &GuestMemory) {
        let count = (self.chain.readable_len() / 4).min(PAGES_MAX as u64) as usize;
        let mut bytes = vec![0; count * 4];
        if !self.chain.take_readable(memory, &mut bytes) {
            return;
        }
        let mut numbers: Vec<u64> =
            bytes.chunks_exact(4).map(|b| u64::from(u32::from_le_bytes([b[0], b[1], b[2], b[3]]))).collect();
        numbers.sort_unstable();
        numbers.dedup();
        for run in numbers.chunk_by(|a, b| a + 1 == *b) {
            self.release(memory, GuestAddress(run[0] * PAGE), run.len() as u64 * PAGE);
        }
    }
}

impl Backend for BalloonBackend {
    fn attach(&mut self, _ring: &mut Ring) -> io::Result<()> {
        Ok(())
    }

    fn serve(&mut self, _ring: &mut Ring, queues: &mut Queues, index: u16) -> Result<bool, Broken> {
        let reporting = queues.features & F_REPORTING != 0;
        let Some(queue) = queues.get(index) else { return Ok(false) };
        queue.disable_doorbell()?;
        for _ in 0..queue.size() {
            if !queue.pop(&mut self.chain)? {
                return queue.enable_doorbell();
            }
            match index {
                INFLATE => self.inflate(queue.memory()),
                REPORTING | REPORTING_COMPACT if reporting => {
                    for segment in &self.chain.writable {
                        self.release(queue.memory(), segment.address, segment.len.into());
                    }
                }
                // A page that comes back from the balloon needs nothing: it is zero until it is used.
                DEFLATE => {}
                _ => {}
            }
            queue.push_used(self.chain.head, 0)?;
        }
        Ok(true)
    }
}

impl VirtioDevice for Balloon {
    fn kind(&self) -> &'static str {
        "virtio-balloon"
    }

    fn device_type(&self) -> u16 {
        5
    }

    fn pci_class(&self) -> u32 {
        0xff_00_00
    }

    fn features(&self) -> u64 {
        let reporting = if self.options.free_page_reporting { F_REPORTING } else { 0 };
        F_MUST_TELL_HOST | F_DEFLATE_ON_OOM | reporting
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; QUEUES]
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        // num_pages, actual
        let mut config = [0; 8];
        config[..4].copy_from_slice(&self.shared.target.load(Ordering::Acquire).to_le_bytes());
        config[4..].copy_from_slice(&self.shared.actual.load(Ordering::Acquire).to_le_bytes());
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = config.get(offset + i).copied().unwrap_or(0);
        }
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        if let (4, &[a, b, c, d]) = (offset, data) {
            self.shared.actual.store(u32::from_le_bytes([a, b, c, d]), Ordering::Release);
        }
    }

    fn start(&mut self, interrupts: &Arc<Interrupts>) -> io::Result<()> {
        let _ = self.shared.interrupts.set(interrupts.clone());
        self.worker.start(Role::Device, self.kind(), 8)
    }

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        self.worker.activate(activation)
    }

    fn deactivate(&mut self, patience: Duration, returned: Returned) {
        self.worker.deactivate(patience, returned);
    }

    fn reset(&mut self) {
        self.shared.actual.store(0, Ordering::Release);
    }

    fn save(&self) -> serde_json::Value {
        let (target, actual) = (&self.shared.target, &self.shared.actual);
        serde_json::json!([target.load(Ordering::Acquire), actual.load(Ordering::Acquire)])
    }

    fn restore(&mut self, state: &serde_json::Value) -> Result<(), String> {
        let (target, actual): (u32, u32) =
            serde_json::from_value(state.clone()).map_err(|e| e.to_string())?;
        self.shared.target.store(target, Ordering::Release);
        self.shared.actual.store(actual, Ordering::Release);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use vm_memory::{Bytes, FileOffset};

    use super::super::testing::Harness;
    use super::*;

    const RAM: usize = 32 << 20;

    fn machine(reporting: bool) -> (Harness, Control, std::fs::File) {
        let name = c"balloon-test";
        let fd = nix::sys::memfd::memfd_create(name, nix::sys::memfd::MFdFlags::MFD_CLOEXEC);
        let file = std::fs::File::from(fd.expect("a memfd"));
        file.set_len(RAM as u64).expect("it grows");
        let offset = FileOffset::new(file.try_clone().expect("a descriptor"), 0);
        let ranges = [(GuestAddress(0), RAM, Some(offset))];
        let memory = GuestMemory::from_ranges_with_files(ranges).expect("memory is left");
        let balloon = Balloon::new(Options { size: 8 << 20, free_page_reporting: reporting });
        let control = balloon.control();
        let machine = Harness::stopped(Box::new(balloon), Arc::new(memory));
        crate::lifecycle::Lifecycle::start(&*machine.function).expect("it starts");
        (machine, control, file)
    }

    fn used_bytes(file: &std::fs::File) -> u64 {
        file.metadata().expect("it is open").blocks() * 512
    }

    fn fill(machine: &Harness, from: u64, len: usize) {
        machine.memory.write_slice(&vec![0x5a; len], machine.data(from)).expect("RAM");
    }

    #[test]
    fn pages_in_the_balloon_go_back_to_this_pc_and_read_as_zeros() {
        let (machine, control, file) = machine(false);
        let mut queues = machine.run(2, 16);
        fill(&machine, 0x10_0000, 64 << 12);
        let first = machine.data(0x10_0000).0 / PAGE;
        let numbers: Vec<u8> = (0..64u64).rev().flat_map(|i| ((first + i) as u32).to_le_bytes()).collect();
        machine.memory.write_slice(&numbers, machine.data(0)).expect("RAM");
        let before = used_bytes(&file);
        queues[0].add(&[(machine.data(0), 256)], &[]);
        queues[0].kick();
        queues[0].wait();
        assert_eq!(before - used_bytes(&file), 64 * PAGE);
        assert_eq!(control.released(), 64 * PAGE);
        assert_eq!(machine.memory.read_obj::<u64>(machine.data(0x10_0000)).expect("RAM"), 0);
        queues[1].add(&[(machine.data(0), 256)], &[]);
        queues[1].kick();
        queues[1].wait();
        fill(&machine, 0x10_0000, 64 << 12);
        machine.write(0x2004, 64, 4);
        assert_eq!(control.actual(), 64 * PAGE);
    }

    #[test]
    fn whoever_keeps_the_pages_is_told_before_the_guest() {
        let told = Arc::new(std::sync::Mutex::new(Vec::new()));
        let list = told.clone();
        let balloon = Balloon::with_release(Options::default(), move |_, address, len| {
            list.lock().expect("no panic").push((address.0, len));
            Ok(len)
        });
        let control = balloon.control();
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), RAM)]).expect("memory is left");
        let machine = Harness::stopped(Box::new(balloon), Arc::new(memory));
        crate::lifecycle::Lifecycle::start(&*machine.function).expect("it starts");
        let mut queues = machine.run(2, 16);
        machine.memory.write_obj([9_u32, 7, 8, 20], machine.data(0)).expect("RAM");
        queues[0].add(&[(machine.data(0), 16)], &[]);
        queues[0].kick();
        queues[0].wait();
        assert_eq!(*told.lock().expect("no panic"), [(7 * PAGE, 3 * PAGE), (20 * PAGE, PAGE)]);
        assert_eq!(control.released(), 4 * PAGE);
    }

    #[test]
    fn pages_that_do_not_exist_are_passed_over() {
        let (machine, control, _file) = machine(false);
        let mut queues = machine.run(2, 16);
        machine
            .memory
            .write_obj([u32::MAX, 1 << 20, (RAM as u64 / PAGE) as u32], machine.data(0))
            .expect("RAM");
        queues[0].add(&[(machine.data(0), 12)], &[]);
        queues[0].add(&[(GuestAddress(1 << 40), 4)], &[]);
        queues[0].add(&[(machine.data(0), 3)], &[]);
        queues[0].kick();
        (0..3).for_each(|_| assert_eq!(queues[0].wait().len, 0));
        assert_eq!(control.released(), 0);
    }

    #[test]
    fn reported_pages_go_back_whatever_number_the_queue_has() {
        let (machine, control, file) = machine(true);
        for index in [REPORTING_COMPACT, REPORTING] {
            let mut queues = machine.run(5, 16);
            fill(&machine, 0x20_0000, 1 << 20);
            let (before, released) = (used_bytes(&file), control.released());
            let queue = &mut queues[usize::from(index)];
            queue.add(&[], &[(machine.data(0x20_0000), 1 << 20), (machine.data(0x21), 100)]);
            queue.kick();
            queue.wait();
            assert_eq!(before - used_bytes(&file), 1 << 20);
            assert_eq!(control.released() - released, 1 << 20, "half a page does not count");
        }
    }

    #[test]
    fn a_new_target_reaches_the_guest_with_an_interrupt() {
        let (machine, control, _file) = machine(false);
        let _queues = machine.run(2, 16);
        assert_eq!(machine.read(0x2000, 4), (8 << 20) / PAGE);
        let before = (machine.routes.get(0).count(), machine.read(0x15, 1));
        control.set_target(16 << 20);
        assert_eq!(machine.routes.get(0).count(), before.0 + 1);
        assert_ne!(machine.read(0x15, 1), before.1, "the generation moves");
        assert_eq!(machine.read(0x2000, 4), (16 << 20) / PAGE);
    }
}
