//! Building a machine from a guest's configuration.

use std::fmt::Display;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, mpsc};
use std::time::Instant;

use devices::bus::{BusDevice, Range};
use devices::irq::InterruptController;
use devices::lifecycle::Lifecycle;
use devices::pci::{PciRoot, Windows};
use devices::platform::{I8042, Pm, Pvpanic, RamSize, Rtc, Serial, SystemControlA, ports};
use devices::virtio::VirtioDevice;
use devices::virtio::pci::VirtioPci;
use transport::metrics::Metrics;

use super::parts::{Counters, Device, Parts, lock};
use super::processor::VcpuState;
use super::vcpus::Threads;
use super::{Error, Machine, Options, cards, controllers, disks, paging, peripherals, spanning};
use crate::config;
use crate::console::Hub;
use crate::cpu::{Buses, Gang};
use crate::interrupt::Board;
use crate::kvm::{Doorbells, Partition};
use crate::loader::Kernel;
use crate::memory::{Backing, ECAM, Layout, Ram, WINDOW_32};

/// Configuration mechanism 1, with the reset control register inside.
const CONFIG_PORTS: Range = Range { base: 0xcf8, len: 8 };

/// A machine under construction.
pub(super) struct Assembly {
    pub(super) buses: Buses,
    pub(super) devices: Vec<Device>,
    pub(super) interrupts: Arc<dyn InterruptController>,
    board: Option<Arc<Board>>,
    pub(super) doorbells: Arc<Doorbells>,
    pub(super) memory: Arc<devices::GuestMemory>,
    pub(super) pci: Arc<PciRoot>,
    next_slot: usize,
}

impl Assembly {
    /// Adds a device to the machine's life.
    pub(super) fn add(&mut self, name: &str, about: &'static str, life: Arc<dyn Lifecycle>) {
        let about = Box::new(move || about.to_owned());
        self.devices.push(Device { name: name.into(), about, life, counters: None, peer: None });
    }

    /// Puts a device on the port bus and into the machine's life.
    fn add_port<D: BusDevice + Lifecycle + 'static>(
        &mut self,
        name: &str,
        about: &'static str,
        range: Range,
        device: Arc<D>,
    ) -> Result<(), Error> {
        self.buses.port.insert(range, Arc::clone(&device) as _).map_err(|why| broken(name, &why))?;
        self.add(name, about, device);
        Ok(())
    }

    /// Puts a virtio device on the PCI bus and into the machine's life.
    pub(super) fn add_virtio(
        &mut self,
        name: &str,
        about: String,
        device: Box<dyn VirtioDevice>,
        counters: Option<Counters>,
    ) -> Result<(), Error> {
        let (memory, doorbells) = (Arc::clone(&self.memory), Arc::clone(&self.doorbells));
        let function = VirtioPci::new(device, memory, &*self.interrupts, doorbells as _)
            .map_err(|why| broken(name, &why))?;
        self.next_slot += 1;
        self.pci.add(self.next_slot, Arc::clone(&function) as _).map_err(|why| broken(name, &why))?;
        let about = Box::new(move || about.clone());
        self.devices.push(Device { name: name.into(), about, life: function, counters, peer: None });
        Ok(())
    }
}

impl Assembly {
    /// Shows what is counted with the peer of the device that was added last.
    pub(super) fn has_peer(&mut self, metrics: Arc<Metrics>) {
        if let Some(device) = self.devices.last_mut() {
            device.peer = Some(metrics);
        }
    }
}

/// A device that cannot be built.
pub(super) fn broken(name: &str, why: &dyn Display) -> Error {
    Error::Device { name: name.into(), why: why.to_string() }
}

/// Builds the machine.
pub(super) fn assemble(guest: &config::Guest, options: &Options) -> Result<Machine, Error> {
    let started = Instant::now();
    let mut kernel = Kernel::open(&guest.kernel, options.cache.as_deref())?;
    let count = guest.cpu.count;
    let bits = Partition::host_address_bits()?;
    let size = guest.memory.size;
    let layout = Layout::new(size, bits).ok_or(Error::TooMuchMemory { size, bits })?;
    let elsewhere = guest.memory.local.is_some() || guest.placement().spans();
    let backing = if elsewhere { Backing::Shared } else { Backing::Private };
    let ram = Ram::new(&layout, backing)?;
    // Before anything touches RAM: what does from here on may fault.
    let paging = paging::start(&ram, guest, options.identity.as_ref())?;
    let spanning = spanning::start(&ram, bits, guest, options.identity.as_ref())?;
    let controllers = guest.interrupt_controllers();
    let partition = match &spanning {
        None => Partition::new(ram.memory().clone(), count, controllers::of_partition(controllers))?,
        Some(spanning) => {
            kernel.tell_tsc(spanning.tsc_khz());
            spanning.partition(&ram)?
        }
    };
    let board = controllers::board(controllers)?;
    let high = Some(layout.window_64());
    let mut assembly = Assembly {
        buses: Buses::default(),
        devices: Vec::new(),
        interrupts: controllers::for_devices(&partition, board.as_ref())?,
        board,
        doorbells: Arc::new(partition.doorbells()),
        memory: Arc::new(ram.memory().clone()),
        pci: Arc::new(PciRoot::new(Windows { low: WINDOW_32, high })),
        next_slot: 0,
    };
    let pm = platform(&mut assembly, &layout, &options.serial)?;
    disks::add(&mut assembly, guest, options.identity.as_ref())?;
    cards::add(&mut assembly, guest)?;
    let balloon = peripherals::add(&mut assembly, guest, options.console.as_ref(), paging.as_ref())?;
    pci(&mut assembly)?;
    let vcpus = controllers::vcpus(&partition, count, assembly.board.as_ref(), spanning.as_ref())?;
    if let (Some(spanning), Some(first)) = (&spanning, vcpus.first()) {
        spanning.keep_time(lock(first).tsc_offset()?)?;
    }
    // What firmware sets is part of what a reset goes back to: a vCPU may be on another PC by then.
    vcpus.iter().try_for_each(|vcpu| lock(vcpu).set_up())?;
    let cpus =
        vcpus.iter().map(|vcpu| lock(vcpu).save().map(VcpuState::without_clock)).collect::<Result<_, _>>()?;
    let power_on = (cpus, partition.save()?.without_clock());
    let (events, received) = mpsc::channel();
    let (end, ended) = mpsc::channel();
    let parts = Parts {
        guest: guest.clone(),
        layout,
        vcpus,
        exits: (0..count).map(|_| AtomicU64::new(0)).collect(),
        buses: assembly.buses,
        gang: Gang::new(count.into()),
        threads: Threads::default(),
        devices: assembly.devices,
        pm,
        balloon,
        kernel: Mutex::new(kernel),
        events,
        end,
        started,
        resets: AtomicU64::new(0),
        power_on,
        life: Mutex::new(()),
        state: 0.into(),
        held: Mutex::default(),
        paging,
        spanning,
        partition,
        ram,
    };
    Ok(Machine { parts: Arc::new(parts), events: received, end: ended })
}

/// The chipset's devices; returns the one with the power button.
fn platform(assembly: &mut Assembly, layout: &Layout, hub: &Hub) -> Result<Arc<Pm>, Error> {
    let line = |assembly: &Assembly, name: &str, irq| {
        assembly.interrupts.line(irq).map_err(|why| broken(name, &why))
    };
    let irq = line(assembly, "serial", ports::SERIAL_IRQ)?;
    let serial = Arc::new(Serial::new(irq, hub.writer()).map_err(|why| broken("serial", &why))?);
    let room = serial.room().try_clone().map_err(|why| broken("serial", &why))?;
    let input = Arc::clone(&serial);
    hub.connect_input(move |bytes| input.enqueue(bytes));
    hub.watch_room(room);
    assembly.add_port("serial", "16550A at 0x3f8", ports::SERIAL, serial)?;

    let pm = Arc::new(Pm::new(line(assembly, "pm", ports::SCI_IRQ)?));
    assembly.add_port("pm", "ACPI power management", ports::PM, Arc::clone(&pm))?;
    let ram = RamSize { below_4g: layout.low().len, above_4g: layout.high().map_or(0, |high| high.len) };
    assembly.add_port("rtc", "CMOS clock", ports::RTC, Arc::new(Rtc::new(ram)))?;
    keyboard(assembly)?;
    assembly.add_port(
        "port92",
        "fast reset",
        ports::SYSTEM_CONTROL_A,
        Arc::new(SystemControlA::default()),
    )?;
    assembly.add_port("pvpanic", "panic notification", ports::PVPANIC, Arc::new(Pvpanic))?;
    Ok(pm)
}

/// The keyboard controller, and the interrupt controllers where they are not the kernel's: the PIT has a port among
/// those of the keyboard controller.
fn keyboard(assembly: &mut Assembly) -> Result<(), Error> {
    let keyboard = Arc::new(I8042::default());
    let on_bus: Arc<dyn BusDevice> = match assembly.board.clone() {
        None => Arc::clone(&keyboard) as _,
        Some(board) => {
            board.insert(&mut assembly.buses).map_err(|why| broken("chipset", &why))?;
            let beside = board.beside(Arc::clone(&keyboard));
            assembly.add("chipset", "I/O APIC, PIC and PIT outside of the kernel", board);
            Arc::new(beside)
        }
    };
    assembly.buses.port.insert(ports::I8042, on_bus).map_err(|why| broken("i8042", &why))?;
    assembly.add("i8042", "keyboard controller, for its reset line", keyboard);
    Ok(())
}

/// Puts the PCI host on the buses; its functions are there already.
fn pci(assembly: &mut Assembly) -> Result<(), Error> {
    let failed = |why: devices::bus::Overlap| broken("pci", &why);
    assembly.buses.port.insert(CONFIG_PORTS, assembly.pci.ports()).map_err(failed)?;
    assembly.buses.mmio.insert(ECAM, assembly.pci.ecam()).map_err(failed)?;
    for (range, window) in assembly.pci.mmio() {
        assembly.buses.mmio.insert(range, window).map_err(failed)?;
    }
    let root = Arc::clone(&assembly.pci);
    if let Some((0, bridge)) = root.functions().into_iter().next() {
        assembly.add("pci-bridge", "PCI host bridge", bridge);
    }
    assembly.add("pci", "PCI Express root", root);
    Ok(())
}
