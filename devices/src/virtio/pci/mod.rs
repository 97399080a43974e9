//! Virtio over PCI (section 4.1): one function with one BAR.
//!
//! ```text
//! BAR 0, 32 KiB   0x0000 common configuration      0x3000 doorbells, 4 bytes for each queue
//!                 0x1000 ISR status                0x4000 MSI-X table
//!                 0x2000 device configuration      0x5000 MSI-X pending bits
//! ```

mod common;
mod lifecycle;
mod state;

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use self::state::{Device, Shared};
use super::{Interrupts, QueueLayout, VirtioDevice};
use crate::GuestMemory;
use crate::bus::{DoorbellRegistry, Outcome};
use crate::irq::InterruptController;
use crate::pci::{BarKind, BarSpec, Bars, ConfigSpace, Identity, Msix, PciFunction, msix};

const VENDOR: u16 = 0x1af4;
const DEVICE_BASE: u16 = 0x1040;
/// Revision 1 and above means: not transitional (section 4.1.2.1).
const REVISION: u8 = 1;

const BAR: u8 = 0;
const BAR_SIZE: u64 = 0x8000;
/// Where each part of the BAR begins. Each part is a page.
pub(crate) const COMMON: u64 = 0x0000;
pub(crate) const ISR: u64 = 0x1000;
pub(crate) const DEVICE: u64 = 0x2000;
pub(crate) const NOTIFY: u64 = 0x3000;
pub(crate) const TABLE: u64 = 0x4000;
pub(crate) const PENDING: u64 = 0x5000;
const PAGE: u64 = 0x1000;
/// Bytes between the doorbells of two queues.
pub(crate) const NOTIFY_MULTIPLIER: u32 = 4;

const CAPABILITY_VENDOR: u8 = 0x09;
const CFG_COMMON: u8 = 1;
const CFG_NOTIFY: u8 = 2;
const CFG_ISR: u8 = 3;
const CFG_DEVICE: u8 = 4;
const CFG_PCI: u8 = 5;

/// Most queues of a device: what the table page and the doorbell page hold.
pub(crate) const MAX_QUEUES: usize = 255;

/// A virtio device on the PCI bus.
pub struct VirtioPci {
    kind: &'static str,
    bars: Bars,
    config: Mutex<Config>,
    msix: Arc<Msix>,
    interrupts: Arc<Interrupts>,
    shared: Arc<Shared>,
    registry: Arc<dyn DoorbellRegistry>,
    doorbells: Vec<Arc<EventFd>>,
}

struct Config {
    space: ConfigSpace,
    /// Where the MSI-X capability is.
    msix: usize,
    /// Where the capability for access through configuration space is (section 4.1.4.9).
    window: usize,
    /// The address at which the doorbells are registered.
    registered: Option<u64>,
}

impl VirtioPci {
    /// Puts `device` on the bus. Its memory, its vectors and its doorbells are the machine's.
    ///
    /// # Errors
    /// No vectors or file descriptors are left.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: Arc<GuestMemory>,
        interrupts: &dyn InterruptController,
        registry: Arc<dyn DoorbellRegistry>,
    ) -> io::Result<Arc<Self>> {
        let queues = device.queue_sizes().len();
        if queues > MAX_QUEUES {
            return Err(io::Error::other("a virtio device has at most 255 queues"));
        }
        let msix = Arc::new(Msix::new(queues as u16 + 1, interrupts)?);
        let interrupts = Arc::new(Interrupts::new(msix.clone(), queues));
        let doorbells = (0..queues)
            .map(|_| Ok(Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?)))
            .collect::<io::Result<Vec<_>>>()?;
        let specs = [BarSpec { index: BAR.into(), kind: BarKind::Memory32, size: BAR_SIZE }];
        let config = Mutex::new(Config::new(&*device, &specs, &msix, queues));
        let kind = device.kind();
        let shared = Shared::new(Device::new(device, doorbells.clone()), memory, interrupts.clone());
        let bars = Bars::new(&specs);
        Ok(Arc::new(Self { kind, bars, config, msix, interrupts, shared, registry, doorbells }))
    }

    fn config(&self) -> MutexGuard<'_, Config> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Brings everything that hangs on configuration space in line with it.
    fn apply(&self, config: &mut Config) {
        let control = config.space.dword(config.msix) >> 16;
        self.msix.set_control(control as u16);
        let place = self.bars.set(BAR.into(), config.space.bar_address(BAR.into()));
        if place != config.registered {
            self.move_doorbells(config.registered, place);
            config.registered = place;
        }
    }

    fn move_doorbells(&self, from: Option<u64>, to: Option<u64>) {
        for (queue, event) in self.doorbells.iter().enumerate() {
            let at = |base: u64| base + NOTIFY + u64::from(NOTIFY_MULTIPLIER) * queue as u64;
            let moved = match (from, to) {
                (Some(from), _) => self.registry.unregister(at(from), 0, None, event),
                _ => Ok(()),
            };
            let moved = moved.and_then(|()| match to {
                Some(to) => self.registry.register(at(to), 0, None, event),
                None => Ok(()),
            });
            if let Err(error) = moved {
                // The doorbell still works: the access then exits to us.
                tracing::warn!(device = self.kind, queue, %error, "a doorbell could not be moved");
            }
        }
    }

    /// An access through the configuration-space window: the BAR, offset and length that the guest put
    /// into the capability, if they name something that can be accessed.
    fn window(&self, config: &Config) -> Option<(u64, usize)> {
        let (bar, at) = (config.space.byte(config.window + 4), config.window);
        let offset = u64::from(config.space.dword(at + 8));
        let len = config.space.dword(at + 12) as usize;
        let fits = bar == BAR && matches!(len, 1 | 2 | 4) && offset.is_multiple_of(len as u64);
        (fits && offset + (len as u64) <= BAR_SIZE).then_some((offset, len))
    }
}

impl Config {
    fn new(device: &dyn VirtioDevice, specs: &[BarSpec], msix: &Msix, queues: usize) -> Self {
        let id = DEVICE_BASE + device.device_type();
        let identity = Identity {
            vendor: VENDOR,
            device: id,
            revision: REVISION,
            class: device.pci_class(),
            subsystem_vendor: VENDOR,
            subsystem: id,
        };
        let mut space = ConfigSpace::new(&identity, specs);
        let notify_len = (queues as u32).max(1) * NOTIFY_MULTIPLIER;
        let multiplier = NOTIFY_MULTIPLIER.to_le_bytes();
        space.add_capability(CAPABILITY_VENDOR, &location(CFG_COMMON, COMMON, 0x38, &[]), &[]);
        space.add_capability(CAPABILITY_VENDOR, &location(CFG_NOTIFY, NOTIFY, notify_len, &multiplier), &[]);
        space.add_capability(CAPABILITY_VENDOR, &location(CFG_ISR, ISR, 1, &[]), &[]);
        space.add_capability(CAPABILITY_VENDOR, &location(CFG_DEVICE, DEVICE, PAGE as u32, &[]), &[]);
        let mut writable = [0; 18];
        writable[2] = 0xff; // bar
        writable[6..].fill(0xff); // offset, length, data
        let window = space.add_capability(CAPABILITY_VENDOR, &location(CFG_PCI, 0, 0, &[0; 4]), &writable);
        let capability = msix.capability(BAR, TABLE as u32, PENDING as u32);
        let msix = space.add_capability(msix::CAPABILITY, &capability, &[0, 0xc0]);
        Self { space, msix, window, registered: None }
    }
}

/// The body of a virtio capability (section 4.1.4), from its length field on.
fn location(kind: u8, offset: u64, len: u32, more: &[u8]) -> Vec<u8> {
    let mut body = vec![16 + more.len() as u8, kind, BAR, 0, 0, 0];
    body.extend_from_slice(&(offset as u32).to_le_bytes());
    body.extend_from_slice(&len.to_le_bytes());
    body.extend_from_slice(more);
    body
}

impl PciFunction for VirtioPci {
    fn read_config(&self, offset: usize, data: &mut [u8]) {
        let mut config = self.config();
        if offset & !3 == config.window + 16
            && let Some((at, len)) = self.window(&config)
        {
            let mut value = [0; 4];
            self.read_bar(BAR.into(), at, &mut value[..len]);
            config.space.write(offset & !3, &value);
        }
        config.space.read(offset, data);
    }

    fn write_config(&self, offset: usize, data: &[u8]) -> Outcome {
        let mut config = self.config();
        config.space.write(offset, data);
        if offset & !3 == config.window + 16 {
            if let Some((at, len)) = self.window(&config) {
                let value = config.space.dword(config.window + 16).to_le_bytes();
                return self.write_bar(BAR.into(), at, &value[..len]);
            }
        } else {
            self.apply(&mut config);
        }
        Outcome::Done
    }

    fn bars(&self) -> &Bars {
        &self.bars
    }

    fn place_bar(&self, bar: usize, address: u64) {
        let mut config = self.config();
        config.space.place_bar(bar, address);
        self.apply(&mut config);
    }

    fn read_bar(&self, _bar: usize, offset: u64, data: &mut [u8]) -> Outcome {
        let at = offset % PAGE;
        data.fill(0);
        match offset - at {
            COMMON => self.shared.read_common(at, data),
            ISR if at == 0 => data[0] = self.interrupts.take_isr(),
            DEVICE => self.shared.lock().device.read_config(at as usize, data),
            TABLE => self.msix.read_table(at, data),
            PENDING => self.msix.read_pending(at, data),
            _ => {}
        }
        Outcome::Done
    }

    fn write_bar(&self, _bar: usize, offset: u64, data: &[u8]) -> Outcome {
        let at = offset % PAGE;
        match offset - at {
            COMMON => Shared::write_common(&self.shared, at, data),
            DEVICE => self.shared.lock().device.write_config(at as usize, data),
            NOTIFY => {
                if let Some(doorbell) = self.doorbells.get((at / u64::from(NOTIFY_MULTIPLIER)) as usize) {
                    // Full only after 2^64 unread signals; one of them is enough.
                    let _ = doorbell.write(1);
                }
            }
            TABLE => self.msix.write_table(at, data),
            _ => {}
        }
        Outcome::Done
    }
}

impl Drop for VirtioPci {
    fn drop(&mut self) {
        let registered = self.config().registered.take();
        self.move_doorbells(registered, None);
    }
}

#[cfg(test)]
mod pci_test;
