//! What a member's engine counts.

use serde::{Deserialize, Serialize};
use transport::metrics::{Distribution, Histogram};

/// Defines the numbers, and how those of several shards become one.
macro_rules! numbers {
    ($($(#[doc = $doc:literal])+ $name:ident,)+) => {
        /// What was counted until some moment, over all shards. Pages have 4 KiB.
        #[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(default)]
        pub struct Counters {
            $($(#[doc = $doc])+ pub $name: u64,)+
            /// How long threads stood still for a page, from when their fault was read until it was in place.
            pub latency: Distribution,
        }

        /// What one shard counts, under its lock.
        #[derive(Default)]
        pub(super) struct Tally {
            $(pub(super) $name: u64,)+
            pub(super) latency: Histogram,
        }

        impl Counters {
            /// What was counted after `earlier`.
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
                $(sum.$name += self.$name;)+
                sum.latency.merge(&self.latency.snapshot());
            }
        }
    };
}

numbers! {
    /// Faults of readers on pages that were not here.
    read_faults,
    /// Faults of writers on pages that were not here.
    write_faults,
    /// Faults of writers on pages that were here to be read.
    upgrades,
    /// Faults on pages that were on their way already, or had come meanwhile.
    late_faults,
    /// Pages that were asked for before anybody stood still for them, because they had been needed together with another.
    ahead,
    /// Pages of zeros, which nobody had touched before.
    zeroed,
    /// Pages that came from other members.
    fetched,
    /// Pages that were sent to other members.
    sent,
    /// Copies that were given up because another member writes.
    invalidated,
    /// Pages that may not be written to any longer because another member reads.
    downgraded,
    /// Pages that were given up while who uses them stood still for another: somebody had been in need for longer, or did
    /// not want to wait any longer.
    unused,
    /// Pages that came and were held.
    held,
    /// Orders that had to wait until a hold was over.
    deferred,
    /// Microseconds for which threads stood still for pages, all together.
    waited_us,
    /// Messages to other members.
    messages,
    /// Bytes of them, contents among them.
    bytes,
}
