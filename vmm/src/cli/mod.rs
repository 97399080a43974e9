//! The binary `omega`: its commands, and what they say when they fail.

pub mod args;
mod attach;
mod ca;
mod cpu;
mod credentials;
mod drain;
mod generate;
mod guests;
mod human;
pub mod join;
mod log;
mod memory;
mod node;
mod ping;
mod run;
pub mod runtime;
mod signals;
mod top;
mod validate;

use std::io::{self, Write};
use std::process::ExitCode;

use clap::Parser;

use args::{Command, Omega};

pub use generate::schema;

/// Why a command ends with another code than 0.
#[derive(Debug)]
pub struct Failure {
    /// The exit code.
    pub code: u8,
    /// What, why and what to do; empty when everything is said already.
    pub message: String,
}

impl Failure {
    /// It was tried and failed.
    #[must_use]
    pub fn failed(message: String) -> Self {
        Self { code: 1, message }
    }

    /// The command line or the configuration is wrong.
    #[must_use]
    pub fn usage(message: String) -> Self {
        Self { code: 2, message }
    }

    /// Everything is said.
    #[must_use]
    pub fn silent(code: u8) -> Self {
        Self { code, message: String::new() }
    }
}

impl From<io::Error> for Failure {
    fn from(why: io::Error) -> Self {
        Self::failed(why.to_string())
    }
}

impl From<runtime::Error> for Failure {
    fn from(why: runtime::Error) -> Self {
        Self::failed(match &why {
            runtime::Error::Runs { name, .. } => {
                format!("{why}; attach with `omega console {name}`, or give this one another --name")
            }
            runtime::Error::None { nearest: None, .. } => format!("{why}; `omega ps` lists those that do"),
            _ => why.to_string(),
        })
    }
}

/// Runs the command line of this process.
#[must_use]
pub fn main() -> ExitCode {
    let omega = Omega::parse();
    let level = match &omega.command {
        Command::Run(_) if !omega.quiet => "info",
        _ => "warn",
    };
    let result = log::start(level, omega.log_json).map_err(Failure::usage).and_then(|()| obey(omega.command));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure { code, message }) => {
            if !message.is_empty() {
                eprintln!("omega: {message}");
            }
            ExitCode::from(code)
        }
    }
}

fn obey(command: Command) -> Result<(), Failure> {
    match command {
        Command::Run(args) => run::run(&args),
        Command::Ps(args) => guests::ps(&args),
        Command::Console(args) => attach::console(&args),
        Command::Stop(args) => guests::stop(&args),
        Command::Pause(args) => guests::pause(&args),
        Command::Resume(args) => guests::resume(&args),
        Command::Status(args) => guests::status(&args),
        Command::Top(args) => top::top(&args),
        Command::Ping(args) => ping::ping(&args),
        Command::Check(args) => check(&args),
        Command::Validate(args) => validate::validate(&args),
        Command::Ca(args::Ca::Init(args)) => ca::init(&args),
        Command::Memory(args::Memory::Add(args)) => memory::add(&args),
        Command::Cpu(args) => cpu::obey(&args),
        Command::Node(args) => node::obey(&args),
        Command::Join(args) => join::join(&args),
        Command::Schema => show(&schema()),
        Command::Completions(args) => generate::completions(args.shell).map_err(Failure::from),
        Command::Man(args) => generate::man(&args.folder).map_err(Failure::from),
    }
}

fn check(args: &args::Output) -> Result<(), Failure> {
    let report = crate::check::report();
    show(&if args.json { format!("{}\n", json(&report)?) } else { report.to_string() })?;
    if report.guests_can_run { Ok(()) } else { Err(Failure::silent(1)) }
}

/// Prints what was asked for. A reader that went away, as `head` does, is no failure.
fn show(text: &str) -> Result<(), Failure> {
    match io::stdout().write_all(text.as_bytes()) {
        Err(why) if why.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other.map_err(Failure::from),
    }
}

fn json(value: &impl serde::Serialize) -> Result<String, Failure> {
    serde_json::to_string_pretty(value).map_err(|why| Failure::failed(why.to_string()))
}
