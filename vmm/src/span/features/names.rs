//! The names of the features that CPUID shows (Intel SDM volume 2, CPUID; AMD APM volume 3, appendix E).

use std::collections::HashMap;
use std::fmt;
use std::sync::LazyLock;

/// A register that CPUID returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Register {
    /// EAX.
    Eax,
    /// EBX.
    Ebx,
    /// ECX.
    Ecx,
    /// EDX.
    Edx,
}

use Register::{Eax, Ebx, Ecx, Edx};

impl Register {
    /// All of them, in the order of a leaf's words.
    pub const ALL: [Self; 4] = [Eax, Ebx, Ecx, Edx];
}

/// One bit that CPUID shows. Its text is the name that manuals call it by.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Feature {
    /// The leaf.
    pub function: u32,
    /// The sub-leaf.
    pub index: u32,
    /// The register.
    pub register: Register,
    /// The bit, below 32.
    pub bit: u8,
}

/// Registers full of feature bits: leaf, sub-leaf, register, and the names from bit 0 on; `-` has none.
const NAMED: [(u32, u32, Register, &str); 15] = [
    (
        1,
        0,
        Edx,
        "FPU VME DE PSE TSC MSR PAE MCE CX8 APIC - SEP MTRR PGE MCA CMOV PAT PSE-36 PSN CLFLUSH - DS ACPI MMX FXSR SSE \
         SSE2 SS HTT TM - PBE",
    ),
    (
        1,
        0,
        Ecx,
        "SSE3 PCLMULQDQ DTES64 MONITOR DS-CPL VMX SMX EIST TM2 SSSE3 CNXT-ID SDBG FMA CX16 XTPR PDCM - PCID DCA SSE4.1 \
         SSE4.2 X2APIC MOVBE POPCNT TSC-DEADLINE AES XSAVE OSXSAVE AVX F16C RDRAND HYPERVISOR",
    ),
    (
        7,
        0,
        Ebx,
        "FSGSBASE TSC-ADJUST SGX BMI1 HLE AVX2 FDP-EXCPTN-ONLY SMEP BMI2 ERMS INVPCID RTM RDT-M FCS-DEPRECATED MPX RDT-A \
         AVX-512F AVX-512DQ RDSEED ADX SMAP AVX-512-IFMA - CLFLUSHOPT CLWB PT AVX-512PF AVX-512ER AVX-512CD SHA \
         AVX-512BW AVX-512VL",
    ),
    (
        7,
        0,
        Ecx,
        "PREFETCHWT1 AVX-512-VBMI UMIP PKU OSPKE WAITPKG AVX-512-VBMI2 CET-SS GFNI VAES VPCLMULQDQ AVX-512-VNNI \
         AVX-512-BITALG TME AVX-512-VPOPCNTDQ - LA57 - - - - - RDPID KL BUS-LOCK-DETECT CLDEMOTE - MOVDIRI MOVDIR64B \
         ENQCMD SGX-LC PKS",
    ),
    (
        7,
        0,
        Edx,
        "- SGX-KEYS AVX-512-4VNNIW AVX-512-4FMAPS FSRM UINTR - - AVX-512-VP2INTERSECT SRBDS-CTRL MD-CLEAR \
         RTM-ALWAYS-ABORT - RTM-FORCE-ABORT SERIALIZE HYBRID TSXLDTRK - PCONFIG ARCH-LBR CET-IBT - AMX-BF16 \
         AVX-512-FP16 AMX-TILE AMX-INT8 IBRS STIBP L1D-FLUSH ARCH-CAPABILITIES CORE-CAPABILITIES SSBD",
    ),
    (
        7,
        1,
        Eax,
        "SHA512 SM3 SM4 RAO-INT AVX-VNNI AVX-512-BF16 LASS CMPCCXADD ARCH-PERFMON-EXT - FZRM FSRS FSRCS - - - - FRED \
         LKGS WRMSRNS NMI-SOURCE AMX-FP16 HRESET AVX-IFMA - - LAM MSRLIST",
    ),
    (
        7,
        1,
        Edx,
        "- - - - AVX-VNNI-INT8 AVX-NE-CONVERT - - AMX-COMPLEX - AVX-VNNI-INT16 - - - PREFETCHI - - - - AVX10",
    ),
    (7, 2, Edx, "PSFD IPRED-CTRL RRSBA-CTRL DDPD-U BHI-CTRL MCDT-NO"),
    (0xd, 1, Eax, "XSAVEOPT XSAVEC XGETBV1 XSAVES XFD"),
    (
        0x8000_0001,
        0,
        Ecx,
        "LAHF CMP-LEGACY SVM EXTAPIC CR8-LEGACY ABM SSE4A MISALIGNSSE 3DNOWPREFETCH OSVW IBS XOP SKINIT WDT - LWP FMA4 \
         TCE - NODEID-MSR - TBM TOPOEXT PERFCTR-CORE PERFCTR-NB - DBX PERFTSC PERFCTR-LLC MWAITX ADMSKEXTN",
    ),
    (
        0x8000_0001,
        0,
        Edx,
        "- - - - - - - - - - - SYSCALL - - - - - - - - NX - MMXEXT - - FFXSR PAGE1GB RDTSCP - LM 3DNOWEXT 3DNOW",
    ),
    (0x8000_0007, 0, Edx, "- - - - - - - - INVARIANT-TSC"),
    (
        0x8000_0008,
        0,
        Ebx,
        "CLZERO IRPERF XSAVEERPTR INVLPGB RDPRU - MBE - MCOMMIT WBNOINVD - - IBPB INT-WBINVD AMD-IBRS AMD-STIBP - \
         STIBP-ALWAYS-ON - IBRS-SAME-MODE - - - PPIN AMD-SSBD VIRT-SSBD SSB-NO CPPC AMD-PSFD BTC-NO IBPB-RET",
    ),
    (
        0x8000_0021,
        0,
        Eax,
        "NO-NESTED-DATA-BP FSGS-NON-SERIALIZING LFENCE-SERIALIZING SMM-PGCFG-LOCK - - NULL-SELECTOR-CLEARS-BASE \
         UPPER-ADDRESS-IGNORE AUTOIBRS NO-SMM-CTL AMD-FSRS AMD-FSRC - PREFETCHCTL - - - - EPSF - - - - - - - - SBPB \
         IBPB-BRTYPE SRSO-NO SRSO-USER-KERNEL-NO",
    ),
    (0x8000_0022, 0, Eax, "PERFMON-V2"),
];

impl Feature {
    /// The bit `bit` of a register.
    #[must_use]
    pub const fn new(function: u32, index: u32, register: Register, bit: u8) -> Self {
        Self { function, index, register, bit }
    }

    /// The feature of this name, as manuals write it (`AVX2`) or in small letters.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        static BY_NAME: LazyLock<HashMap<&str, Feature>> =
            LazyLock::new(|| named().map(|(feature, name)| (name, feature)).collect());
        BY_NAME.get(name).or_else(|| BY_NAME.get(name.to_ascii_uppercase().as_str())).copied()
    }

    /// Its name, where it has one.
    #[must_use]
    pub fn name(self) -> Option<&'static str> {
        static NAME_OF: LazyLock<HashMap<Feature, &str>> = LazyLock::new(|| named().collect());
        NAME_OF.get(&self).copied()
    }
}

/// All names.
pub fn names() -> impl Iterator<Item = &'static str> {
    named().map(|(_, name)| name)
}

fn named() -> impl Iterator<Item = (Feature, &'static str)> {
    NAMED.iter().flat_map(|(function, index, register, names)| {
        let bits = (0..32).zip(names.split_ascii_whitespace()).filter(|(_, name)| *name != "-");
        bits.map(|(bit, name)| (Feature::new(*function, *index, *register, bit), name))
    })
}

impl fmt::Display for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { function, index, register, bit } = self;
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "CPUID {function:x}h.{index} {register:?} bit {bit}"),
        }
    }
}

impl fmt::Debug for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_one_feature_s_and_leads_back_to_it() {
        for (feature, name) in named() {
            assert_eq!(feature.name(), Some(name));
            assert_eq!(Feature::named(name), Some(feature), "{name}");
        }
        for (name, feature) in [
            ("avx-512f", Feature::new(7, 0, Ebx, 16)),
            ("XSAVES", Feature::new(0xd, 1, Eax, 3)),
            ("SSSE3", Feature::new(1, 0, Ecx, 9)),
            ("HYPERVISOR", Feature::new(1, 0, Ecx, 31)),
            ("PBE", Feature::new(1, 0, Edx, 31)),
            ("AVX-512VL", Feature::new(7, 0, Ebx, 31)),
            ("PKS", Feature::new(7, 0, Ecx, 31)),
            ("SSBD", Feature::new(7, 0, Edx, 31)),
            ("LAM", Feature::new(7, 1, Eax, 26)),
            ("AVX10", Feature::new(7, 1, Edx, 19)),
            ("MWAITX", Feature::new(0x8000_0001, 0, Ecx, 29)),
            ("LM", Feature::new(0x8000_0001, 0, Edx, 29)),
            ("INVARIANT-TSC", Feature::new(0x8000_0007, 0, Edx, 8)),
            ("IBPB-RET", Feature::new(0x8000_0008, 0, Ebx, 30)),
            ("SRSO-NO", Feature::new(0x8000_0021, 0, Eax, 29)),
        ] {
            assert_eq!(Feature::named(name), Some(feature));
        }
        assert_eq!(Feature::new(7, 0, Ecx, 15).to_string(), "CPUID 7h.0 Ecx bit 15");
    }
}
