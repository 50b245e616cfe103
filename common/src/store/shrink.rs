//! Cutting off the end of a volume.
//!
//! Invariants:
//! - Only what reads as zeros is cut off. The range is watched while it is looked at, and the record is admitted only if
//!   nothing wrote there in between, nor the catalogue changed: so a shrink changes no byte of what is kept, and loses none
//!   of what is cut off.
//! - Behind the end of a volume the head has no blocks. The record frees what is there, zeros that were written, on
//!   each side; the volume keeps its place in the pool, for snapshots that are larger.
//! - Marks behind the end stay, and runs leave them out. If the volume grows again before the next cut, the backup has not
//!   heard of the shrink, and holds there what was discarded. Nor may they go before the shrink is durable.

use thiserror::Error;

use crate::{
    record::Control,
    types::{BlockRange, GroupId, VolumeId},
};

use super::{ReadFailure, Store, SubmitError, Submitted};

/// Blocks that are read at once.
const STEP_BLOCKS: u64 = 256;
/// Blocks that are looked at for holes at once.
const EXTENT_BLOCKS: u64 = 1 << 16;
/// Looks before the volume is said to be written too often.
const TRIES: usize = 8;

/// Why a volume is not made smaller.
#[derive(Debug, Error)]
pub enum ShrinkError {
    /// It is not larger.
    #[error("volume {0} is not larger than that")]
    NotLarger(VolumeId),
    /// Something is stored behind the new end.
    #[error("block {block} of volume {volume} holds data")]
    Data {
        /// The volume.
        volume: VolumeId,
        /// The first such block.
        block: u64,
    },
    /// It is written there, or the catalogue changes, faster than it can be looked at.
    #[error(
        "volume {0} was written behind the new end, or other volumes or snapshots changed, each time it was looked at"
    )]
    Busy(VolumeId),
    /// It cannot be looked at.
    #[error(transparent)]
    Read(#[from] ReadFailure),
    /// The record is refused.
    #[error(transparent)]
    Submit(#[from] SubmitError),
}

impl Store {
    /// Makes a volume smaller, if all that is cut off reads as zeros. `size_bytes` is a number of whole blocks. Reads what is
    /// stored there: for a thread that may wait.
    ///
    /// # Errors
    /// See [`ShrinkError`]; nothing was changed then.
    pub fn shrink(&self, volume: VolumeId, size_bytes: u64, time_unix_ms: i64) -> Result<Submitted, ShrinkError> {
        for _ in 0..TRIES {
            let (watch, group, range) = self.watch_end(volume, size_bytes)?;
            let data = self.first_data(range);
            let mut front = self.front.lock();
            if front.watches.end(watch) {
                continue;
            }
            if let Some(block) = data? {
                return Err(ShrinkError::Data { volume, block });
            }
            let control = Control::ResizeVolume { volume, size_bytes };
            return Ok(self.submit_control_locked(&mut front, group, control, time_unix_ms)?);
        }
        Err(ShrinkError::Busy(volume))
    }

    /// Begins to watch what is to be cut off.
    fn watch_end(&self, volume: VolumeId, size_bytes: u64) -> Result<(u64, GroupId, BlockRange), ShrinkError> {
        let mut front = self.front.lock();
        let spec = front.state.volumes.get(&volume).ok_or(SubmitError::NoVolume(volume))?;
        let first = size_bytes / u64::from(spec.block_size.bytes());
        let count = spec.block_count().checked_sub(first).filter(|count| *count > 0);
        let range = BlockRange { volume, first, count: count.ok_or(ShrinkError::NotLarger(volume))? };
        let group = spec.group;
        Ok((front.watches.begin(range), group, range))
    }

    /// The first block of a range that does not read as zeros.
    fn first_data(&self, range: BlockRange) -> Result<Option<u64>, ReadFailure> {
        let mut at = range.first;
        while at < range.end() {
            let (hole, count) = self.extent(range.volume, at, (range.end() - at).min(EXTENT_BLOCKS))?;
            if hole {
                at += count;
                continue;
            }
            let count = count.min(STEP_BLOCKS);
            let read = self.read(range.volume, at, count)?;
            if let Some(byte) = read.data.iter().position(|byte| *byte != 0) {
                let block_bytes = read.data.len() as u64 / count;
                return Ok(Some(at + byte as u64 / block_bytes));
            }
            at += count;
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::Arc,
        thread::{scope, yield_now},
    };

    use super::*;
    use crate::{
        storage::sim::SimStorage,
        store::{
            Change, fsck,
            snapshot::SnapshotError,
            testing::{checkpoint, commit, create, open, write},
        },
        types::SnapshotId,
    };

    const BLOCK: u64 = 512;
    const BLOCKS: u64 = 2048;
    const V: VolumeId = VolumeId(1);

    fn made() -> (SimStorage, Arc<Store>) {
        let disk = SimStorage::new(1);
        let store = open(Arc::new(disk.clone()), 2);
        create(&store, 1);
        (disk, store)
    }

    fn zero(store: &Store, first: u64, count: u64) {
        store.submit(V, first, Change::Zero { count }, None, 5).unwrap();
    }

    fn resize(store: &Store, blocks: u64) {
        store.submit_control(GroupId(1), Control::ResizeVolume { volume: V, size_bytes: blocks * BLOCK }, 5).unwrap();
        commit(store);
    }

    #[test]
    fn only_zeros_are_cut_off_and_their_space_comes_back() {
        let (disk, store) = made();
        for (block, byte) in [(10, 1), (700, 0), (900, 2), (2047, 3)] {
            write(&store, 1, block, byte);
        }
        let refused = |blocks: u64| match store.shrink(V, blocks * BLOCK, 6) {
            Err(ShrinkError::Data { volume: V, block }) => block,
            other => panic!("{other:?}"),
        };
        assert_eq!(refused(2047), 2047);
        assert_eq!(refused(500), 900);
        // What is on its way counts, data as well as a discard.
        zero(&store, 800, 1200);
        assert_eq!(refused(500), 2047);
        zero(&store, 2047, 1);
        assert!(matches!(store.shrink(V, BLOCKS * BLOCK, 6), Err(ShrinkError::NotLarger(V))));
        assert!(matches!(store.shrink(VolumeId(2), BLOCK, 6), Err(ShrinkError::Submit(SubmitError::NoVolume(_)))));
        store.shrink(V, 500 * BLOCK, 6).unwrap();
        commit(&store);
        assert!(matches!(store.read(V, 499, 2), Err(ReadFailure::OutOfRange { blocks: 500, .. })));
        assert_eq!(store.read(V, 10, 1).unwrap().data[..], [1; 512]);
        checkpoint(&store);
        let found = fsck(&disk, true, &[]).unwrap();
        assert_eq!((found.problems, found.owned_blocks), (Vec::new(), 1));

        // Larger again, what it gains reads as zeros and can be written.
        resize(&store, BLOCKS);
        assert_eq!(store.extent(V, 500, BLOCKS - 500).unwrap(), (true, BLOCKS - 500));
        write(&store, 1, 900, 4);
        assert_eq!(store.read(V, 900, 1).unwrap().data[..], [4; 512]);
    }

    #[test]
    fn a_snapshot_that_is_larger_stays_whole() {
        let (disk, store) = made();
        write(&store, 1, 10, 1);
        write(&store, 1, 900, 2);
        let (snapshot, _) = store.take_snapshot(GroupId(1), "before", 5).unwrap();
        zero(&store, 900, 1);
        store.shrink(V, 500 * BLOCK, 6).unwrap();
        commit(&store);
        let (again, _) = store.take_snapshot(GroupId(1), "after", 7).unwrap();
        commit(&store);
        checkpoint(&store);
        assert_eq!(fsck(&disk, true, &[]).unwrap().problems, Vec::<String>::new());
        let reader = store.snapshot_reader(snapshot.id, V).unwrap();
        assert_eq!(reader.spec().block_count(), BLOCKS);
        assert_eq!(reader.read(900, 1).unwrap()[..], [2; 512]);
        // Of what is cut off nothing has changed: it is not there.
        let changed = |target: Option<SnapshotId>| store.changed_blocks(V, snapshot.id, target, 0).unwrap().0;
        assert_eq!((changed(None), changed(Some(again.id))), (vec![], vec![]));
        let small = store.begin_restore(snapshot.id, vec![(V, V)], 8);
        assert!(
            matches!(small, Err(SnapshotError::Smaller { held_bytes: 0x10_0000, size_bytes: 256_000, .. })),
            "{small:?}"
        );
        resize(&store, BLOCKS);
        assert_eq!(changed(None), vec![BlockRange { volume: V, first: 900, count: 1 }]);
        store.begin_restore(snapshot.id, vec![(V, V)], 8).unwrap();
    }

    #[test]
    fn what_is_written_while_a_volume_is_cut_is_not_lost() {
        let (_, store) = made();
        for round in 1..200_u8 {
            let cut = scope(|scope| {
                let writer = scope.spawn(|| {
                    let mut rounds = 0;
                    loop {
                        let data = bytes::Bytes::from(vec![round; 512]);
                        let crcs = vec![crate::checksum::crc32c(&data)].into();
                        match store.submit(V, 900, Change::Write { data, crcs }, None, 5) {
                            // Cut while nothing was there.
                            Err(SubmitError::OutOfRange { .. }) => return rounds,
                            other => other.unwrap(),
                        };
                        yield_now();
                        // It was taken, so the volume still reaches there.
                        store.submit(V, 900, Change::Zero { count: 1 }, None, 5).unwrap();
                        rounds += 1;
                        commit(&store);
                    }
                });
                let mut cut = store.shrink(V, 500 * BLOCK, 6);
                while let Err(ShrinkError::Data { .. } | ShrinkError::Busy(_)) = cut {
                    cut = store.shrink(V, 500 * BLOCK, 6);
                }
                writer.join().unwrap();
                cut
            });
            cut.unwrap();
            resize(&store, BLOCKS);
        }
    }
}
