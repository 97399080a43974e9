//! A helper's part of a guest: its vCPUs and its memory, driven by what comes down the vCPU line.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use devices::interrupt::{ApicId, Message, Nanos, Targets, View};
use transport::buffer::Buffer;
use transport::line::{Hear, MOST_PAYLOAD, Sender};

use super::features::Features;
use super::protocol::{Create, Moment, Part, ToConsole, ToHelper};
use super::relay::{self, Up};
use super::share::gather;
use super::steering::Steering;
use crate::cpu::{
    ApicCpu, Clock, Elsewhere, Fabric, Inbox, Place, Processor, Switch, VmEntry, VmExit, monotonic,
};
use crate::kvm::tsc::{Abilities, Rate};
use crate::kvm::{self, Partition, install_kick_handler};
use crate::machine::processor::{self, Vcpu as _, VcpuState};
use crate::memory::coherence::message::{Member, Members};
use crate::memory::coherence::{self, Engine, Homes};
use crate::memory::frames::Pieces;
use crate::memory::{Backing, Layout, Ram};
use crate::units::Bytes;

/// How long vCPUs may take to leave guest code at the end.
const LEAVING: Duration = Duration::from_secs(2);

/// What a guest may have here at most.
#[derive(Clone, Debug)]
pub struct Terms {
    /// Later leases have greater ones.
    pub epoch: u64,
    /// How many vCPUs at once.
    pub cpus: u8,
    /// How much RAM in bytes.
    pub ram: u64,
}

/// A vCPU's thread has to do this.
enum Order {
    Enter(VmEntry),
    Save,
    Restore(Vec<u8>),
    End,
}

/// So many orders of a vCPU wait at most.
const MOST_ORDERS: usize = 4;

/// What the line's thread and the vCPU's thread share.
struct Seat {
    number: u8,
    /// It runs here, and not with another member.
    here: AtomicBool,
    inbox: Arc<Inbox>,
    orders: Mutex<VecDeque<Order>>,
    ordered: Condvar,
    entered: AtomicBool,
    /// The console node wants the next exit.
    kicked: AtomicBool,
    steering: Steering,
    /// The parts of a state that came.
    parts: Mutex<Vec<u8>>,
}

/// The vCPUs of one guest at this PC, until they are dropped. There is a seat for each vCPU of the guest, since each may
/// come: KVM makes a vCPU once, and keeps it as long as the partition.
struct Running {
    /// So many may be here.
    most: u8,
    seats: Vec<Arc<Seat>>,
    threads: Vec<JoinHandle<()>>,
    switch: Arc<Switch>,
    elsewhere: Arc<dyn Elsewhere>,
    clock: Arc<Clock>,
    member: Member,
    ear: coherence::Ear,
    // In this order: nobody touches RAM when its engine ends.
    partition: Option<Partition>,
    engine: Option<Engine>,
    ram: Option<Ram>,
}

enum Phase {
    /// The guest's part is not described yet.
    Waiting,
    Running(Box<Running>),
    Over,
}

/// A helper's part of a guest, which hears its vCPU line. Dropped, it ends.
pub struct Host {
    terms: Terms,
    sender: Sender,
    /// Down the memory line, whether or not it is there.
    memory: Sender,
    phase: Mutex<Phase>,
    heard: Mutex<Instant>,
    over: AtomicBool,
}

/// Hears the memory line of a [`Host`].
pub struct MemoryEar(Arc<Host>);

impl Host {
    /// A part within `terms`. What it says goes to `sender` and, about memory, to `memory`.
    #[must_use]
    pub fn new(terms: Terms, sender: Sender, memory: Sender) -> Arc<Self> {
        offer(&terms, &sender);
        Arc::new(Self {
            terms,
            sender,
            memory,
            phase: Mutex::new(Phase::Waiting),
            heard: Mutex::new(Instant::now()),
            over: AtomicBool::new(false),
        })
    }

    /// The lease's epoch.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.terms.epoch
    }

    /// Who hears the memory line.
    #[must_use]
    pub fn memory_ear(self: &Arc<Self>) -> Arc<MemoryEar> {
        Arc::new(MemoryEar(Arc::clone(self)))
    }

    /// Down the memory line.
    #[must_use]
    pub fn memory(&self) -> Sender {
        self.memory.clone()
    }

    /// Whether it has ended.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.over.load(Ordering::SeqCst)
    }

    /// For how long the console node was not heard.
    #[must_use]
    pub fn silence(&self) -> Duration {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner).elapsed()
    }

    /// Makes its vCPUs leave guest code; they go on when the console node enters them again.
    pub fn stop(&self) {
        if let Phase::Running(running) = &*self.phase() {
            running.seats.iter().for_each(|seat| seat.kick());
        }
    }

    /// Ends it, and tells the console node why. Returns before the vCPUs have ended.
    pub fn end(&self, why: &str) {
        self.over.store(true, Ordering::SeqCst);
        let phase = std::mem::replace(&mut *self.phase(), Phase::Over);
        self.sender.end(why);
        self.memory.end(why);
        if let Phase::Running(running) = phase {
            // The threads of lines have other guests to hear.
            let _ = Builder::new().name("span-end".to_owned()).spawn(move || running.end());
        }
    }

    fn phase(&self) -> MutexGuard<'_, Phase> {
        self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fail(&self, why: &str) {
        tracing::warn!(%why, "A guest's vCPUs here cannot go on");
        self.sender.send(&ToConsole::Failed(why.to_owned()).encode(), None);
        self.end(why);
    }

    /// # Errors
    /// The console node broke the protocol, or this PC cannot do what it asks.
    fn take(self: &Arc<Self>, body: &[u8], payload: Option<Buffer>) -> Result<(), String> {
        *self.heard.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
        match ToHelper::decode(body).map_err(|error| error.to_string())? {
            ToHelper::Create(create) => self.create(&create, &payload.unwrap_or_default().to_vec()),
            ToHelper::Probe(number, sent) => {
                let there = Moment::here();
                self.sender.send(&ToConsole::Answer(number, sent, there).encode(), None);
                Ok(())
            }
            ToHelper::End(why) => {
                self.end(&why);
                Ok(())
            }
            message => match &*self.phase() {
                Phase::Running(running) => running.take(&message, payload),
                Phase::Waiting => Err("vCPUs before they were described".to_owned()),
                Phase::Over => Ok(()),
            },
        }
    }

    fn create(self: &Arc<Self>, create: &Create, features: &[u8]) -> Result<(), String> {
        let features = Features::decode(features).map_err(|error| error.to_string())?;
        let mut phase = self.phase();
        match &*phase {
            Phase::Waiting => {}
            Phase::Running(_) => return Err("vCPUs that are there already".to_owned()),
            Phase::Over => return Ok(()),
        }
        if create.here().len() > self.terms.cpus.into() || create.ram > self.terms.ram {
            return Err("more than was asked for".to_owned());
        }
        let host = Arc::downgrade(self);
        let broken = Box::new(move |why: &str| {
            if let Some(host) = host.upgrade() {
                host.fail(why);
            }
        });
        let running = Running::new(create, self.terms.cpus, &features, &self.sender, &self.memory, broken)
            .map_err(|error| error.to_string())?;
        *phase = Phase::Running(Box::new(running));
        drop(phase);
        self.sender.send(&ToConsole::Created.encode(), None);
        Ok(())
    }
}

impl Hear for HostEar {
    fn hear(&self, body: &[u8], payload: Option<Buffer>) {
        if let Err(why) = self.0.take(body, payload) {
            self.0.fail(&why);
        }
    }

    fn away(&self, why: &str) {
        tracing::info!(%why, "The console node is not heard; its guest's vCPUs stop");
        self.0.stop();
    }

    fn back(&self) {}

    fn over(&self, why: &str) {
        self.0.end(why);
    }
}

/// Hears the vCPU line of a [`Host`].
pub struct HostEar(pub Arc<Host>);

impl Hear for MemoryEar {
    fn hear(&self, body: &[u8], payload: Option<Buffer>) {
        let ear = match &*self.0.phase() {
            Phase::Running(running) => running.ear.clone(),
            Phase::Waiting | Phase::Over => return,
        };
        if let Err(why) = relay::came_down(&ear, body, payload) {
            self.0.fail(why);
        }
    }

    fn away(&self, _why: &str) {}

    fn back(&self) {}

    fn over(&self, why: &str) {
        self.0.end(why);
    }
}

/// Why a guest's part cannot be made here.
#[derive(Debug, thiserror::Error)]
enum Unmade {
    #[error("{0} bytes of RAM do not fit into {1}-bit guest addresses")]
    Layout(u64, u8),
    #[error(transparent)]
    Memory(#[from] crate::memory::Error),
    #[error(transparent)]
    Coherence(#[from] coherence::Error),
    #[error(transparent)]
    Kvm(#[from] kvm::Error),
    #[error("A vCPU's thread cannot be started: {0}")]
    Thread(#[from] std::io::Error),
    #[error("{0}")]
    Vcpu(String),
    #[error("{0}")]
    Clock(String),
    #[error("The members do not fit each other")]
    Members,
}

impl Running {
    fn new(
        create: &Create,
        most: u8,
        features: &Features,
        sender: &Sender,
        memory: &Sender,
        broken: coherence::Broken,
    ) -> Result<Self, Unmade> {
        let unfit = || Unmade::Layout(create.ram, create.address_bits);
        let layout = Layout::new(Bytes(create.ram), create.address_bits).ok_or_else(unfit)?;
        let ram = Ram::new(&layout, Backing::Shared)?;
        let options = options(create).ok_or(Unmade::Members)?;
        let engine = Engine::start(&ram, &options, Arc::new(Up(memory.clone())), broken, Vec::new())?;
        let abilities = Abilities::of_this_pc()?;
        if let Some(why) = abilities.refusal("its node", create.tsc_khz) {
            return Err(Unmade::Clock(why));
        }
        let rate = Rate { host_khz: abilities.khz, guest_khz: create.tsc_khz };
        let partition = Partition::spanning(ram.memory().clone(), features, &create.counts, create.tsc_khz)?;
        install_kick_handler()?;
        let switch = Arc::new(Switch::default());
        let fabric = Outward { switch: Arc::clone(&switch), sender: sender.clone(), ear: engine.ear() };
        let fabric = Arc::new(fabric);
        let mut running = Self {
            most,
            seats: Vec::new(),
            threads: Vec::new(),
            switch,
            elsewhere: Arc::clone(&fabric) as Arc<dyn Elsewhere>,
            clock: Arc::new(Clock::saying(Nanos(0))),
            member: options.me,
            ear: engine.ear(),
            partition: Some(partition),
            engine: Some(engine),
            ram: Some(ram),
        };
        for number in 0..create.cpus() {
            running.add(number, create.here().contains(&number), &fabric, rate, sender)?;
        }
        let count = create.here().len();
        tracing::info!(member = ?running.member, vcpus = count, "A guest's vCPUs are here");
        Ok(running)
    }

    /// Makes the vCPU `number` and its thread.
    fn add(
        &mut self,
        number: u8,
        here: bool,
        fabric: &Arc<Outward>,
        rate: Rate,
        sender: &Sender,
    ) -> Result<(), Unmade> {
        let Some(partition) = &self.partition else { return Ok(()) };
        let inbox = Arc::new(Inbox::default());
        let seat = Seat::new(number, here, Arc::clone(&inbox), rate);
        let view = View { id: ApicId(number), ldr: 0, dfr: 0xf, tpr: 0, enabled: false };
        self.switch.put(view, self.place(&seat));
        let (way, clock) = (Arc::clone(fabric) as Arc<dyn Fabric>, Arc::clone(&self.clock));
        let vcpu = partition.vcpu(number)?;
        let mut cpu = ApicCpu::new(vcpu, ApicId(number), false, inbox, way, clock);
        if here {
            cpu.set_up().map_err(|error| Unmade::Vcpu(error.to_string()))?;
        }
        let (sender, ours, ear) = (sender.clone(), Arc::clone(&seat), self.ear.clone());
        let thread = Builder::new().name(format!("vcpu{number}"));
        self.threads.push(thread.spawn(move || ours.run(cpu, &sender, &ear))?);
        self.seats.push(seat);
        Ok(())
    }

    /// Where a vCPU's local APIC is.
    fn place(&self, seat: &Seat) -> Place {
        match seat.is_here() {
            true => Place::Here(Arc::clone(&seat.inbox)),
            false => Place::Elsewhere(Arc::clone(&self.elsewhere)),
        }
    }

    fn seat(&self, number: u8) -> Result<&Seat, String> {
        let seat = self.seats.get(usize::from(number)).filter(|seat| seat.is_here());
        seat.map(|seat| &**seat).ok_or_else(|| format!("vCPU {number} is not here"))
    }

    fn take(&self, message: &ToHelper, payload: Option<Buffer>) -> Result<(), String> {
        match *message {
            ToHelper::Enter(number, entry) => self.seat(number)?.order(Order::Enter(entry))?,
            ToHelper::Kick(number) => self.seat(number)?.kick(),
            ToHelper::Interrupt(targets, message) => self.switch.post_here(targets, &message),
            ToHelper::View(view) => {
                if self.seat(view.id.0).is_err() {
                    self.switch.set_view(view);
                }
            }
            ToHelper::Save(number) => self.seat(number)?.order(Order::Save)?,
            ToHelper::Restore(part) => self.restore(part, &payload.unwrap_or_default())?,
            ToHelper::Leave(number) => {
                // It may never have come.
                let Ok(seat) = self.seat(number) else { return Ok(()) };
                if seat.entered.load(Ordering::SeqCst) {
                    return Err(format!("vCPU {number} cannot leave while it runs"));
                }
                self.put(seat, false);
            }
            ToHelper::Clock { nanos, tsc } => {
                self.clock.set(Nanos(monotonic().wrapping_add(nanos)));
                self.seats.iter().for_each(|seat| seat.steer(tsc));
            }
            ToHelper::Create(_) | ToHelper::Probe(..) | ToHelper::End(_) => {}
        }
        Ok(())
    }

    /// A vCPU comes or goes.
    fn put(&self, seat: &Seat, here: bool) {
        seat.here.store(here, Ordering::SeqCst);
        self.switch.place(ApicId(seat.number), self.place(seat));
        tracing::info!(vcpu = seat.number, "A vCPU {}", if here { "has come" } else { "has gone" });
    }

    /// Takes a part of a vCPU's state; with the first one the vCPU is here.
    fn restore(&self, part: Part, payload: &Buffer) -> Result<(), String> {
        let missing = || format!("there is no vCPU {}", part.cpu);
        let seat = self.seats.get(usize::from(part.cpu)).ok_or_else(missing)?;
        if !seat.is_here() {
            let here = self.seats.iter().filter(|seat| seat.is_here()).count();
            if here >= usize::from(self.most) {
                return Err("more vCPUs than were asked for".to_owned());
            }
            self.put(seat, true);
        }
        let mut parts = seat.parts.lock().unwrap_or_else(PoisonError::into_inner);
        if gather(&mut parts, part, payload)? {
            seat.order(Order::Restore(std::mem::take(&mut parts)))?;
        }
        Ok(())
    }

    /// Ends everything, in order. A vCPU that does not leave guest code, because its page never comes, keeps what it
    /// needs: it is never to read what is not true.
    fn end(mut self) {
        for seat in &self.seats {
            let _ = seat.order(Order::End);
            seat.kick();
        }
        let until = Instant::now() + LEAVING;
        while !self.threads.iter().all(JoinHandle::is_finished) {
            if Instant::now() > until {
                tracing::warn!("A guest's vCPU hangs at its end; its memory stays until the agent ends");
                std::mem::forget(self);
                return;
            }
            self.seats.iter().for_each(|seat| seat.kick());
            std::thread::sleep(Duration::from_millis(5));
        }
        for thread in self.threads.drain(..) {
            // It has nothing to say.
            let _ = thread.join();
        }
        drop(self.partition.take());
        drop(self.engine.take());
        drop(self.ram.take());
        tracing::info!("A guest's vCPUs here have ended");
    }
}

/// Says what vCPUs here can be.
fn offer(terms: &Terms, sender: &Sender) {
    let offered =
        Partition::host_features().and_then(|features| Ok((features, Abilities::of_this_pc()?.khz)));
    match offered {
        Ok((features, tsc_khz)) => {
            let granted = ToConsole::Granted { epoch: terms.epoch, tsc_khz };
            sender.send(&granted.encode(), Some(sender.payload(&features.encode())));
        }
        Err(error) => sender.send(&ToConsole::Failed(error.to_string()).encode(), None),
    }
}

fn options(create: &Create) -> Option<coherence::Options> {
    let members: Vec<Member> = (0..create.members()).filter_map(Member::new).collect();
    let parts: Vec<(Member, u64)> = members.iter().copied().zip(create.homes.iter().copied()).collect();
    let pieces = Pieces::new(Bytes(create.ram));
    let homes = Homes::sliced(pieces, &parts)?;
    let members = members.into_iter().fold(Members::default(), Members::with);
    let shards = u32::from(create.shards).min(pieces.count());
    Some(coherence::Options { me: create.member, members, homes, shards })
}

impl Seat {
    fn new(number: u8, here: bool, inbox: Arc<Inbox>, rate: Rate) -> Arc<Self> {
        let (orders, ordered) = (Mutex::default(), Condvar::new());
        let [here, entered, kicked] = [here, false, false].map(AtomicBool::new);
        let (steering, parts) = (Steering::new(rate), Mutex::default());
        Arc::new(Self { number, here, inbox, orders, ordered, entered, kicked, steering, parts })
    }

    fn is_here(&self) -> bool {
        self.here.load(Ordering::SeqCst)
    }

    /// Makes the vCPU exit to the console node.
    fn kick(&self) {
        self.kicked.store(true, Ordering::SeqCst);
        self.inbox.kick();
    }

    /// Says what to add to this PC's time stamp counter to make the guest's.
    fn steer(&self, offset: u64) {
        if self.steering.aim(offset) {
            self.inbox.kick();
        }
    }

    /// Runs guest code until the console node has to know of something.
    fn enter(&self, cpu: &mut ApicCpu<kvm::Vcpu>, mut entry: VmEntry) -> VmExit {
        loop {
            if let Err(error) = self.steering.set(cpu.core_mut()) {
                return VmExit::Failed(error.to_string());
            }
            let exit = cpu.enter(entry);
            self.steering.left();
            if exit != VmExit::Interrupted || self.kicked.swap(false, Ordering::SeqCst) {
                return exit;
            }
            // It was only to look at its clock.
            entry = VmEntry::Continue;
        }
    }

    fn order(&self, order: Order) -> Result<(), String> {
        let mut orders = self.orders.lock().unwrap_or_else(PoisonError::into_inner);
        let enters = matches!(order, Order::Enter(_));
        if enters && self.entered.swap(true, Ordering::SeqCst) || orders.len() >= MOST_ORDERS {
            return Err(format!("vCPU {} is asked for too much at once", self.number));
        }
        orders.push_back(order);
        drop(orders);
        self.ordered.notify_one();
        Ok(())
    }

    fn next(&self) -> Order {
        let mut orders = self.orders.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(order) = orders.pop_front() {
                return order;
            }
            orders = self.ordered.wait(orders).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The vCPU's thread.
    fn run(&self, mut cpu: ApicCpu<kvm::Vcpu>, sender: &Sender, ear: &coherence::Ear) {
        let _attached = processor::Vcpu::attach(&mut cpu);
        let fail = |why: String| sender.send(&ToConsole::Failed(why).encode(), None);
        loop {
            match self.next() {
                Order::Enter(entry) => {
                    let exit = self.enter(&mut cpu, entry);
                    self.entered.store(false, Ordering::SeqCst);
                    sender.send(&ToConsole::Exit(self.number, exit).encode(), None);
                }
                Order::Save => match self.save(&mut cpu) {
                    Ok(state) => {
                        // Whoever runs it next needs its pages.
                        ear.rests();
                        self.send(sender, &state);
                    }
                    Err(why) => fail(why),
                },
                Order::Restore(state) => {
                    // Its counter begins anew, with what is right here.
                    self.steering.forget();
                    let answer = match restore(&mut cpu, &state) {
                        Ok(()) => ToConsole::Restored(self.number),
                        Err(why) => ToConsole::Untaken(self.number, why),
                    };
                    sender.send(&answer.encode(), None);
                }
                Order::End => return,
            }
        }
    }

    fn save(&self, cpu: &mut ApicCpu<kvm::Vcpu>) -> Result<Vec<u8>, String> {
        let state = cpu.save().map_err(|error| error.to_string())?;
        serde_json::to_vec(&state).map_err(|error| error.to_string())
    }

    fn send(&self, sender: &Sender, state: &[u8]) {
        let total = state.len() as u32;
        let mut offset = 0;
        for part in state.chunks(MOST_PAYLOAD) {
            let message = ToConsole::State(Part { cpu: self.number, offset, total });
            sender.send(&message.encode(), Some(sender.payload(part)));
            offset += part.len() as u32;
        }
    }
}

fn restore(cpu: &mut ApicCpu<kvm::Vcpu>, state: &[u8]) -> Result<(), String> {
    let state: VcpuState =
        serde_json::from_slice(state).map_err(|error| format!("a vCPU's state: {error}"))?;
    processor::Vcpu::restore(cpu, &state).map_err(|error| error.to_string())
}

/// How the local APICs here reach each other and the rest of the guest.
struct Outward {
    switch: Arc<Switch>,
    sender: Sender,
    ear: coherence::Ear,
}

impl Fabric for Outward {
    fn send(&self, message: Message) {
        self.switch.post(&message);
    }

    fn end_of_interrupt(&self, vector: u8) {
        self.sender.send(&ToConsole::Eoi(vector).encode(), None);
    }

    fn view(&self, view: View) {
        self.switch.set_view(view);
        self.sender.send(&ToConsole::View(view).encode(), None);
    }

    fn refused(&self, vector: u8) {
        self.sender.send(&ToConsole::Refused(vector).encode(), None);
    }

    fn acknowledge(&self) -> Option<u8> {
        None
    }

    fn halted(&self) {
        self.ear.rests();
    }
}

impl Elsewhere for Outward {
    fn post(&self, targets: Targets, message: Message) {
        self.sender.send(&ToConsole::Interrupt(targets, message).encode(), None);
    }
}
