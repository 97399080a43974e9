//! The in-kernel interrupt controllers as devices see them: wired lines by `KVM_IRQ_LINE`, messages by
//! irqfd and the GSI routing table.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use devices::irq::{InterruptController, InterruptLine, MsiMessage, MsiRoute};
use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_irqchip,
    kvm_irq_routing_msi,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::Error;

/// The I/O APIC's pins, which are the global system interrupts 0 to 23.
const PINS: u32 = 24;
/// The interrupt of ACPI events, which the MADT declares level-triggered.
const SCI: u32 = devices::platform::ports::SCI_IRQ;
/// KVM's limit (`KVM_MAX_IRQ_ROUTES`) is 4096 on every kernel that Omega runs on.
const MAX_GSI: u32 = 4000;

/// The interrupt controllers of a VM.
#[derive(Clone)]
pub struct Interrupts(Arc<Routing>);

struct Routing {
    vm: Arc<VmFd>,
    /// The message of each MSI vector, by its global system interrupt number; `None` before the guest sets it.
    messages: Mutex<BTreeMap<u32, Option<MsiMessage>>>,
}

impl Interrupts {
    pub(super) fn new(vm: Arc<VmFd>) -> Result<Self, Error> {
        let routing = Routing { vm, messages: Mutex::default() };
        routing
            .install(&routing.lock())
            .map_err(|source| Error::Call { what: "route interrupts", source })?;
        Ok(Self(Arc::new(routing)))
    }
}

impl Routing {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u32, Option<MsiMessage>>> {
        self.messages.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands the whole table to KVM, which only takes it whole.
    fn install(&self, messages: &BTreeMap<u32, Option<MsiMessage>>) -> io::Result<()> {
        let wired = (0..PINS).flat_map(|gsi| pic(gsi).into_iter().chain(ioapic(gsi)));
        let messages = messages.iter().filter_map(|(gsi, message)| message.map(|message| msi(*gsi, message)));
        let entries: Vec<_> = wired.chain(messages).collect();
        let table = KvmIrqRouting::from_entries(&entries)
            .map_err(|_| io::Error::other("too many interrupt routes"))?;
        self.vm.set_gsi_routing(&table).map_err(io_error)
    }
}

fn io_error(error: kvm_ioctls::Error) -> io::Error {
    io::Error::from_raw_os_error(error.errno())
}

/// The 8259 pin of an ISA interrupt; pin 2 is the cascade.
fn pic(pin: u32) -> Option<kvm_irq_routing_entry> {
    match pin {
        2 => None,
        0..=7 => Some(irqchip(pin, KVM_IRQCHIP_PIC_MASTER, pin)),
        8..=15 => Some(irqchip(pin, KVM_IRQCHIP_PIC_SLAVE, pin - 8)),
        _ => None,
    }
}

/// The I/O APIC's pin of an interrupt; the timer's, 0, is wired to pin 2 (the MADT says so).
fn ioapic(gsi: u32) -> Option<kvm_irq_routing_entry> {
    match gsi {
        0 => Some(irqchip(gsi, KVM_IRQCHIP_IOAPIC, 2)),
        2 => None,
        _ => Some(irqchip(gsi, KVM_IRQCHIP_IOAPIC, gsi)),
    }
}

fn irqchip(gsi: u32, chip: u32, pin: u32) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_IRQCHIP, ..Default::default() };
    entry.u.irqchip = kvm_irq_routing_irqchip { irqchip: chip, pin };
    entry
}

fn msi(gsi: u32, message: MsiMessage) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
    entry.u.msi = kvm_irq_routing_msi {
        address_lo: message.address as u32,
        address_hi: (message.address >> 32) as u32,
        data: message.data,
        ..Default::default()
    };
    entry
}

impl InterruptController for Interrupts {
    fn line(&self, gsi: u32) -> io::Result<Arc<dyn InterruptLine>> {
        if gsi >= PINS {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "There is no such interrupt line"));
        }
        Ok(Arc::new(Line { vm: Arc::clone(&self.0.vm), gsi, level: gsi == SCI || gsi >= 16 }))
    }

    fn msi(&self) -> io::Result<Arc<dyn MsiRoute>> {
        let mut messages = self.0.lock();
        let gsi = (PINS..MAX_GSI)
            .find(|gsi| !messages.contains_key(gsi))
            .ok_or_else(|| io::Error::other("No interrupt routes are left"))?;
        let event = EventFd::new(EFD_NONBLOCK)?;
        messages.insert(gsi, None);
        drop(messages);
        Ok(Arc::new(Msi { routing: Arc::clone(&self.0), gsi, event, wired: Mutex::new(Wired::default()) }))
    }
}

struct Line {
    vm: Arc<VmFd>,
    gsi: u32,
    level: bool,
}

impl InterruptLine for Line {
    fn set(&self, high: bool) -> io::Result<()> {
        if self.level {
            return self.vm.set_irq_line(self.gsi, high).map_err(io_error);
        }
        if high {
            self.vm.set_irq_line(self.gsi, true).map_err(io_error)?;
            self.vm.set_irq_line(self.gsi, false).map_err(io_error)?;
        }
        Ok(())
    }
}

#[derive(Default)]
struct Wired {
    masked: bool,
    /// Whether the eventfd is an irqfd now.
    irqfd: bool,
}

struct Msi {
    routing: Arc<Routing>,
    gsi: u32,
    event: EventFd,
    wired: Mutex<Wired>,
}

impl Msi {
    fn wired(&self) -> MutexGuard<'_, Wired> {
        self.wired.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Connects or disconnects the eventfd. What it was signalled meanwhile is delivered on connection.
    fn connect(&self, wired: &mut Wired, connect: bool) -> io::Result<()> {
        if connect == wired.irqfd {
            return Ok(());
        }
        if connect {
            self.routing.vm.register_irqfd(&self.event, self.gsi).map_err(io_error)?;
        } else {
            self.routing.vm.unregister_irqfd(&self.event, self.gsi).map_err(io_error)?;
        }
        wired.irqfd = connect;
        Ok(())
    }
}

impl MsiRoute for Msi {
    fn set(&self, message: MsiMessage) -> io::Result<()> {
        let mut wired = self.wired();
        let mut messages = self.routing.lock();
        if messages.get(&self.gsi) != Some(&Some(message)) {
            messages.insert(self.gsi, Some(message));
            self.routing.install(&messages)?;
        }
        drop(messages);
        let connect = !wired.masked;
        self.connect(&mut wired, connect)
    }

    fn mask(&self, masked: bool) -> io::Result<()> {
        let mut wired = self.wired();
        wired.masked = masked;
        let connect = !masked && self.routing.lock().get(&self.gsi).is_some_and(Option::is_some);
        self.connect(&mut wired, connect)
    }

    fn trigger(&self) -> io::Result<()> {
        self.event.write(1)
    }

    fn event(&self) -> Option<&EventFd> {
        Some(&self.event)
    }
}

impl Drop for Msi {
    fn drop(&mut self) {
        let mut wired = self.wired();
        // Failing means that the VM is gone, and the route with it.
        let _ = self.connect(&mut wired, false);
        self.routing.lock().remove(&self.gsi);
    }
}
