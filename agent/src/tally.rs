//! What strangers can make the agent say, told rarely.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::volume::lock;

/// A line at most so often.
const EVERY: Duration = Duration::from_secs(10);

/// Counts what happens often where somebody wants it to, and tells it in one line for each [`EVERY`].
pub(crate) struct Tally {
    what: &'static str,
    noted: Mutex<Noted>,
}

#[derive(Default)]
struct Noted {
    told: Option<Instant>,
    count: u64,
    last: String,
}

impl Tally {
    /// Of what the line is to say.
    pub(crate) fn new(what: &'static str) -> Self {
        Self { what, noted: Mutex::default() }
    }

    /// It happened once more; `how` is told if it is the last one when the line is due.
    pub(crate) fn note(&self, how: impl FnOnce() -> String) {
        let how = how();
        tracing::debug!(%how, "{}", self.what);
        let mut noted = lock(&self.noted);
        noted.count = noted.count.saturating_add(1);
        noted.last = how;
        self.tell_if_due(&mut noted, Instant::now());
    }

    /// Tells what is still to be told, if it is time. To be called from time to time.
    pub(crate) fn tell(&self) {
        self.tell_if_due(&mut lock(&self.noted), Instant::now());
    }

    fn tell_if_due(&self, noted: &mut Noted, now: Instant) -> bool {
        let due = noted.told.is_none_or(|told| now.saturating_duration_since(told) >= EVERY);
        if !due || noted.count == 0 {
            return false;
        }
        tracing::warn!(count = noted.count, last = %noted.last, "{}", self.what);
        noted.told = Some(now);
        noted.count = 0;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_is_told_at_once_and_the_rest_in_one_line_later() {
        let tally = Tally::new("Something happened");
        let mut noted = Noted { count: 1, ..Noted::default() };
        let now = Instant::now();
        assert!(tally.tell_if_due(&mut noted, now));
        assert!(!tally.tell_if_due(&mut noted, now + EVERY * 2), "nothing is left to tell");
        noted.count = 700;
        assert!(!tally.tell_if_due(&mut noted, now + EVERY / 2));
        assert_eq!(noted.count, 700);
        assert!(tally.tell_if_due(&mut noted, now + EVERY));
        assert_eq!(noted.count, 0);
    }
}
