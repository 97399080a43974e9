//! Members of a guest's memory, each with RAM of its own, and lines between all of them over TCP on loopback. Each asks
//! those with higher numbers, on the ring that reads its faults, as a console does.
#![allow(unsafe_code)] // Their RAM is touched directly.

use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use transport::buffer::Buffer;
use transport::channel::{Config, Names};
use transport::identity::Security;
use transport::line::{Answering, Asking, HELD, Hear, Sender, Serving, protocol};
use transport::ring::Ring;
use transport::server::{Connection, Event, Limits, Sessions};
use transport::wire::{Body, Status};
use vm_memory::{GuestAddress, GuestMemoryBackend as _};
use vmm::memory::coherence::message::{Member, Members};
use vmm::memory::coherence::{Board, Counters, Ear, Engine, Homes, Lines, Options};
use vmm::memory::fault::Pieces;
use vmm::memory::{Backing, Layout, Ram};
use vmm::units::Bytes;

use crate::region::{PAGE, Region};

/// Pages in the part of RAM that is at home at one member.
pub const PART: u64 = 4096;

/// Lines to the other members, by their numbers.
struct Senders(Vec<Option<Sender>>);

impl Lines for Senders {
    fn send(&self, to: Member, body: &[u8], content: Option<Buffer>) {
        if let Some(Some(sender)) = self.0.get(usize::from(to.number())) {
            sender.send(body, content);
        }
    }
}

/// Tells an engine what comes from a member.
struct Hearing {
    from: Member,
    ear: Ear,
}

impl Hear for Hearing {
    fn hear(&self, body: &[u8], payload: Option<Buffer>) {
        self.ear.hear(self.from, body, payload);
    }

    fn away(&self, _: &str) {}

    fn back(&self) {}

    fn over(&self, why: &str) {
        self.ear.lost(why);
    }
}

/// See the [module](self).
pub struct Mesh {
    // Dropped in this order: nobody touches RAM without its engine.
    engines: Vec<Engine>,
    regions: Vec<Region>,
    _rams: Vec<Ram>,
    servers: Vec<JoinHandle<Result<()>>>,
    /// Why somebody stopped.
    stopped: Arc<Mutex<Option<String>>>,
}

impl Mesh {
    /// `count` members; page [`PART`] `* n` and those after it are at home at member `n`.
    ///
    /// # Errors
    /// There is no userfaultfd, or loopback does not work.
    pub fn new(count: u8) -> Result<Self> {
        let all: Vec<Member> = (0..count).filter_map(Member::new).collect();
        let members = all.iter().copied().fold(Members::default(), Members::with);
        let size = Bytes(u64::from(count) * PART * PAGE as u64);
        let homes = Homes::spread(Pieces::new(size), &all).context("there are members")?;
        let stopped = Arc::<Mutex<Option<String>>>::default();
        let mut mesh = Self {
            engines: Vec::new(),
            regions: Vec::new(),
            _rams: Vec::new(),
            servers: Vec::new(),
            stopped: stopped.clone(),
        };
        let listeners: Vec<TcpListener> =
            all.iter().map(|_| TcpListener::bind("127.0.0.1:0")).collect::<Result<_, _>>()?;
        for (number, me) in all.iter().copied().enumerate() {
            let sender = |other: &Member| (*other != me).then(Sender::new).transpose();
            let senders: Vec<Option<Sender>> = all.iter().map(sender).collect::<Result<_, _>>()?;
            let ram = Ram::new(&Layout::new(size, 40).context("RAM is too large")?, Backing::Shared)?;
            let base = ram.memory().get_host_address(GuestAddress(0))?;
            let base = std::ptr::NonNull::new(base).context("RAM is nowhere")?;
            let mut boards: Vec<Board> = Vec::new();
            for other in &all[number + 1..] {
                let sender = senders[usize::from(other.number())].clone().context("a sender")?;
                let address = listeners[usize::from(other.number())].local_addr()?.to_string();
                boards.push(dial(me, *other, address, sender));
            }
            let told = stopped.clone();
            let broken = Box::new(move |why: &str| {
                told.lock().expect("no panic").get_or_insert_with(|| why.to_owned());
            });
            let options = Options { me, members, homes: homes.clone(), shards: 1 };
            let lines = Arc::new(Senders(senders.clone()));
            let engine = Engine::start(&ram, &options, lines, broken, boards)?;
            let listener = listeners[number].try_clone()?;
            let (ear, askers) = (engine.ear(), senders[..number].to_vec());
            mesh.servers.push(std::thread::spawn(move || answer(&listener, &ear, &askers)));
            // SAFETY: guest RAM is never unmapped, and nobody trusts what is in it.
            mesh.regions.push(unsafe { Region::new(base, size.0 / PAGE as u64) });
            mesh.engines.push(engine);
            mesh._rams.push(ram);
        }
        Ok(mesh)
    }

    /// RAM as member `number` sees it.
    #[must_use]
    pub fn region(&self, number: usize) -> &Region {
        &self.regions[number]
    }

    /// What member `number` has counted.
    #[must_use]
    pub fn counters(&self, number: usize) -> Counters {
        self.engines[number].counters()
    }

    /// Whether all is well.
    ///
    /// # Errors
    /// A member had to stop.
    pub fn check(&self) -> Result<()> {
        match &*self.stopped.lock().expect("no panic") {
            Some(why) => bail!("{why}"),
            None => Ok(()),
        }
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        self.engines.iter().for_each(Engine::close);
        for server in self.servers.drain(..) {
            let _ = server.join();
        }
    }
}

/// A line from `me` to `other`.
fn dial(me: Member, other: Member, address: String, sender: Sender) -> Board {
    Box::new(move |ring, ear| {
        let config = Config {
            address,
            name: "bench".to_owned(),
            security: Security::Plain,
            node: None,
            dead_after: Duration::from_secs(5),
            retry_first: Duration::from_millis(1),
            retry_most: Duration::from_millis(20),
            transport: Default::default(),
        };
        let names = Names::of(&config.address)?;
        let hear = Arc::new(Hearing { from: other, ear });
        let purpose = Body::from_slice(&[me.number()]);
        Ok(Box::new(Asking::new(config, names, purpose, sender, hear, ring)))
    })
}

/// Answers one connection of each of `askers` until it ends.
fn answer(listener: &TcpListener, ear: &Ear, askers: &[Option<Sender>]) -> Result<()> {
    let sessions = Sessions::new("bench", Limits::default());
    std::thread::scope(|scope| {
        for _ in askers {
            let (socket, _) = listener.accept()?;
            let sessions = sessions.clone();
            scope.spawn(move || serve(socket, sessions, ear, askers));
        }
        Ok(())
    })
}

fn serve(socket: TcpStream, sessions: Arc<Sessions>, ear: &Ear, askers: &[Option<Sender>]) -> Result<()> {
    let mut ring = Ring::new(64)?;
    let mut connection = Connection::new(socket, sessions, &Security::Plain, &mut ring);
    let (mut events, mut serving) = (Vec::new(), None::<Serving>);
    loop {
        let now = Instant::now();
        if let Some(serving) = &mut serving {
            serving.tick(&mut ring, &mut connection);
        }
        let due = connection.tick(&mut ring, now, &mut events);
        if events.is_empty() {
            if connection.is_finished() {
                return Ok(());
            }
            ring.wait(due.map(|due| due.saturating_duration_since(now)))?;
        }
        while let Some(completion) = ring.reap() {
            let ours = serving.as_mut().is_some_and(|serving| serving.complete(completion));
            let _ = ours || connection.complete(&mut ring, completion, &mut events);
        }
        for event in events.drain(..) {
            match event {
                Event::Closed { .. } => return Ok(()),
                Event::Request(request) if request.opcode == protocol::opcode::OPEN => {
                    let number = request.body.first().copied().unwrap_or(u8::MAX);
                    let sender = askers.get(usize::from(number)).cloned().flatten();
                    let from = Member::new(number).context("a member")?;
                    let hear = Arc::new(Hearing { from, ear: ear.clone() });
                    let line = Answering::new(sender.context("one who asks")?, hear);
                    serving = Some(Serving::new(line, &mut ring));
                    connection.answer(request.id, Status::OK, &protocol::welcome(HELD), Buffer::empty());
                }
                Event::Request(request) => {
                    if let Some(serving) = &mut serving {
                        serving.request(&mut connection, &request);
                    }
                }
                Event::Opened { .. } | Event::Carrier(_) | Event::Cancel { .. } => {}
            }
        }
    }
}
