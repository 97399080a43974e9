//! Whom the agent lets in: accepted sockets become connections, and those whose peers have not shown who they are
//! keep nobody else out.
//!
//! `limits.connections` counts peers that are known: their hello is here, and their proof where there is TLS
//! (`transport::sessions` refuses the rest). Before that a peer is a stranger. Strangers have a few places of their
//! own, fewer still each address, and who comes later takes the place of the oldest: a handshake takes
//! milliseconds, so an honest peer is through before it is the oldest, and one that only sits there loses.

use std::io;
use std::net::{IpAddr, Ipv6Addr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::connection;
use crate::lists::Answers;
use crate::serve::Agent;
use crate::volume::lock;

/// Strangers at once.
pub(crate) const STRANGERS: usize = 32;
/// Strangers of one address at once: a console's disks come back together after a cut.
const OF_ONE_ADDRESS: usize = 8;
/// So many sockets are accepted before the accepting loop looks after everything else again.
const AT_ONCE: usize = 64;
/// A connection's thread that did not come round for so long hangs.
const HANG: Duration = Duration::from_secs(30);

/// [`Handle::standing`]: nobody knows who it is.
const STRANGER: u8 = 0;
/// Its hello is here.
const KNOWN: u8 = 1;
/// It is to make room.
const EVICTED: u8 = 2;

/// One connection's thread as the others see it.
pub(crate) struct Handle {
    pub(crate) wake: EventFd,
    /// What became of lists of revoked certificates that the peer sent.
    pub(crate) lists: Answers,
    /// Where the peer connects from.
    pub(crate) address: IpAddr,
    /// What the peer is to the agent: one of the constants above.
    standing: AtomicU8,
    /// When it last came round, in milliseconds since the agent's start.
    beat: AtomicU64,
    born: Instant,
}

impl Handle {
    fn new(address: IpAddr, born: Instant) -> io::Result<Self> {
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let (standing, beat) = (AtomicU8::new(STRANGER), AtomicU64::new(0));
        let handle = Self { wake, lists: Answers::default(), address, standing, beat, born };
        handle.beat(Instant::now());
        Ok(handle)
    }

    pub(crate) fn beat(&self, now: Instant) {
        let millis = now.saturating_duration_since(self.born).as_millis();
        self.beat.store(u64::try_from(millis).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    pub(crate) fn is_alive(&self) -> bool {
        let beat = self.born + Duration::from_millis(self.beat.load(Ordering::Relaxed));
        beat.elapsed() < HANG
    }

    /// Takes the wake-up, so that the next one is seen.
    pub(crate) fn woken(&self) {
        self.wake.read().ok();
    }

    /// The peer's hello is here; it makes room for nobody any more, unless it was told so just now.
    pub(crate) fn is_known_now(&self) {
        self.stand(KNOWN);
    }

    /// Whether the peer's hello is here.
    pub(crate) fn is_known(&self) -> bool {
        self.standing.load(Ordering::Relaxed) == KNOWN
    }

    /// Whether the connection is to end, to make room.
    pub(crate) fn is_evicted(&self) -> bool {
        self.standing.load(Ordering::Relaxed) == EVICTED
    }

    fn is_stranger(&self) -> bool {
        self.standing.load(Ordering::Relaxed) == STRANGER
    }

    fn evict(&self) {
        if self.stand(EVICTED) {
            self.wake.write(1).ok();
        }
    }

    fn stand(&self, as_what: u8) -> bool {
        self.standing.compare_exchange(STRANGER, as_what, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }
}

/// Accepts what waits, at most [`AT_ONCE`] sockets: who connects without end keeps the loop from nothing else.
pub(crate) fn accept(agent: &Arc<Agent>, listener: &TcpListener) {
    for _ in 0..AT_ONCE {
        let (socket, peer) = match listener.accept() {
            Ok(accepted) => accepted,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
            Err(error) => {
                // Out of descriptors or the peer is gone already; others can still be served.
                agent.unserved.note(|| format!("a connection could not be accepted: {error}"));
                thread::sleep(Duration::from_millis(10));
                return;
            }
        };
        if !make_room(agent, peer.ip()) {
            agent.unserved.note(|| format!("{peer} was refused: too many connections are ending"));
            continue;
        }
        if let Err(error) = begin(agent, socket, peer.ip()) {
            agent.unserved.note(|| format!("{peer} could not be served: {error}"));
        }
    }
}

/// Makes room for one more stranger at `address`. `false`: those that must go are not gone yet, or those that were
/// replaced, and every one of them is a thread.
fn make_room(agent: &Agent, address: IpAddr) -> bool {
    let connections = lock(&agent.connections);
    if connections.len() >= agent.most.saturating_mul(2).saturating_add(2 * STRANGERS) {
        return false;
    }
    // In the order in which they came.
    let strangers: Vec<&Arc<Handle>> = connections.iter().filter(|handle| handle.is_stranger()).collect();
    let network = network(address);
    let mut neighbours = strangers.iter().filter(|handle| self::network(handle.address) == network);
    let victim = if neighbours.clone().count() >= OF_ONE_ADDRESS {
        neighbours.next()
    } else if strangers.len() >= STRANGERS {
        strangers.first()
    } else {
        None
    };
    if let Some(victim) = victim {
        victim.evict();
    }
    true
}

/// What counts as one address: whoever has one of IPv6 has at least a /64 of them.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() & !u128::from(u64::MAX))),
        v4 @ IpAddr::V4(_) => v4,
    }
}

/// Starts a connection's thread.
fn begin(agent: &Arc<Agent>, socket: TcpStream, address: IpAddr) -> io::Result<()> {
    let handle = Arc::new(Handle::new(address, agent.born)?);
    let (shared, ours) = (Arc::clone(agent), Arc::clone(&handle));
    lock(&agent.connections).push(Arc::clone(&handle));
    let body = move || {
        let gone = Gone(&shared, &ours);
        if let Err(error) = connection::serve(gone.0, gone.1, socket) {
            shared.unserved.note(|| format!("the ring of the connection from {address} failed: {error}"));
        }
    };
    thread::Builder::new().name("connection".to_owned()).spawn(body).map(drop).inspect_err(|_| {
        lock(&agent.connections).retain(|h| !Arc::ptr_eq(h, &handle));
    })
}

/// Takes a connection off the list, also when its thread panics.
struct Gone<'a>(&'a Arc<Agent>, &'a Arc<Handle>);

impl Drop for Gone<'_> {
    fn drop(&mut self) {
        lock(&self.0.connections).retain(|handle| !Arc::ptr_eq(handle, self.1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::serve::testing;

    /// An agent with connections from these addresses, in this order, that no thread serves.
    fn visited(addresses: &[&str]) -> (tempfile::TempDir, Agent, Vec<Arc<Handle>>) {
        let (folder, agent) = testing::agent(Duration::from_secs(10));
        let handle = |text: &&str| {
            Arc::new(Handle::new(text.parse().expect("an address"), Instant::now()).expect("a descriptor"))
        };
        let handles: Vec<Arc<Handle>> = addresses.iter().map(handle).collect();
        lock(&agent.connections).extend(handles.iter().cloned());
        (folder, agent, handles)
    }

    fn evicted(handles: &[Arc<Handle>]) -> Vec<usize> {
        handles.iter().enumerate().filter(|(_, handle)| handle.is_evicted()).map(|(index, _)| index).collect()
    }

    #[test]
    fn the_oldest_stranger_of_an_address_that_has_enough_makes_room_and_nobody_elses() {
        let mut addresses = vec!["10.0.0.7"];
        addresses.extend(["10.0.0.9"; OF_ONE_ADDRESS]);
        let (_folder, agent, handles) = visited(&addresses);
        assert!(make_room(&agent, "10.0.0.7".parse().expect("an address")));
        assert_eq!(evicted(&handles), [0; 0]);
        handles[1].is_known_now();
        assert!(make_room(&agent, "10.0.0.9".parse().expect("an address")));
        assert_eq!(evicted(&handles), [0; 0], "who is known takes no stranger's place");
        lock(&agent.connections).push(handles[2].clone());
        assert!(make_room(&agent, "::ffff:10.0.0.9".parse().expect("an address")));
        assert_eq!(evicted(&handles), [2]);
    }

    #[test]
    fn the_oldest_stranger_makes_room_where_there_are_many_from_everywhere() {
        let texts: Vec<String> = (0..STRANGERS).map(|n| format!("2001:db8:0:{n:x}::1")).collect();
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        let (_folder, agent, handles) = visited(&texts);
        handles[0].is_known_now();
        assert!(make_room(&agent, "10.0.0.1".parse().expect("an address")));
        assert_eq!(evicted(&handles), [0; 0]);
        lock(&agent.connections).push(Arc::new(
            Handle::new("10.0.0.1".parse().expect("an address"), Instant::now()).expect("a descriptor"),
        ));
        assert!(make_room(&agent, "10.0.0.2".parse().expect("an address")));
        assert_eq!(evicted(&handles), [1]);
        handles[1].is_known_now();
        assert!(handles[1].is_evicted(), "it is too late for it");
    }

    #[test]
    fn a_whole_network_of_ipv6_counts_as_one_address() {
        let texts: Vec<String> = (0..OF_ONE_ADDRESS).map(|n| format!("2001:db8::{n:x}:1")).collect();
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        let (_folder, agent, handles) = visited(&texts);
        assert!(make_room(&agent, "2001:db8::ffff:2".parse().expect("an address")));
        assert_eq!(evicted(&handles), [0]);
    }

    #[test]
    fn a_flood_of_connections_gives_the_accepting_loop_its_turn() {
        let (_folder, agent) = testing::agent(Duration::from_secs(10));
        let agent = Arc::new(agent);
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        listener.set_nonblocking(true).expect("a socket");
        let address = listener.local_addr().expect("an address");
        let _sockets: Vec<TcpStream> =
            (0..AT_ONCE + 10).map(|_| TcpStream::connect(address).expect("there is room")).collect();
        accept(&agent, &listener);
        assert!(listener.accept().is_ok(), "the rest waits for the next round");
    }
}
