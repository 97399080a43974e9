//! Omega end to end: guests under `omega run` on one lab PC, their disks on another.
//!
//! Each test has PCs of its own. They come from a snapshot in about a second, which is why nothing is shared
//! between tests. Most of the time one PC of a test waits for another, so two tests run side by side where there are
//! processors for both: four. On fewer they would stretch each other's times, which some are about.

mod boot;
mod disk;
mod identity;
mod lab_itself;
mod memory;
mod mistakes;
mod native;
mod pattern;
mod rdma;
mod span;
mod storm;
mod transport;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Instant;

type Test = fn() -> anyhow::Result<()>;

/// Names begin with what a test needs: `native` ones need no lab PC. Long ones come early, so that no single one is
/// left at the end.
const ALL: &[&[(&str, Test)]] = &[
    native::TESTS,
    lab_itself::TESTS,
    storm::TESTS,
    span::TESTS,
    memory::TESTS,
    disk::TESTS,
    rdma::TESTS,
    identity::TESTS,
    mistakes::TESTS,
    transport::TESTS,
    boot::TESTS,
];

/// What the PCs of one test take at most, in MiB: three of them with 2 GiB each, of which most is never touched.
const ROOM: u64 = 5 << 10;

/// How many tests run at once: `LAB_TESTS_AT_ONCE`, or two where they have two processors and memory each.
fn at_once() -> usize {
    let wanted = std::env::var("LAB_TESTS_AT_ONCE").ok().and_then(|count| count.parse().ok());
    wanted.unwrap_or_else(|| {
        let processors = thread::available_parallelism().map_or(1, usize::from);
        let about = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let free =
            about.lines().find_map(|line| line.strip_prefix("MemAvailable:")?.trim().strip_suffix(" kB"));
        let free = free.and_then(|kib| kib.trim().parse::<u64>().ok()).unwrap_or(0) >> 10;
        if processors >= 4 && free >= 2 * ROOM { 2 } else { 1 }
    })
}

/// Runs a test; a second time if it only fell silent in an emulated PC, where a guest was seen to stand still
/// and no cause was found. The repetition is counted and shown; what a test found to be wrong stands.
fn attempt(name: &str, test: Test) -> thread::Result<anyhow::Result<()>> {
    let result = catch_unwind(AssertUnwindSafe(test));
    match &result {
        Ok(Err(error))
            if lab::host::host().is_ok_and(|host| !host.kvm)
                && error.chain().any(<dyn std::error::Error>::is::<lab::Silence>) =>
        {
            println!(
                "{error:#}\nsilent: {name}: nothing moved any more in an emulated PC; it is run once more"
            );
            catch_unwind(AssertUnwindSafe(test))
        }
        _ => result,
    }
}

enum Outcome {
    Passed,
    Failed,
    Ignored,
}

/// Runs one test and says how it ended.
fn one(name: &str, test: Test, cannot: Option<&str>) -> Outcome {
    if let Some(why) = cannot.filter(|_| !name.starts_with("native")) {
        println!("test {name} ... ignored, cannot run: {why}");
        return Outcome::Ignored;
    }
    let start = Instant::now();
    let result = attempt(name, test);
    let took = start.elapsed().as_secs_f32();
    match result {
        Ok(Ok(())) => {
            println!("test {name} ... ok <{took:.1}s>");
            return Outcome::Passed;
        }
        Ok(Err(error)) => println!("{error:#}\ntest {name} ... FAILED <{took:.1}s>"),
        Err(_) => println!("test {name} ... FAILED <{took:.1}s>"),
    }
    Outcome::Failed
}

/// Takes what `cargo test` passes on: words that names have to contain, `--exact`, `--skip WORD`, `--list`. The
/// outcome of each test is a line of its own, as `make test` counts it.
fn main() -> ExitCode {
    let mut words = Vec::new();
    let mut skips = Vec::new();
    let (mut exact, mut list) = (false, false);
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--exact" => exact = true,
            "--list" => list = true,
            "--skip" => skips.extend(arguments.next()),
            option if option.starts_with('-') => {}
            _ => words.push(argument),
        }
    }
    let chosen = |name: &str| {
        let fits = |word: &String| if exact { name == word } else { name.contains(word.as_str()) };
        (words.is_empty() || words.iter().any(fits)) && !skips.iter().any(|word| name.contains(word.as_str()))
    };
    let tests: Vec<_> = ALL.concat().into_iter().filter(|(name, _)| chosen(name)).collect();
    if list {
        tests.iter().for_each(|(name, _)| println!("{name}: test"));
        return ExitCode::SUCCESS;
    }
    let cannot = lab::host::host().err().map(|why| why.to_string());
    println!("\nrunning {} tests", tests.len());
    let next = AtomicUsize::new(0);
    let outcomes = Mutex::new((0, 0, Vec::new()));
    thread::scope(|scope| {
        for _ in 0..at_once().clamp(1, tests.len().max(1)) {
            scope.spawn(|| {
                while let Some((name, test)) = tests.get(next.fetch_add(1, Relaxed)) {
                    let outcome = one(name, *test, cannot.as_deref());
                    let mut outcomes = outcomes.lock().unwrap_or_else(PoisonError::into_inner);
                    match outcome {
                        Outcome::Passed => outcomes.0 += 1,
                        Outcome::Ignored => outcomes.1 += 1,
                        Outcome::Failed => outcomes.2.push(*name),
                    }
                }
            });
        }
    });
    let (passed, ignored, failures) = outcomes.into_inner().unwrap_or_else(PoisonError::into_inner);
    let word = if failures.is_empty() { "ok" } else { "FAILED" };
    println!("\ntest result: {word}. {passed} passed; {} failed; {ignored} ignored", failures.len());
    failures.iter().for_each(|name| println!("    {name}"));
    if failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(101) }
}
