//! The guest's physical address space: where RAM, devices and tables lie, the RAM itself, and where its pages are
//! while they are not here.

pub mod coherence;
pub mod fault;
pub(crate) mod frames;
mod layout;
mod mapping;
mod ram;
pub mod store;

pub use layout::{ECAM, IO_APIC, LOCAL_APIC, LOW_RAM_END, Layout, RAM_END_32, Region, TABLES, WINDOW_32};
pub use ram::{Backing, Error, Ram};
