//! What a vCPU answers to CPUID: KVM's list, with the topology and clocks of this machine.
//!
//! All vCPUs are cores without hyper-threads, of one package if they are on one PC; a vCPU's APIC id is its number.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use super::Error;
use crate::span::features::Features;

const HYPERVISOR: u32 = 1 << 31;
const X2APIC: u32 = 1 << 21;
const TSC_DEADLINE: u32 = 1 << 24;
const HTT: u32 = 1 << 28;
const KVM_SIGNATURE: u32 = 0x4000_0000;
/// Which paravirtual features KVM offers.
const KVM_FEATURES: u32 = 0x4000_0001;
/// Those that work without the kernel's local APIC: clocks (0, 3, 24), no delays by port 0x80 (1), steal time (5),
/// and the host's polling (12). The others send interrupts (asynchronous page faults, IPIs, kicks) or avoid their
/// ends.
const KVM_WITHOUT_APIC: u32 = 1 | 1 << 1 | 1 << 3 | 1 << 5 | 1 << 12 | 1 << 24;
/// The leaf that VMware defined for clock frequencies and others read too.
const TIMING: u32 = 0x4000_0010;
const LEVEL_SMT: u32 = 1 << 8;
const LEVEL_CORE: u32 = 2 << 8;
/// KVM's local APIC timer counts nanoseconds.
const APIC_BUS_KHZ: u32 = 1_000_000;

/// How many bits a guest-physical address has (leaf 0x80000008).
pub(super) fn address_bits(supported: &CpuId) -> u8 {
    let entry = supported.as_slice().iter().find(|entry| entry.function == 0x8000_0008);
    entry.map_or(36, |entry| (entry.eax & 0xff) as u8).clamp(36, 52)
}

/// Leaves that have sub-leaves.
const INDEXED: [u32; 6] = [4, 7, 0xb, 0xd, 0x1f, 0x8000_001d];

/// KVM's list as a value.
pub(super) fn leaves(supported: &CpuId) -> impl Iterator<Item = ((u32, u32), [u32; 4])> {
    supported.as_slice().iter().map(|entry| {
        let index = if entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0 { entry.index } else { 0 };
        ((entry.function, index), [entry.eax, entry.ebx, entry.ecx, entry.edx])
    })
}

/// The leaves of features as KVM takes them.
pub(super) fn of_features(features: &Features) -> Result<CpuId, Error> {
    let entries = features.leaves.iter().map(|((function, index), words)| {
        if INDEXED.contains(function) {
            indexed(*function, *index, *words)
        } else {
            leaf(*function, *index, *words)
        }
    });
    CpuId::from_entries(&entries.collect::<Vec<_>>()).map_err(|_| too_many())
}

fn too_many() -> Error {
    Error::State("there are too many CPUID leaves".into())
}

/// How the vCPUs of a machine are arranged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Topology {
    /// How many there are.
    pub(super) count: u8,
    /// How many low bits of an APIC ID number the cores of a package; `None`: there is one package.
    pub(super) package_bits: Option<u32>,
}

impl Topology {
    /// Of `count` vCPUs that are all on one PC.
    pub(super) fn on_one_pc(count: u8) -> Self {
        Self { count, package_bits: None }
    }

    /// Of vCPUs on several PCs: so many on each, in order. Those of one package are on one PC: operating systems take it
    /// that a package, with the cache that its cores share, is in one NUMA node.
    pub(super) fn across(counts: &[u8]) -> Self {
        let count = counts.iter().fold(0, |sum: u8, count| sum.saturating_add(*count));
        // Where each PC's first vCPU begins a block of a power of two, its vCPUs are whole blocks.
        let starts = counts.iter().scan(0_u32, |start, count| {
            *start += u32::from(*count);
            Some(*start)
        });
        let inner = starts.filter(|start| *start < u32::from(count)).map(u32::trailing_zeros).min();
        Self { count, package_bits: inner }
    }
}

/// The leaves of vCPU `index`.
pub(super) fn of_vcpu(
    supported: &CpuId,
    index: u8,
    of: Topology,
    tsc_khz: Option<u32>,
    tsc_deadline: bool,
) -> Result<CpuId, Error> {
    let index = u32::from(index);
    let count = of.package_bits.map_or(u32::from(of.count), |bits| 1 << bits);
    // How many low bits of an APIC id number the cores of the package.
    let core_bits = count.next_power_of_two().trailing_zeros();
    let own = [0xb, 0x1f, 0x15, TIMING];
    let mut leaves: Vec<kvm_cpuid_entry2> =
        supported.as_slice().iter().filter(|entry| !own.contains(&entry.function)).copied().collect();
    let mut intel = false;
    for entry in &mut leaves {
        match entry.function {
            0 => {
                intel = entry.ebx.to_le_bytes() == *b"Genu";
                entry.eax = entry.eax.max(0xb);
            }
            1 => {
                entry.ebx = (entry.ebx & 0xffff) | (count.next_power_of_two() & 0xff) << 16 | index << 24;
                entry.ecx |= HYPERVISOR;
                if tsc_deadline {
                    entry.ecx |= TSC_DEADLINE;
                }
                entry.edx = if count > 1 { entry.edx | HTT } else { entry.edx & !HTT };
            }
            // Caches (Intel, AMD): the first two levels belong to a core, the third to the package.
            4 | 0x8000_001d if entry.eax & 0x1f != 0 => {
                let sharing = if entry.eax >> 5 & 7 >= 3 { (1 << core_bits) - 1 } else { 0 };
                entry.eax = (entry.eax & 0x3fff) | sharing << 14;
                if entry.function == 4 {
                    entry.eax |= ((1 << core_bits) - 1) << 26;
                }
            }
            KVM_SIGNATURE => entry.eax = entry.eax.max(TIMING),
            // AMD: how many cores there are.
            0x8000_0008 => entry.ecx = (entry.ecx & !0xf0ff) | core_bits << 12 | (count - 1),
            0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (index, index, 0),
            _ => {}
        }
    }
    let max = leaves.iter().find(|entry| entry.function == 0).map_or(0, |entry| entry.eax);
    for function in [0xb, 0x1f] {
        if function <= max {
            leaves.extend(topology(function, index, count, core_bits));
        }
    }
    if let Some(tsc_khz) = tsc_khz {
        leaves.push(leaf(TIMING, 0, [tsc_khz, APIC_BUS_KHZ, 0, 0]));
        if intel && max >= 0x15 {
            // The crystal is the APIC bus; TSC = crystal × EBX / EAX (Intel SDM volume 2, CPUID).
            leaves.push(leaf(0x15, 0, [APIC_BUS_KHZ, tsc_khz, APIC_BUS_KHZ * 1000, 0]));
        }
    }
    CpuId::from_entries(&leaves).map_err(|_| too_many())
}

/// Hides what needs KVM's own local APIC from a vCPU that has another, which is an xAPIC without TSC deadlines.
pub(super) fn hide_kernel_apic(leaves: &mut CpuId) {
    for entry in leaves.as_mut_slice() {
        match entry.function {
            1 => entry.ecx &= !(X2APIC | TSC_DEADLINE),
            KVM_FEATURES => entry.eax &= KVM_WITHOUT_APIC,
            _ => {}
        }
    }
}

/// The extended topology: one thread in a core, `count` cores in the package.
fn topology(function: u32, index: u32, count: u32, core_bits: u32) -> [kvm_cpuid_entry2; 3] {
    [
        indexed(function, 0, [0, 1, LEVEL_SMT, index]),
        indexed(function, 1, [core_bits, count, LEVEL_CORE | 1, index]),
        indexed(function, 2, [0, 0, 2, index]),
    ]
}

fn leaf(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
}

fn indexed(function: u32, index: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 { flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX, ..leaf(function, index, registers) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn supported() -> CpuId {
        let vendor = [0x16, u32::from_le_bytes(*b"Genu"), 0, 0];
        let entries = [
            leaf(0, 0, vendor),
            leaf(1, 0, [0, 0, 0, HTT]),
            indexed(4, 0, [1 | 1 << 5, 0, 0, 0]),
            indexed(4, 1, [3 | 3 << 5, 0, 0, 0]),
            indexed(0xb, 0, [7, 7, 7, 7]),
            leaf(KVM_SIGNATURE, 0, [0x4000_0001, 0, 0, 0]),
            leaf(0x8000_0008, 0, [40, 0, 0, 0]),
        ];
        CpuId::from_entries(&entries).expect("few")
    }

    fn get(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        let mut found = cpuid.as_slice().iter().filter(|e| (e.function, e.index) == (function, index));
        let entry = *found.next().expect("a leaf");
        assert!(found.next().is_none(), "leaf {function:#x} stands there twice");
        entry
    }

    #[test]
    fn every_vcpu_sees_its_own_number_and_all_cores_of_one_package() {
        for (count, bits) in [(1, 0), (2, 1), (3, 2), (4, 2), (64, 6)] {
            let index = count - 1;
            let cpuid = of_vcpu(&supported(), index, Topology::on_one_pc(count), Some(2_000_000), true)
                .expect("leaves");
            let (index, count) = (u32::from(index), u32::from(count));
            assert_eq!(get(&cpuid, 1, 0).ebx >> 24, index);
            assert_eq!(get(&cpuid, 1, 0).edx & HTT != 0, count > 1);
            assert_eq!(get(&cpuid, 1, 0).ecx, HYPERVISOR | TSC_DEADLINE);
            assert_eq!(get(&cpuid, 0xb, 0).eax, 0, "no bits number hyper-threads");
            assert_eq!((get(&cpuid, 0xb, 1).eax, get(&cpuid, 0xb, 1).ebx), (bits, count));
            assert_eq!(get(&cpuid, 0xb, 1).edx, index);
            assert_eq!(get(&cpuid, 4, 0).eax >> 14 & 0xfff, 0, "level 1 is a core's own");
            assert_eq!(get(&cpuid, 4, 1).eax >> 14 & 0xfff, (1 << bits) - 1, "level 3 is shared");
            assert_eq!(get(&cpuid, 0x8000_0008, 0).ecx, bits << 12 | (count - 1));
        }
    }

    #[test]
    fn a_vcpu_with_another_apic_sees_nothing_that_needs_kvm_s() {
        let mut entries = supported().as_slice().to_vec();
        entries[1].ecx = X2APIC | TSC_DEADLINE | 1;
        entries.push(leaf(KVM_FEATURES, 0, [u32::MAX, 0, 0, 0]));
        let mut cpuid = CpuId::from_entries(&entries).expect("few");
        hide_kernel_apic(&mut cpuid);
        assert_eq!(get(&cpuid, 1, 0).ecx, 1);
        assert_eq!(get(&cpuid, KVM_FEATURES, 0).eax, 0x0100_102b);
    }

    #[test]
    fn the_clock_leaves_give_the_exact_frequency() {
        let cpuid = of_vcpu(&supported(), 0, Topology::on_one_pc(1), Some(2_345_678), false).expect("leaves");
        let crystal = get(&cpuid, 0x15, 0);
        let hertz = u64::from(crystal.ecx) * u64::from(crystal.ebx) / u64::from(crystal.eax);
        assert_eq!(hertz, 2_345_678_000);
        assert_eq!(get(&cpuid, TIMING, 0).eax, 2_345_678);
        assert_eq!(get(&cpuid, KVM_SIGNATURE, 0).eax, TIMING);
        assert_eq!(address_bits(&supported()), 40);
    }
    #[test]
    fn vcpus_of_a_package_are_on_one_pc() {
        for (counts, bits) in
            [(&[1, 1][..], 0), (&[2, 2], 1), (&[3, 1], 0), (&[4, 4], 2), (&[2, 4, 2], 1), (&[6, 2], 1)]
        {
            assert_eq!(Topology::across(counts).package_bits, Some(bits), "{counts:?}");
        }
        let cpuid = of_vcpu(&supported(), 3, Topology::across(&[2, 2]), None, false).expect("leaves");
        assert_eq!((get(&cpuid, 4, 1).eax >> 14 & 0xfff, get(&cpuid, 0xb, 1).ebx), (1, 2));
        assert_eq!((get(&cpuid, 0xb, 1).eax, get(&cpuid, 0xb, 1).edx), (1, 3), "its package is number 1");
    }

    #[test]
    fn a_list_of_leaves_is_the_same_after_it_was_a_value() {
        let features = Features { leaves: leaves(&supported()).collect(), ..Features::default() };
        let again = of_features(&features).expect("few");
        let sorted = |list: &CpuId| {
            let mut list = list.as_slice().to_vec();
            list.sort_by_key(|entry| (entry.function, entry.index));
            list
        };
        assert_eq!(sorted(&again), sorted(&supported()));
    }
}
