//! Buffers whose memory begins at an address that `O_DIRECT` takes.

use transport::buffer::Buffer;

/// Whether every segment begins and ends at a multiple of `align`, a power of two.
pub(super) fn is_aligned(buffer: &Buffer, align: usize) -> bool {
    buffer.iovecs().iter().all(|v| (v.iov_base as usize | v.iov_len) & (align - 1) == 0)
}

/// Zeroed memory of `len` bytes in one segment that begins at a multiple of `align`, a power of two.
pub(super) fn zeroed(len: usize, align: usize) -> Buffer {
    let whole = Buffer::zeroed(len + align);
    let start = whole.iovecs().first().map_or(0, |v| v.iov_base as usize);
    let skip = start.next_multiple_of(align) - start;
    whole.slice(skip, len).unwrap_or_default()
}

/// Copies all of `from` into `to`, which is as long.
pub(super) fn copy(from: &Buffer, to: &Buffer) {
    let mut chunk = [0; 4096];
    let mut at = 0;
    while at < from.len() {
        let got = from.read_at(at, &mut chunk);
        to.write_at(at, &chunk[..got]);
        at += got;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_begins_where_it_should_and_copies_whole() {
        let from = Buffer::from_vec((0..10_000u32).map(|i| i as u8).collect());
        let to = zeroed(10_000, 4096);
        assert!(is_aligned(&to.slice(0, 512).expect("inside"), 512));
        assert!(!is_aligned(&to.slice(1, 511).expect("inside"), 512));
        copy(&from, &to);
        assert_eq!(from.to_vec(), to.to_vec());
    }
}
