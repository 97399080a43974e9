//! A filter cannot be taken off, and a violation ends the process: each case runs in a process of its own,
//! this test program started again with the case in its environment.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Output};
use std::time::Duration;

use super::*;

const MACHINE: &str = "OMEGA_SECCOMP_TEST_MACHINE";
const CASE: &str = "OMEGA_SECCOMP_TEST_CASE";

/// What the process started again does: `MODE ROLE ACT`.
#[test]
fn runs_the_case_that_another_test_asks_for() {
    let Ok(case) = std::env::var(CASE) else { return };
    let words: Vec<&str> = case.split(' ').collect();
    let [mode, role, act] = words[..] else { panic!("{case}") };
    let role = Role::ALL.into_iter().find(|r| format!("{r:?}") == role).expect("a role");
    install(mode.parse().expect("a mode")).expect("it installs");
    PAIR.get_or_init(|| std::sync::Mutex::new(UnixStream::pair().ok()));
    let act = act.to_owned();
    let thread = devices::thread::spawn(role, "confined", move || perform(&act)).expect("it is confined");
    thread.join().expect("it ends");
    println!("the end");
    std::process::exit(0);
}

/// Runs a micro-guest whose threads are all confined, and ends with the machine's exit code. `MODE CODE`,
/// where the code is `off` (say something and power off) or `halt`.
#[test]
fn runs_the_machine_that_another_test_asks_for() {
    let Ok(case) = std::env::var(MACHINE) else { return };
    let (mode, directory) = case.split_once(' ').expect("a mode and a directory");
    install(mode.parse().expect("a mode")).expect("it installs");
    let directory = std::path::Path::new(directory);
    let config: crate::config::Guest =
        toml::from_str(&std::fs::read_to_string(directory.join("guest.toml")).expect("it was written"))
            .expect("it is right");
    let serial =
        crate::console::Hub::open(&config.serial, crate::console::Options::default()).expect("a hub");
    let options = crate::machine::Options {
        allow_unfit_kvm: true,
        identity: None,
        cache: None,
        serial: serial.clone(),
        console: None,
    };
    let exit = crate::machine::Machine::new(&config, options).and_then(crate::machine::Machine::run);
    serial.finish();
    match exit {
        Ok(exit) => std::process::exit(i32::from(exit.code()) + 100),
        Err(error) => {
            eprintln!("{error}");
            std::process::exit(1);
        }
    }
}

fn perform(act: &str) {
    match act {
        "exec" => drop(Command::new("/bin/true").status()),
        "create-file" => drop(File::create("/tmp/omega-seccomp-test")),
        "open-file" => drop(File::open("/etc/hostname")),
        "listen" => drop(TcpListener::bind("127.0.0.1:0")),
        "wait-for-processes" => drop(nix::sys::wait::waitpid(None, None)),
        "executable-memory" => drop(executable::protect_nothing()),
        "converse" => converse(),
        "spawn" => drop(std::thread::spawn(|| ()).join()),
        "usual" => usual(),
        other => panic!("{other}"),
    }
}

#[allow(unsafe_code)] // one call on an empty range
mod executable {
    pub(super) fn protect_nothing() -> nix::Result<()> {
        // SAFETY: an empty range names no memory.
        let result = unsafe { libc::mprotect(std::ptr::null_mut(), 0, libc::PROT_READ | libc::PROT_EXEC) };
        nix::errno::Errno::result(result).map(drop)
    }
}

/// What every thread does all day: allocate, wait, write to eventfds and sockets, log, panic and catch it.
fn usual() {
    let big = vec![7u8; 64 << 20];
    assert_eq!(big.iter().rev().take(9).map(|byte| u32::from(*byte)).sum::<u32>(), 63);
    // What the allocator does when much of a thread's heap is free again.
    let small: Vec<Vec<u8>> = (0..2000).map(|_| vec![7; 4000]).collect();
    assert_eq!(small.iter().map(Vec::len).sum::<usize>(), 8_000_000);
    drop(small);
    let map: std::collections::HashMap<u32, u32> = (0..1000).map(|i| (i, i)).collect();
    assert_eq!(map.len(), 1000);
    std::thread::sleep(Duration::from_millis(1));
    let (tell, told) = std::sync::mpsc::channel::<()>();
    assert!(told.recv_timeout(Duration::from_millis(1)).is_err());
    drop(tell);
    let event = vmm_sys_util::eventfd::EventFd::new(libc::EFD_NONBLOCK);
    if let Ok(event) = event {
        event.write(1).expect("it counts");
        assert_eq!(event.read().expect("it counted"), 1);
    }
    eprintln!("a line of the log");
    assert!(std::panic::catch_unwind(|| panic!("a panic that is caught")).is_err());
}

/// What is done with a client of a Unix socket; the pair is made by who is not confined.
fn converse() {
    let (mut ours, mut theirs) =
        PAIR.get().expect("it was made before").lock().expect("one user").take().expect("once");
    ours.set_read_timeout(Some(Duration::from_secs(1))).expect("it is set");
    theirs.write_all(b"x").expect("it writes");
    let mut byte = [0];
    ours.read_exact(&mut byte).expect("it reads");
    ours.shutdown(std::net::Shutdown::Both).expect("it closes");
    assert_eq!(theirs.read(&mut byte).expect("the end"), 0);
}

type Pair = (UnixStream, UnixStream);
static PAIR: OnceLock<std::sync::Mutex<Option<Pair>>> = OnceLock::new();

fn run(mode: &str, role: Role, act: &str) -> Output {
    Command::new(std::env::current_exe().expect("this program"))
        .args(["--exact", "seccomp::tests::runs_the_case_that_another_test_asks_for", "--nocapture"])
        .env(CASE, format!("{mode} {role:?} {act}"))
        .env_remove("RUST_BACKTRACE")
        .output()
        .expect("it starts")
}

#[track_caller]
fn assert_killed(role: Role, act: &str) {
    let output = run("kill", role, act);
    assert_eq!(output.status.signal(), Some(libc::SIGSYS), "{role:?} {act}: {output:?}");
}

#[test]
fn a_vcpu_thread_that_opens_a_file_ends_the_process() {
    assert_killed(Role::Vcpu, "open-file");
}

#[test]
fn a_vcpu_thread_that_starts_a_thread_ends_the_process() {
    assert_killed(Role::Vcpu, "spawn");
}

#[test]
fn a_disk_thread_that_creates_a_file_ends_the_process() {
    assert_killed(Role::Disk, "create-file");
}

#[test]
fn a_disk_thread_that_listens_ends_the_process() {
    assert_killed(Role::Disk, "listen");
}

#[test]
fn a_net_thread_that_opens_a_socket_ends_the_process() {
    assert_killed(Role::Net, "listen");
}

#[test]
fn a_device_thread_that_opens_a_socket_ends_the_process() {
    assert_killed(Role::Device, "listen");
}

#[test]
fn a_console_thread_that_opens_a_file_ends_the_process() {
    assert_killed(Role::Console, "open-file");
}

#[test]
fn a_control_thread_that_creates_a_file_ends_the_process() {
    assert_killed(Role::Control, "create-file");
}

#[test]
fn a_main_thread_that_creates_a_file_ends_the_process() {
    assert_killed(Role::Main, "create-file");
}

#[test]
fn no_thread_may_start_a_program_wait_for_processes_or_make_memory_executable() {
    for role in Role::ALL {
        for act in ["exec", "wait-for-processes", "executable-memory"] {
            assert_killed(role, act);
        }
    }
}

#[test]
fn what_every_thread_does_all_day_passes_every_filter() {
    for role in Role::ALL {
        let output = run("kill", role, "usual");
        assert!(output.status.success(), "{role:?}: {output:?}");
        assert!(String::from_utf8_lossy(&output.stdout).contains("the end"), "{role:?}: {output:?}");
    }
}

#[test]
fn explaining_names_the_thread_and_the_call() {
    let output = run("explain", Role::Vcpu, "listen");
    assert_eq!(output.status.code(), Some(128 + libc::SIGSYS), "{output:?}");
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    let wanted = format!("the thread `confined` made system call {}", libc::SYS_socket);
    assert!(text.contains(&wanted), "{text}");
}

#[test]
fn without_filters_everything_passes() {
    for mode in ["off", "log"] {
        let output = run(mode, Role::Vcpu, "listen");
        assert!(output.status.success(), "{mode}: {output:?}");
    }
}

#[test]
fn the_main_threads_filter_covers_all_others_since_they_inherit_it() {
    let main: Vec<Call> = calls::of(Role::Main).collect();
    for role in Role::ALL {
        for call in calls::of(role) {
            assert!(main.contains(&call), "{role:?} has {call:?}, which the main thread lacks");
        }
    }
}

#[test]
fn no_role_lists_a_call_twice_in_its_own_groups() {
    for role in [Role::Vcpu, Role::Disk, Role::Net, Role::Device, Role::Console, Role::Control] {
        let all: Vec<String> = calls::of(role).map(|call| format!("{call:?}")).collect();
        let unique: BTreeSet<&String> = all.iter().collect();
        assert_eq!(unique.len(), all.len(), "{role:?}");
    }
}

#[test]
fn the_filters_stay_small() {
    for role in Role::ALL {
        let program = compile(role, Mode::Kill).expect("it compiles");
        assert!(program.len() < 800, "{role:?}: {} instructions", program.len());
    }
}

#[test]
fn console_and_control_threads_may_talk_to_their_clients() {
    for role in [Role::Console, Role::Control] {
        let output = run("kill", role, "converse");
        assert!(output.status.success(), "{role:?}: {output:?}");
    }
}

#[test]
fn a_guests_whole_run_passes_the_filters() {
    if !std::path::Path::new("/dev/kvm").exists() {
        return eprintln!("cannot run: there is no /dev/kvm");
    }
    let directory = tempfile::tempdir().expect("a directory");
    let at = |name: &str| directory.path().join(name);
    let code = [crate::loader::micro::say("hello\n"), crate::loader::micro::power_off()].concat();
    std::fs::write(at("kernel"), crate::loader::micro::kernel(&code)).expect("it is written");
    std::fs::write(at("disk"), vec![0; 1 << 20]).expect("it is written");
    let config = format!(
        "name = 'confined'\nkernel.image = '{}'\nserial.file = '{}'\nmemory.size = '64M'\ncpu.count = 2\n\
         [[disk]]\npath = '{}'\n",
        at("kernel").display(),
        at("serial").display(),
        at("disk").display()
    );
    std::fs::write(at("guest.toml"), config).expect("it is written");
    let output = Command::new("timeout") // a guest that hangs ends with 124
        .arg("60")
        .arg(std::env::current_exe().expect("this program"))
        .args(["--exact", "seccomp::tests::runs_the_machine_that_another_test_asks_for", "--nocapture"])
        .env(MACHINE, format!("kill {}", directory.path().display()))
        .env_remove("RUST_BACKTRACE")
        .output()
        .expect("it starts");
    assert_eq!(output.status.code(), Some(100), "powered off: {output:?}");
    assert_eq!(std::fs::read_to_string(at("serial")).expect("there is output"), "hello\n");
}
