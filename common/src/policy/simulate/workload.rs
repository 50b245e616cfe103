//! What clients write in a simulation: a trace, or a shape that tests use.

use std::f64::consts::E;

use rand::{Rng as _, SeedableRng as _};
use rand_pcg::Pcg64Mcg;

use super::trace::Trace;

/// A write of whole blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockWrite {
    /// Milliseconds since the beginning.
    pub at_ms: u64,
    /// First block; blocks of different devices never have one number.
    pub first: u64,
    /// Never 0.
    pub count: u64,
}

/// Writes in the order of time; the same each time it is asked.
pub trait Workload {
    /// The writes.
    fn writes(&self) -> Box<dyn Iterator<Item = BlockWrite> + '_>;
    /// Size of a block.
    fn block_bytes(&self) -> u64;
}

/// A trace in whole blocks: a partial block is read, changed and shipped whole.
#[derive(Debug)]
pub struct TraceWorkload {
    /// As it was read.
    pub trace: Trace,
    /// A power of two.
    pub block_bytes: u64,
}

/// Blocks of a device: more than any has.
const DEVICE_BLOCKS: u64 = 1 << 54;

impl Workload for TraceWorkload {
    fn writes(&self) -> Box<dyn Iterator<Item = BlockWrite> + '_> {
        Box::new(self.trace.writes.iter().map(|write| {
            let first = write.offset_bytes / self.block_bytes;
            let last = write.offset_bytes.saturating_add(write.length_bytes - 1) / self.block_bytes;
            let device = u64::from(write.device).wrapping_mul(DEVICE_BLOCKS);
            BlockWrite { at_ms: write.at_us / 1000, first: device.wrapping_add(first), count: last - first + 1 }
        }))
    }

    fn block_bytes(&self) -> u64 {
        self.block_bytes
    }
}

/// Which blocks are written.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Pattern {
    /// One after the other, around so many.
    Sequential(u64),
    /// Any of so many.
    Uniform(u64),
    /// Nine of ten writes go to a small set, the others anywhere.
    HotSpot {
        /// Blocks of the small set.
        hot: u64,
        /// All blocks.
        all: u64,
    },
    /// Of so many blocks, block n with a weight of about 1/n.
    Zipf(u64),
}

/// A rate over time, bytes a second at a millisecond.
pub type Shape = dyn Fn(u64) -> u64;

/// Writes of one block each, at a rate that changes with time.
pub struct Shaped {
    /// Milliseconds.
    pub length_ms: u64,
    /// Size of a block.
    pub block_bytes: u64,
    /// How much is written when.
    pub shape: Box<Shape>,
    /// The rate of each tenth of a second differs by up to so many thousandths.
    pub noise_permille: u32,
    /// What is written.
    pub pattern: Pattern,
    /// Of noise and pattern.
    pub seed: u64,
}

impl Workload for Shaped {
    fn writes(&self) -> Box<dyn Iterator<Item = BlockWrite> + '_> {
        const STEP_MS: u64 = 100;
        let mut random = Pcg64Mcg::seed_from_u64(self.seed);
        let noise = self.noise_permille.min(1000);
        let (mut owed, mut next) = (0_u64, 0_u64);
        let steps = (0..self.length_ms / STEP_MS).flat_map(move |step| {
            let at_ms = step * STEP_MS;
            let factor = u64::from(random.random_range(1000 - noise..=1000 + noise));
            owed += (self.shape)(at_ms) * STEP_MS / 1000 * factor / 1000;
            let writes = owed / self.block_bytes;
            owed %= self.block_bytes;
            let blocks: Vec<u64> = (0..writes)
                .map(|_| {
                    next += 1;
                    self.pattern.block(next, &mut random)
                })
                .collect();
            let spread = move |(n, first)| BlockWrite { at_ms: at_ms + n * STEP_MS / writes, first, count: 1 };
            (0..).zip(blocks).map(spread)
        });
        Box::new(steps)
    }

    fn block_bytes(&self) -> u64 {
        self.block_bytes
    }
}

impl Pattern {
    /// The block of the `n`th write.
    pub fn block(self, n: u64, random: &mut Pcg64Mcg) -> u64 {
        match self {
            Self::Sequential(all) => n % all,
            Self::Uniform(all) => random.random_range(0..all),
            Self::HotSpot { hot, all } if random.random_range(0..10) > 0 => random.random_range(0..hot.min(all)),
            Self::HotSpot { all, .. } => random.random_range(0..all),
            Self::Zipf(all) => zipf(all, random),
        }
    }
}

/// The inverse of the continuous distribution with density 1/x between 1 and `all`.
#[allow(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a random block of a workload for tests"
)]
fn zipf(all: u64, random: &mut Pcg64Mcg) -> u64 {
    let top = (all as f64).ln();
    let at = E.powf(random.random_range(0.0..1.0) * top) as u64;
    at.saturating_sub(1).min(all - 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::simulate::trace::TraceWrite;

    #[test]
    fn partial_blocks_of_a_trace_count_whole() {
        let write =
            |at_us, device, offset_bytes, length_bytes| TraceWrite { at_us, device, offset_bytes, length_bytes };
        let trace = Trace {
            writes: vec![write(0, 0, 4095, 2), write(1999, 0, 8192, 4096), write(2000, 1, 0, 1)],
            ..Trace::default()
        };
        let workload = TraceWorkload { trace, block_bytes: 4096 };
        let blocks: Vec<_> = workload.writes().map(|write| (write.at_ms, write.first, write.count)).collect();
        assert_eq!(blocks, [(0, 0, 2), (1, 2, 1), (2, DEVICE_BLOCKS, 1)]);
    }

    #[test]
    fn a_shape_writes_at_its_rate_and_always_the_same() {
        let patterns = [
            Pattern::Sequential(1000),
            Pattern::Uniform(1000),
            Pattern::HotSpot { hot: 10, all: 1000 },
            Pattern::Zipf(1000),
        ];
        for pattern in patterns {
            let workload = Shaped {
                length_ms: 10_000,
                block_bytes: 4096,
                shape: Box::new(|at| if at < 5000 { 4096 * 100 } else { 0 }),
                noise_permille: 50,
                pattern,
                seed: 7,
            };
            let writes: Vec<_> = workload.writes().collect();
            assert!(writes.len().abs_diff(500) < 25, "{}", writes.len());
            assert!(writes.iter().all(|write| write.first < 1000 && write.at_ms < 5000));
            assert!(writes.is_sorted_by_key(|write| write.at_ms));
            assert!(workload.writes().eq(writes));
        }
    }
}
