//! A vCPU with a local APIC of Omega's own.

use std::sync::Arc;

use devices::interrupt::local::{Effects, Event, Lint, Window};
use devices::interrupt::{ApicId, Deadline, LocalApic, Nanos, Now, Tsc, View};
use serde::{Deserialize, Serialize};

use super::bare::{Core, until};
use super::rest::Rest;
use super::{Clock, Data, Fabric, Inbox, Processor, VmEntry, VmExit};

/// IA32_APIC_BASE: the APIC is on.
const BASE_ENABLED: u64 = 1 << 11;
const PAGE: u64 = 0x1000;
/// How often others hear of nothing but another task priority: it decides among equals only.
const PRIORITY_EVERY: u64 = 10_000_000;

/// What an APIC and its vCPU are beside the processor's state, as a value.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ApicState {
    /// The APIC.
    pub apic: LocalApic,
    /// Whether the processor is halted until an interrupt.
    pub halted: bool,
}

/// A processor and its local APIC: what happens between the two stays in [`enter`](Processor::enter), from which only
/// exits come that others have to answer.
pub struct ApicCpu<P> {
    core: P,
    apic: LocalApic,
    inbox: Arc<Inbox>,
    fabric: Arc<dyn Fabric>,
    clock: Arc<Clock>,
    halted: bool,
    /// The last exit was an access, which only the next entry finishes.
    unfinished: bool,
    /// To be left as soon as no access is unfinished.
    stop: bool,
    /// When the core's alarm goes off.
    alarm: Option<Nanos>,
    rest: Rest,
    /// What others know of this APIC, and since when.
    published: (View, Nanos),
}

impl<P: Core> ApicCpu<P> {
    /// The vCPU `id`, in the state of power-on: all but the bootstrap processor wait for a SIPI. Others reach it by
    /// `inbox`, and it reaches them by `fabric`; its timer counts `clock`.
    pub fn new(
        core: P,
        id: ApicId,
        bootstrap: bool,
        inbox: Arc<Inbox>,
        fabric: Arc<dyn Fabric>,
        clock: Arc<Clock>,
    ) -> Self {
        let apic = LocalApic::new(id, bootstrap);
        let published = (apic.view(), clock.now());
        let (unfinished, stop, halted, alarm) = (false, false, false, None);
        let rest = Rest::default();
        Self { core, apic, inbox, fabric, clock, halted, unfinished, stop, alarm, rest, published }
    }

    /// The processor.
    pub fn core(&self) -> &P {
        &self.core
    }

    /// The processor, for changes of its state while it does not run.
    pub fn core_mut(&mut self) -> &mut P {
        &mut self.core
    }

    /// What kicks it and leaves interrupts for it.
    #[must_use]
    pub fn inbox(&self) -> &Arc<Inbox> {
        &self.inbox
    }

    /// Makes the calling thread the one that runs this vCPU, while the result lives.
    pub fn attach(&mut self) -> P::Attached {
        self.alarm = None;
        self.inbox.attach(self.core.kick());
        self.core.attach()
    }

    /// What firmware leaves in the APIC: the bootstrap processor takes the PIC's interrupts.
    pub fn set_virtual_wire(&mut self) {
        self.apic.set_virtual_wire();
        self.publish(self.clock.now(), true);
    }

    /// The APIC's state, with all that has arrived for it. Only while the vCPU does not run.
    pub fn state(&mut self) -> ApicState {
        self.look(self.clock.now());
        ApicState { apic: self.apic.clone(), halted: self.halted }
    }

    /// Takes over a state; what has arrived in the meantime is forgotten. Only while the vCPU does not run.
    pub fn restore(&mut self, state: &ApicState) {
        self.apic.clone_from(&state.apic);
        self.halted = state.halted;
        (self.unfinished, self.stop) = (false, false);
        self.inbox.clear();
        self.apic.set_lint(Lint::Lint0, self.inbox.lint0());
        self.publish(self.clock.now(), true);
    }

    /// Lets the APIC see the time and what has arrived.
    fn look(&mut self, now: Nanos) {
        self.apic.advance(at(now));
        let fabric = &self.fabric;
        self.inbox.empty_into(&mut self.apic, |vector| fabric.refused(vector));
    }

    /// Tells others what they have to know of this APIC.
    fn publish(&mut self, now: Nanos, all: bool) {
        let view = self.apic.view();
        let (known, since) = self.published;
        let matters = view != View { tpr: view.tpr, ..known };
        if all || matters || (view != known && now.since(since) >= PRIORITY_EVERY) {
            self.published = (view, now);
            self.fabric.view(view);
        }
    }

    fn carry_out(&mut self, effects: Effects, now: Nanos) {
        // The view goes first: a message or an EOI may make others send something by it.
        self.publish(now, false);
        if let Some(vector) = effects.eoi {
            self.fabric.end_of_interrupt(vector);
        }
        if let Some(message) = effects.message {
            self.fabric.send(message);
        }
    }

    /// Makes the processor take what it can of what waits for it. Only while no access is unfinished.
    fn deliver(&mut self, now: Nanos) -> Result<(), String> {
        while let Some(event) = self.apic.take(Window { interrupts: self.core.ready(), nmi: true }) {
            match event {
                Event::Init => {
                    self.core.init()?;
                    self.publish(now, false);
                }
                Event::StartUp { vector } => self.core.start_up(vector)?,
                Event::Nmi => self.core.inject_nmi()?,
                Event::Interrupt { vector } => self.core.inject(vector)?,
                Event::External => match self.fabric.acknowledge() {
                    Some(vector) => self.core.inject(vector)?,
                    None => {
                        self.apic.set_lint(Lint::Lint0, false);
                        continue;
                    }
                },
            }
            self.halted = false;
        }
        Ok(())
    }

    /// Whether something waits that the processor could take now, if it finished its access.
    fn could_deliver(&self) -> bool {
        let pending = self.apic.pending();
        pending.reset || pending.nmi || (pending.interrupt && self.core.ready())
    }

    fn deadline(&self) -> Option<Nanos> {
        match self.apic.deadline() {
            Some(Deadline::Nanos(deadline)) => Some(deadline),
            // Hidden from guests: see the features in CPUID.
            Some(Deadline::Tsc(_)) | None => None,
        }
    }

    /// Runs guest code, if nothing new has to be looked at before. The exit.
    fn run(&mut self, entry: VmEntry, now: Nanos) -> Option<VmExit> {
        self.core.set_cr8(self.apic.cr8());
        if self.stop || (self.unfinished && self.could_deliver()) {
            // Finishes the access and comes back.
            self.core.interrupt();
        } else {
            self.core.request_window(self.apic.pending().interrupt);
            let deadline = self.deadline();
            if deadline != self.alarm {
                self.alarm = deadline;
                self.core.set_alarm(deadline.map(|deadline| until(deadline, now)));
            }
            if !self.inbox.enters() {
                return None;
            }
        }
        let exit = self.core.enter(entry);
        self.inbox.left();
        self.unfinished = false;
        let cr8 = self.core.cr8();
        if cr8 != self.apic.cr8() {
            self.apic.set_cr8(cr8);
            self.publish(now, false);
        }
        Some(exit)
    }

    /// The offset in the APIC's page of an access to it.
    fn offset(&self, address: u64) -> Option<u64> {
        let base = self.core.apic_base();
        let page = base & (u64::MAX >> 12) & !(PAGE - 1);
        (base & BASE_ENABLED != 0 && address & !(PAGE - 1) == page).then_some(address % PAGE)
    }

    /// Answers the access if it is to the APIC's page.
    fn answer(&mut self, exit: &VmExit) -> Option<VmEntry> {
        match exit {
            VmExit::MmioRead { address, size } => {
                let offset = self.offset(*address)?;
                let mut data = Data::zeroed(usize::from(*size));
                self.apic.read(offset, data.as_mut_slice(), at(self.clock.now()));
                Some(VmEntry::Read(data))
            }
            VmExit::MmioWrite { address, data } => {
                let offset = self.offset(*address)?;
                let now = self.clock.now();
                let effects = self.apic.write(offset, data.as_slice(), at(now));
                self.carry_out(effects, now);
                Some(VmEntry::Continue)
            }
            _ => None,
        }
    }
}

/// There is no time stamp counter in here: the APIC's TSC-deadline mode is hidden from guests.
fn at(now: Nanos) -> Now {
    Now { nanos: now, tsc: Tsc(0) }
}

impl<P: Core> Processor for ApicCpu<P> {
    fn enter(&mut self, mut entry: VmEntry) -> VmExit {
        loop {
            let now = self.clock.now();
            self.look(now);
            self.stop |= self.inbox.take_kick();
            if !self.unfinished {
                if std::mem::take(&mut self.stop) {
                    return VmExit::Interrupted;
                }
                if let Err(why) = self.deliver(now) {
                    return VmExit::Failed(why);
                }
                if self.halted || self.apic.waits_for_start_up() {
                    let timeout = self.deadline().map(|deadline| until(deadline, now));
                    let inbox = &self.inbox;
                    self.rest.wait(timeout, || inbox.wants_a_look(), |timeout| inbox.sleep(timeout));
                    continue;
                }
            }
            let Some(exit) = self.run(entry, now) else { continue };
            entry = VmEntry::Continue;
            if let Some(answer) = self.answer(&exit) {
                (entry, self.unfinished) = (answer, true);
                continue;
            }
            match exit {
                VmExit::Interrupted => {}
                VmExit::Halted => {
                    self.halted = true;
                    self.fabric.halted();
                }
                VmExit::PortRead { .. }
                | VmExit::PortWrite { .. }
                | VmExit::MmioRead { .. }
                | VmExit::MmioWrite { .. } => {
                    self.unfinished = true;
                    return exit;
                }
                VmExit::TripleFault | VmExit::Failed(_) => return exit,
            }
        }
    }

    fn interrupt(&mut self) {
        self.stop = true;
    }
}

#[cfg(test)]
#[path = "apic_test.rs"]
mod tests;
