//! Which local APICs a message is for.

use serde::{Deserialize, Serialize};

use super::message::{ApicId, Delivery, Destination, Message};

/// Every APIC, as a physical ID and as a logical address.
const BROADCAST: u8 = 0xff;

/// What has to be known of a local APIC to route messages to it. Members tell each other when one changes; the
/// task priority is only ever a hint, so theirs may be old.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct View {
    /// Its ID.
    pub id: ApicId,
    /// Its logical ID: LDR, bits 31:24.
    pub ldr: u8,
    /// How it compares logical addresses: DFR, bits 31:28.
    pub dfr: u8,
    /// Its task priority.
    pub tpr: u8,
    /// Whether software has enabled it (SVR, bit 8).
    pub enabled: bool,
}

/// A set of local APICs, by ID.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Targets([u64; 4]);

impl Targets {
    /// Whether `id` is among them.
    #[must_use]
    pub fn contains(&self, id: ApicId) -> bool {
        self.0[usize::from(id.0 / 64)] & (1 << (id.0 % 64)) != 0
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0 == [0; 4]
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> u32 {
        self.0.iter().map(|word| word.count_ones()).sum()
    }

    /// All of them, lowest first.
    pub fn iter(self) -> impl Iterator<Item = ApicId> {
        (0..=u8::MAX).map(ApicId).filter(move |id| self.contains(*id))
    }

    fn insert(&mut self, id: ApicId) {
        self.0[usize::from(id.0 / 64)] |= 1 << (id.0 % 64);
    }
}

impl FromIterator<ApicId> for Targets {
    fn from_iter<I: IntoIterator<Item = ApicId>>(ids: I) -> Self {
        let mut set = Self::default();
        ids.into_iter().for_each(|id| set.insert(id));
        set
    }
}

impl View {
    /// Whether a message for `destination` is for this APIC.
    fn matches(&self, destination: Destination) -> bool {
        match destination {
            Destination::Physical(id) => id == self.id || id.0 == BROADCAST,
            Destination::Logical(address) => self.matches_logical(address),
            Destination::Itself(id) => id == self.id,
            Destination::All => true,
            Destination::AllBut(id) => id != self.id,
        }
    }

    /// Intel SDM vol. 3A, "Logical Destination Mode": a bit per APIC in the flat model; four bits of cluster and a
    /// bit per APIC within it in the cluster model. Models that the manual does not define match nothing.
    fn matches_logical(&self, address: u8) -> bool {
        match self.dfr & 0xf {
            _ if address == BROADCAST => true,
            0xf => address & self.ldr != 0,
            0x0 => address >> 4 == self.ldr >> 4 && address & self.ldr & 0xf != 0,
            _ => false,
        }
    }
}

/// The APICs that get `message`, out of all of a guest's.
///
/// None that are disabled by software get a vector; to the others it goes whatever their state (SDM, "Local APIC
/// State After It Has Been Software Disabled"). Nobody: the message is refused, and a level-triggered pin tries again.
///
/// Lowest priority: the least task priority wins. Among equals the manual leaves the choice to the platform; the
/// vector picks, so that the interrupts of different devices go to different vCPUs and those of one to the same.
#[must_use]
pub fn route(message: &Message, view: &[View]) -> Targets {
    let wants_enabled = message.delivery.has_vector();
    let candidates =
        || view.iter().filter(|apic| apic.matches(message.destination) && (apic.enabled || !wants_enabled));
    if !message.acts() {
        return Targets::default();
    }
    if message.delivery != Delivery::LowestPriority {
        return candidates().map(|apic| apic.id).collect();
    }
    let Some(least) = candidates().map(|apic| apic.tpr).min() else { return Targets::default() };
    let equals = || candidates().filter(|apic| apic.tpr == least);
    let turn = usize::from(message.vector) % equals().count().max(1);
    equals().nth(turn).map(|apic| apic.id).into_iter().collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::interrupt::message::Trigger;

    fn view(id: u8, ldr: u8, dfr: u8) -> View {
        View { id: ApicId(id), ldr, dfr, tpr: 0, enabled: true }
    }

    fn message(destination: Destination) -> Message {
        let (delivery, trigger) = (Delivery::Fixed, Trigger::Edge);
        Message { destination, delivery, vector: 0x40, trigger, asserted: true }
    }

    fn ids(message: &Message, view: &[View]) -> Vec<u8> {
        route(message, view).iter().map(|id| id.0).collect()
    }

    #[test]
    fn a_physical_destination_is_one_apic_or_all() {
        let all = [0, 1, 2, 254].map(|id| view(id, 0, 0xf));
        assert_eq!(ids(&message(Destination::Physical(ApicId(2))), &all), [2]);
        assert_eq!(ids(&message(Destination::Physical(ApicId(3))), &all), [0; 0]);
        assert_eq!(ids(&message(Destination::Physical(ApicId(0xff))), &all), [0, 1, 2, 254]);
    }

    #[test]
    fn a_flat_logical_address_selects_by_bits() {
        let all = [view(0, 1, 0xf), view(1, 2, 0xf), view(2, 4, 0xf), view(3, 0, 0xf)];
        assert_eq!(ids(&message(Destination::Logical(0b101)), &all), [0, 2]);
        assert_eq!(ids(&message(Destination::Logical(0x80)), &all), [0; 0]);
        assert_eq!(ids(&message(Destination::Logical(0xff)), &all), [0, 1, 2, 3]);
    }

    #[test]
    fn a_clustered_logical_address_selects_bits_within_one_cluster() {
        let all = [view(0, 0x11, 0), view(1, 0x12, 0), view(2, 0x21, 0), view(3, 0x22, 0)];
        assert_eq!(ids(&message(Destination::Logical(0x13)), &all), [0, 1]);
        assert_eq!(ids(&message(Destination::Logical(0x22)), &all), [3]);
        assert_eq!(ids(&message(Destination::Logical(0x31)), &all), [0; 0]);
        assert_eq!(ids(&message(Destination::Logical(0xff)), &all), [0, 1, 2, 3]);
        assert_eq!(ids(&message(Destination::Logical(1)), &[view(0, 1, 7)]), [0; 0], "an undefined model");
    }

    #[test]
    fn the_shorthands_are_the_sender_all_and_all_others() {
        let all = [0, 1, 2].map(|id| view(id, 0, 0xf));
        assert_eq!(ids(&message(Destination::Itself(ApicId(1))), &all), [1]);
        assert_eq!(ids(&message(Destination::All), &all), [0, 1, 2]);
        assert_eq!(ids(&message(Destination::AllBut(ApicId(1))), &all), [0, 2]);
    }

    #[test]
    fn a_disabled_apic_gets_init_nmi_and_sipi_but_no_vector() {
        let all = [View { enabled: false, ..view(0, 1, 0xf) }];
        for (delivery, count) in [
            (Delivery::Fixed, 0),
            (Delivery::LowestPriority, 0),
            (Delivery::Nmi, 1),
            (Delivery::Init, 1),
            (Delivery::StartUp, 1),
        ] {
            let message = Message { delivery, ..message(Destination::Logical(1)) };
            assert_eq!(route(&message, &all).len(), count, "{delivery:?}");
        }
    }

    #[test]
    fn a_level_triggered_deassertion_reaches_nobody() {
        let deassert =
            Message { trigger: Trigger::Level, asserted: false, ..message(Destination::Physical(ApicId(0))) };
        for delivery in [Delivery::Fixed, Delivery::Init] {
            assert!(route(&Message { delivery, ..deassert }, &[view(0, 1, 0xf)]).is_empty());
        }
    }

    #[test]
    fn equals_in_priority_share_the_vectors() {
        let all = [0, 1, 2, 3].map(|id| view(id, 1 << id, 0xf));
        let lowest = Message { delivery: Delivery::LowestPriority, ..message(Destination::Logical(0b1110)) };
        let turns: Vec<u8> =
            (0x30..0x33).flat_map(|vector| ids(&Message { vector, ..lowest }, &all)).collect();
        assert_eq!(turns, [1, 2, 3]);
    }

    proptest! {
        #[test]
        fn lowest_priority_picks_exactly_one_of_those_that_fixed_would_reach_and_none_is_lower(
            apics in proptest::collection::vec((any::<u8>(), any::<u8>(), any::<bool>()), 0..20),
            address: u8,
            vector: u8,
        ) {
            let all: Vec<View> = apics
                .iter()
                .enumerate()
                .map(|(id, &(ldr, tpr, enabled))| View { tpr, enabled, ..view(id as u8, ldr, 0xf) })
                .collect();
            let fixed = Message { vector, ..message(Destination::Logical(address)) };
            let reached = route(&fixed, &all);
            let chosen = route(&Message { delivery: Delivery::LowestPriority, ..fixed }, &all);
            prop_assert_eq!(chosen.len(), reached.len().min(1));
            for id in chosen.iter() {
                prop_assert!(reached.contains(id));
                let tpr = all[usize::from(id.0)].tpr;
                prop_assert!(reached.iter().all(|other| all[usize::from(other.0)].tpr >= tpr));
            }
        }
    }
}
