//! Guests whose vCPUs run on several PCs at once: what the console node and its helpers say to each other, a vCPU that
//! runs elsewhere, and the helper's part of a guest. Drawn in `docs/span-protocol.md`.

pub mod clock;
pub mod features;
pub mod host;
mod moment;
pub mod numa;
pub mod protocol;
pub mod relay;
pub mod remote;
pub mod share;
mod steering;
