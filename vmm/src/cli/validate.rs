//! `omega validate`.

use super::{Failure, args, show};
use crate::config::{Guest, Mistakes};

pub(super) fn validate(args: &args::Validate) -> Result<(), Failure> {
    let load = if args.no_files { Guest::load } else { Guest::load_with_files };
    let mistakes = load(&args.config).err();
    if args.json {
        #[derive(serde::Serialize)]
        struct Report {
            valid: bool,
            mistakes: Vec<Line>,
        }
        #[derive(serde::Serialize)]
        struct Line {
            file: std::path::PathBuf,
            line: Option<usize>,
            column: Option<usize>,
            key: String,
            what: String,
        }
        let valid = mistakes.is_none();
        let mistakes = mistakes.map(|Mistakes(all)| all).unwrap_or_default();
        let mistakes = mistakes.into_iter().map(|mistake| {
            let (line, column) = mistake.position.unzip();
            Line { file: mistake.file, line, column, key: mistake.key, what: mistake.what }
        });
        show(&format!("{}\n", super::json(&Report { valid, mistakes: mistakes.collect() })?))?;
        return if valid { Ok(()) } else { Err(Failure::silent(2)) };
    }
    match mistakes {
        None => show(&format!("{}: ok\n", args.config.display())),
        // Each line begins with the file already, so that editors find it.
        Some(mistakes) => {
            eprintln!("{mistakes}");
            Err(Failure::silent(2))
        }
    }
}
