//! The guest's disks.

use std::sync::Arc;

use devices::disk::Disk;
use devices::disk::file::{Direct, FileDisk, Options as FileOptions};
use devices::virtio::blk::{Blk, Options as BlkOptions};
use devices::virtio::pci::VirtioPci;

use super::Error;
use super::assembly::{Assembly, broken};
use super::parts::Device;
use crate::config::{self, Guest};

/// More request queues than this help no disk.
const MAX_QUEUES: u16 = 4;

/// Opens every disk of `guest` and puts it on the PCI bus.
pub(super) fn add(assembly: &mut Assembly, guest: &Guest) -> Result<(), Error> {
    for (index, config) in guest.disk.iter().enumerate() {
        let disk = open(config).map_err(|why| Error::Disk { index, why })?;
        let queues = config.queues.unwrap_or(MAX_QUEUES.min(guest.cpu.count.into()));
        let serial = config.serial.clone().unwrap_or_default();
        let name = format!("disk{index}");
        let about = disk.describe();
        let blk = Blk::new(disk, &BlkOptions { serial, queues });
        let function = VirtioPci::new(
            Box::new(blk),
            Arc::clone(&assembly.memory),
            &assembly.interrupts,
            Arc::clone(&assembly.doorbells) as _,
        )
        .map_err(|why| broken(&name, &why))?;
        let slot = assembly.slot();
        assembly.pci.add(slot, Arc::clone(&function) as _).map_err(|why| broken(&name, &why))?;
        let about = Box::new(move || about.clone());
        assembly.devices.push(Device { name, about, life: function, counters: None });
    }
    Ok(())
}

fn open(config: &config::Disk) -> Result<Box<dyn Disk>, String> {
    match (&config.path, &config.remote) {
        (Some(path), None) => {
            let options = FileOptions {
                path: path.clone(),
                read_only: config.read_only,
                direct: if config.direct { Direct::On } else { Direct::Auto },
            };
            let disk = FileDisk::open(&options).map_err(|error| error.to_string())?;
            Ok(Box::new(disk))
        }
        (None, Some(_)) => Err("remote disks are not built in yet".into()),
        _ => Err("give either `path` or `remote`".into()),
    }
}
