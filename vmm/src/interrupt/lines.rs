//! Lines and message-signalled interrupts, as devices see them.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use devices::interrupt::Message;
use devices::interrupt::io_apic::PINS;
use devices::irq::{InterruptController, InterruptLine, MsiMessage, MsiRoute};
use devices::platform::ports;
use vmm_sys_util::eventfd::EventFd;

use super::Board;
use super::board::Shared;
use crate::cpu::Switch;

impl InterruptController for Board {
    fn line(&self, gsi: u32) -> io::Result<Arc<dyn InterruptLine>> {
        let known = u8::try_from(gsi).ok().filter(|gsi| usize::from(*gsi) < PINS);
        let none = || io::Error::new(io::ErrorKind::InvalidInput, "There is no such interrupt line");
        let shared = Arc::clone(&self.shared);
        Ok(Arc::new(Line { shared, gsi: known.ok_or_else(none)?, level: gsi == ports::SCI_IRQ || gsi >= 16 }))
    }

    fn msi(&self) -> io::Result<Arc<dyn MsiRoute>> {
        Ok(Arc::new(Msi { switch: Arc::clone(&self.shared.switch), route: Mutex::default() }))
    }
}

struct Line {
    shared: Arc<Shared>,
    gsi: u8,
    level: bool,
}

impl InterruptLine for Line {
    fn set(&self, high: bool) -> io::Result<()> {
        if self.level {
            self.shared.with(|chipset, _| ((), chipset.set_line(self.gsi, high)));
        } else if high {
            self.shared.with(|chipset, _| {
                let mut messages = chipset.set_line(self.gsi, true);
                messages.extend(chipset.set_line(self.gsi, false));
                ((), messages)
            });
        }
        Ok(())
    }
}

/// One vector. An MSI is a message at once: it needs nothing of the chipset.
struct Msi {
    switch: Arc<Switch>,
    route: Mutex<Route>,
}

#[derive(Default)]
struct Route {
    message: Option<Message>,
    masked: bool,
    /// Triggered while it was masked or not set.
    pending: bool,
}

impl Msi {
    fn lock(&self) -> MutexGuard<'_, Route> {
        self.route.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn deliver(&self, route: &mut Route) {
        if let (Some(message), false, true) = (&route.message, route.masked, route.pending) {
            route.pending = false;
            self.switch.post(message);
        }
    }
}

impl MsiRoute for Msi {
    fn set(&self, message: MsiMessage) -> io::Result<()> {
        let mut route = self.lock();
        // What is no message of an interrupt is written nowhere.
        route.message = Message::from_msi(message);
        self.deliver(&mut route);
        Ok(())
    }

    fn mask(&self, masked: bool) -> io::Result<()> {
        let mut route = self.lock();
        route.masked = masked;
        self.deliver(&mut route);
        Ok(())
    }

    fn trigger(&self) -> io::Result<()> {
        let mut route = self.lock();
        route.pending = true;
        self.deliver(&mut route);
        Ok(())
    }

    fn event(&self) -> Option<&EventFd> {
        None
    }
}
