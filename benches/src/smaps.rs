//! What a process holds in memory, mapping by mapping.

use std::ops::Range;

use anyhow::{Context, Result};

/// Bytes in memory of one process.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Held {
    /// Everything mapped, shared pages counted in full.
    pub rss: u64,
    /// Shared pages divided by who shares them.
    pub pss: u64,
}

/// One mapping.
struct Mapping {
    range: Range<u64>,
    writable: bool,
    held: Held,
}

/// What `pid` holds beside a guest's RAM of `ram` bytes: adjacent writable mappings of that size together.
/// 0 leaves nothing out.
///
/// # Errors
/// The process is gone, or not ours; or it has no such mappings.
pub fn held(pid: u32, ram: u64) -> Result<Held> {
    let path = format!("/proc/{pid}/smaps");
    let text = std::fs::read_to_string(&path).with_context(|| format!("Cannot read {path}"))?;
    sum(&parse(&text), ram).with_context(|| format!("{path} has no {ram} bytes of guest RAM"))
}

fn parse(smaps: &str) -> Vec<Mapping> {
    let mut mappings: Vec<Mapping> = Vec::new();
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or_default();
        if !first.ends_with(':') {
            // A mapping begins: "55d0-55e0 r-xp 0000 fe:00 123 /path"
            let range = range(first).unwrap_or_default();
            let writable = words.next().is_some_and(|rights| rights.starts_with("rw"));
            mappings.push(Mapping { range, writable, held: Held::default() });
            continue;
        }
        let bytes = words.next().and_then(|word| word.parse::<u64>().ok()).unwrap_or(0) << 10;
        match (first, mappings.last_mut()) {
            ("Rss:", Some(mapping)) => mapping.held.rss = bytes,
            ("Pss:", Some(mapping)) => mapping.held.pss = bytes,
            _ => {}
        }
    }
    mappings
}

fn range(text: &str) -> Option<Range<u64>> {
    let (start, end) = text.split_once('-')?;
    Some(u64::from_str_radix(start, 16).ok()?..u64::from_str_radix(end, 16).ok()?)
}

fn sum(mappings: &[Mapping], ram: u64) -> Option<Held> {
    let guest = if ram == 0 { 0..0 } else { find(mappings, ram)? };
    let own = mappings.iter().filter(|m| m.range.start < guest.start || m.range.start >= guest.end);
    Some(own.fold(Held::default(), |all, m| Held { rss: all.rss + m.held.rss, pss: all.pss + m.held.pss }))
}

/// Adjacent writable mappings that are `len` bytes together.
fn find(mappings: &[Mapping], len: u64) -> Option<Range<u64>> {
    (0..mappings.len()).find_map(|first| {
        let start = mappings[first].range.start;
        let mut end = start;
        for mapping in mappings[first..].iter().take_while(|m| m.writable) {
            if mapping.range.start != end || end - start >= len {
                break;
            }
            end = mapping.range.end;
        }
        (end - start == len).then_some(start..end)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn mappings_are_added_up_except_the_guests() {
        let text = "10000000-10100000 r-xp 00 fe:00 1 /bin/omega\nRss:  40 kB\nPss:  20 kB\nPss_Dirty: 7 kB\n\
                    20000000-20200000 rw-p 00 00:00 0\nRss:  900 kB\nPss:  900 kB\n\
                    20200000-24000000 rw-p 00 00:00 0\nRss:  800 kB\nPss:  800 kB\n\
                    30000000-30200000 rw-p 00 00:00 0 [heap]\nRss:  8 kB\nPss:  8 kB\n";
        let mappings = parse(text);
        assert_eq!(sum(&mappings, 64 * MIB), Some(Held { rss: 48 << 10, pss: 28 << 10 }));
        assert_eq!(sum(&mappings, 0), Some(Held { rss: 1748 << 10, pss: 1728 << 10 }));
        assert_eq!(sum(&mappings, 63 * MIB), None);
    }
}
