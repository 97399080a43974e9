//! The memory requests of one connection.

use std::sync::Arc;

use devices::disk::volume::Lease;
use transport::buffer::Buffer;
use transport::server::Request;
use transport::wire::{Body, MAX_PAYLOAD, Status};
use vmm::memory::store::protocol::{Forget, Malformed, Open, Opened, Pages, Take, opcode};

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
}

impl Serving {
    /// Carries a request out; `None` if it is none about memory.
    pub(crate) fn answer(&mut self, client: &Client<'_>, request: &Request) -> Option<Answer> {
        let done = match request.opcode {
            opcode::FETCH => self.fetch(client, request).map(|payload| (Body::new(), payload)),
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
        let opened = Opened { pages: store.pages(), quota: store.quota(), used: store.used(), flags: 0 };
        Ok((opened.encode(), Buffer::empty()))
    }

    fn release(&mut self, client: &Client<'_>, body: &[u8]) -> Result<(), Refused> {
        let lease = Lease::decode(body).map_err(malformed)?;
        client.agent.memory.release(lease, client.asker.node());
        self.bounds.retain(|bound| bound.loan.store.lives().is_ok());
        Ok(())
    }

    fn fetch(&mut self, client: &Client<'_>, request: &Request) -> Result<Buffer, Refused> {
        let Pages { epoch, first, count, .. } = pages(&request.body, request.answer_len)?;
        self.bound(client, epoch)?.store.fetch(first, count)
    }

    fn store(&mut self, client: &Client<'_>, request: &Request) -> Result<(), Refused> {
        let Pages { epoch, first, .. } = pages(&request.body, request.payload.len())?;
        self.bound(client, epoch)?.store.store(first, &request.payload)
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

/// The pages of a request that carries so many bytes.
fn pages(body: &[u8], carried: usize) -> Result<Pages, Refused> {
    let pages = Pages::decode(body).map_err(malformed)?;
    if pages.flags != 0 {
        return Err(Refused::Unsupported);
    }
    if u64::from(pages.count) * PAGE != carried as u64 {
        return Err(Refused::Malformed("The pages and the payload differ in length".to_owned()));
    }
    Ok(pages)
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
