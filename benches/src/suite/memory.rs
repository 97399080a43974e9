//! Guest memory on another PC, over loopback: the real engine and a real agent, and plain threads that touch pages.

use std::time::Duration;

use anyhow::Result;
use transport::identity::Security;
use transport::identity::testing::{Household, security};

use crate::bench::{Bench, Readings, Suite};
use crate::figure::Target::{self, AtLeast, AtMost};
use crate::figure::{Reading, Spec};
use crate::floor::fault::Plain;
use crate::floor::tcp::Stream;
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
        Spec { name: "memory.zipf_native", unit: "1/s", baseline: "all in memory", target: None },
    ],
    run,
};

fn run(bench: &Bench, readings: &mut Readings) -> Result<()> {
    let parts: [(fn(&Bench, &mut Readings) -> Result<()>, &'static str); 3] =
        [(faults, "memory."), (sequential, "memory.sequential"), (zipf, "memory.")];
    for (part, prefix) in parts {
        if let Err(why) = part(bench, readings) {
            readings.missing(prefix, format!("{why:#}"));
        }
    }
    Ok(())
}

/// One page at a time, all of them on the agent, and memory free for them.
fn faults(bench: &Bench, readings: &mut Readings) -> Result<()> {
    const PAGES: u64 = 16_384;
    let house = Household::new();
    let setting = Setting { pages: 2 * PAGES, local: PAGES * 5 / 4, handlers: 1, security: Security::Plain };
    let double = Setting { handlers: 2, ..setting.clone() };
    let tls = Setting { security: security(&house.console("desk")), ..setting.clone() };
    let folder = house.folder(&house.agent("attic"));
    let mut plain = Plain::new(PAGES)?;
    let ours = Paged::start(bench, &setting, None)?;
    let secure = Paged::start(bench, &tls, Some(&folder))?;
    let pair = Paged::start(bench, &double, None)?;
    let all = [&ours, &secure, &pair];
    all.into_iter().for_each(|paged| paged.fill(0..PAGES));
    let (mut floor, mut times, mut rates) =
        ([vec![], vec![]], [const { [vec![], vec![]] }; 2], [vec![], vec![]]);
    for round in 0..bench.rounds() as u64 {
        bench.progress(&format!("memory: faults, round {}", round + 1));
        note(&mut floor, &plain.run(bench.slice() * 2)?);
        for (paged, times) in [&ours, &secure].into_iter().zip(&mut times) {
            paged.chill(PAGES)?;
            note(times, &paged.touch(PAGES, 1, bench.slice(), round)?.times);
        }
        for (threads, rates) in (1..).zip(&mut rates) {
            pair.chill(PAGES)?;
            let touched = pair.touch(PAGES, threads, bench.slice(), round)?;
            rates.push(rate(touched.times.len() as u64, touched.elapsed));
        }
    }
    let names = [["memory.fault_p50", "memory.fault_p99"], ["memory.tls_fault_p50", "memory.tls_fault_p99"]];
    for (names, times) in names.into_iter().zip(&times) {
        for ((name, values), floor) in names.into_iter().zip(times).zip(&floor) {
            readings.add(Reading::beside(name, median(values), median(floor)));
        }
    }
    let [one, two] = rates.map(|rates| median(&rates));
    readings.add(Reading::beside("memory.two_threads", two, one).note("two handlers, for one thread too"));
    Ok(())
}

/// Adds the median and the 99th percentile of `values`.
fn note(to: &mut [Vec<f64>; 2], values: &[f64]) {
    to[0].push(median(values));
    to[1].push(percentile(values, 0.99));
}

/// All pages of a large part in order, all of them on the agent, and memory free for them.
fn sequential(bench: &Bench, readings: &mut Readings) -> Result<()> {
    let pages: u64 = if bench.quick { 1 << 15 } else { 1 << 17 };
    let setting = Setting { pages: 2 * pages, local: pages * 5 / 4, handlers: 2, security: Security::Plain };
    let paged = Paged::start(bench, &setting, None)?;
    paged.fill(0..pages);
    let mut stream = Stream::new(64 << 10)?;
    let (mut flow, mut rates, mut shares) = (vec![], vec![], vec![]);
    for round in 0..bench.rounds() {
        bench.progress(&format!("memory: sequential, round {}", round + 1));
        flow.push(stream.run(bench.slice())? / 1e9);
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
    readings.add(Reading::beside("memory.sequential", median(&rates), median(&flow)));
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
            let (start, mut count) = (std::time::Instant::now(), 0);
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
