//! Reads of a local file.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::random::Random;
use crate::stats::micros;

/// The file that everything reads: `bytes` of noise, in the page cache afterwards.
///
/// # Errors
/// It cannot be written.
pub fn make(directory: &Path, bytes: u64) -> Result<PathBuf> {
    let path = directory.join("volume.raw");
    let mut file = File::create(&path).with_context(|| format!("Cannot make {}", path.display()))?;
    let mut random = Random::new(bytes);
    let mut block = vec![0; 1 << 20];
    for _ in 0..bytes >> 20 {
        block
            .chunks_exact_mut(8)
            .for_each(|word| word.copy_from_slice(&random.below(u64::MAX).to_le_bytes()));
        file.write_all(&block)?;
    }
    file.sync_all()?;
    Ok(path)
}

/// A file that is read at random places.
pub struct Reads {
    file: File,
    size: u64,
    random: Random,
    buffer: Vec<u8>,
    aligned: usize,
}

impl Reads {
    /// Opens `path`; `direct` bypasses the page cache.
    ///
    /// # Errors
    /// It cannot be opened.
    pub fn open(path: &Path, direct: bool) -> Result<Self> {
        let flags = if direct { libc::O_DIRECT } else { 0 };
        let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
        let size = file.metadata()?.len();
        let buffer = vec![0; 8192];
        let aligned = buffer.as_ptr().align_offset(4096);
        Ok(Self { file, size, random: Random::new(7), buffer, aligned })
    }

    /// Reads 4 KiB at random places for `slice`; the times in microseconds.
    ///
    /// # Errors
    /// A read fails.
    pub fn run(&mut self, slice: Duration) -> Result<Vec<f64>> {
        let (start, mut times) = (Instant::now(), Vec::new());
        while start.elapsed() < slice {
            let offset = self.random.below(self.size >> 12) << 12;
            let before = Instant::now();
            self.file.read_exact_at(&mut self.buffer[self.aligned..][..4096], offset)?;
            times.push(micros(before.elapsed()));
        }
        Ok(times)
    }
}
