//! Several PCs with KVM on one machine, for testing a distributed hypervisor end to end.
//!
//! A *lab PC* is a QEMU machine that runs Debian's stock kernel with real KVM inside: emulated (TCG with AMD
//! SVM) where the host cannot run KVM guests of its own, by nested KVM where it can. PCs are joined by
//! [networks](network::Network) that tests cut, delay and heal; commands run in a PC through a virtio-serial
//! port, so that they work whatever its network does; a PC can be frozen, thawed, and lose its power.
//!
//! ```no_run
//! # fn main() -> anyhow::Result<()> {
//! let lab = lab::Lab::new("greeting")?;
//! let lan = lab.network("lan");
//! let alice = lab.pc("alice").on(&lan).start()?;
//! let bob = lab.pc("bob").on(&lan).start()?;
//! alice.run(&format!("ping -c 1 {}", bob.address()))?.ok()?;
//! lan.cut("bob");
//! assert!(!alice.run(&format!("ping -c 1 -W 1 {}", bob.address()))?.success());
//! # Ok(())
//! # }
//! ```
//!
//! Everything that a lab starts ends with it: when it is dropped, when the test panics, on Ctrl-C, and when
//! the process is killed outright.

pub mod child;
pub mod demo;
pub mod frames;
pub mod guest;
pub mod host;
pub mod images;
pub mod initramfs;
pub mod lab;
pub mod network;
pub mod pc;
pub mod qmp;
pub mod runner;
pub mod scene;
mod snapshot;
pub mod up;

pub use guest::Guest;
pub use lab::Lab;
pub use network::Network;
pub use pc::Pc;
pub use runner::{Output, Process, Silence};
pub use scene::Scene;
