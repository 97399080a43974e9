//! Virtual processors as the rest of the machine sees them: exits and entries as plain values, the loop
//! that answers exits from the buses, and the gang that pauses and resumes all of them as one.
//!
//! A vCPU whose local APIC is not the hypervisor's is an [`ApicCpu`] around a [`Core`]. Others leave interrupts in its
//! [`Inbox`]; it reaches others by a [`Fabric`].
//!
//! Nothing here knows KVM: the same loop serves whatever implements [`Processor`].

mod apic;
mod bare;
mod clock;
mod exit;
mod fabric;
mod gang;
mod inbox;
mod rest;
mod run;

pub use apic::{ApicCpu, ApicState};
pub use bare::Core;
pub use clock::{Clock, monotonic};
pub use exit::{Data, VmEntry, VmExit};
pub use fabric::{Elsewhere, Fabric, Place, Switch};
pub use gang::{Gang, Kick, Stuck};
pub use inbox::Inbox;
pub use run::{Buses, Event, Processor, run};
