//! Virtual processors as the rest of the machine sees them: exits and entries as plain values, the loop
//! that answers exits from the buses, and the gang that pauses and resumes all of them as one.
//!
//! Nothing here knows KVM: the same loop serves whatever implements [`Processor`].

mod exit;
mod gang;
mod run;

pub use exit::{Data, VmEntry, VmExit};
pub use gang::{Gang, Kick, Stuck};
pub use run::{Buses, Event, Processor, run};
