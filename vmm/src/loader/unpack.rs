//! Unpacking the payload of a bzImage (Linux' `Documentation/arch/x86/boot.rst`, `payload_offset`).

use std::fs::File;
use std::io::{self, BufWriter, Read, Seek, SeekFrom, Write};

use linux_loader::loader::bootparam::setup_header;

/// No kernel is as large; a payload that unpacks to more is damaged or hostile.
const MAX_SIZE: u64 = 1 << 30;
/// How much memory an xz or LZMA payload may ask for; kernels take 32 or 128 MiB dictionaries.
const MAX_DICTIONARY: u64 = 256 << 20;
/// LZ4's legacy frame: blocks of at most so much.
const LZ4_BLOCK: usize = 8 << 20;

/// How a payload is packed, by its first bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Packing {
    Gzip,
    Xz,
    Lzma,
    Lz4,
    Zstd,
    None,
}

impl Packing {
    fn of(magic: [u8; 6]) -> Option<Self> {
        match magic {
            [0x1f, 0x8b, ..] => Some(Self::Gzip),
            [0xfd, b'7', b'z', b'X', b'Z', 0] => Some(Self::Xz),
            [0x5d, 0, 0, ..] => Some(Self::Lzma),
            [0x02, 0x21, 0x4c, 0x18, ..] => Some(Self::Lz4),
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Some(Self::Zstd),
            [0x7f, b'E', b'L', b'F', ..] => Some(Self::None),
            _ => None,
        }
    }
}

/// Unpacks the kernel of the bzImage `file` into `to`; `None` if it is packed in a way that we do not know.
pub(super) fn unpack(mut file: &File, header: &setup_header, to: File) -> io::Result<Option<File>> {
    let setup = match header.setup_sects {
        0 => 4,
        sectors => u64::from(sectors),
    };
    let offset = (setup + 1) * 512 + u64::from(header.payload_offset);
    let mut magic = [0; 6];
    file.seek(SeekFrom::Start(offset))?;
    file.read_exact(&mut magic)?;
    let Some(packing) = Packing::of(magic) else { return Ok(None) };
    file.seek(SeekFrom::Start(offset))?;
    let payload = file.take(header.payload_length.into());
    let mut to = BufWriter::with_capacity(256 << 10, to);
    match packing {
        Packing::Gzip => drain(flate2::read::GzDecoder::new(payload), &mut to)?,
        // The stream is followed by its unpacked size in four bytes, which the decoder does not look at.
        Packing::Xz => {
            let stream = liblzma::stream::Stream::new_stream_decoder(MAX_DICTIONARY, 0)?;
            drain(liblzma::read::XzDecoder::new_stream(payload, stream), &mut to)?;
        }
        Packing::Lzma => {
            let stream = liblzma::stream::Stream::new_lzma_decoder(MAX_DICTIONARY)?;
            drain(liblzma::read::XzDecoder::new_stream(payload, stream), &mut to)?;
        }
        Packing::Lz4 => lz4_legacy(payload, &mut to)?,
        Packing::Zstd => {
            let decoder = ruzstd::decoding::StreamingDecoder::new(payload).map_err(io::Error::other)?;
            drain(decoder, &mut to)?;
        }
        Packing::None => drain(payload, &mut to)?,
    }
    let mut elf = to.into_inner().map_err(io::IntoInnerError::into_error)?;
    let mut magic = [0; 4];
    elf.rewind()?;
    elf.read_exact(&mut magic)?;
    if magic != *b"\x7fELF" {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "its payload is no ELF file"));
    }
    Ok(Some(elf))
}

fn drain(from: impl Read, to: &mut impl Write) -> io::Result<()> {
    let mut from = from.take(MAX_SIZE);
    io::copy(&mut from, to)?;
    if from.limit() == 0 {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "its payload unpacks to over 1 GiB"));
    }
    Ok(())
}

/// LZ4's legacy frame format: a magic number, then blocks of 8 MiB, each behind its packed length. The last
/// one is shorter and followed by the kernel's unpacked size, which ends the payload.
fn lz4_legacy(mut from: impl Read, to: &mut impl Write) -> io::Result<()> {
    let invalid = |why: String| io::Error::new(io::ErrorKind::InvalidData, why);
    let mut word = [0; 4];
    from.read_exact(&mut word)?;
    let mut packed = Vec::new();
    let mut block = vec![0; LZ4_BLOCK];
    let mut total = 0;
    loop {
        from.read_exact(&mut word)?;
        let len = u32::from_le_bytes(word) as usize;
        if len as u64 == total && len != 0 {
            return Ok(());
        }
        if len > lz4_flex::block::get_maximum_output_size(LZ4_BLOCK) || total > MAX_SIZE {
            return Err(invalid(format!("a block of its payload has {len} bytes")));
        }
        packed.resize(len, 0);
        from.read_exact(&mut packed)?;
        let count = lz4_flex::block::decompress_into(&packed, &mut block)
            .map_err(|error| invalid(error.to_string()))?;
        to.write_all(&block[..count])?;
        total += count as u64;
        if count < LZ4_BLOCK {
            return Ok(());
        }
    }
}

#[cfg(test)]
#[path = "unpack_test.rs"]
mod tests;
