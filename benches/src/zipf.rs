//! Accesses of which few pages get most.

use crate::random::Random;
use crate::region::Region;

/// Accesses drawn from a Zipf distribution over a number of pages, spread over all of them. They are drawn
/// beforehand, so that drawing costs no time when they are made, and repeat after [`Zipf::LENGTH`].
pub struct Zipf {
    /// The page, and in the highest bit whether it is written.
    accesses: Vec<u32>,
    at: usize,
}

const WRITE: u32 = 1 << 31;

impl Zipf {
    /// After so many accesses the same ones come again.
    pub const LENGTH: usize = 1 << 20;

    /// Accesses to `pages` pages (below 2^31); the weight of the n-th most popular one is n to the power of
    /// `-exponent`. One in `writes` writes.
    #[must_use]
    pub fn new(pages: u64, exponent: f64, writes: u64, seed: u64) -> Self {
        let mut sum = 0.0;
        let weigh = |rank: u64| {
            sum += ((rank + 1) as f64).powf(-exponent);
            sum
        };
        let weights: Vec<f64> = (0..pages).map(weigh).collect();
        let mut order: Vec<u32> = (0..pages as u32).collect();
        let mut random = Random::new(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        for at in (1..order.len()).rev() {
            order.swap(at, random.below(at as u64 + 1) as usize);
        }
        let total = weights.last().copied().unwrap_or_default();
        let draw = |_| {
            let at = random.below(1 << 52) as f64 / (1_u64 << 52) as f64 * total;
            let rank = weights.partition_point(|weight| *weight <= at).min(order.len().saturating_sub(1));
            let write = if random.below(writes) == 0 { WRITE } else { 0 };
            order.get(rank).copied().unwrap_or_default() | write
        };
        Self { accesses: (0..Self::LENGTH).map(draw).collect(), at: 0 }
    }

    /// Makes the next `count` accesses to `region`.
    pub fn run(&mut self, region: &Region, count: u64) {
        for _ in 0..count {
            let access = self.accesses[self.at];
            self.at = (self.at + 1) % self.accesses.len();
            let page = u64::from(access & !WRITE);
            let value = region.read(page);
            if access & WRITE != 0 {
                region.write(page, value.wrapping_add(1));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_pages_get_most_accesses_and_all_pages_are_of_the_region() {
        let zipf = Zipf::new(1000, 1.0, 4, 1);
        let mut counts = vec![0_u32; 1000];
        let mut writes = 0;
        for access in &zipf.accesses {
            counts[(access & !WRITE) as usize] += 1;
            writes += usize::from(access & WRITE != 0);
        }
        counts.sort_unstable_by(|a, b| b.cmp(a));
        let share = f64::from(counts[..100].iter().sum::<u32>()) / Zipf::LENGTH as f64;
        assert!((0.64..0.74).contains(&share), "a tenth of the pages gets {share:.3}"); // H(100) / H(1000) = 0.693
        assert!((0.24..0.26).contains(&(writes as f64 / Zipf::LENGTH as f64)), "{writes} writes");
    }
}
