//! What a guest's fault handlers count.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};
use transport::metrics::{Distribution, Histogram};

use super::pages::Place;

/// Defines the numbers that each handler counts, their sum over all handlers, and how one becomes the other.
macro_rules! numbers {
    ($($(#[doc = $doc:literal])+ $name:ident,)+) => {
        /// What was counted until some moment, over all handlers. Sizes are in pages of 4 KiB.
        #[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(default)]
        pub struct Counters {
            $($(#[doc = $doc])+ pub $name: u64,)+
            /// How long threads stood still for a page that had to be fetched, from when their fault was read
            /// until the page was in place.
            pub latency: Distribution,
        }

        /// What one handler counts; it alone writes.
        #[derive(Default)]
        pub(super) struct Tally {
            $(pub(super) $name: Number,)+
            pub(super) latency: Histogram,
            /// Why pages are lost, the first time.
            pub(super) lost_why: Mutex<Option<String>>,
        }

        impl Counters {
            /// What was counted after `earlier`. Numbers that rise and fall, as pages by where they are, mean nothing
            /// in it.
            #[must_use]
            pub fn since(&self, earlier: &Self) -> Self {
                Self {
                    $($name: self.$name.saturating_sub(earlier.$name),)+
                    latency: self.latency.since(&earlier.latency),
                }
            }
        }

        impl Tally {
            pub(super) fn add_to(&self, sum: &mut Counters) {
                $(sum.$name += self.$name.0.load(Ordering::Relaxed);)+
                sum.latency.merge(&self.latency.snapshot());
            }
        }
    };
}

numbers! {
    /// Pages of RAM.
    pages,
    /// Pages in this PC's memory.
    resident,
    /// Of these, pages that differ from what the source has.
    dirty,
    /// Pages that only the source has.
    remote,
    /// Pages that are being fetched.
    fetching,
    /// Pages that are being stored.
    storing,
    /// Pages that were fetched ahead and wait to be installed.
    parked,
    /// Pages that nobody has any more.
    lost,
    /// Pages that may be in this PC's memory at most.
    limit,
    /// Faults on pages that were elsewhere: somebody stood still for the network.
    remote_faults,
    /// Faults on pages that were never touched, or freed since.
    zero_faults,
    /// First writes to pages that were protected.
    write_faults,
    /// Faults on pages fetched ahead that were parked: they only cost the event.
    parked_faults,
    /// Faults on pages that were on their way already.
    late_faults,
    /// Events that something else had taken care of.
    stale_faults,
    /// Faults that found no memory free and had to wait until a page was written back: should be 0.
    faults_that_waited_for_write,
    /// Pages fetched because somebody stood still.
    fetched,
    /// Pages fetched ahead of need.
    fetched_ahead,
    /// Of these, pages that their stream has gone on beyond.
    ahead_used,
    /// Of these, pages that it has not.
    ahead_unused,
    /// Of one page in each request ahead, those that were given up untouched.
    ahead_wasted,
    /// Pages stored at the source.
    stored,
    /// Pages taken out of memory.
    dropped,
    /// Pages found to be all zeros when they were to be stored.
    blanked,
    /// Pages in this PC's memory whose copies the source had to give up for want of room.
    reclaimed,
    /// Pages that the guest gave back.
    discarded,
}

/// A number that one thread writes and any reads.
#[derive(Default)]
pub(super) struct Number(AtomicU64);

impl Number {
    pub(super) fn add(&self, n: u64) {
        // Only one thread writes: two plain moves instead of a locked instruction.
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }

    pub(super) fn set(&self, n: u64) {
        self.0.store(n, Ordering::Relaxed);
    }
}

/// How many pages are where.
#[derive(Clone, Debug, Default)]
pub(super) struct Census {
    places: [u64; Place::ALL.len()],
    pub(super) storing: u64,
}

impl Census {
    pub(super) fn add(&mut self, place: Place, n: u64) {
        self.places[place as usize] += n;
    }

    pub(super) fn moved(&mut self, from: Place, to: Place) {
        self.places[from as usize] -= 1;
        self.places[to as usize] += 1;
    }

    pub(super) fn at(&self, place: Place) -> u64 {
        self.places[place as usize]
    }

    /// Pages whose memory is taken up here, or soon will be.
    pub(super) fn here(&self) -> u64 {
        Place::ALL.into_iter().filter(|place| place.here()).map(|place| self.at(place)).sum()
    }

    pub(super) fn show(&self, tally: &Tally) {
        tally.resident.set(self.at(Place::Blank) + self.at(Place::Clean) + self.at(Place::Dirty));
        tally.dirty.set(self.at(Place::Dirty));
        tally.remote.set(self.at(Place::Remote));
        tally.fetching.set(self.at(Place::Fetching));
        tally.storing.set(self.storing);
        tally.parked.set(self.at(Place::Parked));
        tally.lost.set(self.at(Place::Lost));
    }
}
