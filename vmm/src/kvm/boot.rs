//! The state in which a vCPU enters a kernel.

use devices::GuestMemory;
use kvm_bindings::{kvm_lapic_state, kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{Address, Bytes, GuestAddress};

use super::{Context, Controllers, Error, Vcpu, msr};
use crate::loader::Entry;

// Where the structures lie that a processor in protected mode needs; below everything that a loader writes.
const GDT: GuestAddress = GuestAddress(0x500);
const PML4: GuestAddress = GuestAddress(0x9000);
const PDPT: GuestAddress = GuestAddress(0xa000);
const PD: GuestAddress = GuestAddress(0xb000);

const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// The bit of RFLAGS that is always set.
const RFLAGS: u64 = 1 << 1;
/// A page-table entry: present, writable.
const PRESENT_WRITABLE: u64 = 0b11;
/// It maps a 2 MiB page.
const LARGE: u64 = 1 << 7;

/// Selectors and descriptors of Linux' boot protocol: code at 0x10, data at 0x18.
const GDT_ENTRIES: [u64; 5] = [
    0,
    0,
    0x00af_9b00_0000_ffff, // 64-bit code
    0x00cf_9300_0000_ffff, // data
    0x008f_8b00_0000_ffff, // task state
];
/// The same for 32-bit code.
const CODE_32: u64 = 0x00cf_9b00_0000_ffff;

impl Vcpu {
    /// Puts this vCPU, in the state of power-on, at a kernel's entry point.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn boot(&self, entry: &Entry, memory: &GuestMemory) -> Result<(), Error> {
        let mut sregs = self.fd().get_sregs().to("read a vCPU's registers")?;
        let mut gdt = GDT_ENTRIES;
        let regs = match *entry {
            Entry::Linux64 { start, params } => {
                long_mode(&mut sregs, memory)?;
                kvm_regs { rip: start.0, rsi: params.0, rflags: RFLAGS, ..Default::default() }
            }
            Entry::Pvh { start, info } => {
                gdt[2] = CODE_32;
                sregs.cr0 = CR0_PE | CR0_ET;
                kvm_regs { rip: start.0, rbx: info.0, rflags: RFLAGS, ..Default::default() }
            }
        };
        write(memory, GDT, &gdt)?;
        sregs.gdt.base = GDT.0;
        sregs.gdt.limit = (size_of_val(&gdt) - 1) as u16;
        sregs.idt.limit = 0;
        sregs.cs = segment(&gdt, 2);
        let data = segment(&gdt, 3);
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        sregs.tr = segment(&gdt, 4);
        self.fd().set_sregs(&sregs).to("set a vCPU's registers")?;
        self.fd().set_regs(&regs).to("set a vCPU's registers")
    }

    /// Sets what firmware sets on every processor before an operating system sees it; of its local APIC only if that
    /// is the kernel's.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn set_up(&self) -> Result<(), Error> {
        msr::set_for_boot(self.fd())?;
        if self.controllers() == Controllers::Userspace {
            return Ok(());
        }
        let mut lapic = self.fd().get_lapic().to("read a local APIC")?;
        set_delivery_mode(&mut lapic, LVT_LINT0, EXT_INT);
        set_delivery_mode(&mut lapic, LVT_LINT1, NMI);
        self.fd().set_lapic(&lapic).to("set a local APIC")
    }
}

const LVT_LINT0: usize = 0x350;
const LVT_LINT1: usize = 0x360;
const NMI: u8 = 4;
const EXT_INT: u8 = 7;

/// Sets the delivery mode (bits 8 to 10) of a local vector and unmasks it, which KVM's reset state does not.
fn set_delivery_mode(lapic: &mut kvm_lapic_state, register: usize, mode: u8) {
    lapic.regs[register + 1] = mode as libc::c_char;
    lapic.regs[register + 2] = 0;
}

/// 64-bit mode with the first GiB identity-mapped.
fn long_mode(sregs: &mut kvm_sregs, memory: &GuestMemory) -> Result<(), Error> {
    write(memory, PML4, &[PDPT.0 | PRESENT_WRITABLE])?;
    write(memory, PDPT, &[PD.0 | PRESENT_WRITABLE])?;
    let mut pages = [0; 512];
    for (i, page) in (0_u64..).zip(&mut pages) {
        *page = i << 21 | PRESENT_WRITABLE | LARGE;
    }
    write(memory, PD, &pages)?;
    sregs.cr3 = PML4.0;
    sregs.cr4 |= CR4_PAE;
    sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
    sregs.efer |= EFER_LME | EFER_LMA;
    Ok(())
}

fn write(memory: &GuestMemory, at: GuestAddress, words: &[u64]) -> Result<(), Error> {
    for (i, word) in (0_u64..).zip(words) {
        let place = at.unchecked_add(i * 8);
        memory
            .write_obj(*word, place)
            .map_err(|_| Error::State("there is no RAM for the boot structures".into()))?;
    }
    Ok(())
}

/// What a processor holds of descriptor `index` once it is loaded (Intel SDM volume 3, section 3.4.5).
fn segment(gdt: &[u64], index: usize) -> kvm_segment {
    let descriptor = gdt[index];
    let bit = |at: u32| (descriptor >> at & 1) as u8;
    let granular = bit(55) == 1;
    let limit = (descriptor & 0xffff | descriptor >> 32 & 0xf_0000) as u32;
    kvm_segment {
        base: descriptor >> 16 & 0xff_ffff | descriptor >> 56 << 24,
        limit: if granular { limit << 12 | 0xfff } else { limit },
        selector: (index * 8) as u16,
        type_: (descriptor >> 40 & 0xf) as u8,
        present: bit(47),
        dpl: (descriptor >> 45 & 3) as u8,
        db: bit(54),
        s: bit(44),
        l: bit(53),
        g: bit(55),
        avl: bit(52),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_hold_what_their_descriptors_say() {
        let code = segment(&GDT_ENTRIES, 2);
        assert_eq!((code.base, code.limit, code.selector), (0, u32::MAX, 0x10));
        assert_eq!((code.type_, code.s, code.present, code.l, code.db), (0xb, 1, 1, 1, 0));
        let task = segment(&GDT_ENTRIES, 4);
        assert_eq!((task.type_, task.s, task.present), (0xb, 0, 1));
    }
}
