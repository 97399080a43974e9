//! Port and memory-mapped accesses, and the devices that answer them.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use vmm_sys_util::eventfd::EventFd;

/// What a device asks of the machine as the result of an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// End the guest: it powered itself off.
    PowerOff,
    /// Restart the guest: it asked for a reset.
    Reset,
    /// The guest's kernel reported a panic.
    Panic,
}

/// How a device answered an access.
#[derive(Clone, Debug)]
pub enum Outcome {
    /// At once.
    Done,
    /// At once, and the machine has to do something.
    Act(Action),
    /// Later: the vCPU waits on the token, outside the device, and can be paused meanwhile.
    Deferred(Deferred),
}

/// An access that a device completes later.
#[derive(Clone, Debug, Default)]
pub struct Deferred(Arc<(Mutex<Option<Vec<u8>>>, Condvar)>);

impl Deferred {
    /// Completes the access; `data` is what a read returns (short data reads as zeros after its end).
    pub fn complete(&self, data: &[u8]) {
        let (slot, wake) = &*self.0;
        *slot.lock().unwrap_or_else(PoisonError::into_inner) = Some(data.to_vec());
        wake.notify_all();
    }

    /// Waits up to `timeout`; `None` if the device has not completed the access by then.
    #[must_use]
    pub fn wait(&self, timeout: Duration) -> Option<Vec<u8>> {
        let (slot, wake) = &*self.0;
        let guard = slot.lock().unwrap_or_else(PoisonError::into_inner);
        let (guard, _) = wake
            .wait_timeout_while(guard, timeout, |slot| slot.is_none())
            .unwrap_or_else(PoisonError::into_inner);
        guard.clone()
    }
}

/// Something that answers accesses to a range of a bus. Called by many vCPU threads at once; never waits
/// for anything but a short lock.
pub trait BusDevice: Send + Sync {
    /// Reads `data.len()` bytes (1, 2, 4 or 8) at `offset` within the device's range.
    fn read(&self, offset: u64, data: &mut [u8]) -> Outcome;
    /// Writes `data` at `offset` within the device's range.
    fn write(&self, offset: u64, data: &[u8]) -> Outcome;
}

/// An address range `[base, base + len)` of a bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// The first address.
    pub base: u64,
    /// How many addresses.
    pub len: u64,
}

/// A bus could not take a device.
#[derive(Debug, thiserror::Error)]
#[error("The range {0:#x?} is empty, wraps around or overlaps another device's")]
pub struct Overlap(Range);

/// Port I/O or MMIO: which device answers where. Filled while the machine is assembled, then only read.
#[derive(Default)]
pub struct Bus {
    devices: BTreeMap<u64, (u64, Arc<dyn BusDevice>)>,
}

impl Bus {
    /// Gives `range` to `device`.
    ///
    /// # Errors
    /// The range is empty, wraps, or overlaps another device's.
    pub fn insert(&mut self, range: Range, device: Arc<dyn BusDevice>) -> Result<(), Overlap> {
        let end = range.base.checked_add(range.len).ok_or(Overlap(range))?;
        let before = self.devices.range(..end).next_back();
        if range.len == 0 || before.is_some_and(|(base, (len, _))| base + len > range.base) {
            return Err(Overlap(range));
        }
        self.devices.insert(range.base, (range.len, device));
        Ok(())
    }

    fn find(&self, address: u64, len: usize) -> Option<(u64, &dyn BusDevice)> {
        let (base, (size, device)) = self.devices.range(..=address).next_back()?;
        let offset = address - base;
        (offset.checked_add(len as u64)? <= *size).then_some((offset, &**device))
    }

    /// Reads from whichever device is at `address`; where there is none, all ones, as a PC does.
    pub fn read(&self, address: u64, data: &mut [u8]) -> Outcome {
        if let Some((offset, device)) = self.find(address, data.len()) {
            return device.read(offset, data);
        }
        data.fill(0xff);
        Outcome::Done
    }

    /// Writes to whichever device is at `address`; where there is none, nothing happens.
    pub fn write(&self, address: u64, data: &[u8]) -> Outcome {
        self.find(address, data.len()).map_or(Outcome::Done, |(offset, device)| device.write(offset, data))
    }
}

/// Turns writes to an address into eventfd signals without leaving the kernel (`KVM_IOEVENTFD`).
pub trait DoorbellRegistry: Send + Sync {
    /// From now on a `len`-byte MMIO write to `address` signals `event` (of `value` only, if given). A
    /// `len` of 0 means a write of any length, and allows no `value`.
    ///
    /// # Errors
    /// The hypervisor refuses.
    fn register(&self, address: u64, len: u32, value: Option<u64>, event: &EventFd) -> io::Result<()>;
    /// Undoes a `register` with the same arguments.
    ///
    /// # Errors
    /// The hypervisor refuses.
    fn unregister(&self, address: u64, len: u32, value: Option<u64>, event: &EventFd) -> io::Result<()>;
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Offset;
    impl BusDevice for Offset {
        fn read(&self, offset: u64, data: &mut [u8]) -> Outcome {
            data.fill(offset as u8);
            Outcome::Done
        }
        fn write(&self, _offset: u64, _data: &[u8]) -> Outcome {
            Outcome::Act(Action::Reset)
        }
    }

    #[test]
    fn an_access_reaches_the_device_whose_range_holds_all_of_it() {
        let mut bus = Bus::default();
        bus.insert(Range { base: 0x100, len: 8 }, Arc::new(Offset)).expect("free");
        for bad in [(0x107, 1), (0xff, 2), (0x100, 8), (0x180, 0), (u64::MAX, 2), (0, 0x200)] {
            let range = Range { base: bad.0, len: bad.1 };
            assert!(bus.insert(range, Arc::new(Offset)).is_err(), "{range:x?}");
        }
        let mut data = [0; 2];
        bus.read(0x106, &mut data);
        assert_eq!(data, [6, 6]);
        bus.read(0x107, &mut data);
        assert_eq!(data, [0xff, 0xff], "an access across the end belongs to nobody");
        assert!(matches!(bus.write(0x100, &[1]), Outcome::Act(Action::Reset)));
        assert!(matches!(bus.write(0x108, &[1]), Outcome::Done));
    }

    #[test]
    fn a_deferred_access_returns_what_the_device_completes_it_with() {
        let token = Deferred::default();
        assert!(token.wait(Duration::from_millis(1)).is_none());
        let other = token.clone();
        let device = std::thread::spawn(move || other.complete(&[7]));
        assert_eq!(token.wait(Duration::from_secs(10)), Some(vec![7]));
        device.join().expect("it completes");
    }
}
