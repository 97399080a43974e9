use vm_memory::{Bytes as _, GuestAddress};

use super::*;
use crate::memory::{Backing, Ram};
use crate::units::Bytes;

fn table(memory: &GuestMemory, at: u64) -> Vec<u8> {
    let len: u32 = memory.read_obj(GuestAddress(at + 4)).expect("RAM");
    let mut bytes = vec![0; len as usize];
    memory.read_slice(&mut bytes, GuestAddress(at)).expect("RAM");
    bytes
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

#[test]
fn every_table_is_found_from_the_rsdp_and_sums_to_zero() {
    let layout = Layout::new(Bytes(4 << 30), 40).expect("it fits");
    let ram = Ram::new(&layout, Backing::Private).expect("RAM");
    let node = |cpus: &[u8]| NumaNode { size: Bytes(2 << 30), cpus: cpus.to_vec() };
    let numa = [node(&[0, 1]), node(&[2, 3])];
    let rsdp =
        write(ram.memory(), &layout, 64, &numa, &[vec![10, 86], vec![86, 10]]).expect("the tables fit");
    assert_eq!(rsdp.0, TABLES.base);
    let mut bytes = [0; 36];
    ram.memory().read_slice(&mut bytes, rsdp).expect("RAM");
    assert_eq!(&bytes[..8], b"RSD PTR ");
    assert_eq!((sum(&bytes[..20]), sum(&bytes)), (0, 0));
    let xsdt = table(ram.memory(), u64::from_le_bytes(bytes[24..32].try_into().expect("8 bytes")));
    assert_eq!(sum(&xsdt), 0);
    let mut found = Vec::new();
    for entry in xsdt[36..].chunks_exact(8) {
        let table = table(ram.memory(), u64::from_le_bytes(entry.try_into().expect("8 bytes")));
        found.push(String::from_utf8_lossy(&table[..4]).into_owned());
        assert_eq!(sum(&table), 0, "{found:?}");
        if table.starts_with(b"APIC") {
            let local_apics = table[44..].chunks_exact(8).take_while(|entry| entry[..2] == [0, 8]).count();
            assert_eq!(local_apics, 64);
        }
        if table.starts_with(b"FACP") {
            // X_DSDT
            let dsdt = u64::from_le_bytes(table[140..148].try_into().expect("8 bytes"));
            let dsdt = self::table(ram.memory(), dsdt);
            assert!(dsdt.starts_with(b"DSDT") && sum(&dsdt) == 0);
        }
    }
    assert_eq!(found, ["FACP", "APIC", "MCFG", "SRAT", "SLIT"]);
}

#[test]
fn nodes_are_read_back_from_srat_and_slit_as_they_were_given() {
    let layout = Layout::new(Bytes(4 << 30), 40).expect("it fits");
    let node = |gib: u64, cpus: &[u8]| NumaNode { size: Bytes(gib << 30), cpus: cpus.to_vec() };
    let mut bytes = Vec::new();
    srat::srat(&layout, &[node(2, &[0, 1, 2]), node(2, &[3])]).to_aml_bytes(&mut bytes);
    let number = |at: usize, len: usize| {
        bytes[at..at + len].iter().rev().fold(0_u64, |value, byte| value << 8 | u64::from(*byte))
    };
    let (mut cpus, mut ranges, mut at) = (Vec::new(), Vec::new(), 48);
    while at < bytes.len() {
        match bytes[at] {
            // Processor: the domain's low byte, then the APIC ID.
            0 => cpus.push((bytes[at + 2], bytes[at + 3], number(at + 4, 4))),
            _ => ranges.push((number(at + 2, 4), number(at + 8, 8), number(at + 16, 8), number(at + 28, 4))),
        }
        at += usize::from(bytes[at + 1]);
    }
    assert_eq!(cpus, [(0, 0, 1), (0, 1, 1), (0, 2, 1), (1, 3, 1)]);
    // The second node lies on both sides of the hole below 4 GiB.
    assert_eq!(ranges, [(0, 0, 2 << 30, 1), (1, 2 << 30, 1 << 30, 1), (1, 4 << 30, 1 << 30, 1)]);
    let mut bytes = Vec::new();
    slit::slit(&[vec![10, 53], vec![53, 10]]).to_aml_bytes(&mut bytes);
    assert_eq!((&bytes[..4], &bytes[36..]), (&b"SLIT"[..], &[2, 0, 0, 0, 0, 0, 0, 0, 10, 53, 53, 10][..]));
}
