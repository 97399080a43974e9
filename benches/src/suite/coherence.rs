//! One guest's memory at several members: what a touch costs that another member has to know of, over lines on loopback.

use std::time::Instant;

use anyhow::Result;

use super::Part;
use crate::bench::{Bench, Readings, Suite};
use crate::figure::Target::{self, AtLeast, AtMost};
use crate::figure::{Reading, Spec};
use crate::floor::fault::{Plain, protected, scattered};
use crate::floor::tcp::PingPong;
use crate::members::{Mesh, PART};
use crate::region::{Anonymous, Region};
use crate::stats::{median, micros, percentile, rate};

const PLAIN: &str = "the plainest remote fault: event, blocking socket, copy";

const fn spec(name: &'static str, unit: &'static str, baseline: &'static str, target: Target) -> Spec {
    Spec { name, unit, baseline, target: Some(target) }
}

/// See the [module](self).
pub const SUITE: Suite = Suite {
    name: "coherence",
    specs: &[
        spec("coherence.read_miss_p50", "us", PLAIN, AtMost(1.3)),
        spec("coherence.read_miss_p99", "us", PLAIN, AtMost(1.3)),
        spec("coherence.upgrade", "us", "a bare round trip and a write-protect fault", AtMost(2.2)),
        spec("coherence.three_sharers", "us", "an upgrade with one sharer", AtMost(1.3)),
        spec("coherence.messages", "us", "four bare round trips: each way a write and a read", AtMost(3.0)),
        spec("coherence.uncontended", "1/s", "native memory", AtLeast(0.95)),
    ],
    run,
};

/// What is measured together, and which figures come of it.
const PARTS: [(Part, &[&str]); 4] = [
    (misses, &["coherence.read_miss_p50", "coherence.read_miss_p99"]),
    (upgrades, &["coherence.upgrade", "coherence.three_sharers"]),
    (messages, &["coherence.messages"]),
    (uncontended, &["coherence.uncontended"]),
];

fn run(bench: &Bench, readings: &mut Readings) -> Result<()> {
    super::parts(&PARTS, bench, readings);
    Ok(())
}

/// Pages of one round, at home at member 1.
const PAGES: u64 = 2000;

/// Pages that member 1 has written and is home to, read by member 0 one at a time.
fn misses(bench: &Bench, readings: &mut Readings) -> Result<()> {
    let mesh = Mesh::new(2)?;
    let mut plain = Plain::new(16_384)?;
    let (mut floor, mut ours) = ([vec![], vec![]], [vec![], vec![]]);
    for round in 0..bench.rounds() as u64 {
        bench.progress(&format!("coherence: read misses, round {}", round + 1));
        let values = plain.run(bench.slice() * 2)?;
        floor[0].push(median(&values));
        floor[1].push(percentile(&values, 0.99));
        let pages: Vec<u64> = scattered(PAGES, round).into_iter().map(|page| PART + page).collect();
        let mut times = Vec::new();
        let start = Instant::now();
        while start.elapsed() < bench.slice() * 2 {
            pages.iter().for_each(|page| mesh.region(1).write(*page, *page + round));
            for page in &pages {
                let before = Instant::now();
                let word = mesh.region(0).read(*page);
                times.push(micros(before.elapsed()));
                anyhow::ensure!(word == *page + round, "page {page} holds {word:#x}");
            }
        }
        ours[0].push(median(&times));
        ours[1].push(percentile(&times, 0.99));
        mesh.check()?;
    }
    let counters = mesh.counters(0);
    let note = format!("{} pages came, {} were given up unused", counters.fetched, counters.unused);
    for ((name, ours), floor) in
        ["coherence.read_miss_p50", "coherence.read_miss_p99"].iter().zip(&ours).zip(&floor)
    {
        readings.add(Reading::beside(name, median(ours), median(floor)).note(note.clone()));
    }
    Ok(())
}

/// How long a write by member 0 takes to pages that so many others have too, one of them their home.
fn upgrade(bench: &Bench, mesh: &Mesh, sharers: usize, round: u64) -> Result<f64> {
    let pages: Vec<u64> = scattered(PAGES, round).into_iter().map(|page| PART + page).collect();
    let mut times = Vec::new();
    let start = Instant::now();
    while start.elapsed() < bench.slice() * 2 {
        for member in 0..=sharers {
            pages.iter().for_each(|page| {
                let _ = mesh.region(member).read(*page);
            });
        }
        for page in &pages {
            let before = Instant::now();
            mesh.region(0).write(*page, round);
            times.push(micros(before.elapsed()));
        }
        mesh.check()?;
    }
    Ok(median(&times))
}

fn upgrades(bench: &Bench, readings: &mut Readings) -> Result<()> {
    let (two, four) = (Mesh::new(2)?, Mesh::new(4)?);
    let mut pings = PingPong::new(16, 16)?;
    let (mut trips, mut faults, mut one, mut three) = (vec![], vec![], vec![], vec![]);
    for round in 0..bench.rounds() as u64 {
        bench.progress(&format!("coherence: write upgrades, round {}", round + 1));
        trips.push(median(&pings.run(bench.slice())?));
        faults.push(median(&protected(bench.slice())?));
        one.push(upgrade(bench, &two, 1, round)?);
        three.push(upgrade(bench, &four, 3, round)?);
    }
    let (trip, fault) = (median(&trips), median(&faults));
    let note = format!("a round trip takes {trip:.1} us, a write-protect fault {fault:.1} us");
    readings.add(Reading::beside("coherence.upgrade", median(&one), trip + fault).note(note));
    let note = "all four members and the three lines of the writer are on this machine";
    readings.add(Reading::beside("coherence.three_sharers", median(&three), median(&one)).note(note));
    Ok(())
}

/// Reads the page's word until it is `done`.
fn poll(region: &Region, page: u64, done: impl Fn(u64) -> bool) -> u64 {
    loop {
        let word = region.read(page);
        if done(word) {
            return word;
        }
        std::hint::spin_loop();
    }
}

/// How long a word takes to the other member and back, through a page for each way that the other one polls.
fn messages(bench: &Bench, readings: &mut Readings) -> Result<()> {
    const LAST: u64 = u64::MAX;
    let (there, back) = (PART, PART + 1);
    let mesh = Mesh::new(2)?;
    let mut pings = PingPong::new(16, 16)?;
    let (mut ours, mut trips) = (vec![], vec![]);
    mesh.region(0).write(there, 0);
    mesh.region(1).write(back, 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut seen = 0;
            while seen != LAST {
                seen = poll(mesh.region(1), there, |word| word != seen);
                mesh.region(1).write(back, seen);
            }
        });
        let mut number = 0;
        for round in 0..bench.rounds() {
            bench.progress(&format!("coherence: messages, round {}", round + 1));
            let (start, mut times) = (Instant::now(), Vec::new());
            while start.elapsed() < bench.slice() * 2 {
                number += 1;
                let before = Instant::now();
                mesh.region(0).write(there, number);
                poll(mesh.region(0), back, |word| word == number);
                times.push(micros(before.elapsed()));
            }
            ours.push(median(&times));
        }
        mesh.region(0).write(there, LAST);
    });
    for _ in 0..bench.rounds() {
        trips.push(median(&pings.run(bench.slice())?));
    }
    mesh.check()?;
    let counters = mesh.counters(0);
    let note = format!("{} pages came, {} were given up unused", counters.fetched, counters.unused);
    readings.add(Reading::beside("coherence.messages", median(&ours), 4.0 * median(&trips)).note(note));
    Ok(())
}

/// Reads and writes of pages that are here and nobody else has.
fn uncontended(bench: &Bench, readings: &mut Readings) -> Result<()> {
    const USED: u64 = 1024;
    let mesh = Mesh::new(2)?;
    let native = Anonymous::new(USED)?;
    let (mut ours, mut theirs) = (vec![], vec![]);
    let work = |region: &Region| {
        let (start, mut count) = (Instant::now(), 0);
        while start.elapsed() < bench.slice() {
            for page in 0..USED {
                region.write(page, region.read(page) + 1);
            }
            count += USED;
        }
        rate(count, start.elapsed())
    };
    (0..USED).for_each(|page| (mesh.region(0).write(page, 0), native.region().write(page, 0)).0);
    let before = mesh.counters(0);
    for round in 0..bench.rounds() {
        bench.progress(&format!("coherence: uncontended, round {}", round + 1));
        ours.push(work(mesh.region(0)));
        theirs.push(work(native.region()));
    }
    let after = mesh.counters(0);
    let faults = after.write_faults + after.upgrades - before.write_faults - before.upgrades;
    let note = format!("{faults} faults meanwhile");
    readings.add(Reading::beside("coherence.uncontended", median(&ours), median(&theirs)).note(note));
    Ok(())
}
