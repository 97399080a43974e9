//! Pages as they cross a slow link: each by itself, packed with LZ4, or as it is where that gains nothing. Drawn in
//! `docs/memory-protocol.md`.

use lz4_flex::block::{CompressTable, compress_into_with_table, decompress_into, get_maximum_output_size};
use transport::buffer::Buffer;

use super::protocol::{MAX_PAGES, PAGE};

/// Bytes of a page's length in front of the pages.
const LENGTH: usize = 2;
/// Room for the worst that LZ4 makes of a page.
const WORST: usize = get_maximum_output_size(PAGE);

/// What came is no packed pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("The packed pages make no sense: {0}")]
pub struct Unpackable(&'static str);

/// Packs and unpacks pages, with memory that is kept from one time to the next. Made at the first use: connections
/// that never pack pay nothing.
#[derive(Default)]
pub struct Packer(Option<Box<Scratch>>);

struct Scratch {
    table: CompressTable,
    /// Packed pages.
    bytes: Vec<u8>,
    page: [u8; PAGE],
}

impl Packer {
    fn scratch(&mut self) -> &mut Scratch {
        let table = CompressTable::small;
        self.0.get_or_insert_with(|| Box::new(Scratch { table: table(), bytes: Vec::new(), page: [0; PAGE] }))
    }

    /// The pages of `content` packed; `None` if that saves less than an eighth: then they are to go as they are.
    /// Of what is no whole pages, or more than a request carries, nothing is made.
    #[must_use]
    pub fn pack(&mut self, content: &Buffer) -> Option<Buffer> {
        let count = content.len() / PAGE;
        if count == 0 || count > MAX_PAGES as usize || !content.len().is_multiple_of(PAGE) {
            return None;
        }
        let Scratch { table, bytes, page } = self.scratch();
        bytes.clear();
        bytes.resize(count * LENGTH, 0);
        let most = content.len() / 8 * 7;
        for at in 0..count {
            let from = bytes.len();
            if from > most {
                return None;
            }
            content.read_at(at * PAGE, page);
            let len = pack_page(page, bytes, table);
            bytes[at * LENGTH..][..LENGTH].copy_from_slice(&(len as u16).to_le_bytes());
        }
        (bytes.len() <= most).then(|| Buffer::from_vec(bytes.as_slice().to_vec()))
    }

    /// Makes pages of the first `len` bytes of `packed`: exactly as many as `into` has room for. `into` may be the
    /// memory of `packed` itself.
    ///
    /// # Errors
    /// They are not so many packed pages; what `into` holds then is anything.
    pub fn unpack(&mut self, packed: &Buffer, len: usize, into: &Buffer) -> Result<(), Unpackable> {
        let count = into.len() / PAGE;
        if !into.len().is_multiple_of(PAGE) || count > MAX_PAGES as usize {
            return Err(Unpackable("they are no whole pages"));
        }
        // Never more than what the pages take as they are: the sender would have sent that.
        if len > packed.len() || len > into.len() || len < count * LENGTH {
            return Err(Unpackable("their length is none that they can have"));
        }
        let Scratch { bytes, page, .. } = self.scratch();
        bytes.clear();
        bytes.resize(len, 0);
        packed.read_at(0, bytes);
        unpack(bytes, count, page, |at, page| {
            into.write_at(at * PAGE, page);
        })
    }
}

/// Appends a page; returns how long it became, a page's length if it is there as it was.
fn pack_page(page: &[u8; PAGE], bytes: &mut Vec<u8>, table: &mut CompressTable) -> usize {
    let from = bytes.len();
    bytes.resize(from + WORST, 0);
    let packed = compress_into_with_table(page, &mut bytes[from..], table);
    let len = match packed {
        Ok(len) if len < PAGE => len,
        _ => {
            bytes[from..from + PAGE].copy_from_slice(page);
            PAGE
        }
    };
    bytes.truncate(from + len);
    len
}

/// Hands each of `count` pages in `bytes` to `take`, with its place.
fn unpack(
    bytes: &[u8],
    count: usize,
    page: &mut [u8; PAGE],
    mut take: impl FnMut(usize, &[u8; PAGE]),
) -> Result<(), Unpackable> {
    let (lengths, mut rest) =
        bytes.split_at_checked(count * LENGTH).ok_or(Unpackable("their lengths are cut off"))?;
    for (at, length) in lengths.chunks_exact(LENGTH).enumerate() {
        let length = usize::from(u16::from_le_bytes([length[0], length[1]]));
        let (block, more) = rest.split_at_checked(length).ok_or(Unpackable("a page is cut off"))?;
        rest = more;
        match length {
            PAGE => page.copy_from_slice(block),
            1..PAGE => match decompress_into(block, page) {
                Ok(PAGE) => {}
                Ok(_) => return Err(Unpackable("a page is too short")),
                Err(_) => return Err(Unpackable("a page is broken or too long")),
            },
            _ => return Err(Unpackable("a page's length is none that it can have")),
        }
        take(at, page);
    }
    if rest.is_empty() { Ok(()) } else { Err(Unpackable("something follows the last page")) }
}

/// Takes the first byte of `data` as a number of pages less one, and the rest as so many packed ones. Pages that come
/// out must be the same after being packed again.
#[doc(hidden)]
pub fn fuzz(data: &[u8]) {
    let Some((count, packed)) = data.split_first() else { return };
    let count = usize::from(*count) + 1;
    let into = Buffer::zeroed(count * PAGE);
    let mut packer = Packer::default();
    let whole = Buffer::from_vec(packed.to_vec());
    if packer.unpack(&whole, whole.len(), &into).is_err() {
        return;
    }
    let pages = into.to_vec();
    if let Some(again) = packer.pack(&into) {
        assert!(again.len() <= pages.len() / 8 * 7, "what is packed is smaller");
        into.fill(0xa5);
        packer.unpack(&again, again.len(), &into).expect("what was packed can be unpacked");
        assert!(into.to_vec() == pages, "pages come back as they were packed");
    }
}

#[cfg(test)]
#[path = "packed_test.rs"]
mod packed_test;
