//! The machine's interrupt controllers and the vCPUs on them, as configured.

use std::sync::{Arc, Mutex};

use devices::interrupt::{ApicId, LocalApic, Nanos};
use devices::irq::InterruptController;

use super::Error;
use super::processor::Vcpu;
use super::spanning::Spanning;
use crate::config::InterruptControllers;
use crate::cpu::{ApicCpu, Clock, Fabric, Inbox, Place, Switch};
use crate::interrupt::Board;
use crate::kvm::{Controllers, Partition};

/// What the vCPUs of a machine are run on.
pub(super) type Vcpus = Vec<Mutex<Box<dyn Vcpu>>>;

/// Whose interrupt controllers the partition is to have.
pub(super) fn of_partition(configured: InterruptControllers) -> Controllers {
    match configured {
        InterruptControllers::Kernel => Controllers::Kernel,
        InterruptControllers::Userspace => Controllers::Userspace,
    }
}

/// The chipset, where it is Omega's own.
pub(super) fn board(configured: InterruptControllers) -> Result<Option<Arc<Board>>, Error> {
    match configured {
        InterruptControllers::Kernel => Ok(None),
        InterruptControllers::Userspace => {
            let clock = Arc::new(Clock::saying(Nanos(0)));
            Board::new(Arc::new(Switch::default()), clock)
                .map(|board| Some(Arc::new(board)))
                .map_err(Error::Thread)
        }
    }
}

/// What devices interrupt the guest by.
pub(super) fn for_devices(
    partition: &Partition,
    board: Option<&Arc<Board>>,
) -> Result<Arc<dyn InterruptController>, Error> {
    Ok(match board {
        Some(board) => Arc::clone(board) as _,
        None => Arc::new(partition.interrupts()?),
    })
}

/// The vCPUs, in the state of power-on.
pub(super) fn vcpus(
    partition: &Partition,
    count: u8,
    board: Option<&Arc<Board>>,
    spanning: Option<&Spanning>,
) -> Result<Vcpus, Error> {
    if let (Some(board), Some(spanning)) = (board, spanning) {
        spanning.connect(board);
    }
    let vcpu = |index| {
        let core = partition.vcpu(index)?;
        let vcpu: Box<dyn Vcpu> = match board {
            None => Box::new(core),
            Some(board) => {
                let (id, bootstrap) = (ApicId(index), index == 0);
                let inbox = Arc::new(Inbox::default());
                board.switch().put(LocalApic::new(id, bootstrap).view(), Place::Here(Arc::clone(&inbox)));
                let ours = || Arc::clone(board) as Arc<dyn Fabric>;
                let fabric = spanning.map_or_else(ours, |spanning| spanning.fabric(board));
                let cpu = ApicCpu::new(core, id, bootstrap, inbox, fabric, Arc::clone(board.clock()));
                match spanning {
                    None => Box::new(cpu),
                    Some(spanning) => spanning.vcpu(index, board, Box::new(cpu)),
                }
            }
        };
        Ok(Mutex::new(vcpu))
    };
    (0..count).map(vcpu).collect()
}
