//! Omega's virtual machine monitor: the machine, its memory, vCPUs, boot and configuration.

pub mod config;
pub mod console;
pub mod control;
pub mod cpu;
pub mod kvm;
pub mod seccomp;
pub mod units;
