//! `omega run` and the commands that steer it, with guests of a few instructions on this machine's KVM.
#![allow(missing_docs)]

mod support;

use std::io::Write;
use std::time::Duration;

use nix::sys::signal::Signal;
use support::micro::Code;
use support::{Bench, eventually, kvm};

/// What a guest does that ends it, and the exit code of `omega run` then.
#[test]
fn each_way_a_guest_ends_has_its_exit_code() {
    if !kvm() {
        return;
    }
    let bench = Bench::new();
    let cases = [
        ("off", Code::new().say("bye\n").power_off(), "", 0, "The guest powered off"),
        ("reboot", Code::new().say("bye\n").reboot(), "on = { reboot = 'exit' }", 10, "The guest rebooted"),
        ("panic", Code::new().say("bye\n").panic(), "", 11, "The guest's kernel panicked"),
        ("fault", Code::new().say("bye\n").triple_fault(), "", 12, "triple fault"),
    ];
    for (name, code, more, expected, said) in cases {
        let config = bench.guest(name, &code, more);
        let outcome = bench.run(&config, &[]).end();
        assert_eq!(outcome.code, Some(expected), "{name}: {outcome:?}");
        assert!(outcome.out.contains("bye\n"), "{name}: the last output is shown: {outcome:?}");
        assert!(outcome.err.contains(said), "{name}: {outcome:?}");
        assert!(!bench.runtime().join(name).exists(), "{name}: nothing is left behind");
    }
}

#[test]
fn a_guest_that_reboots_starts_again() {
    if !kvm() {
        return;
    }
    let bench = Bench::new();
    let config = bench.guest("again", &Code::new().say("up\n").echo_until(b'r').reboot(), "");
    let mut guest = bench.run(&config, &[]);
    guest.until("up\n");
    guest.child.stdin.as_mut().expect("a pipe").write_all(b"r").expect("it is read");
    guest.until("up\nrup\n");
    let status = bench.omega(&["status", "again", "--json"]);
    let value: serde_json::Value = serde_json::from_str(&status.out).expect("it is JSON");
    assert_eq!(value["resets"], 1, "{status:?}");
    guest.signal(Signal::SIGQUIT);
    assert_eq!(guest.end().code, Some(13));
}

#[test]
fn the_first_signal_presses_the_power_button_and_the_second_ends_the_guest() {
    if !kvm() {
        return;
    }
    let bench = Bench::new();
    let config = bench.guest("polite", &Code::new().await_button().say("pressed\n").power_off(), "");
    let mut guest = bench.run(&config, &[]);
    guest.until("listening\n");
    guest.signal(Signal::SIGTERM);
    let outcome = guest.end();
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    assert!(outcome.out.contains("pressed\n"), "{outcome:?}");

    let config = bench.guest("deaf", &Code::new().say("deaf\n").hang(), "");
    let mut guest = bench.run(&config, &[]);
    guest.until("deaf\n");
    guest.signal(Signal::SIGINT);
    std::thread::sleep(Duration::from_millis(200));
    assert!(guest.child.try_wait().expect("it is a child").is_none(), "one signal does not end it");
    guest.signal(Signal::SIGTERM);
    let outcome = guest.end();
    assert_eq!(outcome.code, Some(13), "{outcome:?}");
}

#[test]
fn a_button_that_is_pressed_before_the_guest_listens_is_pressed_again() {
    if !kvm() {
        return;
    }
    let bench = Bench::new();
    let code = Code::new().say("early\n").echo_until(b'g').await_button().power_off();
    let config = bench.guest("early", &code, "");
    let mut guest = bench.run(&config, &[]);
    guest.until("early\n");
    guest.signal(Signal::SIGTERM);
    std::thread::sleep(Duration::from_millis(300));
    guest.child.stdin.as_mut().expect("a pipe").write_all(b"g").expect("it is read");
    let outcome = guest.end();
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
}

#[test]
fn a_running_guest_is_listed_paused_resumed_and_stopped() {
    if !kvm() {
        return;
    }
    let bench = Bench::new();
    let none = bench.omega(&["ps", "--json"]);
    assert_eq!((none.code, none.out.as_str()), (Some(0), "[]\n"), "{none:?}");
    let code = Code::new().await_button().say("pressed\n").power_off();
    let config = bench.guest("g1", &code, "");
    let mut guest = bench.run(&config, &["--name", "other", "--cpus", "2"]);
    guest.until("listening\n");
    let list = bench.omega(&["ps", "--json"]);
    let value: serde_json::Value = serde_json::from_str(&list.out).expect("it is JSON");
    assert_eq!(value[0]["name"], "other", "{list:?}");
    assert_eq!(value[0]["state"], "running", "{list:?}");
    assert_eq!(value[0]["vcpus"], 2, "{list:?}");
    assert_eq!(value[0]["memory"], "16M", "{list:?}");
    assert!(bench.omega(&["ps"]).out.contains("other"), "{list:?}");

    let again = bench.run(&config, &["--name", "other"]).end();
    assert_eq!(again.code, Some(1), "{again:?}");
    assert!(again.err.contains("omega: The guest `other` runs already, in process "), "{again:?}");

    let misspelt = bench.omega(&["status", "othr"]);
    assert_eq!(misspelt.code, Some(1), "{misspelt:?}");
    assert_eq!(misspelt.err, "omega: No guest `othr` runs here; did you mean `other`?\n");

    let pause = bench.omega(&["pause", "other"]);
    assert_eq!((pause.code, pause.err.as_str()), (Some(0), ""), "{pause:?}");
    let status = bench.omega(&["status", "other"]);
    assert!(status.out.contains("state     paused"), "{status:?}");
    let stop = bench.omega(&["stop", "other"]);
    assert_eq!(stop.code, Some(1), "{stop:?}");
    assert!(stop.err.contains("`omega stop --force other` ends it at once"), "{stop:?}");
    let resume = bench.omega(&["resume", "other"]);
    assert_eq!((resume.code, resume.err.as_str()), (Some(0), ""), "{resume:?}");
    let stop = bench.omega(&["stop", "other"]);
    assert_eq!((stop.code, stop.err.as_str()), (Some(0), ""), "{stop:?}");
    let outcome = guest.end();
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    assert!(outcome.out.ends_with("pressed\n"), "{outcome:?}");
}

#[test]
fn a_guest_that_does_not_power_off_is_reported_and_ended_by_force() {
    if !kvm() {
        return;
    }
    let bench = Bench::new();
    let config = bench.guest("stubborn", &Code::new().await_button().hang(), "");
    let mut guest = bench.run(&config, &[]);
    guest.until("listening\n");
    let stop = bench.omega(&["stop", "stubborn", "--timeout", "200ms"]);
    assert_eq!(stop.code, Some(1), "{stop:?}");
    assert!(stop.err.contains("did not end within 200ms and runs on"), "{stop:?}");
    assert_eq!(bench.omega(&["stop", "--force", "stubborn"]).code, Some(0));
    assert_eq!(guest.end().code, Some(13));
}

#[test]
fn what_a_killed_process_left_behind_is_no_guest_and_in_nobodys_way() {
    if !kvm() {
        return;
    }
    let bench = Bench::new();
    let config = bench.guest("left", &Code::new().await_button().power_off(), "");
    let mut guest = bench.run(&config, &[]);
    guest.until("listening\n");
    guest.signal(Signal::SIGKILL);
    drop(guest);
    assert!(bench.runtime().join("left/control.sock").exists(), "it had no chance to put things in order");
    assert_eq!(bench.omega(&["ps", "--json"]).out, "[]\n");
    assert_eq!(bench.omega(&["stop", "left"]).code, Some(1));
    let mut guest = bench.run(&config, &[]);
    guest.until("listening\n");
    assert_eq!(bench.omega(&["stop", "left"]).code, Some(0));
    assert_eq!(guest.end().code, Some(0));
}

#[test]
fn two_consoles_see_the_same_and_the_guest_hears_both() {
    if !kvm() {
        return;
    }
    let bench = Bench::new();
    let config =
        bench.guest("c", &Code::new().say("hello\n").echo_until(b'q').power_off(), "serial = 'console'");
    let guest = bench.run(&config, &[]);
    eventually("the guest runs", || bench.omega(&["ps"]).out.contains("running"));
    let attach = || {
        let mut command = bench.command(&["console", "c"]);
        command.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
        command.stderr(std::process::Stdio::piped());
        support::Running { child: command.spawn().expect("the binary starts"), output: String::new() }
    };
    let (mut first, mut second) = (attach(), attach());
    first.until("hello\n");
    second.until("hello\n");
    first.child.stdin.as_mut().expect("a pipe").write_all(b"one").expect("it is read");
    second.until("one");
    second.child.stdin.as_mut().expect("a pipe").write_all(b"q").expect("it is read");
    assert_eq!(guest.end().code, Some(0));
    for console in [first, second] {
        let outcome = console.end();
        assert_eq!(outcome.code, Some(0), "{outcome:?}");
        assert!(outcome.out.ends_with("oneq"), "{outcome:?}");
    }
}

#[test]
fn a_process_that_was_told_to_ignore_a_hangup_does() {
    if !kvm() {
        return;
    }
    let bench = Bench::new();
    let code = Code::new().await_button().power_off();
    let config = bench.guest("nohup", &code, "");
    let omega = bench.command(&["run", config.to_str().expect("ASCII"), "--allow-unfit-kvm"]);
    let mut command = std::process::Command::new("nohup");
    command.arg(omega.get_program()).args(omega.get_args()).env("OMEGA_RUNTIME_DIR", bench.runtime());
    command.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
    command.stderr(std::process::Stdio::piped());
    let child = command.spawn().expect("nohup is there");
    let mut guest = support::Running { child, output: String::new() };
    guest.until("listening\n");
    guest.signal(Signal::SIGHUP);
    std::thread::sleep(Duration::from_millis(300));
    assert!(bench.omega(&["ps"]).out.contains("running"));
    guest.signal(Signal::SIGTERM);
    assert_eq!(guest.end().code, Some(0));
}

#[test]
fn an_agent_that_is_missing_is_said_in_one_line_and_waiting_for_it_can_be_ended() {
    if !kvm() {
        return;
    }
    let bench = Bench::new();
    let closed =
        std::net::TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("an address");
    let disk = format!("disk = [{{ remote = {{ agent = '{closed}', volume = 'root' }} }}]");
    let config = bench.guest("far", &Code::new().power_off(), &disk);
    let waiting = bench.run(&config, &["--name", "waiting"]);
    eventually("it waits", || bench.omega(&["ps"]).out.contains("starting"));
    waiting.signal(Signal::SIGINT);
    assert_eq!(waiting.end().code, Some(13));
    let waiting = bench.run(&config, &["--name", "waiting"]);
    eventually("it waits", || bench.omega(&["ps"]).out.contains("starting"));
    let stop = bench.omega(&["stop", "waiting"]);
    assert_eq!((stop.code, stop.err.as_str()), (Some(0), ""), "{stop:?}");
    assert_eq!(waiting.end().code, Some(13));
    let outcome = bench.run(&config, &["--quiet"]).end();
    assert_eq!(outcome.code, Some(1), "{outcome:?}");
    let start = format!("omega: Disk 0: The agent at {closed} cannot be reached: ");
    assert!(outcome.err.starts_with(&start), "{outcome:?}");
    assert_eq!(outcome.err.lines().count(), 1, "{outcome:?}");
    assert_eq!(outcome.out, "", "{outcome:?}");
}

#[test]
fn a_kvm_that_cannot_run_stock_kernels_is_refused_in_one_line() {
    if !kvm() {
        return;
    }
    let bench = Bench::new();
    let check = bench.omega(&["check", "--json"]);
    let report: serde_json::Value = serde_json::from_str(&check.out).expect("it is JSON");
    let lines = report["lines"].as_array().expect("a list");
    let fit = lines.iter().any(|line| line["name"] == "stock kernels" && line["state"] == "ok");
    assert_eq!(check.code, Some(i32::from(report["guests_can_run"] != true)), "{check:?}");
    if fit {
        eprintln!("cannot run: this PC's KVM is fit");
        return;
    }
    let config = bench.guest("unfit", &Code::new().power_off(), "");
    let outcome = bench.omega(&["run", "-q", config.to_str().expect("ASCII")]);
    assert_eq!(outcome.code, Some(1), "{outcome:?}");
    assert!(outcome.err.starts_with("omega: This PC's /dev/kvm cannot run stock kernels: "), "{outcome:?}");
    assert_eq!(outcome.err.lines().count(), 1, "{outcome:?}");
}
