//! Numbers in the units that people read, in few characters.

/// A rate.
pub(super) fn short(rate: f64) -> String {
    match rate {
        r if r >= 999_500.0 => format!("{:.1}M", r / 1e6),
        r if r >= 9_999.5 => format!("{:.1}k", r / 1e3),
        r if r >= 99.95 || r == 0.0 => format!("{r:.0}"),
        r => format!("{r:.1}"),
    }
}

/// Bytes, in MiB.
pub(super) fn mebibytes(bytes: f64) -> String {
    let mebibytes = bytes / f64::from(1 << 20);
    if mebibytes >= 999.5 { format!("{mebibytes:.0}") } else { format!("{mebibytes:.1}") }
}

/// Microseconds.
pub(super) fn latency(micros: Option<f64>) -> String {
    match micros {
        None => "-".to_owned(),
        Some(us) if us < 99.95 => format!("{us:.1}us"),
        Some(us) if us < 999.5 => format!("{us:.0}us"),
        Some(us) if us < 99_950.0 => format!("{:.1}ms", us / 1e3),
        Some(us) if us < 999_500.0 => format!("{:.0}ms", us / 1e3),
        Some(us) => format!("{:.1}s", us / 1e6),
    }
}

/// Text of another PC, made harmless for a terminal: what would move the cursor is replaced.
pub(super) fn harmless(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        let rates = [0.0, 0.5, 99.96, 9999.0, 10_000.0, 2e6];
        assert_eq!(rates.map(short), ["0", "0.5", "100", "9999", "10.0k", "2.0M"]);
        let all = [Some(0.5), Some(99.96), Some(999.6), Some(99_960.0), Some(3e6), None];
        assert_eq!(all.map(latency), ["0.5us", "100us", "1.0ms", "100ms", "3.0s", "-"]);
        assert_eq!(mebibytes(1.5 * 1024.0 * 1024.0), "1.5");
    }
}
