//! The C library's allocator opens a file, once in a process: when a thread other than the main one gives memory
//! back to the kernel for the first time, `/proc/sys/vm/overcommit_memory` tells it how (glibc, `malloc/arena.c`).
//! A confined thread that frees much would end the process there, so a thread that is not yet confined does it
//! first.

use std::io;

/// Chunks below the size that gets a mapping of its own, and together far above what the allocator keeps.
const CHUNK: usize = 64 << 10;
const CHUNKS: usize = 128;

/// Has the allocator look now. Memory is reserved, not used: the chunks are never written.
///
/// # Errors
/// No thread can be started.
pub(super) fn look_at_overcommit() -> io::Result<()> {
    let free_much = || {
        let chunks: Vec<Vec<u8>> = (0..CHUNKS).map(|_| Vec::with_capacity(CHUNK)).collect();
        drop(std::hint::black_box(chunks));
    };
    std::thread::Builder::new()
        .name("allocator".to_owned())
        .spawn(free_much)?
        .join()
        .map_err(|_| io::Error::other("it panicked"))
}
