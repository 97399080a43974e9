//! Gives the memory of start-up code back.
//!
//! Most of what starting a guest runs (reading the configuration, proving who this PC is, building devices)
//! never runs again, but the kernel keeps code that is mapped and was executed in memory as long as it can.
//! Unmapped, it is ordinary page cache: what the guest's life needs is mapped again by its next use, and the
//! rest may go when memory is short.
#![allow(unsafe_code)] // Walks the loaded objects and advises the kernel about their code.

use std::ffi::{c_int, c_void};

use libc::{dl_phdr_info, size_t};

/// Lets go of this process's mapped code and constants. They come back from the page cache when they are used.
pub(super) fn give_back() {
    // SAFETY: `object` has the signature that is asked for, keeps no pointer, and does not unwind.
    unsafe { libc::dl_iterate_phdr(Some(object), std::ptr::null_mut()) };
}

/// Lets go of one loaded object's segments that are never written.
unsafe extern "C" fn object(info: *mut dl_phdr_info, _size: size_t, _data: *mut c_void) -> c_int {
    // SAFETY: the loader hands a valid description over for the time of this call.
    let info = unsafe { &*info };
    if info.dlpi_phdr.is_null() {
        return 0;
    }
    // SAFETY: the loader says that so many headers are there.
    let headers = unsafe { std::slice::from_raw_parts(info.dlpi_phdr, info.dlpi_phnum.into()) };
    // What is written at start, by relocations too, lies in writable segments: it would be lost.
    let kept = |flags: u32| flags & libc::PF_W == 0;
    for header in headers.iter().filter(|header| header.p_type == libc::PT_LOAD && kept(header.p_flags)) {
        let page = 4096;
        let start = info.dlpi_addr.wrapping_add(header.p_vaddr);
        let (first, end) = (start & !(page - 1), start.wrapping_add(header.p_memsz));
        let len = end.saturating_sub(first) as usize;
        // SAFETY: a mapping of a file that this process only reads: dropping its pages changes no byte of it.
        // Should the kernel refuse (the vDSO is no file), they just stay.
        unsafe {
            libc::madvise(std::ptr::with_exposed_provenance_mut(first as usize), len, libc::MADV_DONTNEED)
        };
    }
    0
}

#[cfg(test)]
mod tests {
    /// Constants in pages of their own, so that they are surely in a segment that is dropped.
    static TEXT: [u8; 3 * 4096] = [0xa5; 3 * 4096];

    #[test]
    fn code_and_constants_are_there_as_before_afterwards() {
        let before: u64 = std::hint::black_box(&TEXT).iter().map(|byte| u64::from(*byte)).sum();
        super::give_back();
        let after: u64 = std::hint::black_box(&TEXT).iter().map(|byte| u64::from(*byte)).sum();
        assert_eq!(after, before);
    }
}
