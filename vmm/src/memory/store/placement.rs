//! Which helper keeps which piece: dealt by size, so that helpers fill up together and neighbours lie apart.
//!
//! Pure: the first deal is the same on every run of the same configuration, and what changes later is moved piece by
//! piece ([`choose`]); pieces that need not move stay where they are.

use smallvec::SmallVec;

/// The helpers that keep a piece, by their number.
pub(super) type Keepers = SmallVec<[u8; 2]>;

/// Deals `pieces` pieces to helpers that have room for `room` pieces each, `copies` different ones for each piece.
/// `None`: there is not enough room, or there are not enough helpers.
pub(super) fn deal(pieces: u32, room: &[u32], copies: u32) -> Option<Vec<Keepers>> {
    let shares = shares(pieces, room, copies)?;
    let mut left = shares.clone();
    let mut dealt = Vec::with_capacity(pieces as usize);
    for turn in 0..pieces {
        let to_come = pieces - turn;
        // How far each is behind its share at this turn, in parts of a piece. Who must have all that is still to
        // come goes first: then two different ones can be found to the end.
        let behind = |helper: usize| {
            let (share, had) = (i64::from(shares[helper]), i64::from(shares[helper] - left[helper]));
            (left[helper] == to_come, share * i64::from(turn + 1) - had * i64::from(pieces))
        };
        let mut order: SmallVec<[usize; 8]> = (0..room.len()).filter(|helper| left[*helper] > 0).collect();
        order.sort_by_key(|helper| (std::cmp::Reverse(behind(*helper)), *helper));
        let keepers: Keepers = order.iter().take(copies as usize).map(|helper| *helper as u8).collect();
        if keepers.len() < copies as usize {
            return None;
        }
        keepers.iter().for_each(|helper| left[usize::from(*helper)] -= 1);
        dealt.push(keepers);
    }
    Some(dealt)
}

/// How many pieces each helper gets: in proportion to its room, as far as it has it, and no piece twice.
fn shares(pieces: u32, room: &[u32], copies: u32) -> Option<Vec<u32>> {
    let most: Vec<u64> = room.iter().map(|room| u64::from((*room).min(pieces))).collect();
    let need = u64::from(pieces) * u64::from(copies);
    if most.iter().sum::<u64>() < need || room.len() > usize::from(u8::MAX) {
        return None;
    }
    let mut shares = vec![0_u64; room.len()];
    let mut left = need;
    while left > 0 {
        let open: Vec<usize> = (0..room.len()).filter(|helper| shares[*helper] < most[*helper]).collect();
        let weight: u64 = open.iter().map(|helper| u64::from(room[*helper])).sum();
        let round = left;
        for helper in open {
            // Rounded up, so that each round deals something; what is dealt first is rounded in its favour.
            let fair = (round * u64::from(room[helper])).div_ceil(weight.max(1)).max(1);
            let more = fair.min(most[helper] - shares[helper]).min(left);
            shares[helper] += more;
            left -= more;
        }
    }
    Some(shares.into_iter().map(|share| share as u32).collect())
}

/// Where a piece could go.
#[derive(Clone, Copy, Debug)]
pub(super) struct Candidate {
    /// The place's number.
    pub(super) place: usize,
    /// Pieces that it has room for in all.
    pub(super) room: u32,
    /// Pieces that it keeps.
    pub(super) used: u32,
}

/// Who takes a piece that must move: the one with the largest part of its room free.
pub(super) fn choose(candidates: impl Iterator<Item = Candidate>) -> Option<usize> {
    let free = |c: &Candidate| u64::from(c.room - c.used) * 1_000_000 / u64::from(c.room);
    let open = candidates.filter(|c| c.used < c.room);
    open.max_by_key(|c| (free(c), std::cmp::Reverse(c.place))).map(|c| c.place)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn counts(dealt: &[Keepers], helpers: usize) -> Vec<u32> {
        let mut counts = vec![0; helpers];
        dealt.iter().flatten().for_each(|helper| counts[usize::from(*helper)] += 1);
        counts
    }

    #[test]
    fn pieces_are_dealt_by_size_and_neighbours_lie_apart() {
        let dealt = deal(64, &[90, 30], 1).expect("there is room");
        assert_eq!(counts(&dealt, 2), [48, 16]);
        let runs = dealt.chunks(8).map(|run| run.iter().flatten().filter(|helper| **helper == 1).count());
        assert!(runs.into_iter().all(|small| small == 2), "evenly along the RAM: {dealt:?}");
    }

    #[test]
    fn a_mirror_of_two_has_everything_twice_whatever_their_sizes_beyond_that() {
        let dealt = deal(10, &[100, 10], 2).expect("there is room");
        assert_eq!(counts(&dealt, 2), [10, 10]);
        assert!(deal(10, &[100, 9], 2).is_none(), "no piece lies twice on one helper");
        assert!(deal(10, &[100], 2).is_none());
        assert!(deal(10, &[4, 5], 1).is_none());
    }

    #[test]
    fn the_one_with_the_largest_part_free_takes_what_moves() {
        let at = |place, room, used| Candidate { place, room, used };
        assert_eq!(choose([at(0, 10, 9), at(1, 4, 2), at(2, 100, 60)].into_iter()), Some(1));
        assert_eq!(choose([at(0, 10, 10), at(1, 0, 0)].into_iter()), None);
    }

    proptest! {
        #[test]
        fn whatever_fits_is_dealt_within_room_and_on_different_helpers(
            pieces in 1_u32..80,
            room in proptest::collection::vec(0_u32..60, 1..7),
            copies in 1_u32..4,
        ) {
            let fits = room.iter().map(|room| (*room).min(pieces)).sum::<u32>() >= pieces * copies;
            let dealt = deal(pieces, &room, copies);
            prop_assert_eq!(dealt.is_some(), fits);
            let Some(dealt) = dealt else { return Ok(()) };
            prop_assert_eq!(dealt.len(), pieces as usize);
            for keepers in &dealt {
                let different: std::collections::BTreeSet<u8> = keepers.iter().copied().collect();
                prop_assert_eq!(different.len(), copies as usize);
            }
            for (count, room) in counts(&dealt, room.len()).into_iter().zip(&room) {
                prop_assert!(count <= *room);
            }
        }
    }
}
