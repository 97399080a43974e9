//! What was counted with memory on other PCs.

use std::collections::BTreeMap;
use std::time::Duration;

use transport::metrics::Distribution;

use super::paging::Paging;
use crate::control::{Counters, Peers};
use crate::memory::store::{Compression, HelperReport, Standing};

/// How long pages took to come.
pub(super) fn fetches(latency: &Distribution) -> [(String, u64); 4] {
    let nanoseconds = |at: Option<Duration>| at.map_or(0, |at| at.as_nanos() as u64);
    [
        ("fetch_count".to_owned(), latency.count),
        ("fetch_p50_ns".to_owned(), nanoseconds(latency.quantile(0.5))),
        ("fetch_p99_ns".to_owned(), nanoseconds(latency.quantile(0.99))),
        ("fetch_max_ns".to_owned(), nanoseconds(latency.max())),
    ]
}

impl Paging {
    /// What was counted, by group: `memory`, and `helper0` and so on.
    pub(super) fn counters(&self) -> Counters {
        let now = self.engine.counters();
        let mut memory = BTreeMap::from(fetches(&now.latency));
        if let Ok(serde_json::Value::Object(numbers)) = serde_json::to_value(&now) {
            memory.extend(numbers.into_iter().filter_map(|(name, number)| Some((name, number.as_u64()?))));
        }
        let report = self.health.report();
        memory.insert("degraded_pieces".to_owned(), report.degraded);
        let mut groups = Counters::from([("memory".to_owned(), memory)]);
        for (index, helper) in report.helpers.iter().enumerate() {
            groups.insert(format!("helper{index}"), helper_counters(helper));
        }
        groups
    }

    /// What was counted with each helper's agent, for each handler by itself: `helper0.0` and so on.
    pub(super) fn peers(&self) -> Peers {
        let helpers = self.health.report().helpers;
        let of = |(index, helper): (usize, HelperReport)| {
            let connections = helper.connections.into_iter().enumerate();
            connections.map(move |(handler, now)| (format!("helper{index}.{handler}"), now))
        };
        helpers.into_iter().enumerate().flat_map(of).collect()
    }
}

fn helper_counters(helper: &HelperReport) -> BTreeMap<String, u64> {
    let HelperReport { pages, fetched, stored, copied, lost, pieces, room, leaving, .. } = *helper;
    let Compression { connections, pages: packed, raw_bytes, packed_bytes, switches, link, per_mille } =
        helper.compression;
    let away = u64::from(matches!(helper.standing, Standing::Away { .. }));
    let left = u64::from(matches!(helper.standing, Standing::Left { .. }));
    let numbers = [
        ("pages", pages),
        ("fetched", fetched),
        ("stored", stored),
        ("copied", copied),
        ("lost", lost),
        ("pieces", pieces),
        ("room_pages", room),
        ("leaving_pieces", leaving),
        ("draining", u64::from(helper.draining)),
        ("away", away),
        ("left", left),
        ("packing", connections),
        ("packed_pages", packed),
        ("packed_from_bytes", raw_bytes),
        ("packed_to_bytes", packed_bytes),
        ("packing_switches", switches),
        ("link_bytes_per_second", link),
        ("packed_per_mille", per_mille),
    ];
    numbers.map(|(name, number)| (name.to_owned(), number)).into()
}
