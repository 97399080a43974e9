//! What this PC has, for whoever decides what to run where.

use serde::{Deserialize, Serialize};
use sysinfo::{Disks, Networks, System};

/// What a PC has. Sizes are in bytes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Inventory {
    /// The layout of this value.
    pub version: u32,
    /// Its host name.
    pub host: Option<String>,
    /// Its operating system.
    pub system: Option<String>,
    /// Its kernel.
    pub kernel: Option<String>,
    /// Its processors.
    pub cpu: Cpu,
    /// Its memory.
    pub memory: Memory,
    /// Its mounted file systems.
    pub disks: Vec<Disk>,
    /// Its network interfaces.
    pub networks: Vec<Network>,
    /// Its GPUs, as far as a vendor's library tells.
    pub gpus: Vec<Gpu>,
    /// Why there is nothing to say of GPUs, if so.
    pub gpu_note: Option<String>,
    /// Whether guests can run here: `/dev/kvm` is there and may be opened.
    pub kvm: bool,
}

/// Processors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cpu {
    /// The model's name.
    pub model: String,
    /// Hardware threads.
    pub threads: usize,
    /// Cores, if known.
    pub cores: Option<usize>,
    /// Load average over one minute.
    pub load: f64,
    /// What vCPUs the agent lends, if it lends some and is the one that answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lent: Option<crate::cpu::Lent>,
}

/// Memory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Memory {
    /// All of it.
    pub total: u64,
    /// What programs could have now.
    pub available: u64,
    /// What of it the agent lends, if it lends some and is the one that answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lent: Option<Lent>,
}

/// Memory that is lent to guests on other PCs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lent {
    /// So much may be leased.
    pub size: u64,
    /// So much is.
    pub leased: u64,
    /// So much is stored.
    pub used: u64,
}

/// A mounted file system.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Disk {
    /// The device.
    pub device: String,
    /// Where it is mounted.
    pub mounted: String,
    /// The file system.
    pub kind: String,
    /// Its size.
    pub total: u64,
    /// What is free.
    pub available: u64,
}

/// A network interface.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Network {
    /// Its name.
    pub name: String,
    /// Its MAC address.
    pub mac: String,
    /// Its addresses, with their prefix lengths.
    pub addresses: Vec<String>,
    /// Its speed in Mbit/s, if the kernel knows.
    pub mbit: Option<u32>,
}

/// A GPU.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Gpu {
    /// The model's name.
    pub model: String,
    /// Names this very one.
    pub uuid: String,
    /// Its PCI address.
    pub pci: String,
    /// Its memory.
    pub memory: u64,
    /// What of its memory is free.
    pub memory_free: u64,
}

/// Takes stock.
#[must_use]
pub fn take() -> Inventory {
    let mut system = System::new().ok();
    if let Some(system) = &mut system {
        system.refresh_memory();
        system.refresh_cpu_list(sysinfo::CpuRefreshKind::nothing());
    }
    let cpus = system.as_ref().map(System::cpus).unwrap_or_default();
    let (gpus, gpu_note) = match gpus() {
        Ok(gpus) => (gpus, None),
        Err(e) => (Vec::new(), Some(e.to_string())),
    };
    Inventory {
        version: 1,
        host: System::host_name().ok(),
        system: System::long_os_version().ok(),
        kernel: System::kernel_version().ok(),
        cpu: Cpu {
            model: cpus.first().map(|c| c.brand().trim().to_owned()).unwrap_or_default(),
            threads: cpus.len(),
            cores: System::physical_core_count().ok(),
            load: System::load_average().map_or(0.0, |load| load.one),
            lent: None,
        },
        memory: Memory {
            total: system.as_ref().map_or(0, System::total_memory),
            available: system.as_ref().map_or(0, System::available_memory),
            lent: None,
        },
        disks: disks(),
        networks: networks(),
        gpus,
        gpu_note,
        kvm: std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok(),
    }
}

fn disks() -> Vec<Disk> {
    let Ok(disks) = Disks::new_with_refreshed_list() else { return Vec::new() };
    let disk = |d: &sysinfo::Disk| Disk {
        device: d.name().to_string_lossy().into_owned(),
        mounted: d.mount_point().to_string_lossy().into_owned(),
        kind: d.file_system().to_string_lossy().into_owned(),
        total: d.total_space(),
        available: d.available_space(),
    };
    disks.iter().map(disk).collect()
}

fn networks() -> Vec<Network> {
    let Ok(networks) = Networks::new_with_refreshed_list() else { return Vec::new() };
    let speed = |name: &str| std::fs::read_to_string(format!("/sys/class/net/{name}/speed")).ok();
    let mut list: Vec<Network> = networks
        .iter()
        .map(|(name, data)| Network {
            name: name.to_string_lossy().into_owned(),
            mac: data.mac_address().to_string(),
            addresses: data.ip_networks().iter().map(ToString::to_string).collect(),
            mbit: speed(&name.to_string_lossy()).and_then(|text| text.trim().parse().ok()),
        })
        .collect();
    list.sort_by(|a, b| a.name.cmp(&b.name));
    list
}

/// Asks NVIDIA's library, which is loaded only now and need not be there.
fn gpus() -> Result<Vec<Gpu>, nvml_wrapper::error::NvmlError> {
    let nvml = nvml_wrapper::Nvml::init()?;
    (0..nvml.device_count()?)
        .map(|index| {
            let device = nvml.device_by_index(index)?;
            let memory = device.memory_info()?;
            Ok(Gpu {
                model: device.name()?,
                uuid: device.uuid()?,
                pci: device.pci_info()?.bus_id,
                memory: memory.total,
                memory_free: memory.free,
            })
        })
        .collect()
}

impl Inventory {
    /// For people: one line for each part.
    #[must_use]
    pub fn describe(&self) -> String {
        let unknown = || "unknown".to_owned();
        let gib = |bytes: u64| format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30));
        let mut lines = vec![
            format!("host      {}", self.host.clone().unwrap_or_else(unknown)),
            format!("system    {}", self.system.clone().unwrap_or_else(unknown)),
            format!("kernel    {}", self.kernel.clone().unwrap_or_else(unknown)),
            format!("cpu       {} threads, {}, load {:.2}", self.cpu.threads, self.cpu.model, self.cpu.load),
            format!("memory    {}, {} available", gib(self.memory.total), gib(self.memory.available)),
            format!("kvm       {}", if self.kvm { "yes" } else { "no" }),
        ];
        if let Some(lent) = &self.memory.lent {
            let [size, leased, used] = [lent.size, lent.leased, lent.used].map(gib);
            lines.push(format!("lent      {size} of memory, {leased} leased, {used} stored"));
        }
        if let Some(lent) = &self.cpu.lent {
            let used: u32 = lent.leases.iter().map(|lease| u32::from(lease.vcpus)).sum();
            lines.push(format!("lent      {} vCPUs, {used} in use", lent.count));
            for lease in &lent.leases {
                let node = lease.node.as_deref().unwrap_or("an unproven peer");
                lines.push(format!("lent      {} vCPUs to guest {} of {node}", lease.vcpus, lease.guest));
            }
        }
        for d in &self.disks {
            let (total, free) = (gib(d.total), gib(d.available));
            lines.push(format!("disk      {} on {} ({}), {total}, {free} free", d.device, d.mounted, d.kind));
        }
        for n in &self.networks {
            let speed = n.mbit.map(|m| format!(", {m} Mbit/s")).unwrap_or_default();
            lines.push(format!("network   {} {}{speed}", n.name, n.addresses.join(" ")));
        }
        for g in &self.gpus {
            lines.push(format!(
                "gpu       {} at {}, {}, {} free",
                g.model,
                g.pci,
                gib(g.memory),
                gib(g.memory_free)
            ));
        }
        if let Some(note) = &self.gpu_note {
            lines.push(format!("gpu       none known: {note}"));
        }
        lines.join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_inventory_of_this_pc_agrees_with_the_kernel() {
        let inventory = take();
        let meminfo = std::fs::read_to_string("/proc/meminfo").expect("readable");
        let total: u64 = meminfo.split_whitespace().nth(1).expect("MemTotal").parse().expect("a number");
        assert_eq!(inventory.memory.total, total * 1024);
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").expect("readable");
        assert_eq!(inventory.cpu.threads, cpuinfo.matches("processor\t").count());
        let json = serde_json::to_string(&inventory).expect("JSON");
        assert_eq!(serde_json::from_str::<Inventory>(&json).expect("JSON"), inventory);
    }
}
