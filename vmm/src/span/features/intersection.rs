//! One processor out of several: what all of them have, less what cannot work across PCs.

use std::collections::BTreeSet;
use std::ops::RangeInclusive;

use super::{Feature, Features, Words};

/// What a member's processor can show.
#[derive(Clone, Copy, Debug)]
pub struct Candidate<'a> {
    /// The member's name, for messages.
    pub node: &'a str,
    /// Its processor's.
    pub features: &'a Features,
}

/// What the guest is shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shown {
    /// The processor that it sees, before topology and clocks are put in.
    pub features: Features,
    /// What some member has and the guest is not shown.
    pub hidden: Vec<Hidden>,
}

/// A feature that some member has and the guest is not shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hidden {
    /// Which.
    pub feature: Feature,
    /// Why not.
    pub why: String,
}

/// The members' processors cannot be shown as one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Mismatch {
    /// They are of different makers, whose instructions and registers differ in ways that no bit tells.
    #[error(
        "{0}'s processor is of {1} and {2}'s of {3}; a guest on both is not possible, so choose PCs of one maker"
    )]
    Vendor(String, String, String, String),
    /// A member lacks what the guest needs.
    #[error("{node}'s processor lacks {feature}, which {by}")]
    Lacks {
        /// The member.
        node: String,
        /// What it lacks.
        feature: Feature,
        /// Who needs it.
        by: &'static str,
    },
    /// All have it, and still it cannot be shown.
    #[error("{feature} cannot be had by a guest on several PCs: {why}")]
    Impossible {
        /// What.
        feature: Feature,
        /// Why not.
        why: String,
    },
}

/// What no 64-bit kernel does without.
const NEEDED: [&str; 13] =
    ["FPU", "TSC", "MSR", "PAE", "CX8", "APIC", "CMOV", "FXSR", "SSE", "SSE2", "SYSCALL", "NX", "LM"];

/// What cannot work across PCs, and why.
const NOT_ACROSS: [(&[&str], &str); 9] = [
    (&["X2APIC"], "the guest's local APICs are Omega's own, which are xAPICs"),
    (&["TSC-DEADLINE"], "the guest's local APICs are Omega's own, whose timers count a clock of the guest"),
    (
        &["MONITOR", "MWAITX", "WAITPKG"],
        "waiting for a write watches a cache line of one PC, and the write may happen on another",
    ),
    (&["VMX", "SVM", "SMX", "SKINIT"], "the state of guests inside the guest cannot be moved between PCs"),
    (&["SGX", "SGX-LC", "SGX-KEYS"], "an enclave's memory belongs to one processor"),
    (
        &[
            "PDCM",
            "DS",
            "DTES64",
            "DS-CPL",
            "PT",
            "ARCH-LBR",
            "ARCH-PERFMON-EXT",
            "PERFCTR-CORE",
            "PERFCTR-NB",
            "PERFCTR-LLC",
            "PERFTSC",
            "IBS",
            "LWP",
            "PERFMON-V2",
        ],
        "performance counters are one PC's, and differ by model",
    ),
    (
        &["AMX-BF16", "AMX-TILE", "AMX-INT8", "AMX-FP16", "AMX-COMPLEX", "XFD"],
        "its state is larger than what is moved",
    ),
    (&["AVX10"], "its versions differ by model"),
    (
        &["ENQCMD", "KL", "PCONFIG", "TME", "RDT-M", "RDT-A", "HYBRID", "CORE-CAPABILITIES", "PPIN"],
        "it is about one processor or its devices",
    ),
];

/// What is of no use without something else.
const NEEDS: [(&str, &[&str]); 19] = [
    ("XSAVE", &["AVX", "XSAVEOPT", "XSAVEC", "XGETBV1", "XSAVES", "PKU", "MPX"]),
    ("XSAVEC", &["XSAVES"]),
    (
        "AVX",
        &["AVX2", "FMA", "F16C", "VAES", "VPCLMULQDQ", "AVX-VNNI", "AVX-IFMA", "XOP", "FMA4", "AVX-512F"],
    ),
    ("AVX2", &["AVX-512F", "AVX-VNNI", "AVX-IFMA", "AVX-VNNI-INT8", "AVX-NE-CONVERT", "AVX-VNNI-INT16"]),
    ("AVX", &["AVX-VNNI-INT8", "AVX-NE-CONVERT", "AVX-VNNI-INT16", "SHA512", "SM3", "SM4"]),
    (
        "AVX-512F",
        &["AVX-512DQ", "AVX-512-IFMA", "AVX-512PF", "AVX-512ER", "AVX-512CD", "AVX-512BW", "AVX-512VL"],
    ),
    ("AVX-512F", &["AVX-512-VBMI", "AVX-512-VBMI2", "AVX-512-VNNI", "AVX-512-BITALG", "AVX-512-VPOPCNTDQ"]),
    (
        "AVX-512F",
        &["AVX-512-4VNNIW", "AVX-512-4FMAPS", "AVX-512-VP2INTERSECT", "AVX-512-FP16", "AVX-512-BF16"],
    ),
    ("AVX-512BW", &["AVX-512-VBMI", "AVX-512-VBMI2", "AVX-512-BITALG", "AVX-512-FP16", "AVX-512-BF16"]),
    ("XSAVES", &["CET-SS", "CET-IBT"]),
    ("PCID", &["INVPCID"]),
    ("PKU", &["OSPKE"]),
    ("HLE", &[]),
    ("RTM", &["TSXLDTRK"]),
    ("SSE2", &["SSE3", "AES", "PCLMULQDQ", "SHA", "GFNI"]),
    ("SSE3", &["SSSE3"]),
    ("SSSE3", &["SSE4.1"]),
    ("SSE4.1", &["SSE4.2"]),
    ("AES", &["VAES"]),
];

/// Parts of the extended state (bits of XCR0), and the feature that they are for.
const STATES: [(u64, &str); 4] =
    [(1 << 2, "AVX"), (0b11 << 3, "MPX"), (0b111 << 5, "AVX-512F"), (1 << 9, "PKU")];
/// The x87 and SSE state, which XSAVE always has.
const LEGACY_STATE: u64 = 0b11;
/// Bytes of legacy state and header before the first part.
const LEGACY_SIZE: u32 = 576;

/// Registers that no vCPU of a spanning guest has: clocks of the host, Hyper-V's and KVM's own, performance counters,
/// tracing, the deadline timer, guests inside the guest, enclaves, and AMX's.
const NOT_MOVED: [RangeInclusive<u32>; 16] = [
    0x11..=0x12,
    0x8c..=0x8f,
    0xc1..=0xc8,
    0x186..=0x18d,
    0x1c4..=0x1c5,
    0x309..=0x30b,
    0x329..=0x329,
    0x345..=0x345,
    0x38d..=0x390,
    0x3f1..=0x3f1,
    0x480..=0x491,
    0x570..=0x58f,
    0x600..=0x600,
    0x6e0..=0x6e0,
    0x4000_0000..=0x4b56_4dff,
    0xc000_0300..=0xc000_0303,
];
const AMD_COUNTERS: [RangeInclusive<u32>; 2] = [0xc001_0000..=0xc001_0007, 0xc001_0200..=0xc001_020b];
const IA32_ARCH_CAPABILITIES: u32 = 0x10a;

/// The processor that a guest on all of `members` is shown: features that each of them has; of what only describes
/// (model, caches), the description of one. The order of the members changes nothing but names in messages.
///
/// # Errors
/// Their processors differ in what cannot be hidden, or one lacks something of `required` or of what every kernel
/// needs.
pub fn intersection(members: &[Candidate<'_>], required: &[Feature]) -> Result<Shown, Mismatch> {
    // Which one describes must not depend on the order, so it is the least by the leaves themselves.
    let Some(model) = members.iter().map(|member| member.features).min_by_key(|features| &features.leaves)
    else {
        return Ok(Shown { features: Features::default(), hidden: Vec::new() });
    };
    same_vendor(members)?;
    let needed = || NEEDED.iter().filter_map(|name| Feature::named(name));
    for (feature, by) in needed()
        .map(|of| (of, "every 64-bit kernel needs"))
        .chain(required.iter().map(|of| (*of, "`cpu.features` asks for")))
    {
        if let Some(member) = members.iter().find(|member| !member.features.has(feature)) {
            return Err(Mismatch::Lacks { node: member.node.to_owned(), feature, by });
        }
    }
    let mut shown = Features::default();
    for key in model.leaves.keys().filter(|key| members.iter().all(|m| m.features.leaves.contains_key(key))) {
        let all = || members.iter().map(|member| member.features.leaf(key.0, key.1));
        if let Some(words) = leaf(*key, all, model.leaf(key.0, key.1)) {
            shown.leaves.insert(*key, words);
        }
    }
    below_their_maximum(&mut shown);
    hide(members, &mut shown);
    extended_state(members, &mut shown);
    registers(members, &mut shown);
    let hidden = hidden(members, &shown);
    // A member may say that its last leaf is before what it shows.
    if let Some(feature) = needed().find(|feature| !shown.has(*feature)) {
        return Err(Mismatch::Impossible { feature, why: why(members, &shown, feature) });
    }
    if let Some(hidden) = hidden.iter().find(|hidden| required.contains(&hidden.feature)) {
        return Err(Mismatch::Impossible { feature: hidden.feature, why: hidden.why.clone() });
    }
    Ok(Shown { features: shown, hidden })
}

fn same_vendor(members: &[Candidate<'_>]) -> Result<(), Mismatch> {
    let vendor = |member: &Candidate<'_>| {
        let [_, b, c, d] = member.features.leaf(0, 0);
        let name: String = [b, d, c].into_iter().flat_map(u32::to_le_bytes).map(char::from).collect();
        name.chars().filter(char::is_ascii_graphic).collect::<String>()
    };
    let Some((first, rest)) = members.split_first() else { return Ok(()) };
    let other = rest.iter().find(|member| member.features.leaf(0, 0)[1..] != first.features.leaf(0, 0)[1..]);
    match other {
        Some(other) => {
            let (one, two) = (first.node.to_owned(), other.node.to_owned());
            Err(Mismatch::Vendor(one, vendor(first), two, vendor(other)))
        }
        None => Ok(()),
    }
}

/// What a leaf shows that is `all` on the members and `model` on the one that describes; `None`: nothing.
fn leaf<I: Iterator<Item = Words>>(
    (function, index): (u32, u32),
    all: impl Fn() -> I,
    model: Words,
) -> Option<Words> {
    let and = |word: usize| all().fold(u32::MAX, |bits, words| bits & words[word]);
    let min = |word: usize| all().map(|words| words[word]).min().unwrap_or(0);
    let [a, b, c, d] = model;
    Some(match (function, index) {
        (0 | 0x8000_0000, 0) => [min(0), b, c, d],
        // Signature and brand; of EBX the size of a cache line, for CLFLUSH.
        (1, 0) => [a, all().map(|words| words[1] & 0xff00).min()?, and(2), and(3)],
        // The APIC timer does not stop; nothing else of power management is shown.
        (6, 0) => [and(0) & 1 << 2, 0, 0, 0],
        (7, 0) => [min(0), and(1), and(2), and(3)],
        (7, _) => [and(0), and(1), and(2), and(3)],
        // Parts of the state whose place differs are taken out afterwards.
        (0xd, 0 | 1) => [and(0), 0, and(2), and(3)],
        (0xd, _) => all().all(|words| words == model).then_some(model)?,
        (0x8000_0001, 0) => [a, b, and(2), and(3)],
        // The time stamp counter neither stops nor changes its rate: `span::clock` sees to it.
        (0x8000_0007, 0) => [0, 0, 0, 1 << 8],
        (0x8000_0008, 0) => {
            let narrowest = |shift: u32| all().map(|words| words[0] >> shift & 0xff).min().unwrap_or(0);
            [narrowest(0) | narrowest(8) << 8, and(1), c & 0xffff, 0]
        }
        (0x8000_0021, 0) => [and(0), 0, 0, 0],
        // KVM's signature stays, so that the guest knows that it is one; its features are clocks, flags and queues that
        // the kernel of one PC shares with its guest.
        (0x4000_0000, 0) => [0x4000_0001, b, c, d],
        (0x4000_0001, 0) => [0; 4],
        // What caches and translation buffers there are, and what the model is called.
        (2 | 4 | 0x16 | 0x18, _)
        | (0x8000_0002..=0x8000_0006 | 0x8000_0019 | 0x8000_001a | 0x8000_001d | 0x8000_001e, _) => model,
        // What is not known is not shown.
        _ => return None,
    })
}

/// Takes out what does not work across PCs, and what needs it.
fn hide(members: &[Candidate<'_>], shown: &mut Features) {
    for feature in NOT_ACROSS.iter().flat_map(|(names, _)| *names).filter_map(|name| Feature::named(name)) {
        clear(shown, feature);
    }
    let differs = members.windows(2).any(|pair| {
        pair.iter().map(|member| member.features.arch_capabilities).collect::<BTreeSet<_>>().len() > 1
    });
    match members.first() {
        Some(first) if !differs => shown.arch_capabilities = first.features.arch_capabilities,
        _ => clear(shown, Feature::new(7, 0, super::Register::Edx, 29)),
    }
    without_what_they_need(shown);
}

/// Takes out what needs something that is not shown, until nothing does.
fn without_what_they_need(shown: &mut Features) {
    loop {
        let before = shown.clone();
        for (need, those) in NEEDS {
            if Feature::named(need).is_some_and(|need| !shown.has(need)) {
                those
                    .iter()
                    .filter_map(|name| Feature::named(name))
                    .for_each(|feature| clear(shown, feature));
            }
        }
        if *shown == before {
            return;
        }
    }
}

fn clear(shown: &mut Features, feature: Feature) {
    if let Some(words) = shown.leaves.get_mut(&(feature.function, feature.index)) {
        words[feature.register as usize] &= !(1 << feature.bit);
    }
}

/// Shows the parts of the extended state that lie in the same place on all members, and no feature without its part.
fn extended_state(members: &[Candidate<'_>], shown: &mut Features) {
    let [low, _, _, high] = shown.leaf(0xd, 0);
    let mut state = u64::from(high) << 32 | u64::from(low);
    let placed = |shown: &Features, part: u32| {
        let key = (0xd, part);
        shown.leaves.contains_key(&key) || members.iter().all(|m| !m.features.leaves.contains_key(&key))
    };
    for (parts, name) in STATES {
        let Some(feature) = Feature::named(name) else { continue };
        let there = (2..63).filter(|part| parts >> part & 1 != 0).all(|part| placed(shown, part));
        if state & parts != parts || !there {
            clear(shown, feature);
        }
    }
    if state & LEGACY_STATE != LEGACY_STATE
        && let Some(xsave) = Feature::named("XSAVE")
    {
        clear(shown, xsave);
    }
    without_what_they_need(shown);
    let kept =
        STATES.iter().filter(|(_, name)| Feature::named(name).is_some_and(|feature| shown.has(feature)));
    let kept = kept.fold(LEGACY_STATE, |kept, (parts, _)| kept | parts);
    state &= kept;
    // Of what only the kernel can switch on: shadow stacks, where they are placed alike.
    let kernel = u64::from(shown.leaf(0xd, 1)[2]) & 0b11 << 11;
    let kernel = if placed(shown, 11) && placed(shown, 12) { kernel } else { 0 };
    shown.leaves.retain(|(function, part), _| {
        *function != 0xd || *part < 2 || *part < 63 && (state | kernel) >> part & 1 != 0
    });
    if !Feature::named("XSAVE").is_some_and(|xsave| shown.has(xsave)) {
        shown.leaves.retain(|(function, _), _| *function != 0xd);
        return;
    }
    let ends = (2..63).filter(|part| state >> part & 1 != 0).map(|part| shown.leaf(0xd, part));
    let size = ends.map(|[size, offset, ..]| size.saturating_add(offset)).fold(LEGACY_SIZE, u32::max);
    if let Some(words) = shown.leaves.get_mut(&(0xd, 0)) {
        // KVM puts the size of what is switched on into EBX.
        *words = [state as u32, LEGACY_SIZE, size, (state >> 32) as u32];
    }
    if let Some([_, on, low, high]) = shown.leaves.get_mut(&(0xd, 1)) {
        (*on, *low, *high) = (LEGACY_SIZE, kernel as u32, 0);
    }
}

/// Drops leaves above what leaf 0 and leaf 80000000h say is the last.
fn below_their_maximum(shown: &mut Features) {
    let [last, ..] = shown.leaf(0, 0);
    let [last_extended, ..] = shown.leaf(0x8000_0000, 0);
    let sub_leaves = shown.leaf(7, 0)[0];
    shown.leaves.retain(|(function, index), _| match function {
        7 => *function <= last && *index <= sub_leaves,
        0..0x4000_0000 => *function <= last,
        0x8000_0000.. => *function <= last_extended.max(0x8000_0000),
        _ => true,
    });
    if !shown.has(Feature::new(7, 0, super::Register::Ecx, 16))
        && let Some([widths, ..]) = shown.leaves.get_mut(&(0x8000_0008, 0))
    {
        // 57 bits of linear addresses need LA57.
        *widths = *widths & 0xff | (*widths >> 8 & 0xff).min(48) << 8;
    }
}

fn registers(members: &[Candidate<'_>], shown: &mut Features) {
    let Some((first, rest)) = members.split_first() else { return };
    let has_capabilities = shown.has(Feature::new(7, 0, super::Register::Edx, 29));
    let moved = |msr: u32| {
        NOT_MOVED.iter().chain(&AMD_COUNTERS).all(|range| !range.contains(&msr))
            && (msr != IA32_ARCH_CAPABILITIES || has_capabilities)
    };
    let everywhere = |msr: u32| rest.iter().all(|member| member.features.msrs.binary_search(&msr).is_ok());
    shown.msrs = first.features.msrs.iter().copied().filter(|msr| moved(*msr) && everywhere(*msr)).collect();
    shown.msrs.sort_unstable();
    shown.msrs.dedup();
}

/// What some member has and the guest is not shown, of what has a name.
fn hidden(members: &[Candidate<'_>], shown: &Features) -> Vec<Hidden> {
    let all = super::names().filter_map(Feature::named);
    let some = all
        .filter(|feature| members.iter().any(|member| member.features.has(*feature)) && !shown.has(*feature));
    some.map(|feature| Hidden { feature, why: why(members, shown, feature) }).collect()
}

fn why(members: &[Candidate<'_>], shown: &Features, feature: Feature) -> String {
    let is = |name: &str| Feature::named(name) == Some(feature);
    if let Some((_, why)) = NOT_ACROSS.iter().find(|(names, _)| names.iter().any(|name| is(name))) {
        return (*why).to_owned();
    }
    if let Some(member) = members.iter().find(|member| !member.features.has(feature)) {
        return format!("{} lacks it", member.node);
    }
    let needs = NEEDS.iter().find(|(need, those)| {
        those.iter().any(|name| is(name)) && Feature::named(need).is_some_and(|need| !shown.has(need))
    });
    match needs {
        Some((need, _)) => format!("it needs {need}, which is not shown"),
        None => "the members have it in different forms".to_owned(),
    }
}

#[cfg(test)]
#[path = "intersection_test.rs"]
mod tests;
