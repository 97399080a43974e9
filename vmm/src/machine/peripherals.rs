//! The guest's small virtio devices: entropy, console, balloon.

use std::io;
use std::sync::Arc;

use devices::virtio::{balloon, console, rng};

use super::Error;
use super::assembly::Assembly;
use super::paging::Paging;
use super::parts::Counters;
use crate::config::Guest;
use crate::console::Hub;

/// Builds what `guest` asks for; returns what steers the balloon, where there is one.
pub(super) fn add(
    assembly: &mut Assembly,
    guest: &Guest,
    hub: Option<&Hub>,
    paging: Option<&Arc<Paging>>,
) -> Result<Option<balloon::Control>, Error> {
    if guest.rng.enabled {
        let about = "entropy from this PC's kernel".into();
        assembly.add_virtio("rng", about, Box::new(rng::Rng::new()), None)?;
    }
    if let (Some(_), Some(hub)) = (&guest.console, hub) {
        let (device, input) = console::Console::new(hub.writer());
        let window = input.clone();
        hub.connect_input(move |bytes| input.enqueue(bytes));
        hub.connect_resize(move |columns, rows| window.resize(columns, rows));
        assembly.add_virtio("console", "virtio console".into(), Box::new(device), None)?;
    }
    let Some(config) = &guest.balloon else { return Ok(None) };
    let free_page_reporting = config.free_page_reporting;
    let options = balloon::Options { size: config.size.0, free_page_reporting };
    let device = match paging.map(Arc::clone) {
        // Wherever the pages are, nobody keeps anything of them when the guest is told.
        Some(paging) => balloon::Balloon::with_release(options, move |_, address, len| {
            paging.engine.discard(address, len).map_err(io::Error::other)
        }),
        None => balloon::Balloon::new(options),
    };
    let control = device.control();
    let counted = device.control();
    let counters: Counters =
        Box::new(move || vec![("actual_bytes", counted.actual()), ("released_bytes", counted.released())]);
    assembly.add_virtio("balloon", "memory balloon".into(), Box::new(device), Some(counters))?;
    Ok(Some(control))
}
