//! One run of the benchmarks: its settings, and running suites.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

use crate::figure::{Figure, Reading, Spec};

/// Figures that are measured together, because they share baselines.
pub struct Suite {
    /// Its name: what its figures' names begin with.
    pub name: &'static str,
    /// Its figures.
    pub specs: &'static [Spec],
    /// Measures them. Figures that no reading comes back for are reported as missing.
    pub run: fn(&Bench, &mut Readings) -> Result<()>,
}

/// What a suite has measured so far, and why it could not measure the rest.
#[derive(Default)]
pub struct Readings {
    done: Vec<Reading>,
    missing: Vec<(&'static str, String)>,
}

impl Readings {
    /// Adds a reading.
    pub fn add(&mut self, reading: Reading) {
        self.done.push(reading);
    }

    /// Says why the figures whose names begin with `prefix` cannot be measured here.
    pub fn missing(&mut self, prefix: &'static str, why: impl Into<String>) {
        self.missing.push((prefix, why.into()));
    }
}

/// The settings of a run.
pub struct Bench {
    /// Fewer and shorter repetitions: for trying the benchmarks themselves.
    pub quick: bool,
    only: Vec<String>,
    started: Instant,
    directory: TempDir,
}

impl Bench {
    /// A run whose files are under `target/bench`, of the figures whose names begin with one of `only`; of all if
    /// that is empty.
    ///
    /// # Errors
    /// The directory cannot be made.
    pub fn new(quick: bool, only: Vec<String>) -> Result<Self> {
        let base = target().join("bench");
        std::fs::create_dir_all(&base).with_context(|| format!("Cannot make {}", base.display()))?;
        let directory = tempfile::Builder::new().prefix("run-").tempdir_in(&base)?;
        Ok(Self { quick, only, started: Instant::now(), directory })
    }

    /// A directory that goes away with the run.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// How often two sides alternate.
    #[must_use]
    pub fn rounds(&self) -> usize {
        if self.quick { 3 } else { 9 }
    }

    /// How long one side of one round takes.
    #[must_use]
    pub fn slice(&self) -> Duration {
        Duration::from_millis(if self.quick { 150 } else { 500 })
    }

    /// Tells the user what happens.
    pub fn progress(&self, what: &str) {
        eprintln!("bench: [{:6.1} s] {what}", self.started.elapsed().as_secs_f64());
    }

    /// The program under test.
    ///
    /// # Errors
    /// It has not been built.
    pub fn program(&self, name: &str) -> Result<PathBuf> {
        let directory =
            std::env::var_os("OMEGA_BIN_DIR").map_or_else(|| target().join("release"), PathBuf::from);
        let path = directory.join(name);
        if !path.is_file() {
            bail!("{} is missing: build it with `cargo build --release`", path.display());
        }
        Ok(path)
    }

    /// Whether a figure is to be measured.
    #[must_use]
    pub fn wants(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|only| name.starts_with(only))
    }

    /// Runs `suite` and reports all its figures that are wanted.
    pub fn run(&self, suite: &Suite) -> Vec<Figure> {
        let specs: Vec<&Spec> = suite.specs.iter().filter(|spec| self.wants(spec.name)).collect();
        if specs.is_empty() {
            return Vec::new();
        }
        self.progress(suite.name);
        let mut readings = Readings::default();
        let outcome = (suite.run)(self, &mut readings);
        let failure = outcome.err().map(|error| format!("{error:#}"));
        let report = |spec: &&Spec| {
            if let Some(reading) = readings.done.iter().find(|reading| reading.name == spec.name) {
                return Figure::measured(spec, reading.clone());
            }
            let known = readings.missing.iter().find(|(prefix, _)| spec.name.starts_with(prefix));
            let why = known.map(|(_, why)| why.clone()).or_else(|| failure.clone());
            Figure::missing(spec, why.unwrap_or_else(|| "its suite did not report it".to_owned()))
        };
        specs.iter().map(report).collect()
    }
}

/// Cargo's target directory.
#[must_use]
pub fn target() -> PathBuf {
    // This program is in target/PROFILE/ or, as a test, in target/PROFILE/deps/.
    let program = std::env::current_exe().unwrap_or_default();
    let found = program.ancestors().find(|path| path.file_name().is_some_and(|name| name == "target"));
    found.map_or_else(|| PathBuf::from("target"), Path::to_path_buf)
}
