//! Omega end to end: guests under `omega run` on one lab PC, their disks on another.
//!
//! Each test has PCs of its own. They come from a snapshot in about a second, which is why nothing is shared
//! between tests. One test runs at a time: two PCs have two processors' worth of work.

mod boot;
mod disk;
mod identity;
mod lab_itself;
mod memory;
mod mistakes;
mod native;
mod rdma;
mod storm;
mod transport;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::time::Instant;

type Test = fn() -> anyhow::Result<()>;

/// Names begin with what a test needs: `native` ones need no lab PC.
const ALL: &[&[(&str, Test)]] = &[
    native::TESTS,
    lab_itself::TESTS,
    boot::TESTS,
    mistakes::TESTS,
    disk::TESTS,
    memory::TESTS,
    transport::TESTS,
    identity::TESTS,
    rdma::TESTS,
    storm::TESTS,
];

/// Runs a test; a second time if it only fell silent in an emulated PC, where a guest was seen to stand still
/// and no cause was found. The repetition is counted and shown; what a test found to be wrong stands.
fn attempt(name: &str, test: Test) -> std::thread::Result<anyhow::Result<()>> {
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
    let cannot = lab::host::host().err();
    let (mut passed, mut ignored, mut failures) = (0, 0, Vec::new());
    println!("\nrunning {} tests", tests.len());
    for (name, test) in tests {
        if let Some(why) = cannot.as_ref().filter(|_| !name.starts_with("native")) {
            println!("test {name} ... ignored, cannot run: {why}");
            ignored += 1;
            continue;
        }
        let start = Instant::now();
        let result = attempt(name, test);
        let took = start.elapsed().as_secs_f32();
        match result {
            Ok(Ok(())) => {
                println!("test {name} ... ok <{took:.1}s>");
                passed += 1;
            }
            Ok(Err(error)) => {
                println!("{error:#}\ntest {name} ... FAILED <{took:.1}s>");
                failures.push(name);
            }
            Err(_) => {
                println!("test {name} ... FAILED <{took:.1}s>");
                failures.push(name);
            }
        }
    }
    let word = if failures.is_empty() { "ok" } else { "FAILED" };
    println!("\ntest result: {word}. {passed} passed; {} failed; {ignored} ignored", failures.len());
    failures.iter().for_each(|name| println!("    {name}"));
    if failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(101) }
}
