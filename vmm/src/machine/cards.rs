//! The guest's network cards.

use devices::virtio::net::{Net, Tap};

use super::Error;
use super::assembly::{Assembly, broken};
use super::parts::Counters;
use crate::config::{self, Guest, parse_mac};

/// Opens the interface of every card of `guest` and puts the card on the PCI bus.
pub(super) fn add(assembly: &mut Assembly, guest: &Guest) -> Result<(), Error> {
    for (index, config) in guest.net.iter().enumerate() {
        let name = format!("net{index}");
        let mac = address(config, &guest.name, index);
        let taps = Tap::open(&config.tap, config.queues.unwrap_or(1)).map_err(|why| broken(&name, &why))?;
        let net = Net::new(taps, mac);
        let counted = net.counters();
        let counters: Counters = Box::new(move || {
            let now = counted.snapshot();
            vec![
                ("received", now.received),
                ("received_bytes", now.received_bytes),
                ("sent", now.sent),
                ("sent_bytes", now.sent_bytes),
                ("dropped", now.dropped),
            ]
        });
        let about = format!("network card on {}", config.tap);
        assembly.add_virtio(&name, about, Box::new(net), Some(counters))?;
    }
    Ok(())
}

/// The configured address, or one that follows from the guest's name: locally administered, and the same
/// at each start.
fn address(config: &config::Net, guest: &str, index: usize) -> [u8; 6] {
    if let Some(mac) = config.mac.as_deref().and_then(|text| parse_mac(text).ok()) {
        return mac;
    }
    // FNV-1a, 64 bits.
    let bytes = guest.bytes().chain(index.to_le_bytes());
    let hash = bytes.fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    });
    let [a, b, c, d, e, ..] = hash.to_le_bytes();
    [0x02, a, b, c, d, e]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_card_keeps_its_address_and_no_two_share_one() {
        let config = |mac: Option<&str>| config::Net {
            tap: "tap0".into(),
            mac: mac.map(ToOwned::to_owned),
            queues: None,
        };
        assert_eq!(address(&config(Some("52:54:00:12:34:56")), "g", 0), [0x52, 0x54, 0, 0x12, 0x34, 0x56]);
        let own = address(&config(None), "desk", 0);
        assert_eq!(own, address(&config(None), "desk", 0));
        assert_eq!(own[0], 2, "locally administered, and not a group's");
        assert_ne!(own, address(&config(None), "desk", 1));
        assert_ne!(own, address(&config(None), "desl", 0));
    }
}
