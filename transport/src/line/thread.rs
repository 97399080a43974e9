//! A line with a thread of its own.

use std::io;
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use super::{Asking, Hear, Sender};
use crate::channel::{Config, Names};
use crate::ring::Ring;
use crate::wire::Body;

/// The ring's size: one connection and one bell.
const ENTRIES: u32 = 64;

/// The thread of a line. Dropped, it ends the line and waits for the thread.
pub struct Driven {
    sender: Sender,
    thread: Option<JoinHandle<()>>,
}

/// Drives a line on a thread called `name`, which first calls `begin` (to confine itself, for instance). The rest is as
/// for [`Asking::new`].
///
/// # Errors
/// There is no thread, descriptor or io_uring to be had.
pub fn start(
    name: &str,
    config: Config,
    purpose: Body,
    sender: Sender,
    hear: Arc<dyn Hear>,
    begin: impl FnOnce() + Send + 'static,
) -> io::Result<Driven> {
    let names = Names::of(&config.address)?;
    let (made, ready) = std::sync::mpsc::channel();
    let ours = sender.clone();
    let thread = Builder::new().name(name.to_owned()).spawn(move || {
        // A ring belongs to the thread that made it.
        let mut ring = match Ring::new(ENTRIES) {
            Ok(ring) => ring,
            Err(e) => return drop(made.send(Err(e))),
        };
        let mut line = Asking::new(config, names, purpose, sender, Arc::clone(&hear), &mut ring);
        let _ = made.send(Ok(()));
        begin();
        if let Err(e) = drive(&mut ring, &mut line) {
            line.close(&mut ring);
            hear.over(&format!("the kernel refuses io_uring: {e}"));
        }
    })?;
    ready.recv().unwrap_or(Ok(()))?;
    Ok(Driven { sender: ours, thread: Some(thread) })
}

fn drive(ring: &mut Ring, line: &mut Asking) -> io::Result<()> {
    while !line.is_over() {
        let now = Instant::now();
        let due = line.tick(ring, now);
        if line.is_over() {
            break;
        }
        ring.wait(due.map(|due| due.saturating_duration_since(now)))?;
        while let Some(completion) = ring.reap() {
            line.complete(ring, completion);
        }
    }
    // What is cancelled completes before the ring goes.
    ring.wait(Some(Duration::ZERO))
}

impl Drop for Driven {
    fn drop(&mut self) {
        self.sender.end("its user is done");
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != std::thread::current().id()
        {
            // It has nothing to say.
            let _ = thread.join();
        }
    }
}
