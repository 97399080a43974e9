//! Which helper keeps which piece: dealt by size, so that helpers fill up together and neighbours lie apart.
//!
//! Pure: the first deal is the same on every run of the same configuration, and what changes later is moved piece by
//! piece ([`choose`]); pieces that need not move stay where they are.

use smallvec::SmallVec;

/// The helpers that keep a piece, by their number.
pub(super) type Keepers = SmallVec<[u8; 2]>;

/// Deals as [`deal`] does, where every `handlers`-th piece is one handler's: so that each handler has its part of every
/// helper's room, as far as that goes, and finds room on the others when one is to be emptied.
pub(super) fn deal_by_handler(pieces: u32, handlers: u32, room: &[u32], copies: u32) -> Option<Vec<Keepers>> {
    let parts = (0..handlers).map(|handler| {
        let mine = (pieces + handlers - 1 - handler) / handlers;
        let part = |room: &u32| (u64::from(*room) * u64::from(mine) / u64::from(pieces.max(1))) as u32;
        let room: Vec<u32> = room.iter().map(part).collect();
        let most: u64 = room.iter().map(|room| u64::from((*room).min(mine))).sum();
        (most >= u64::from(mine) * u64::from(copies)).then(|| deal(mine, &room, copies)).flatten()
    });
    let Some(parts) = parts.collect::<Option<Vec<_>>>() else { return deal(pieces, room, copies) };
    let at = |piece: u32| parts[(piece % handlers) as usize].get((piece / handlers) as usize).cloned();
    (0..pieces).map(at).collect()
}

/// Deals `pieces` pieces to helpers that have room for `room` pieces each, `copies` different ones for each piece; where
/// all together have room for less, since pages may be here instead, in proportion to it. `None`: there are not enough
/// helpers.
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
    let mut most: Vec<u64> = room.iter().map(|room| u64::from((*room).min(pieces))).collect();
    let need = u64::from(pieces) * u64::from(copies);
    if most.iter().sum::<u64>() < need {
        most.iter_mut().filter(|most| **most > 0).for_each(|most| *most = pieces.into());
    }
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
    /// Pages that it has room for in all.
    pub(super) quota: u64,
    /// Pieces that it keeps something of.
    pub(super) used: u32,
}

/// Who takes a piece that must move: the one that keeps the fewest for its size.
pub(super) fn choose(candidates: impl Iterator<Item = Candidate>) -> Option<usize> {
    let share = |c: &Candidate| (u64::from(c.used) + 1).saturating_mul(1 << 32) / c.quota.max(1);
    candidates.filter(|c| c.quota > 0).min_by_key(|c| (share(c), c.place)).map(|c| c.place)
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
        assert!(deal(10, &[100], 2).is_none(), "no piece lies twice on one helper");
    }

    #[test]
    fn where_not_everything_has_room_at_once_it_is_dealt_in_proportion() {
        let dealt = deal(30, &[4, 8], 1).expect("pages may be here too");
        assert_eq!(counts(&dealt, 2), [10, 20]);
        let dealt = deal(10, &[6, 0, 6], 2).expect("pages may be here too");
        assert_eq!(counts(&dealt, 3), [10, 0, 10]);
        assert!(deal(10, &[0], 1).is_none());
    }

    #[test]
    fn the_one_with_the_fewest_pieces_for_its_size_takes_what_moves() {
        let at = |place, quota, used| Candidate { place, quota, used };
        assert_eq!(choose([at(0, 1000, 9), at(1, 400, 2), at(2, 10_000, 79)].into_iter()), Some(1));
        assert_eq!(choose([at(0, 1000, 3), at(1, 1000, 3)].into_iter()), Some(0));
        assert_eq!(choose([at(1, 0, 0)].into_iter()), None);
    }

    #[test]
    fn each_handler_has_its_part_of_every_helper() {
        let counts_of = |dealt: &[Keepers], handler| {
            counts(&dealt.iter().skip(handler).step_by(2).cloned().collect::<Vec<_>>(), 2)
        };
        let dealt = deal_by_handler(8, 2, &[8, 8], 1).expect("there is room");
        assert_eq!((counts_of(&dealt, 0), counts_of(&dealt, 1)), (vec![2, 2], vec![2, 2]));
        // What cannot be divided is dealt all the same.
        let dealt = deal_by_handler(3, 2, &[2, 1], 1).expect("there is room");
        assert_eq!(counts(&dealt, 2), [2, 1]);
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
            prop_assert_eq!(dealt.is_some(), room.iter().filter(|room| **room > 0).count() >= copies as usize);
            let Some(dealt) = dealt else { return Ok(()) };
            prop_assert_eq!(dealt.len(), pieces as usize);
            for keepers in &dealt {
                let different: std::collections::BTreeSet<u8> = keepers.iter().copied().collect();
                prop_assert_eq!(different.len(), copies as usize);
            }
            for (count, room) in counts(&dealt, room.len()).into_iter().zip(&room) {
                let most = if fits { *room } else { pieces };
                prop_assert!(count <= most);
            }
        }
    }
}
