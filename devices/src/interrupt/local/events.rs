//! What goes into a local APIC and what comes out.

use crate::interrupt::message::Message;

/// What an access asks of the guest's interrupt system.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Effects {
    /// To be routed and accepted, perhaps by this APIC itself.
    pub message: Option<Message>,
    /// A level-triggered interrupt of this vector was finished: every I/O APIC is to hear of it.
    pub eoi: Option<u8>,
}

/// What the vCPU lets in at this moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Window {
    /// RFLAGS.IF is set and no instruction shields from interrupts.
    pub interrupts: bool,
    /// No NMI is being handled.
    pub nmi: bool,
}

/// What waits for the vCPU, whatever it lets in: why to wake it, or to ask for a window.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pending {
    /// An INIT, or a SIPI for a vCPU that waits for it.
    pub reset: bool,
    /// An NMI.
    pub nmi: bool,
    /// A vector above the processor's priority, or an external interrupt.
    pub interrupt: bool,
}

/// What the vCPU is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// Take the state that the processor has after INIT. Then the bootstrap processor runs from the reset
    /// vector, and any other waits for a start-up.
    Init,
    /// Run in real mode from the page `vector`: `CS:IP = vector * 0x100 : 0`.
    StartUp {
        /// The page.
        vector: u8,
    },
    /// Take an NMI.
    Nmi,
    /// Take this interrupt. It is in service until its EOI.
    Interrupt {
        /// Which.
        vector: u8,
    },
    /// Acknowledge the PIC and take the vector that it gives.
    External,
}

/// Which of the pins LINT0 and LINT1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lint {
    /// On a PC, the PIC's output, of the bootstrap processor.
    Lint0,
    /// On a PC, NMI.
    Lint1,
}
