//! What is generated from the definitions: JSON Schema, completions, man pages.

use std::io::{self, Write};
use std::path::Path;

use clap::CommandFactory;
use schemars::generate::SchemaSettings;

use super::args::Omega;
use crate::config::Guest;

/// The JSON Schema of `guest.toml`, as `packaging/guest.schema.json` holds it.
#[must_use]
pub fn schema() -> String {
    let schema = SchemaSettings::draft07().into_generator().into_root_schema_for::<Guest>();
    let mut text = serde_json::to_string_pretty(&schema).unwrap_or_default();
    text.push('\n');
    text
}

/// Prints the completions for `shell`.
pub(super) fn completions(shell: clap_complete::Shell) -> io::Result<()> {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut Omega::command(), "omega", &mut text);
    io::stdout().write_all(&text)
}

/// Writes the man pages, one for each command, into `folder`.
pub(super) fn man(folder: &Path) -> io::Result<()> {
    std::fs::create_dir_all(folder)?;
    clap_mangen::generate_to(Omega::command(), folder)
}
