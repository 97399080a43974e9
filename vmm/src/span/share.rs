//! What the console node has at one helper: the vCPUs that run there, as seen from here.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use devices::interrupt::{Message, Nanos, Targets, View};
use transport::buffer::Buffer;
use transport::line::{Hear, MOST_PAYLOAD, Sender};

use super::protocol::{Create, MOST_STATE, Moment, Part, ToConsole, ToHelper};
use crate::cpu::{Elsewhere, VmEntry, VmExit};

/// How long a vCPU whose helper is away waits before it looks again whether it shall pause.
const GLANCE: Duration = Duration::from_millis(20);

/// Who hears what a share says that is not for one of its vCPUs' threads. Called on the thread that drives the line: it
/// does not wait for anything.
pub trait Console: Send + Sync {
    /// An interrupt for vCPUs here, routed.
    fn interrupt(&self, targets: Targets, message: Message);
    /// A vCPU there finished a level-triggered interrupt of this vector.
    fn end_of_interrupt(&self, vector: u8);
    /// A vCPU there did not take a level-triggered interrupt of this vector.
    fn refused(&self, vector: u8);
    /// What is to be known of an APIC there.
    fn view(&self, view: View);
    /// A [probe](Share::probe) was answered: its number, when it was sent, and what the clocks there said.
    fn answered(&self, number: u32, sent: Nanos, there: Moment);
    /// The helper is not heard: no vCPU there can be waited for.
    fn away(&self, why: &str);
    /// It is there again.
    fn back(&self);
    /// The share is over for good.
    fn over(&self, why: &str);
}

/// The helper cannot do what it was asked to.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The share is over.
    #[error("{0}")]
    Over(String),
    /// It does not answer.
    #[error("{0} does not answer within {1:.0?}: {2}")]
    Late(String, Duration, String),
    /// A vCPU is not between two instructions.
    #[error("vCPU {0} has an access under way")]
    Busy(u8),
    /// A vCPU cannot have the state that it was given.
    #[error("{0} does not take vCPU {1}: {2}")]
    Untaken(String, u8, String),
}

/// What a helper lent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Granted {
    /// The lease's epoch.
    pub epoch: u64,
    /// The rate of its time stamp counter in kHz.
    pub tsc_khz: u32,
    /// Which features its vCPUs can have, in the words of the features' codec.
    pub features: Vec<u8>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Standing {
    Here,
    /// Why.
    Away(String),
    /// Why.
    Over(String),
}

struct State {
    standing: Standing,
    granted: Option<Granted>,
    created: bool,
}

/// One vCPU.
#[derive(Default)]
struct Seat {
    /// It is at this helper, as far as that was told.
    here: bool,
    /// It was entered, and its exit was not taken.
    running: bool,
    kicked: bool,
    exit: Option<VmExit>,
    /// The parts of its state that came.
    parts: Vec<u8>,
    saved: Option<Vec<u8>>,
    /// Whether the state that was sent was taken, once that is known.
    restored: Option<Result<(), String>>,
    /// The share's standing, for its thread.
    standing: Option<Standing>,
}

struct Cell {
    number: u8,
    seat: Mutex<Seat>,
    changed: Condvar,
}

/// See the [module](self). It hears the vCPU line.
pub struct Share {
    /// What the helper is called in reports.
    helper: String,
    sender: Sender,
    console: OnceLock<Arc<dyn Console>>,
    state: Mutex<State>,
    changed: Condvar,
    cells: Vec<Cell>,
}

impl Share {
    /// What `helper`, whose line `sender` sends down, has of a guest of `cpus` vCPUs: those that are `here` when the guest
    /// starts, and any that come later.
    #[must_use]
    pub fn new(helper: &str, sender: Sender, cpus: u8, here: &[u8]) -> Arc<Self> {
        let standing = Standing::Away("it was not reached yet".to_owned());
        let cell = |number: u8| {
            let seat = Seat { here: here.contains(&number), ..Seat::default() };
            Cell { number, seat: Mutex::new(seat), changed: Condvar::new() }
        };
        Arc::new(Self {
            helper: helper.to_owned(),
            sender,
            console: OnceLock::new(),
            state: Mutex::new(State { standing, granted: None, created: false }),
            changed: Condvar::new(),
            cells: (0..cpus).map(cell).collect(),
        })
    }

    /// What the helper is called.
    #[must_use]
    pub fn helper(&self) -> &str {
        &self.helper
    }

    /// Has `console` hear what comes; to be called once, before a vCPU is entered.
    pub fn connect(&self, console: Arc<dyn Console>) {
        // The first stays.
        let _ = self.console.set(console);
        match self.state().standing.clone() {
            Standing::Over(why) => self.tell(|console| console.over(&why)),
            Standing::Away(why) => self.tell(|console| console.away(&why)),
            Standing::Here => {}
        }
    }

    fn tell(&self, say: impl FnOnce(&dyn Console)) {
        if let Some(console) = self.console.get() {
            say(&**console);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why the helper is not there, if it is not.
    #[must_use]
    pub fn missing(&self) -> Option<String> {
        match &self.state().standing {
            Standing::Here => None,
            Standing::Away(why) | Standing::Over(why) => Some(why.clone()),
        }
    }

    /// What it lent, once it has.
    ///
    /// # Errors
    /// It refused, or does not answer within `patience`.
    pub fn granted(&self, patience: Duration) -> Result<Granted, Error> {
        self.wait(patience, |state| state.granted.clone())
    }

    /// Makes the partition there, whose vCPUs have `features`.
    ///
    /// # Errors
    /// It cannot be made, or the helper does not answer within `patience`.
    pub fn create(&self, create: Create, features: &[u8], patience: Duration) -> Result<(), Error> {
        self.send(&ToHelper::Create(create), Some(features).filter(|features| !features.is_empty()));
        self.wait(patience, |state| state.created.then_some(()))
    }

    fn wait<T>(&self, patience: Duration, look: impl Fn(&State) -> Option<T>) -> Result<T, Error> {
        let end = Instant::now() + patience;
        let mut state = self.state();
        loop {
            if let Standing::Over(why) = &state.standing {
                return Err(Error::Over(why.clone()));
            }
            if let Some(found) = look(&state) {
                return Ok(found);
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(self.late(patience, &state.standing));
            }
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn late(&self, patience: Duration, standing: &Standing) -> Error {
        let why = match standing {
            Standing::Here => "it is busy".to_owned(),
            Standing::Away(why) | Standing::Over(why) => why.clone(),
        };
        Error::Late(self.helper.clone(), patience, why)
    }

    fn send(&self, message: &ToHelper, payload: Option<&[u8]>) {
        self.sender.send(&message.encode(), payload.map(|payload| self.sender.payload(payload)));
    }

    /// Tells the helper what is to be known of an APIC of another member.
    pub fn view(&self, view: View) {
        self.send(&ToHelper::View(view), None);
    }

    /// Asks for the clocks there; [`Console::answered`] hears them.
    pub fn probe(&self, number: u32, now: Nanos) {
        self.send(&ToHelper::Probe(number, now), None);
    }

    /// Says by how much the guest's clock and time stamp counter are ahead of those there, wrapping.
    pub fn set_clock(&self, nanos: u64, tsc: u64) {
        self.send(&ToHelper::Clock { nanos, tsc }, None);
    }

    /// Ends the share; nobody may need its vCPUs any more.
    pub fn end(&self, why: &str) {
        self.send(&ToHelper::End(why.to_owned()), None);
        self.sender.end(why);
    }

    fn cell(&self, number: u8) -> Option<&Cell> {
        self.cells.iter().find(|cell| cell.number == number)
    }

    /// Makes a vCPU that runs exit. From any thread.
    pub fn kick(&self, number: u8) {
        let Some(cell) = self.cell(number) else { return };
        let mut seat = cell.lock();
        // One is enough: it stays until the vCPU's thread has seen it.
        if seat.running && !std::mem::replace(&mut seat.kicked, true) {
            self.send(&ToHelper::Kick(number), None);
        }
    }

    /// Enters the vCPU and waits for its exit; `stop`: it finishes only what `entry` answers. While the helper is away
    /// it returns [`VmExit::Interrupted`], and the exit is that of a later call. So it does when the share is over: that
    /// the guest ends, and as what, is for who hears [`Console::over`].
    pub(super) fn enter(&self, number: u8, entry: VmEntry, stop: bool) -> VmExit {
        let Some(cell) = self.cell(number) else {
            return VmExit::Failed(format!("vCPU {number} is not at {}", self.helper));
        };
        let mut seat = cell.lock();
        if !seat.running {
            // First the kick: it waits for the vCPU there.
            if stop {
                self.send(&ToHelper::Kick(number), None);
            }
            self.send(&ToHelper::Enter(number, entry), None);
            (seat.running, seat.kicked) = (true, stop);
        } else if stop && !std::mem::replace(&mut seat.kicked, true) {
            self.send(&ToHelper::Kick(number), None);
        }
        let mut looked = false;
        loop {
            if let Some(exit) = seat.exit.take() {
                seat.running = false;
                return exit;
            }
            match &seat.standing {
                Some(Standing::Away(_) | Standing::Over(_)) if looked => return VmExit::Interrupted,
                Some(Standing::Away(_) | Standing::Over(_)) => {
                    looked = true;
                    let waited = cell.changed.wait_timeout(seat, GLANCE);
                    seat = waited.unwrap_or_else(PoisonError::into_inner).0;
                }
                _ => seat = cell.changed.wait(seat).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    /// The vCPU's state, in the helper's words. Only while its thread here does not enter it.
    ///
    /// # Errors
    /// The helper does not answer within `patience`, or an access is under way.
    pub fn save(&self, number: u8, patience: Duration) -> Result<Vec<u8>, Error> {
        self.at_rest(number, patience, false)?;
        if let Some(cell) = self.cell(number) {
            let mut seat = cell.lock();
            seat.parts.clear();
            seat.saved = None;
        }
        self.send(&ToHelper::Save(number), None);
        self.wait_for(number, patience, |seat| seat.saved.take())
    }

    /// Makes the vCPU take over a state that [`save`](Self::save) returned, of whichever member; what it did is forgotten.
    /// It is at this helper from now on. Only while its thread here does not enter it.
    ///
    /// # Errors
    /// The helper does not take it, or does not answer within `patience`: then it may be there all the same, until it
    /// is to [leave](Self::leave).
    pub fn restore(&self, number: u8, state: &[u8], patience: Duration) -> Result<(), Error> {
        self.at_rest(number, patience, true)?;
        if let Some(cell) = self.cell(number) {
            let mut seat = cell.lock();
            (seat.here, seat.restored) = (true, None);
        }
        let total = state.len() as u32;
        let mut offset = 0;
        for part in state.chunks(MOST_PAYLOAD) {
            self.send(&ToHelper::Restore(Part { cpu: number, offset, total }), Some(part));
            offset += part.len() as u32;
        }
        let untaken = |why| Error::Untaken(self.helper.clone(), number, why);
        self.wait_for(number, patience, |seat| seat.restored.take())?.map_err(untaken)
    }

    /// The vCPU is with another member from now on. Only while its thread here does not enter it.
    pub fn leave(&self, number: u8) {
        if let Some(cell) = self.cell(number) {
            cell.lock().here = false;
        }
        self.send(&ToHelper::Leave(number), None);
    }

    /// Waits until the vCPU does not run there, should its helper have been away.
    fn at_rest(&self, number: u8, patience: Duration, forget: bool) -> Result<(), Error> {
        self.kick(number);
        let rests = self.wait_for(number, patience, |seat| {
            if !seat.running {
                return Some(true);
            }
            let exit = seat.exit.as_ref()?;
            let whole = *exit == VmExit::Interrupted;
            if forget || whole {
                (seat.exit, seat.running) = (None, false);
            }
            Some(forget || whole)
        })?;
        if rests { Ok(()) } else { Err(Error::Busy(number)) }
    }

    fn wait_for<T>(
        &self,
        number: u8,
        patience: Duration,
        mut look: impl FnMut(&mut Seat) -> Option<T>,
    ) -> Result<T, Error> {
        let nobody = || Error::Over(format!("vCPU {number} is not at {}", self.helper));
        let cell = self.cell(number).ok_or_else(nobody)?;
        let end = Instant::now() + patience;
        let mut seat = cell.lock();
        loop {
            if let Some(Standing::Over(why)) = &seat.standing {
                return Err(Error::Over(why.clone()));
            }
            if let Some(found) = look(&mut seat) {
                return Ok(found);
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                drop(seat);
                return Err(self.late(patience, &self.state().standing));
            }
            seat = cell.changed.wait_timeout(seat, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Writes down where the helper stands, and wakes who waits for it.
    fn stands(&self, standing: &Standing) {
        self.state().standing = standing.clone();
        self.changed.notify_all();
        for cell in &self.cells {
            cell.lock().standing = Some(standing.clone());
            cell.changed.notify_all();
        }
    }

    /// # Errors
    /// The helper says what it cannot.
    fn heard(&self, body: &[u8], payload: Option<Buffer>) -> Result<(), String> {
        let message = ToConsole::decode(body).map_err(|error| error.to_string())?;
        match message {
            ToConsole::Granted { epoch, tsc_khz } => {
                let features = payload.unwrap_or_default().to_vec();
                self.state().granted = Some(Granted { epoch, tsc_khz, features });
                self.changed.notify_all();
            }
            ToConsole::Created => {
                self.state().created = true;
                self.changed.notify_all();
            }
            ToConsole::Exit(number, exit) => {
                let mut seat = self.seat(number)?;
                if !seat.running || seat.exit.is_some() {
                    return Err("an exit of a vCPU that does not run".to_owned());
                }
                seat.exit = Some(exit);
                drop(seat);
                self.woken(number);
            }
            ToConsole::Interrupt(targets, message) => {
                self.tell(|console| console.interrupt(targets, message));
            }
            ToConsole::Eoi(vector) => self.tell(|console| console.end_of_interrupt(vector)),
            ToConsole::Refused(vector) => self.tell(|console| console.refused(vector)),
            ToConsole::View(view) => {
                // What is late, or of others' vCPUs, tells nothing.
                if self.seat(view.id.0)?.here {
                    self.tell(|console| console.view(view));
                }
            }
            ToConsole::State(part) => self.part(part, &payload.unwrap_or_default())?,
            ToConsole::Restored(number) => {
                self.seat(number)?.restored = Some(Ok(()));
                self.woken(number);
            }
            ToConsole::Untaken(number, why) => {
                self.seat(number)?.restored = Some(Err(why));
                self.woken(number);
            }
            ToConsole::Answer(number, sent, there) => {
                self.tell(|console| console.answered(number, sent, there));
            }
            ToConsole::Failed(why) => return Err(why),
        }
        Ok(())
    }

    fn seat(&self, number: u8) -> Result<MutexGuard<'_, Seat>, String> {
        let cell = self.cell(number).ok_or("it speaks of a vCPU that there is not")?;
        Ok(cell.lock())
    }

    fn woken(&self, number: u8) {
        if let Some(cell) = self.cell(number) {
            cell.changed.notify_all();
        }
    }

    fn part(&self, part: Part, payload: &Buffer) -> Result<(), String> {
        let mut seat = self.seat(part.cpu)?;
        if gather(&mut seat.parts, part, payload)? {
            seat.saved = Some(std::mem::take(&mut seat.parts));
            drop(seat);
            self.woken(part.cpu);
        }
        Ok(())
    }
}

/// Appends a part of a state; whether it is whole.
pub(super) fn gather(parts: &mut Vec<u8>, part: Part, payload: &Buffer) -> Result<bool, String> {
    if part.offset == 0 {
        parts.clear();
    }
    let fits = parts.len() + payload.len() <= part.total as usize && part.total <= MOST_STATE;
    if part.offset as usize != parts.len() || payload.is_empty() || !fits {
        return Err("a part of a state that does not follow the one before".to_owned());
    }
    parts.extend_from_slice(&payload.to_vec());
    Ok(parts.len() == part.total as usize)
}

impl Cell {
    fn lock(&self) -> MutexGuard<'_, Seat> {
        self.seat.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Hear for Share {
    fn hear(&self, body: &[u8], payload: Option<Buffer>) {
        if let Err(why) = self.heard(body, payload) {
            self.sender.end(&format!("{}: {why}", self.helper));
        }
    }

    fn away(&self, why: &str) {
        // First those who decide, so that no vCPU looks again before the guest is to pause.
        self.tell(|console| console.away(why));
        self.stands(&Standing::Away(why.to_owned()));
    }

    fn back(&self) {
        self.stands(&Standing::Here);
        self.tell(|console| console.back());
    }

    fn over(&self, why: &str) {
        self.tell(|console| console.over(why));
        self.stands(&Standing::Over(why.to_owned()));
    }
}

impl Elsewhere for Share {
    fn post(&self, targets: Targets, message: Message) {
        self.send(&ToHelper::Interrupt(targets, message), None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vcpu_whose_helper_is_gone_stands_still_and_does_not_fail() {
        let share = Share::new("pc2", Sender::new().expect("a line's end"), 2, &[1]);
        assert_eq!(
            share.enter(2, VmEntry::Continue, false),
            VmExit::Failed("vCPU 2 is not at pc2".to_owned())
        );
        for gone in [Hear::away, Hear::over] {
            gone(&*share, "the other side was started anew");
            assert_eq!(share.enter(1, VmEntry::Continue, false), VmExit::Interrupted);
        }
    }
}
