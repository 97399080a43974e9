//! `lab`: lab PCs by hand, and the demonstration.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use lab::up::{self, Act};

/// Several PCs with KVM on one machine.
#[derive(Parser)]
#[command(name = "lab", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Start PCs and keep them until Ctrl-C
    Up {
        /// How many: pc1, pc2, …
        #[arg(default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=16))]
        count: u8,
        /// Boot them, even where a snapshot would be faster
        #[arg(long)]
        fresh: bool,
    },
    /// Run a shell command in a PC
    Run {
        /// Which PC
        pc: String,
        /// The command
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// A shell in a PC
    Shell {
        /// Which PC
        pc: String,
    },
    /// Copy a file into a PC
    Put {
        /// Which PC
        pc: String,
        /// The file here
        from: PathBuf,
        /// The file there
        to: String,
    },
    /// Stop a PC's clock
    Freeze {
        /// Which PC
        pc: String,
    },
    /// Let a frozen PC go on
    Thaw {
        /// Which PC
        pc: String,
    },
    /// Cut a PC's power
    Kill {
        /// Which PC
        pc: String,
    },
    /// Switch a PC on again
    Start {
        /// Which PC
        pc: String,
    },
    /// Cut a PC's network cable
    Cut {
        /// Which PC
        pc: String,
    },
    /// Mend a PC's network cable
    Heal {
        /// Which PC
        pc: String,
    },
    /// Boot a Debian guest on one PC with its root disk on another, and show it
    Demo,
    /// Boot a guest whose vCPUs are on two PCs, and show it
    DemoSpan,
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Up { count, fresh } => up::up(count, fresh).map(|()| 0),
        Command::Run { pc, command } => up::ask(&pc, Act::Run(command.join(" "))),
        Command::Shell { pc } => up::ask(&pc, Act::Run("exec script -qfc /bin/bash /dev/null".to_owned())),
        Command::Put { pc, from, to } => up::put(&pc, &from, &to),
        Command::Freeze { pc } => up::ask(&pc, Act::Freeze),
        Command::Thaw { pc } => up::ask(&pc, Act::Thaw),
        Command::Kill { pc } => up::ask(&pc, Act::Kill),
        Command::Start { pc } => up::ask(&pc, Act::Start),
        Command::Cut { pc } => up::ask(&pc, Act::Cut),
        Command::Heal { pc } => up::ask(&pc, Act::Heal),
        Command::Demo => lab::demo::demo().map(|()| 0),
        Command::DemoSpan => lab::demo::span().map(|()| 0),
    };
    match result {
        Ok(code) => ExitCode::from(u8::try_from(code).unwrap_or(1)),
        Err(error) => {
            eprintln!("lab: {error:#}");
            ExitCode::FAILURE
        }
    }
}
