//! How a halted vCPU's thread waits.

use std::time::{Duration, Instant};

/// A wait as short as this is over sooner than a thread that slept is awake again.
const SHORT: Duration = Duration::from_micros(120);
/// How long the next wait watches before it sleeps, after short ones.
const WATCH: Duration = Duration::from_micros(50);
/// Watching in vain this many times ends it.
const VAIN: u8 = 4;

/// Whether to watch, by how long the last waits were.
#[derive(Debug, Default)]
pub(super) struct Rest {
    /// How many more waits are watched.
    watches: u8,
}

impl Rest {
    /// Waits until `over` or for `timeout`: by `sleep`, and after short waits first by watching.
    pub(super) fn wait(
        &mut self,
        timeout: Option<Duration>,
        over: impl Fn() -> bool,
        sleep: impl FnOnce(Option<Duration>),
    ) {
        let begun = Instant::now();
        if self.watches > 0 && timeout.is_none_or(|timeout| timeout > WATCH) {
            while begun.elapsed() < WATCH {
                if over() {
                    self.watches = VAIN;
                    return;
                }
                // Whoever shall end the wait may need this processor.
                std::thread::yield_now();
            }
        }
        sleep(timeout.map(|timeout| timeout.saturating_sub(begun.elapsed())));
        self.watches = if begun.elapsed() < SHORT { VAIN } else { self.watches.saturating_sub(1) };
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn it_watches_after_short_waits_and_stops_after_some_in_vain() {
        let mut rest = Rest::default();
        let asked = Cell::new(0);
        let wait = |rest: &mut Rest, over: bool, takes: Duration| {
            asked.set(0);
            let ask = || {
                asked.set(asked.get() + 1);
                over
            };
            rest.wait(None, ask, |_| std::thread::sleep(takes));
            asked.get() > 0
        };
        let long = SHORT * 2;
        assert!(!wait(&mut rest, true, long), "nothing was short yet");
        rest.watches = VAIN;
        for _ in 0..VAIN {
            assert!(wait(&mut rest, false, long));
        }
        assert!(!wait(&mut rest, false, long), "it watched in vain");
        rest.watches = 1;
        assert!(wait(&mut rest, true, long) && rest.watches == VAIN, "it was worth it");
    }
}
