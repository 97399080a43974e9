//! For tests: numbers that only have to be scattered, the same in every run, and what they do to the bytes of a
//! fuzz corpus.

/// A small generator (xorshift); its seed is not 0.
pub(crate) struct Dice(pub(crate) u64);

impl Dice {
    /// A number below `sides`; 0 if that is 0.
    pub(crate) fn roll(&mut self, sides: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 20) as usize % sides.max(1)
    }

    /// One of `corpus` with 1 to `most` changes: a byte at its limits, a flipped bit, an early end, a piece of
    /// another one.
    pub(crate) fn mutate(&mut self, corpus: &[Vec<u8>], most: usize) -> Vec<u8> {
        let mut bytes = corpus[self.roll(corpus.len())].clone();
        for _ in 0..=self.roll(most) {
            let at = self.roll(bytes.len());
            match self.roll(4) {
                0 => bytes[at] = EDGES[self.roll(EDGES.len())],
                1 => bytes[at] ^= 1 << self.roll(8),
                2 => bytes.truncate(at + 1),
                _ => {
                    let other = corpus[self.roll(corpus.len())].clone();
                    let from = self.roll(other.len());
                    bytes.splice(at..at, other[from..].iter().take(64).copied());
                }
            }
        }
        bytes
    }
}

/// Bytes that change a field to its limits and beyond.
const EDGES: [u8; 7] = [0, 1, 2, 0x7f, 0x80, 0x81, 0xff];

/// Runs `seed`, `seed` with each of its first `within` bytes at each limit, and `seed` cut off there.
pub(crate) fn run_edges(seed: &[u8], within: usize, run: impl Fn(&[u8])) {
    run(seed);
    for at in 0..seed.len().min(within) {
        for edge in EDGES {
            let mut bytes = seed.to_vec();
            bytes[at] = edge;
            run(&bytes);
        }
        run(&seed[..at]);
    }
}
