//! The control queue (section 5.1.6.5): how many pairs of queues the driver uses.

use super::feature;
use crate::GuestMemory;
use crate::virtio::Chain;

const CLASS_MQ: u8 = 4;
const MQ_PAIRS_SET: u8 = 0;
const OK: u8 = 0;
const ERROR: u8 = 1;

/// The number of the control queue, if the driver has one. It follows the receive and transmit queues
/// that exist for this driver.
pub(super) fn queue(features: u64, pairs: u16) -> Option<u16> {
    match features {
        f if f & feature::CTRL_VQ == 0 => None,
        f if f & feature::MQ == 0 => Some(2),
        _ => Some(2 * pairs),
    }
}

/// How many pairs the command in `chain` asks for, of `most`; `None` for anything else.
pub(super) fn pairs_wanted(chain: &mut Chain, memory: &GuestMemory, features: u64, most: u16) -> Option<u16> {
    let mut command = [0; 4];
    if features & feature::MQ == 0 || !chain.take_readable(memory, &mut command) {
        return None;
    }
    let [class, number, low, high] = command;
    let pairs = u16::from_le_bytes([low, high]);
    ((class, number) == (CLASS_MQ, MQ_PAIRS_SET) && (1..=most).contains(&pairs)).then_some(pairs)
}

/// Writes the answer; returns the used length.
pub(super) fn acknowledge(chain: &Chain, memory: &GuestMemory, ok: bool) -> u32 {
    chain.write(memory, &[if ok { OK } else { ERROR }]).unwrap_or(0)
}
