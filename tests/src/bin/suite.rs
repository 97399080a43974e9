//! Runs every test of the workspace and counts them by kind: `make test`.
//!
//! Each kind is one call of `cargo test`. A test that cannot run on this machine says so in a line that
//! begins with `cannot run:`; it is counted as skipped, never as passed.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::process::{Command, ExitCode};
use std::time::Instant;

/// What a test stands on.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Kind {
    Unit,
    MicroGuest,
    FuzzCorpus,
    Lab,
}

impl Kind {
    fn of(test: &str, group: Kind) -> Self {
        if group == Kind::Lab {
            Kind::Lab
        } else if MICRO_GUESTS.iter().any(|part| test.contains(part)) {
            Kind::MicroGuest
        } else if test.contains("fuzz") {
            Kind::FuzzCorpus
        } else {
            Kind::Unit
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Unit => "unit and property",
            Self::MicroGuest => "micro-guest",
            Self::FuzzCorpus => "fuzz corpus",
            Self::Lab => "lab",
        }
    }
}

/// What the names of tests that run guests of a few instructions on `/dev/kvm` contain.
const MICRO_GUESTS: &[&str] =
    &["kvm::micro::", "tests/run.rs ", "tests/terminal.rs ", "a_trial_guest_agrees", "a_guests_whole_run"];

/// How many tests of one kind ended how.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
struct Tally {
    passed: u32,
    failed: u32,
    skipped: u32,
}

/// Reads libtest's output line by line.
#[derive(Default)]
struct Reader {
    passed: Vec<String>,
    failed: Vec<String>,
    skipped: Vec<(String, String)>,
    /// Tests that fell silent and were run once more, and how.
    repeated: Vec<String>,
    /// The test program that runs, as cargo names it.
    program: String,
    /// The test whose captured output is being shown.
    shown: Option<String>,
}

impl Reader {
    fn line(&mut self, line: &str) {
        if let Some(program) = line.trim_start().strip_prefix("Running ") {
            let program = program.split(" (").next().unwrap_or(program);
            self.program = program.trim_start_matches("unittests ").to_owned();
        } else if let Some(test) = line.strip_prefix("---- ").and_then(|rest| rest.split(' ').next()) {
            self.shown = Some(self.full(test));
        } else if let Some((test, end)) = line.strip_prefix("test ").and_then(|rest| rest.split_once(" ... "))
        {
            match end.split([' ', ',', '<']).next() {
                Some("ok") => self.passed.push(self.full(test)),
                Some("FAILED") => self.failed.push(self.full(test)),
                Some("ignored") => {
                    let why = end.trim_start_matches("ignored, ").trim_start_matches("cannot run: ");
                    self.skip(&self.full(test), why);
                }
                _ => {}
            }
        } else if let Some(silent) = line.strip_prefix("silent: ") {
            self.repeated.push(silent.to_owned());
        } else if let Some(why) = line.trim_start().strip_prefix("cannot run:") {
            let test = self.shown.clone().unwrap_or_default();
            self.skip(&test, why.trim());
        }
    }

    /// The name of a test, unlike those in other programs.
    fn full(&self, test: &str) -> String {
        format!("{} {test}", self.program)
    }

    /// Counts a test as skipped, once, and no longer as passed.
    fn skip(&mut self, test: &str, why: &str) {
        if let Some(at) = self.passed.iter().position(|passed| passed == test) {
            self.passed.swap_remove(at);
        } else if self.skipped.iter().any(|(skipped, _)| skipped == test) {
            return;
        }
        self.skipped.push((test.to_owned(), why.to_owned()));
    }
}

/// Runs one `cargo test`, shows what matters and returns its outcome.
fn run(arguments: &[&str]) -> std::io::Result<(Reader, bool)> {
    // Cargo names the programs on standard error and they report on standard output: one pipe keeps the order.
    let (output, input) = std::io::pipe()?;
    let mut child = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .arg("test")
        .args(arguments)
        .stdout(input.try_clone()?)
        .stderr(input)
        .spawn()?;
    let mut reader = Reader::default();
    let mut inside_success = false;
    for line in BufReader::new(output).lines() {
        let line = line?;
        reader.line(&line);
        // `--show-output` repeats what passing tests printed; only their skips are of interest.
        match line.as_str() {
            "successes:" => inside_success = true,
            "failures:" => inside_success = false,
            _ if line.starts_with("test result:") => inside_success = false,
            _ => {}
        }
        if !inside_success && !line.is_empty() {
            println!("{line}");
        }
    }
    Ok((reader, child.wait()?.success()))
}

fn main() -> ExitCode {
    let start = Instant::now();
    let common = ["--locked", "--no-fail-fast"];
    let groups: [(&str, Kind, &[&str], &[&str]); 3] = [
        (
            "unit, micro-guest and fuzz-corpus tests",
            Kind::Unit,
            // All but doc-tests, of which there are none: looking for them is a build of every crate.
            &["--workspace", "--exclude", "omega-lab", "--lib", "--bins", "--tests"],
            &["--show-output"],
        ),
        (
            "unit tests of the lab, and the workspace's rules",
            Kind::Unit,
            &[
                "-p",
                "omega-lab",
                "--lib",
                "--bins",
                "--test",
                "dependencies",
                "--test",
                "pattern",
                "--test",
                "litmus",
            ],
            &["--show-output"],
        ),
        ("lab tests", Kind::Lab, &["-p", "omega-lab", "--test", "end-to-end"], &[]),
    ];
    let only: Vec<String> = std::env::args().skip(1).collect();
    let mut tallies: BTreeMap<Kind, Tally> = BTreeMap::new();
    let mut skips = Vec::new();
    let mut failures = Vec::new();
    let mut repeated = Vec::new();
    let mut broken = false;
    for (title, group, selection, options) in groups {
        if !only.is_empty() && !only.iter().any(|word| title.contains(word.as_str())) {
            continue;
        }
        println!("== {title}");
        let mut arguments = common.to_vec();
        arguments.extend(selection);
        if !options.is_empty() {
            arguments.push("--");
            arguments.extend(options);
        }
        let (reader, success) = match run(&arguments) {
            Ok(outcome) => outcome,
            Err(error) => {
                eprintln!("suite: Could not run cargo test: {error}");
                return ExitCode::FAILURE;
            }
        };
        broken |= !success && reader.failed.is_empty();
        for test in &reader.passed {
            tallies.entry(Kind::of(test, group)).or_default().passed += 1;
        }
        for test in &reader.failed {
            tallies.entry(Kind::of(test, group)).or_default().failed += 1;
            failures.push(test.clone());
        }
        repeated.extend(reader.repeated);
        for (test, why) in reader.skipped {
            tallies.entry(Kind::of(&test, group)).or_default().skipped += 1;
            skips.push((test, why));
        }
    }
    println!("\n== Summary, after {} s", start.elapsed().as_secs());
    let mut total = Tally::default();
    for (kind, tally) in &tallies {
        let Tally { passed, failed, skipped } = tally;
        println!("{:<20} {passed:>4} passed {failed:>3} failed {skipped:>3} could not run", kind.name());
        total.passed += passed;
        total.failed += failed;
        total.skipped += skipped;
    }
    for (test, why) in &skips {
        println!("could not run: {test}: {why}");
    }
    for test in &repeated {
        println!("run twice: {test}");
    }
    for test in &failures {
        println!("failed: {test}");
    }
    if broken {
        println!("A test program did not build or ended without naming a failed test; see above.");
        total.failed += 1;
    }
    println!("{} passed, {} failed, {} skipped", total.passed, total.failed, total.skipped);
    if total.failed == 0 && total.passed > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_test_that_says_it_cannot_run_is_skipped_not_passed() {
        let mut reader = Reader::default();
        for line in [
            "     Running unittests src/lib.rs (target/debug/deps/vmm-1)",
            "test a::works ... ok",
            "test kvm::micro::runs ... ok",
            "test b ... FAILED",
            "test c ... ignored, too slow",
            "test d - should panic ... ok <1.2s>",
            "successes:",
            "---- kvm::micro::runs stdout ----",
            "cannot run: there is no /dev/kvm",
            "cannot run: said twice",
            "     Running tests/run.rs (target/debug/deps/run-2)",
            "silent: c: nothing moved",
            "test c ... ok",
        ] {
            reader.line(line);
        }
        assert_eq!(reader.passed, ["src/lib.rs a::works", "src/lib.rs d - should panic", "tests/run.rs c"]);
        assert_eq!(reader.failed, ["src/lib.rs b"]);
        assert_eq!(reader.repeated, ["c: nothing moved"]);
        let skipped: Vec<_> = reader.skipped.iter().map(|(test, _)| test.as_str()).collect();
        assert_eq!(skipped, ["src/lib.rs c", "src/lib.rs kvm::micro::runs"]);
        assert_eq!(Kind::of(skipped[1], Kind::Unit), Kind::MicroGuest);
        assert_eq!(Kind::of(&reader.passed[2], Kind::Unit), Kind::MicroGuest);
    }
}
