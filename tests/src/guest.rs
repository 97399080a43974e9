//! A guest under `omega run` on a lab PC.

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::pc::Pc;
use crate::runner::{Output, Process, Runner};
use crate::scene::Scene;

/// How long a guest may take for anything: KVM under emulation on a busy machine is slow, not broken.
pub const PATIENCE: Duration = Duration::from_secs(600);

/// How long to look for the reason when a guest does not do what is expected.
const EXPLAINED_WITHIN: Duration = Duration::from_secs(60);
/// Prints what may be the reason: what the guest's process does, thread by thread, its connections, and what the PC's
/// kernel says.
const EXPLAIN: &str = "cat /proc/loadavg
timeout 10 omega status NAME
pid=$(pgrep -f 'omega run .*/NAME.toml' | head -n 1)
for task in /proc/$pid/task/*; do
    echo \"$(cat $task/comm): $(cut -d' ' -f3,14,15 $task/stat) $(cat $task/wchan) $(grep -h ctxt $task/status | tr -d '\\n')\"
done
ss -tnoi
dmesg | tail -n 12";

/// What a guest's kernel need not find out for itself: that the time stamp counter can be relied on, which Omega sees to,
/// and how long to wait in loops, for which each processor of another PC would measure for a quarter of a second.
const SPANNING: &str = "tsc=reliable lpj=8000000";

/// A guest that is being described: its `guest.toml`, as text.
#[derive(Clone, Debug)]
pub struct Guest {
    name: String,
    kernel: String,
    initrd: String,
    cmdline: String,
    cpus: u8,
    controllers: &'static str,
    memory: String,
    /// Further keys of `[memory]`, and its helpers.
    paging: String,
    disks: String,
    rest: String,
    options: String,
}

impl Guest {
    /// The mini guest, which takes these steps (see `guest-images/mini/init`).
    pub fn mini(name: &str, steps: &str) -> Self {
        Self {
            name: name.to_owned(),
            kernel: "/images/mini/vmlinuz".to_owned(),
            initrd: "/images/mini/initrd".to_owned(),
            cmdline: format!("console=ttyS0 quiet omega.test={steps}"),
            cpus: 1,
            controllers: "",
            memory: "192M".to_owned(),
            paging: String::new(),
            disks: String::new(),
            rest: String::new(),
            // As confined as ever, but a forbidden system call is named.
            options: "--seccomp explain".to_owned(),
        }
    }

    /// The Debian guest; its first disk is its root.
    pub fn debian(name: &str) -> Self {
        Self {
            kernel: "/images/debian/vmlinuz".to_owned(),
            initrd: "/images/debian/initrd".to_owned(),
            cmdline: "console=ttyS0 root=/dev/vda rw quiet systemd.show_status=0 nowatchdog".to_owned(),
            memory: "512M".to_owned(),
            ..Self::mini(name, "")
        }
    }

    /// Another initramfs, a file in the PC.
    pub fn initrd(mut self, path: &str) -> Self {
        path.clone_into(&mut self.initrd);
        self
    }

    /// More words on the kernel's command line.
    pub fn cmdline(mut self, words: &str) -> Self {
        self.cmdline = format!("{} {words}", self.cmdline);
        self
    }

    /// So many processors.
    pub fn cpus(mut self, count: u8) -> Self {
        self.cpus = count;
        self
    }

    /// Omega's own interrupt controllers instead of the kernel's.
    pub fn userspace_controllers(mut self) -> Self {
        self.controllers = "interrupt_controllers = \"userspace\"";
        self
    }

    /// One more processor, on the helper of a [spanning](Scene::spanning) scene.
    pub fn spans(self, scene: &Scene) -> Self {
        self.place(&scene.agent(), "helper", 1).cmdline(SPANNING)
    }

    /// So many more processors, on another PC.
    pub fn place(mut self, agent: &str, node: &str, count: u8) -> Self {
        self.cpus += count;
        self.with(&format!("[[cpu.place]]\nagent = \"{agent}\"\nnode = \"{node}\"\ncount = {count}\n"))
    }

    /// So much RAM, as `guest.toml` writes it.
    pub fn memory(mut self, size: &str) -> Self {
        size.clone_into(&mut self.memory);
        self
    }

    /// No more than `local` of its RAM is in its PC's memory; `more` holds further keys of `[memory]`, a line each.
    pub fn paged(mut self, local: &str, more: &str) -> Self {
        self.paging = format!("local = \"{local}\"\n{more}\n");
        self
    }

    /// A helper that lends it memory: agent, node and size.
    pub fn memory_helper(mut self, agent: &str, node: &str, size: &str) -> Self {
        let _ = write!(
            self.paging,
            "\n[[memory.helper]]\nagent = \"{agent}\"\nnode = \"{node}\"\nsize = \"{size}\"\n"
        );
        self
    }

    /// A disk from a file or device of the PC.
    pub fn disk(mut self, path: &str) -> Self {
        let _ = write!(self.disks, "\n[[disk]]\npath = \"{path}\"\n");
        self
    }

    /// A disk that an agent serves; `more` holds further keys of `disk.remote`.
    pub fn remote_disk(mut self, agent: &str, volume: &str, more: &str) -> Self {
        let comma = if more.is_empty() { "" } else { ", " };
        let _ = write!(
            self.disks,
            "\n[[disk]]\nserial = \"{volume}\"\nremote = {{ agent = \"{agent}\", volume = \"{volume}\"{comma}{more} }}\n"
        );
        self
    }

    /// Further tables of `guest.toml`.
    pub fn with(mut self, toml: &str) -> Self {
        let _ = writeln!(self.rest, "{toml}");
        self
    }

    /// Further options of `omega run`.
    pub fn options(mut self, options: &str) -> Self {
        options.clone_into(&mut self.options);
        self
    }

    /// The file `guest.toml`.
    pub fn toml(&self) -> String {
        format!(
            "name = \"{}\"\n\n[kernel]\nimage = \"{}\"\ninitrd = \"{}\"\ncmdline = \"{}\"\n\n[cpu]\ncount = {}\n{}\n\n\
             [memory]\nsize = \"{}\"\n{}\n{}\n{}",
            self.name,
            self.kernel,
            self.initrd,
            self.cmdline,
            self.cpus,
            self.controllers,
            self.memory,
            self.paging,
            self.disks,
            self.rest
        )
    }

    /// Starts it on a PC by `omega run`.
    pub fn start(&self, pc: &Pc) -> Result<Running> {
        let path = format!("/root/{}.toml", self.name);
        pc.put_bytes(self.toml().as_bytes(), &path, 0o644)?;
        let process = pc.spawn(&format!("exec omega run {} {path}", self.options))?;
        process.tee(pc.log_file(&format!("{}.guest", self.name))?);
        Ok(Running { name: self.name.clone(), process, runner: pc.connections()?.0 })
    }

    /// Starts it and waits until `omega run` ends, whatever it ends with.
    pub fn run(&self, pc: &Pc) -> Result<Output> {
        self.start(pc)?.wait()
    }
}

/// A guest that runs.
pub struct Running {
    name: String,
    process: Process,
    /// Its PC.
    runner: Arc<Runner>,
}

impl Running {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Waits until this appears on its console, after what was expected before.
    pub fn expect(&self, text: &str) -> Result<String> {
        self.expect_for(text, PATIENCE)
    }

    /// As [`Self::expect`], with a patience of its own.
    pub fn expect_for(&self, text: &str, patience: Duration) -> Result<String> {
        self.explained(self.process.expect(text, patience))
    }

    /// Waits until one of these appears; says which.
    pub fn expect_any(&self, texts: &[&str]) -> Result<(usize, String)> {
        self.explained(self.process.expect_any(texts, PATIENCE))
    }

    /// Waits until `omega run` has said this in its log.
    pub fn says(&self, text: &str) -> Result<()> {
        self.explained(self.process.expect_error(text, PATIENCE))
    }

    /// Adds to an error what the guest and its PC look like at that moment, if the guest has not ended.
    fn explained<T>(&self, result: Result<T>) -> Result<T> {
        result.map_err(|error| {
            if self.ended() {
                return error;
            }
            let script = EXPLAIN.replace("NAME", &self.name);
            let found = self.runner.spawn(&script).and_then(|process| process.wait(EXPLAINED_WITHIN));
            let found = found.map_or_else(|error| format!("{error:#}"), |output| output.all());
            anyhow::anyhow!("{error:#}\nIts PC then:\n{found}")
        })
    }

    /// Types on its console.
    pub fn types(&self, text: &str) -> Result<()> {
        self.process.write(text.as_bytes())
    }

    /// Logs in as root at Debian's prompt.
    pub fn log_in(&self) -> Result<()> {
        self.expect("login: ")?;
        self.types("root\n")?;
        self.expect(":~#")?;
        // No line editing, no prompt and no echo, so that what comes back is what commands print.
        self.types("exec env PS1= PS2= sh\n")?;
        self.types("stty -echo; echo ready-$((40+2))\n")?;
        self.expect("ready-42").map(drop)
    }

    /// Runs a command in a guest in which one is logged in; fails if the command does.
    pub fn shell(&self, command: &str) -> Result<String> {
        self.shell_for(command, PATIENCE)
    }

    /// As [`Self::shell`], with a patience of its own.
    pub fn shell_for(&self, command: &str, patience: Duration) -> Result<String> {
        // The marks are computed, so that an echo of the command is not taken for them.
        self.types(&format!("echo begin-$((6*7)); {command}\necho end-$((6*7))-$?\n"))?;
        self.expect_for("begin-42", patience)?;
        let output = self.expect_for("end-42-", patience)?;
        let code = self.expect_for("\n", patience)?;
        let output = output.trim_end_matches("end-42-").replace('\r', "").trim().to_owned();
        match code.trim() {
            "0" => Ok(output),
            code => bail!("In guest {}: `{command}` ended with {code}:\n{output}", self.name),
        }
    }

    /// Sends a signal to `omega run`.
    pub fn signal(&self, signal: i32) -> Result<()> {
        self.process.signal(signal)
    }

    /// Whether `omega run` has ended.
    pub fn ended(&self) -> bool {
        self.process.ended()
    }

    /// Everything on its console so far.
    pub fn console(&self) -> String {
        self.process.so_far()
    }

    /// Waits until `omega run` ends.
    pub fn wait(&self) -> Result<Output> {
        self.process.wait(PATIENCE).with_context(|| format!("Guest {}", self.name))
    }

    /// Ends it now, and waits for that.
    pub fn end(&self) -> Result<()> {
        if !self.ended() {
            self.signal(libc::SIGKILL)?;
            self.wait()?;
        }
        Ok(())
    }

    /// The process, for what is not offered here.
    pub fn process(&self) -> &Process {
        &self.process
    }
}
