//! Leaves out the zeros of an unpacked kernel: a third of Debian's 46 MiB, which would be copied into memory that
//! is zero already. Each loadable segment (ELF-64, `PT_LOAD`) is cut into its runs of pages that hold something;
//! what lies between becomes memory without file content, as `.bss` is.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};

use linux_loader::elf::{Elf64_Ehdr, Elf64_Phdr, PT_LOAD};
use vm_memory::ByteValued;

/// Zeros are looked for in steps of this.
const PAGE: usize = 4096;
/// Shorter gaps are copied: a segment of its own costs more.
const GAP: u64 = 64 << 10;

/// Replaces the program headers of `elf` by ones without long runs of zeros. The bytes of the segments stay where
/// they are in the file; the new headers follow at its end. A file that is no sound ELF-64 stays as it is, for the
/// loader to refuse.
///
/// # Errors
/// The file cannot be read or written.
pub(super) fn leave_out_zeros(elf: &mut File) -> io::Result<()> {
    let length = elf.seek(SeekFrom::End(0))?;
    elf.rewind()?;
    let mut header = Elf64_Ehdr::default();
    if length < size_of::<Elf64_Ehdr>() as u64 {
        return Ok(());
    }
    elf.read_exact(header.as_mut_slice())?;
    let Some(old) = program_headers(elf, &header, length)? else { return Ok(()) };
    let mut new = Vec::new();
    for segment in old {
        if segment.p_type == PT_LOAD && segment.p_filesz > 0 {
            cut(elf, &segment, &mut new)?;
        } else {
            new.push(segment);
        }
    }
    let Ok(count) = u16::try_from(new.len()) else { return Ok(()) };
    header.e_phoff = length;
    header.e_phnum = count;
    elf.seek(SeekFrom::End(0))?;
    elf.write_all(&new.iter().flat_map(ByteValued::as_slice).copied().collect::<Vec<u8>>())?;
    elf.rewind()?;
    elf.write_all(header.as_slice())
}

/// Whether `elf` is an ELF-64 file that has all that its headers name. The headers that [`leave_out_zeros`] wrote
/// are the file's end: of such a file nothing can be missing.
///
/// # Errors
/// The file cannot be read.
pub(super) fn is_whole(elf: &mut File) -> io::Result<bool> {
    let length = elf.seek(SeekFrom::End(0))?;
    if length < size_of::<Elf64_Ehdr>() as u64 {
        return Ok(false);
    }
    elf.rewind()?;
    let mut header = Elf64_Ehdr::default();
    elf.read_exact(header.as_mut_slice())?;
    if header.e_ident.get(..5) != Some(b"\x7fELF\x02") {
        return Ok(false);
    }
    let Some(segments) = program_headers(elf, &header, length)? else { return Ok(false) };
    let inside = |s: &Elf64_Phdr| s.p_offset.checked_add(s.p_filesz).is_some_and(|end| end <= length);
    let loads = |s: &Elf64_Phdr| s.p_type == PT_LOAD && s.p_filesz > 0;
    Ok(segments.iter().all(|segment| segment.p_filesz == 0 || inside(segment)) && segments.iter().any(loads))
}

/// The program headers; `None` if they, or what they name, do not lie in the file.
fn program_headers(elf: &mut File, header: &Elf64_Ehdr, length: u64) -> io::Result<Option<Vec<Elf64_Phdr>>> {
    let one = size_of::<Elf64_Phdr>() as u64;
    let all = one * u64::from(header.e_phnum);
    let inside = |start: u64, len: u64| start.checked_add(len).is_some_and(|end| end <= length);
    if u64::from(header.e_phentsize) != one || !inside(header.e_phoff, all) {
        return Ok(None);
    }
    elf.seek(SeekFrom::Start(header.e_phoff))?;
    let mut segments = vec![Elf64_Phdr::default(); usize::from(header.e_phnum)];
    for segment in &mut segments {
        elf.read_exact(segment.as_mut_slice())?;
    }
    let sound = |segment: &Elf64_Phdr| {
        inside(segment.p_offset, segment.p_filesz)
            && segment.p_filesz <= segment.p_memsz
            && segment.p_paddr.checked_add(segment.p_memsz).is_some()
            && segment.p_vaddr.checked_add(segment.p_memsz).is_some()
    };
    let sound = segments.iter().filter(|segment| segment.p_type == PT_LOAD).all(sound);
    Ok(sound.then_some(segments))
}

/// Adds the runs of `segment` to `to`.
fn cut(elf: &mut File, segment: &Elf64_Phdr, to: &mut Vec<Elf64_Phdr>) -> io::Result<()> {
    let runs = runs(elf, segment)?;
    for (i, (start, end)) in runs.iter().enumerate() {
        // Memory up to the next run belongs to this one.
        let until = runs.get(i + 1).map_or(segment.p_memsz, |(next, _)| *next);
        to.push(Elf64_Phdr {
            p_offset: segment.p_offset + start,
            p_vaddr: segment.p_vaddr + start,
            p_paddr: segment.p_paddr + start,
            p_filesz: end - start,
            p_memsz: until - start,
            ..*segment
        });
    }
    Ok(())
}

/// Where in the segment there is something but zeros, from and to, in order; its first page always counts.
fn runs(elf: &mut File, segment: &Elf64_Phdr) -> io::Result<Vec<(u64, u64)>> {
    elf.seek(SeekFrom::Start(segment.p_offset))?;
    let mut content = io::BufReader::with_capacity(1 << 20, elf).take(segment.p_filesz);
    let mut runs: Vec<(u64, u64)> = Vec::new();
    let (mut page, mut at) = ([0; PAGE], 0);
    while at < segment.p_filesz {
        let len = PAGE.min((segment.p_filesz - at) as usize);
        content.read_exact(&mut page[..len])?;
        let end = at + len as u64;
        let filled = at == 0 || page[..len].iter().any(|byte| *byte != 0);
        match runs.last_mut() {
            Some((_, last)) if filled && at - *last < GAP => *last = end,
            _ if filled => runs.push((at, end)),
            _ => {}
        }
        at = end;
    }
    Ok(runs)
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use linux_loader::loader::{Elf, KernelLoader};
    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

    use super::*;

    const AT: u64 = 0x10_0000;

    fn elf(pieces: &[(bool, usize)], bss: u64) -> File {
        let content: Vec<u8> = pieces
            .iter()
            .flat_map(|(filled, len)| std::iter::repeat_n(if *filled { 0xa5 } else { 0 }, *len))
            .collect();
        let head = (size_of::<Elf64_Ehdr>() + size_of::<Elf64_Phdr>()) as u64;
        let mut header = Elf64_Ehdr {
            e_entry: AT,
            e_phoff: size_of::<Elf64_Ehdr>() as u64,
            e_phentsize: size_of::<Elf64_Phdr>() as u16,
            e_phnum: 1,
            ..Default::default()
        };
        header.e_ident[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
        let segment = Elf64_Phdr {
            p_type: PT_LOAD,
            p_offset: head,
            p_vaddr: AT,
            p_paddr: AT,
            p_filesz: content.len() as u64,
            p_memsz: content.len() as u64 + bss,
            ..Default::default()
        };
        let mut file = tempfile::tempfile().expect("a file");
        for part in [header.as_slice(), segment.as_slice(), &content] {
            file.write_all(part).expect("it is written");
        }
        file
    }

    fn load(file: &mut File) -> (Vec<u8>, u64) {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 8 << 20)]).expect("memory");
        let loaded = Elf::load(&memory, None, file, None).expect("it loads");
        let mut all = vec![0; 8 << 20];
        memory.read_slice(&mut all, GuestAddress(0)).expect("it is read");
        (all, loaded.kernel_end)
    }

    fn segments(file: &mut File) -> Vec<Elf64_Phdr> {
        let length = file.seek(SeekFrom::End(0)).expect("a length");
        file.rewind().expect("it rewinds");
        let mut header = Elf64_Ehdr::default();
        file.read_exact(header.as_mut_slice()).expect("a header");
        program_headers(file, &header, length).expect("it is read").expect("it is sound")
    }

    proptest! {
        #[test]
        fn the_same_memory_comes_out_with_and_without_its_zeros(
            pieces in proptest::collection::vec((any::<bool>(), 0usize..200_000), 0..12), bss in 0u64..100_000
        ) {
            let mut file = elf(&pieces, bss);
            let before = load(&mut file);
            leave_out_zeros(&mut file).expect("it works");
            prop_assert!(load(&mut file) == before);
        }
    }

    #[test]
    fn long_runs_of_zeros_are_not_in_the_file_and_short_ones_are() {
        let mut file = elf(
            &[(true, 8192), (false, 1 << 20), (true, 4096), (false, 8192), (true, 4096), (false, 1 << 20)],
            5,
        );
        leave_out_zeros(&mut file).expect("it works");
        let sizes: Vec<(u64, u64)> = segments(&mut file).iter().map(|s| (s.p_filesz, s.p_memsz)).collect();
        assert_eq!(sizes, [(8192, 8192 + (1 << 20)), (16384, 16384 + (1 << 20) + 5)]);
    }

    #[test]
    fn what_is_no_sound_elf_file_stays_as_it_is() {
        let mut file = elf(&[(true, 4096)], 0);
        for (offset, value) in
            [(32u64, u64::MAX), (64 + 8, u64::MAX), (64 + 32, u64::MAX), (64 + 24, u64::MAX)]
        {
            let mut before = Vec::new();
            file.seek(SeekFrom::Start(offset)).expect("it seeks");
            file.write_all(&value.to_le_bytes()).expect("it is written");
            file.rewind().expect("it rewinds");
            file.read_to_end(&mut before).expect("it is read");
            leave_out_zeros(&mut file).expect("nothing happens");
            let mut after = Vec::new();
            file.rewind().expect("it rewinds");
            file.read_to_end(&mut after).expect("it is read");
            assert!(before == after);
            file = elf(&[(true, 4096)], 0);
        }
        let mut short = tempfile::tempfile().expect("a file");
        short.write_all(b"\x7fELF").expect("it is written");
        leave_out_zeros(&mut short).expect("nothing happens");
    }
}
