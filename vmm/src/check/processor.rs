//! The processor, and KVM on it.

use std::fs::OpenOptions;
use std::io;

use super::{Line, sys};
use crate::kvm::{self, Fitness};

/// Whose virtualization the processor has.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Virtualization {
    Intel,
    Amd,
    None,
}

pub(super) fn lines() -> Vec<Line> {
    let text = sys::read("/proc/cpuinfo").unwrap_or_default();
    let kind = virtualization(&text);
    let mut lines = vec![processor(&text, kind), device(kind), fitness()];
    lines.extend(capabilities());
    lines.push(nested_paging(kind));
    let parameter = match kind {
        Virtualization::Intel => sys::read("/sys/module/kvm_intel/parameters/eptad"),
        Virtualization::Amd => sys::read("/sys/module/kvm_amd/parameters/npt"),
        Virtualization::None => None,
    };
    lines.extend(page_tables(kind, parameter.as_deref()));
    lines
}

fn field<'a>(cpuinfo: &'a str, name: &str) -> Option<&'a str> {
    let line = cpuinfo.lines().find(|line| line.split(':').next().is_some_and(|key| key.trim() == name))?;
    line.split_once(':').map(|(_, value)| value.trim())
}

fn virtualization(cpuinfo: &str) -> Virtualization {
    let flags = field(cpuinfo, "flags").unwrap_or_default();
    let mut found = flags.split_whitespace().filter_map(|flag| match flag {
        "vmx" => Some(Virtualization::Intel),
        "svm" => Some(Virtualization::Amd),
        _ => None,
    });
    found.next().unwrap_or(Virtualization::None)
}

fn processor(cpuinfo: &str, kind: Virtualization) -> Line {
    let model = field(cpuinfo, "model name").unwrap_or("unknown processor");
    let count = cpuinfo.lines().filter(|line| line.starts_with("processor")).count();
    let name = "processor";
    match kind {
        Virtualization::Intel => Line::ok(name, format!("VT-x; {count} × {model}")),
        Virtualization::Amd => Line::ok(name, format!("SVM; {count} × {model}")),
        Virtualization::None => Line::missing(name, format!("neither VT-x nor SVM; {count} × {model}"))
            .why("guests run on the processor's virtualization")
            .mend(
                "switch on VT-x (Intel) or SVM (AMD) in the firmware's set-up; in a virtual machine, let its \
                 host pass it on (QEMU: -cpu host)",
            ),
    }
}

fn device(kind: Virtualization) -> Line {
    let name = "/dev/kvm";
    let line = match OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Ok(_) => Line::ok(name, "there, and this user may use it"),
        Err(why) if why.kind() == io::ErrorKind::NotFound => {
            let module = match kind {
                Virtualization::Intel => "sudo modprobe kvm_intel",
                Virtualization::Amd => "sudo modprobe kvm_amd",
                Virtualization::None => "sudo modprobe kvm_intel || sudo modprobe kvm_amd",
            };
            Line::missing(name, "there is no /dev/kvm").why("the module is not loaded").mend(module)
        }
        Err(why) if why.kind() == io::ErrorKind::PermissionDenied => {
            Line::missing(name, "this user may not use /dev/kvm")
                .why("it belongs to the group kvm")
                .mend("sudo usermod -aG kvm $USER, then log in again")
        }
        Err(why) => Line::missing(name, format!("/dev/kvm cannot be opened: {why}"))
            .why("the module failed or the processor's virtualization is taken")
            .mend("sudo dmesg | grep -i kvm"),
    };
    line.required()
}

fn fitness() -> Line {
    let name = "stock kernels";
    let line = match kvm::fitness() {
        Fitness::Fit => Line::ok(name, "KVM runs them"),
        Fitness::Unfit(why) => Line::missing(name, "this PC's KVM cannot run stock kernels")
            .why(why)
            .mend("`omega run --allow-unfit-kvm` starts all the same, for micro-guests only"),
        Fitness::Absent(why) => Line::missing(name, "there is no KVM that could run them").why(why),
    };
    line.required()
}

fn capabilities() -> Option<Line> {
    let name = "KVM features";
    Some(match kvm::missing_capabilities().ok()?.as_slice() {
        [] => Line::ok(name, "all that Omega needs").required(),
        missing => Line::missing(name, format!("KVM lacks {}", missing.join(", ")))
            .required()
            .why("the kernel is too old, or this is a KVM of another kind")
            .mend("install Linux 5.10 or newer"),
    })
}

fn nested_paging(kind: Virtualization) -> Line {
    let name = "nested paging";
    let (module, parameter) = match kind {
        Virtualization::Amd => ("kvm_amd", "npt"),
        Virtualization::Intel => ("kvm_intel", "ept"),
        Virtualization::None => {
            return Line::missing(name, "unknown")
                .why("it is a feature of VT-x and SVM, and there is neither");
        }
    };
    match sys::read(format!("/sys/module/{module}/parameters/{parameter}")).as_deref() {
        Some("Y" | "1") => Line::ok(name, format!("{parameter} is on")),
        Some(_) => Line::degraded(name, format!("{parameter} is off"))
            .why("guests are many times slower without it")
            .mend(format!("sudo modprobe -r {module} && sudo modprobe {module} {parameter}=1")),
        None => Line::missing(name, format!("unknown: the module {module} is not loaded"))
            .why("guests are many times slower without it")
            .mend(format!("sudo modprobe {module}")),
    }
}

/// Whether each walk of a guest's page tables counts as a write to them: then PCs that run vCPUs of one guest take them from
/// each other for it (`docs/coherence.md`). `parameter` is the module's that decides it, `eptad` of Intel's and `npt` of
/// AMD's; none where the module is not loaded, of which another line tells.
fn page_tables(kind: Virtualization, parameter: Option<&str>) -> Option<Line> {
    let name = "page tables";
    let on = matches!(parameter?, "Y" | "1");
    let (what, mend) = match (kind, on) {
        (Virtualization::Amd, true) => (
            "each page-table walk counts as a write, as always with AMD's nested paging",
            "the processor cannot be told otherwise; start such a guest with `maxcpus=1` on its kernel's command line and \
             switch its other vCPUs on once it is up",
        ),
        (Virtualization::Intel, true) => (
            "each page-table walk counts as a write (eptad is on)",
            "on each PC of such a guest, while no guest runs: echo options kvm_intel eptad=0 | sudo tee \
             /etc/modprobe.d/omega-eptad.conf && sudo modprobe -r kvm_intel && sudo modprobe kvm_intel",
        ),
        (Virtualization::Intel, false) => {
            return Some(Line::ok(name, "page-table walks are no writes (eptad is off)"));
        }
        // Without nested paging KVM walks them itself, and everything is slow: its own line says so.
        (Virtualization::Amd, false) | (Virtualization::None, _) => return None,
    };
    let why = "a guest with vCPUs on several PCs (`[[cpu.place]]`) works, but its page tables move between the PCs for \
               these walks, so programs that often miss the TLB are slower; other guests are not affected";
    Some(Line::degraded(name, what).why(why).mend(mend))
}

#[cfg(test)]
mod tests {
    use super::super::{Report, State};
    use super::*;

    #[test]
    fn a_user_is_told_where_page_table_walks_are_writes() {
        let state = |kind, parameter| page_tables(kind, parameter).map(|line| line.state);
        for on in ["Y", "1"] {
            assert_eq!(state(Virtualization::Amd, Some(on)), Some(State::Degraded));
            assert_eq!(state(Virtualization::Intel, Some(on)), Some(State::Degraded));
        }
        for off in ["N", "0"] {
            assert_eq!(state(Virtualization::Intel, Some(off)), Some(State::Ok));
            assert_eq!(state(Virtualization::Amd, Some(off)), None, "there is no nested paging");
        }
        for kind in [Virtualization::Intel, Virtualization::Amd, Virtualization::None] {
            assert_eq!(state(kind, None), None, "no module of this maker is loaded");
        }
    }

    #[test]
    fn page_table_walks_that_are_writes_keep_no_guest_from_running() {
        for kind in [Virtualization::Intel, Virtualization::Amd] {
            let line = page_tables(kind, Some("Y")).expect("a line");
            assert!(line.why.is_some() && line.mend.is_some(), "{line:?}");
            assert!(Report::of(vec![line]).guests_can_run);
        }
        let mend = |kind| page_tables(kind, Some("Y")).and_then(|line| line.mend).expect("a mend");
        assert!(mend(Virtualization::Intel).contains("eptad=0"));
        assert!(!mend(Virtualization::Amd).contains("modprobe"), "AMD's processors have no such parameter");
    }

    #[test]
    fn the_processor_is_read_from_its_flags() {
        let intel =
            "processor\t: 0\nmodel name\t: X\nflags\t\t: fpu vmx sse\n\nprocessor\t: 1\nflags\t\t: fpu\n";
        assert!(virtualization(intel) == Virtualization::Intel);
        assert_eq!(processor(intel, Virtualization::Intel).what, "VT-x; 2 × X");
        assert!(virtualization("flags\t: fpu svm_lock\nvmx flags: vnmi") == Virtualization::None);
        assert!(virtualization("flags : svm") == Virtualization::Amd);
    }
}
