//! The command line: the one definition behind parsing, `--help`, completions and man pages.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum, ValueHint};

use transport::identity::{NodeName, Role};

use crate::seccomp;
use crate::units::{Bytes, Span};

/// What every command may end with; shown by `--help` and in the man page.
const EXIT_CODES: &str = "Exit codes:
   0  done; `run`: the guest powered off
   1  it failed or could not start; one line says what, why and what to do
   2  the command line or the configuration is wrong
  10  `run`: the guest rebooted and `on.reboot` is \"exit\"
  11  `run`: the guest's kernel panicked
  12  `run`: the guest's processor shut down (triple fault)
  13  `run`: the guest was ended from outside (second signal, `stop --force`)
  14  `run`: memory of the guest was lost with a helper that lent it

Environment:
  OMEGA_LOG          what is logged: error, warn, info, debug, trace; also per part: info,transport=debug
  OMEGA_IDENTITY     the folder of this PC's identity
  OMEGA_RUNTIME_DIR  where running guests are found; by default /run/omega for root,
                     $XDG_RUNTIME_DIR/omega for others";

/// Omega runs one desktop virtual machine on the hardware of several PCs.
#[derive(Debug, Parser)]
#[command(name = "omega", version, after_help = EXIT_CODES, max_term_width = 100)]
#[command(propagate_version = true, subcommand_required = true, arg_required_else_help = true)]
pub struct Omega {
    /// Write the log as JSON, one object a line.
    #[arg(long, global = true)]
    pub log_json: bool,
    /// Log only warnings and errors.
    #[arg(long, short, global = true)]
    pub quiet: bool,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a guest until it ends.
    ///
    /// The first SIGTERM or SIGINT presses the guest's power button, the second ends it. In a terminal all
    /// keys go to the guest; Ctrl-] and then ? shows what can be told to Omega itself.
    Run(Run),
    /// List the guests that run here.
    Ps(Output),
    /// Attach to a guest's console; Ctrl-] q detaches.
    Console(Console),
    /// Have a guest power off, and wait until it has.
    Stop(Stop),
    /// Pause a guest: its processors stand still and its devices are drained.
    Pause(Name),
    /// Let a paused guest go on.
    Resume(Name),
    /// Show what a guest does: its state, devices and counters.
    Status(Status),
    /// Show live what the guests here do with other PCs; `q` quits.
    ///
    /// For each guest, peer and class: requests and bytes per second, and latencies of the last interval.
    /// A latency is at most 6.25 % above the truth, never below.
    Top(Top),
    /// Measure the way to an agent: round trips, jitter and bandwidth by class, and what carries them.
    ///
    /// Ends with 0 if everything was answered, with 1 otherwise. Ctrl-C ends it and shows what came so far.
    Ping(Ping),
    /// Show what this PC can and cannot do, and how to mend it.
    ///
    /// Ends with 0 if guests can run here, with 1 otherwise.
    Check(Output),
    /// Check a guest's configuration without running it.
    Validate(Validate),
    /// Begin a household of PCs, or look after its authority.
    #[command(subcommand)]
    Ca(Ca),
    /// Memory on other PCs of guests that run.
    #[command(subcommand)]
    Memory(Memory),
    /// Which PCs run the vCPUs of guests that run.
    #[command(subcommand)]
    Cpu(Cpu),
    /// Invite PCs into the household, list and revoke them. Works on the PC where the household began.
    #[command(subcommand)]
    Node(Node),
    /// Join a household with a token from `omega node invite`, as a console for this user.
    ///
    /// The token works once. Joining again with a new token renews this PC's identity.
    Join(Join),
    /// Print the JSON Schema of a guest's configuration, for editors.
    Schema,
    /// Print completions for a shell.
    Completions(Completions),
    /// Write the man pages.
    #[command(hide = true)]
    Man(Man),
}

/// `omega run`.
#[derive(Debug, Args)]
pub struct Run {
    /// The guest's configuration.
    #[arg(value_hint = ValueHint::FilePath, value_name = "GUEST.TOML")]
    pub config: PathBuf,
    /// Run it under another name.
    #[arg(long)]
    pub name: Option<String>,
    /// Another number of processors.
    #[arg(long, value_name = "N")]
    pub cpus: Option<u8>,
    /// Another amount of RAM, as 512M or 8G.
    #[arg(long, value_name = "SIZE")]
    pub memory: Option<Bytes>,
    /// More words for the kernel's command line.
    #[arg(long, value_name = "WORDS", allow_hyphen_values = true)]
    pub cmdline_append: Option<String>,
    /// The folder of this PC's identity; by default /etc/omega/identity for root, ~/.config/omega/identity
    /// for others.
    #[arg(long, value_name = "DIR", env = "OMEGA_IDENTITY", value_hint = ValueHint::DirPath)]
    pub identity: Option<PathBuf>,
    /// Start even on a KVM that cannot run stock kernels. Such a guest usually hangs; this is for
    /// micro-guests and measurements.
    #[arg(long)]
    pub allow_unfit_kvm: bool,
    /// What a thread meets that makes a system call it has no right to: kill, explain, log, off.
    #[arg(long, value_name = "MODE", default_value = "kill", env = "OMEGA_SECCOMP")]
    pub seccomp: seccomp::Mode,
}

/// How a command shows what it found.
#[derive(Debug, Args)]
pub struct Output {
    /// Print JSON for programs.
    #[arg(long)]
    pub json: bool,
}

/// A guest that runs.
#[derive(Debug, Args)]
pub struct Name {
    /// The guest's name, as in `omega ps`.
    pub name: String,
}

/// `omega console`.
#[derive(Debug, Args)]
pub struct Console {
    /// The guest's name, as in `omega ps`.
    pub name: String,
    /// Its virtio console instead of its serial port.
    #[arg(long)]
    pub virtio: bool,
}

/// `omega stop`.
#[derive(Debug, Args)]
pub struct Stop {
    /// The guest's name, as in `omega ps`.
    pub name: String,
    /// End it at once without asking it, as pulling the plug would.
    #[arg(long)]
    pub force: bool,
    /// How long to wait for it to end, as 90s or 5m; it keeps running if it does not.
    #[arg(long, value_name = "TIME", default_value_t = Span(Duration::from_secs(120)))]
    pub timeout: Span,
}

/// `omega status`.
#[derive(Debug, Args)]
pub struct Status {
    /// The guest's name, as in `omega ps`.
    pub name: String,
    /// Print JSON for programs.
    #[arg(long)]
    pub json: bool,
}

/// `omega top`.
#[derive(Debug, Args)]
pub struct Top {
    /// Print one table of one interval and end.
    #[arg(long)]
    pub once: bool,
    /// Print JSON for programs: one object a line for each interval.
    #[arg(long)]
    pub json: bool,
    /// How long an interval is.
    #[arg(long, value_name = "TIME", default_value_t = Span(Duration::from_secs(1)))]
    pub interval: Span,
    /// What comes first: `name`, or `traffic` for who asks most.
    #[arg(long, value_name = "ORDER", default_value = "name")]
    pub sort: Order,
}

/// The order of `omega top`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Order {
    /// By name.
    #[default]
    Name,
    /// Who asks most comes first.
    Traffic,
}

/// `omega ping`.
#[derive(Debug, Args)]
pub struct Ping {
    /// The agent: a node's name, or HOST or HOST:PORT.
    #[arg(value_name = "NODE")]
    pub target: String,
    /// Round trips of each class.
    #[arg(long, short, value_name = "N", default_value_t = 20)]
    pub count: u32,
    /// Bytes each way, up to 1M.
    #[arg(long, short, value_name = "SIZE", default_value_t = Bytes(4096))]
    pub size: Bytes,
    /// Only this class; may be given several times.
    #[arg(long = "class", value_name = "CLASS")]
    pub classes: Vec<ClassName>,
    /// The pause between two round trips.
    #[arg(long, value_name = "TIME", default_value_t = Span(Duration::from_millis(10)))]
    pub pause: Span,
    /// How long bandwidth is measured for each class and direction; 0s for not at all.
    #[arg(long, value_name = "TIME", default_value_t = Span(Duration::from_millis(300)))]
    pub bandwidth: Span,
    /// How long the connection and each answer may take.
    #[arg(long, value_name = "TIME", default_value_t = Span(Duration::from_secs(5)))]
    pub timeout: Span,
    /// The name in the agent's certificate; by default NODE, if that is a name.
    #[arg(long, value_name = "NAME")]
    pub node: Option<String>,
    /// Speak plain TCP, neither encrypted nor authenticated.
    #[arg(long)]
    pub insecure: bool,
    /// Print JSON for programs.
    #[arg(long)]
    pub json: bool,
    /// Where the identity is.
    #[command(flatten)]
    pub identity: IdentityFolder,
}

/// A class of requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ClassName {
    /// A CPU waits for it.
    Urgent,
    /// Disk reads and writes.
    Normal,
    /// Leases and the like.
    Control,
    /// Copies that nobody waits for.
    Bulk,
}

impl From<ClassName> for transport::wire::Class {
    fn from(name: ClassName) -> Self {
        match name {
            ClassName::Urgent => Self::Urgent,
            ClassName::Normal => Self::Normal,
            ClassName::Control => Self::Control,
            ClassName::Bulk => Self::Bulk,
        }
    }
}

/// `omega validate`.
#[derive(Debug, Args)]
pub struct Validate {
    /// The guest's configuration.
    #[arg(value_hint = ValueHint::FilePath, value_name = "GUEST.TOML")]
    pub config: PathBuf,
    /// Do not look for the files that it names.
    #[arg(long)]
    pub no_files: bool,
    /// Print JSON for programs.
    #[arg(long)]
    pub json: bool,
}

/// `omega ca`.
#[derive(Debug, Subcommand)]
pub enum Ca {
    /// Begin a household: make its authority, and make this PC its first console.
    ///
    /// The authority is the folder `ca` beside the identity. Who has its key can make nodes: keep a copy of the
    /// folder where nobody else finds it.
    Init(CaInit),
}

/// `omega ca init`.
#[derive(Debug, Args)]
pub struct CaInit {
    /// What people call the household.
    #[arg(long, value_name = "HOUSE", default_value = "home")]
    pub name: String,
    /// What this PC is called in it; by default its host name.
    #[arg(long, value_name = "NAME")]
    pub node: Option<NodeName>,
    /// Where the identity is.
    #[command(flatten)]
    pub identity: IdentityFolder,
}

/// Where the identity is.
#[derive(Debug, Args)]
pub struct IdentityFolder {
    /// The folder of this PC's identity; by default /etc/omega/identity for root, ~/.config/omega/identity
    /// for others.
    #[arg(long, value_name = "DIR", env = "OMEGA_IDENTITY", value_hint = ValueHint::DirPath)]
    pub identity: Option<PathBuf>,
}

/// `omega node`.
#[derive(Debug, Subcommand)]
pub enum Node {
    /// Invite a PC: print a token, and wait until the PC has joined with it.
    ///
    /// The token is the only thing on standard output. It works once, and only while this command waits;
    /// Ctrl-C withdraws it. A name that there is already gets a new certificate, and keeps the old one until
    /// that is revoked or over.
    Invite(NodeInvite),
    /// List the household's nodes.
    List(NodeList),
    /// Move guests' memory away from a node while they run, and give it back.
    ///
    /// Returns when the node keeps nothing of them any more. Ctrl-C only stops watching: the move goes on.
    Drain(NodeDrain),
    /// Revoke all certificates of a node, and tell every agent that can be reached.
    ///
    /// Agents cut its connections at once. Those that cannot be reached now learn it from the next console of
    /// the household that connects to them. Doing it again tells them again.
    Revoke(NodeRevoke),
}

/// `omega node invite`.
#[derive(Debug, Args)]
pub struct NodeInvite {
    /// The new node's name: lower-case letters, digits and `-`.
    pub name: NodeName,
    /// What it is there for: `agent` lends parts, `console` runs guests. May be given twice.
    #[arg(long = "role", value_name = "ROLE", default_value = "agent")]
    pub roles: Vec<Role>,
    /// How long the token is good, as 15m or 2h.
    #[arg(long, value_name = "TIME", default_value_t = Span(Duration::from_secs(900)))]
    pub expires: Span,
    /// The address that the new node connects to, as 192.168.1.5:7421; by default all of this PC's.
    #[arg(long, value_name = "ADDR:PORT")]
    pub listen: Option<SocketAddr>,
    /// Where the identity is.
    #[command(flatten)]
    pub identity: IdentityFolder,
}

/// `omega node list`.
#[derive(Debug, Args)]
pub struct NodeList {
    /// Print JSON for programs: all certificates, also those that are over.
    #[arg(long)]
    pub json: bool,
    /// Where the identity is.
    #[command(flatten)]
    pub identity: IdentityFolder,
}

/// `omega memory`.
#[derive(Debug, Subcommand)]
pub enum Memory {
    /// Have a running guest take memory of another PC.
    ///
    /// What lacks a copy gets one there, and what has to leave another helper; pages for which the others have no room go
    /// there too. The guest's configuration stays as it is: add a `[[memory.helper]]` for the next start.
    Add(MemoryAdd),
}

/// `omega memory add`.
#[derive(Debug, Args)]
pub struct MemoryAdd {
    /// The guest's name.
    #[arg(value_name = "GUEST")]
    pub guest: String,
    /// The agent, `host` or `host:port`.
    #[arg(long, value_name = "ADDRESS")]
    pub agent: String,
    /// How much of its memory the guest takes, `8G` for instance.
    #[arg(long, value_name = "SIZE")]
    pub size: Bytes,
    /// The name in the agent's certificate; by default the host's, if that is one without dots.
    #[arg(long, value_name = "NAME")]
    pub node: Option<String>,
    /// Speak plain TCP with an agent that has no identity.
    #[arg(long)]
    pub insecure: bool,
}

/// `omega cpu`.
#[derive(Debug, Subcommand)]
pub enum Cpu {
    /// Move a vCPU of a running guest to another PC.
    ///
    /// The guest stands still for a moment. `omega status` shows which PCs run which vCPUs. vCPU 0 stays where the
    /// guest's devices are. The guest's configuration stays as it is: its next start is as that says.
    Move(CpuMove),
    /// Move all vCPUs of a running guest away from a PC.
    ///
    /// They go to the other PCs that lend the guest vCPUs as long as those have room, and then to the one that runs its
    /// devices. Memory that the PC is home to stays there: it is a part of the guest until that ends.
    Drain(CpuDrain),
}

/// `omega cpu move`.
#[derive(Debug, Args)]
pub struct CpuMove {
    /// The guest's name.
    #[arg(value_name = "GUEST")]
    pub guest: String,
    /// The vCPU's number, from 1.
    #[arg(value_name = "VCPU")]
    pub vcpu: u8,
    /// The PC, as `[[cpu.place]]` of the guest's configuration calls it; `console` is the one that runs its devices.
    #[arg(value_name = "NODE")]
    pub node: String,
}

/// `omega cpu drain`.
#[derive(Debug, Args)]
pub struct CpuDrain {
    /// The guest's name.
    #[arg(value_name = "GUEST")]
    pub guest: String,
    /// The PC, as `[[cpu.place]]` of the guest's configuration calls it.
    #[arg(value_name = "NODE")]
    pub node: String,
}

/// `omega node drain`.
#[derive(Debug, Args)]
pub struct NodeDrain {
    /// The node, or its agent's address as the guests' configurations have it.
    #[arg(value_name = "NODE")]
    pub node: String,
    /// Only this guest's memory; by default every guest's of this user.
    #[arg(long, value_name = "NAME")]
    pub guest: Option<String>,
    /// Print JSON for programs: one object a line, whenever something moved.
    #[arg(long)]
    pub json: bool,
}

/// `omega node revoke`.
#[derive(Debug, Args)]
pub struct NodeRevoke {
    /// The node's name, as in `omega node list`.
    pub name: String,
    /// Tell an agent at this address too, as 192.168.1.7:7420.
    #[arg(long = "tell", value_name = "ADDR:PORT")]
    pub tell: Vec<SocketAddr>,
    /// How long to wait for each agent.
    #[arg(long, value_name = "TIME", default_value_t = Span(Duration::from_secs(3)))]
    pub timeout: Span,
    /// Where the identity is.
    #[command(flatten)]
    pub identity: IdentityFolder,
}

/// `omega join`.
#[derive(Debug, Args)]
pub struct Join {
    /// The token; `-` reads it from standard input.
    pub token: String,
    /// Where the identity is.
    #[command(flatten)]
    pub identity: IdentityFolder,
}

/// `omega completions`.
#[derive(Debug, Args)]
pub struct Completions {
    /// The shell.
    pub shell: clap_complete::Shell,
}

/// `omega man`.
#[derive(Debug, Args)]
pub struct Man {
    /// The folder to write them into.
    #[arg(value_hint = ValueHint::DirPath)]
    pub folder: PathBuf,
}
