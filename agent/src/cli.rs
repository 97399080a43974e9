//! The command line of `omega-agent`.

use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{CommandFactory, Parser, Subcommand};
use devices::disk::volume::{Volume, opcode};
use tracing_subscriber::EnvFilter;
use transport::blocking::Client;
use transport::identity::Security;
use transport::wire::{Class, MAX_PAYLOAD, Status};
use vmm::memory::store::protocol::{self, Lending};

use crate::config::{Config, DEFAULT_PATH};
use crate::protection::Protection;
use crate::{Error, inventory, join, serve, volume};

/// Lends this PC's disks to Omega guests on other PCs.
#[derive(Debug, Parser)]
#[command(name = "omega-agent", version)]
pub struct Cli {
    /// The configuration.
    #[arg(long, short, global = true, value_name = "FILE", env = "OMEGA_AGENT_CONFIG", default_value = DEFAULT_PATH)]
    config: PathBuf,
    /// What to say in the log: error, warn, info, debug or trace.
    #[arg(long, global = true, value_name = "LEVEL", env = "OMEGA_LOG", default_value = "info")]
    log: String,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve volumes until told to stop. This is what happens without a command.
    Serve,
    /// Check the configuration and that each volume can be served; change nothing.
    Validate,
    /// List the running agent's volumes and who holds them.
    Volumes {
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Show the memory that the running agent lends, and to whom.
    Memory {
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Say what this PC has.
    Inventory {
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Join a household: make this PC the node that `omega node invite` on the first console waits for.
    ///
    /// The token works once. Joining again with a new token renews the identity; a running agent takes it by
    /// itself.
    Join {
        /// The token; `-` reads it from standard input.
        token: String,
    },
    /// Print the completions for a shell.
    Completions {
        /// Which shell.
        shell: clap_complete::Shell,
    },
    /// Write the manual pages.
    #[command(hide = true)]
    Man {
        /// Where.
        folder: PathBuf,
    },
}

/// Runs the program. Exit code 0: done; 1: failed, with one line that says why; 2: a mistake in the command
/// line or the configuration.
#[must_use]
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let code = match run(&cli) {
        Ok(()) => return ExitCode::SUCCESS,
        Err(Error::Config(mistakes)) => {
            eprintln!("{mistakes}");
            return ExitCode::from(2);
        }
        Err(e @ Error::Protection(_)) => {
            eprintln!("omega-agent: {e}");
            2
        }
        Err(e) => {
            eprintln!("omega-agent: {e}");
            if matches!(e, Error::Join(transport::identity::join::Error::Token(_))) { 2 } else { 1 }
        }
    };
    ExitCode::from(code)
}

fn run(cli: &Cli) -> Result<(), Error> {
    match cli.command.as_ref().unwrap_or(&Command::Serve) {
        Command::Serve => {
            let config = Config::load(&cli.config)?;
            log(&cli.log);
            serve::run(&config)
        }
        Command::Validate => validate(&Config::load(&cli.config)?),
        Command::Volumes { json } => volumes(&Config::load(&cli.config)?, *json),
        Command::Memory { json } => memory(&Config::load(&cli.config)?, *json),
        Command::Inventory { json } => {
            let inventory = inventory::take();
            let text = if *json {
                serde_json::to_string_pretty(&inventory).map_err(|e| Error::Answer(e.to_string()))?
            } else {
                inventory.describe()
            };
            print(&text)
        }
        Command::Join { token } => print(join::join(&cli.config, token)?.trim_end()),
        Command::Completions { shell } => {
            let mut out = Vec::new();
            clap_complete::generate(*shell, &mut Cli::command(), "omega-agent", &mut out);
            write(&out)
        }
        Command::Man { folder } => std::fs::create_dir_all(folder)
            .and_then(|()| clap_mangen::generate_to(Cli::command(), folder))
            .map_err(|source| Error::System { what: "Cannot write the pages", source }),
    }
}

/// Logs to standard error; under systemd without times, which the journal has.
fn log(level: &str) {
    let filter = EnvFilter::try_new(level).unwrap_or_else(|_| EnvFilter::new("info"));
    let to = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).with_target(false);
    if std::env::var_os("JOURNAL_STREAM").is_some() {
        to.without_time().with_ansi(false).init();
    } else {
        to.with_ansi(io::stderr().is_terminal()).init();
    }
}

fn write(bytes: &[u8]) -> Result<(), Error> {
    match io::stdout().write_all(bytes) {
        // Whoever reads has seen enough.
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other.map_err(|source| Error::System { what: "Cannot write to standard output", source }),
    }
}

fn print(text: &str) -> Result<(), Error> {
    write(format!("{text}\n").as_bytes())
}

fn validate(config: &Config) -> Result<(), Error> {
    let protection = Protection::of(config)?;
    let mut problems = Vec::new();
    for volume in &config.volume {
        if volume.create.is_some() && !volume.path.exists() {
            continue;
        }
        if let Err(e) = volume::open(volume) {
            problems.push(format!("volume {}: {e}", volume.name));
        }
    }
    let mut warnings = protection.warnings.clone();
    if config.cpu.is_some() {
        problems.extend(crate::cpu::missing());
    }
    match crate::memory::check(config) {
        Ok(more) => warnings.extend(more),
        Err(e) => problems.push(e.to_string()),
    }
    if problems.is_empty() {
        let lends = config.memory.as_ref().map(|m| format!("{} of memory, ", m.size)).unwrap_or_default();
        let vcpus = config.cpu.as_ref().map(|cpu| format!("{} vCPUs, ", cpu.count)).unwrap_or_default();
        let mut lines = vec![format!(
            "valid: {} volumes, {lends}{vcpus}listening on {}",
            config.volume.len(),
            config.listen
        )];
        lines.push(protection.describe());
        lines.extend(protection.policy.describe().iter().map(|rule| format!("allow: {rule}")));
        lines.extend(warnings.iter().map(|warning| format!("warning: {warning}")));
        return print(&lines.join("\n"));
    }
    Err(Error::Answer(problems.join("\nomega-agent: ")))
}

/// The running agent's answer to a question without a body, which it gives as JSON.
fn ask<T: serde::de::DeserializeOwned>(config: &Config, opcode: u16) -> Result<T, Error> {
    let mut address = config.address();
    if address.ip().is_unspecified() {
        address.set_ip(if address.is_ipv4() {
            [127, 0, 0, 1].into()
        } else {
            [0, 0, 0, 0, 0, 0, 0, 1].into()
        });
    }
    // Whoever can read the agent's identity may see what it does.
    let security = Protection::of(config)?.security;
    let node = match &security {
        Security::Plain => None,
        Security::Tls(identity) => Some(identity.current().name().to_owned()),
    };
    let mut client = Client::new(&address.to_string(), "omega-agent", &security, node.as_deref())?;
    let timeout = Duration::from_secs(3);
    let reply = client.call(Class::Control, opcode, &[], Vec::new(), MAX_PAYLOAD, timeout)?;
    if reply.status != Status::OK {
        return Err(Error::Answer(format!("status {}", reply.status.0)));
    }
    serde_json::from_slice(&reply.payload).map_err(|e| Error::Answer(e.to_string()))
}

fn print_json(value: &impl serde::Serialize) -> Result<(), Error> {
    print(&serde_json::to_string_pretty(value).map_err(|e| Error::Answer(e.to_string()))?)
}

fn memory(config: &Config, json: bool) -> Result<(), Error> {
    let lending: Lending = ask(config, protocol::opcode::STATUS)?;
    if json {
        return print_json(&lending);
    }
    let [size, leased, used] = [lending.size, lending.leased, lending.used];
    let mut lines = vec![format!("{size} bytes lent, {leased} leased, {used} stored")];
    if !lending.survives && size > 0 {
        lines.push("a restart of the agent loses what is stored: systemd does not keep it".to_owned());
    }
    lines.push(format!("{:<20} {:<16} {:>15} {:>15}  {}", "GUEST", "NODE", "LEASED", "STORED", "IDLE"));
    for lent in lending.leases {
        let (node, idle) = (lent.node.unwrap_or_else(|| "-".to_owned()), Duration::from_millis(lent.idle));
        let numbers = format!("{:>15} {:>15}", lent.quota, lent.used);
        lines.push(format!("{:<20} {node:<16} {numbers}  {} s", lent.guest, idle.as_secs()));
    }
    print(&lines.join("\n"))
}

fn volumes(config: &Config, json: bool) -> Result<(), Error> {
    let list: Vec<Volume> = ask(config, opcode::VOLUMES)?;
    if json {
        return print_json(&list);
    }
    let mut lines = vec![format!("{:<20} {:>15}  {:<10} {}", "VOLUME", "BYTES", "ACCESS", "HOLDER")];
    for v in list {
        let size = v.size.map_or_else(|| "-".to_owned(), |s| s.to_string());
        let access = if v.read_only { "read-only" } else { "writable" };
        let holder = v.problem.or(v.holder).unwrap_or_else(|| "-".to_owned());
        lines.push(format!("{:<20} {size:>15}  {access:<10} {holder}", v.name));
    }
    print(&lines.join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
