//! What the processors of a guest's members have in common.
//!
//! A spanning guest sees one processor, which is none of its members': what all of them have, less what cannot work
//! across PCs. [`Features`] are what one PC's KVM can show, [`intersection()`] makes of several the one that the guest
//! is shown. Drawn up in `docs/time.md`, "What the guest's processor is".

mod intersection;
mod names;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use transport::wire::fields::{Malformed, Reader};

pub use intersection::{Candidate, Hidden, Mismatch, Shown, intersection};
pub use names::{Feature, Register, names};

/// More leaves than any processor has.
const MOST_LEAVES: usize = 256;
/// More registers than any KVM lists.
const MOST_MSRS: usize = 1024;

/// What CPUID returns: EAX, EBX, ECX, EDX.
pub type Words = [u32; 4];

/// What the KVM of a PC can show and hold for a vCPU.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Features {
    /// CPUID's leaves by function and sub-leaf; sub-leaf 0 of those that have none.
    pub leaves: BTreeMap<(u32, u32), Words>,
    /// The model-specific registers that make up a vCPU's state; ascending.
    pub msrs: Vec<u32>,
    /// `IA32_ARCH_CAPABILITIES` as KVM gives it to a vCPU; 0 where there is none.
    pub arch_capabilities: u64,
}

impl Features {
    /// A leaf; all zeros where there is none, as a processor answers.
    #[must_use]
    pub fn leaf(&self, function: u32, index: u32) -> Words {
        self.leaves.get(&(function, index)).copied().unwrap_or_default()
    }

    /// Whether they have `feature`.
    #[must_use]
    pub fn has(&self, feature: Feature) -> bool {
        self.leaf(feature.function, feature.index)[feature.register as usize] & 1 << feature.bit != 0
    }

    /// How many bits a guest-physical address has.
    #[must_use]
    pub fn address_bits(&self) -> u8 {
        match self.leaf(0x8000_0008, 0)[0] & 0xff {
            0 => 36,
            bits => (bits as u8).clamp(36, 52),
        }
    }

    /// Bytes for the wire, 9 KiB at most: a count of leaves and one of registers (u16 each), the value of
    /// `IA32_ARCH_CAPABILITIES` (u64), each leaf as function, sub-leaf and its four words, each register's index; all
    /// little-endian. What is beyond the bounds of [`Features::decode`] is left out.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let (leaves, msrs) = (self.leaves.len().min(MOST_LEAVES), self.msrs.len().min(MOST_MSRS));
        let mut out = Vec::with_capacity(12 + leaves * 24 + msrs * 4);
        out.extend((leaves as u16).to_le_bytes());
        out.extend((msrs as u16).to_le_bytes());
        out.extend(self.arch_capabilities.to_le_bytes());
        for ((function, index), words) in self.leaves.iter().take(leaves) {
            for word in [function, index].into_iter().chain(words) {
                out.extend(word.to_le_bytes());
            }
        }
        self.msrs.iter().take(msrs).for_each(|msr| out.extend(msr.to_le_bytes()));
        out
    }

    /// Reads them; `bytes` come from a peer.
    ///
    /// # Errors
    /// They are cut off or too long, or leaves or registers are too many, out of order or doubled.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut reader = Reader::new(bytes, "processor's features");
        let counts = reader.u32()?;
        let (leaves, msrs) = ((counts & 0xffff) as usize, (counts >> 16) as usize);
        let mut features = Self { arch_capabilities: reader.u64()?, ..Self::default() };
        if leaves > MOST_LEAVES || msrs > MOST_MSRS || reader.left() != leaves * 24 + msrs * 4 {
            return Err(reader.malformed());
        }
        for _ in 0..leaves {
            let key = (reader.u32()?, reader.u32()?);
            let words = [reader.u32()?, reader.u32()?, reader.u32()?, reader.u32()?];
            if features.leaves.last_key_value().is_some_and(|(last, _)| *last >= key) {
                return Err(reader.malformed());
            }
            features.leaves.insert(key, words);
        }
        for _ in 0..msrs {
            let msr = reader.u32()?;
            if features.msrs.last().is_some_and(|last| *last >= msr) {
                return Err(reader.malformed());
            }
            features.msrs.push(msr);
        }
        Ok(features)
    }
}

/// Reads what a peer may say its processor's features are, and has the guest shown what they have in common with
/// themselves.
pub fn fuzz(data: &[u8]) {
    let Ok(features) = Features::decode(data) else { return };
    assert_eq!(features.encode(), data, "features have one encoding");
    let one = Candidate { node: "one", features: &features };
    if let Ok(shown) = intersection(&[one, one], &[]) {
        let again = Candidate { node: "two", features: &shown.features };
        assert_eq!(intersection(&[again, one], &[]).map(|shown| shown.features), Ok(shown.features));
    }
}
