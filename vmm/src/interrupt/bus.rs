//! The chipset on the buses.

use std::sync::Arc;

use devices::bus::{BusDevice, Outcome, Overlap, Range};
use devices::interrupt::io_apic::Messages;
use devices::platform::{I8042, ports};

use super::Board;
use super::board::Shared;
use crate::cpu::Buses;
use crate::memory::IO_APIC;

/// The I/O APIC's page.
const PAGE: Range = Range { base: IO_APIC as u64, len: 0x1000 };
/// Both PICs, the PIT, and the edge/level registers of the PICs. Port 0x61 is among the keyboard controller's.
const PORTS: [Range; 4] = [
    Range { base: 0x20, len: 2 },
    Range { base: 0x40, len: 4 },
    Range { base: 0xa0, len: 2 },
    Range { base: 0x4d0, len: 2 },
];
/// Port 0x61, as an offset among those of the keyboard controller.
const SPEAKER: u64 = 0x61 - ports::I8042.base;

impl Board {
    /// Puts the chipset on the buses, all but port 0x61, which is [`KeyboardAndSpeaker`]'s.
    ///
    /// # Errors
    /// Something else is there.
    pub fn insert(&self, buses: &mut Buses) -> Result<(), Overlap> {
        buses.mmio.insert(PAGE, Arc::new(Page(Arc::clone(&self.shared))))?;
        for range in PORTS {
            buses
                .port
                .insert(range, Arc::new(Ports { shared: Arc::clone(&self.shared), base: range.base }))?;
        }
        Ok(())
    }

    /// The keyboard controller's ports and the PIT's between them.
    #[must_use]
    pub fn beside(&self, keyboard: Arc<I8042>) -> KeyboardAndSpeaker {
        let speaker = Ports { shared: Arc::clone(&self.shared), base: ports::I8042.base };
        KeyboardAndSpeaker { keyboard, speaker }
    }
}

struct Page(Arc<Shared>);

impl BusDevice for Page {
    fn read(&self, offset: u64, data: &mut [u8]) -> Outcome {
        self.0.with(|chipset, _| {
            chipset.io_apic().read(offset, data);
            ((), Messages::new())
        });
        Outcome::Done
    }

    fn write(&self, offset: u64, data: &[u8]) -> Outcome {
        self.0.with(|chipset, _| ((), chipset.io_apic().write(offset, data)));
        Outcome::Done
    }
}

/// Ports from `base` on. All registers are bytes; a wider access is one of each.
struct Ports {
    shared: Arc<Shared>,
    base: u64,
}

impl BusDevice for Ports {
    fn read(&self, offset: u64, data: &mut [u8]) -> Outcome {
        self.shared.with(|chipset, now| {
            for (port, byte) in (self.base + offset..).zip(data) {
                *byte = chipset.read_port(port, now).unwrap_or(0xff);
            }
            ((), Messages::new())
        });
        Outcome::Done
    }

    fn write(&self, offset: u64, data: &[u8]) -> Outcome {
        self.shared.with(|chipset, now| {
            for (port, byte) in (self.base + offset..).zip(data) {
                chipset.write_port(port, *byte, now);
            }
            ((), Messages::new())
        });
        Outcome::Done
    }
}

/// The keyboard controller's ports with the PIT's port 0x61 between them.
pub struct KeyboardAndSpeaker {
    keyboard: Arc<I8042>,
    speaker: Ports,
}

impl BusDevice for KeyboardAndSpeaker {
    fn read(&self, offset: u64, data: &mut [u8]) -> Outcome {
        if offset == SPEAKER { self.speaker.read(offset, data) } else { self.keyboard.read(offset, data) }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Outcome {
        if offset == SPEAKER { self.speaker.write(offset, data) } else { self.keyboard.write(offset, data) }
    }
}
