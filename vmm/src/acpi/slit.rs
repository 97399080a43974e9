//! The SLIT (5.2.17): how far the NUMA nodes are from each other.

use acpi_tables::sdt::Sdt;

use super::{OEM, REVISION, TABLE};

const HEADER: u32 = 36;

/// `distances`: a row for each node, as long as there are nodes.
pub(super) fn slit(distances: &[Vec<u8>]) -> Sdt {
    let mut slit = Sdt::new(*b"SLIT", HEADER, 1, OEM, TABLE, REVISION);
    slit.append_slice(&(distances.len() as u64).to_le_bytes());
    distances.iter().for_each(|row| slit.append_slice(row));
    slit
}
