//! The local APIC of one vCPU, as a value (xAPIC; Intel SDM vol. 3A, chapter "Advanced Programmable Interrupt
//! Controller").
//!
//! What happens to it: the vCPU reads and writes registers ([`LocalApic::read`], [`LocalApic::write`]), messages
//! come in ([`LocalApic::accept`]), pins change ([`LocalApic::set_lint`]), time passes ([`LocalApic::advance`]), and
//! the vCPU takes what it can ([`LocalApic::take`]). What it does: [`Effects`] to be carried out,
//! [`LocalApic::deadline`] and [`LocalApic::pending`], which follow from the state and are asked after each event.

mod events;
mod icr;
mod lvt;
mod registers;
mod timer;

use serde::{Deserialize, Serialize};

use super::message::{ApicId, Delivery, Message, Trigger};
use super::route::View;
use super::time::{Deadline, Now, Tsc};
use super::vectors::{LOWEST_VECTOR, Vectors, class};
use lvt::{Lvt, Source};
use timer::{Mode, Timer};

pub use events::{Effects, Event, Lint, Pending, Window};
pub use timer::SHORTEST_PERIOD;

/// SVR: software has enabled the APIC.
const ENABLED: u32 = 1 << 8;

/// A local APIC. Its ID cannot be changed by the guest, as the manual permits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LocalApic {
    id: ApicId,
    bootstrap: bool,
    tpr: u8,
    /// Bits 31:24 of the register.
    ldr: u8,
    /// Bits 31:28 of the register.
    dfr: u8,
    svr: u32,
    isr: Vectors,
    tmr: Vectors,
    irr: Vectors,
    /// What a read of ESR gives, and what was detected since it was last written.
    esr: u8,
    detected: u8,
    icr: u64,
    lvt: Lvt,
    timer: Timer,
    /// The pins' electrical levels.
    lint: [bool; 2],
    /// An INIT that the vCPU has not taken, and a SIPI that came after it.
    init: bool,
    start_up: Option<u8>,
    /// The processor waits for a SIPI.
    waiting: bool,
    nmi: bool,
    /// An external interrupt that came as a message.
    external: bool,
}

impl LocalApic {
    /// The state of power-up (SDM, "Local APIC State After Power-Up or Reset"). All but the bootstrap processor
    /// wait for a SIPI.
    #[must_use]
    pub fn new(id: ApicId, bootstrap: bool) -> Self {
        Self {
            id,
            bootstrap,
            tpr: 0,
            ldr: 0,
            dfr: 0xf,
            svr: 0xff,
            isr: Vectors::default(),
            tmr: Vectors::default(),
            irr: Vectors::default(),
            esr: 0,
            detected: 0,
            icr: 0,
            lvt: Lvt::default(),
            timer: Timer::default(),
            lint: [false; 2],
            init: false,
            start_up: None,
            waiting: !bootstrap,
            nmi: false,
            external: false,
        }
    }

    /// Its ID.
    #[must_use]
    pub fn id(&self) -> ApicId {
        self.id
    }

    /// Whether its processor waits for a SIPI.
    #[must_use]
    pub fn waits_for_start_up(&self) -> bool {
        self.waiting
    }

    /// What routing has to know.
    #[must_use]
    pub fn view(&self) -> View {
        View { id: self.id, ldr: self.ldr, dfr: self.dfr, tpr: self.tpr, enabled: self.enabled() }
    }

    fn enabled(&self) -> bool {
        self.svr & ENABLED != 0
    }

    /// The state of power-up, as at a machine reset. The pins keep their levels.
    pub fn reset(&mut self) {
        *self = Self { lint: self.lint, ..Self::new(self.id, self.bootstrap) };
    }

    /// The state that a PC's firmware leaves: "virtual wire mode", in which the bootstrap processor's LINT0 takes
    /// external interrupts and every LINT1 takes NMIs (Intel MultiProcessor Specification 1.4, section 3.6.2.2).
    pub fn set_virtual_wire(&mut self) {
        if self.bootstrap {
            self.svr |= ENABLED;
            self.lvt.write(Source::Lint0, 0x700, true);
            self.lvt.write(Source::Lint1, 0x400, true);
        }
    }

    /// CR8, which is TPR's class (SDM, "Interaction of Task Priorities between CR8 and APIC").
    #[must_use]
    pub fn cr8(&self) -> u8 {
        class(self.tpr)
    }

    /// A write of CR8.
    pub fn set_cr8(&mut self, value: u8) {
        self.tpr = value << 4;
    }

    /// IA32_TSC_DEADLINE.
    #[must_use]
    pub fn tsc_deadline(&self) -> Tsc {
        self.timer.tsc_deadline()
    }

    /// A write of IA32_TSC_DEADLINE: ignored unless the timer is in that mode.
    pub fn set_tsc_deadline(&mut self, deadline: Tsc, now: Now) {
        self.timer.set_tsc_deadline(deadline, self.timer_mode());
        self.advance(now);
    }

    fn timer_mode(&self) -> Mode {
        Mode::of(self.lvt.read(Source::Timer))
    }

    /// When [`Self::advance`] has something to do.
    #[must_use]
    pub fn deadline(&self) -> Option<Deadline> {
        self.timer.deadline(self.timer_mode())
    }

    /// Lets the timer fire if it is due.
    pub fn advance(&mut self, now: Now) {
        if self.timer.expire(self.timer_mode(), now) {
            self.raise(Source::Timer);
        }
    }

    /// A message that was routed to this APIC. `false`: it was refused, as vectors are while software has
    /// disabled the APIC, and vectors below 16 always.
    pub fn accept(&mut self, message: &Message) -> bool {
        if !message.acts() {
            return false;
        }
        match message.delivery {
            Delivery::Fixed | Delivery::LowestPriority => {
                return self.enabled() && self.request(message.vector, message.trigger);
            }
            Delivery::Smi => {}
            Delivery::Nmi => self.nmi = true,
            Delivery::Init => (self.init, self.start_up) = (true, None),
            // The vCPU may be late to take the INIT, so the SIPI that follows it must not be lost.
            Delivery::StartUp if self.init || self.waiting => {
                self.start_up.get_or_insert(message.vector);
            }
            Delivery::StartUp => {}
            Delivery::External => self.external = true,
        }
        true
    }

    /// Puts `vector` into IRR, and TMR by its trigger (SDM, "Interrupt Acceptance for Fixed Interrupts").
    fn request(&mut self, vector: u8, trigger: Trigger) -> bool {
        if vector < LOWEST_VECTOR {
            self.detect(registers::RECEIVED_ILLEGAL_VECTOR);
            return false;
        }
        self.irr.set(vector, true);
        self.tmr.set(vector, trigger == Trigger::Level);
        true
    }

    /// Notes an error; the first since ESR was written raises the error interrupt (SDM, "Error Handling").
    fn detect(&mut self, error: u8) {
        let first = self.detected == 0;
        self.detected |= error;
        if first {
            self.raise(Source::Error);
        }
    }

    /// A local source has something to report.
    fn raise(&mut self, source: Source) {
        let entry = self.lvt.entry(source);
        if entry.masked {
            return;
        }
        match entry.delivery {
            Some(Delivery::Fixed) => {
                let accepted = self.request(entry.vector, entry.trigger);
                self.lvt.set_remote_irr(source, accepted && entry.trigger == Trigger::Level);
            }
            Some(Delivery::Nmi) => self.nmi = true,
            Some(Delivery::Init) => (self.init, self.start_up) = (true, None),
            // External interrupts follow the pin's level; there is no system management mode.
            _ => {}
        }
    }

    /// The performance counters overflowed. The row is masked by it, as the manual has it.
    pub fn performance_counters_overflowed(&mut self) {
        self.raise(Source::Performance);
        self.lvt.mask(Source::Performance);
    }

    /// The thermal monitor tripped.
    pub fn thermal_monitor_tripped(&mut self) {
        self.raise(Source::Thermal);
    }

    /// A pin's electrical level.
    pub fn set_lint(&mut self, pin: Lint, high: bool) {
        let source = [Source::Lint0, Source::Lint1][pin as usize];
        let was = self.pin_asserted(source);
        self.lint[pin as usize] = high;
        if self.pin_asserted(source) && !was {
            self.pin_rose(source);
        }
    }

    fn pin_asserted(&self, source: Source) -> bool {
        self.lint[usize::from(source == Source::Lint1)] != self.lvt.entry(source).active_low
    }

    fn pin_rose(&mut self, source: Source) {
        if !self.lvt.entry(source).remote_irr {
            self.raise(source);
        }
    }

    /// A level-triggered pin that is still asserted asks again.
    fn renew_level(&mut self) {
        let entry = self.lvt.entry(Source::Lint0);
        if entry.trigger == Trigger::Level && self.pin_asserted(Source::Lint0) {
            self.pin_rose(Source::Lint0);
        }
    }

    fn external_asserted(&self) -> bool {
        let by_pin = [Source::Lint0, Source::Lint1].into_iter().any(|source| {
            let entry = self.lvt.entry(source);
            !entry.masked && entry.delivery == Some(Delivery::External) && self.pin_asserted(source)
        });
        by_pin || self.external
    }

    /// The processor priority (SDM, "Task and Processor Priorities").
    fn ppr(&self) -> u8 {
        let in_service = self.isr.highest().unwrap_or(0);
        if class(self.tpr) >= class(in_service) { self.tpr } else { in_service & 0xf0 }
    }

    /// The vector that the processor would be interrupted by.
    fn next_vector(&self) -> Option<u8> {
        self.irr.highest().filter(|vector| class(*vector) > class(self.ppr()))
    }

    /// What waits for the vCPU.
    #[must_use]
    pub fn pending(&self) -> Pending {
        let stopped = self.waiting || self.init;
        Pending {
            reset: self.init || (self.waiting && self.start_up.is_some()),
            nmi: self.nmi && !stopped,
            interrupt: !stopped && (self.external_asserted() || self.next_vector().is_some()),
        }
    }

    /// The next thing for the vCPU to do, which is then done as far as the APIC is concerned: INIT and SIPI first,
    /// then NMI, external interrupts, and the highest vector.
    pub fn take(&mut self, window: Window) -> Option<Event> {
        if self.init {
            self.take_init();
            return Some(Event::Init);
        }
        if self.waiting {
            let vector = self.start_up.take()?;
            self.waiting = false;
            return Some(Event::StartUp { vector });
        }
        if window.nmi && std::mem::take(&mut self.nmi) {
            return Some(Event::Nmi);
        }
        if !window.interrupts {
            return None;
        }
        if self.external_asserted() {
            self.external = false;
            return Some(Event::External);
        }
        let vector = self.next_vector()?;
        self.irr.set(vector, false);
        self.isr.set(vector, true);
        Some(Event::Interrupt { vector })
    }

    /// SDM, "Local APIC State After It Receives an INIT Reset": as after power-up, but the ID stays.
    fn take_init(&mut self) {
        let start_up = self.start_up.take();
        self.reset();
        // The bootstrap processor starts by itself, and a SIPI means nothing to it.
        self.start_up = start_up.filter(|_| self.waiting);
    }

    /// The end of the highest interrupt in service (SDM, "Signaling Interrupt Servicing Completion").
    fn end_of_interrupt(&mut self) -> Effects {
        let Some(vector) = self.isr.highest() else { return Effects::default() };
        self.isr.set(vector, false);
        if !self.tmr.contains(vector) {
            return Effects::default();
        }
        if self.lvt.entry(Source::Lint0).vector == vector {
            self.lvt.set_remote_irr(Source::Lint0, false);
            self.renew_level();
        }
        Effects { eoi: Some(vector), ..Effects::default() }
    }
}

#[cfg(test)]
mod local_test;
#[cfg(test)]
mod properties_test;
#[cfg(test)]
mod sources_test;
#[cfg(test)]
mod timer_test;
