//! The authority's side of a join: it waits for one new node.

use std::io::{self, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use nix::poll::{PollFd, PollFlags, poll};
use rustls::pki_types::PrivateKeyDer;
use rustls::server::NoServerSessionStorage;
use rustls::version::TLS13;
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use subtle::ConstantTimeEq;

use super::timed::Timed;
use super::token::{Secret, Token};
use super::wire::{Answer, Request};
use super::{ALPN, PATIENCE, PORT};
use crate::identity::authority::{Admitted, Authority, Node, Refused, SKEW};
use crate::identity::{Error, NodeName, Roles, loaded};

/// So many conversations at once, and so many of them with one [origin]. For one more the oldest is cut off that
/// has asked for nothing yet: whoever joins does so in a moment.
const MOST: usize = 16;
const MOST_OF_ONE: usize = 4;
/// After so many wrong secrets an invitation is void. Guessing is hopeless long before (a secret has 128 bits); fewer
/// would let any stranger on the network end an invitation at once.
pub const MAX_TRIES: u32 = 10_000;
/// How often it is asked whether to stop.
const LOOK: u16 = 100;

/// Somebody is waited for. See the [module](super).
pub struct Invitation<'a> {
    authority: &'a Authority,
    listener: TcpListener,
    config: Arc<ServerConfig>,
    token: Token,
    until: Instant,
    /// Wrong secrets that were tried.
    pub(super) wrong: AtomicU32,
}

/// A conversation that goes on.
struct Conversation {
    peer: SocketAddr,
    socket: TcpStream,
    /// It has come as far as a request.
    asked: bool,
}

/// A new node.
#[derive(Clone, Debug)]
pub struct Joined {
    /// What the authority knows of it now.
    pub node: Node,
    /// From where it came.
    pub from: SocketAddr,
    /// It said that it stored its certificate.
    pub confirmed: bool,
}

/// How waiting ended.
#[derive(Debug)]
pub enum Outcome {
    /// Somebody joined.
    Joined(Box<Joined>),
    /// Nobody came in time.
    Expired,
    /// Too many wrong secrets were tried.
    Void,
    /// The caller wanted it.
    Stopped,
    /// The authority could not store what it did.
    Failed(Error),
}

/// What comes of the conversations.
enum Said {
    /// The authority made a node: whatever comes after it, somebody joined.
    Joined(Box<Joined>),
    /// That conversation is over; whether the new node said that it stored its certificate.
    Confirmed(bool),
    Void,
    Failed(Error),
}

impl<'a> Invitation<'a> {
    /// Invites one PC to become the node `name` within `life`. It is waited for at `listener`; `addresses` are
    /// those by which others reach it.
    ///
    /// # Errors
    /// The authority cannot store the invitation, or TLS cannot be set up.
    pub fn new(
        authority: &'a Authority,
        name: &NodeName,
        roles: Roles,
        life: Duration,
        listener: TcpListener,
        addresses: Vec<SocketAddr>,
    ) -> Result<Self, Error> {
        let failed = |source| Error::File { path: "the socket".into(), source };
        listener.set_nonblocking(true).map_err(failed)?;
        let config = config(authority, life)?;
        let (until, expires) = (Instant::now().checked_add(life), SystemTime::now().checked_add(life));
        let (Some(until), Some(expires)) = (until, expires) else {
            return Err(Error::crypto("The invitation cannot last so long", "the clock ends before"));
        };
        let secret = authority.invite(name, roles, life)?;
        let token = Token { addresses, authority: authority.fingerprint(), secret, expires };
        Ok(Self { authority, listener, config, token, until, wrong: AtomicU32::new(0) })
    }

    /// What the other PC needs to know.
    #[must_use]
    pub fn token(&self) -> &Token {
        &self.token
    }

    /// Waits until somebody joined, the time is over or `stop` says so, which is asked some times a second.
    /// Afterwards the token is worthless, whatever happened.
    #[must_use]
    pub fn wait(self, stop: &dyn Fn() -> bool) -> Outcome {
        let outcome = self.accept(stop);
        match (self.authority.withdraw(&self.token.secret), outcome) {
            (_, outcome @ (Outcome::Joined(_) | Outcome::Failed(_))) => outcome,
            (Ok(()), outcome) => outcome,
            (Err(why), _) => Outcome::Failed(why),
        }
    }

    fn accept(&self, stop: &dyn Fn() -> bool) -> Outcome {
        let (said, heard) = mpsc::channel();
        let busy = Mutex::new(Vec::<Conversation>::new());
        let outcome = thread::scope(|scope| {
            let outcome = loop {
                match heard.try_recv() {
                    Ok(Said::Joined(joined)) => break Outcome::Joined(confirmed(joined, &heard, stop)),
                    Ok(Said::Confirmed(_)) => {}
                    Ok(Said::Void) => break Outcome::Void,
                    Ok(Said::Failed(why)) => break Outcome::Failed(why),
                    Err(_) if stop() => break Outcome::Stopped,
                    Err(_) if Instant::now() >= self.until => break Outcome::Expired,
                    Err(_) => {}
                }
                let Some((socket, peer)) = self.next() else { continue };
                let Ok(second) = socket.try_clone() else { continue };
                if !make_room(&mut lock(&busy), peer) {
                    continue;
                }
                lock(&busy).push(Conversation { peer, socket: second, asked: false });
                let (said, busy) = (said.clone(), &busy);
                scope.spawn(move || {
                    self.converse(socket, peer, busy, &said);
                    lock(busy).retain(|other| other.peer != peer);
                });
            };
            lock(&busy).iter().for_each(Conversation::cut);
            outcome
        });
        // All conversations are over. Who became a node while this was about to end otherwise is told of.
        drained(&heard, outcome)
    }

    /// The next one who connects, if somebody does within a moment.
    fn next(&self) -> Option<(TcpStream, SocketAddr)> {
        let mut polled = [PollFd::new(self.listener.as_fd(), PollFlags::POLLIN)];
        poll(&mut polled, LOOK).ok()?;
        let accepted = self.listener.accept();
        if accepted.as_ref().is_err_and(|why| why.kind() != io::ErrorKind::WouldBlock) {
            // Out of descriptors, perhaps; not as fast as it can.
            thread::sleep(Duration::from_millis(10));
        }
        let (socket, peer) = accepted.ok()?;
        socket.set_nonblocking(false).ok()?;
        Some((socket, peer))
    }

    /// Everything with one who connected. What breaks off here is the other side's affair.
    fn converse(
        &self,
        socket: TcpStream,
        peer: SocketAddr,
        busy: &Mutex<Vec<Conversation>>,
        said: &Sender<Said>,
    ) -> Option<()> {
        socket.set_nodelay(true).ok();
        let tls = ServerConnection::new(Arc::clone(&self.config)).ok()?;
        let mut stream = StreamOwned::new(tls, Timed::new(socket, PATIENCE));
        while stream.conn.is_handshaking() {
            stream.conn.complete_io(&mut stream.sock).ok()?;
        }
        if stream.conn.alpn_protocol() != Some(ALPN) {
            return None;
        }
        let request = Request::read(&mut stream).ok()?;
        lock(busy).iter_mut().filter(|other| other.peer == peer).for_each(|this| this.asked = true);
        match self.admit(&request, peer) {
            Ok((node, Admitted { ca, node: certificate, crl })) => {
                // First: who keeps the conversation open does not keep it secret that he joined.
                said.send(Said::Joined(Box::new(Joined { node, from: peer, confirmed: false }))).ok();
                let (ca, certificate, crl) = (ca.to_vec(), certificate.to_vec(), crl.to_vec());
                let answer = Answer::Welcome { ca, node: certificate, crl };
                let stored = send(&mut stream, &answer).and_then(|()| {
                    let mut stored = [0];
                    io::Read::read_exact(&mut stream, &mut stored)?;
                    Ok(stored == [1])
                });
                said.send(Said::Confirmed(stored.unwrap_or(false))).ok()
            }
            Err((why, what)) => {
                send(&mut stream, &Answer::Refused(why.to_string())).ok();
                what.and_then(|what| said.send(what).ok())
            }
        }
    }

    fn admit(
        &self,
        request: &Request,
        peer: SocketAddr,
    ) -> Result<(Node, Admitted), (Refused, Option<Said>)> {
        let address = (request.port != 0).then(|| SocketAddr::new(peer.ip().to_canonical(), request.port));
        let ours = same(&request.secret, &self.token.secret);
        let refused = if ours {
            match self.authority.admit(&request.secret, &request.csr, address) {
                Ok(admitted) => return Ok(admitted),
                Err(refused) => refused,
            }
        } else {
            self.authority.why_not(&request.secret)
        };
        let said = match &refused {
            // Whoever knew a secret once guesses nothing.
            Refused::Used | Refused::Expired | Refused::Void | Refused::Store(_) => None,
            Refused::Unknown | Refused::Request => {
                let before = self.wrong.fetch_add(1, Ordering::Relaxed);
                (before.saturating_add(1) >= MAX_TRIES).then_some(Said::Void)
            }
        };
        match refused {
            Refused::Store(why) => Err((Refused::Unknown, Some(Said::Failed(why)))),
            other => Err((other, said)),
        }
    }
}

impl Conversation {
    fn cut(&self) {
        self.socket.shutdown(Shutdown::Both).ok();
    }
}

/// Makes room in `busy` for one with `peer`; `false`: there is none.
fn make_room(busy: &mut Vec<Conversation>, peer: SocketAddr) -> bool {
    let same = |other: &Conversation| origin(other.peer.ip()) == origin(peer.ip());
    let crowded = busy.iter().filter(|other| same(other)).count() >= MOST_OF_ONE;
    if !crowded && busy.len() < MOST {
        return true;
    }
    let idle = busy.iter().position(|other| !other.asked && (!crowded || same(other)));
    // It ends by that.
    idle.map(|at| busy.remove(at).cut()).is_some()
}

/// Who has an address of IPv6 has all those of its subnet, a /64.
fn origin(ip: IpAddr) -> IpAddr {
    match ip.to_canonical() {
        IpAddr::V6(ip) => {
            let [a, b, c, d, ..] = ip.segments();
            IpAddr::from([a, b, c, d, 0, 0, 0, 0])
        }
        ip @ IpAddr::V4(_) => ip,
    }
}

/// `joined`, with the new node's word that it stored its certificate if it gives one before `stop`. That it has
/// joined is certain already.
fn confirmed(mut joined: Box<Joined>, heard: &Receiver<Said>, stop: &dyn Fn() -> bool) -> Box<Joined> {
    while !stop() {
        match heard.recv_timeout(Duration::from_millis(LOOK.into())) {
            Ok(Said::Confirmed(stored)) => {
                joined.confirmed = stored;
                break;
            }
            Ok(Said::Joined(_) | Said::Void | Said::Failed(_)) | Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    joined
}

/// `outcome`, with what was said besides of somebody who joined.
fn drained(heard: &Receiver<Said>, mut outcome: Outcome) -> Outcome {
    for said in heard.try_iter() {
        match (said, &mut outcome) {
            (Said::Confirmed(stored), Outcome::Joined(joined)) => joined.confirmed |= stored,
            (Said::Joined(joined), other) if !matches!(other, Outcome::Joined(_)) => {
                *other = Outcome::Joined(joined);
            }
            _ => {}
        }
    }
    outcome
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

fn same(one: &Secret, other: &Secret) -> bool {
    one.bytes().ct_eq(other.bytes()).into()
}

fn send(stream: &mut StreamOwned<ServerConnection, Timed>, answer: &Answer) -> io::Result<()> {
    stream.write_all(&answer.encode())?;
    stream.conn.send_close_notify();
    stream.flush()
}

/// TLS as the authority itself, with a certificate that lives as long as the invitation.
fn config(authority: &Authority, life: Duration) -> Result<Arc<ServerConfig>, Error> {
    let failed = |why| Error::crypto("TLS cannot be set up to invite", &why);
    let (certificate, key) = authority.signer().inviter(life.saturating_add(SKEW))?;
    let chain = vec![certificate, authority.signer().certificate().clone()];
    let mut config = ServerConfig::builder_with_provider(loaded::provider())
        .with_protocol_versions(&[&TLS13])
        .map_err(failed)?
        .with_no_client_auth()
        .with_single_cert(chain, PrivateKeyDer::Pkcs8(key))
        .map_err(failed)?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

/// The addresses by which others may reach this PC at `port`, or, if it is alone, it itself.
///
/// # Errors
/// The kernel does not say.
pub fn addresses(port: u16) -> io::Result<Vec<SocketAddr>> {
    let mut found = Vec::new();
    for interface in nix::ifaddrs::getifaddrs()? {
        use nix::net::if_::InterfaceFlags;
        let up = interface.flags.contains(InterfaceFlags::IFF_UP);
        let Some(address) = interface.address.filter(|_| up) else { continue };
        if let Some(v4) = address.as_sockaddr_in() {
            found.push(IpAddr::V4(v4.ip()));
        } else if let Some(v6) = address.as_sockaddr_in6() {
            found.push(IpAddr::V6(v6.ip()));
        }
    }
    let near = |ip: &IpAddr| match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    };
    found.retain(|ip| !ip.is_loopback() && !near(ip));
    if found.is_empty() {
        found.push(IpAddr::from([127, 0, 0, 1]));
    }
    // IPv4 first: it is what household networks have.
    found.sort_by_key(IpAddr::is_ipv6);
    found.dedup();
    found.truncate(super::token::MAX_ADDRESSES);
    Ok(found.into_iter().map(|ip| SocketAddr::new(ip, port)).collect())
}

/// Listens at `address`; without one at the [usual port](PORT) of all, or at any if that is taken.
///
/// # Errors
/// The address cannot be listened at.
pub fn listen(address: Option<SocketAddr>) -> io::Result<TcpListener> {
    if let Some(address) = address {
        return TcpListener::bind(address);
    }
    let any = |port| {
        // Dual-stack where there is IPv6.
        TcpListener::bind(("::", port)).or_else(|_| TcpListener::bind(("0.0.0.0", port)))
    };
    any(PORT).or_else(|_| any(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Conversations with these addresses, oldest first.
    fn conversations(listener: &TcpListener, peers: &[SocketAddr]) -> Vec<Conversation> {
        let to = listener.local_addr().expect("an address");
        let one = |peer: &SocketAddr| {
            let socket = TcpStream::connect(to).expect("it listens");
            Conversation { peer: *peer, socket, asked: false }
        };
        peers.iter().map(one).collect()
    }

    fn v6(net: u16, host: u16) -> SocketAddr {
        (IpAddr::from([0xfd00, 0, 0, net, 0, 0, 0, host]), host).into()
    }

    #[test]
    fn the_oldest_of_a_crowd_that_asks_for_nothing_makes_room() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let crowd: Vec<_> = (1..=4).map(|host| v6(1, host)).collect();
        let mut busy = conversations(&listener, &[vec![v6(2, 9)], crowd].concat());
        busy[1].asked = true;
        assert!(make_room(&mut busy, v6(3, 1)) && busy.len() == 5, "there is room for another subnet");
        assert!(make_room(&mut busy, v6(1, 5)));
        let left: Vec<_> = busy.iter().map(|one| one.peer).collect();
        assert_eq!(left, [v6(2, 9), v6(1, 1), v6(1, 3), v6(1, 4)], "of its own subnet the oldest idle one");

        let all: Vec<_> = (0..16).map(|net| v6(net, 1)).collect();
        let mut busy = conversations(&listener, &all);
        busy[0].asked = true;
        assert!(make_room(&mut busy, v6(99, 1)));
        assert_eq!((busy.len(), busy[0].peer, busy[1].peer), (15, all[0], all[2]));
        let mut busy = conversations(&listener, &all);
        busy.iter_mut().for_each(|one| one.asked = true);
        assert!(!make_room(&mut busy, v6(99, 1)), "who is joining is not cut off");
    }
}
