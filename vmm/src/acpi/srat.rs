//! The SRAT (5.2.16): which vCPUs and which RAM belong together.

use acpi_tables::sdt::Sdt;

use super::{OEM, REVISION, TABLE};
use crate::config::NumaNode;
use crate::memory::Layout;

const HEADER: u32 = 36;
const PROCESSOR_AFFINITY: u8 = 0;
const MEMORY_AFFINITY: u8 = 1;
const ENABLED: u32 = 1;

pub(super) fn srat(layout: &Layout, nodes: &[NumaNode]) -> Sdt {
    let mut body = Vec::new();
    body.extend(1_u32.to_le_bytes()); // as the table's first revision said
    body.extend([0; 8]);
    let mut start = 0;
    for (domain, node) in (0_u32..).zip(nodes) {
        for cpu in &node.cpus {
            let low = domain.to_le_bytes();
            body.extend([PROCESSOR_AFFINITY, 16, low[0], *cpu]);
            body.extend(ENABLED.to_le_bytes());
            body.extend([0, low[1], low[2], low[3]]);
            body.extend([0; 4]); // clock domain
        }
        for range in layout.slice(start, node.size.0) {
            body.extend([MEMORY_AFFINITY, 40]);
            body.extend(domain.to_le_bytes());
            body.extend([0; 2]);
            body.extend(range.base.to_le_bytes());
            body.extend(range.len.to_le_bytes());
            body.extend([0; 4]);
            body.extend(ENABLED.to_le_bytes());
            body.extend([0; 8]);
        }
        start += node.size.0;
    }
    let mut srat = Sdt::new(*b"SRAT", HEADER, 3, OEM, TABLE, REVISION);
    srat.append_slice(&body);
    srat
}
