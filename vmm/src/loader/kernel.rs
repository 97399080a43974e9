//! A kernel, its initial RAM disk and its command line, opened once and loaded at each reset.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use devices::GuestMemory;
use linux_loader::loader::bootparam::setup_header;
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::{BzImage, Elf, KernelLoader};
use vm_memory::{Address, ByteValued, Bytes, GuestAddress};

use super::{Entry, Error, address, boot_params, cache, pvh};
use crate::config;
use crate::memory::{LOW_RAM_END, Layout};

/// Where the setup header stands in a bzImage.
const SETUP_HEADER: u64 = 0x1f1;
const HDRS: u32 = 0x5372_6448;
/// `xloadflags`: there is a 64-bit entry point at offset 0x200.
const XLF_KERNEL_64: u16 = 1;
const ENTRY_64: u64 = 0x200;
/// What a kernel takes that does not say: Linux' COMMAND_LINE_SIZE.
const COMMAND_LINE_MAX: usize = 2047;
/// Highest address of an initial RAM disk for a kernel that does not say.
const INITRD_MAX: u64 = 0x7fff_ffff;
const PAGE: u64 = 4096;

/// What is booted.
pub struct Kernel {
    path: PathBuf,
    form: Form,
    initrd: Option<(PathBuf, File)>,
    cmdline: String,
}

enum Form {
    /// A bzImage that the guest unpacks, since we do not know how it is packed.
    BzImage(File),
    /// A kernel proper; with its bzImage's setup header, if it came out of one.
    Elf(File, Option<setup_header>),
}

impl Kernel {
    /// Opens what `config` names; a packed kernel is unpacked, through `cache` if given.
    ///
    /// # Errors
    /// [`Error::Read`], [`Error::NoKernel`], [`Error::Damaged`].
    pub fn open(config: &config::Kernel, cache: Option<&Path>) -> Result<Self, Error> {
        let path = config.image.clone();
        let open = |what, path: &Path| {
            File::open(path).map_err(|source| Error::Read { what, path: path.into(), source })
        };
        let mut file = open("kernel", &path)?;
        let initrd =
            config.initrd.as_deref().map(|path| open("initial RAM disk", path).map(|f| (path.into(), f)));
        let form = match head(&mut file) {
            Ok(Head::Elf) => Form::Elf(file, None),
            Ok(Head::BzImage(header)) => match cache::unpacked(&file, &header, cache) {
                Ok(Some(elf)) => Form::Elf(elf, Some(*header)),
                Ok(None) => Form::BzImage(file),
                Err(why) => return Err(Error::Damaged { path, why: why.to_string() }),
            },
            Ok(Head::Other) => return Err(Error::NoKernel(path)),
            Err(source) => return Err(Error::Read { what: "kernel", path, source }),
        };
        Ok(Self { path, form, initrd: initrd.transpose()?, cmdline: config.cmdline.clone() })
    }

    /// Tells Linux the rate of the time stamp counter, unless the command line does so already. It would measure it
    /// against timers of which each look is an exit: that can fail, and then it does without the counter.
    pub fn tell_tsc(&mut self, khz: u32) {
        const WORD: &str = "tsc_early_khz=";
        if !self.cmdline.split_whitespace().any(|word| word.starts_with(WORD)) {
            // In front: what follows `--` is for init.
            self.cmdline = format!("{WORD}{khz} {}", self.cmdline).trim_end().to_owned();
        }
    }

    /// Loads everything into `memory`, whose ACPI tables begin at `rsdp`.
    ///
    /// # Errors
    /// [`Error::Damaged`], [`Error::NoRoom`], [`Error::CommandLine`], [`Error::Read`].
    pub fn load(
        &mut self,
        memory: &GuestMemory,
        layout: &Layout,
        rsdp: GuestAddress,
    ) -> Result<Entry, Error> {
        let loaded = match &mut self.form {
            Form::BzImage(file) => BzImage::load(memory, None, file, None),
            Form::Elf(file, _) => Elf::load(memory, None, file, None),
        };
        let loaded = loaded.map_err(|error| match &error {
            linux_loader::loader::Error::Elf(linux_loader::loader::elf::Error::ReadKernelImage)
            | linux_loader::loader::Error::Bzimage(
                linux_loader::loader::bzimage::Error::ReadBzImageCompressedKernel,
            ) => Error::NoRoom("the kernel"),
            _ => Error::Damaged { path: self.path.clone(), why: error.to_string() },
        })?;
        let header = match &self.form {
            Form::BzImage(_) => loaded.setup_header,
            Form::Elf(_, header) => *header,
        };
        let end = kernel_end(loaded.kernel_load.raw_value(), loaded.kernel_end, header.as_ref());
        let cmdline = self.load_cmdline(memory, header.as_ref())?;
        let initrd = self.load_initrd(memory, layout, header.as_ref(), end)?;
        let boot = Boot { rsdp, cmdline, initrd };
        match (&self.form, loaded.pvh_boot_cap) {
            (Form::Elf(_, None), PvhBootCapability::PvhEntryPresent(start)) => {
                pvh::write(memory, layout, &boot)?;
                Ok(Entry::Pvh { start, info: address::START_INFO })
            }
            (form, _) => {
                let offset = if matches!(form, Form::BzImage(_)) { ENTRY_64 } else { 0 };
                boot_params::write(memory, layout, &boot, header)?;
                let start = loaded.kernel_load.unchecked_add(offset);
                Ok(Entry::Linux64 { start, params: address::BOOT_PARAMS })
            }
        }
    }

    fn load_cmdline(
        &self,
        memory: &GuestMemory,
        header: Option<&setup_header>,
    ) -> Result<(GuestAddress, usize), Error> {
        let at = address::COMMAND_LINE;
        let given = header.map_or(0, |header| header.cmdline_size as usize);
        let max = if given == 0 { COMMAND_LINE_MAX } else { given };
        let max = max.min((LOW_RAM_END - at.0 - 1) as usize);
        let len = self.cmdline.len();
        if len > max {
            return Err(Error::CommandLine { len, max });
        }
        let mut bytes = self.cmdline.clone().into_bytes();
        bytes.push(0);
        memory.write_slice(&bytes, at).map_err(|_| Error::NoRoom("the command line"))?;
        Ok((at, len))
    }

    /// Puts the initial RAM disk as high as the kernel takes it, above `kernel_end`.
    fn load_initrd(
        &mut self,
        memory: &GuestMemory,
        layout: &Layout,
        header: Option<&setup_header>,
        kernel_end: u64,
    ) -> Result<Option<(GuestAddress, u64)>, Error> {
        let Some((path, file)) = &mut self.initrd else { return Ok(None) };
        let failed = |source| Error::Read { what: "initial RAM disk", path: path.clone(), source };
        let len = file.seek(SeekFrom::End(0)).map_err(failed)?;
        file.rewind().map_err(failed)?;
        let max = match header.map_or(0, |header| header.initrd_addr_max) {
            0 => INITRD_MAX,
            max => max.into(),
        };
        let top = layout.low().len.min(max + 1);
        let room = || Error::NoRoom("the initial RAM disk");
        let start = top.checked_sub(len).ok_or_else(room)? & !(PAGE - 1);
        if start < kernel_end {
            return Err(room());
        }
        let count = usize::try_from(len).map_err(|_| room())?;
        memory
            .read_exact_volatile_from(GuestAddress(start), file, count)
            .map_err(|error| failed(io::Error::other(error)))?;
        Ok(Some((GuestAddress(start), len)))
    }
}

/// What the memory map and parameter structures tell the kernel, beside the map itself.
pub(super) struct Boot {
    pub(super) rsdp: GuestAddress,
    /// The command line and its length without the final zero.
    pub(super) cmdline: (GuestAddress, usize),
    pub(super) initrd: Option<(GuestAddress, u64)>,
}

enum Head {
    Elf,
    BzImage(Box<setup_header>),
    Other,
}

fn head(file: &mut File) -> io::Result<Head> {
    let mut magic = [0; 4];
    file.read_exact(&mut magic)?;
    if magic == *b"\x7fELF" {
        return Ok(Head::Elf);
    }
    let mut header = setup_header::default();
    file.seek(SeekFrom::Start(SETUP_HEADER))?;
    if file.read_exact(header.as_mut_slice()).is_err() {
        return Ok(Head::Other);
    }
    let bootable = header.header == HDRS && header.version >= 0x20c && header.xloadflags & XLF_KERNEL_64 != 0;
    Ok(if bootable { Head::BzImage(Box::new(header)) } else { Head::Other })
}

/// Up to where a kernel uses memory before it has read the memory map.
fn kernel_end(start: u64, end: u64, header: Option<&setup_header>) -> u64 {
    let needs = header.map_or(0, |header| u64::from(header.init_size));
    end.max(start.saturating_add(needs))
}

#[cfg(test)]
#[path = "kernel_test.rs"]
mod tests;
