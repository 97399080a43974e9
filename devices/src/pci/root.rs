//! The PCI Express root: the host bridge, the three ways to a function, and where BARs are placed.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use serde::{Deserialize, Serialize};

use super::{BarKind, Bars, ConfigSpace, Identity, PciFunction};
use crate::bus::{BusDevice, Outcome, Range};
use crate::lifecycle::{DeviceState, Error, Lifecycle};
use crate::platform::ResetControl;

/// How many devices fit on the bus.
pub(super) const SLOTS: usize = 32;
const BYTES_PER_FUNCTION: u64 = 4096;
const FUNCTIONS: usize = 8;

/// Where BARs may lie. The machine tells the guest of the same ranges in ACPI (`_CRS`).
#[derive(Clone, Copy, Debug)]
pub struct Windows {
    /// Below 4 GiB: for BARs of either width.
    pub low: Range,
    /// Above guest RAM: for 64-bit BARs that do not fit below.
    pub high: Option<Range>,
}

/// A function could not be added.
#[derive(Debug, thiserror::Error)]
pub enum Full {
    /// The slot does not exist, is the host bridge's, or is taken.
    #[error("PCI slot {0} does not exist or is taken")]
    Slot(usize),
    /// The windows have no room for a BAR.
    #[error("No room is left for a BAR of {0:#x} bytes")]
    Window(u64),
}

struct Shared {
    slots: [OnceLock<Arc<dyn PciFunction>>; SLOTS],
    windows: Vec<Range>,
    /// The next free address of each window.
    free: Mutex<Vec<u64>>,
    /// CONFIG_ADDRESS, port 0xcf8.
    address: AtomicU32,
    /// The one register of the chipset that lies among the bus's ports.
    reset_control: ResetControl,
}

/// The root complex with bus 0. Functions are added while the machine is assembled.
pub struct PciRoot {
    shared: Arc<Shared>,
}

impl PciRoot {
    /// A bus with nothing but the host bridge, 00:00.0.
    #[must_use]
    pub fn new(windows: Windows) -> Self {
        let windows: Vec<Range> = [Some(windows.low), windows.high].into_iter().flatten().collect();
        let free = Mutex::new(windows.iter().map(|window| window.base).collect());
        let slots = [const { OnceLock::new() }; SLOTS];
        let _ = slots[0].set(Arc::new(HostBridge::new()) as Arc<dyn PciFunction>);
        let (address, reset_control) = (AtomicU32::new(0), ResetControl::default());
        Self { shared: Arc::new(Shared { slots, windows, free, address, reset_control }) }
    }

    /// Puts `function` into `slot` (1 to 31) and places its BARs.
    ///
    /// # Errors
    /// The slot is taken, or the windows are full.
    pub fn add(&self, slot: usize, function: Arc<dyn PciFunction>) -> Result<(), Full> {
        let cell = self.shared.slots.get(slot).filter(|cell| cell.get().is_none()).ok_or(Full::Slot(slot))?;
        function.bars().confine(&self.shared.windows);
        for spec in function.bars().specs() {
            let address = self.shared.allocate(spec.kind, spec.size).ok_or(Full::Window(spec.size))?;
            function.place_bar(spec.index, address);
        }
        cell.set(function).map_err(|_| Full::Slot(slot))
    }

    /// The functions on the bus with their slots, host bridge first.
    #[must_use]
    pub fn functions(&self) -> Vec<(usize, Arc<dyn PciFunction>)> {
        let slots = self.shared.slots.iter().enumerate();
        slots.filter_map(|(slot, cell)| Some((slot, cell.get()?.clone()))).collect()
    }

    /// Memory-mapped configuration space of bus 0: 1 MiB, to be inserted at the base that MCFG names.
    #[must_use]
    pub fn ecam(&self) -> Arc<dyn BusDevice> {
        Arc::new(Ecam(self.shared.clone()))
    }

    /// Ports 0xcf8 to 0xcff: configuration mechanism 1, and the reset control register at 0xcf9.
    #[must_use]
    pub fn ports(&self) -> Arc<dyn BusDevice> {
        Arc::new(ConfigPorts(self.shared.clone()))
    }

    /// The MMIO windows, each with the device that answers there.
    #[must_use]
    pub fn mmio(&self) -> Vec<(Range, Arc<dyn BusDevice>)> {
        let device = |&range: &Range| -> (Range, Arc<dyn BusDevice>) {
            (range, Arc::new(Window { shared: self.shared.clone(), base: range.base }))
        };
        self.shared.windows.iter().map(device).collect()
    }
}

impl Shared {
    /// Room for a BAR of `size` bytes: below 4 GiB while there is some, above for 64-bit BARs.
    fn allocate(&self, kind: BarKind, size: u64) -> Option<u64> {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        for (i, (window, next)) in self.windows.iter().zip(free.iter_mut()).enumerate() {
            if i > 0 && kind == BarKind::Memory32 {
                break;
            }
            let Some(address) = next.checked_next_multiple_of(size) else { continue };
            let Some(end) = address.checked_add(size) else { continue };
            if end <= window.base.saturating_add(window.len) {
                *next = end;
                return Some(address);
            }
        }
        None
    }

    fn slot(&self, bus: usize, slot: usize, function: usize) -> Option<&dyn PciFunction> {
        let cell = self.slots.get(slot).filter(|_| bus == 0 && function == 0)?;
        cell.get().map(|function| &**function)
    }

    fn read_config(&self, at: ConfigAddress, data: &mut [u8]) {
        match self.slot(at.bus, at.slot, at.function) {
            Some(_) if at.register >= super::config::SIZE => data.fill(0),
            Some(function) if at.register % 4 + data.len() <= 4 => function.read_config(at.register, data),
            _ => data.fill(0xff),
        }
    }

    fn write_config(&self, at: ConfigAddress, data: &[u8]) -> Outcome {
        match self.slot(at.bus, at.slot, at.function) {
            Some(function) if at.register < super::config::SIZE && at.register % 4 + data.len() <= 4 => {
                function.write_config(at.register, data)
            }
            _ => Outcome::Done,
        }
    }

    fn find_bar(&self, address: u64, len: usize) -> Option<(&dyn PciFunction, usize, u64)> {
        self.slots.iter().filter_map(OnceLock::get).find_map(|function| {
            let (bar, offset) = function.bars().find(address, len)?;
            Some((&**function, bar, offset))
        })
    }
}

#[derive(Clone, Copy)]
struct ConfigAddress {
    bus: usize,
    slot: usize,
    function: usize,
    register: usize,
}

struct Ecam(Arc<Shared>);

impl Ecam {
    fn decode(offset: u64) -> ConfigAddress {
        let index = (offset / BYTES_PER_FUNCTION) as usize;
        ConfigAddress {
            bus: index / FUNCTIONS / SLOTS,
            slot: index / FUNCTIONS % SLOTS,
            function: index % FUNCTIONS,
            register: (offset % BYTES_PER_FUNCTION) as usize,
        }
    }
}

impl BusDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) -> Outcome {
        self.0.read_config(Self::decode(offset), data);
        Outcome::Done
    }

    fn write(&self, offset: u64, data: &[u8]) -> Outcome {
        self.0.write_config(Self::decode(offset), data)
    }
}

/// Configuration mechanism 1 (section 3.2.2.3.2).
struct ConfigPorts(Arc<Shared>);

const CONFIG_DATA: u64 = 4;
const RESET_CONTROL: u64 = 1;
const ADDRESS_ENABLE: u32 = 1 << 31;

impl ConfigPorts {
    fn decode(&self, offset: u64) -> Option<ConfigAddress> {
        let address = self.0.address.load(Ordering::Acquire);
        let within = usize::try_from(offset.checked_sub(CONFIG_DATA)?).ok()?;
        (address & ADDRESS_ENABLE != 0).then_some(ConfigAddress {
            bus: (address >> 16 & 0xff) as usize,
            slot: (address >> 11 & 0x1f) as usize,
            function: (address >> 8 & 7) as usize,
            register: (address & 0xfc) as usize + within,
        })
    }
}

impl BusDevice for ConfigPorts {
    fn read(&self, offset: u64, data: &mut [u8]) -> Outcome {
        match (offset, data.len(), self.decode(offset)) {
            (RESET_CONTROL, 1, _) => return self.0.reset_control.read(0, data),
            (0, 4, _) => data.copy_from_slice(&self.0.address.load(Ordering::Acquire).to_le_bytes()),
            (_, _, Some(at)) => self.0.read_config(at, data),
            _ => data.fill(0xff),
        }
        Outcome::Done
    }

    fn write(&self, offset: u64, data: &[u8]) -> Outcome {
        if let (0, &[a, b, c, d]) = (offset, data) {
            self.0.address.store(u32::from_le_bytes([a, b, c, d]), Ordering::Release);
        } else if let (RESET_CONTROL, [_]) = (offset, data) {
            return self.0.reset_control.write(0, data);
        } else if let Some(at) = self.decode(offset) {
            return self.0.write_config(at, data);
        }
        Outcome::Done
    }
}

struct Window {
    shared: Arc<Shared>,
    base: u64,
}

impl BusDevice for Window {
    fn read(&self, offset: u64, data: &mut [u8]) -> Outcome {
        if let Some((function, bar, at)) = self.shared.find_bar(self.base.wrapping_add(offset), data.len()) {
            return function.read_bar(bar, at, data);
        }
        data.fill(0xff);
        Outcome::Done
    }

    fn write(&self, offset: u64, data: &[u8]) -> Outcome {
        match self.shared.find_bar(self.base.wrapping_add(offset), data.len()) {
            Some((function, bar, at)) => function.write_bar(bar, at, data),
            None => Outcome::Done,
        }
    }
}

#[derive(Serialize, Deserialize)]
struct RootState {
    config_address: u32,
    reset_control: DeviceState,
}

impl Lifecycle for PciRoot {
    fn kind(&self) -> &'static str {
        "pci-root"
    }

    fn start(&self) -> Result<(), Error> {
        Ok(())
    }

    fn stop(&self) -> Result<(), Error> {
        Ok(())
    }

    fn save(&self) -> Result<DeviceState, Error> {
        let config_address = self.shared.address.load(Ordering::Acquire);
        let state = RootState { config_address, reset_control: self.shared.reset_control.save()? };
        DeviceState::of(self.kind(), 1, &state)
    }

    fn restore(&self, state: &DeviceState) -> Result<(), Error> {
        let state: RootState = state.value(self.kind(), 1)?;
        self.shared.reset_control.restore(&state.reset_control)?;
        self.shared.address.store(state.config_address, Ordering::Release);
        Ok(())
    }

    fn reset(&self) -> Result<(), Error> {
        self.shared.address.store(0, Ordering::Release);
        self.shared.reset_control.reset()
    }
}

/// Function 00:00.0, which only says that it is a host bridge.
struct HostBridge {
    config: Mutex<ConfigSpace>,
    bars: Bars,
}

impl HostBridge {
    fn new() -> Self {
        let identity = Identity {
            vendor: 0x8086,
            device: 0x0d57,
            revision: 0,
            class: 0x06_00_00,
            subsystem_vendor: 0,
            subsystem: 0,
        };
        Self { config: Mutex::new(ConfigSpace::new(&identity, &[])), bars: Bars::new(&[]) }
    }

    fn config(&self) -> std::sync::MutexGuard<'_, ConfigSpace> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PciFunction for HostBridge {
    fn read_config(&self, offset: usize, data: &mut [u8]) {
        self.config().read(offset, data);
    }

    fn write_config(&self, offset: usize, data: &[u8]) -> Outcome {
        self.config().write(offset, data);
        Outcome::Done
    }

    fn bars(&self) -> &Bars {
        &self.bars
    }

    fn place_bar(&self, _bar: usize, _address: u64) {}

    fn read_bar(&self, _bar: usize, _offset: u64, data: &mut [u8]) -> Outcome {
        data.fill(0xff);
        Outcome::Done
    }

    fn write_bar(&self, _bar: usize, _offset: u64, _data: &[u8]) -> Outcome {
        Outcome::Done
    }
}

impl Lifecycle for HostBridge {
    fn kind(&self) -> &'static str {
        "pci-host-bridge"
    }

    fn start(&self) -> Result<(), Error> {
        Ok(())
    }

    fn stop(&self) -> Result<(), Error> {
        Ok(())
    }

    fn save(&self) -> Result<DeviceState, Error> {
        DeviceState::of(self.kind(), 1, &self.config().save())
    }

    fn restore(&self, state: &DeviceState) -> Result<(), Error> {
        let state = state.value(self.kind(), 1)?;
        let mut config = self.config();
        if !config.accepts(&state) {
            return Err(Error::invalid(self.kind(), "its configuration space is of another function"));
        }
        config.restore(&state);
        Ok(())
    }

    fn reset(&self) -> Result<(), Error> {
        self.config().reset();
        Ok(())
    }
}
