//! The interrupt controllers of a guest whose vCPUs have local APICs of Omega's own: the chipset's I/O APIC, PIC and
//! PIT on the console node, and what devices and vCPUs see of them.
//!
//! ```text
//!   devices ── lines, MSIs ──► Board ─── messages ───► Switch ─┬─► Inbox of a vCPU here
//!   vCPUs ──── IPIs, EOIs ───►   │  Chipset, one short lock    └─► Elsewhere: another member
//!   buses ──── page, ports ──►   └── thread: the PIT's interrupts
//! ```

mod board;
mod bus;
mod lines;
mod timer;

pub use board::Board;
pub use bus::KeyboardAndSpeaker;

#[cfg(test)]
#[path = "micro_test.rs"]
mod micro;
