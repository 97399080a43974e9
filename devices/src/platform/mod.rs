//! The parts of a PC's chipset that a guest expects at fixed ports: serial port, clock, keyboard
//! controller, power management, reset and panic notification.
//!
//! [`ports`] says where each stands; the machine puts the devices on its port bus there and describes
//! them in its ACPI tables from the same constants.

pub mod i8042;
pub mod pm;
pub mod ports;
pub mod pvpanic;
pub mod reset;
pub mod rtc;
pub mod serial;

pub use i8042::I8042;
pub use pm::Pm;
pub use pvpanic::Pvpanic;
pub use reset::{ResetControl, SystemControlA};
pub use rtc::{RamSize, Rtc};
pub use serial::Serial;

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks, whatever happened to another holder: the devices' registers are plain values, always valid.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
