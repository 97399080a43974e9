//! PCI Express as the guest sees it: a root with its host bridge, functions with configuration space,
//! BARs and MSI-X. Section numbers are those of the PCI Local Bus Specification 3.0.
//!
//! ```text
//! vCPU ── 0xcf8/0xcfc ──▶ ConfigPorts ─┐
//!      ── ECAM ─────────▶ Ecam ────────┼─▶ PciFunction::{read,write}_config
//!      ── MMIO window ──▶ Window ──────┴─▶ PciFunction::{read,write}_bar, by the BARs' current places
//! ```

mod bars;
mod config;
mod function;
pub(crate) mod msix;
mod root;

pub use bars::{BarKind, BarSpec, Bars};
pub use config::{ConfigSpace, ConfigState, Identity};
pub use function::PciFunction;
pub use msix::{Msix, MsixState, VectorState};
pub use root::{Full, PciRoot, Windows};
