//! The unstable log: what was acknowledged to the guest and may still be in the volatile memory of the
//! agent's PC. Each new session writes it again.

use std::collections::BTreeMap;
use std::time::Instant;

/// What an entry costs beside its data.
const OVERHEAD: u64 = 128;

/// Counts acknowledged changes; a flush covers those before the number at its submission.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Sequence(u64);

/// What was done to a range.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// These bytes were written.
    Data(Box<[u8]>),
    /// It was cleared.
    Zeroes {
        /// Its space may have been given back.
        unmap: bool,
    },
    /// It was discarded.
    Discard,
}

impl Change {
    /// The part `[from, to)` of a change.
    fn part(&self, from: u64, to: u64) -> Self {
        match self {
            Self::Data(data) => Self::Data(data[from as usize..to as usize].into()),
            other => other.clone(),
        }
    }
}

#[derive(Debug)]
struct Entry {
    end: u64,
    sequence: Sequence,
    change: Change,
}

/// Acknowledged changes that no flush covers yet, as ranges that do not overlap: a later change replaces
/// what it overlaps, so the ranges may be written again in any order.
#[derive(Debug, Default)]
pub(super) struct Log {
    entries: BTreeMap<u64, Entry>,
    bytes: u64,
    next: Sequence,
    oldest: Option<Instant>,
}

/// What a change of `len` bytes costs a log; `data` if it carries them.
pub(super) fn cost(len: u64, data: bool) -> u64 {
    OVERHEAD + if data { len } else { 0 }
}

impl Entry {
    fn cost(&self, start: u64) -> u64 {
        cost(self.end - start, matches!(self.change, Change::Data(_)))
    }
}

impl Log {
    /// Memory in use, in bytes.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The number of the next change: what a flush that is submitted now covers is below it.
    pub(super) fn next(&self) -> Sequence {
        self.next
    }

    /// Since when there is something in the log.
    pub(super) fn oldest(&self) -> Option<Instant> {
        self.oldest
    }

    /// Counts the age of what is there from `now`, after a flush that failed.
    pub(super) fn postpone(&mut self, now: Instant) {
        self.oldest = (!self.entries.is_empty()).then_some(now);
    }

    /// Notes an acknowledged change of `[start, start + len)`.
    pub(super) fn add(&mut self, start: u64, len: u64, change: Change, now: Instant) {
        let end = start.saturating_add(len);
        if start == end {
            return;
        }
        self.clear(start, end);
        let entry = Entry { end, sequence: self.next, change };
        self.bytes += entry.cost(start);
        self.entries.insert(start, entry);
        self.next.0 += 1;
        self.oldest.get_or_insert(now);
    }

    /// A flush is done that was submitted when [`next`](Self::next) was `covers`.
    pub(super) fn flushed(&mut self, covers: Sequence, now: Instant) {
        let mut bytes = 0;
        self.entries.retain(|start, entry| {
            let keep = entry.sequence >= covers;
            bytes += if keep { entry.cost(*start) } else { 0 };
            keep
        });
        self.bytes = bytes;
        self.oldest = (!self.entries.is_empty()).then_some(now);
    }

    /// The first range at or after `from`: its start, its length and what was done to it.
    pub(super) fn from(&self, from: u64) -> Option<(u64, u64, &Change)> {
        let (start, entry) = self.entries.range(from..).next()?;
        Some((*start, entry.end - start, &entry.change))
    }

    /// Cuts `[start, end)` out of all entries.
    fn clear(&mut self, start: u64, end: u64) {
        let before = self.entries.range(..start).next_back().filter(|(_, e)| e.end > start).map(|(s, _)| *s);
        let inside: Vec<u64> =
            before.into_iter().chain(self.entries.range(start..end).map(|(s, _)| *s)).collect();
        for old in inside {
            let Some(entry) = self.entries.remove(&old) else { continue };
            self.bytes -= entry.cost(old);
            for (from, to) in [(old, start.min(entry.end)), (end.max(old), entry.end)] {
                if from < to {
                    let change = entry.change.part(from - old, to - old);
                    let rest = Entry { end: to, sequence: entry.sequence, change };
                    self.bytes += rest.cost(from);
                    self.entries.insert(from, rest);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SIZE: usize = 64;

    /// What a byte is after all entries of the log were applied to a disk of 0xff.
    fn replay(log: &Log) -> Vec<u8> {
        let mut disk = vec![0xff; SIZE];
        let mut at = 0;
        while let Some((start, len, change)) = log.from(at) {
            let range = start as usize..(start + len) as usize;
            match change {
                Change::Data(data) => disk[range].copy_from_slice(data),
                Change::Zeroes { .. } | Change::Discard => disk[range].fill(0),
            }
            at = start + len;
        }
        disk
    }

    proptest! {
        #[test]
        fn replaying_gives_the_last_change_of_every_byte_that_no_flush_covers(
            steps in prop::collection::vec((0..SIZE, 1..SIZE, 0u8..10), 1..60)
        ) {
            let (mut log, now) = (Log::default(), Instant::now());
            // For each byte: the number of its last change and its value.
            let mut model = vec![(0usize, 0xffu8); SIZE];
            let mut covered = 0;
            for (number, (start, len, kind)) in steps.into_iter().enumerate() {
                let (number, end) = (number + 1, (start + len).min(SIZE));
                match kind {
                    0 => {
                        log.flushed(log.next(), now);
                        covered = number;
                        continue;
                    }
                    1 => log.add(start as u64, (end - start) as u64, Change::Zeroes { unmap: true }, now),
                    _ => {
                        let data = vec![number as u8; end - start].into();
                        log.add(start as u64, (end - start) as u64, Change::Data(data), now);
                    }
                }
                model[start..end].fill((number, if kind == 1 { 0 } else { number as u8 }));
            }
            let expected: Vec<u8> =
                model.iter().map(|(number, value)| if *number > covered { *value } else { 0xff }).collect();
            prop_assert_eq!(replay(&log), expected);
            let cost: u64 = log.entries.iter().map(|(start, e)| e.cost(*start)).sum();
            prop_assert_eq!(log.bytes(), cost);
            log.flushed(log.next(), now);
            prop_assert!(log.is_empty() && log.bytes() == 0 && log.oldest().is_none());
        }
    }

    #[test]
    fn a_flush_keeps_what_was_acknowledged_after_it_was_submitted() {
        let (mut log, now) = (Log::default(), Instant::now());
        log.add(0, 4, Change::Data([1; 4].into()), now);
        let covers = log.next();
        log.add(2, 4, Change::Data([2; 4].into()), now);
        log.flushed(covers, now);
        assert_eq!(log.from(0), Some((2, 4, &Change::Data([2; 4].into()))));
        assert_eq!(log.from(3), None);
    }
}
