//! What hardware there is for guests.

use std::fs::OpenOptions;
use std::io;
use std::path::Path;

use super::{Line, sys};

/// NVIDIA's number in PCI's list of vendors.
const NVIDIA: &str = "0x10de";
/// Where NVIDIA's management library is looked for.
const NVML: [&str; 5] = [
    "/usr/lib/x86_64-linux-gnu/libnvidia-ml.so.1",
    "/usr/lib/x86_64-linux-gnu/nvidia/current/libnvidia-ml.so.1",
    "/usr/lib64/libnvidia-ml.so.1",
    "/usr/lib/libnvidia-ml.so.1",
    "/usr/lib/wsl/lib/libnvidia-ml.so.1",
];

pub(super) fn tap() -> Line {
    let name = "network (TAP)";
    match OpenOptions::new().read(true).write(true).open("/dev/net/tun") {
        Ok(_) => Line::ok(name, "there, and this user may use interfaces that belong to it"),
        Err(why) if why.kind() == io::ErrorKind::PermissionDenied => {
            Line::missing(name, "this user may not use /dev/net/tun")
                .why("guests' network cards are TAP interfaces")
                .mend("sudo chmod 666 /dev/net/tun; sudo ip tuntap add tap0 mode tap multi_queue user $USER")
        }
        Err(why) => Line::missing(name, format!("/dev/net/tun cannot be opened: {why}"))
            .why("guests' network cards are TAP interfaces")
            .mend("sudo modprobe tun"),
    }
}

pub(super) fn rdma() -> Line {
    let name = "RDMA";
    let folder = Path::new("/sys/class/infiniband");
    let devices: Vec<String> = sys::names(folder)
        .into_iter()
        .map(|device| {
            let ports = folder.join(&device).join("ports");
            let active = sys::names(&ports).iter().any(|port| {
                sys::read(ports.join(port).join("state")).is_some_and(|state| state.contains("ACTIVE"))
            });
            format!("{device} ({})", if active { "active" } else { "no link" })
        })
        .collect();
    if !transport::channel::RDMA_BUILT {
        return Line::missing(name, "this build has none")
            .why("connections to agents run over TCP; RDMA is faster")
            .mend(
                "install libibverbs-dev, librdmacm-dev and libclang-dev (packaging/setup), then make build",
            );
    }
    if devices.is_empty() {
        return Line::missing(name, "no device")
            .why("connections to agents run over TCP; RDMA is faster")
            .mend("install an RDMA card; for tests: sudo modprobe rdma_rxe && sudo rdma link add rxe0 type rxe netdev eth0");
    }
    Line::ok(name, devices.join(", "))
}

pub(super) fn iommu() -> Line {
    let groups = sys::names("/sys/kernel/iommu_groups").len();
    if groups > 0 {
        return Line::ok("IOMMU", format!("{groups} groups"));
    }
    Line::missing("IOMMU", "no groups")
        .why("giving a guest a device of its own (not in this version) needs one")
        .mend("switch on VT-d or AMD-Vi in the firmware's set-up, and boot with intel_iommu=on on Intel")
}

pub(super) fn gpus() -> Line {
    let name = "GPUs";
    let folder = Path::new("/sys/bus/pci/devices");
    let mut found = Vec::new();
    let mut nvidia = false;
    for address in sys::names(folder) {
        let device = folder.join(&address);
        // Base class 03h: display controllers.
        if !sys::read(device.join("class")).is_some_and(|class| class.starts_with("0x03")) {
            continue;
        }
        let vendor = sys::read(device.join("vendor")).unwrap_or_default();
        let model = sys::read(device.join("device")).unwrap_or_default();
        nvidia |= vendor == NVIDIA;
        let driver = std::fs::read_link(device.join("driver")).ok();
        let driver = driver.as_ref().and_then(|driver| driver.file_name()?.to_str()).unwrap_or("no driver");
        let (vendor, model) = (vendor.trim_start_matches("0x"), model.trim_start_matches("0x"));
        found.push(format!("{address} {vendor}:{model} ({driver})"));
    }
    let nvml = NVML.iter().any(|path| Path::new(path).exists());
    match (found.as_slice(), nvidia, nvml) {
        ([], _, _) => Line::missing(name, "no GPU").why("lending a GPU (not in this version) needs one"),
        (found, true, false) => Line::degraded(name, found.join(", "))
            .why("NVIDIA's management library, libnvidia-ml.so.1, is missing: the agent cannot tell their memory and load")
            .mend("install the distribution's package of NVIDIA's driver (Debian: sudo apt install nvidia-smi)"),
        (found, ..) => Line::ok(name, found.join(", ")),
    }
}
