//! The fewest bytes with which anybody could have kept the age of the recovery point within a limit, knowing the
//! future, over a link without limits.
//!
//! A backup that is consistent at every instant holds, one after the other, images of the primary at times
//! `s0 < s1 < ..`. With an age of at most `A` at every instant, two images that follow each other are at most `A`
//! apart: just before the second one is there, which is not before its own time, the first one is at most `A` old. To
//! get from one to the next, each block that was written between them has to travel once; and what travelled for one
//! pair of images is an older version than what travels for the next. So no strategy sends less than the cheapest
//! sequence of times that are at most `A` apart, where a step costs the distinct blocks written in it. That sequence is
//! found by going forward over a grid of time: `best(j) = min over i of best(i) + distinct(i, j)`.
//!
//! Two steps that together span at most `A` can be made one, which costs no more. So only sequences count in which an
//! image and the one after the next are more than `A` apart.
//!
//! It stays a bound on a grid, because a step from a time inside cell `i` to a time inside cell `j` is charged for the
//! cells between them only. What lies in the cells `i` and `j` themselves may be charged too little, never too much.
//! Cells are a thirty-second of `A`, larger for a workload of very many of them. Any sequence of images has to end with
//! all that was written, so the distinct blocks of the whole workload are a bound too; the larger one counts.
//!
//! The bound leaves out: the rate of the link, round trips, framing, and that contents repeat.

use foldhash::HashSet;

use super::workload::Workload;

/// Cells within the age.
const CELLS_AN_AGE: u64 = 32;

/// Cells of the whole workload: bounds time and memory.
const CELLS_MAX: u64 = 200_000;

/// Bytes, for an age of the recovery point of at most `age_ms`.
pub(super) fn bytes(workload: &dyn Workload, age_ms: u64) -> u64 {
    let end_ms = workload.writes().last().map_or(0, |write| write.at_ms);
    let cell_ms = (age_ms / CELLS_AN_AGE).max(end_ms / CELLS_MAX).max(1);
    let cells = index(end_ms / cell_ms + 1);
    // Times at most an age apart lie in cells at most this many apart; times further apart, at least one less.
    let reach = index(age_ms / cell_ms + 1).min(cells + 1);
    let mut written: Vec<Vec<(u64, u64)>> = vec![Vec::new(); cells];
    let mut all = HashSet::default();
    for write in workload.writes() {
        written[index(write.at_ms / cell_ms)].push((write.first, write.count));
        all.extend(write.first..write.first + write.count);
    }
    for cell in &mut written {
        cell.sort_unstable();
        cell.dedup();
    }
    let distinct = u64::try_from(all.len()).unwrap_or(u64::MAX);
    cheapest(&written, reach).max(distinct) * workload.block_bytes()
}

/// Blocks of the cheapest sequence of images. The first is in front of everything, in cell 0; cell `n` of the workload
/// is `n + 1`; the last is behind everything.
fn cheapest(written: &[Vec<(u64, u64)>], reach: usize) -> u64 {
    let last = written.len() + 1;
    // best[j % reach][d]: an image in cell j, the one before it d cells earlier; d = 0: it is the first.
    let mut best = vec![vec![NEVER; reach + 1]; reach + 1];
    best[0][0] = 0;
    for from in 0..last {
        // The next step may be short only if this one was long.
        let mut reached = best[from % (reach + 1)].clone();
        best[from % (reach + 1)].fill(NEVER);
        let first = reached[0];
        for step in (1..reach).rev() {
            reached[step] = reached[step].min(reached[step + 1]);
        }
        let mut blocks = HashSet::default();
        for step in 1..=reach.min(last - from) {
            let before = reached[(reach - 1).saturating_sub(step).max(1)].min(first);
            let cost = u64::try_from(blocks.len()).unwrap_or(NEVER);
            let slot = &mut best[(from + step) % (reach + 1)][step];
            *slot = (*slot).min(before.saturating_add(cost));
            if from + step < last {
                blocks.extend(written[from + step - 1].iter().flat_map(|(first, count)| *first..first + count));
            }
        }
    }
    best[last % (reach + 1)].iter().copied().min().filter(|blocks| *blocks != NEVER).unwrap_or(0)
}

const NEVER: u64 = u64::MAX;

fn index(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::simulate::workload::BlockWrite;

    struct Given(Vec<BlockWrite>);

    impl Workload for Given {
        fn writes(&self) -> Box<dyn Iterator<Item = BlockWrite> + '_> {
            Box::new(self.0.iter().copied())
        }

        fn block_bytes(&self) -> u64 {
            1
        }
    }

    /// One block, written every 10 ms for 100 s.
    fn hot() -> Given {
        Given((0..10_000).map(|n| BlockWrite { at_ms: n * 10, first: 0, count: 1 }).collect())
    }

    #[test]
    fn a_hot_block_travels_once_an_age() {
        let (young, old) = (bytes(&hot(), 1000), bytes(&hot(), 10_000));
        assert!((90..=100).contains(&young), "{young}");
        assert!((9..=10).contains(&old), "{old}");
        assert_eq!(bytes(&hot(), 1_000_000), 1);
    }

    #[test]
    fn blocks_written_once_travel_once_however_old_the_backup_may_get() {
        let once = Given((0..1000).map(|n| BlockWrite { at_ms: n * 7, first: n * 3, count: 2 }).collect());
        for age in [1, 50, 100_000] {
            assert_eq!(bytes(&once, age), 2000, "{age}");
        }
    }

    #[test]
    fn it_is_never_above_what_any_schedule_of_cuts_sends() {
        use rand::{Rng as _, SeedableRng as _};
        let mut random = rand_pcg::Pcg64Mcg::seed_from_u64(3);
        let mut at_ms = 0;
        let writes = (0..2000).map(|_| {
            at_ms += random.random_range(0..40);
            BlockWrite { at_ms, first: random.random_range(0..60), count: random.random_range(1..4) }
        });
        let workload = Given(writes.collect());
        for age_ms in [40, 500, 3000] {
            let bound = bytes(&workload, age_ms);
            for start in 0..age_ms.min(37) {
                let (mut sent, mut cut, mut blocks) = (0, start, HashSet::default());
                for write in workload.writes() {
                    while write.at_ms > cut {
                        sent += blocks.len() as u64;
                        blocks.clear();
                        cut += age_ms;
                    }
                    blocks.extend(write.first..write.first + write.count);
                }
                sent += blocks.len() as u64;
                assert!(bound <= sent, "{bound} is above {sent} for {age_ms} from {start}");
            }
        }
    }
}
