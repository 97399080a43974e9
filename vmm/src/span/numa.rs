//! What a spanning guest sees of where its memory is: each member a NUMA node.
//!
//! ```text
//! RAM file   | low memory … console's share | member 1's share | member 2's share |    in whole pieces
//! vCPUs      0 … n0-1                         n0 … n0+n1-1       …
//! ```
//!
//! Shares are in proportion to vCPUs. A node's pages have their home at its member, so what the guest's own scheduler
//! and allocator keep together is found without asking another PC.

use std::time::Duration;

use crate::config::{Guest, NumaNode};
use crate::memory::coherence::message::Member;
use crate::memory::frames::{PAGE, Pieces};
use crate::units::Bytes;

/// A node's distance to itself (ACPI 6.5, 5.2.17).
const LOCAL: u8 = 10;
/// The least and the greatest distance of another node; 255 says that it cannot be reached.
const REMOTE: std::ops::RangeInclusive<u8> = 20..=254;
/// The distance where nothing was measured: about that of 100 µs.
const UNMEASURED: u8 = 86;

/// How many pages of `ram` each member's share is, in order along the RAM file: contiguous, in whole pieces, in
/// proportion to how many vCPUs the members run (`counts`). Low memory, the first piece, is the console node's, so a
/// small guest's other members may have none.
#[must_use]
pub fn split(ram: Bytes, counts: &[u8]) -> Vec<(Member, u64)> {
    let pieces = Pieces::new(ram);
    let total: u64 = counts.iter().map(|count| u64::from(*count)).sum::<u64>().max(1);
    let mut shares = Vec::with_capacity(counts.len());
    let (mut cpus, mut begin) = (0, 0);
    for (number, count) in counts.iter().enumerate() {
        let Some(member) = u8::try_from(number).ok().and_then(Member::new) else { break };
        cpus += u64::from(*count);
        let nearest = (u64::from(pieces.count()) * cpus + total / 2) / total;
        // The last one's share ends where RAM does, be that within a piece.
        let last = number + 1 == counts.len();
        let end = if last {
            pieces.pages()
        } else {
            (nearest.max(1) * u64::from(pieces.each())).min(pieces.pages())
        };
        let end = end.max(begin);
        shares.push((member, end - begin));
        begin = end;
    }
    shares
}

/// The guest's NUMA nodes, and the distances between them, row by row: its members' where it spans PCs, and what its
/// configuration says (without distances) where it does not. `round_trip` gives what was measured between two members.
pub fn seen(
    guest: &Guest,
    round_trip: impl Fn(Member, Member) -> Option<Duration>,
) -> (Vec<NumaNode>, Vec<Vec<u8>>) {
    let placement = guest.placement();
    if !placement.spans() {
        return (guest.memory.numa.clone(), Vec::new());
    }
    let shares = split(guest.memory.size, &placement.counts());
    let nodes = shares.iter().map(|(member, pages)| NumaNode {
        size: Bytes(pages * PAGE as u64),
        cpus: placement.cpus_of(*member).collect(),
    });
    let row = |from: Member| {
        let to = shares.iter().map(|(to, _)| match *to == from {
            true => LOCAL,
            // The table is symmetric, as latency is taken to be.
            false => round_trip(from.min(*to), from.max(*to)).map_or(UNMEASURED, distance),
        });
        to.collect()
    };
    (nodes.collect(), shares.iter().map(|(from, _)| row(*from)).collect())
}

/// The distance of a member that is a round trip of `time` away.
///
/// The scale is logarithmic, since local memory (10) and a page on another PC are a factor of hundreds apart and there
/// are 254 steps: 1 µs is 20, and each tenfold adds 33. So 10 µs are 53, 100 µs 86, 1 ms 120. All are beyond 30, from
/// where Linux no longer moves tasks between nodes to balance short spells of load.
#[must_use]
pub fn distance(time: Duration) -> u8 {
    let micros = time.as_secs_f64() * 1e6;
    let scaled = f64::from(*REMOTE.start()) + 10.0 * micros.max(1.0).log2();
    (scaled.round() as u8).clamp(*REMOTE.start(), *REMOTE.end())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;

    proptest! {
        #[test]
        fn shares_cover_ram_in_whole_pieces_and_low_memory_is_the_consoles(
            mib in 1..200_000_u64, counts in proptest::collection::vec(1..17_u8, 1..5)
        ) {
            let ram = Bytes(mib * MIB);
            let pieces = Pieces::new(ram);
            let shares = split(ram, &counts);
            prop_assert_eq!(shares.len(), counts.len());
            prop_assert_eq!(shares.iter().map(|(_, pages)| pages).sum::<u64>(), pieces.pages());
            prop_assert!(shares[0].1 >= pieces.pages().min(pieces.each().into()));
            let total: u64 = counts.iter().map(|count| u64::from(*count)).sum();
            let mut end = 0;
            for ((_, pages), count) in shares.iter().zip(&counts) {
                end += pages;
                prop_assert!(end == pieces.pages() || end % u64::from(pieces.each()) == 0);
                let fair = pieces.pages() * u64::from(*count) / total;
                prop_assert!(pages.abs_diff(fair) <= 2 * u64::from(pieces.each()), "{} of a fair {}", pages, fair);
            }
        }
    }

    #[test]
    fn distances_grow_with_latency_and_stay_in_bounds() {
        let at = |micros| distance(Duration::from_micros(micros));
        assert_eq!([0, 1, 10, 100, 1000].map(at), [20, 20, 53, 86, 120]);
        assert_eq!(distance(Duration::from_secs(1 << 40)), 254);
        assert_eq!(UNMEASURED, at(100));
    }

    #[test]
    fn each_member_is_a_node_with_its_vcpus_and_its_share() {
        let text = "name = 'g'\n[kernel]\nimage = 'v'\n[memory]\nsize = '1G'\n[cpu]\ncount = 4\n\
                    [[cpu.place]]\nnode = 'attic'\ncount = 1\n";
        let guest = Guest::parse(Path::new("g.toml"), text).expect("valid");
        let (nodes, distances) = seen(&guest, |_, _| Some(Duration::from_micros(10)));
        let node = |mib, cpus: &[u8]| NumaNode { size: Bytes(mib * MIB), cpus: cpus.to_vec() };
        assert_eq!(nodes, [node(768, &[0, 1, 2]), node(256, &[3])]);
        assert_eq!(distances, [[10, 53], [53, 10]]);
        let alone = Guest::parse(Path::new("g.toml"), "name = 'g'\n[kernel]\nimage = 'v'\n").expect("valid");
        assert_eq!(seen(&alone, |_, _| None), (Vec::new(), Vec::new()));
    }
}
