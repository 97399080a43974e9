//! The litmus and parallel programs that guests run are right on this machine's own processors, and notice what they
//! are there to notice.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

const SOURCES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../guest-images");
const TESTS: [&str; 13] = [
    "message-passing",
    "store-buffering",
    "store-buffering-fenced",
    "load-buffering",
    "write-to-read",
    "iriw",
    "coherence",
    "atomic-increments",
    "cas-locks",
    "false-sharing",
    "page-straddling",
    "modified-code",
    "clock",
];

/// A program, compiled as the image of the mini guest does.
fn compile(folder: &Path, name: &str, sources: &[PathBuf]) -> PathBuf {
    let program = folder.join(name);
    let mut cc = Command::new("cc");
    cc.args(["-O2", "-Wall", "-Wextra", "-Werror", "-static", "-pthread", "-o"]).arg(&program);
    assert!(cc.args(sources).arg("-lm").status().expect("a C compiler").success());
    program
}

fn litmus(folder: &Path) -> PathBuf {
    let parts = Path::new(SOURCES).join("litmus").read_dir().expect("the sources");
    let parts = parts.map(|part| part.expect("a file").path());
    let sources: Vec<_> = parts.filter(|path| path.extension().is_some_and(|kind| kind == "c")).collect();
    compile(folder, "omega-litmus", &sources)
}

fn run(program: &Path, arguments: &[&str]) -> (Option<i32>, String) {
    let output = Command::new(program).args(arguments).output().expect("it runs");
    (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The number after `key` in the line of a test.
fn number(said: &str, test: &str, key: &str) -> u64 {
    let line = said.lines().find(|line| line.starts_with(&format!("omega-litmus: {test} runs=")));
    let line = line.unwrap_or_else(|| panic!("no line of {test}: {said}"));
    let value = line.split(key).nth(1).and_then(|rest| rest.split(' ').next());
    value.and_then(|value| value.parse().ok()).unwrap_or_else(|| panic!("no {key} in {line}"))
}

fn alone() -> bool {
    let processors = thread::available_parallelism().map_or(1, usize::from);
    if processors < 2 {
        eprintln!("cannot run: there is one processor, and nothing happens at the same time");
    }
    processors < 2
}

#[test]
fn nothing_forbidden_is_found_on_a_whole_machine_and_every_test_runs_as_often_as_asked() {
    let folder = tempfile::tempdir().expect("a folder");
    let (code, said) = run(&litmus(folder.path()), &["200000"]);
    assert_eq!(code, Some(0), "{said}");
    for test in TESTS {
        assert!(number(&said, test, "runs=") >= 200_000, "{said}");
        assert_eq!(number(&said, test, "forbidden="), 0, "{said}");
    }
    assert!(said.contains("omega-litmus: ok: 13 tests"), "{said}");
}

#[test]
fn stores_are_buffered_here_and_that_is_seen() {
    if alone() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let program = litmus(folder.path());
    // Until it is seen: how soon depends on what else runs here.
    while number(&run(&program, &["100000", "0", "store-buffering"]).1, "store-buffering", "relaxed=") == 0 {}
}

#[test]
fn every_test_notices_a_machine_that_breaks_its_rule() {
    if alone() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let program = litmus(folder.path());
    for test in TESTS.into_iter().filter(|test| *test != "store-buffering") {
        // Until it is seen, as above.
        loop {
            let (code, said) = run(&program, &["100000", "0", test, "broken"]);
            let found = number(&said, test, "forbidden=");
            assert_eq!(code, Some(i32::from(found > 0)), "{said}");
            if found > 0 {
                assert!(said.contains(&format!("omega-litmus: WRONG: {test}: ")), "{said}");
                break;
            }
        }
    }
}

#[test]
fn the_parallel_programs_sums_do_not_depend_on_its_workers() {
    let folder = tempfile::tempdir().expect("a folder");
    let program = compile(folder.path(), "omega-ep", &[Path::new(SOURCES).join("ep/omega-ep.c")]);
    for arguments in [
        &["1", "18"][..],
        &["2", "18"],
        &["3", "20", "processes"],
        &["3", "20", "threads"],
        &["2", "18", "shared"],
        &["3", "16", "shared"],
    ] {
        let (code, said) = run(&program, arguments);
        assert!(code == Some(0) && said.trim().ends_with("verified"), "{arguments:?}: {said}");
    }
    assert_eq!(run(&program, &["2", "15"]).0, Some(2));
}
