//! The thread that serves a device's queues: one ring on which doorbells, back end and orders from the
//! transport all complete.
//!
//! ```text
//! loop: orders ─▶ serve rung queues ─▶ interrupts, one for each queue ─▶ tick ─▶ wait ─▶ completions
//! ```

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use transport::ring::{Completion, Ring, Source};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{Activation, ActiveQueue, Broken, Interrupts, Returned, Virtqueue};
use crate::thread::{Role, confine};

/// The queues that a worker serves while the device is active.
pub(crate) struct Queues {
    pub(crate) features: u64,
    pub(crate) interrupts: Arc<Interrupts>,
    list: Vec<ActiveQueue>,
    rung: Vec<bool>,
}

impl Queues {
    /// The queue with this number, if the driver enabled it.
    pub(crate) fn get(&mut self, index: u16) -> Option<&mut Virtqueue> {
        let mut list = self.list.iter_mut();
        list.find(|active| active.index == index).map(|active| &mut active.queue)
    }

    /// Has `serve` called for the queue, as if its doorbell had been rung.
    pub(crate) fn ring(&mut self, index: u16) {
        if let Some(at) = self.list.iter().position(|active| active.index == index) {
            self.rung[at] = true;
        }
    }

    fn signal(&mut self) -> Result<(), Broken> {
        for active in &mut self.list {
            if active.queue.wants_interrupt()? {
                self.interrupts.signal_queue(active.index);
            }
        }
        Ok(())
    }
}

/// A device's half on the worker thread.
pub(crate) trait Backend: Send + 'static {
    /// Prepares to be driven by `ring`; once, on the worker's thread.
    fn attach(&mut self, ring: &mut Ring) -> io::Result<()>;

    /// The queues are about to be served.
    fn activate(&mut self, _ring: &mut Ring, _queues: &mut Queues) {}

    /// Takes chains from queue `index`. `true`: there may be more, call again soon.
    fn serve(&mut self, ring: &mut Ring, queues: &mut Queues, index: u16) -> Result<bool, Broken>;

    /// Looks at a completion of the ring. `queues` is `None` while the device is not active.
    fn complete(
        &mut self,
        _ring: &mut Ring,
        _queues: Option<&mut Queues>,
        _completion: Completion,
    ) -> Result<(), Broken> {
        Ok(())
    }

    /// Does what is due, and returns when it wants to be called next. Before each wait.
    fn tick(
        &mut self,
        _ring: &mut Ring,
        _queues: Option<&mut Queues>,
        _now: Instant,
    ) -> Result<Option<Instant>, Broken> {
        Ok(None)
    }

    /// How many requests are in flight that may touch guest memory.
    fn in_flight(&self) -> usize {
        0
    }

    /// Gives up what is in flight: afterwards nothing touches guest memory, and the chains are
    /// [put back](Virtqueue::put_back).
    fn abort(&mut self, _ring: &mut Ring, _queues: &mut Queues) {}

    /// The queues are about to be handed back, and nothing is in flight: chains that were taken in
    /// advance are [put back](Virtqueue::put_back).
    fn let_go(&mut self, _queues: &mut Queues) {}

    /// The worker ends, and nothing is in flight.
    fn close(&mut self, _ring: &mut Ring) {}
}

type Call<B> = Box<dyn FnOnce(&mut B, Option<&mut Queues>) + Send>;

enum Order<B> {
    Activate(Box<Activation>),
    Deactivate(Duration, Returned),
    Call(Call<B>),
    Quit,
}

/// Sends orders to a worker from any thread.
pub(crate) struct Caller<B> {
    orders: Sender<Order<B>>,
    event: Arc<EventFd>,
}

impl<B: Backend> Caller<B> {
    fn order(&self, order: Order<B>) {
        // A worker that has ended has no queues and nobody to answer.
        if self.orders.send(order).is_ok() {
            let _ = self.event.write(1);
        }
    }

    /// Runs `call` on the worker's thread.
    pub(crate) fn call(&self, call: impl FnOnce(&mut B, Option<&mut Queues>) + Send + 'static) {
        self.order(Order::Call(Box::new(call)));
    }
}

/// A back end and, once started, its thread. Dropping it ends the thread and waits for it.
pub(crate) struct Worker<B: Backend> {
    backend: Option<B>,
    running: Option<(Arc<Caller<B>>, JoinHandle<()>)>,
}

impl<B: Backend> Worker<B> {
    /// A worker that is not started.
    pub(crate) fn new(backend: B) -> Self {
        Self { backend: Some(backend), running: None }
    }

    /// Starts a thread for the device `kind` and waits until the back end is attached to its ring, which
    /// takes `entries` operations at once. Later calls do nothing.
    pub(crate) fn start(&mut self, role: Role, kind: &'static str, entries: u32) -> io::Result<()> {
        let Some(mut backend) = self.backend.take() else { return Ok(()) };
        let event = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
        let (orders, received) = channel();
        let (attached, result) = channel();
        let wake = event.clone();
        let body = move || {
            let made = Ring::new(entries).and_then(|mut ring| {
                // Confined last: what is done once here may need calls that the loop does not.
                backend.attach(&mut ring)?;
                confine(role)?;
                Ok(ring)
            });
            let ring = match made {
                Ok(ring) => ring,
                Err(e) => {
                    let _ = attached.send(Err(e));
                    return;
                }
            };
            let _ = attached.send(Ok(()));
            Loop::new(kind, ring, backend, received, wake).run();
        };
        let thread = thread::Builder::new().name(kind.to_owned()).spawn(body)?;
        result.recv().map_err(|_| io::Error::other("the worker ended while it started"))??;
        self.running = Some((Arc::new(Caller { orders, event }), thread));
        Ok(())
    }

    /// How to reach the thread; `None` before it is started.
    pub(crate) fn caller(&self) -> Option<&Arc<Caller<B>>> {
        self.running.as_ref().map(|(caller, _)| caller)
    }

    /// The back end, before it is started.
    pub(crate) fn take_backend(&mut self) -> Option<B> {
        self.backend.take()
    }

    pub(crate) fn activate(&self, activation: Activation) -> io::Result<()> {
        let caller = self.caller().ok_or_else(|| io::Error::other("the device was not started"))?;
        caller.order(Order::Activate(Box::new(activation)));
        Ok(())
    }

    pub(crate) fn deactivate(&self, patience: Duration, returned: Returned) {
        if let Some(caller) = self.caller() {
            caller.order(Order::Deactivate(patience, returned));
        }
    }
}

impl<B: Backend> Drop for Worker<B> {
    fn drop(&mut self) {
        self.end();
    }
}

impl<B: Backend> Worker<B> {
    /// Ends the thread, which closes its back end, and waits for it.
    pub(crate) fn end(&mut self) {
        let Some((caller, thread)) = self.running.take() else { return };
        caller.order(Order::Quit);
        if thread.thread().id() != thread::current().id() {
            let _ = thread.join();
        }
    }
}

/// The payload of the token under which orders are announced; doorbells use the queue's place.
const ORDERS: u64 = 1 << 32;

struct Loop<B> {
    kind: &'static str,
    ring: Ring,
    backend: B,
    orders: Receiver<Order<B>>,
    event: Arc<EventFd>,
    source: Source,
    active: Option<Queues>,
    /// Counts activations, so that a doorbell of an earlier one is recognised.
    era: u16,
    leaving: Option<(Instant, Returned)>,
    broken: bool,
    quit: bool,
}

impl<B: Backend> Loop<B> {
    fn new(
        kind: &'static str,
        mut ring: Ring,
        backend: B,
        orders: Receiver<Order<B>>,
        event: Arc<EventFd>,
    ) -> Self {
        let source = ring.source();
        ring.poll_readable(event.as_raw_fd(), true, source.token(ORDERS));
        Self {
            kind,
            ring,
            backend,
            orders,
            event,
            source,
            active: None,
            era: 0,
            leaving: None,
            broken: false,
            quit: false,
        }
    }

    fn run(&mut self) {
        while let Some(timeout) = self.prepare() {
            if let Err(error) = self.ring.wait(timeout) {
                tracing::error!(device = self.kind, %error, "the worker's ring failed");
                return self.linger();
            }
            self.reap();
        }
    }

    /// Everything before a wait: how long that may be, or `None` at the end.
    fn prepare(&mut self) -> Option<Option<Duration>> {
        self.take_orders();
        let again = self.serve();
        let now = Instant::now();
        let next = match self.backend.tick(&mut self.ring, self.active.as_mut(), now) {
            Ok(next) => next,
            Err(broken) => {
                self.fail(broken);
                None
            }
        };
        self.signal();
        self.leave(now);
        if self.quit && self.active.is_none() {
            self.backend.close(&mut self.ring);
            return None;
        }
        let until = [next, self.leaving.as_ref().map(|(deadline, _)| *deadline)].into_iter().flatten().min();
        Some(if again { Some(Duration::ZERO) } else { until.map(|at| at.saturating_duration_since(now)) })
    }

    /// The ring is gone, and with it the device; only the queues are still handed back when asked for.
    fn linger(&mut self) {
        self.fail(Broken::Ring);
        while let Ok(order) = self.orders.recv() {
            match order {
                Order::Quit => return,
                Order::Deactivate(_, returned) => {
                    let list = self.active.take().map(|active| active.list).unwrap_or_default();
                    returned(list.into_iter().map(|active| (active.index, active.queue)).collect());
                }
                Order::Activate(activation) => activation.interrupts.fail(self.kind, &Broken::Ring),
                Order::Call(_) => {}
            }
        }
    }

    fn reap(&mut self) {
        while let Some(completion) = self.ring.reap() {
            if completion.token.source() == self.source {
                self.rung(completion);
                continue;
            }
            let active = self.active.as_mut();
            if let Err(broken) = self.backend.complete(&mut self.ring, active, completion) {
                self.fail(broken);
            }
        }
    }

    /// A doorbell or the announcement of an order. The multishot poll reports every signal, so the
    /// eventfds are never read; when the kernel ends it, it is set up again.
    fn rung(&mut self, completion: Completion) {
        let payload = completion.token.payload();
        if payload == ORDERS {
            if !completion.more() {
                self.ring.poll_readable(self.event.as_raw_fd(), true, completion.token);
            }
            return;
        }
        let (era, at) = ((payload >> 16) as u16, (payload & 0xffff) as usize);
        let Some(active) = self.active.as_mut().filter(|_| era == self.era) else { return };
        if let Some(rung) = active.rung.get_mut(at) {
            *rung = true;
            if !completion.more() {
                let doorbell = active.list[at].doorbell.as_raw_fd();
                self.ring.poll_readable(doorbell, true, completion.token);
            }
        }
    }

    fn take_orders(&mut self) {
        while let Ok(order) = self.orders.try_recv() {
            match order {
                Order::Activate(activation) => self.activate(*activation),
                Order::Deactivate(patience, returned) => {
                    self.leaving = Some((Instant::now() + patience, returned));
                }
                Order::Call(call) => call(&mut self.backend, self.active.as_mut()),
                Order::Quit => {
                    // Nobody waits for what is in flight any more.
                    self.quit = true;
                    let returned = self.leaving.take().map(|(_, returned)| returned);
                    self.leaving = Some((Instant::now(), returned.unwrap_or_else(|| Box::new(|_| ()))));
                }
            }
        }
    }

    fn activate(&mut self, activation: Activation) {
        let Activation { features, queues: list, interrupts } = activation;
        self.era = self.era.wrapping_add(1);
        self.broken = false;
        for (at, active) in list.iter().enumerate() {
            let token = self.doorbell(at);
            self.ring.poll_readable(active.doorbell.as_raw_fd(), true, token);
        }
        let rung = vec![true; list.len()];
        let mut queues = Queues { features, interrupts, list, rung };
        self.backend.activate(&mut self.ring, &mut queues);
        self.active = Some(queues);
    }

    fn doorbell(&self, at: usize) -> transport::ring::Token {
        self.source.token(u64::from(self.era) << 16 | at as u64)
    }

    /// Serves each rung queue once. `true`: some want more.
    fn serve(&mut self) -> bool {
        if self.broken || self.leaving.is_some() {
            return false;
        }
        let Some(active) = self.active.as_mut() else { return false };
        for at in 0..active.list.len() {
            if !std::mem::take(&mut active.rung[at]) {
                continue;
            }
            let index = active.list[at].index;
            match self.backend.serve(&mut self.ring, active, index) {
                Ok(more) => active.rung[at] |= more,
                Err(broken) => {
                    self.fail(broken);
                    return false;
                }
            }
        }
        active.rung.contains(&true)
    }

    fn signal(&mut self) {
        let result = self.active.as_mut().map_or(Ok(()), Queues::signal);
        if let Err(broken) = result {
            self.fail(broken);
        }
    }

    fn fail(&mut self, broken: Broken) {
        self.broken = true;
        if let Some(active) = &self.active {
            active.interrupts.fail(self.kind, &broken);
        }
    }

    /// Hands the queues back once nothing is in flight, or patience has run out.
    fn leave(&mut self, now: Instant) {
        let Some((deadline, _)) = &self.leaving else { return };
        if self.active.is_some() && self.backend.in_flight() > 0 && now < *deadline {
            return;
        }
        if let Some(mut active) = self.active.take() {
            for at in 0..active.list.len() {
                self.ring.cancel(self.doorbell(at));
            }
            if self.backend.in_flight() > 0 {
                self.backend.abort(&mut self.ring, &mut active);
            }
            self.backend.let_go(&mut active);
            let _ = active.signal();
            let queues = active.list.into_iter().map(|active| (active.index, active.queue)).collect();
            if let Some((_, returned)) = self.leaving.take() {
                returned(queues);
            }
        } else if let Some((_, returned)) = self.leaving.take() {
            returned(Vec::new());
        }
    }
}

/// A worker without a thread: its caller takes the turns.
pub(crate) struct Inline<B: Backend>(Loop<B>);

impl<B: Backend> Inline<B> {
    /// Attaches `backend` to a ring of this thread and serves the queues of `activation`.
    pub(crate) fn new(
        kind: &'static str,
        entries: u32,
        mut backend: B,
        activation: Activation,
    ) -> io::Result<Self> {
        let mut ring = Ring::new(entries)?;
        backend.attach(&mut ring)?;
        let event = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
        let (_, nobody) = channel();
        let mut inner = Loop::new(kind, ring, backend, nobody, event);
        inner.activate(activation);
        Ok(Self(inner))
    }

    /// One turn of the loop, which waits at its end for up to `patience` if nothing is to do. `rung`: the
    /// first queue's doorbell was.
    pub(crate) fn turn(&mut self, rung: bool, patience: Duration) -> io::Result<()> {
        if let (true, Some(first)) = (rung, self.0.active.as_mut().and_then(|queues| queues.rung.first_mut()))
        {
            *first = true;
        }
        let timeout = self.0.prepare().flatten().unwrap_or(patience);
        self.0.ring.wait(Some(timeout.min(patience)))?;
        self.0.reap();
        Ok(())
    }
}

impl<B: Backend> Drop for Inline<B> {
    fn drop(&mut self) {
        if let Some(mut active) = self.0.active.take() {
            self.0.backend.abort(&mut self.0.ring, &mut active);
        }
        self.0.backend.close(&mut self.0.ring);
    }
}
