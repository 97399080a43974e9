//! One connection of a peer: its requests become I/O on the same ring, and answers go out as they finish.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use devices::disk::file::FileDisk;
use devices::disk::volume::{
    Access, Acquire, Acquired, Lease, OPERATIONS, Open, Opened, Refusal, opcode, status,
};
use devices::disk::{self, Disk, Done, Operation};
use slab::Slab;
use transport::buffer::Buffer;
use transport::identity::{self, Peer, Role, Security, revocation};
use transport::line;
use transport::metrics::{Metrics, Operations, Recorder, Registration};
use transport::ring::{Completion, Ring, Token};
use transport::server::{Connection, Event, Request};
use transport::wire::{MAX_PAYLOAD, Status};
use vmm::memory::store::protocol;

use crate::admission::Handle;
use crate::config::Access as Allowed;
use crate::lease::Refused;
use crate::lists::Sent;
use crate::memory::{Client, Serving};
use crate::policy::Asker;
use crate::serve::{Agent, Granted};
use crate::volume::{Grant, lock};

/// The operations that are counted by name.
const COUNTED: Operations = Operations(&{
    let (volume, memory, line) = (OPERATIONS.0, protocol::NAMES, line::protocol::NAMES);
    let mut names = [(0, ""); OPERATIONS.0.len() + protocol::NAMES.len() + line::protocol::NAMES.len()];
    let mut at = 0;
    while at < names.len() {
        names[at] = if at < volume.len() {
            volume[at]
        } else if at < volume.len() + memory.len() {
            memory[at - volume.len()]
        } else {
            line[at - volume.len() - memory.len()]
        };
        at += 1;
    }
    names
});

/// A connection comes round at least so often, so that the watchdog sees it alive.
const ROUND: Duration = Duration::from_secs(2);
/// How often a volume is looked at that another session still has requests in flight on.
const DRAIN: Duration = Duration::from_millis(2);
const ENTRIES: u32 = 256;
/// So many refusals of one connection are told in the log.
const TOLD: usize = 8;

/// A volume that this connection's session was granted.
struct Bound {
    volume: usize,
    grant: Arc<Grant>,
    allowed: Allowed,
    used: bool,
}

/// A request that the ring carries out.
struct Job {
    id: u64,
    bound: Arc<Grant>,
    volume: usize,
    read: bool,
}

/// An `open` that is answered when what others left in flight is done.
struct Opening {
    id: u64,
    volume: usize,
    earlier: Vec<Arc<Grant>>,
    answer: Opened,
}

struct Worker {
    agent: Arc<Agent>,
    handle: Arc<Handle>,
    ring: Ring,
    connection: Connection,
    wake: Token,
    peer: String,
    /// What this connection counts, and its place among its peer's.
    metrics: Arc<Metrics>,
    registration: Option<Registration>,
    asker: Asker,
    /// What was refused and is in the log already: a peer that asks again and again is told, the log is not.
    told: Vec<String>,
    session: u128,
    bounds: Vec<Bound>,
    /// One for each volume of the agent that this connection uses.
    disks: Vec<Option<FileDisk>>,
    jobs: Slab<Job>,
    opening: Vec<Opening>,
    done: Vec<Done>,
    /// The memory that this connection uses.
    memory: Serving,
    /// The line of this connection's session, if it has one.
    line: Option<line::Serving>,
    stopping: bool,
    /// It ends to make room for another one.
    leaving: bool,
    /// Who the peer is, once its hello is here.
    known: Option<String>,
    /// Whether the peer's session is here.
    served: bool,
}

/// Serves one accepted connection until it is over.
///
/// # Errors
/// The kernel refuses io_uring.
pub(crate) fn serve(
    agent: &Arc<Agent>,
    handle: &Arc<Handle>,
    socket: std::net::TcpStream,
) -> std::io::Result<()> {
    let mut ring = Ring::new(ENTRIES)?;
    let mut connection = Connection::new(socket, Arc::clone(&agent.sessions), &agent.security, &mut ring);
    let recorder = Recorder::new(COUNTED);
    let metrics = recorder.metrics();
    connection.record(recorder);
    let wake = ring.source().token(0);
    ring.poll_readable(handle.wake.as_raw_fd(), true, wake);
    let mut disks = Vec::new();
    disks.resize_with(agent.volumes.len(), || None);
    let mut worker = Worker {
        agent: Arc::clone(agent),
        handle: Arc::clone(handle),
        ring,
        connection,
        wake,
        peer: String::new(),
        metrics,
        registration: None,
        asker: Asker::Unproven,
        told: Vec::new(),
        session: 0,
        bounds: Vec::new(),
        disks,
        jobs: Slab::new(),
        opening: Vec::new(),
        done: Vec::new(),
        memory: Serving::default(),
        line: None,
        stopping: false,
        leaving: false,
        known: None,
        served: false,
    };
    worker.run()
}

impl Drop for Worker {
    /// Also when the thread panics: a file's operations must end before their buffers do, and nobody may
    /// wait for requests that never end.
    fn drop(&mut self) {
        for disk in self.disks.iter_mut().flatten() {
            disk.abort(&mut self.ring, &mut self.done);
        }
        self.answer_done();
        for bound in self.bounds.drain(..) {
            bound.grant.connected(false);
        }
    }
}

impl Worker {
    fn run(&mut self) -> std::io::Result<()> {
        let mut events = Vec::new();
        loop {
            let now = Instant::now();
            self.handle.beat(now);
            if self.agent.is_stopping() && !self.stopping {
                self.stopping = true;
                self.connection.stop("the agent is stopping");
            }
            self.look_who_it_is();
            self.answer_opened();
            self.line_goes();
            let next = self.connection.tick(&mut self.ring, now, &mut events);
            if !events.is_empty() {
                self.events(&mut events);
                // What was answered at once goes out before the ring waits.
                continue;
            }
            if self.connection.is_finished() && self.jobs.is_empty() && self.opening.is_empty() {
                return Ok(());
            }
            let round = if self.opening.is_empty() { ROUND } else { DRAIN };
            let wait = next.map_or(round, |at| at.saturating_duration_since(now).min(round));
            self.ring.wait(Some(wait))?;
            while let Some(completion) = self.ring.reap() {
                self.completed(completion, &mut events);
            }
            self.events(&mut events);
            self.answer_done();
            self.note_use();
        }
    }

    /// Whether the peer counts as known by now, or makes room for another one that may be.
    fn look_who_it_is(&mut self) {
        if self.known.is_none() && self.connection.is_known() {
            self.handle.is_known_now();
            let node = self.connection.peer().map(|peer| format!("node {}", peer.name));
            self.known = Some(node.unwrap_or_else(|| "a peer".to_owned()));
        }
        if self.handle.is_evicted() && !self.leaving {
            self.leaving = true;
            self.connection.stop("it makes room for a newer connection");
        }
    }

    fn completed(&mut self, completion: Completion, events: &mut Vec<Event>) {
        if completion.token == self.wake {
            self.handle.woken();
            self.answer_lists();
            if !completion.more() {
                self.ring.poll_readable(self.handle.wake.as_raw_fd(), true, self.wake);
            }
            return;
        }
        if self.connection.complete(&mut self.ring, completion, events) {
            return;
        }
        if self.line.as_mut().is_some_and(|line| line.complete(completion)) {
            return;
        }
        for disk in self.disks.iter_mut().flatten() {
            if disk.complete(&mut self.ring, completion, &mut self.done) {
                return;
            }
        }
    }

    fn events(&mut self, events: &mut Vec<Event>) {
        for event in events.drain(..) {
            match event {
                Event::Opened { name, peer, session, resumed, carrier } => {
                    self.opened_by(&name, peer.as_ref());
                    self.session = session;
                    self.served = true;
                    tracing::info!(peer = %self.peer, resumed, %carrier, "A peer is connected");
                    self.count();
                }
                Event::Request(request) => self.request(request),
                // Its answer comes anyway: I/O that has begun is better finished than torn.
                Event::Cancel { .. } => {}
                Event::Carrier(carrier) => {
                    tracing::info!(%carrier, peer = %self.peer, "The connection's carrier changed");
                }
                Event::Closed { reason } if self.served => {
                    if let Some(line) = self.line.take() {
                        line.closed(&mut self.ring, &mut self.connection, &reason);
                    }
                    tracing::info!(peer = %self.peer, %reason, "A peer's connection is over");
                }
                Event::Closed { reason } => self.not_served(&reason),
            }
        }
        self.answer_done();
    }

    /// The connection ended before it was of use. Whoever reaches the agent can do that as often as it likes, so
    /// the log has a line for many of them.
    fn not_served(&self, reason: &str) {
        let who = self.known.as_deref().unwrap_or("a stranger");
        let why = if self.leaving { "it said nothing, and newer ones came" } else { reason };
        self.agent.unserved.note(|| format!("{who} at {}: {why}", self.handle.address));
    }

    /// Has this connection counted among those of its peer: by the name that it proved, where it did.
    fn count(&mut self) {
        let name = self.asker.node().unwrap_or(&self.peer);
        self.registration = Some(self.agent.metrics.add(name, Arc::clone(&self.metrics)));
    }

    /// From now on requests are this peer's.
    fn opened_by(&mut self, name: &str, proven: Option<&Peer>) {
        (self.peer, self.asker) = match proven {
            None => (name.to_owned(), Asker::Unproven),
            Some(peer) => {
                let console = peer.roles.has(Role::Console);
                // What is proven comes first, and the rest cannot be taken for it.
                (
                    format!("node {} (calls itself {name:?})", peer.name),
                    Asker::Node { name: peer.name.clone(), console },
                )
            }
        };
    }

    fn request(&mut self, request: Request) {
        let span = request.span.clone();
        let _in_its_name = span.enter();
        match request.opcode {
            opcode::READ | opcode::WRITE | opcode::FLUSH | opcode::DISCARD | opcode::WRITE_ZEROES => {
                self.access(request);
            }
            opcode::ACQUIRE => self.acquire(&request),
            opcode::RENEW => self.renew(&request),
            opcode::RELEASE => self.release(&request),
            opcode::OPEN => self.open(&request),
            opcode::VOLUMES => self.report(&request, self.agent.volumes_json(&self.asker)),
            opcode::INVENTORY => self.inventory(&request),
            opcode::ECHO => self.echo(request),
            revocation::OPCODE => self.revocations(&request),
            line::protocol::opcode::OPEN => self.open_line(&request),
            line::protocol::opcode::POST => self.post(&request),
            _ => self.memory(&request),
        }
    }

    /// Requests about memory are carried out at once: nothing of them waits for a device.
    fn memory(&mut self, request: &Request) {
        let client = Client { agent: &self.agent, asker: &self.asker, session: self.session };
        let Some(answer) = self.memory.answer(&client, request) else {
            return self.connection.answer(request.id, Status::UNKNOWN_OPERATION, &[], Buffer::empty());
        };
        if let Some(why) = answer.forbidden {
            self.tell(&why);
        }
        self.connection.answer(request.id, answer.status, &answer.body, answer.payload);
    }

    /// Opens the line of a session.
    fn open_line(&mut self, request: &Request) {
        match self.agent.cpus.open(&self.agent, &self.asker, self.session, &request.body) {
            Ok(()) => {
                // The rest of what is granted is left for what goes and comes.
                let held = (self.agent.requests as usize / 4).clamp(1, line::HELD);
                let welcome = line::protocol::welcome(held);
                self.connection.answer(request.id, Status::OK, &welcome, Buffer::empty());
            }
            Err(why) => {
                self.tell(&why);
                self.end_line(request.id, &why);
            }
        }
    }

    fn end_line(&mut self, id: u64, why: &str) {
        let why = line::protocol::reason(why);
        self.connection.answer(id, line::protocol::status::ENDED, &why, Buffer::empty());
    }

    fn post(&mut self, request: &Request) {
        if self.line.is_none() {
            let Some(line) = self.agent.cpus.line(self.session) else {
                return self.end_line(request.id, "the session has no line");
            };
            self.line = Some(line::Serving::new(line, &mut self.ring));
        }
        if let Some(line) = &mut self.line {
            line.request(&mut self.connection, request);
        }
    }

    /// Sends what is to be sent down the line.
    fn line_goes(&mut self) {
        let Some(line) = &mut self.line else { return };
        line.tick(&mut self.ring, &mut self.connection);
        if self.stopping || self.leaving {
            line.stop(&mut self.connection);
        }
    }

    fn refuse(&mut self, id: u64, status: Status, refusal: &Refusal) {
        self.connection.answer(id, status, &refusal.encode(), Buffer::empty());
    }

    fn malformed(&mut self, id: u64, why: &impl ToString) {
        self.refuse(id, Status::MALFORMED, &Refusal::because(why.to_string()));
    }

    fn refuse_lease(&mut self, id: u64, refused: Refused) {
        match refused {
            Refused::Leased { wait, why } => {
                self.refuse(id, status::LEASED, &Refusal { errno: 0, wait, text: why });
            }
            Refused::Fenced(why) => self.refuse(id, status::FENCED, &Refusal::because(why)),
            Refused::Forbidden(why) => self.forbid(id, why),
            Refused::Failed(why) => {
                tracing::error!(%why, "A lease could not be given");
                self.refuse(id, status::UNFIT, &Refusal::because(why));
            }
        }
    }

    /// Policy does not allow it. Both logs say so, this one once for each connection and reason.
    fn forbid(&mut self, id: u64, why: String) {
        self.tell(&why);
        self.refuse(id, status::FORBIDDEN, &Refusal::because(why));
    }

    fn tell(&mut self, why: &str) {
        if self.told.len() < TOLD && !self.told.iter().any(|told| told == why) {
            tracing::warn!(peer = %self.peer, %why, "Refused");
            self.told.push(why.to_owned());
        }
    }

    /// Gives the payload back, or so many bytes as are asked for. Nothing is told that the peer did not send.
    fn echo(&mut self, request: Request) {
        let Request { id, payload, answer_len, .. } = request;
        let answer = match payload.slice(0, answer_len) {
            Some(part) => part,
            None if answer_len > MAX_PAYLOAD => return self.malformed(id, &"An answer of more than 1 MiB"),
            None => {
                let answer = self.connection.buffer(answer_len);
                answer.fill(0);
                answer
            }
        };
        self.connection.answer(id, Status::OK, &[], answer);
    }

    fn inventory(&mut self, request: &Request) {
        if self.agent.policy.shows_inventory(&self.asker) {
            return self.report(request, self.agent.inventory_json());
        }
        self.forbid(
            request.id,
            format!("{} may use nothing here, so it is not told what there is", self.asker),
        );
    }

    /// A list of revoked certificates, from whomever: what counts is that the household's authority signed it.
    fn revocations(&mut self, request: &Request) {
        let Security::Tls(identity) = &self.agent.security else {
            return self.connection.answer(request.id, Status::UNKNOWN_OPERATION, &[], Buffer::empty());
        };
        let list = request.payload.to_vec();
        let answer_len = request.answer_len.min(MAX_PAYLOAD);
        if let Some(answer) = revocation::answer_at_once(identity, &list, answer_len) {
            return self.revoked(request.id, Ok(answer));
        }
        let (id, from) = (request.id, self.peer.clone());
        let (handle, identity) = (Arc::clone(&self.handle), Arc::clone(identity));
        if !self.agent.lists.take(Sent { id, list, answer_len, from, handle, identity }) {
            let why = "too many lists of revoked certificates wait to be looked at; send it again";
            self.refuse(id, status::UNSUPPORTED, &Refusal::because(why.to_owned()));
        }
    }

    /// What became of a list of revoked certificates.
    fn revoked(&mut self, id: u64, answer: Result<revocation::Answer, identity::Error>) {
        match answer {
            Ok(revocation::Answer { body, payload, taken }) => {
                if taken.conflicting {
                    self.tell(
                        "a list of revoked certificates that does not name all that were revoked before; \
                         the authority was put back from an old copy: `omega node revoke` there mends it",
                    );
                }
                self.connection.answer(id, Status::OK, &body, Buffer::from_vec(payload));
            }
            Err(why) => {
                let why = format!("a list of revoked certificates is refused: {why}");
                self.tell(&why);
                self.malformed(id, &why);
            }
        }
    }

    /// Answers with what became of lists of revoked certificates on their thread.
    fn answer_lists(&mut self) {
        let answers = std::mem::take(&mut *lock(&self.handle.lists));
        for (id, answer) in answers {
            self.revoked(id, answer);
        }
    }

    fn acquire(&mut self, request: &Request) {
        let asked = match Acquire::decode(&request.body) {
            Ok(asked) => asked,
            Err(e) => return self.malformed(request.id, &e),
        };
        match self.agent.acquire(&self.asker, &asked) {
            Ok(epoch) => {
                let acquired = Acquired { epoch, ttl: lock(&self.agent.leases).ttl() };
                self.connection.answer(request.id, Status::OK, &acquired.encode(), Buffer::empty());
            }
            Err(None) => {
                let names = self.agent.volumes.iter().map(|v| v.config.name.as_str());
                let names: Vec<&str> =
                    names.filter(|name| self.agent.policy.shows(&self.asker, name)).collect();
                let has = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
                let why = Refusal::because(format!("it serves {has}"));
                self.refuse(request.id, status::NO_SUCH_VOLUME, &why);
            }
            Err(Some(refused)) => self.refuse_lease(request.id, refused),
        }
    }

    fn renew(&mut self, request: &Request) {
        let lease = match Lease::decode(&request.body) {
            Ok(lease) => lease,
            Err(e) => return self.malformed(request.id, &e),
        };
        match self.agent.check(&self.asker, lease) {
            Ok((volume, _)) => {
                self.agent.volumes[volume].heard();
                self.connection.answer(request.id, Status::OK, &[], Buffer::empty());
            }
            Err(refused) => self.refuse_lease(request.id, refused),
        }
    }

    fn release(&mut self, request: &Request) {
        let lease = match Lease::decode(&request.body) {
            Ok(lease) => lease,
            Err(e) => return self.malformed(request.id, &e),
        };
        match self.agent.release(&self.asker, lease) {
            Ok(()) => self.connection.answer(request.id, Status::OK, &[], Buffer::empty()),
            Err(refused) => self.refuse_lease(request.id, refused),
        }
    }

    fn open(&mut self, request: &Request) {
        let lease = match Open::decode(&request.body) {
            Ok(Open { epoch, holder }) => Lease { epoch, holder },
            Err(e) => return self.malformed(request.id, &e),
        };
        let volume = match self.agent.check(&self.asker, lease) {
            Ok((volume, _)) => volume,
            Err(refused) => return self.refuse_lease(request.id, refused),
        };
        let image = match self.agent.volumes[volume].image() {
            Ok(image) => image,
            Err(e) => return self.refuse(request.id, status::UNFIT, &Refusal::because(e.to_string())),
        };
        if self.disks[volume].is_none() {
            let mut disk = FileDisk::new(Arc::clone(&image));
            if let Err(e) = disk.attach(&mut self.ring) {
                return self.refuse(request.id, status::UNFIT, &Refusal::because(e.to_string()));
            }
            self.disks[volume] = Some(disk);
        }
        // The image may have been slow to open; somebody else may have the volume by now.
        let granted = match self.agent.grant(&self.asker, lease, self.session) {
            Ok(granted) => granted,
            Err(refused) => return self.refuse_lease(request.id, refused),
        };
        let mut geometry = image.geometry();
        geometry.read_only |= granted.allowed == Allowed::Read;
        let answer = Opened { geometry, identity: image.identity() };
        let earlier = granted.earlier.clone();
        let volume = self.bind(granted);
        if earlier.is_empty() {
            self.opened(request.id, volume, &answer);
        } else {
            self.opening.push(Opening { id: request.id, volume, earlier, answer });
        }
    }

    fn bind(&mut self, granted: Granted) -> usize {
        let Granted { volume, allowed, grant, .. } = granted;
        let stale = |b: &Bound| b.volume == volume;
        for old in self.bounds.extract_if(.., |b| stale(b)) {
            old.grant.connected(false);
        }
        grant.connected(true);
        self.bounds.push(Bound { volume, grant, allowed, used: true });
        volume
    }

    fn opened(&mut self, id: u64, volume: usize, answer: &Opened) {
        let (peer, volume) = (&self.peer, &self.agent.volumes[volume].config.name);
        tracing::info!(%peer, %volume, "A volume is open");
        self.connection.answer(id, Status::OK, &answer.encode(), Buffer::empty());
    }

    /// Answers the `open`s whose volume nobody else uses any more.
    fn answer_opened(&mut self) {
        let is_ready = |o: &mut Opening| o.earlier.iter().all(|grant| grant.is_idle());
        let ready: Vec<Opening> = self.opening.extract_if(.., is_ready).collect();
        for Opening { id, volume, answer, .. } in ready {
            self.opened(id, volume, &answer);
        }
    }

    /// The grant under which `epoch` may be used, entered, and what for.
    fn enter(&mut self, epoch: u64) -> Result<(usize, Allowed, Arc<Grant>), Refused> {
        let known = self.bounds.iter().position(|b| b.grant.epoch == epoch);
        let index = match known {
            Some(index) => index,
            None => self.resume(epoch)?,
        };
        let bound = &mut self.bounds[index];
        if !bound.grant.enter() {
            return Err(self.agent.fenced(epoch));
        }
        bound.used = true;
        Ok((bound.volume, bound.allowed, Arc::clone(&bound.grant)))
    }

    /// Takes over what the same session was granted on an earlier connection.
    fn resume(&mut self, epoch: u64) -> Result<usize, Refused> {
        let granted = self.agent.granted(&self.asker, epoch, self.session)?;
        let volume = granted.volume;
        if self.disks[volume].is_none() {
            let failed = |why: String| Refused::Failed(why);
            let image = self.agent.volumes[volume].image().map_err(|e| failed(e.to_string()))?;
            let mut disk = FileDisk::new(image);
            disk.attach(&mut self.ring).map_err(|e| failed(e.to_string()))?;
            self.disks[volume] = Some(disk);
        }
        self.bind(granted);
        Ok(self.bounds.len() - 1)
    }

    fn access(&mut self, request: Request) {
        let Request { id, opcode, body, payload, answer_len, .. } = request;
        let access = match Access::decode(&body) {
            Ok(access) => access,
            Err(e) => return self.malformed(id, &e),
        };
        let operation = match opcode {
            opcode::READ => Operation::Read,
            opcode::WRITE => Operation::Write,
            opcode::FLUSH => Operation::Flush,
            opcode::DISCARD => Operation::Discard,
            _ => Operation::WriteZeroes { unmap: access.unmap },
        };
        let carried = match operation {
            Operation::Read => answer_len,
            Operation::Write => payload.len(),
            _ => 0,
        };
        let moves = matches!(operation, Operation::Read | Operation::Write);
        if moves && (access.len != carried as u64 || carried > MAX_PAYLOAD) {
            return self.malformed(id, &"The range and the payload differ in length");
        }
        let (volume, allowed, grant) = match self.enter(access.epoch) {
            Ok(entered) => entered,
            Err(refused) => return self.refuse_lease(id, refused),
        };
        if allowed == Allowed::Read && !matches!(operation, Operation::Read | Operation::Flush) {
            grant.exit();
            return self.refuse_write(id, volume);
        }
        let buffer = if operation == Operation::Read { self.connection.buffer(carried) } else { payload };
        let read = operation == Operation::Read;
        let tag = self.jobs.insert(Job { id, bound: grant, volume, read }) as u64;
        let request = disk::Request { tag, operation, offset: access.offset, len: access.len, buffer };
        if let Some(disk) = &mut self.disks[volume] {
            disk.submit(&mut self.ring, request, &mut self.done);
        }
    }

    /// Policy lets the peer read the volume only.
    fn refuse_write(&mut self, id: u64, volume: usize) {
        let name = &self.agent.volumes[volume].config.name;
        let why = format!("{} may only read volume {name}", self.asker);
        self.refuse(id, status::READ_ONLY, &Refusal::because(why));
    }

    /// Answers the requests whose I/O is done.
    fn answer_done(&mut self) {
        let mut done = std::mem::take(&mut self.done);
        for Done { tag, result, buffer } in done.drain(..) {
            let Some(Job { id, bound, volume, read }) = self.jobs.try_remove(tag as usize) else { continue };
            bound.exit();
            match result {
                Ok(()) => {
                    let payload = if read { buffer } else { Buffer::empty() };
                    self.connection.answer(id, Status::OK, &[], payload);
                }
                Err(error) => {
                    if matches!(error, disk::Error::Full) {
                        self.agent.volumes[volume].tell_full();
                    }
                    let (status, refusal) = Refusal::of(&error);
                    self.refuse(id, status, &refusal);
                }
            }
        }
        self.done = done;
    }

    /// Requests renew the lease.
    fn note_use(&mut self) {
        for bound in self.bounds.iter_mut().filter(|b| b.used) {
            bound.used = false;
            self.agent.volumes[bound.volume].heard();
        }
        self.memory.note_use();
    }

    /// Answers with JSON.
    fn report(&mut self, request: &Request, json: Vec<u8>) {
        if json.len() > request.answer_len.min(MAX_PAYLOAD) {
            let why = format!("the answer has {} bytes", json.len());
            return self.refuse(request.id, status::UNSUPPORTED, &Refusal::because(why));
        }
        self.connection.answer(request.id, Status::OK, &[], Buffer::from_vec(json));
    }
}
