//! Runs the benchmarks, prints a table and writes `target/bench/summary.json`.

use std::process::ExitCode;

use anyhow::{Context, Result};
use benches::bench::{Bench, target};
use benches::figure::{Figure, table};
use benches::inside::{self, Inside};
use benches::suite;
use clap::{Parser, Subcommand};

/// Figures of Omega beside their floors and peers.
#[derive(Parser)]
struct Arguments {
    /// Print the summary as JSON instead of a table.
    #[arg(long)]
    json: bool,
    /// Measure only figures whose name begins with NAME (may be given several times).
    #[arg(long, value_name = "NAME")]
    only: Vec<String>,
    /// Fewer and shorter repetitions: for trying the benchmarks themselves.
    #[arg(long)]
    quick: bool,
    /// List the figures.
    #[arg(long)]
    list: bool,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Do a part of a measurement; only of use inside a lab PC.
    #[command(subcommand, hide = true)]
    Inside(Inside),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if arguments.list {
        suite::ALL.iter().flat_map(|suite| suite.specs).for_each(|spec| println!("{}", spec.name));
        return ExitCode::SUCCESS;
    }
    let result = match &arguments.command {
        Some(Command::Inside(part)) => inside::run(part),
        None => run(&arguments),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let bench = Bench::new(arguments.quick, arguments.only.clone())?;
    let figures: Vec<Figure> = suite::ALL.iter().flat_map(|suite| bench.run(suite)).collect();
    let path = target().join("bench/summary.json");
    let text = serde_json::to_string_pretty(&figures)?;
    std::fs::write(&path, format!("{text}\n")).with_context(|| format!("Cannot write {}", path.display()))?;
    if arguments.json {
        println!("{text}");
    } else {
        print!("{}", table(&figures));
        println!("written to {}", path.display());
    }
    Ok(())
}
