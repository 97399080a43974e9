//! A network between PCs, inside the lab's own process: a hub whose links can be cut, delayed and healed.
//!
//! QEMU's `-netdev stream` sends each Ethernet frame with its length (big endian, 4 bytes) before it. Each link
//! has its own bounded queue and thread, so that a PC that does not listen (frozen, dead) delays nobody else.

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;

/// Frames that wait for one PC; more are dropped, as a switch would.
const QUEUE: usize = 1024;
/// QEMU's own largest frame.
const MAX_FRAME: usize = 68 << 10;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Joins PCs; they know it by its name.
#[derive(Clone)]
pub struct Network {
    hub: Arc<Hub>,
}

struct Hub {
    name: String,
    index: u8,
    folder: PathBuf,
    links: Mutex<BTreeMap<String, Arc<Link>>>,
    over: AtomicBool,
}

/// One PC's cable.
#[derive(Default)]
struct Link {
    cut: AtomicBool,
    delay_us: AtomicU64,
    /// Of a million frames, this many are lost.
    loss_ppm: AtomicU64,
    frames: AtomicU64,
    waiting: Mutex<Waiting>,
    changed: Condvar,
}

#[derive(Default)]
struct Waiting {
    queue: VecDeque<(Instant, Arc<[u8]>)>,
    stream: Option<UnixStream>,
    over: bool,
}

impl Network {
    pub(crate) fn new(name: &str, index: u8, folder: &Path) -> Self {
        Self {
            hub: Arc::new(Hub {
                name: name.to_owned(),
                index,
                folder: folder.to_owned(),
                links: Mutex::default(),
                over: AtomicBool::new(false),
            }),
        }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.hub.name
    }

    pub(crate) fn index(&self) -> u8 {
        self.hub.index
    }

    /// The socket that this PC's network card connects to; the PC may come, go and come back.
    pub(crate) fn plug(&self, pc: &str) -> Result<PathBuf> {
        let path = self.hub.folder.join(format!("{}-{pc}.net", self.hub.name));
        let mut links = lock(&self.hub.links);
        if links.contains_key(pc) {
            return Ok(path);
        }
        let listener = UnixListener::bind(&path)?;
        let link = Arc::new(Link::default());
        links.insert(pc.to_owned(), Arc::clone(&link));
        let (hub, name) = (Arc::clone(&self.hub), pc.to_owned());
        let sender = Arc::clone(&link);
        thread::spawn(move || sender.send_all());
        thread::spawn(move || {
            for stream in listener.incoming().map_while(io::Result::ok) {
                if hub.over.load(Ordering::Relaxed) {
                    return;
                }
                let Ok(writer) = stream.try_clone() else { continue };
                lock(&link.waiting).stream = Some(writer);
                let _ = hub.receive_all(&name, &link, stream);
            }
        });
        Ok(path)
    }

    fn link(&self, pc: &str) -> Arc<Link> {
        lock(&self.hub.links).get(pc).cloned().unwrap_or_default()
    }

    /// Cuts this PC's cable: frames in both directions vanish.
    pub fn cut(&self, pc: &str) {
        let link = self.link(pc);
        link.cut.store(true, Ordering::Relaxed);
        lock(&link.waiting).queue.clear();
    }

    /// Mends this PC's cable: neither cut, nor slow, nor lossy.
    pub fn heal(&self, pc: &str) {
        let link = self.link(pc);
        link.cut.store(false, Ordering::Relaxed);
        link.delay_us.store(0, Ordering::Relaxed);
        link.loss_ppm.store(0, Ordering::Relaxed);
    }

    /// Frames to and from this PC take this much longer, each way.
    pub fn delay(&self, pc: &str, delay: Duration) {
        let micros = u64::try_from(delay.as_micros()).unwrap_or(u64::MAX);
        self.link(pc).delay_us.store(micros, Ordering::Relaxed);
    }

    /// Of the frames to and from this PC, this share (0 to 1) is lost.
    pub fn lose(&self, pc: &str, share: f64) {
        self.link(pc).loss_ppm.store((share.clamp(0.0, 1.0) * 1e6) as u64, Ordering::Relaxed);
    }

    /// How many frames this PC has sent.
    pub fn frames_from(&self, pc: &str) -> u64 {
        self.link(pc).frames.load(Ordering::Relaxed)
    }

    pub(crate) fn shut_down(&self) {
        self.hub.over.store(true, Ordering::Relaxed);
        for (name, link) in lock(&self.hub.links).iter() {
            link.end();
            // Wakes the thread that accepts.
            let _ = UnixStream::connect(self.hub.folder.join(format!("{}-{name}.net", self.hub.name)));
        }
    }
}

impl Hub {
    fn receive_all(&self, from: &str, link: &Link, stream: UnixStream) -> io::Result<()> {
        let mut stream = BufReader::with_capacity(256 << 10, stream);
        loop {
            let mut length = [0; 4];
            stream.read_exact(&mut length)?;
            let frame_length = u32::from_be_bytes(length) as usize;
            if frame_length > MAX_FRAME {
                return Err(io::Error::from(io::ErrorKind::InvalidData));
            }
            let mut frame = vec![0; 4 + frame_length];
            frame[..4].copy_from_slice(&length);
            stream.read_exact(&mut frame[4..])?;
            let number = link.frames.fetch_add(1, Ordering::Relaxed);
            if link.drops(number) {
                continue;
            }
            let frame: Arc<[u8]> = frame.into();
            let others: Vec<_> = lock(&self.links)
                .iter()
                .filter(|(name, _)| *name != from)
                .map(|(_, l)| Arc::clone(l))
                .collect();
            for other in others {
                let delay = link.delay_us.load(Ordering::Relaxed) + other.delay_us.load(Ordering::Relaxed);
                if !other.drops(number) {
                    other.enqueue(Instant::now() + Duration::from_micros(delay), Arc::clone(&frame));
                }
            }
        }
    }
}

impl Link {
    fn drops(&self, number: u64) -> bool {
        // Spread evenly and without chance, so that a test that fails fails again.
        let scattered = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        self.cut.load(Ordering::Relaxed)
            || (scattered * 1_000_000) >> 32 < self.loss_ppm.load(Ordering::Relaxed)
    }

    fn enqueue(&self, due: Instant, frame: Arc<[u8]>) {
        let mut waiting = lock(&self.waiting);
        if waiting.queue.len() < QUEUE {
            waiting.queue.push_back((due, frame));
            self.changed.notify_one();
        }
    }

    fn end(&self) {
        let mut waiting = lock(&self.waiting);
        waiting.over = true;
        if let Some(stream) = waiting.stream.take() {
            let _ = stream.shutdown(Shutdown::Both);
        }
        self.changed.notify_all();
    }

    fn send_all(&self) {
        let mut waiting = lock(&self.waiting);
        loop {
            if waiting.over {
                return;
            }
            let now = Instant::now();
            match waiting.queue.front() {
                None => waiting = self.changed.wait(waiting).unwrap_or_else(PoisonError::into_inner),
                Some((due, _)) if *due > now => {
                    let pause = *due - now;
                    waiting =
                        self.changed.wait_timeout(waiting, pause).unwrap_or_else(PoisonError::into_inner).0;
                }
                Some(_) => {
                    let Some((_, frame)) = waiting.queue.pop_front() else { continue };
                    let Some(stream) = waiting.stream.as_ref().and_then(|s| s.try_clone().ok()) else {
                        continue;
                    };
                    drop(waiting);
                    // A write may wait for a PC that is frozen; its queue then fills and drops.
                    let _ = (&stream).write_all(&frame);
                    waiting = lock(&self.waiting);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(content: &[u8]) -> Vec<u8> {
        let mut bytes = u32::try_from(content.len()).expect("short").to_be_bytes().to_vec();
        bytes.extend_from_slice(content);
        bytes
    }

    fn receive(stream: &mut UnixStream, patience: Duration) -> Option<Vec<u8>> {
        stream.set_read_timeout(Some(patience)).expect("a socket");
        let mut length = [0; 4];
        stream.read_exact(&mut length).ok()?;
        let mut content = vec![0; u32::from_be_bytes(length) as usize];
        stream.read_exact(&mut content).ok()?;
        Some(content)
    }

    #[test]
    fn a_cut_link_passes_nothing_a_healed_one_all_and_a_slow_one_later() {
        let folder = tempfile::tempdir().expect("a folder");
        let network = Network::new("lan", 0, folder.path());
        let plug = |pc| {
            let path = network.plug(pc).expect("a socket");
            UnixStream::connect(path).expect("connected")
        };
        let (mut a, mut b) = (plug("a"), plug("b"));
        thread::sleep(Duration::from_millis(50));
        let (short, long) = (Duration::from_millis(100), Duration::from_secs(10));

        a.write_all(&frame(b"one")).expect("sent");
        assert_eq!(receive(&mut b, long).as_deref(), Some(&b"one"[..]));

        network.cut("b");
        a.write_all(&frame(b"two")).expect("sent");
        assert_eq!(receive(&mut b, short), None);

        network.heal("b");
        network.delay("a", Duration::from_millis(200));
        let start = Instant::now();
        a.write_all(&frame(b"three")).expect("sent");
        assert_eq!(receive(&mut b, long).as_deref(), Some(&b"three"[..]));
        assert!(start.elapsed() >= Duration::from_millis(200));
        network.shut_down();
    }

    #[test]
    fn a_lossy_link_loses_about_its_share() {
        let link = Link::default();
        link.loss_ppm.store(100_000, Ordering::Relaxed);
        let lost = (0..10_000).filter(|number| link.drops(*number)).count();
        assert!((900..1100).contains(&lost), "{lost} of 10,000 at 10 %");
    }
}
