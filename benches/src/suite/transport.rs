//! The transport beside bare sockets that carry the same bytes.

use std::net::{Ipv4Addr, TcpListener};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use devices::disk::volume::opcode;
use transport::Carrier;
use transport::blocking::Client;
use transport::buffer::Buffer;
use transport::channel::{Call, Channel, Config, Event, Names};
use transport::identity::Security;
use transport::identity::testing::{Household, security};
use transport::ring::Ring;
use transport::server::{self, Connection, Limits, Sessions};
use transport::wire::{Body, Class, MAX_PAYLOAD, Status};

use crate::agent::Agent;
use crate::bench::{Bench, Readings, Suite};
use crate::figure::Target::{self, AtLeast, AtMost};
use crate::figure::{Reading, Spec};
use crate::floor::tcp::{PingPong, Stream};
use crate::smaps;
use crate::stats::{median, micros, percentile, rate};

const fn spec(name: &'static str, unit: &'static str, baseline: &'static str, target: Target) -> Spec {
    Spec { name, unit, baseline, target: Some(target) }
}

/// See the [module](self).
pub const SUITE: Suite = Suite {
    name: "transport",
    specs: &[
        spec("transport.request_4k_depth1", "us", "bare TCP ping-pong", AtMost(1.10)),
        spec("transport.tls_request_4k_depth1", "us", "bare TCP ping-pong", AtMost(1.35)),
        spec("transport.request_4k_depth64", "1/s", "its own depth 1", AtLeast(4.0)),
        spec("transport.bulk_64k", "GB/s", "bare TCP stream", AtLeast(0.85)),
        Spec { name: "transport.tls_bulk_64k", unit: "GB/s", baseline: "bare TCP stream", target: None },
        spec("transport.urgent_p99_under_bulk", "us", "urgent p99 without bulk", AtMost(3.0)),
        spec("transport.memory_per_idle_connection", "KiB", "256 KiB", AtMost(1.0)),
    ],
    run,
};

/// Bytes of a request on the wire beside its payload: the frame's header and the body of a disk's read.
pub const REQUEST_BYTES: usize = 32 + 32;
/// Bytes of an answer on the wire beside its payload.
pub const ANSWER_BYTES: usize = 32;

/// Asks for so many bytes.
const GIVE: u16 = 0x1000;

fn run(bench: &Bench, readings: &mut Readings) -> Result<()> {
    let house = Household::new();
    let mut peer = Peer::connect(Security::Plain, Security::Plain)?;
    let mut secure = Peer::connect(security(&house.agent("attic")), security(&house.console("desk")))?;
    let mut ping = PingPong::new(REQUEST_BYTES, ANSWER_BYTES + 4096)?;
    let mut stream = Stream::new(64 << 10)?;
    let (mut bare, mut single, mut many, mut flow, mut bulk) = (vec![], vec![], vec![], vec![], vec![]);
    let (mut idle, mut busy, mut single_tls, mut bulk_tls) = (vec![], vec![], vec![], vec![]);
    let alone = Load { class: Class::Normal, size: 4096, depth: 1 };
    let urgent = Load { class: Class::Urgent, ..alone };
    let deep = Load { depth: 64, ..alone };
    let large = Load { class: Class::Bulk, size: 64 << 10, depth: 16 };
    for _ in 0..bench.rounds() {
        bare.push(median(&ping.run(bench.slice())?));
        single.push(median(&peer.run(&[alone], bench.slice())?.times));
        single_tls.push(median(&secure.run(&[alone], bench.slice())?.times));
        many.push(peer.run(&[deep], bench.slice())?.rate(4096) / 4096.0);
        flow.push(stream.run(bench.slice())? / 1e9);
        bulk.push(peer.run(&[large], bench.slice())?.rate(64 << 10) / 1e9);
        bulk_tls.push(secure.run(&[large], bench.slice())?.rate(64 << 10) / 1e9);
        idle.push(percentile(&peer.run(&[urgent], bench.slice())?.times, 0.99));
        busy.push(percentile(&peer.run(&[urgent, large], bench.slice())?.times, 0.99));
    }
    readings.add(Reading::beside("transport.request_4k_depth1", median(&single), median(&bare)));
    let carrier = format!("by {}", secure.carrier);
    let tls = Reading::beside("transport.tls_request_4k_depth1", median(&single_tls), median(&bare));
    readings.add(tls.note(carrier.clone()));
    let tls = Reading::beside("transport.tls_bulk_64k", median(&bulk_tls), median(&flow));
    readings.add(tls.note(carrier));
    let one = 1e6 / median(&single);
    readings.add(Reading::beside("transport.request_4k_depth64", median(&many), one));
    readings.add(Reading::beside("transport.bulk_64k", median(&bulk), median(&flow)));
    readings.add(Reading::beside("transport.urgent_p99_under_bulk", median(&busy), median(&idle)));
    if let Err(why) = idle_memory(bench, readings) {
        readings.missing("transport.memory_per_idle_connection", format!("{why:#}"));
    }
    Ok(())
}

/// What an agent holds for each peer that is connected and asks nothing.
fn idle_memory(bench: &Bench, readings: &mut Readings) -> Result<()> {
    const PEERS: u64 = 40;
    let volume = bench.directory().join("empty.raw");
    std::fs::File::create(&volume)?.set_len(1 << 20)?;
    let agent = Agent::start(bench, &volume, false)?;
    let connect = || -> Result<Client> {
        let mut client = Client::new(agent.address(), "bench", &Security::Plain, None)?;
        client.call(
            Class::Control,
            opcode::VOLUMES,
            &[],
            Vec::new(),
            MAX_PAYLOAD,
            Duration::from_secs(10),
        )?;
        Ok(client)
    };
    let _first = connect()?; // what the process needs once, whoever comes
    let before = smaps::held(agent.pid(), NOTHING)?.pss;
    let peers = (0..PEERS).map(|_| connect()).collect::<Result<Vec<_>>>()?;
    let after = smaps::held(agent.pid(), NOTHING)?.pss;
    drop(peers);
    let each = after.saturating_sub(before) as f64 / 1024.0 / PEERS as f64;
    let note =
        format!("the agent's proportional set size, of {PEERS} connections; kernel memory is not in it");
    readings.add(Reading::beside("transport.memory_per_idle_connection", each, 256.0).note(note));
    Ok(())
}

/// No mapping is left out: none is of this size.
const NOTHING: u64 = 0;

/// Requests of one kind that are kept in flight.
#[derive(Clone, Copy)]
struct Load {
    class: Class,
    size: usize,
    depth: usize,
}

/// What came of a slice.
struct Outcome {
    /// Of the first load's requests, in microseconds.
    times: Vec<f64>,
    elapsed: Duration,
}

impl Outcome {
    /// Bytes per second of the first load.
    fn rate(&self, size: usize) -> f64 {
        rate(self.times.len() as u64 * size as u64, self.elapsed)
    }
}

/// A channel to a thread that answers at once.
struct Peer {
    ring: Ring,
    channel: Channel,
    events: Vec<Event>,
    carrier: Carrier,
}

impl Peer {
    fn connect(theirs: Security, ours: Security) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let address = listener.local_addr()?.to_string();
        std::thread::Builder::new().name("answerer".into()).spawn(move || {
            if let Err(error) =
                listener.accept().map_err(Into::into).and_then(|(socket, _)| answer(socket, &theirs))
            {
                eprintln!("bench: the answering side ended: {error:#}");
            }
        })?;
        let mut ring = Ring::new(256)?;
        let config = Config {
            address,
            name: "bench".to_owned(),
            security: ours,
            node: None,
            dead_after: Duration::from_secs(10),
            retry_first: Duration::from_millis(10),
            retry_most: Duration::from_secs(1),
            transport: Default::default(),
        };
        let names = Names::of(&config.address)?;
        let channel = Channel::new(config, names, &mut ring);
        let mut peer = Self { ring, channel, events: Vec::new(), carrier: Carrier::Tcp };
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            peer.step()?;
            match peer.events.pop() {
                Some(Event::Opened { carrier, .. }) => {
                    peer.carrier = carrier;
                    break;
                }
                Some(Event::Lost { reason }) => bail!("The transport does not connect: {reason}"),
                _ if Instant::now() > deadline => bail!("The transport does not connect"),
                _ => {}
            }
        }
        peer.channel.ready();
        Ok(peer)
    }

    /// Sends what is ready and takes what has come; waits if there is nothing.
    fn step(&mut self) -> Result<()> {
        let now = Instant::now();
        let next = self.channel.tick(&mut self.ring, now, &mut self.events);
        if self.events.is_empty() {
            let most = Duration::from_secs(1);
            self.ring.wait(Some(next.map_or(most, |at| at.saturating_duration_since(now).min(most))))?;
        }
        while let Some(completion) = self.ring.reap() {
            self.channel.complete(&mut self.ring, completion, &mut self.events);
        }
        Ok(())
    }

    fn submit(&mut self, tag: usize, load: Load, answer: Buffer) {
        let mut body = Body::new();
        body.resize(32, 0);
        self.channel.submit(Call { answer, ..Call::new(tag as u64, GIVE, load.class, body) });
    }

    /// Keeps all `loads` in flight for `slice`.
    fn run(&mut self, loads: &[Load], slice: Duration) -> Result<Outcome> {
        let slots: Vec<(usize, Load)> =
            loads.iter().enumerate().flat_map(|(at, load)| vec![(at, *load); load.depth]).collect();
        let start = Instant::now();
        let mut sent = vec![start; slots.len()];
        for (tag, (_, load)) in slots.iter().enumerate() {
            sent[tag] = Instant::now();
            self.submit(tag, *load, Buffer::zeroed(load.size));
        }
        let (mut times, mut in_flight) = (Vec::new(), slots.len());
        let mut events = Vec::new();
        let mut end = None;
        while in_flight > 0 {
            self.step()?;
            events.append(&mut self.events);
            for event in events.drain(..) {
                let answer = match event {
                    Event::Answer(answer) => answer,
                    Event::Lost { reason } => bail!("The connection was lost: {reason}"),
                    _ => continue,
                };
                let tag = answer.tag as usize;
                let (at, load) = *slots.get(tag).context("an answer to nothing")?;
                if answer.status != Status::OK || answer.received != load.size {
                    bail!("{} bytes and status {:?} came", answer.received, answer.status);
                }
                let now = Instant::now();
                if at == 0 && end.is_none() {
                    times.push(micros(now - sent[tag]));
                }
                if now - start < slice {
                    sent[tag] = now;
                    self.submit(tag, load, answer.answer);
                } else {
                    end.get_or_insert(now);
                    in_flight -= 1;
                }
            }
        }
        Ok(Outcome { times, elapsed: end.unwrap_or(start) - start })
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.channel.close(&mut self.ring);
        let _ = self.ring.submit();
    }
}

fn answer(socket: std::net::TcpStream, security: &Security) -> Result<()> {
    let mut ring = Ring::new(256)?;
    let sessions: Arc<Sessions> = Sessions::new("bench", Limits::default());
    let mut connection = Connection::new(socket, sessions, security, &mut ring);
    let mut events = Vec::new();
    loop {
        let next = connection.tick(&mut ring, Instant::now(), &mut events);
        let idle = events.is_empty();
        for event in events.drain(..) {
            match event {
                server::Event::Request(request) => {
                    let payload = connection.buffer(request.answer_len);
                    connection.answer(request.id, Status::OK, &[], payload);
                }
                server::Event::Closed { .. } if connection.in_flight() == 0 => return Ok(()),
                _ => {}
            }
        }
        if connection.is_finished() {
            return Ok(());
        }
        if idle {
            ring.wait(next.map(|at| at.saturating_duration_since(Instant::now())))?;
        }
        while let Some(completion) = ring.reap() {
            connection.complete(&mut ring, completion, &mut events);
        }
    }
}
