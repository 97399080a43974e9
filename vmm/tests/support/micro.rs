//! Kernels of a few instructions, as ELF files with a PVH entry: what a KVM that cannot run stock kernels
//! can run too.

/// 32-bit code, entered in protected mode without paging and without interrupts.
#[derive(Default)]
pub struct Code(Vec<u8>);

const SERIAL: u16 = 0x3f8;
const PM_STATUS: u16 = 0x600;
const PM_ENABLE: u16 = 0x602;
const PM_CONTROL: u16 = 0x604;
const PVPANIC: u16 = 0x505;
const I8042: u16 = 0x64;
/// `SLP_EN` and `SLP_TYP` 5.
const SLEEP_S5: u16 = 0x2000 | 5 << 10;
const LOAD: u32 = 0x10_0000;

impl Code {
    pub fn new() -> Self {
        Self::default()
    }

    fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    /// `mov dx, port`.
    fn port(self, port: u16) -> Self {
        let [low, high] = port.to_le_bytes();
        self.bytes(&[0x66, 0xba, low, high])
    }

    fn out8(self, port: u16, value: u8) -> Self {
        self.port(port).bytes(&[0xb0, value, 0xee])
    }

    fn out16(self, port: u16, value: u16) -> Self {
        let [low, high] = value.to_le_bytes();
        self.port(port).bytes(&[0x66, 0xb8, low, high, 0x66, 0xef])
    }

    /// Writes `text` to the serial port.
    pub fn say(self, text: &str) -> Self {
        text.bytes().fold(self, |code, byte| code.out8(SERIAL, byte))
    }

    /// Echoes the serial port until `end` was typed.
    pub fn echo_until(self, end: u8) -> Self {
        let start = self.0.len();
        let code = self
            .port(SERIAL + 5)
            .bytes(&[0xec, 0xa8, 0x01, 0x74, 0xf7]) // in al, dx; test al, 1; jz to the in
            .port(SERIAL)
            .bytes(&[0xec, 0xee, 0x3c, end, 0x75, 0x00]); // in al, dx; out dx, al; cmp al, end; jne
        code.jump_back(start)
    }

    /// Waits for the power button.
    pub fn await_button(self) -> Self {
        let code = self.out16(PM_ENABLE, 1 << 8).say("listening\n");
        let start = code.0.len();
        let code = code.port(PM_STATUS).bytes(&[0x66, 0xed, 0xf6, 0xc4, 0x01, 0x74, 0x00]);
        code.jump_back(start)
    }

    /// Sets the last byte, a short jump's distance, so that it leads to `start`.
    fn jump_back(mut self, start: usize) -> Self {
        let distance = i8::try_from(start as i64 - self.0.len() as i64).expect("the loop is short");
        *self.0.last_mut().expect("there is a jump") = distance as u8;
        self
    }

    pub fn power_off(self) -> Self {
        self.out16(PM_CONTROL, SLEEP_S5).hang()
    }

    pub fn reboot(self) -> Self {
        self.out8(I8042, 0xfe).hang()
    }

    pub fn panic(self) -> Self {
        self.out8(PVPANIC, 1).hang()
    }

    /// A fault without a table to look its handler up in.
    pub fn triple_fault(self) -> Self {
        // mov esp, 0x200000; lidt [esp], which is fresh memory; mov eax, 0xffff; mov ds, eax
        let load = [0xbc, 0x00, 0x00, 0x20, 0x00, 0x0f, 0x01, 0x1c, 0x24];
        self.bytes(&load).bytes(&[0xb8, 0xff, 0xff, 0x00, 0x00, 0x8e, 0xd8]).hang()
    }

    pub fn hang(self) -> Self {
        self.bytes(&[0xf4, 0xeb, 0xfd]) // hlt; jmp to it
    }

    /// The ELF file: one segment of code, and the note that names its PVH entry.
    pub fn elf(&self) -> Vec<u8> {
        const HEADER: u64 = 64;
        const PROGRAM: u64 = 56;
        const TEXT: u64 = 0x1000;
        let note = note();
        let note_at = HEADER + 2 * PROGRAM;
        let mut elf = Vec::new();
        elf.extend_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
        for half in [2u16, 62] {
            elf.extend(half.to_le_bytes()); // an executable for x86-64
        }
        elf.extend(1u32.to_le_bytes());
        for word in [u64::from(LOAD), HEADER, 0] {
            elf.extend(word.to_le_bytes()); // entry, program headers, no sections
        }
        elf.extend(0u32.to_le_bytes());
        for half in [HEADER, PROGRAM, 2, 0, 0, 0] {
            elf.extend((half as u16).to_le_bytes());
        }
        let length = self.0.len() as u64;
        for (kind, at, address, length) in
            [(1u32, TEXT, u64::from(LOAD), length), (4, note_at, 0, note.len() as u64)]
        {
            elf.extend(kind.to_le_bytes());
            elf.extend(7u32.to_le_bytes());
            let align = if kind == 1 { TEXT } else { 4 };
            for word in [at, address, address, length, length, align] {
                elf.extend(word.to_le_bytes());
            }
        }
        elf.extend(note);
        elf.resize(TEXT as usize, 0);
        elf.extend(&self.0);
        elf
    }
}

/// `XEN_ELFNOTE_PHYS32_ENTRY`.
fn note() -> Vec<u8> {
    let mut note = Vec::new();
    for word in [4u32, 8, 18] {
        note.extend(word.to_le_bytes());
    }
    note.extend_from_slice(b"Xen\0");
    note.extend(u64::from(LOAD).to_le_bytes());
    note
}
