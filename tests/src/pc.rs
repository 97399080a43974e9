//! One lab PC: a QEMU process, its disks, and the runner inside it.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail};
use serde_json::json;

use crate::child;
use crate::host::host;
use crate::images::{binary, overlay, own_binary};
use crate::initramfs::Initramfs;
use crate::lab::Inner;
use crate::network::Network;
use crate::qmp::Qmp;
use crate::runner::{Output, Process, Runner};
use crate::snapshot::{self, Snapshot};

/// How long a PC may take to come up. An emulated one needs 12 s on an idle machine.
pub const BOOT: Duration = Duration::from_secs(600);
/// How long a command may take when nothing else is said.
pub const COMMAND: Duration = Duration::from_secs(600);
/// What the data disk of every PC has room for.
const DATA_SIZE: &str = "4G";

/// A PC that is being described.
pub struct PcBuilder {
    lab: Arc<Inner>,
    name: String,
    networks: Vec<Network>,
    data: Option<PathBuf>,
    memory_mib: u32,
    fresh: bool,
}

impl PcBuilder {
    pub(crate) fn new(lab: Arc<Inner>, name: &str) -> Self {
        Self { lab, name: name.to_owned(), networks: Vec::new(), data: None, memory_mib: 2048, fresh: false }
    }

    /// Plugs it into a network: the first is its `eth0`, the next `eth1`, …
    pub fn on(mut self, network: &Network) -> Self {
        self.networks.push(network.clone());
        self
    }

    /// Its second disk (`/dev/vdb`, 4 GiB) starts as this raw image instead of empty.
    pub fn data(mut self, image: &Path) -> Self {
        self.data = Some(image.to_owned());
        self
    }

    /// Its RAM.
    pub fn memory_mib(mut self, mib: u32) -> Self {
        self.memory_mib = mib;
        self
    }

    /// Boots it, even where a snapshot of a booted one would be faster.
    pub fn fresh(mut self) -> Self {
        self.fresh = true;
        self
    }

    /// Switches it on and waits until it runs commands.
    pub fn start(self) -> Result<Arc<Pc>> {
        let number = self.lab.number();
        let folder = self.lab.scratch.path().join(&self.name);
        fs::create_dir_all(&folder)?;
        overlay(&folder.join("data.qcow2"), self.data.as_deref(), DATA_SIZE)?;
        let initrd = Initramfs::from_file(&self.lab.image.file("initrd"))?
            .file("lab/lab-runner", 0o755, &fs::read(own_binary("lab-runner")?)?)
            .finish();
        fs::write(folder.join("initrd"), initrd)?;
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.lab.logs.join(format!("{}.log", self.name)))?;
        let pc = Arc::new(Pc {
            networks: self.networks,
            memory_mib: self.memory_mib,
            number,
            folder,
            log: Mutex::new(log),
            power: Mutex::new(None),
            lab: self.lab,
            name: self.name,
        });
        pc.lab.register(&pc);
        let start = Instant::now();
        let snapshot = if self.fresh { None } else { snapshot::of(&pc)? };
        pc.switch_on(snapshot.as_ref())?;
        pc.note(&format!(
            "up after {:.1} s{}",
            start.elapsed().as_secs_f32(),
            if snapshot.is_some() { ", from a snapshot" } else { "" }
        ));
        Ok(pc)
    }
}

/// A lab PC. It runs Debian's stock kernel with KVM, on one processor.
pub struct Pc {
    pub(crate) lab: Arc<Inner>,
    name: String,
    number: u8,
    pub(crate) networks: Vec<Network>,
    pub(crate) memory_mib: u32,
    pub(crate) folder: PathBuf,
    log: Mutex<File>,
    power: Mutex<Option<Powered>>,
}

/// What a PC is while it has power.
struct Powered {
    qemu: Child,
    qmp: Arc<Mutex<Qmp>>,
    runner: Arc<Runner>,
}

impl Drop for Powered {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pc {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its IPv4 address on its first network.
    pub fn address(&self) -> String {
        self.address_on(0)
    }

    fn address_on(&self, card: usize) -> String {
        format!("10.77.{}.{}", self.networks.get(card).map_or(0, Network::index), self.number)
    }

    fn mac(&self, card: usize) -> String {
        format!("52:54:00:77:{card:02x}:{:02x}", self.number)
    }

    /// Writes a line to the PC's log.
    pub fn note(&self, line: &str) {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let seconds = now.as_secs() % 86400;
        let (h, m, s) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
        let _ = writeln!(lock(&self.log), "{h:02}:{m:02}:{s:02}.{:03} {line}", now.subsec_millis());
    }

    /// A further log file of this PC, to be appended to.
    pub(crate) fn log_file(&self, name: &str) -> Result<File> {
        let path = self.lab.logs.join(format!("{}.{name}", self.name));
        Ok(File::options().create(true).append(true).open(path)?)
    }

    /// QEMU's arguments for the machine itself, the same for every PC with as many cards: what a snapshot
    /// depends on.
    pub(crate) fn machine(&self) -> Result<Vec<String>> {
        let (accel, cpu) = if host()?.kvm { ("kvm", "host") } else { ("tcg,thread=multi", "max,+svm") };
        let mut arguments: Vec<String> = [
            "-M", "q35", "-accel", accel, "-cpu", cpu, "-smp", "1", "-nodefaults", "-display", "none", "-no-user-config",
            "-rtc", "base=utc", "-append",
            // Mitigations cost much under emulation, and nobody shares a lab PC.
            "root=/dev/vda console=ttyS0 net.ifnames=0 mitigations=off nowatchdog audit=0 quiet loglevel=4 panic=0",
            "-device", "virtio-serial-pci,id=ports", "-device", "virtserialport,bus=ports.0,chardev=runner,name=lab.runner",
            "-device", "virtio-blk-pci,drive=root,serial=root", "-device", "virtio-blk-pci,drive=data,serial=data",
        ]
        .map(str::to_owned)
        .into();
        arguments.extend(["-m".to_owned(), self.memory_mib.to_string()]);
        for card in 0..self.networks.len() {
            // No option ROMs: nothing boots from these.
            arguments.extend(["-device".to_owned(), format!("virtio-net-pci,netdev=net{card},romfile=")]);
        }
        Ok(arguments)
    }

    /// Its root disk, started anew from the image.
    pub(crate) fn new_root(&self) -> Result<()> {
        overlay(&self.folder.join("root.qcow2"), Some(&self.lab.image.file("disk.raw")), "8G")
    }

    fn switch_on(&self, snapshot: Option<&Snapshot>) -> Result<()> {
        match snapshot {
            Some(snapshot) => snapshot.copy_root(&self.folder.join("root.qcow2"))?,
            None => self.new_root()?,
        }
        self.power_up(snapshot)
    }

    /// Starts QEMU on the disks as they are and waits for the runner.
    pub(crate) fn power_up(&self, snapshot: Option<&Snapshot>) -> Result<()> {
        let mut power = lock(&self.power);
        if power.is_some() {
            bail!("{} is already switched on", self.name);
        }
        let sockets = ["qmp", "runner"].map(|name| self.folder.join(name));
        let [qmp_listener, runner_listener] = sockets.each_ref().map(|path| {
            let _ = fs::remove_file(path);
            UnixListener::bind(path)
        });
        let mut command = Command::new("qemu-system-x86_64");
        command.args(self.machine()?);
        command
            .arg("-kernel")
            .arg(self.lab.image.file("vmlinux"))
            .arg("-initrd")
            .arg(self.folder.join("initrd"));
        for disk in ["root", "data"] {
            // `unsafe` leaves flushes to this machine's page cache: it survives QEMU, which is all that a
            // power cut here ends. What QEMU itself has not written out is lost, as on a PC.
            let path = self.folder.join(format!("{disk}.qcow2"));
            command.args([
                "-drive",
                &format!("if=none,id={disk},format=qcow2,discard=unmap,cache=unsafe,file={}", path.display()),
            ]);
        }
        for (card, network) in self.networks.iter().enumerate() {
            let path = network.plug(&self.name)?;
            command.args([
                "-netdev",
                &format!("stream,id=net{card},server=off,addr.type=unix,addr.path={}", path.display()),
            ]);
        }
        let console = self.lab.logs.join(format!("{}.console", self.name));
        command.args([
            "-chardev",
            &format!("file,id=console,append=on,path={}", console.display()),
            "-serial",
            "chardev:console",
        ]);
        command.args([
            "-chardev",
            &format!("socket,id=qmp,path={}", sockets[0].display()),
            "-mon",
            "chardev=qmp,mode=control",
        ]);
        command.args(["-chardev", &format!("socket,id=runner,path={}", sockets[1].display())]);
        if snapshot.is_some() {
            command.args(["-incoming", "defer"]);
        }
        let errors = File::options()
            .create(true)
            .append(true)
            .open(self.lab.logs.join(format!("{}.qemu", self.name)))?;
        command.stdin(Stdio::null()).stdout(errors.try_clone()?).stderr(errors);
        if self.lab.slower > 1 {
            command.env("LD_PRELOAD", binary("liblab_clock.so")?);
            command.env("LAB_CLOCK", self.lab.slower.to_string());
        }
        let mut qemu = child::spawn(command).context("qemu-system-x86_64")?;
        // From here on QEMU must not be left behind.
        let connected = (|| {
            let runner = accept(&runner_listener?, &mut qemu)?;
            let mut qmp = Qmp::new(accept(&qmp_listener?, &mut qemu)?)?;
            if let Some(snapshot) = snapshot {
                snapshot.load(&mut qmp)?;
            }
            let runner = Runner::connect(runner, BOOT, || is_running(&mut qemu))?;
            Ok::<_, anyhow::Error>((qmp, runner))
        })();
        match connected {
            Ok((qmp, runner)) => {
                *power = Some(Powered { qemu, qmp: Arc::new(Mutex::new(qmp)), runner: Arc::new(runner) });
            }
            Err(error) => {
                let _ = qemu.kill();
                let _ = qemu.wait();
                return Err(error.context(format!(
                    "{} did not start; see {}",
                    self.name,
                    self.lab.logs.display()
                )));
            }
        }
        drop(power);
        self.settle()
    }

    /// Gives a PC that has just come up its own identity, and waits until it is quiet.
    fn settle(&self) -> Result<()> {
        let mut seed = [0u8; 64];
        let mut random = File::open("/dev/urandom")?;
        std::io::Read::read_exact(&mut random, &mut seed)?;
        self.powered()?.0.mix(&seed)?;
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs_f64();
        let mut script =
            format!("set -e; date -s @{now:.3} >/dev/null; hostname {}; ip link set lo up\n", self.name);
        for card in 0..self.networks.len() {
            script += &format!(
                "ip link set eth{card} down; ip addr flush dev eth{card}; ip link set eth{card} address {}\n\
                 ip addr add {}/24 dev eth{card}; ip link set eth{card} up\n",
                self.mac(card),
                self.address_on(card)
            );
        }
        script += "modprobe kvm_amd 2>/dev/null || modprobe kvm_intel 2>/dev/null; blockdev --flushbufs /dev/vdb; systemctl is-system-running --wait >/dev/null || true";
        self.run(&script)?.ok().map(drop)
    }

    fn powered(&self) -> Result<(Arc<Runner>, Arc<Mutex<Qmp>>)> {
        let power = lock(&self.power);
        let powered = power.as_ref().with_context(|| format!("{} is switched off", self.name))?;
        Ok((Arc::clone(&powered.runner), Arc::clone(&powered.qmp)))
    }

    /// Runs a shell command to its end.
    pub fn run(&self, command: &str) -> Result<Output> {
        self.run_for(command, COMMAND)
    }

    /// Runs a shell command that may take this long.
    pub fn run_for(&self, command: &str, patience: Duration) -> Result<Output> {
        let output = self.spawn(command)?.wait(patience).with_context(|| format!("On {}", self.name));
        if let Ok(output) = &output {
            self.note(&format!(
                "ended with {}: {}\n{}",
                output.code,
                summary(&output.command),
                output.all().trim_end()
            ));
        }
        output
    }

    /// Starts a shell command and does not wait for it.
    pub fn spawn(&self, command: &str) -> Result<Process> {
        self.note(&format!("$ {}", summary(command)));
        self.powered()?.0.spawn(command)
    }

    /// Copies a file of this machine into the PC, with these permissions.
    pub fn put(&self, from: &Path, to: &str, mode: u32) -> Result<()> {
        self.put_bytes(&fs::read(from).with_context(|| from.display().to_string())?, to, mode)
    }

    /// Writes a file in the PC.
    pub fn put_bytes(&self, content: &[u8], to: &str, mode: u32) -> Result<()> {
        let process = self.spawn(&format!(
            "mkdir -p \"$(dirname {to})\" && rm -f {to} && cat >{to} && chmod {mode:o} {to}"
        ))?;
        process.write(content)?;
        process.close_stdin()?;
        process.wait(COMMAND)?.ok().map(drop)
    }

    /// Reads a file of the PC.
    pub fn get(&self, path: &str) -> Result<Vec<u8>> {
        let output = self.spawn(&format!("cat {path}"))?.wait(COMMAND)?;
        let content = output.stdout.clone();
        output.ok()?;
        Ok(content)
    }

    /// Stops its clock: nothing in it runs, nothing answers.
    pub fn freeze(&self) -> Result<()> {
        self.note("frozen");
        lock(&self.powered()?.1).run("stop", &json!({})).map(drop)
    }

    /// Lets a frozen PC go on.
    pub fn thaw(&self) -> Result<()> {
        self.note("thawed");
        lock(&self.powered()?.1).run("cont", &json!({})).map(drop)
    }

    /// Cuts its power, or does nothing if it has none. What its kernel had not written to a disk is lost.
    pub fn kill(&self) {
        if lock(&self.power).take().is_some() {
            self.note("power cut");
        }
    }

    /// Switches a PC on again that lost its power: it boots from its disks.
    pub fn start(&self) -> Result<()> {
        let start = Instant::now();
        self.power_up(None)?;
        self.note(&format!("up again after {:.1} s", start.elapsed().as_secs_f32()));
        Ok(())
    }

    /// Whether it has power.
    pub fn is_on(&self) -> bool {
        lock(&self.power).is_some()
    }

    /// For [`snapshot`]: the connections of a PC that is about to be saved.
    pub(crate) fn connections(&self) -> Result<(Arc<Runner>, Arc<Mutex<Qmp>>)> {
        self.powered()
    }
}

fn summary(command: &str) -> String {
    match command.char_indices().nth(400) {
        Some((end, _)) => format!("{}…", &command[..end]),
        None => command.to_owned(),
    }
}

fn is_running(qemu: &mut Child) -> Result<()> {
    match qemu.try_wait()? {
        Some(status) => bail!("QEMU ended with {status}"),
        None => Ok(()),
    }
}

fn accept(listener: &UnixListener, qemu: &mut Child) -> Result<UnixStream> {
    listener.set_nonblocking(true)?;
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                return Ok(stream);
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error.into()),
        }
        is_running(qemu)?;
        if Instant::now() > deadline {
            bail!("QEMU did not connect within 60 s");
        }
        thread::sleep(Duration::from_millis(10));
    }
}
