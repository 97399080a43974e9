//! Micro-guests: kernels of a few instructions, for tests and measurements on any `/dev/kvm`.
//!
//! Each is a PVH ELF file whose code begins in 32-bit protected mode without paging.

use devices::platform::ports;

/// Where the code is loaded and entered.
const BASE: u32 = 1 << 20;
const CODE_OFFSET: usize = 0x100;
const NOTE_OFFSET: usize = 0xc0;

/// Sends `text` to the serial port.
#[must_use]
pub fn say(text: &str) -> Vec<u8> {
    let mut code = vec![0x66, 0xba]; // mov dx, COM1
    code.extend((ports::SERIAL.base as u16).to_le_bytes());
    for byte in text.bytes() {
        code.extend([0xb0, byte, 0xee]); // mov al, byte; out dx, al
    }
    code
}

/// Enters S5.
#[must_use]
pub fn power_off() -> Vec<u8> {
    let sleep = 1u16 << 13 | u16::from(ports::SLEEP_TYPE_S5) << 10;
    let mut code = vec![0x66, 0xba]; // mov dx, PM1a_CNT
    code.extend((ports::PM1A_CONTROL.base as u16).to_le_bytes());
    code.extend([0x66, 0xb8]); // mov ax, SLP_EN | SLP_TYP
    code.extend(sleep.to_le_bytes());
    code.extend([0x66, 0xef]); // out dx, ax
    code.extend(halt());
    code
}

/// Halts for good.
#[must_use]
pub fn halt() -> Vec<u8> {
    vec![0xfa, 0xf4, 0xeb, 0xfd] // cli; hlt; jmp to the hlt
}

/// An ELF file of `code`, with the PVH note that names its entry.
#[must_use]
pub fn kernel(code: &[u8]) -> Vec<u8> {
    let mut file = Vec::with_capacity(CODE_OFFSET + code.len());
    // The ELF header: 64-bit, little-endian, an executable for x86-64, two program headers behind it.
    file.extend([0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    file.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    file.extend(u64::from(BASE).to_le_bytes()); // e_entry
    file.extend(64u64.to_le_bytes()); // e_phoff
    file.extend([0; 12]); // e_shoff, e_flags
    file.extend([64, 0, 56, 0, 2, 0, 64, 0, 0, 0, 0, 0]);
    // PT_LOAD, readable, writable and executable.
    program_header(&mut file, 1, CODE_OFFSET, BASE.into(), code.len());
    // PT_NOTE.
    program_header(&mut file, 4, NOTE_OFFSET, 0, 20);
    file.resize(NOTE_OFFSET, 0);
    // XEN_ELFNOTE_PHYS32_ENTRY.
    file.extend([4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0, b'X', b'e', b'n', 0]);
    file.extend(BASE.to_le_bytes());
    file.resize(CODE_OFFSET, 0);
    file.extend(code);
    file
}

fn program_header(file: &mut Vec<u8>, kind: u32, offset: usize, address: u64, len: usize) {
    file.extend(kind.to_le_bytes());
    file.extend(7u32.to_le_bytes());
    for word in [offset as u64, address, address, len as u64, len as u64, 4] {
        file.extend(word.to_le_bytes());
    }
}
