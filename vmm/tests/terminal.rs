//! A person's terminal: raw while the guest has it, as it was before afterwards, whatever happens.
#![allow(missing_docs)]

mod support;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

use nix::pty::{OpenptyResult, Winsize, openpty};
use nix::sys::signal::{Signal, kill};
use nix::sys::termios::{LocalFlags, OutputFlags, Termios, tcgetattr};
use nix::unistd::Pid;
use support::micro::Code;
use support::{Bench, eventually, kvm};

/// A process on a terminal of its own.
struct Seat {
    child: Child,
    keys: File,
    terminal: OwnedFd,
    screen: Arc<Mutex<Vec<u8>>>,
    before: Termios,
}

impl Seat {
    fn new(bench: &Bench, args: &[&str]) -> Self {
        let size = Winsize { ws_row: 40, ws_col: 100, ws_xpixel: 0, ws_ypixel: 0 };
        let OpenptyResult { master, slave } = openpty(Some(&size), None).expect("a terminal");
        let before = tcgetattr(&slave).expect("its settings");
        let omega = bench.command(args);
        // The terminal must be the controlling one of a session, as at a login.
        let mut command = Command::new("setsid");
        command.arg("--ctty").arg(omega.get_program()).args(omega.get_args());
        for (name, value) in omega.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        let end = || Stdio::from(slave.try_clone().expect("a descriptor"));
        command.current_dir(omega.get_current_dir().expect("it was set"));
        let child = command.stdin(end()).stdout(end()).stderr(end()).spawn().expect("setsid is there");
        let mut from = File::from(master.try_clone().expect("a descriptor"));
        let screen = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&screen);
        std::thread::spawn(move || {
            let mut bytes = [0; 1024];
            while let Ok(taken @ 1..) = from.read(&mut bytes) {
                seen.lock().expect("no panic").extend_from_slice(&bytes[..taken]);
            }
        });
        Self { child, keys: File::from(master), terminal: slave, screen, before }
    }

    fn screen(&self) -> String {
        String::from_utf8_lossy(&self.screen.lock().expect("no panic")).into_owned()
    }

    fn shows(&self, text: &str) {
        eventually(&format!("the screen shows {text:?}"), || {
            assert!(!self.screen().contains("forbids"), "{}", self.screen());
            self.screen().contains(text)
        });
    }

    fn types(&mut self, keys: &[u8]) {
        self.keys.write_all(keys).expect("the terminal takes keys");
    }

    fn is_raw(&self) -> bool {
        let now = tcgetattr(&self.terminal).expect("its settings");
        !now.local_flags.intersects(LocalFlags::ICANON | LocalFlags::ECHO | LocalFlags::ISIG)
            && !now.output_flags.contains(OutputFlags::OPOST)
    }

    fn is_restored(&self) -> bool {
        tcgetattr(&self.terminal).expect("its settings") == self.before
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).expect("it runs");
    }

    fn is_stopped(&self) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap_or_default();
        stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('T'))
    }

    /// Waits for the end; its code, or none after a signal.
    fn end(&mut self) -> Option<i32> {
        let mut status = None;
        eventually("it ends", || {
            status = self.child.try_wait().expect("it is a child");
            status.is_some()
        });
        status.and_then(|status| status.code())
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A guest that echoes, on a terminal that it has taken.
fn seated(bench: &Bench) -> Seat {
    let code = Code::new().say("ready\r\n").echo_until(b'Q').say("bye\r\n").power_off();
    let config = bench.guest("t", &code, "");
    let config = config.to_str().expect("ASCII");
    let seat = Seat::new(bench, &["run", config, "--allow-unfit-kvm", "--seccomp", "explain"]);
    seat.shows("ready\r\n");
    eventually("the terminal is raw", || seat.is_raw());
    seat
}

#[test]
fn all_keys_go_to_the_guest_and_the_terminal_is_as_before_afterwards() {
    if !kvm() {
        return;
    }
    let bench = Bench::new();
    let mut seat = seated(&bench);
    assert!(seat.screen().contains("Keys go to the guest; Ctrl-] and then ? for help\r\n"));
    seat.types(b"a\x03b\x1a\x1d\x1dc\x1d?");
    seat.shows("a\x03b\x1a\x1dc");
    seat.shows("power off, again to end");
    assert!(seat.is_raw());
    seat.types(b"Q");
    assert_eq!(seat.end(), Some(0), "{}", seat.screen());
    assert!(seat.is_restored());
    seat.shows("bye\r\n");
    seat.shows("The guest powered off");
}

#[test]
fn the_escape_key_pauses_resumes_and_ends_the_guest() {
    if !kvm() {
        return;
    }
    let bench = Bench::new();
    let mut seat = seated(&bench);
    seat.types(b"\x1dp");
    seat.shows("The guest is paused\r\n");
    assert!(bench.omega(&["ps"]).out.contains("paused"));
    seat.types(b"\x1dp");
    seat.shows("The guest is resumed\r\n");
    // It does not listen to its power button; the second time ends it.
    seat.types(b"\x1dq");
    seat.shows("the next time ends it at once\r\n");
    seat.types(b"\x1dq");
    assert_eq!(seat.end(), Some(13), "{}", seat.screen());
    assert!(seat.is_restored());
}

#[test]
fn a_process_that_dies_of_its_own_fault_leaves_the_terminal_as_before() {
    if !kvm() {
        return;
    }
    for signal in [Signal::SIGSEGV, Signal::SIGABRT, Signal::SIGBUS] {
        let bench = Bench::new();
        let mut seat = seated(&bench);
        seat.signal(signal);
        assert_eq!(seat.end(), None, "{signal}: {}", seat.screen());
        assert!(seat.is_restored(), "{signal}");
    }
}

#[test]
fn a_stopped_process_gives_the_terminal_back_and_takes_it_again() {
    if !kvm() {
        return;
    }
    let bench = Bench::new();
    let mut seat = seated(&bench);
    seat.signal(Signal::SIGTSTP);
    eventually("it is stopped", || seat.is_stopped());
    assert!(seat.is_restored());
    seat.signal(Signal::SIGCONT);
    eventually("the terminal is raw again", || seat.is_raw());
    seat.types(b"again");
    seat.shows("again");
    seat.types(b"Q");
    assert_eq!(seat.end(), Some(0), "{}", seat.screen());
    assert!(seat.is_restored());
}

#[test]
fn a_terminal_that_goes_away_asks_the_guest_to_power_off() {
    if !kvm() {
        return;
    }
    let bench = Bench::new();
    let code = Code::new().await_button().power_off();
    let config = bench.guest("h", &code, "");
    let config = config.to_str().expect("ASCII");
    let mut seat = Seat::new(&bench, &["run", config, "--allow-unfit-kvm"]);
    seat.shows("listening\n");
    seat.signal(Signal::SIGHUP);
    assert_eq!(seat.end(), Some(0), "{}", seat.screen());
}

#[test]
fn a_console_is_detached_by_its_escape_key_and_the_guest_runs_on() {
    if !kvm() {
        return;
    }
    let bench = Bench::new();
    let code = Code::new().say("ready\r\n").echo_until(b'Q').power_off();
    let config = bench.guest("d", &code, "serial = 'console'");
    let guest = bench.run(&config, &[]);
    eventually("the guest runs", || bench.omega(&["ps"]).out.contains("running"));
    let mut seat = Seat::new(&bench, &["console", "d"]);
    seat.shows("ready\r\n");
    seat.shows("Ctrl-] and then ? for help]\r\n");
    eventually("the terminal is raw", || seat.is_raw());
    seat.types(b"\x03x");
    seat.shows("\x03x");
    seat.signal(Signal::SIGTSTP);
    eventually("it is stopped", || seat.is_stopped());
    assert!(seat.is_restored());
    seat.signal(Signal::SIGCONT);
    eventually("the terminal is raw again", || seat.is_raw());
    seat.types(b"\x1dp");
    seat.shows("pause: done");
    seat.types(b"\x1dp");
    seat.shows("resume: done");
    seat.types(b"\x1dq");
    assert_eq!(seat.end(), Some(0), "{}", seat.screen());
    assert!(seat.is_restored());
    seat.shows("detached; the guest runs on");
    assert!(bench.omega(&["ps"]).out.contains("running"));
    let mut second = Seat::new(&bench, &["console", "d"]);
    second.shows("\x03x");
    eventually("the terminal is raw", || second.is_raw());
    second.types(b"\x1dk");
    assert_eq!(second.end(), Some(0), "{}", second.screen());
    assert!(second.is_restored());
    second.shows("the console ended");
    assert_eq!(guest.end().code, Some(13));
}

#[test]
fn without_its_virtio_console_a_guest_says_so() {
    if !kvm() {
        return;
    }
    let bench = Bench::new();
    let config = bench.guest("v", &Code::new().await_button().power_off(), "");
    let mut guest = bench.run(&config, &[]);
    guest.until("listening\n");
    let outcome = bench.omega(&["console", "v", "--virtio"]);
    assert_eq!(outcome.code, Some(1));
    assert_eq!(
        outcome.err,
        "omega: The guest `v` has no virtio console; its configuration's key `console` says so\n"
    );
    assert_eq!(bench.omega(&["stop", "v"]).code, Some(0));
    assert_eq!(guest.end().code, Some(0));
}

/// Shows the other screen, and goes back.
const OTHER_SCREEN: (&str, &str) = ("\x1b[?1049h", "\x1b[?1049l");

#[test]
fn the_live_view_has_a_screen_of_its_own_and_leaves_the_terminal_as_before() {
    let bench = Bench::new();
    let mut seat = Seat::new(&bench, &["top", "--interval", "100ms"]);
    seat.shows("omega top: 0 guests, by name, every 100ms");
    seat.shows("No guest runs here; `omega run GUEST.TOML` starts one.");
    assert!(seat.is_raw() && seat.screen().contains(OTHER_SCREEN.0));
    seat.types(b"s");
    seat.shows("by traffic");
    seat.signal(Signal::SIGTSTP);
    eventually("it is stopped", || seat.is_stopped());
    assert!(seat.is_restored());
    seat.shows(OTHER_SCREEN.1);
    seat.signal(Signal::SIGCONT);
    eventually("the terminal is raw again", || seat.is_raw());
    eventually("the other screen is shown again", || seat.screen().matches(OTHER_SCREEN.0).count() == 2);
    seat.types(b"q");
    assert_eq!(seat.end(), Some(0), "{}", seat.screen());
    assert!(seat.is_restored());
    eventually("and left again", || seat.screen().trim_end().ends_with(OTHER_SCREEN.1));
}

#[test]
fn the_live_view_leaves_its_screen_however_it_ends() {
    for (signal, code) in [(Signal::SIGTERM, Some(0)), (Signal::SIGHUP, Some(0)), (Signal::SIGSEGV, None)] {
        let bench = Bench::new();
        let mut seat = Seat::new(&bench, &["top"]);
        seat.shows("omega top: 0 guests");
        seat.signal(signal);
        assert_eq!(seat.end(), code, "{signal}: {}", seat.screen());
        assert!(seat.is_restored(), "{signal}");
        seat.shows(OTHER_SCREEN.1);
    }
    let bench = Bench::new();
    let mut seat = Seat::new(&bench, &["top"]);
    seat.shows("omega top: 0 guests");
    seat.types(b"\x03");
    assert_eq!(seat.end(), Some(0), "Ctrl-C: {}", seat.screen());
    assert!(seat.is_restored());
}
