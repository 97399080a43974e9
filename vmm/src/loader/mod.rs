//! Getting a kernel into guest memory: bzImage (unpacked by us where we can) and ELF, with initial RAM
//! disk, command line and memory map, by Linux' 64-bit boot protocol or by PVH.
//!
//! A distribution's bzImage is a small program that unpacks the kernel proper. We unpack it instead, once,
//! and keep the result in the cache directory, so that every later boot begins with the kernel itself.

mod boot_params;
mod cache;
mod kernel;
#[doc(hidden)]
pub mod micro;
mod pvh;
mod sparse;
mod unpack;

use std::io;
use std::path::PathBuf;

use vm_memory::GuestAddress;

pub use kernel::Kernel;

/// A kernel could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be opened or read.
    #[error("The {what} {path} cannot be read: {source}")]
    Read {
        /// Kernel or initial RAM disk.
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Neither a bzImage nor a 64-bit ELF kernel.
    #[error("{0} is no kernel that can be booted: give a bzImage (`vmlinuz`) or an x86-64 ELF `vmlinux`")]
    NoKernel(PathBuf),
    /// The kernel is damaged.
    #[error("The kernel {path} is damaged: {why}")]
    Damaged {
        /// Its path.
        path: PathBuf,
        /// How it shows.
        why: String,
    },
    /// Too little RAM.
    #[error("The guest's RAM is too small: {0} does not fit; give it more in `memory.size`")]
    NoRoom(&'static str),
    /// The command line is too long.
    #[error("The kernel's command line has {len} bytes; this kernel takes at most {max}")]
    CommandLine {
        /// Its length.
        len: usize,
        /// What the kernel takes.
        max: usize,
    },
}

/// Where and how the first vCPU begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// In 64-bit mode with identity-mapped low memory, RSI at the boot parameters (Linux'
    /// `Documentation/arch/x86/boot.rst`, "64-bit boot protocol").
    Linux64 {
        /// The first instruction.
        start: GuestAddress,
        /// `struct boot_params`.
        params: GuestAddress,
    },
    /// In 32-bit protected mode without paging, EBX at the start info (Xen's "x86/HVM direct boot ABI").
    Pvh {
        /// The first instruction.
        start: GuestAddress,
        /// `struct hvm_start_info`.
        info: GuestAddress,
    },
}

/// Addresses of what a loader writes, in the first pages of RAM, which no kernel is loaded over.
mod address {
    use vm_memory::GuestAddress;

    /// `hvm_start_info`, followed by its module list and memory map.
    pub(super) const START_INFO: GuestAddress = GuestAddress(0x6000);
    /// `boot_params`.
    pub(super) const BOOT_PARAMS: GuestAddress = GuestAddress(0x7000);
    /// The command line, which may fill the memory up to the end of low RAM.
    pub(super) const COMMAND_LINE: GuestAddress = GuestAddress(0x2_0000);
}
