//! The interrupt controllers of a PC, as values, for guests whose vCPUs run on several PCs.
//!
//! A guest on one PC has the kernel's; a guest that spans several cannot, because the kernel's knows only the vCPUs
//! of its own. Everything in here is state and functions of it: an event goes in (a register access, a message, a
//! pin, the time), the state changes, and effects come out for the caller to carry out. There are no threads,
//! clocks or locks, and nothing of KVM, so any member of a guest can run it, save it, send it and take it over.
//! All accesses come from the guest and are hostile: none panics, and each does a bounded amount of work.
//!
//! The design is drawn in `docs/interrupts.md`. No vCPU is wired to this yet.

pub mod chipset;
pub(crate) mod fuzz;
pub mod io_apic;
pub mod local;
pub mod message;
pub mod pic;
pub mod pit;
pub mod route;
pub mod time;
pub mod vectors;

pub use chipset::Chipset;
pub use io_apic::IoApic;
pub use local::LocalApic;
pub use message::{ApicId, Delivery, Destination, Message, Trigger};
pub use pic::Pic;
pub use pit::Pit;
pub use route::{Targets, View, route};
pub use time::{Deadline, Nanos, Now, Tsc};
