use super::*;

const SETUP_SECTORS: u8 = 3;
const PAYLOAD_OFFSET: u32 = 100;

/// What a kernel looks like to us: an ELF file of several LZ4 blocks, neither all alike nor random.
fn kernel() -> Vec<u8> {
    let mut bytes = b"\x7fELF".to_vec();
    bytes.extend((0..9_u32 << 18).flat_map(|i| ((i / 7).wrapping_mul(0x9e37) >> 5).to_le_bytes()));
    bytes
}

/// A bzImage as far as unpacking looks at it: setup sectors, some code, the payload, its unpacked size.
fn bz_image(payload: &[u8]) -> (File, setup_header) {
    let mut file = tempfile::tempfile().expect("a file");
    let before = (usize::from(SETUP_SECTORS) + 1) * 512 + PAYLOAD_OFFSET as usize;
    file.write_all(&vec![0; before]).expect("it writes");
    file.write_all(payload).expect("it writes");
    let header = setup_header {
        setup_sects: SETUP_SECTORS,
        payload_offset: PAYLOAD_OFFSET,
        payload_length: payload.len() as u32,
        ..Default::default()
    };
    (file, header)
}

fn unpacked(payload: &[u8]) -> io::Result<Option<Vec<u8>>> {
    let (file, header) = bz_image(payload);
    let Some(mut elf) = unpack(&file, &header, tempfile::tempfile()?)? else { return Ok(None) };
    let mut bytes = Vec::new();
    elf.rewind()?;
    elf.read_to_end(&mut bytes)?;
    Ok(Some(bytes))
}

fn with_size(mut packed: Vec<u8>, size: usize) -> Vec<u8> {
    packed.extend((size as u32).to_le_bytes());
    packed
}

fn gzip(kernel: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(kernel).expect("it packs");
    encoder.finish().expect("it packs")
}

/// As Linux packs: the x86 filter before LZMA2, and a CRC32.
fn xz(kernel: &[u8]) -> Vec<u8> {
    let mut options = liblzma::stream::LzmaOptions::new_preset(0).expect("a preset");
    options.dict_size(32 << 20);
    let mut filters = liblzma::stream::Filters::new();
    filters.x86().lzma2(&options);
    let stream = liblzma::stream::Stream::new_stream_encoder(&filters, liblzma::stream::Check::Crc32);
    let mut encoder = liblzma::write::XzEncoder::new_stream(Vec::new(), stream.expect("an encoder"));
    encoder.write_all(kernel).expect("it packs");
    encoder.finish().expect("it packs")
}

fn lzma(kernel: &[u8]) -> Vec<u8> {
    let options = liblzma::stream::LzmaOptions::new_preset(0).expect("a preset");
    let stream = liblzma::stream::Stream::new_lzma_encoder(&options).expect("an encoder");
    let mut encoder = liblzma::write::XzEncoder::new_stream(Vec::new(), stream);
    encoder.write_all(kernel).expect("it packs");
    encoder.finish().expect("it packs")
}

fn lz4(kernel: &[u8]) -> Vec<u8> {
    let mut packed = vec![0x02, 0x21, 0x4c, 0x18];
    for block in kernel.chunks(LZ4_BLOCK) {
        let block = lz4_flex::block::compress(block);
        packed.extend((block.len() as u32).to_le_bytes());
        packed.extend(block);
    }
    packed
}

fn zstd(kernel: &[u8]) -> Vec<u8> {
    ruzstd::encoding::compress_to_vec(kernel, ruzstd::encoding::CompressionLevel::Fastest)
}

#[test]
fn a_kernel_comes_out_as_it_went_in_however_it_is_packed() {
    let kernel = kernel();
    for (name, packed) in [
        ("gzip", gzip(&kernel)),
        ("xz", with_size(xz(&kernel), kernel.len())),
        ("lzma", with_size(lzma(&kernel), kernel.len())),
        ("lz4", with_size(lz4(&kernel), kernel.len())),
        ("zstd", with_size(zstd(&kernel), kernel.len())),
        ("none", kernel.clone()),
    ] {
        let out = unpacked(&packed).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(out.is_some_and(|out| out.starts_with(&kernel)), "{name}");
    }
}

#[test]
fn lz4_blocks_may_fill_the_kernel_exactly() {
    let kernel = &kernel()[..LZ4_BLOCK];
    let out = unpacked(&with_size(lz4(kernel), kernel.len())).expect("it unpacks");
    assert!(out.is_some_and(|out| out == kernel));
}

#[test]
fn an_unknown_packing_is_left_to_the_guest() {
    assert!(unpacked(b"BZh91AY&SY and so on").expect("no failure").is_none());
}

#[test]
fn damaged_payloads_are_refused() {
    let kernel = &kernel()[..100_000];
    for (name, packed) in
        [("gzip", gzip(kernel)), ("xz", xz(kernel)), ("lz4", lz4(kernel)), ("zstd", zstd(kernel))]
    {
        assert!(unpacked(&packed[..packed.len() / 2]).is_err(), "{name} cut in half");
    }
    // One byte each, all over the header and here and there in the data: an error or an ELF file, no panic.
    for (number, packed) in [gzip(kernel), xz(kernel), lz4(kernel), zstd(kernel)].iter().enumerate() {
        for at in (0..40).chain((40..packed.len()).step_by(packed.len() / 20 + 1)) {
            let mut damaged = packed.clone();
            damaged[at] ^= 0x55;
            let _ = unpacked(&damaged).map_err(|error| assert!(!error.to_string().is_empty(), "{number}"));
        }
    }
    assert!(unpacked(&gzip(b"no kernel")).is_err(), "what is packed must be an ELF file");
    assert!(unpacked(b"\x02\x21\x4c\x18\xff\xff\xff\xff").is_err(), "a block of 4 GiB");
}
