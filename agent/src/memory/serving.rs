//! The memory requests of one connection.

use std::sync::Arc;
use std::time::Instant;

use devices::disk::volume::Lease;
use transport::buffer::Buffer;
use transport::server::Request;
use transport::wire::{Body, MAX_PAYLOAD, Status};
use vmm::memory::store::packed::{Packer, Unpackable};
use vmm::memory::store::protocol::{Forget, Malformed, Open, Opened, Packing, Pages, Take, flag, opcode};

use super::loan::Loan;
use super::{PAGE, Refused};
use crate::policy::Asker;
use crate::serve::Agent;
use crate::volume::User;

/// A lease that the connection's session uses.
struct Bound {
    loan: Arc<Loan>,
    user: User,
    /// Since it was last noted.
    used: bool,
}

impl Drop for Bound {
    fn drop(&mut self) {
        self.loan.connected(&self.user, false);
    }
}

/// What a request is answered with.
pub(crate) struct Answer {
    pub(crate) status: Status,
    pub(crate) body: Body,
    pub(crate) payload: Buffer,
    /// Why policy refused it, for the log.
    pub(crate) forbidden: Option<String>,
}

/// Who asks, over one connection.
pub(crate) struct Client<'a> {
    pub(crate) agent: &'a Agent,
    pub(crate) asker: &'a Asker,
    pub(crate) session: u128,
}

impl Client<'_> {
    fn user(&self) -> User {
        User { session: self.session, node: self.asker.node().map(str::to_owned) }
    }
}

/// The leases that a connection uses.
#[derive(Default)]
pub(crate) struct Serving {
    bounds: Vec<Bound>,
    packer: Packer,
    /// Where pages are unpacked; nothing until some are.
    unpacked: Buffer,
}

impl Serving {
    /// Carries a request out; `None` if it is none about memory.
    pub(crate) fn answer(&mut self, client: &Client<'_>, request: &Request) -> Option<Answer> {
        let done = match request.opcode {
            opcode::FETCH => self.fetch(client, request),
            opcode::STORE => self.store(client, request).map(nothing),
            opcode::FORGET => self.forget(client, &request.body).map(nothing),
            opcode::LEASE => lease(client, &request.body),
            opcode::RENEW => renew(client, &request.body).map(nothing),
            opcode::RELEASE => self.release(client, &request.body).map(nothing),
            opcode::OPEN => self.open(client, &request.body),
            opcode::STATUS => report(client, request.answer_len),
            _ => return None,
        };
        Some(match done {
            Ok((body, payload)) => Answer { status: Status::OK, body, payload, forbidden: None },
            Err(refused) => {
                let forbidden = match &refused {
                    Refused::Forbidden(why) => Some(why.clone()),
                    _ => None,
                };
                let (status, body) = refused.answer();
                Answer { status, body, payload: Buffer::empty(), forbidden }
            }
        })
    }

    /// Requests renew the leases. To be called once in a while, rather than by each of them.
    pub(crate) fn note_use(&mut self) {
        for bound in self.bounds.iter_mut().filter(|bound| bound.used) {
            bound.used = false;
            bound.loan.heard();
        }
    }

    /// The lease of a request, which this session has opened.
    fn bound(&mut self, client: &Client<'_>, epoch: u64) -> Result<&Loan, Refused> {
        let known = self.bounds.iter().position(|bound| bound.loan.epoch() == epoch);
        let index = match known {
            Some(index) => index,
            None => {
                let user = client.user();
                let loan = client.agent.memory.opened(epoch, &user)?;
                self.bind(loan, user)?
            }
        };
        let bound = &mut self.bounds[index];
        bound.used = true;
        Ok(&bound.loan)
    }

    fn bind(&mut self, loan: Arc<Loan>, user: User) -> Result<usize, Refused> {
        // Of leases that are over nothing is kept.
        self.bounds.retain(|bound| bound.loan.store.lives().is_ok());
        if !loan.connected(&user, true) {
            return Err(Refused::NotOpen);
        }
        self.bounds.push(Bound { loan, user, used: true });
        Ok(self.bounds.len() - 1)
    }

    fn open(&mut self, client: &Client<'_>, body: &[u8]) -> Result<(Body, Buffer), Refused> {
        let asked = Open::decode(body).map_err(malformed)?;
        // A lease outlives the agent, and its policy may be another one since.
        client.agent.permit_memory(client.asker)?;
        let user = client.user();
        let loan = client.agent.memory.open(&asked, user.clone())?;
        if !self.bounds.iter().any(|bound| bound.loan.epoch() == asked.epoch) {
            self.bind(Arc::clone(&loan), user)?;
        }
        let store = &loan.store;
        let opened = Opened { pages: store.pages(), quota: store.quota(), used: store.used(), flags: FLAGS };
        Ok((opened.encode(), Buffer::empty()))
    }

    fn release(&mut self, client: &Client<'_>, body: &[u8]) -> Result<(), Refused> {
        let lease = Lease::decode(body).map_err(malformed)?;
        client.agent.memory.release(lease, client.asker.node());
        self.bounds.retain(|bound| bound.loan.store.lives().is_ok());
        Ok(())
    }

    fn fetch(&mut self, client: &Client<'_>, request: &Request) -> Result<(Body, Buffer), Refused> {
        let Pages { epoch, first, count, flags } = pages(&request.body)?;
        carries(count, request.answer_len)?;
        let content = self.bound(client, epoch)?.store.fetch(first, count)?;
        if flags & flag::PACKED == 0 {
            return Ok((Body::new(), content));
        }
        let begun = Instant::now();
        let packed = self.packer.pack(&content);
        let packing = Packing { packed: packed.is_some(), took: begun.elapsed() };
        Ok((packing.encode(), packed.unwrap_or(content)))
    }

    fn store(&mut self, client: &Client<'_>, request: &Request) -> Result<(), Refused> {
        let Pages { epoch, first, count, flags } = pages(&request.body)?;
        if flags & flag::PACKED == 0 {
            carries(count, request.payload.len())?;
            return self.bound(client, epoch)?.store.store(first, &request.payload);
        }
        // Nothing is unpacked for who may store nothing.
        self.bound(client, epoch)?;
        let content = self.unpack(count, &request.payload)?;
        self.bound(client, epoch)?.store.store(first, &content)
    }

    /// The pages that came packed, in memory that the next ones will be in.
    fn unpack(&mut self, count: u32, packed: &Buffer) -> Result<Buffer, Refused> {
        let broken = |why: Unpackable| Refused::Malformed(why.to_string());
        let len = u64::from(count) * PAGE;
        if len > MAX_PAYLOAD as u64 {
            return Err(Refused::OutOfRange("more pages than a request may carry".to_owned()));
        }
        if self.unpacked.is_empty() {
            self.unpacked = Buffer::zeroed(MAX_PAYLOAD);
        }
        let into = self.unpacked.slice(0, len as usize).unwrap_or_default();
        self.packer.unpack(packed, packed.len(), &into).map_err(broken)?;
        Ok(into)
    }

    fn forget(&mut self, client: &Client<'_>, body: &[u8]) -> Result<(), Refused> {
        let Forget { epoch, ranges } = Forget::decode(body).map_err(malformed)?;
        self.bound(client, epoch)?.store.forget(&ranges)
    }
}

fn nothing(_: ()) -> (Body, Buffer) {
    (Body::new(), Buffer::empty())
}

fn malformed(why: Malformed) -> Refused {
    Refused::Malformed(why.to_string())
}

/// The flags of pages that are known here.
const FLAGS: u32 = flag::PACKED;

/// The pages of a request.
fn pages(body: &[u8]) -> Result<Pages, Refused> {
    let pages = Pages::decode(body).map_err(malformed)?;
    if pages.flags & !FLAGS != 0 {
        return Err(Refused::Unsupported);
    }
    Ok(pages)
}

/// Whether so many pages take so many bytes.
fn carries(count: u32, bytes: usize) -> Result<(), Refused> {
    if u64::from(count) * PAGE != bytes as u64 {
        return Err(Refused::Malformed("The pages and the payload differ in length".to_owned()));
    }
    Ok(())
}

fn lease(client: &Client<'_>, body: &[u8]) -> Result<(Body, Buffer), Refused> {
    let asked = Take::decode(body).map_err(malformed)?;
    let taken = client.agent.take_memory(client.asker, &asked)?;
    Ok((taken.encode(), Buffer::empty()))
}

fn renew(client: &Client<'_>, body: &[u8]) -> Result<(), Refused> {
    let lease = Lease::decode(body).map_err(malformed)?;
    client.agent.memory.renew(lease, client.asker.node())
}

fn report(client: &Client<'_>, answer_len: usize) -> Result<(Body, Buffer), Refused> {
    let lending = client.agent.lending(client.asker)?;
    let json = serde_json::to_vec(&lending).unwrap_or_default();
    if json.len() > answer_len.min(MAX_PAYLOAD) {
        return Err(Refused::Malformed(format!("The answer has {} bytes", json.len())));
    }
    Ok((Body::new(), Buffer::from_vec(json)))
}
