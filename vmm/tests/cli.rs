//! The command line itself: usage, configuration mistakes, and what is generated.
#![allow(missing_docs)]

mod support;

use support::Bench;

#[test]
fn mistakes_of_usage_end_with_2_and_name_the_nearest() {
    let bench = Bench::new();
    for (args, said) in [
        (&["valdate", "g.toml"][..], "a similar subcommand exists: 'validate'"),
        (&["run"], "required arguments were not provided"),
        (&["run", "g.toml", "--cpu", "2"], "a similar argument exists: '--cpus'"),
        (&["run", "g.toml", "--memory", "lots"], "`lots` is not a size"),
        (&["run", "g.toml", "--seccomp", "maybe"], "`maybe` is not one of"),
        (&["stop", "g", "--timeout", "5"], "`5` is not a time"),
    ] {
        let outcome = bench.omega(args);
        assert_eq!(outcome.code, Some(2), "{args:?}: {outcome:?}");
        assert!(outcome.err.contains(said), "{args:?}: {outcome:?}");
        assert_eq!(outcome.out, "", "{args:?}");
    }
}

#[test]
fn mistakes_of_configuration_end_with_2_and_begin_with_their_place() {
    let bench = Bench::new();
    let text = "name = 'g'\n[kernel]\nimage = 'nowhere'\n[cpu]\ncuont = 2\n[balloon]\nsize = '1x'\n";
    bench.file("g.toml", text);
    let places = [
        "g.toml:5:1: key `cpu.cuont`: unknown key; did you mean `count`?",
        "g.toml:7:1: key `balloon.size`: `1x` is not a size; write for example `512M` or `8G`",
    ];
    for args in [&["run", "g.toml"][..], &["validate", "g.toml"]] {
        let outcome = bench.omega(args);
        assert_eq!(outcome.code, Some(2), "{args:?}: {outcome:?}");
        assert_eq!(outcome.err.lines().collect::<Vec<_>>(), places, "{args:?}");
    }
    let outcome = bench.omega(&["validate", "g.toml", "--json"]);
    let report: serde_json::Value = serde_json::from_str(&outcome.out).expect("it is JSON");
    assert_eq!(outcome.code, Some(2));
    assert_eq!(report["valid"], false);
    assert_eq!(report["mistakes"][0]["line"], 5);
    assert_eq!(report["mistakes"][0]["key"], "cpu.cuont");

    let missing = bench.omega(&["run", "absent.toml"]);
    assert_eq!(missing.code, Some(2), "{missing:?}");
    assert_eq!(missing.err, "absent.toml: No such file or directory (os error 2)\n");
}

#[test]
fn validate_looks_for_the_files_unless_told_not_to() {
    let bench = Bench::new();
    bench.file("g.toml", "name = 'g'\n[kernel]\nimage = 'vmlinuz'\n[[disk]]\npath = '.'\n");
    let outcome = bench.omega(&["validate", "g.toml"]);
    assert_eq!(outcome.code, Some(2), "{outcome:?}");
    let lines: Vec<_> = outcome.err.lines().collect();
    assert!(
        lines[0].starts_with("g.toml:3:1: key `kernel.image`: vmlinuz cannot be read: No such"),
        "{lines:?}"
    );
    assert_eq!(lines[1], "g.toml:5:1: key `disk[0].path`: . is a folder, not a file");
    let outcome = bench.omega(&["validate", "g.toml", "--no-files"]);
    assert_eq!((outcome.code, outcome.out.as_str()), (Some(0), "g.toml: ok\n"), "{outcome:?}");
}

#[test]
fn changes_on_the_command_line_are_checked_too() {
    let bench = Bench::new();
    bench.file("g.toml", "name = 'g'\n[kernel]\nimage = 'vmlinuz'\n[balloon]\nsize = '64M'\n");
    let outcome = bench.omega(&["run", "g.toml", "--name", "a/b", "--cpus", "65", "--memory", "32M"]);
    assert_eq!(outcome.code, Some(2), "{outcome:?}");
    let lines: Vec<_> = outcome.err.lines().collect();
    assert_eq!(
        lines,
        [
            "with the command line's changes: key `name`: may hold letters, digits, `-`, `_` and `.` only, not '/'",
            "with the command line's changes: key `cpu.count`: must be from 1 to 64, not 65",
            "with the command line's changes: key `balloon.size`: is more than the guest's memory, 32M",
        ]
    );
}

#[test]
fn a_guest_with_vcpus_on_another_pc_is_valid() {
    let bench = Bench::new();
    let text = "name = 'g'\nserial = 'off'\n[kernel]\nimage = 'vmlinuz'\n[cpu]\ncount = 2\n\
        [[cpu.place]]\nnode = 'attic'\nagent = '127.0.0.1:1'\ncount = 1\ninsecure = true\n";
    bench.file("g.toml", text);
    let outcome = bench.omega(&["validate", "g.toml", "--no-files"]);
    assert_eq!((outcome.code, outcome.out.as_str()), (Some(0), "g.toml: ok\n"), "{outcome:?}");
}

#[test]
fn a_filter_for_the_log_that_is_none_is_refused() {
    let bench = Bench::new();
    let output = bench.command(&["ps"]).env("OMEGA_LOG", "loud=very").output().expect("the binary starts");
    let outcome = support::Outcome::of(&output);
    assert_eq!(outcome.code, Some(2), "{outcome:?}");
    assert!(outcome.err.contains("OMEGA_LOG=`loud=very` is not a filter"), "{outcome:?}");
}

#[test]
fn the_schema_in_packaging_is_the_one_that_is_generated() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../packaging/guest.schema.json");
    let stored = std::fs::read_to_string(path).expect("packaging/guest.schema.json is there");
    let generated = Bench::new().omega(&["schema"]);
    assert_eq!(generated.code, Some(0));
    let mend = "run: cargo run -p omega-vmm --bin omega -- schema > packaging/guest.schema.json";
    assert!(stored == generated.out, "packaging/guest.schema.json is not current; {mend}");
}

#[test]
fn completions_know_the_commands() {
    let bench = Bench::new();
    for shell in ["bash", "zsh", "fish"] {
        let outcome = bench.omega(&["completions", shell]);
        assert_eq!(outcome.code, Some(0), "{shell}");
        for word in ["validate", "allow-unfit-kvm", "console"] {
            assert!(outcome.out.contains(word), "{shell} does not know {word}");
        }
    }
}

#[test]
fn there_is_a_man_page_for_each_command_with_the_exit_codes() {
    let bench = Bench::new();
    let outcome = bench.omega(&["man", "man"]);
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    let help = bench.omega(&["--help"]);
    let commands =
        ["run", "ps", "console", "stop", "pause", "resume", "status", "check", "validate", "schema"];
    for command in commands {
        assert!(bench.path("man").join(format!("omega-{command}.1")).exists(), "{command}");
        assert!(help.out.contains(&format!("  {command} ")), "{command}");
    }
    let page = std::fs::read_to_string(bench.path("man/omega.1")).expect("the page is there");
    assert!(page.contains("triple fault"), "the exit codes are in the page");
    assert!(help.out.contains("triple fault") && !help.out.contains("  man "), "{}", help.out);
}

#[test]
fn every_key_is_in_the_reference() {
    let reference = include_str!("../../docs/config.md");
    let schema: serde_json::Value = serde_json::from_str(&vmm::cli::schema()).expect("it is JSON");
    let mut keys = Vec::new();
    collect(&schema, &schema, String::new(), &mut keys);
    assert!(keys.contains(&"disk[].remote.on_timeout".to_owned()), "{keys:?}");
    for key in &keys {
        assert!(reference.contains(&format!("| `{key}` |")), "docs/config.md lacks a row for `{key}`");
    }
    let rows =
        reference.lines().filter_map(|line| line.strip_prefix("| `")?.split_once('`').map(|(key, _)| key));
    for row in rows {
        assert!(keys.iter().any(|key| key == row), "docs/config.md has `{row}`, which is no key");
    }
}

#[test]
fn the_samples_are_valid() {
    let bench = Bench::new();
    let reference = include_str!("../../docs/config.md");
    let sample = reference.split("```toml\n").nth(1).and_then(|rest| rest.split("```").next());
    bench.file("reference.toml", sample.expect("the reference begins with a sample"));
    bench.file("packaged.toml", include_str!("../../packaging/guest.toml"));
    for name in ["reference.toml", "packaged.toml"] {
        let outcome = bench.omega(&["validate", "--no-files", name]);
        assert_eq!(outcome.out, format!("{name}: ok\n"), "{outcome:?}");
    }
}

/// The keys of everything below `node` that is no table.
fn collect(root: &serde_json::Value, node: &serde_json::Value, path: String, keys: &mut Vec<String>) {
    let mut node = node;
    while let Some(name) = node["$ref"].as_str() {
        node = root.pointer(name.trim_start_matches('#')).expect("the reference leads somewhere");
    }
    if let Some(branches) = node["allOf"].as_array().or_else(|| node["anyOf"].as_array()) {
        return branches.iter().for_each(|branch| collect(root, branch, path.clone(), keys));
    }
    if node["items"]["$ref"].is_string() {
        return collect(root, &node["items"], format!("{path}[]"), keys);
    }
    match node["properties"].as_object() {
        Some(properties) => {
            for (name, value) in properties {
                let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
                collect(root, value, path, keys);
            }
        }
        None if node["type"] == "null" || path.is_empty() => {}
        None => {
            keys.push(path);
            keys.dedup();
        }
    }
}
