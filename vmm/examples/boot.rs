//! Boots a kernel: `boot VMLINUZ INITRD CPUS MEMORY CMDLINE [DISK]`.
use std::time::Instant;
use vmm::config::{self, Guest};
use vmm::console::{Hub, Options as HubOptions};
use vmm::control::Controlled;
use vmm::machine::{Machine, Options};

fn main() {
    let start = Instant::now();
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    let args: Vec<String> = std::env::args().collect();
    let json = serde_json::json!({
        "name": "boot",
        "kernel": {"image": args[1], "initrd": args[2], "cmdline": args[5]},
        "cpu": {"count": args[3].parse::<u8>().unwrap()},
        "memory": {"size": args[4]},
        "disk": args[6..].iter().map(|path| serde_json::json!({"path": path})).collect::<Vec<_>>(),
    });
    let guest: Guest = serde_json::from_value(json).unwrap();
    let serial = Hub::open(&config::Serial::Terminal, HubOptions::default()).unwrap();
    let options = Options {
        allow_unfit_kvm: std::env::var_os("ALLOW").is_some(),
        cache: std::env::var_os("CACHE").map(Into::into),
        serial: serial.clone(),
        console: None,
    };
    let machine = match Machine::new(&guest, options) {
        Ok(machine) => machine,
        Err(error) => {
            eprintln!("error: {error}");
            std::process::exit(1);
        }
    };
    let controller = machine.controller();
    eprintln!("built after {:?}", start.elapsed());
    let pause = std::env::var_os("PAUSE").is_some();
    let off = std::env::var_os("OFF").is_some();
    let other = controller.clone();
    std::thread::spawn(move || {
        if pause {
            for _ in 0..20 {
                std::thread::sleep(std::time::Duration::from_millis(300));
                let t = Instant::now();
                other.pause().unwrap();
                eprintln!("paused in {:?}", t.elapsed());
                let state = other.save_state().unwrap();
                eprintln!("state {} bytes", state.to_string().len());
                other.resume().unwrap();
            }
        }
        if off {
            std::thread::sleep(std::time::Duration::from_secs(12));
            eprintln!("power off: {:?}", other.power_off());
        }
    });
    let exit = machine.run();
    serial.finish();
    eprintln!("exit {exit:?} after {:?}: {:?}", start.elapsed(), controller.counters());
    std::process::exit(exit.map_or(1, |exit| exit.code().into()));
}
