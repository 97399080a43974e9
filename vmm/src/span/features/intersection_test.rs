use proptest::prelude::*;

use super::*;
use crate::span::features::{Register, names};

const GENUINE: Words = [0x1f, 0x756e_6547, 0x6c65_746e, 0x4965_6e69];

/// A processor with features of these names, the ones that every kernel needs, and a plain layout of extended state.
fn processor(features: &[&str]) -> Features {
    let mut processor = Features::default();
    for (key, words) in [
        ((0, 0), GENUINE),
        ((1, 0), [0x806ec, 0x0800, 0, 0]),
        ((7, 0), [2, 0, 0, 0]),
        ((7, 1), [0; 4]),
        ((7, 2), [0; 4]),
        ((0xd, 0), [0x2e7, 0, 0, 0]),
        ((0xd, 1), [0; 4]),
        ((0xd, 2), [256, 576, 0, 0]),
        ((0xd, 5), [64, 1088, 0, 0]),
        ((0xd, 6), [512, 1152, 0, 0]),
        ((0xd, 7), [1024, 1664, 0, 0]),
        ((0xd, 9), [8, 2688, 0, 0]),
        ((0x4000_0000, 0), [0x4000_0010, 1, 2, 3]),
        ((0x4000_0001, 0), [u32::MAX, 0, 0, 1]),
        ((0x8000_0000, 0), [0x8000_0021, 0, 0, 0]),
        ((0x8000_0001, 0), [0; 4]),
        ((0x8000_0007, 0), [0; 4]),
        ((0x8000_0008, 0), [46 | 57 << 8 | 52 << 16, 0, 0, 0]),
        ((0x8000_0021, 0), [0; 4]),
        ((0x8000_0022, 0), [0; 4]),
    ] {
        processor.leaves.insert(key, words);
    }
    for name in NEEDED.iter().chain(features) {
        let feature = Feature::named(name).expect("a feature");
        let words = processor.leaves.get_mut(&(feature.function, feature.index)).expect("a leaf");
        words[feature.register as usize] |= 1 << feature.bit;
    }
    processor.msrs = vec![0x10, 0x11, 0x3b, 0x6e0, 0x4b56_4d01, 0xc000_0080, 0xc001_0200];
    processor
}

fn shown(members: &[&Features]) -> Result<Shown, Mismatch> {
    required(members, &[])
}

fn required(members: &[&Features], names: &[&str]) -> Result<Shown, Mismatch> {
    let nodes = ["desk", "attic", "loft"];
    let members: Vec<_> =
        nodes.iter().zip(members).map(|(node, features)| Candidate { node, features }).collect();
    let required: Vec<_> = names.iter().map(|name| Feature::named(name).expect("a feature")).collect();
    intersection(&members, &required)
}

fn has(features: &Features, name: &str) -> bool {
    features.has(Feature::named(name).expect("a feature"))
}

#[test]
fn a_feature_is_shown_where_all_have_it_and_hidden_with_the_name_of_who_lacks_it() {
    let (desk, attic) = (processor(&["SSE3", "AES", "PCID", "INVPCID"]), processor(&["SSE3", "INVPCID"]));
    let shown = shown(&[&desk, &attic]).expect("they are alike enough");
    assert!(has(&shown.features, "SSE3") && !has(&shown.features, "AES") && !has(&shown.features, "INVPCID"));
    let hidden: Vec<_> =
        shown.hidden.iter().map(|hidden| format!("{}: {}", hidden.feature, hidden.why)).collect();
    assert_eq!(
        hidden,
        ["PCID: attic lacks it", "AES: attic lacks it", "INVPCID: it needs PCID, which is not shown"]
    );
}

#[test]
fn what_cannot_work_across_pcs_is_hidden_though_all_have_it() {
    let has_all = ["X2APIC", "TSC-DEADLINE", "MONITOR", "VMX", "PDCM", "WAITPKG", "SGX", "XFD", "RDTSCP"];
    let one = processor(&has_all);
    let features = shown(&[&one, &one]).expect("they are alike").features;
    let still: Vec<_> = has_all.iter().filter(|name| has(&features, name)).collect();
    assert_eq!(still, [&"RDTSCP"]);
    assert_eq!(features.leaf(0x4000_0001, 0), [0; 4], "no paravirtual feature");
    assert_eq!(features.leaf(0x4000_0000, 0), [0x4000_0001, 1, 2, 3], "but the signature");
    assert!(has(&features, "INVARIANT-TSC"), "the counter's rate is kept, so the guest is told");
    assert_eq!(features.msrs, [0x10, 0x3b, 0xc000_0080]);
}

#[test]
fn makers_that_differ_are_refused_by_name() {
    let (desk, mut attic) = (processor(&[]), processor(&[]));
    attic.leaves.insert((0, 0), [0x10, 0x6874_7541, 0x444d_4163, 0x6974_6e65]);
    let why = shown(&[&desk, &attic]).expect_err("two makers").to_string();
    assert!(why.starts_with("desk's processor is of GenuineIntel and attic's of AuthenticAMD; "), "{why}");
}

#[test]
fn what_is_required_is_refused_by_the_features_and_the_members_name() {
    let (desk, attic) =
        (processor(&["XSAVE", "AVX", "AVX2", "AVX-512F"]), processor(&["XSAVE", "AVX", "AVX2"]));
    assert!(required(&[&desk, &attic], &["AVX2"]).is_ok());
    let why = required(&[&desk, &attic], &["AVX-512F"]).expect_err("attic has none").to_string();
    assert_eq!(why, "attic's processor lacks AVX-512F, which `cpu.features` asks for");
    let monitor = processor(&["MONITOR"]);
    let why = required(&[&monitor, &monitor], &["MONITOR"]).expect_err("it cannot work").to_string();
    assert!(why.starts_with("MONITOR cannot be had by a guest on several PCs: waiting for"), "{why}");
    let mut bare = processor(&[]);
    bare.leaves.get_mut(&(0x8000_0001, 0)).expect("a leaf")[3] = 0;
    let why = shown(&[&bare, &desk]).expect_err("it is no 64-bit processor").to_string();
    assert_eq!(why, "desk's processor lacks SYSCALL, which every 64-bit kernel needs");
}

#[test]
fn a_part_of_the_state_that_lies_elsewhere_is_hidden_with_all_that_needs_it() {
    let vectors =
        ["XSAVE", "XSAVEC", "XSAVES", "AVX", "AVX2", "AVX-512F", "AVX-512BW", "AVX-512-VBMI", "PKU"];
    let (desk, mut attic) = (processor(&vectors), processor(&vectors));
    let alike = shown(&[&desk, &attic]).expect("they are alike").features;
    assert!(vectors.iter().all(|name| has(&alike, name)));
    assert_eq!(alike.leaf(0xd, 0), [0x2e7, 576, 2696, 0]);
    attic.leaves.insert((0xd, 5), [64, 832, 0, 0]);
    let features = shown(&[&desk, &attic]).expect("they are alike enough").features;
    let left: Vec<_> = vectors.iter().filter(|name| has(&features, name)).copied().collect();
    assert_eq!(left, ["XSAVE", "XSAVEC", "XSAVES", "AVX", "AVX2", "PKU"]);
    assert_eq!(features.leaf(0xd, 0), [0x207, 576, 2696, 0]);
    assert_eq!(features.leaf(0xd, 6), [0; 4]);
    attic.leaves.insert((0xd, 9), [8, 2560, 0, 0]);
    let features = shown(&[&desk, &attic]).expect("they are alike enough").features;
    assert_eq!((has(&features, "PKU"), features.leaf(0xd, 0)), (false, [0x7, 576, 832, 0]));
}

#[test]
fn addresses_are_as_wide_as_the_narrowest_processor_s() {
    let (desk, mut attic) = (processor(&["LA57"]), processor(&[]));
    attic.leaves.insert((0x8000_0008, 0), [39 | 48 << 8, 0, 0, 0]);
    let features = shown(&[&desk, &attic]).expect("they are alike enough").features;
    assert_eq!((features.address_bits(), features.leaf(0x8000_0008, 0)[0] >> 8), (39, 48));
}

#[test]
fn capabilities_are_shown_where_they_are_the_same() {
    let (mut desk, mut attic) = (processor(&["ARCH-CAPABILITIES"]), processor(&["ARCH-CAPABILITIES"]));
    (desk.arch_capabilities, attic.arch_capabilities) = (0x2b, 0x2b);
    let same = shown(&[&desk, &attic]).expect("they are alike").features;
    assert_eq!((has(&same, "ARCH-CAPABILITIES"), same.arch_capabilities), (true, 0x2b));
    attic.arch_capabilities = 0x21;
    let differ = shown(&[&desk, &attic]).expect("they are alike enough");
    assert_eq!((has(&differ.features, "ARCH-CAPABILITIES"), differ.features.arch_capabilities), (false, 0));
    assert_eq!(differ.hidden[0].why, "the members have it in different forms");
}

fn any_processor() -> impl Strategy<Value = Features> {
    let all: Vec<&'static str> = names().collect();
    let count = all.len();
    let layout = prop_oneof![Just(1088_u32), Just(832)];
    let values =
        (proptest::collection::vec(any::<bool>(), count), layout, 36..52_u32, any::<[u32; 4]>(), 0..3_u64);
    values.prop_map(move |(chosen, offset, bits, cache, capabilities)| {
        let chosen: Vec<_> =
            all.iter().zip(chosen).filter(|(_, chosen)| *chosen).map(|(name, _)| *name).collect();
        let mut processor = processor(&chosen);
        processor.leaves.insert((0xd, 5), [64, offset, 0, 0]);
        processor.leaves.insert((0x8000_0008, 0), [bits | 57 << 8, 0, 0, 0]);
        processor.leaves.insert((4, 0), cache);
        processor.arch_capabilities = capabilities;
        processor.msrs.extend((0xc001_1000..0xc001_1000 + cache[0] % 4).collect::<Vec<_>>());
        processor
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn nothing_is_shown_that_one_member_lacks_and_neither_order_nor_repetition_matters(
        one in any_processor(), two in any_processor(), three in any_processor()
    ) {
        let all = shown(&[&one, &two, &three]).expect("one maker, and all that kernels need").features;
        for order in [[&two, &one, &three], [&three, &two, &one], [&two, &three, &one]] {
            prop_assert_eq!(&shown(&order).expect("as before").features, &all);
        }
        prop_assert_eq!(&shown(&[&all, &all]).expect("as before").features, &all);
        prop_assert_eq!(&shown(&[&all]).expect("as before").features, &all);
        prop_assert_eq!(&shown(&[&all, &one]).expect("it is one of them").features.msrs, &all.msrs);
        for (function, index) in [(1, 0), (7, 0), (7, 1), (7, 2), (0x8000_0001, 0), (0x8000_0008, 0), (0x8000_0021, 0)] {
            for register in Register::ALL {
                for bit in 0..32 {
                    let feature = Feature::new(function, index, register, bit);
                    if feature.name().is_some() && all.has(feature) {
                        prop_assert!([&one, &two, &three].iter().all(|member| member.has(feature)), "{}", feature);
                    }
                }
            }
        }
        for (name, those) in NEEDS {
            let orphan = those.iter().find(|name| has(&all, name));
            prop_assert!(has(&all, name) || orphan.is_none(), "{:?} without {}", orphan, name);
        }
        let bytes = all.encode();
        prop_assert!(bytes.len() <= 9 << 10);
        prop_assert_eq!(Features::decode(&bytes).expect("its own bytes"), all);
    }
}

#[test]
fn features_that_are_cut_off_too_long_or_out_of_order_are_no_features() {
    let bytes = processor(&["AVX"]).encode();
    assert!(Features::decode(&bytes).is_ok());
    assert!(Features::decode(&bytes[..bytes.len() - 1]).is_err());
    assert!(Features::decode(&[&bytes[..], &[0]].concat()).is_err());
    let mut doubled = bytes.clone();
    doubled.copy_within(12..36, 36);
    assert!(Features::decode(&doubled).is_err());
    let mut many = bytes;
    many[..2].fill(0xff);
    assert!(Features::decode(&many).is_err());
}

/// `OMEGA_WRITE_SEEDS=1 cargo test -p omega-vmm features` writes it again.
#[test]
fn the_fuzz_corpus_holds_the_sample_and_nothing_in_it_does_harm() {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fuzz/corpus/features/processor");
    let bytes = processor(&["XSAVE", "AVX", "AVX2", "AVX-512F", "PKU", "PCID", "INVPCID", "LA57"]).encode();
    if std::env::var_os("OMEGA_WRITE_SEEDS").is_some() {
        std::fs::write(file, &bytes).expect("a file");
    }
    assert_eq!(std::fs::read(file).expect("a file"), bytes);
    for at in 0..bytes.len() {
        for value in [0, 1, 0x7f, 0x80, 0xff] {
            let mut bytes = bytes.clone();
            bytes[at] = value;
            crate::span::features::fuzz(&bytes);
        }
    }
}
