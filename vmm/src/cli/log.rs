//! The log: compact lines on standard error, or JSON.

use std::io::{self, IsTerminal, Write};

use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::time::uptime;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, fmt};

use crate::console::terminal;

/// What is logged: `error`, `warn`, `info`, `debug`, `trace`, also per part: `info,transport=debug`.
pub(super) const VARIABLE: &str = "OMEGA_LOG";

/// Starts the log, at `level` unless the environment says something else.
///
/// # Errors
/// What is wrong with the environment's variable.
pub(super) fn start(level: &str, json: bool) -> Result<(), String> {
    // `Targets` and not `EnvFilter`: it needs no regular expressions and nearly no memory.
    let wanted = std::env::var(VARIABLE).ok().filter(|text| !text.is_empty());
    let wanted = wanted.as_deref().unwrap_or(level);
    let filter: Targets = wanted
        .parse()
        .map_err(|why| format!("{VARIABLE}=`{wanted}` is not a filter ({why}); write for example `info`"))?;
    let ansi = io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let layer = fmt::layer().with_timer(uptime()).with_target(false).with_ansi(ansi).with_writer(Lines::new);
    let layer = if json { layer.json().flatten_event(true).boxed() } else { layer.compact().boxed() };
    // A test may have started one already.
    let _ = tracing_subscriber::registry().with(layer.with_filter(filter)).try_init();
    Ok(())
}

/// Standard error; a line feed becomes carriage return and line feed while the terminal is raw.
struct Lines {
    raw: bool,
}

impl Lines {
    fn new() -> Self {
        Self { raw: terminal::is_raw() }
    }
}

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if !self.raw {
            return io::stderr().write(bytes);
        }
        let mut text = Vec::with_capacity(bytes.len() + 2);
        for byte in bytes {
            if *byte == b'\n' {
                text.push(b'\r');
            }
            text.push(*byte);
        }
        io::stderr().write_all(&text)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}
