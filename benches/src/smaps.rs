//! What a process holds in memory, mapping by mapping.

use anyhow::{Context, Result};

/// Bytes in memory of one process.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Held {
    /// Everything mapped, shared pages counted in full.
    pub rss: u64,
    /// Shared pages divided by who shares them.
    pub pss: u64,
}

/// What `pid` holds beside writable mappings of exactly `except` bytes: a guest's RAM.
///
/// # Errors
/// The process is gone, or not ours.
pub fn held(pid: u32, except: u64) -> Result<Held> {
    let path = format!("/proc/{pid}/smaps");
    let text = std::fs::read_to_string(&path).with_context(|| format!("Cannot read {path}"))?;
    Ok(sum(&text, except))
}

fn sum(smaps: &str, except: u64) -> Held {
    let (mut held, mut counts) = (Held::default(), true);
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or_default();
        if !first.ends_with(':') {
            // A mapping begins: "55d0-55e0 r-xp 0000 fe:00 123 /path"
            let size = size(first).filter(|_| words.next().is_some_and(|rights| rights.starts_with("rw")));
            counts = size != Some(except);
            continue;
        }
        let kib: u64 = words.next().and_then(|word| word.parse().ok()).unwrap_or(0);
        match first {
            "Rss:" if counts => held.rss += kib << 10,
            "Pss:" if counts => held.pss += kib << 10,
            _ => {}
        }
    }
    held
}

/// How large the mapping of this address range is.
fn size(range: &str) -> Option<u64> {
    let (start, end) = range.split_once('-')?;
    let address = |text| u64::from_str_radix(text, 16).ok();
    address(end)?.checked_sub(address(start)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_are_added_up_except_the_guests_ram() {
        let text = "1-2 r-xp 00 fe:00 1 /bin/omega\nRss:  40 kB\nPss:  20 kB\nPss_Dirty: 7 kB\n\
                    2000-4000 rw-p 00 00:00 0\nRss:  900 kB\nPss:  900 kB\n\
                    3-4 rw-p 00 00:00 0 [heap]\nRss:  8 kB\nPss:  8 kB\n";
        assert_eq!(sum(text, 0x2000), Held { rss: 48 << 10, pss: 28 << 10 });
    }
}
