//! `omega top` beside guests that run, one of them with a disk on another PC.
#![allow(missing_docs)]

mod support;

use support::micro::Code;
use support::{Bench, agent, kvm};

#[test]
fn one_interval_of_every_guest_is_a_table_or_json() {
    if !kvm() {
        return;
    }
    let bench = Bench::new();
    let none = bench.omega(&["top", "--once", "--interval", "100ms"]);
    assert_eq!((none.code, none.out.as_str()), (Some(0), "No guest runs here\n"), "{none:?}");
    let disk = format!("disk = [{{ remote = {{ agent = '{}', volume = 'root' }} }}]", agent::start());
    let code = Code::new().await_button().power_off();
    let mut far = bench.run(&bench.guest("far", &code, &disk), &[]);
    far.until("listening\n");
    let mut alone = bench.run(&bench.guest("alone", &code, ""), &[]);
    alone.until("listening\n");

    let once = bench.omega(&["top", "--once", "--json", "--interval", "1s"]);
    let report: serde_json::Value = serde_json::from_str(&once.out).expect("it is JSON");
    let guests = report["guests"].as_array().expect("a list");
    assert_eq!(guests.iter().map(|g| g["name"].as_str()).collect::<Vec<_>>(), [Some("alone"), Some("far")]);
    assert_eq!(guests[0]["peers"], serde_json::json!([]), "{once:?}");
    assert_eq!(
        (&guests[0]["memory"], &guests[1]["waits_for"]),
        (&serde_json::Value::Null, &serde_json::Value::Null),
        "all is here: {once:?}"
    );
    let peer = &guests[1]["peers"][0];
    assert_eq!((&peer["device"], &peer["name"]), (&"disk0".into(), &"attic".into()), "{once:?}");
    assert_eq!((&peer["connected"], &peer["carrier"]), (&true.into(), &"tcp".into()), "{once:?}");
    let class = &peer["classes"][0];
    assert_eq!(class["class"], "control", "{once:?}");
    // Every 20 ms, if the machine is quick enough; at least one.
    let rate = class["requests_per_s"].as_f64().expect("a number");
    assert!((0.4..=60.0).contains(&rate), "{once:?}");
    let number = |name: &str| class[name].as_f64().unwrap_or_else(|| panic!("{name} in {once:?}"));
    assert!(0.0 < number("p50_us") && number("p50_us") <= number("p99_us"), "{once:?}");
    assert!(number("p99_us") <= number("max_us"), "{once:?}");
    let operations = peer["operations"].as_array().expect("a list");
    let renew = operations.iter().find(|of| of["operation"] == "renew").expect("it was renewed");
    assert_eq!(renew["requests_per_s"], class["requests_per_s"], "nothing else was asked: {once:?}");

    let table = bench.omega(&["top", "--once", "--interval", "300ms"]);
    assert!(table.out.starts_with("alone  running  1 vCPU  "), "{table:?}");
    assert!(table.out.contains("\n  disk0 on attic  tcp  out 0.0 in 0.0 MiB/s  credit "), "{table:?}");
    assert!(table.out.contains("\n    control "), "{table:?}");
    assert!(table.out.lines().all(|line| line.chars().count() <= 80), "{table:?}");

    let counters = bench.omega(&["status", "far", "--json"]);
    let status: serde_json::Value = serde_json::from_str(&counters.out).expect("it is JSON");
    assert_eq!(status["counters"]["disk0"]["peer_connects"], 1, "{counters:?}");
    assert!(status["counters"]["disk0"]["peer_requests"].as_u64() > Some(2), "{counters:?}");

    let piped = bench.omega(&["top"]);
    assert_eq!(piped.code, Some(2), "{piped:?}");
    assert!(piped.err.contains("`omega top --once`"), "{piped:?}");
    for (name, guest) in [("far", far), ("alone", alone)] {
        assert_eq!(bench.omega(&["stop", name]).code, Some(0));
        assert_eq!(guest.end().code, Some(0));
    }
}
