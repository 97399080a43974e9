//! An interrupt controller and a doorbell registry that a test can look into.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::bus::DoorbellRegistry;
use crate::irq::{InterruptController, InterruptLine, MsiMessage, MsiRoute};

/// One vector: counts its interrupts.
pub struct Route {
    event: EventFd,
    epoll: Epoll,
    count: AtomicUsize,
    masked: AtomicBool,
    message: Mutex<MsiMessage>,
}

impl Route {
    /// How many interrupts were delivered.
    pub fn count(&self) -> usize {
        self.count.load(Ordering::SeqCst)
    }

    /// What it was last set to.
    pub fn message(&self) -> MsiMessage {
        *self.message.lock().expect("no test panicked")
    }

    /// Whether it is masked.
    pub fn masked(&self) -> bool {
        self.masked.load(Ordering::SeqCst)
    }

    /// Waits for interrupts that nobody waited for yet; `false` if none came in time.
    pub fn wait(&self, timeout: Duration) -> bool {
        let millis = timeout.as_millis().clamp(1, i32::MAX as u128) as i32;
        let ready = self.epoll.wait(millis, &mut [EpollEvent::default()]);
        ready.is_ok_and(|ready| ready > 0) && self.event.read().is_ok()
    }
}

impl MsiRoute for Route {
    fn set(&self, message: MsiMessage) -> io::Result<()> {
        *self.message.lock().expect("no test panicked") = message;
        Ok(())
    }

    fn mask(&self, masked: bool) -> io::Result<()> {
        self.masked.store(masked, Ordering::SeqCst);
        Ok(())
    }

    fn trigger(&self) -> io::Result<()> {
        self.count.fetch_add(1, Ordering::SeqCst);
        self.event.write(1)
    }

    fn event(&self) -> Option<&EventFd> {
        Some(&self.event)
    }
}

/// The vectors that a device asked for, in order.
#[derive(Default)]
pub struct Routes(Mutex<Vec<Arc<Route>>>);

impl Routes {
    /// Vector `index`.
    ///
    /// # Panics
    /// The device has no such vector.
    pub fn get(&self, index: usize) -> Arc<Route> {
        self.0.lock().expect("no test panicked")[index].clone()
    }

    /// How many vectors the device asked for.
    pub fn count(&self) -> usize {
        self.0.lock().expect("no test panicked").len()
    }
}

impl InterruptController for Routes {
    fn line(&self, _gsi: u32) -> io::Result<Arc<dyn InterruptLine>> {
        Err(io::Error::from(io::ErrorKind::Unsupported))
    }

    fn msi(&self) -> io::Result<Arc<dyn MsiRoute>> {
        let (event, epoll) = (EventFd::new(EFD_NONBLOCK)?, Epoll::new()?);
        epoll.ctl(ControlOperation::Add, event.as_raw_fd(), EpollEvent::new(EventSet::IN, 0))?;
        let route = Arc::new(Route {
            event,
            epoll,
            count: AtomicUsize::new(0),
            masked: AtomicBool::new(false),
            message: Mutex::default(),
        });
        self.0.lock().expect("no test panicked").push(route.clone());
        Ok(route)
    }
}

/// The doorbells that are registered now, by address.
#[derive(Default)]
pub struct Doorbells(Mutex<BTreeMap<u64, Arc<EventFd>>>);

impl Doorbells {
    /// The doorbell at `address`.
    pub fn at(&self, address: u64) -> Option<Arc<EventFd>> {
        self.0.lock().expect("no test panicked").get(&address).cloned()
    }

    /// All addresses with a doorbell.
    pub fn addresses(&self) -> Vec<u64> {
        self.0.lock().expect("no test panicked").keys().copied().collect()
    }
}

impl DoorbellRegistry for Doorbells {
    fn register(&self, address: u64, _len: u32, _value: Option<u64>, event: &EventFd) -> io::Result<()> {
        let event = Arc::new(event.try_clone()?);
        let taken = self.0.lock().expect("no test panicked").insert(address, event);
        taken.map_or(Ok(()), |_| Err(io::Error::from(io::ErrorKind::AlreadyExists)))
    }

    fn unregister(&self, address: u64, _len: u32, _value: Option<u64>, _event: &EventFd) -> io::Result<()> {
        let there = self.0.lock().expect("no test panicked").remove(&address);
        there.map(|_| ()).ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))
    }
}
