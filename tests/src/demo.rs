//! `make demo`: Debian, unmodified, boots with its root disk on a second PC; twice, so that one sees that what
//! it wrote is there.

use std::io::{self, Write};
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use crate::guest::{Guest, Running};
use crate::host::host;
use crate::images::Image;
use crate::scene::Scene;

const VOLUME: &str = "debian-root";
const FILE: &str = "/root/hello";

mod span;

pub use span::span;

/// A line of the demonstration itself, told apart from what the PCs print.
fn say(line: &str) {
    println!("\n\x1b[1m== {line}\x1b[0m");
}

/// Where the guest's console is shown: all of it but the marks between which a command's output is.
#[derive(Default)]
struct Screen {
    /// The line that is not complete yet, and how much of it is shown.
    line: Vec<u8>,
    shown: usize,
}

const MARKS: [&[u8]; 3] = [b"begin-42", b"end-42-", b"ready-42"];

impl Write for Screen {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for byte in bytes.iter().filter(|byte| **byte != b'\r') {
            self.line.push(*byte);
            if *byte == b'\n' {
                self.flush()?;
                (self.line, self.shown) = (Vec::new(), 0);
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        let may_be_mark = |mark: &&[u8]| {
            let common = mark.len().min(self.line.len());
            mark[..common] == self.line[..common]
        };
        let mut out = io::stdout().lock();
        if self.shown == self.line.len() || MARKS.iter().any(may_be_mark) {
            return Ok(());
        }
        if self.shown == 0 {
            out.write_all("  │ ".as_bytes())?;
        }
        out.write_all(&self.line[self.shown..])?;
        self.shown = self.line.len();
        out.flush()
    }
}

/// Shows it all; ends with the line `demo: ok`, or an error.
pub fn demo() -> Result<()> {
    let start = Instant::now();
    say(&format!("Starting two lab PCs, {}", how_they_run()?));
    let scene = Scene::with_debian("demo")?;
    let (console, helper) = (&scene.console, &scene.helper);
    show(&scene)?;

    say("Starting omega-agent on `helper` by its systemd unit; its second disk becomes the volume");
    scene.serve(&[(VOLUME, "/dev/vdb")])?;
    println!(
        "{}",
        helper.run("systemctl status --no-pager --lines=0 omega-agent; cat /etc/omega/agent.toml")?.ok()?
    );

    let debian = Guest::debian("demo").remote_disk(&scene.agent(), VOLUME, "");
    say("The guest, on `console`: /root/demo.toml");
    println!("{}", debian.toml().trim());

    say(&format!(
        "omega run demo.toml: the guest's console (its root disk is {VOLUME} on {})",
        helper.address()
    ));
    let guest = boot(&debian, &scene)?;
    let uname = guest.shell("uname -a")?;
    let kernel = Image::get("debian")?.kernel_version()?;
    ensure!(uname.contains(&kernel), "The guest runs another kernel than Debian's {kernel}: {uname}");
    let written = format!("written by the first boot, {} s into the demo", start.elapsed().as_secs());
    guest.shell(&format!("echo {written} >{FILE}; sync"))?;
    let root = guest.shell("findmnt -no SOURCE,FSTYPE,SIZE /; cat /sys/block/vda/serial")?;
    power_off(&guest).context("After the first boot")?;

    say("What the guest said, and where its root disk is");
    println!("guest    {uname}");
    println!("root     {}", root.replace('\n', "  "));
    println!(
        "volume   {VOLUME} at {}:7420, on `{}`, not on `{}`",
        helper.address(),
        helper.name(),
        console.name()
    );
    let served = helper.run("journalctl --no-pager -o cat -u omega-agent | tail -n 4")?.ok()?;
    println!("agent    {}", served.replace('\n', "\n         "));

    say("omega run demo.toml once more");
    let guest = boot(&debian, &scene)?;
    let read = guest.shell(&format!("cat {FILE}"))?;
    ensure!(read == written, "The file holds `{read}` instead of `{written}`");
    power_off(&guest).context("After the second boot")?;

    say("The file that the first boot wrote, as the second boot read it");
    println!("{FILE}: {read}");
    println!("\n({:.0} s)\ndemo: ok", start.elapsed().as_secs_f32());
    Ok(())
}

fn how_they_run() -> Result<&'static str> {
    Ok(if host()?.kvm {
        "with this machine's own KVM"
    } else {
        "emulated, since this machine's KVM cannot run PCs"
    })
}

/// Says what the PCs are.
fn show(scene: &Scene) -> Result<()> {
    for pc in [&scene.console, &scene.helper] {
        println!(
            "{:<8} {}  {}",
            pc.name(),
            pc.address(),
            pc.run("uname -srm; test -c /dev/kvm && echo /dev/kvm")?.ok()?.replace('\n', "  ")
        );
    }
    Ok(())
}

fn boot(debian: &Guest, scene: &Scene) -> Result<Running> {
    let guest = debian.start(&scene.console)?;
    guest.process().tee(Screen::default());
    guest.log_in()?;
    Ok(guest)
}

fn power_off(guest: &Running) -> Result<()> {
    guest.types("systemctl poweroff\n")?;
    let output = guest.wait()?;
    ensure!(output.code == 0, "The guest did not power off but ended with {}", output.code);
    Ok(())
}
