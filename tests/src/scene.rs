//! The scene of most tests: a PC that runs guests and a PC whose agent serves their disks.

use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::guest::PATIENCE;
use crate::images::{Image, binary, project};
use crate::lab::Lab;
use crate::network::Network;
use crate::pc::Pc;
use crate::runner::Process;

/// The systemd unit, as packages install it.
pub const UNIT: &str = "omega-agent.service";
const UNIT_FILE: &str = "packaging/omega-agent.service";
/// By which the agent may watch RAM.
const RULES: &str = "60-omega-userfaultfd.rules";

/// What the clocks of PCs are slowed by whose vCPUs share memory: about what an emulated processor is slower than one of
/// ours.
const SLOWER: u32 = 20;
/// The volume with a guest's root, of a [spanning](Scene::spanning) scene.
pub const ROOT: &str = "debian-root";

/// Two PCs on one network.
pub struct Scene {
    /// Runs guests.
    pub console: Arc<Pc>,
    /// Serves volumes.
    pub helper: Arc<Pc>,
    /// Further PCs that lend memory: `helper2` and so on, each a node of that name.
    pub lenders: Vec<Arc<Pc>>,
    /// Joins them.
    pub lan: Network,
    /// Holds them; last, so that it ends last.
    pub lab: Lab,
}

impl Scene {
    /// Both PCs, with Omega's programs, its unit and the mini guest, in one household that began on the console;
    /// `data` is where the helper's second disk starts from. No agent runs yet.
    pub fn new(name: &str, data: Option<&Path>) -> Result<Self> {
        Self::with_lenders(name, data, 0)
    }

    /// The same, with so many further PCs for lending memory.
    pub fn with_lenders(name: &str, data: Option<&Path>, lenders: usize) -> Result<Self> {
        Self::in_lab(Lab::new(name)?, data, lenders)
    }

    /// Both PCs for a guest with vCPUs on each, of which the helper's agent runs up to `cpus` and serves the helper's
    /// second disk, if it starts as `data`, as volume [`ROOT`]. Emulated PCs have [slower clocks](Lab::with_clock): else
    /// they would have no time for anything but their ticks.
    pub fn spanning(name: &str, data: Option<&Path>, cpus: u8) -> Result<Self> {
        Self::spanning_slower(SLOWER, name, data, cpus)
    }

    /// The same, with clocks that are so many times slower.
    pub fn spanning_slower(slower: u32, name: &str, data: Option<&Path>, cpus: u8) -> Result<Self> {
        let scene = Self::in_lab(Lab::with_clock(name, slower)?, data, 0)?;
        let volumes: &[_] = if data.is_some() { &[(ROOT, "/dev/vdb")] } else { &[] };
        configure(&scene.helper, &scene.agent(), volumes, &format!("\n[cpu]\ncount = {cpus}\n"))?;
        Ok(scene)
    }

    fn in_lab(lab: Lab, data: Option<&Path>, lenders: usize) -> Result<Self> {
        let lan = lab.network("lan");
        let console = lab.pc("console").on(&lan);
        let mut helper = lab.pc("helper").on(&lan);
        if let Some(image) = data {
            helper = helper.data(image);
        }
        let [console, helper] = lab.start([console, helper])?;
        let lenders =
            (0..lenders).map(|i| lab.pc(&lender(i)).on(&lan).start()).collect::<Result<Vec<_>>>()?;
        let mini = Image::get("mini")?;
        install_omega(&console)?;
        install_image(&console, &mini, "mini")?;
        install_agent(&helper)?;
        // A power cut would lose what was just installed.
        console.run("sync; omega ca init --name lab")?.ok()?;
        join(&console, &helper, "helper", Role::Agent)?;
        for (i, pc) in lenders.iter().enumerate() {
            install_agent(pc)?;
            join(&console, pc, &lender(i), Role::Agent)?;
        }
        Ok(Self { console, helper, lenders, lan, lab })
    }

    /// Has the first PC serve these volumes and lend so much memory, and every lender lend as much.
    pub fn lend(&self, volumes: &[(&str, &str)], memory: &str) -> Result<()> {
        configure(&self.helper, &self.helper.address(), volumes, &lends(memory))?;
        self.lenders.iter().try_for_each(|pc| configure(pc, &pc.address(), &[], &lends(memory)))
    }

    /// The same, with the Debian guest: its kernel on the console PC, its root on the helper's second disk.
    pub fn with_debian(name: &str) -> Result<Self> {
        Self::with_debian_and_lenders(name, 0)
    }

    /// The same, with further PCs for lending memory.
    pub fn with_debian_and_lenders(name: &str, lenders: usize) -> Result<Self> {
        let debian = Image::get("debian")?;
        let scene = Self::with_lenders(name, Some(&debian.file("disk.raw")), lenders)?;
        install_image(&scene.console, &debian, "debian")?;
        Ok(scene)
    }

    /// Starts the helper's agent with these volumes; see [`serve`].
    pub fn serve(&self, volumes: &[(&str, &str)]) -> Result<()> {
        serve(&self.helper, &self.helper.address(), volumes)
    }

    /// The agent as `guest.toml` names it.
    pub fn agent(&self) -> String {
        self.helper.address()
    }
}

fn lender(index: usize) -> String {
    format!("helper{}", index + 2)
}

/// The table of an agent's configuration by which it lends so much memory.
pub fn lends(size: &str) -> String {
    format!("\n[memory]\nsize = \"{size}\"\n")
}

/// What a node is there for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// It runs guests.
    Console,
    /// It serves volumes.
    Agent,
}

/// Has `joiner` join the household as node `name`, as a user would: an invitation on the PC that has the
/// authority, its token on the one that joins.
pub fn join(authority: &Pc, joiner: &Pc, name: &str, role: Role) -> Result<()> {
    let invitation = Invitation::new(authority, name, role)?;
    let join = match role {
        Role::Console => "omega join",
        Role::Agent => "omega-agent join",
    };
    joiner.run(&format!("{join} {}", invitation.token))?.ok()?;
    invitation.process.wait(PATIENCE)?.ok().map(drop)
}

/// An invitation that waits for its node.
pub struct Invitation {
    /// What `omega node invite` printed.
    pub token: String,
    /// `omega node invite`; it ends when the node has joined.
    pub process: Process,
}

impl Invitation {
    /// Invites node `name` by `omega node invite` on the PC that has the authority.
    pub fn new(authority: &Pc, name: &str, role: Role) -> Result<Self> {
        let role = match role {
            Role::Console => "console",
            Role::Agent => "agent",
        };
        let process = authority.spawn(&format!("exec omega node invite {name} --role {role}"))?;
        // The token is the only thing on its standard output.
        let token = process.expect("\n", PATIENCE)?.trim().to_owned();
        Ok(Self { token, process })
    }
}

/// Puts the program `omega` into a PC.
pub fn install_omega(pc: &Pc) -> Result<()> {
    pc.put(&binary("omega")?, "/usr/bin/omega", 0o755)
}

/// Puts an image's kernel and initramfs into a PC, as /images/NAME/{vmlinuz,initrd}.
pub fn install_image(pc: &Pc, image: &Image, name: &str) -> Result<()> {
    for file in ["vmlinuz", "initrd"] {
        pc.put(&image.file(file), &format!("/images/{name}/{file}"), 0o644)?;
    }
    Ok(())
}

/// Puts the agent, its systemd unit and its udev rule into a PC.
pub fn install_agent(pc: &Pc) -> Result<()> {
    pc.put(&binary("omega-agent")?, "/usr/bin/omega-agent", 0o755)?;
    pc.put(&project().join(UNIT_FILE), "/etc/systemd/system/omega-agent.service", 0o644)?;
    let rules = format!("/lib/udev/rules.d/{RULES}");
    pc.put(&project().join("packaging").join(RULES), &rules, 0o644)?;
    pc.run("udevadm control --reload && udevadm trigger --settle /dev/userfaultfd")?.ok().map(drop)
}

/// Configures the agent of a PC to listen on `address` and serve these volumes (name and path), and starts it
/// by its unit. Files that are missing are made, 256 MiB each.
pub fn serve(pc: &Pc, address: &str, volumes: &[(&str, &str)]) -> Result<()> {
    configure(pc, address, volumes, "")
}

/// As [`serve`], with `more` tables in the agent's configuration.
pub fn configure(pc: &Pc, address: &str, volumes: &[(&str, &str)], more: &str) -> Result<()> {
    let mut config = format!("listen = \"{address}:7420\"\n{more}");
    let mut devices = String::new();
    for (name, path) in volumes {
        config += &format!("\n[[volume]]\nname = \"{name}\"\npath = \"{path}\"\n");
        if path.starts_with("/dev/") {
            devices += &format!("DeviceAllow={path} rw\n");
        } else {
            let folder = Path::new(path).parent().unwrap_or(Path::new("/")).display().to_string();
            pc.run(&format!(
                "mkdir -p {folder}; [ -e {path} ] || truncate -s 256M {path}; chmod 0666 {path}"
            ))?
            .ok()?;
            devices += &format!("ReadWritePaths={folder}\n");
        }
    }
    pc.put_bytes(config.as_bytes(), "/etc/omega/agent.toml", 0o644)?;
    // What an administrator adds for the volumes of this PC, see docs/agent.md.
    let drop_in = format!("[Service]\nSupplementaryGroups=disk\n{devices}");
    pc.put_bytes(drop_in.as_bytes(), &format!("/etc/systemd/system/{UNIT}.d/volumes.conf"), 0o644)?;
    // A power cut would lose what was just installed. One reload: it takes seconds under emulation.
    pc.run("systemctl enable --no-reload -q omega-agent && systemctl daemon-reload && sync")?.ok()?;
    start_agent(pc)
}

/// Starts the agent by its unit; its journal is in the error when that fails.
pub fn start_agent(pc: &Pc) -> Result<()> {
    let started = pc.run("systemctl reset-failed omega-agent 2>/dev/null; systemctl start omega-agent")?;
    if !started.success() {
        let journal = pc.run("systemctl status --no-pager -l omega-agent; journalctl --no-pager -o cat -u omega-agent | tail -30")?;
        bail!("The agent did not start: {}\n{}", started.all(), journal.text());
    }
    Ok(())
}

/// Waits until this holds, and fails with `what` when it does not within the patience.
pub fn wait_until(what: &str, patience: Duration, mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + patience;
    while !holds().with_context(|| what.to_owned())? {
        if Instant::now() > deadline {
            bail!("{what}: not within {} s", patience.as_secs());
        }
        thread::sleep(Duration::from_millis(200));
    }
    Ok(())
}
