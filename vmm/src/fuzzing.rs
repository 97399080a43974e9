//! Entry points for fuzzers: what people and programs outside the guest hand in.

use std::path::Path;

use crate::config::Guest;
use crate::control::protocol::read_request;

pub use crate::memory::coherence::wire::fuzz as fuzz_coherence;
pub use crate::memory::store::packed::fuzz as fuzz_packed_pages;
pub use crate::memory::store::protocol::fuzz as fuzz_memory_requests;
pub use crate::span::features::fuzz as fuzz_features;
pub use crate::span::protocol::fuzz as fuzz_span;

/// A line on the control socket.
pub fn fuzz_control_request(data: &[u8]) {
    match read_request(data) {
        Ok(request) => {
            let written = serde_json::to_vec(&request).expect("a request can be written");
            assert_eq!(read_request(&written), Ok(request), "a request reads as it was written");
        }
        Err(answer) => {
            let line = answer.line();
            assert_eq!(line.iter().filter(|byte| **byte == b'\n').count(), 1, "an answer is one line");
        }
    }
}

/// A guest's configuration.
pub fn fuzz_guest_config(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    match Guest::parse(Path::new("guest.toml"), text) {
        Ok(guest) => {
            assert!((1..=64).contains(&guest.cpu.count));
            assert!(guest.kernel.cmdline.len() < 2048);
            assert!(guest.check("again").is_ok(), "what was accepted is valid");
        }
        Err(mistakes) => {
            assert!(!mistakes.0.is_empty(), "a refusal has a reason");
            assert!(mistakes.0.iter().all(|mistake| !mistake.what.is_empty()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Target = fn(&[u8]);

    #[test]
    fn no_random_mutation_of_the_corpus_does_harm() {
        let targets: [(&str, Target); 2] =
            [("control_request", fuzz_control_request), ("guest_config", fuzz_guest_config)];
        let mut seed = 0x2545_f491_4f6c_dd1d_u64;
        let mut roll = move |limit: usize| {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            (seed % limit.max(1) as u64) as usize
        };
        let mut ran = 0;
        for (name, target) in targets {
            let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fuzz/corpus").join(name);
            let files = std::fs::read_dir(&folder).expect("the corpus is there");
            let corpus: Vec<Vec<u8>> = files
                .map(|file| std::fs::read(file.expect("it is listed").path()).expect("it is read"))
                .collect();
            assert!(!corpus.is_empty(), "{}", folder.display());
            corpus.iter().for_each(|bytes| target(bytes));
            for _ in 0..1500 {
                let mut bytes = corpus[roll(corpus.len())].clone();
                for _ in 0..=roll(4) {
                    let at = roll(bytes.len());
                    match roll(4) {
                        0 if !bytes.is_empty() => bytes[at] = roll(256) as u8,
                        1 => bytes.insert(at, b"[]{}'\"=,\n0-"[roll(11)]),
                        2 => bytes.truncate(at),
                        _ => {
                            let other = &corpus[roll(corpus.len())];
                            bytes.extend_from_slice(&other[roll(other.len())..]);
                        }
                    }
                }
                target(&bytes);
            }
            ran += corpus.len();
        }
        eprintln!("fuzz corpus: {ran} inputs");
    }
}
