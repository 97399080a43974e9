//! The [`Source`] that finds pages on helpers: the [core](super::core) of one handler with its places.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Instant;

use transport::buffer::Buffer;
use transport::ring::{self, Completion, Ring};

use super::ask::News;
use super::control::{Command, Mailbox};
use super::core::Core;
use super::file::SwapFile;
use super::remote::{RELEASE_TIMEOUT, Remote};
use super::{Done, Source, Urgency};
use crate::memory::fault::Page;

/// What carries a place's requests.
pub(super) enum Link {
    Helper(Box<Remote>),
    File(Box<SwapFile>),
}

/// The pages of one handler, wherever they are kept. Made by [`connect`](super::connect).
pub struct Stores {
    core: Core,
    /// By the numbers of the core's places.
    links: Vec<Link>,
    mailbox: Arc<Mailbox>,
    source: Option<ring::Source>,
    armed: bool,
    news: Vec<News>,
}

impl Stores {
    pub(super) fn new(core: Core, links: Vec<Link>, mailbox: Arc<Mailbox>) -> Self {
        Self { core, links, mailbox, source: None, armed: false, news: Vec::new() }
    }

    /// Hands what was heard of a place to the core.
    fn hear(&mut self, place: usize, now: Instant) {
        for news in self.news.drain(..) {
            self.core.news(place, news, now);
        }
    }

    /// Does what other threads ask for.
    fn read_mail(&mut self, ring: &mut Ring, now: Instant) {
        for command in self.mailbox.take() {
            match command {
                Command::Drain(place) => self.core.drain(place),
                Command::Add(mut remote, counters, quota) => {
                    let place = self.core.add(remote.agent(), counters, quota, false, now);
                    if let Err(error) = remote.attach(ring) {
                        self.core.news(place, News::Left(error.to_string()), now);
                    }
                    self.links.push(Link::Helper(remote));
                }
            }
        }
    }

    /// Sends what the core asks.
    fn send(&mut self, ring: &mut Ring, now: Instant) {
        for place in 0..self.links.len() {
            let at = &mut self.core.places[place];
            let leave = std::mem::take(&mut at.leave);
            match &mut self.links[place] {
                Link::Helper(remote) => {
                    remote.push(&mut at.asks);
                    if leave {
                        remote.leave(now);
                    }
                }
                Link::File(file) => file.push(ring, &mut at.asks, &mut self.news),
            }
            self.hear(place, now);
        }
    }

    /// Lets every connection do what is due.
    fn drive(&mut self, ring: &mut Ring, now: Instant) -> Option<Instant> {
        let mut next = None;
        for place in 0..self.links.len() {
            let Link::Helper(remote) = &mut self.links[place] else { continue };
            let due = remote.tick(ring, now, &mut self.news);
            if remote.over() {
                remote.close(ring);
            }
            next = [next, due].into_iter().flatten().min();
            if !self.news.is_empty() {
                self.hear(place, now);
                next = Some(now);
            }
        }
        next
    }

    fn arm(&mut self, ring: &mut Ring) {
        if let Some(source) = self.source
            && !std::mem::replace(&mut self.armed, true)
        {
            ring.poll_readable(self.mailbox.bell().as_raw_fd(), false, source.token(0));
        }
    }
}

impl Source for Stores {
    fn attach(&mut self, ring: &mut Ring) -> io::Result<()> {
        self.source = Some(ring.source());
        for link in &mut self.links {
            match link {
                Link::Helper(remote) => remote.attach(ring)?,
                Link::File(file) => file.attach(ring),
            }
        }
        Ok(())
    }

    fn fetch(&mut self, first: Page, count: u32, urgency: Urgency) {
        self.core.fetch(first, count, urgency, Instant::now());
    }

    fn store(&mut self, first: Page, content: Buffer) {
        self.core.store(first, content, Instant::now());
    }

    fn forget(&mut self, first: Page, count: u32) {
        self.core.forget(first, count, Instant::now());
    }

    fn short(&self) -> u64 {
        self.core.short()
    }

    fn complete(&mut self, ring: &mut Ring, completion: Completion, done: &mut Vec<Done>) -> bool {
        let now = Instant::now();
        if Some(completion.token.source()) == self.source {
            self.armed = false;
            self.read_mail(ring, now);
            return true;
        }
        for place in 0..self.links.len() {
            let mine = match &mut self.links[place] {
                Link::Helper(remote) => remote.complete(ring, completion, &mut self.news),
                Link::File(file) => file.complete(ring, completion, &mut self.news),
            };
            if mine {
                self.hear(place, now);
                done.append(&mut self.core.done);
                return true;
            }
        }
        false
    }

    fn tick(&mut self, ring: &mut Ring, now: Instant, done: &mut Vec<Done>) -> Option<Instant> {
        self.arm(ring);
        let core = self.core.tick(now);
        self.send(ring, now);
        let links = self.drive(ring, now);
        let again = self.core.wants_tick().then_some(now);
        done.append(&mut self.core.done);
        [core, links, again].into_iter().flatten().min()
    }

    fn close(&mut self, ring: &mut Ring) {
        let now = Instant::now();
        for link in &mut self.links {
            if let Link::Helper(remote) = link {
                remote.leave(now);
            }
        }
        self.wait(ring, now + RELEASE_TIMEOUT);
        for link in &mut self.links {
            if let Link::Helper(remote) = link {
                remote.close(ring);
            }
        }
    }
}

impl Stores {
    /// Waits until every lease was given back and the kernel is done with every buffer, for some time at most.
    fn wait(&mut self, ring: &mut Ring, until: Instant) {
        let mut others = Vec::new();
        loop {
            let now = Instant::now();
            let mut next = Some(until);
            let mut busy = false;
            for link in &mut self.links {
                match link {
                    Link::Helper(remote) if !remote.over() => {
                        busy = true;
                        next = [next, remote.tick(ring, now, &mut self.news)].into_iter().flatten().min();
                    }
                    Link::Helper(_) => {}
                    Link::File(file) => busy |= file.is_busy(),
                }
            }
            self.news.clear();
            if !busy || now >= until {
                break;
            }
            if ring.wait(next.map(|next| next.saturating_duration_since(now))).is_err() {
                break;
            }
            while let Some(completion) = ring.reap() {
                let mine = self.links.iter_mut().any(|link| match link {
                    Link::Helper(remote) => remote.complete(ring, completion, &mut self.news),
                    Link::File(file) => file.complete(ring, completion, &mut self.news),
                });
                if !mine {
                    others.push(completion);
                }
            }
        }
        ring.put_back(others);
    }
}
