//! What the workspace may depend on: known licences, crates.io only, one version of each rust-vmm crate.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use serde_json::Value;

/// Licences that may be linked into an MIT program. An expression passes if one of its alternatives does.
const LICENCES: &[&str] = &[
    "MIT",
    "MIT-0",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "ISC",
    "Zlib",
    "0BSD",
    "Unlicense",
    "CC0-1.0",
    "Unicode-3.0",
    "BSL-1.0",
];

/// Crates that exchange types with each other and so must exist once.
const SINGLE: &[&str] =
    &["vm-memory", "kvm-bindings", "kvm-ioctls", "vmm-sys-util", "virtio-queue", "libc", "io-uring"];

/// The rule from `docs/architecture.md`: each crate of ours, and which of ours it may use.
const ARROWS: &[(&str, &[&str])] = &[
    ("omega-transport", &[]),
    ("omega-devices", &["omega-transport"]),
    ("omega-vmm", &["omega-transport", "omega-devices"]),
    ("omega-agent", &["omega-transport", "omega-devices", "omega-vmm"]),
];

fn metadata() -> Vec<Value> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let target = "--filter-platform=x86_64-unknown-linux-gnu";
    let output = Command::new(cargo)
        .args(["metadata", "--format-version=1", "--locked", target])
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut metadata: Value = serde_json::from_slice(&output.stdout).expect("cargo prints JSON");
    let used: BTreeSet<String> = metadata["resolve"]["nodes"]
        .as_array()
        .expect("a list of nodes")
        .iter()
        .map(|node| text(&node["id"]).to_owned())
        .collect();
    let Value::Array(mut packages) = metadata["packages"].take() else { panic!("a list of packages") };
    packages.retain(|package| used.contains(text(&package["id"])));
    packages
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

fn allowed(expression: &str) -> bool {
    let expression = expression.replace('/', " OR ");
    let one = |licence: &str| LICENCES.contains(&licence.trim().trim_matches(['(', ')']));
    expression.split(" AND ").all(|part| part.trim_matches(['(', ')']).split(" OR ").any(one))
        || expression.split(" OR ").any(one)
}

#[test]
fn every_dependency_has_a_known_licence_and_comes_from_crates_io() {
    for package in metadata() {
        let name = text(&package["name"]);
        let licence = text(&package["license"]);
        assert!(allowed(licence), "{name} has the licence `{licence}`");
        let source = text(&package["source"]);
        let ours = name.starts_with("omega-") && source.is_empty();
        assert!(
            ours || source == "registry+https://github.com/rust-lang/crates.io-index",
            "{name} comes from {source}"
        );
    }
}

#[test]
fn crates_that_share_types_exist_in_one_version() {
    let mut versions: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for package in metadata() {
        versions
            .entry(text(&package["name"]).to_owned())
            .or_default()
            .insert(text(&package["version"]).to_owned());
    }
    for name in SINGLE {
        let found = versions.get(*name).cloned().unwrap_or_default();
        assert_eq!(found.len(), 1, "{name} is there as {found:?}");
    }
}

#[test]
fn no_crate_of_ours_uses_one_above_it() {
    for package in metadata() {
        let Some((_, may)) = ARROWS.iter().find(|(name, _)| *name == text(&package["name"])) else {
            continue;
        };
        for dependency in package["dependencies"].as_array().expect("a list") {
            let name = text(&dependency["name"]);
            let fine = !name.starts_with("omega-") || may.contains(&name);
            assert!(fine, "{} uses {name}", text(&package["name"]));
        }
    }
}
