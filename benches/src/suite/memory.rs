//! Guest memory on another PC, over loopback: the real engine and a real agent, and plain threads that touch pages.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use lab::Lab;
use transport::identity::Security;
use transport::identity::testing::{Household, security};
use vmm::memory::fault::handlers;

use super::Part;
use crate::bench::{Bench, Readings, Suite};
use crate::figure::Target::{self, AtLeast, AtMost};
use crate::figure::{Reading, Spec};
use crate::floor::fault::{Plain, placing};
use crate::floor::tcp::Stream;
use crate::inside::RESULT;
use crate::paged::{Paged, Setting};
use crate::region::{Anonymous, PAGE};
use crate::stats::{median, percentile, rate};
use crate::zipf::Zipf;

const PLAIN: &str = "the plainest program: event, blocking socket, copy";

const fn spec(name: &'static str, unit: &'static str, baseline: &'static str, target: Target) -> Spec {
    Spec { name, unit, baseline, target: Some(target) }
}

/// See the [module](self).
pub const SUITE: Suite = Suite {
    name: "memory",
    specs: &[
        spec("memory.fault_p50", "us", PLAIN, AtMost(1.0)),
        spec("memory.fault_p99", "us", PLAIN, AtMost(1.0)),
        spec("memory.tls_fault_p50", "us", PLAIN, AtMost(1.35)),
        spec("memory.tls_fault_p99", "us", PLAIN, AtMost(1.35)),
        spec("memory.two_threads", "faults/s", "one thread", AtLeast(1.6)),
        spec("memory.sequential", "GB/s", "bare TCP stream", AtLeast(0.7)),
        spec("memory.sequential_faults", "faults", "pages", AtMost(0.1)),
        spec("memory.waited_for_write", "faults", "faults over the network", AtMost(0.0)),
        spec("memory.zipf", "1/s", "Linux swapping to NBD, same limit, same lab PCs", AtLeast(3.0)),
        Spec { name: "memory.zipf_native", unit: "1/s", baseline: "all in memory", target: None },
    ],
    run,
};

/// What is measured together, and which figures come of it.
const PARTS: [(Part, &[&str]); 5] = [
    (faults, &["memory.fault_p50", "memory.fault_p99", "memory.tls_fault_p50", "memory.tls_fault_p99"]),
    (threads, &["memory.two_threads"]),
    (sequential, &["memory.sequential", "memory.sequential_faults"]),
    (zipf, &["memory.waited_for_write", "memory.zipf_native"]),
    (swapping, &["memory.zipf"]),
];

fn run(bench: &Bench, readings: &mut Readings) -> Result<()> {
    super::parts(&PARTS, bench, readings);
    Ok(())
}

/// Pages that are touched one at a time.
const PAGES: u64 = 16_384;

/// RAM whose first half is touched: all on the agent, and memory free for it.
fn half(handlers: u32) -> Setting {
    Setting { pages: 2 * PAGES, local: PAGES * 5 / 4, handlers, security: Security::Plain }
}

/// One page at a time by one thread.
fn faults(bench: &Bench, readings: &mut Readings) -> Result<()> {
    let house = Household::new();
    let folder = house.folder(&house.agent("attic"));
    let tls = Setting { security: security(&house.console("desk")), ..half(1) };
    let mut plain = Plain::new(PAGES)?;
    let ours = Paged::start(bench, &half(1), None)?;
    let secure = Paged::start(bench, &tls, Some(&folder))?;
    let sides = [&ours, &secure];
    sides.into_iter().for_each(|paged| paged.fill(0..PAGES));
    let (mut floor, mut times) = ([vec![], vec![]], [const { [vec![], vec![]] }; 2]);
    for round in 0..bench.rounds() as u64 {
        bench.progress(&format!("memory: faults, round {}", round + 1));
        note(&mut floor, &plain.run(bench.slice() * 2)?);
        for (paged, times) in sides.into_iter().zip(&mut times) {
            paged.chill(PAGES)?;
            note(times, &paged.touch(PAGES, 1, bench.slice(), round)?.times);
        }
    }
    let names = [["memory.fault_p50", "memory.fault_p99"], ["memory.tls_fault_p50", "memory.tls_fault_p99"]];
    for (names, times) in names.into_iter().zip(&times) {
        for ((name, values), floor) in names.into_iter().zip(times).zip(&floor) {
            readings.add(Reading::beside(name, median(values), median(floor)));
        }
    }
    Ok(())
}

/// One page at a time by two threads with as many handlers as a guest of two vCPUs gets here, beside one thread with
/// one handler or with two, whichever is faster. What the machine allows is shown by the plainest program: one of
/// them, and two at once.
fn threads(bench: &Bench, readings: &mut Readings) -> Result<()> {
    let single = Paged::start(bench, &half(1), None)?;
    let double = Paged::start(bench, &half(2), None)?;
    let mut plain = [Plain::new(PAGES)?, Plain::new(PAGES)?];
    [&single, &double].into_iter().for_each(|paged| paged.fill(0..PAGES));
    let (mut rates, mut floor) = ([const { vec![] }; 4], [const { vec![] }; 2]);
    for round in 0..bench.rounds() as u64 {
        bench.progress(&format!("memory: threads, round {}", round + 1));
        let sides = [(&single, 1), (&double, 1), (&single, 2), (&double, 2)];
        for ((paged, threads), rates) in sides.into_iter().zip(&mut rates) {
            paged.chill(PAGES)?;
            let touched = paged.touch(PAGES, threads, bench.slice(), round)?;
            rates.push(rate(touched.times.len() as u64, touched.elapsed));
        }
        for (threads, floor) in (1..).zip(&mut floor) {
            floor.push(at_once(plain.iter_mut().take(threads), bench.slice())?);
        }
    }
    let [one, same, shared, two] = rates.map(|rates| median(&rates));
    let [alone, both] = floor.map(|rates| median(&rates));
    let ours = if handlers(2) == 1 { shared } else { two };
    let note = format!(
        "one thread: {one:.0} with one handler, {same:.0} with two; two threads: {shared:.0} and {two:.0}; \
         the plainest program: {alone:.0} one, {both:.0} two at once, {:.2}",
        both / alone
    );
    readings.add(Reading::beside("memory.two_threads", ours, one.max(same)).note(note));
    Ok(())
}

/// Has `programs` touch pages at once for `slice`; touches per second of all of them.
fn at_once<'a>(programs: impl Iterator<Item = &'a mut Plain>, slice: Duration) -> Result<f64> {
    let start = Instant::now();
    let touched = std::thread::scope(|scope| {
        let threads: Vec<_> = programs.map(|plain| scope.spawn(move || plain.touch(slice))).collect();
        threads
            .into_iter()
            .map(|thread| Ok(thread.join().expect("it does not panic")?.len()))
            .sum::<Result<usize>>()
    })?;
    Ok(rate(touched as u64, start.elapsed()))
}

/// Adds the median and the 99th percentile of `values`.
fn note(to: &mut [Vec<f64>; 2], values: &[f64]) {
    to[0].push(median(values));
    to[1].push(percentile(values, 0.99));
}

/// All pages of a large part in order, all of them on the agent, and memory free for them.
fn sequential(bench: &Bench, readings: &mut Readings) -> Result<()> {
    let pages: u64 = if bench.quick { 1 << 15 } else { 1 << 17 };
    let setting = Setting {
        pages: 2 * pages,
        local: pages * 5 / 4,
        handlers: handlers(2) as u32,
        security: Security::Plain,
    };
    let paged = Paged::start(bench, &setting, None)?;
    paged.fill(0..pages);
    let mut stream = Stream::new(64 << 10)?;
    let (mut flow, mut rates, mut shares, mut placed) = (vec![], vec![], vec![], vec![]);
    for round in 0..bench.rounds() {
        bench.progress(&format!("memory: sequential, round {}", round + 1));
        flow.push(stream.run(bench.slice())? / 1e9);
        placed.push(placing(64, bench.slice() / 4)? / 1e9);
        paged.chill(pages)?;
        let before = paged.counters();
        let time = paged.sweep(pages)?;
        let after = paged.counters();
        let came = (after.fetched + after.fetched_ahead) - (before.fetched + before.fetched_ahead);
        let faults = |counters: &vmm::memory::fault::Counters| {
            counters.remote_faults + counters.late_faults + counters.parked_faults
        };
        rates.push(rate(came * PAGE as u64, time) / 1e9);
        shares.push(((faults(&after) - faults(&before)) as f64, came as f64));
    }
    let note = format!(
        "putting pages into place, 64 at a time from warm memory and nothing else, one thread does {:.2} GB/s here",
        median(&placed)
    );
    readings.add(Reading::beside("memory.sequential", median(&rates), median(&flow)).note(note));
    let (faults, came): (Vec<f64>, Vec<f64>) = shares.into_iter().unzip();
    readings.add(Reading::beside("memory.sequential_faults", median(&faults), median(&came)));
    Ok(())
}

/// Half of what is used fits.
fn zipf(bench: &Bench, readings: &mut Readings) -> Result<()> {
    const PAGES: u64 = 32_768;
    const BATCH: u64 = 1000;
    let setting = Setting { pages: PAGES, local: PAGES / 2, handlers: 2, security: Security::Plain };
    let paged = Paged::start(bench, &setting, None)?;
    let memory = Anonymous::new(PAGES)?;
    let (mut there, mut here) = (Zipf::new(PAGES, 1.0, 4, 1), Zipf::new(PAGES, 1.0, 4, 1));
    paged.fill(0..PAGES);
    (0..PAGES).for_each(|page| memory.region().fill(page));
    there.run(paged.region(), 200_000); // until what is used most is here
    let before = paged.counters();
    let (mut rates, mut most) = (vec![], vec![]);
    for round in 0..bench.rounds() {
        bench.progress(&format!("memory: zipfian, round {}", round + 1));
        for (region, zipf, rates) in
            [(paged.region(), &mut there, &mut rates), (memory.region(), &mut here, &mut most)]
        {
            let (start, mut count) = (Instant::now(), 0);
            while start.elapsed() < bench.slice() + Duration::from_millis(100) {
                zipf.run(region, BATCH);
                count += BATCH;
            }
            rates.push(rate(count, start.elapsed()));
        }
    }
    let after = paged.counters();
    let faults = after.remote_faults - before.remote_faults;
    let waited = after.faults_that_waited_for_write - before.faults_that_waited_for_write;
    let note = format!("{} pages written back meanwhile", after.stored - before.stored);
    readings.add(Reading::beside("memory.waited_for_write", waited as f64, faults as f64).note(note));
    let note = "exponent 1, one in 4 writes, half of the pages fit; for orientation";
    readings.add(Reading::beside("memory.zipf_native", median(&rates), median(&most)).note(note));
    Ok(())
}

/// Half of what is used fits, in a lab PC whose kernel has network block devices, beside Linux swapping to one.
fn swapping(bench: &Bench, readings: &mut Readings) -> Result<()> {
    const PAGES: u64 = 32_768;
    let lab = Lab::new("bench-memory")?;
    let lan = lab.network("lan");
    let [console, helper] = lab.start([lab.pc("console").on(&lan), lab.pc("helper").on(&lan)])?;
    for pc in [&console, &helper] {
        pc.put(&bench.program("bench")?, "/usr/bin/bench", 0o755)?;
    }
    helper.put(&bench.program("omega-agent")?, "/usr/bin/omega-agent", 0o755)?;
    let address = helper.address();
    let config = format!(
        "listen = '{address}:7420'\ninsecure = true\nstate = '/root/state'\n[memory]\nsize = '256M'\nlock = false\n"
    );
    helper.put_bytes(config.as_bytes(), "/root/agent.toml", 0o644)?;
    let _agent = helper.spawn("exec omega-agent --config /root/agent.toml")?;
    let server = helper.spawn(&format!("exec bench inside swap-server {address}:7421 {}", 2 * PAGES))?;
    server.expect("listening", Duration::from_secs(60))?;
    let seconds = if bench.quick { 5 } else { 20 };
    let measure = |part: &str, port: u16| -> Result<f64> {
        bench.progress(&format!("memory: {part}"));
        let command = format!("bench inside {part} {address}:{port} {PAGES} {} {seconds}", PAGES / 2);
        let output = console.run_for(&command, Duration::from_secs(300))?.all();
        let result =
            output.split(RESULT).nth(1).and_then(|rest| rest.split_whitespace().next()?.parse().ok());
        result.with_context(|| format!("`{command}` ended with {output}"))
    };
    let (mut ours, mut theirs) = (vec![], vec![]);
    for _ in 0..if bench.quick { 1 } else { 3 } {
        ours.push(measure("zipf-paged", 7420)?);
        theirs.push(measure("zipf-swap", 7421)?);
    }
    let note = "exponent 1, one in 4 writes; the swapping process may have its page tables and 1 MiB besides";
    readings.add(Reading::beside("memory.zipf", median(&ours), median(&theirs)).note(note));
    Ok(())
}
