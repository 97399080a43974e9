//! What a guest sees of an agent: data, and one clear line for everything that cannot work.

mod common;

use std::time::{Duration, Instant};

use common::{Agent, Driver, image};
use devices::disk::remote::connect;
use devices::disk::{Disk, Error, Operation};
use nix::sys::signal::Signal;
use transport::buffer::Buffer;

const VOLUME: &str = "[[volume]]\nname = 'v'\npath = 'DIR/v.img'\ncreate = '8M'\n";

#[test]
fn what_a_guest_writes_it_reads_again_and_the_file_holds_it() {
    let agent = Agent::start(VOLUME);
    let mut disk = agent.disk("v");
    assert_eq!(disk.disk.geometry().size, 8 << 20);
    let bytes: Vec<u8> = (0..3 << 20).map(|i: u32| (i >> 9) as u8 ^ i as u8).collect();
    disk.write(512, &bytes).expect("it writes");
    disk.flush().expect("it flushes");
    assert!(disk.read(512, bytes.len()) == bytes, "what was written is not what is read");
    let file = std::fs::read(agent.path("v.img")).expect("readable");
    assert!(file[512..512 + bytes.len()] == bytes, "the file holds something else");
    for operation in [Operation::Discard, Operation::WriteZeroes { unmap: false }] {
        disk.write(0, &[7; 16384]).expect("it writes");
        disk.ask(operation, 4096, 8192, Buffer::empty()).result.expect("it clears");
        assert_eq!(disk.read(4096, 8192), vec![0; 8192], "{operation:?}");
        assert_eq!(disk.read(0, 4096), vec![7; 4096], "{operation:?}");
    }
}

#[test]
fn a_graceful_stop_finishes_what_is_in_flight_and_ends_with_success() {
    let mut agent = Agent::start(VOLUME);
    let mut disk = agent.disk("v");
    disk.write(0, &[1; 4096]).expect("it writes");
    let start = Instant::now();
    assert_eq!(agent.end(Signal::SIGTERM), Some(0), "{}", agent.log());
    assert!(start.elapsed() < Duration::from_secs(8), "{:?}", start.elapsed());
    // The log comes through a pipe, which may still hold its end.
    let until = Instant::now() + Duration::from_secs(10);
    while !agent.log().contains("Stopped;") && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(agent.log().contains("everything acknowledged is on stable storage"), "{}", agent.log());
    agent.run();
    assert_eq!(disk.read(0, 4096), [1; 4096]);
    disk.write(4096, &[2; 4096]).expect("the lease goes on");
}

#[test]
fn an_agent_that_is_missing_is_one_clear_line() {
    let mut agent = Agent::start(VOLUME);
    agent.end(Signal::SIGKILL);
    let start = Instant::now();
    let error = connect(agent.options("v"), Duration::from_millis(500)).err().expect("refused").to_string();
    assert!(error.contains(&agent.address) && error.contains("cannot be reached"), "{error}");
    assert!(!error.contains('\n') && start.elapsed() < Duration::from_secs(5), "{error}");
}

#[test]
fn a_wrong_volume_name_is_one_clear_line_with_the_right_ones() {
    let agent = Agent::start(VOLUME);
    let error = agent.connect("w").err().expect("refused").to_string();
    assert!(error.contains("no volume named w") && error.contains("it serves v"), "{error}");
}

#[test]
fn a_volume_that_is_leased_is_refused_with_its_holders_name() {
    let agent = Agent::start(VOLUME);
    let mut first = agent.disk("v");
    first.write(0, &[1; 512]).expect("it writes");
    let options = agent.options("v");
    let second = std::thread::spawn(move || {
        connect(options, Duration::from_secs(10)).err().map(|error| error.to_string())
    });
    while !second.is_finished() {
        first.idle(Duration::from_millis(50));
    }
    let error = second.join().expect("it ends").expect("refused");
    assert!(error.contains("leased") && error.contains("guest@test"), "{error}");
    first.close();
    let mut second = agent.disk("v");
    assert_eq!(second.read(0, 512), [1; 512], "a lease that was given back is free at once");
}

#[test]
fn a_lease_whose_holder_died_is_waited_for() {
    let agent = Agent::start(VOLUME);
    let first = agent.disk("v");
    // As a process that is killed: nothing is given back.
    let Driver { disk, ring, .. } = first;
    std::mem::forget(disk);
    drop(ring);
    let start = Instant::now();
    agent.disk("v").read(0, 512);
    assert!(start.elapsed() < Duration::from_secs(8), "{:?}", start.elapsed());
}

#[test]
fn a_stale_holder_is_fenced() {
    let agent = Agent::start(VOLUME);
    let mut stale = agent.disk("v");
    stale.write(0, &[1; 512]).expect("it writes");
    // It is silent for longer than its lease lasts, as a frozen PC is.
    std::thread::sleep(Duration::from_millis(2500));
    let mut fresh = agent.disk("v");
    fresh.write(0, &[2; 512]).expect("it writes");
    let error = stale.write(0, &[3; 512]).expect_err("fenced");
    assert!(matches!(error, Error::Fenced(_)), "{error}");
    assert!(error.to_string().contains("lease was lost"), "{error}");
    assert_eq!(fresh.read(0, 512), [2; 512]);
    let again = stale.ask(Operation::Read, 0, 512, Buffer::zeroed(512));
    assert!(matches!(again.result, Err(Error::Fenced(_))), "for good");
}

#[test]
fn a_volume_that_no_disk_can_be_is_refused_with_the_reason() {
    let volumes =
        "[[volume]]\nname = 'odd'\npath = 'DIR/odd'\n[[volume]]\nname = 'gone'\npath = 'DIR/gone'\n";
    let agent = Agent::start(volumes);
    for (name, expected) in [("odd", "is 1000 bytes long"), ("gone", "No such file")] {
        if name == "odd" {
            image(&agent.path("odd"), 1000);
        }
        let error = agent.connect(name).err().expect("refused").to_string();
        assert!(error.contains(expected) && error.contains(name), "{error}");
    }
    image(&agent.path("gone"), 1 << 20);
    assert_eq!(agent.disk("gone").read(0, 512), [0; 512], "it is looked for again");
}

#[test]
fn a_volume_that_became_shorter_is_not_written_to() {
    let mut agent = Agent::start(VOLUME);
    let mut disk = agent.disk("v");
    disk.write(0, &[1; 512]).expect("it writes");
    agent.end(Signal::SIGKILL);
    let file = std::fs::OpenOptions::new().write(true).open(agent.path("v.img")).expect("it is there");
    file.set_len(4 << 20).expect("it shrinks");
    agent.run();
    let error = disk.write(0, &[2; 512]).expect_err("refused");
    assert!(error.to_string().contains("another image"), "{error}");
}

#[test]
fn a_read_only_volume_is_shared_and_refuses_writers() {
    let agent = Agent::start("[[volume]]\nname = 'r'\npath = 'DIR/r.img'\nread_only = true\n");
    image(&agent.path("r.img"), 1 << 20);
    let error = agent.connect("r").err().expect("refused").to_string();
    assert!(error.contains("read-only") && error.contains("read_only = true"), "{error}");
    let reader = || {
        let mut options = agent.options("r");
        options.read_only = true;
        Driver::new(connect(options, Duration::from_secs(10)).expect("it connects"))
    };
    let (mut one, mut two) = (reader(), reader());
    assert_eq!(one.read(0, 512), two.read(0, 512));
    assert!(matches!(one.write(0, &[1; 512]), Err(Error::ReadOnly)));
}

#[test]
fn an_image_that_another_process_uses_is_refused() {
    let agent = Agent::start(VOLUME);
    let second = Agent::start(&VOLUME.replace("DIR", &agent.folder.path().display().to_string()));
    let error = second.connect("v").err().expect("refused").to_string();
    assert!(error.contains("in use by another process"), "{error}");
}

#[test]
fn the_command_line_lists_volumes_and_finds_mistakes() {
    let agent = Agent::start(VOLUME);
    let _disk = agent.disk("v");
    let run = |words: &[&str]| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_omega-agent"));
        command.arg("--config").arg(agent.config()).args(words).output().expect("it runs")
    };
    let text = String::from_utf8(run(&["volumes"]).stdout).expect("text");
    assert!(text.contains("8388608") && text.contains("guest@test"), "{text}");
    let json: serde_json::Value = serde_json::from_slice(&run(&["volumes", "--json"]).stdout).expect("JSON");
    assert_eq!(json[0]["holder"], "guest@test");
    let json: serde_json::Value =
        serde_json::from_slice(&run(&["inventory", "--json"]).stdout).expect("JSON");
    assert!(json["memory"]["total"].as_u64().expect("a number") > 0);
    agent.configure("[[volume]]\nname = 'v'\npaht = 'x'\n");
    let output = run(&["validate"]);
    let text = String::from_utf8(output.stderr).expect("text");
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert!(text.contains("agent.toml:7:") && text.contains("`path`"), "{text}");
    agent.configure("[[volume]]\nname = 'x'\npath = 'DIR/missing'\n");
    let output = run(&["validate"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("No such file"));
}
