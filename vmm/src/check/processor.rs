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
    let eptad = sys::read("/sys/module/kvm_intel/parameters/eptad");
    lines.extend(page_tables(kind, eptad.as_deref()));
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

/// Whether a look into a guest's page tables counts as a write to them: then PCs that run vCPUs of one guest take them
/// from each other for nothing (`docs/coherence.md`). `eptad` is Intel's parameter.
fn page_tables(kind: Virtualization, eptad: Option<&str>) -> Option<Line> {
    let name = "page tables";
    match (kind, eptad) {
        (Virtualization::Amd, _) => Some(
            Line::degraded(name, "SVM's nested paging writes to a guest's page tables whenever it looks into them")
                .why(
                    "a guest with vCPUs on several PCs (`[[cpu.place]]`) moves them between PCs more often; others do \
                     not mind",
                )
                .mend("nothing to do here: begin such guests with `maxcpus=1` and switch the other vCPUs on later"),
        ),
        (Virtualization::Intel, Some("Y" | "1")) => Some(
            Line::degraded(name, "VT-x writes to a guest's page tables whenever it looks into them (eptad is on)")
                .why(
                    "a guest with vCPUs on several PCs (`[[cpu.place]]`) moves them between PCs more often; others do \
                     not mind",
                )
                .mend(
                    "on each of these PCs: echo options kvm_intel eptad=0 | sudo tee /etc/modprobe.d/omega.conf, then \
                     load the module anew",
                ),
        ),
        (Virtualization::Intel, Some(_)) => Some(Line::ok(name, "only read by looks into them (eptad is off)")),
        (Virtualization::Intel, None) | (Virtualization::None, _) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;

    #[test]
    fn only_processors_that_write_to_page_tables_by_reading_them_are_warned_of() {
        let state = |kind, eptad| page_tables(kind, eptad).map(|line| line.state);
        assert_eq!(state(Virtualization::Amd, None), Some(State::Degraded));
        assert_eq!(state(Virtualization::Intel, Some("Y")), Some(State::Degraded));
        assert_eq!(state(Virtualization::Intel, Some("N")), Some(State::Ok));
        assert_eq!(state(Virtualization::Intel, None), None, "its module is not loaded");
        assert_eq!(state(Virtualization::None, None), None);
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
