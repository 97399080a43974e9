//! A driver in software: sets a device up through its PCI registers as a guest would, and works its
//! queues. For tests and benchmarks, here and in other crates; panics where a test should fail.

mod fakes;
mod inline;
mod queue;

use std::sync::Arc;
use std::time::Duration;

use vm_memory::GuestAddress;

pub use self::fakes::{Doorbells, Route, Routes};
pub use self::inline::InlineBlk;
pub use self::queue::{DriverQueue, INDIRECT, NEXT, Used, WRITE};
use super::VirtioDevice;
use super::features::VERSION_1;
use super::pci::{self, VirtioPci};
use crate::GuestMemory;
use crate::bus::{Bus, Range};
use crate::lifecycle::Lifecycle;
use crate::pci::{PciRoot, Windows};

/// The device status register, by its bits (section 2.1).
pub mod status {
    /// The driver found the device.
    pub const ACKNOWLEDGE: u8 = 1;
    /// The driver knows how to drive it.
    pub const DRIVER: u8 = 2;
    /// The driver is ready.
    pub const DRIVER_OK: u8 = 4;
    /// The features are agreed on.
    pub const FEATURES_OK: u8 = 8;
    /// The device has to be reset.
    pub const NEEDS_RESET: u8 = 64;
}

const LOW: Range = Range { base: 0xe000_0000, len: 0x1000_0000 };
const ECAM: u64 = 0xb000_0000;
const SLOT: u64 = 1;
/// Where the rings of the queues begin, and how far they are apart.
const RINGS: u64 = 0x10_0000;
const RING_STRIDE: u64 = 0x1_0000;
/// Where [`Harness::data`] begins.
const DATA: u64 = 0x80_0000;
const PATIENCE: Duration = Duration::from_secs(20);

/// A machine with one virtio device.
pub struct Harness {
    /// The guest's memory.
    pub memory: Arc<GuestMemory>,
    /// The vectors.
    pub routes: Routes,
    /// The doorbells that are registered.
    pub doorbells: Arc<Doorbells>,
    /// The device on the bus.
    pub function: Arc<VirtioPci>,
    /// The PCI root.
    pub root: PciRoot,
    /// The bus on which everything answers.
    pub bus: Bus,
    bar: u64,
}

impl Harness {
    /// A machine with `size` bytes of RAM from address 0 and `device` in slot 1, started, its BAR found.
    #[must_use]
    pub fn new(device: Box<dyn VirtioDevice>, size: usize) -> Self {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), size)]).expect("memory is left");
        let harness = Self::stopped(device, Arc::new(memory));
        harness.function.start().expect("the device starts");
        harness
    }

    /// The same on given memory, not started.
    #[must_use]
    pub fn stopped(device: Box<dyn VirtioDevice>, memory: Arc<GuestMemory>) -> Self {
        let (routes, doorbells) = (Routes::default(), Arc::new(Doorbells::default()));
        let function = VirtioPci::new(device, memory.clone(), &routes, doorbells.clone());
        let function = function.expect("vectors and descriptors are left");
        let root = PciRoot::new(Windows { low: LOW, high: None });
        root.add(SLOT as usize, function.clone()).expect("the bus has room");
        let mut bus = Bus::default();
        for (range, device) in root.mmio() {
            bus.insert(range, device).expect("the window is free");
        }
        bus.insert(Range { base: ECAM, len: 1 << 20 }, root.ecam()).expect("ECAM is free");
        let mut harness = Self { memory, routes, doorbells, function, root, bus, bar: 0 };
        harness.enable();
        harness
    }

    /// Finds the BAR where it is at power-on, and has it decoded.
    fn enable(&mut self) {
        self.bar = u64::from(self.read_config(0x10) & !0xf);
        self.write_config(0x04, 0x0006);
    }

    /// Resets the machine, as a PC's reset does, and starts it again.
    ///
    /// # Panics
    /// The device does not let go.
    pub fn power_cycle(&mut self) {
        self.function.reset().expect("the device resets");
        self.root.reset().expect("the root resets");
        self.enable();
        self.function.start().expect("the device starts");
    }

    /// A double word of the device's configuration space.
    pub fn read_config(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.bus.read(ECAM + (SLOT << 15) + offset, &mut data);
        u32::from_le_bytes(data)
    }

    /// Writes a double word of the device's configuration space.
    pub fn write_config(&self, offset: u64, value: u32) {
        self.bus.write(ECAM + (SLOT << 15) + offset, &value.to_le_bytes());
    }

    /// Where the BAR was at power-on.
    #[must_use]
    pub fn bar(&self) -> u64 {
        self.bar
    }

    /// Reads `len` bytes of the BAR.
    pub fn read(&self, offset: u64, len: usize) -> u64 {
        let mut data = [0; 8];
        self.bus.read(self.bar + offset, &mut data[..len]);
        u64::from_le_bytes(data)
    }

    /// Writes `len` bytes of the BAR.
    pub fn write(&self, offset: u64, value: u64, len: usize) {
        self.bus.write(self.bar + offset, &value.to_le_bytes()[..len]);
    }

    /// The status register.
    pub fn status(&self) -> u8 {
        self.read(pci::COMMON + 0x14, 1) as u8
    }

    /// Writes the status register.
    pub fn set_status(&self, status: u8) {
        self.write(pci::COMMON + 0x14, status.into(), 1);
    }

    /// The features that the device offers.
    pub fn offered(&self) -> u64 {
        (0..2).fold(0, |all, half| {
            self.write(pci::COMMON, half, 4);
            all | self.read(pci::COMMON + 4, 4) << (32 * half)
        })
    }

    /// Resets the device and agrees on `features` (and version 1) with it; whether it accepts.
    pub fn negotiate(&self, features: u64) -> bool {
        self.set_status(0);
        self.wait_for("the reset", || self.status() == 0);
        self.set_status(status::ACKNOWLEDGE | status::DRIVER);
        let features = features | VERSION_1;
        for half in 0..2 {
            self.write(pci::COMMON + 8, half, 4);
            self.write(pci::COMMON + 0xc, features >> (32 * half) & 0xffff_ffff, 4);
        }
        self.set_status(status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK);
        self.status() & status::FEATURES_OK != 0
    }

    /// Sets queue `index` up with `size` entries and vector `index + 1`.
    pub fn queue(&self, index: u16, size: u16) -> DriverQueue {
        let rings = RINGS + u64::from(index) * RING_STRIDE;
        let notify = self.bar + pci::NOTIFY + u64::from(index) * u64::from(pci::NOTIFY_MULTIPLIER);
        let queue = DriverQueue::new(self.memory.clone(), GuestAddress(rings), size);
        self.write(pci::COMMON + 0x16, index.into(), 2);
        self.write(pci::COMMON + 0x18, size.into(), 2);
        self.write(pci::COMMON + 0x1a, u64::from(index) + 1, 2);
        for (register, address) in [(0x20, queue.descriptors), (0x28, queue.available), (0x30, queue.used)] {
            self.write(pci::COMMON + register, address.0 & 0xffff_ffff, 4);
            self.write(pci::COMMON + register + 4, address.0 >> 32, 4);
        }
        self.write(pci::COMMON + 0x1c, 1, 2);
        queue.connect(self.doorbells.at(notify), self.routes.get(usize::from(index) + 1))
    }

    /// Opens all vectors and tells the device that the driver is ready.
    pub fn ready(&self) {
        self.write(pci::COMMON + 0x10, 0, 2);
        for vector in 0..self.routes.count() as u64 {
            let entry = pci::TABLE + 16 * vector;
            self.write(entry, 0xfee0_0000, 4);
            self.write(entry + 8, 0x40 + vector, 4);
            self.write(entry + 12, 0, 4);
        }
        let capability = self.msix_capability();
        self.write_config(capability, self.read_config(capability) | 1 << 31);
        self.set_status(self.status() | status::DRIVER_OK);
    }

    /// Where the MSI-X capability is.
    pub fn msix_capability(&self) -> u64 {
        let mut at = u64::from(self.read_config(0x34) & 0xff);
        while at != 0 && self.read_config(at) & 0xff != 0x11 {
            at = u64::from(self.read_config(at) >> 8 & 0xff);
        }
        assert_ne!(at, 0, "the device has an MSI-X capability");
        at
    }

    /// Negotiates everything that the device offers, sets `count` queues of `size` up, and is ready.
    pub fn run(&self, count: u16, size: u16) -> Vec<DriverQueue> {
        assert!(self.negotiate(self.offered()), "the device accepts what it offers");
        let event_idx = self.offered() & super::features::RING_EVENT_IDX != 0;
        let queues = (0..count).map(|index| self.queue(index, size).event_idx(event_idx)).collect();
        self.ready();
        queues
    }

    /// Guest memory that no ring uses, `offset` bytes into it.
    #[must_use]
    pub fn data(&self, offset: u64) -> GuestAddress {
        GuestAddress(DATA + offset)
    }

    /// Waits until `condition` holds.
    ///
    /// # Panics
    /// It does not, for 20 s.
    pub fn wait_for(&self, what: &str, condition: impl Fn() -> bool) {
        let start = std::time::Instant::now();
        while !condition() {
            assert!(start.elapsed() < PATIENCE, "waited in vain for {what}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}
