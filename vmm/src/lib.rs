//! Omega's virtual machine monitor: the machine, its memory, vCPUs, boot and configuration.

pub mod acpi;
pub mod check;
pub mod cli;
pub mod config;
pub mod console;
pub mod control;
pub mod cpu;
#[doc(hidden)]
pub mod fuzzing;
pub mod interrupt;
pub mod kvm;
pub mod loader;
pub mod machine;
pub mod memory;
pub mod ping;
pub mod seccomp;
pub mod span;
pub mod units;
