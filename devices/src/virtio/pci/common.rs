//! The common configuration registers (section 4.1.4.3).

use std::sync::Arc;

use super::super::interrupts::NO_VECTOR;
use super::super::{Broken, Virtqueue};
use super::state::{DRIVER_OK, Device, FEATURES_OK, NEEDS_RESET, Phase, Shared};

const DEVICE_FEATURE_SELECT: u64 = 0x00;
const DEVICE_FEATURE: u64 = 0x04;
const DRIVER_FEATURE_SELECT: u64 = 0x08;
const DRIVER_FEATURE: u64 = 0x0c;
const CONFIG_MSIX_VECTOR: u64 = 0x10;
const NUM_QUEUES: u64 = 0x12;
const DEVICE_STATUS: u64 = 0x14;
const CONFIG_GENERATION: u64 = 0x15;
const QUEUE_SELECT: u64 = 0x16;
const QUEUE_SIZE: u64 = 0x18;
const QUEUE_MSIX_VECTOR: u64 = 0x1a;
const QUEUE_ENABLE: u64 = 0x1c;
const QUEUE_NOTIFY_OFF: u64 = 0x1e;
const QUEUE_DESC: u64 = 0x20;
const QUEUE_DRIVER: u64 = 0x28;
const QUEUE_DEVICE: u64 = 0x30;
const END: u64 = 0x38;

/// The register that holds `offset`, and its width in bytes. The 64-bit ones are two of 32 bits.
fn register(offset: u64) -> Option<(u64, usize)> {
    Some(match offset {
        0x00..0x10 => (offset & !3, 4),
        CONFIG_MSIX_VECTOR..DEVICE_STATUS => (offset & !1, 2),
        DEVICE_STATUS | CONFIG_GENERATION => (offset, 1),
        QUEUE_SELECT..QUEUE_DESC => (offset & !1, 2),
        QUEUE_DESC..END => (offset & !3, 4),
        _ => return None,
    })
}

fn half(value: u64, offset: u64) -> u32 {
    (value >> (8 * (offset & 4))) as u32
}

fn set_half(value: &mut u64, offset: u64, half: u32) {
    let shift = 8 * (offset & 4);
    *value = *value & !(0xffff_ffff << shift) | u64::from(half) << shift;
}

impl Shared {
    /// Reads registers; `data` is zeroed and may cover several or a part of one.
    pub(super) fn read_common(&self, offset: u64, data: &mut [u8]) {
        let device = self.lock();
        let mut done = 0;
        while done < data.len() {
            let at = offset + done as u64;
            let Some((start, width)) = register(at) else { return };
            let value = self.read_register(&device, start).to_le_bytes();
            let skip = (at - start) as usize;
            let take = (width - skip).min(data.len() - done);
            data[done..done + take].copy_from_slice(&value[skip..skip + take]);
            done += take;
        }
    }

    fn read_register(&self, device: &Device, register: u64) -> u32 {
        let queue = device.queues.get(usize::from(device.queue_select));
        let layout = queue.map(|queue| &queue.layout);
        match register {
            DEVICE_FEATURE_SELECT => device.device_feature_select,
            DEVICE_FEATURE if device.device_feature_select < 2 => {
                half(device.offered(), u64::from(device.device_feature_select) * 4)
            }
            DRIVER_FEATURE_SELECT => device.driver_feature_select,
            DRIVER_FEATURE if device.driver_feature_select < 2 => {
                half(device.driver_features, u64::from(device.driver_feature_select) * 4)
            }
            CONFIG_MSIX_VECTOR => self.interrupts.vector(None).into(),
            NUM_QUEUES => device.queues.len() as u32,
            DEVICE_STATUS => {
                let distress = if self.interrupts.needs_reset() { NEEDS_RESET } else { 0 };
                u32::from(device.status | distress)
            }
            CONFIG_GENERATION => self.interrupts.generation().into(),
            QUEUE_SELECT => device.queue_select.into(),
            QUEUE_SIZE => layout.map_or(0, |layout| layout.size.into()),
            QUEUE_MSIX_VECTOR if queue.is_none() => NO_VECTOR.into(),
            QUEUE_MSIX_VECTOR => self.interrupts.vector(Some(device.queue_select)).into(),
            QUEUE_ENABLE => queue.is_some_and(|queue| queue.enabled).into(),
            QUEUE_NOTIFY_OFF if queue.is_some() => device.queue_select.into(),
            QUEUE_DESC.. if layout.is_some() => {
                let layout = layout.cloned().unwrap_or_default();
                let value = match register & !7 {
                    QUEUE_DESC => layout.descriptors,
                    QUEUE_DRIVER => layout.available,
                    QUEUE_DEVICE.. => layout.used,
                    _ => 0,
                };
                half(value, register)
            }
            _ => 0,
        }
    }

    /// Writes a register, all of it at once, or both halves of a 64-bit one. Other accesses are ignored.
    pub(super) fn write_common(this: &Arc<Self>, offset: u64, data: &[u8]) {
        let mut device = this.lock();
        let mut rest = data;
        let mut at = offset;
        while !rest.is_empty() {
            let Some((start, width)) = register(at) else { return };
            if start != at || rest.len() < width || (rest.len() != width && at < QUEUE_DESC) {
                return;
            }
            let mut value = [0; 4];
            value[..width].copy_from_slice(&rest[..width]);
            this.write_register(&mut device, at, u32::from_le_bytes(value));
            rest = &rest[width..];
            at += width as u64;
        }
    }

    fn write_register(self: &Arc<Self>, device: &mut Device, register: u64, value: u32) {
        if let (DEVICE_STATUS, 0) = (register, value) {
            return self.set_status(device, 0);
        }
        if device.phase == (Phase::Leaving { reset: true }) {
            return;
        }
        match register {
            DEVICE_FEATURE_SELECT => device.device_feature_select = value,
            DRIVER_FEATURE_SELECT => device.driver_feature_select = value,
            DRIVER_FEATURE if device.driver_feature_select < 2 && device.status & FEATURES_OK == 0 => {
                let at = u64::from(device.driver_feature_select) * 4;
                set_half(&mut device.driver_features, at, value);
            }
            CONFIG_MSIX_VECTOR => self.interrupts.set_vector(None, value as u16),
            DEVICE_STATUS => self.set_status(device, value as u8),
            QUEUE_SELECT => device.queue_select = value as u16,
            QUEUE_MSIX_VECTOR => self.interrupts.set_vector(Some(device.queue_select), value as u16),
            QUEUE_SIZE | QUEUE_ENABLE | QUEUE_DESC.. => self.write_queue(device, register, value),
            _ => {}
        }
    }

    /// The registers of the selected queue, which the driver sets up between FEATURES_OK and DRIVER_OK.
    fn write_queue(&self, device: &mut Device, register: u64, value: u32) {
        let (kind, status) = (device.device.kind(), device.status);
        let Some(queue) = device.queues.get_mut(usize::from(device.queue_select)) else { return };
        if queue.enabled || status & DRIVER_OK != 0 {
            return;
        }
        match register {
            QUEUE_SIZE => {
                let size = value as u16;
                if size.is_power_of_two() && size <= queue.max_size {
                    queue.layout.size = size;
                }
            }
            QUEUE_ENABLE if value == 1 => match Virtqueue::new(&queue.layout, false, self.memory().clone()) {
                Ok(_) => queue.enabled = true,
                Err(broken @ Broken::Layout) => self.interrupts.fail(kind, &broken),
                Err(_) => {}
            },
            QUEUE_DESC.. => {
                let place = match register & !7 {
                    QUEUE_DESC => &mut queue.layout.descriptors,
                    QUEUE_DRIVER => &mut queue.layout.available,
                    _ => &mut queue.layout.used,
                };
                set_half(place, register, value);
            }
            _ => {}
        }
    }
}
